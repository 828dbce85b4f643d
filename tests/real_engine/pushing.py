"""Moves weights to real servers with nothing but plain HTTP and the package's transports: no pool, no coordinator."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import requests

from trl_pool.sim.process import hold_port
from trl_pool.weights.gloo import GlooGroup, join_stateless_group, open_group
from trl_pool.weights.packing import Packer
from trl_pool.weights.rendezvous import listen
from trl_pool.weights.wire import init_info, update_info

from .servers import HOST, Server, TrlServer, VllmServer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHECKPOINT_VERSION: Final = "default"
"""What a server says that was just started."""

TIMEOUT_SECONDS: Final = 15.0
CALL_SECONDS: Final = 60.0

# Of words that no test uses, so that no prefix cache knows them.
SEQUENCES: Final = [[(13 * i + 7 * j) % 480 + 10 for j in range(9 + 3 * i)] for i in range(6)]


def checkpoint(model_dir: Path) -> PreTrainedModel:
    """The model that the servers were started with."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype="bfloat16").eval()


def random_model(model_dir: Path, seed: int) -> PreTrainedModel:
    """The same architecture with every parameter drawn anew, far enough from the checkpoint to be told from it."""
    import torch

    model = checkpoint(model_dir)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fresh = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(fresh + 1.0 if name.endswith("norm.weight") else fresh)
    return model


def metadata(model: PreTrainedModel) -> list[tuple[str, str, list[int]]]:
    """`(name, dtype name, shape)` of every parameter."""
    return [(n, str(p.dtype).removeprefix("torch."), list(p.shape)) for n, p in model.named_parameters()]


def reference_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]] = SEQUENCES) -> list[list[float]]:
    """Transformers' logprob of each token but the first, per sequence."""
    import torch

    found = []
    for sequence in sequences:
        ids = torch.tensor([list(sequence)])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def worst_difference(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Largest distance of two scores of the same token."""
    return max(
        abs(ours - theirs)
        for one, other in zip(found, expected, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    )


class Fingerprint:
    """Tells whether servers hold the weights that one held at a certain time."""

    def __init__(self, server: Server) -> None:
        self._scores = server.scores(SEQUENCES)

    def matches(self, server: Server) -> bool:
        """Whether this one does now."""
        return worst_difference(server.scores(SEQUENCES), self._scores) < 0.02


def post(server: Server, path: str, body: dict[str, Any] | None = None) -> requests.Response:
    """One control call, answered well or not."""
    return requests.post(f"{server.url}{path}", json=body if body is not None else {}, timeout=CALL_SECONDS)


def succeed(server: Server, path: str, body: dict[str, Any] | None = None) -> None:
    """One control call that must be answered well."""
    response = post(server, path, body)
    assert response.status_code == 200, f"{server} {path}: {response.status_code} {response.text}"


def weight_version(server: VllmServer) -> str:
    """What `/weight_info` says."""
    return str(requests.get(f"{server.url}/weight_info", timeout=CALL_SECONDS).json()["weight_version"])


def heal(server: VllmServer) -> bool:
    """Puts the layers of a half-updated server together; whether it is ready for a whole update now."""
    post(server, "/resume")
    post(server, "/start_weight_update")  # refused when one is under way, which is as good
    return post(server, "/finish_weight_update").status_code == 200


class Group:
    """One update group over several `vllm serve`, the trainer being rank 0.

    Args:
        servers (`Sequence[VllmServer]`): At consecutive rank offsets.
        timeout (`float`): Of the trainer and of the workers, in seconds.
        buffer_size_bytes (`int`): Small, so that even the tiny model takes several buffers.
    """

    def __init__(
        self, servers: Sequence[VllmServer], *, timeout: float = TIMEOUT_SECONDS, buffer_size_bytes: int = 2**17
    ) -> None:
        self.servers = list(servers)
        self.buffer_size_bytes = buffer_size_bytes
        self._timeout = timeout
        self._executor = ThreadPoolExecutor(len(self.servers))
        self._group: GlooGroup | None = None

    def __enter__(self) -> Self:
        listener = listen(HOST)
        port = int(listener.getsockname()[1])
        world_size = 1 + len(self.servers)
        bodies = {
            server: {
                "init_info": init_info(
                    "gloo",
                    HOST,
                    port,
                    1 + offset,
                    world_size,
                    vllm_version=None,
                    buffer_size_bytes=self.buffer_size_bytes,
                    timeout_seconds=self._timeout,
                )
            }
            for offset, server in enumerate(self.servers)
        }
        calls = [self._executor.submit(succeed, s, "/init_weight_transfer_engine", bodies[s]) for s in self.servers]
        self._group = open_group(HOST, port, 0, world_size, master=True, timeout=self._timeout, listener=listener)
        for call in calls:
            call.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is not None:
            self._group.close()
        self._executor.shutdown()

    def start(self, model: PreTrainedModel) -> list[Future[requests.Response]]:
        """Begins an update; the returned calls end when their server has received everything, or has failed."""
        for call in [self._executor.submit(succeed, s, "/start_weight_update") for s in self.servers]:
            call.result()
        info = update_info("gloo", metadata(model), vllm_version=None, buffer_size_bytes=self.buffer_size_bytes)
        return [self._executor.submit(post, s, "/update_weights", {"update_info": info}) for s in self.servers]

    def buffers(self, model: PreTrainedModel) -> Iterator[torch.Tensor]:
        """The weights, packed."""
        packer = Packer(metadata(model), self.buffer_size_bytes, device="cpu")
        for name, parameter in model.named_parameters():
            if (buffer := packer.add(name, parameter)) is not None:
                yield buffer
        if (buffer := packer.flush()) is not None:
            yield buffer

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Sends one buffer to all."""
        assert self._group is not None
        self._group.broadcast(buffer, src=0)

    def finish(self, calls: Sequence[Future[requests.Response]], version: str) -> None:
        """Ends an update that every server received."""
        for server, call in zip(self.servers, calls, strict=True):
            assert call.result().status_code == 200, f"{server}: {call.result().text}"
        for server in self.servers:
            succeed(server, "/finish_weight_update", {"weight_version": version})
            succeed(server, "/reset_prefix_cache")

    def push(self, model: PreTrainedModel, version: str) -> float:
        """A whole update; returns its seconds."""
        started = time.monotonic()
        calls = self.start(model)
        for buffer in self.buffers(model):
            self.broadcast(buffer)
        self.finish(calls, version)
        return time.monotonic() - started


def push_to_trl(server: TrlServer, model: PreTrainedModel) -> float:
    """A whole update of one `trl vllm-serve` that runs the stand-in, in a group of its own; returns its seconds."""
    held = hold_port(HOST)
    assert held is not None, "these tests run on Linux"
    port = int(held.getsockname()[1])
    started = time.monotonic()
    with held:
        succeed(server, "/close_communicator/")
        body = {"host": HOST, "port": port, "world_size": 2, "client_device_uuid": "none"}
        succeed(server, "/init_communicator/", body)
        group = join_stateless_group(HOST, port, 1, 2, timeout=TIMEOUT_SECONDS)
        try:
            for (name, dtype_name, shape), (_, parameter) in zip(
                metadata(model), model.named_parameters(), strict=True
            ):
                succeed(server, "/update_named_param/", {"name": name, "dtype": f"torch.{dtype_name}", "shape": shape})
                group.broadcast(parameter.detach().contiguous(), src=1)
                group.barrier()
            # Its answer comes after all that was queued before it.
            succeed(server, "/reset_prefix_cache/")
            succeed(server, "/close_communicator/")
        finally:
            group.close()
    return time.monotonic() - started
