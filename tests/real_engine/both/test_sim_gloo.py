"""Simulated `vllm serve` processes in a real update group: what they hold is what was broadcast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from trl_pool.sim import SimFleet, SimProcess, start_fleet
from trl_pool.weights import gloo, packing, rendezvous

HOST = "127.0.0.1"
BUFFER = 64  # bytes: several buffers for a few small tensors
Tensors = list[tuple[str, torch.Tensor]]


@pytest.fixture
def fleet() -> Iterator[SimFleet]:
    with start_fleet(2, dialect="vllm", weight_transfer="gloo") as sims:
        yield sims


def post(sim: SimProcess, path: str, body: Any = None, timeout: float = 30.0) -> httpx.Response:
    return httpx.post(sim.url + path, json=body or {}, timeout=timeout, trust_env=False)


def tokens(sim: SimProcess) -> list[int]:
    body = {"prompt": "Hello", "max_tokens": 8, "return_token_ids": True, "ignore_eos": True}
    found: list[int] = post(sim, "/v1/completions", body).raise_for_status().json()["choices"][0]["token_ids"]
    return found


def some_weights(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(4, 8), (16,), (), (3, 5), (2, 2)]
    dtypes = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float16]
    return [
        (f"p{i}", torch.randn(shape, generator=generator).to(dtype))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def metadata(tensors: Tensors) -> list[tuple[str, str, list[int]]]:
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors]


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
    pool = ThreadPoolExecutor(len(calls))
    futures = [pool.submit(call) for call in calls]
    pool.shutdown(wait=False)
    return futures


def join(sims: Sequence[SimProcess], ranks: int = 1, timeout: float = 20.0) -> gloo.GlooGroup:
    """One group of the trainer and all servers at consecutive offsets."""
    listener = rendezvous.listen(HOST)
    info = {
        "master_address": HOST,
        "master_port": listener.getsockname()[1],
        "world_size": 1 + ranks * len(sims),
        "packed_buffer_size_bytes": BUFFER,
        "timeout_seconds": timeout,
    }

    def init(index: int) -> httpx.Response:
        body = {"init_info": {**info, "rank_offset": 1 + index * ranks}}
        return post(sims[index], "/init_weight_transfer_engine", body).raise_for_status()

    answers = at_once([lambda i=i: init(i) for i in range(len(sims))])
    group = gloo.open_group(
        HOST, info["master_port"], 0, info["world_size"], master=True, timeout=timeout, listener=listener
    )
    for answer in answers:
        answer.result()
    return group


def announce(sims: Sequence[SimProcess], tensors: Tensors) -> list[Future[httpx.Response]]:
    names, dtypes, shapes = (list(column) for column in zip(*metadata(tensors), strict=True))
    body = {"update_info": {"names": names, "dtype_names": dtypes, "shapes": shapes}}
    return at_once([lambda sim=sim: post(sim, "/update_weights", body) for sim in sims])


def push(group: gloo.GlooGroup, sims: Sequence[SimProcess], tensors: Tensors, version: str) -> None:
    for sim in sims:
        post(sim, "/start_weight_update").raise_for_status()
    answers = announce(sims, tensors)
    packer = packing.Packer(metadata(tensors), BUFFER, device="cpu")
    buffers = [packer.add(name, tensor) for name, tensor in tensors]
    for buffer in (*buffers, packer.flush()):
        if buffer is not None:
            group.broadcast(buffer, 0)
    for answer in answers:
        answer.result().raise_for_status()
    for sim in sims:
        post(sim, "/finish_weight_update", {"weight_version": version}).raise_for_status()


def test_one_broadcast_gives_all_servers_the_same_weights_and_only_bytes_count(fleet: SimFleet) -> None:
    group = join(fleet)
    seen = [tokens(fleet[0])]
    for seed in (1, 2):
        push(group, fleet, some_weights(seed), f"v{seed}")
        assert tokens(fleet[0]) == tokens(fleet[1])
        assert tokens(fleet[0]) not in seen
        seen.append(tokens(fleet[0]))
    push(group, fleet, some_weights(1), "another name")
    assert tokens(fleet[0]) == seen[1]
    changed = some_weights(1)
    changed[2] = ("p2", changed[2][1] + 1)
    push(group, fleet, changed, "v1")
    assert tokens(fleet[0]) == tokens(fleet[1]) != seen[1]
    group.close()


def test_a_server_that_was_restarted_has_the_others_tokens_after_a_whole_update(fleet: SimFleet) -> None:
    first = tokens(fleet[0])
    group = join(fleet)
    push(group, fleet, some_weights(1), "v1")
    group.close()
    fleet[1].restart()
    assert tokens(fleet[1]) == first != tokens(fleet[0])
    group = join(fleet)
    push(group, fleet, some_weights(2), "v2")
    assert tokens(fleet[0]) == tokens(fleet[1])
    group.close()


def test_a_lost_trainer_leaves_servers_stuck_and_then_with_mixed_weights(fleet: SimFleet) -> None:
    before = tokens(fleet[0])
    group = join(fleet, timeout=4.0)
    tensors = some_weights(1)
    for sim in fleet:
        post(sim, "/start_weight_update").raise_for_status()
    answers = announce(fleet, tensors)
    packer = packing.Packer(metadata(tensors), BUFFER, device="cpu")
    sent = next(buffer for name, tensor in tensors if (buffer := packer.add(name, tensor)) is not None)
    group.broadcast(sent, 0)
    # Nothing more comes. The API answers, the engine does not.
    assert httpx.get(fleet[0].url + "/health", trust_env=False).status_code == 200
    for path in ("/weight_info", "/is_paused"):
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(fleet[0].url + path, timeout=0.3, trust_env=False)
    with pytest.raises(httpx.ReadTimeout):
        post(fleet[0], "/v1/completions", {"prompt": "x"}, timeout=0.3)
    started = time.monotonic()
    group.close()
    for answer in answers:
        response = answer.result()
        assert (response.status_code, response.json()["error"]["type"]) == (500, "InternalServerError")
    assert time.monotonic() - started < 10
    for sim in fleet:
        assert not sim.state()["whole"]
        assert not sim.state()["communicator"]
        assert tokens(sim) != before
    # Healed, and fed again.
    for sim in fleet:
        post(sim, "/start_weight_update").raise_for_status()
        post(sim, "/finish_weight_update").raise_for_status()
    group = join(fleet)
    push(group, fleet, tensors, "v1")
    assert all(sim.state()["whole"] for sim in fleet)
    assert tokens(fleet[0]) == tokens(fleet[1])
    group.close()


def test_a_rendezvous_that_nobody_holds_is_an_error_in_time(fleet: SimFleet) -> None:
    listener = rendezvous.listen(HOST)
    port = listener.getsockname()[1]
    listener.close()
    info = {"master_address": HOST, "master_port": port, "rank_offset": 1, "world_size": 2, "timeout_seconds": 2.0}
    response = post(fleet[0], "/init_weight_transfer_engine", {"init_info": info})
    assert response.status_code == 500
    assert tokens(fleet[0])


def test_a_server_brings_as_many_ranks_as_it_has_workers() -> None:
    with start_fleet(2, dialect="vllm", weight_transfer="gloo", tensor_parallel_size=2) as fleet:
        group = join(fleet, ranks=2)
        push(group, fleet, some_weights(1), "v1")
        assert tokens(fleet[0]) == tokens(fleet[1])
        group.close()
