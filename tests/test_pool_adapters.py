"""LoRA adapters are loaded on every `vllm serve`, and again on one that comes back, before it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually, quick, received
from vllm_sims import Model, tokens

from trl_pool import AsyncVLLMClientPool, ControlError, RequestRejectedError, VLLMClientPool
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]

PROMPTS = [f"prompt {i}" for i in range(8)]


@pytest.fixture
def fleet(vllm_fleet: Callable[..., list[SimProcess]]) -> Fleet:
    return partial(vllm_fleet, first_weights=False)


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A directory that a server takes for an adapter."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    return str(tmp_path)


def adapters(sims: list[SimProcess]) -> list[list[str]]:
    return [sorted(sim.state()["adapters"]) for sim in sims]


def by(name: str) -> dict[str, Any]:
    return {"generation_kwargs": {"model": name}, "temperature": 1.0}


def test_an_adapter_is_loaded_everywhere_answers_to_its_name_and_is_unloaded_everywhere(
    fleet: Fleet, make_pool: MakePool, adapter: str
) -> None:
    sims = fleet(3)
    pool = make_pool(sims)
    pool.load_lora_adapter("tuned", adapter)
    assert adapters(sims) == [["tuned"]] * 3
    found = pool.generate(PROMPTS, **by("tuned"))["completion_ids"]
    assert found == tokens(sims[0], PROMPTS, model="tuned", max_tokens=16, top_k=0)
    assert found != pool.generate(PROMPTS)["completion_ids"]
    pool.unload_lora_adapter("tuned")
    assert adapters(sims) == [[]] * 3
    with pytest.raises(RequestRejectedError, match="404"):
        pool.generate(PROMPTS, **by("tuned"))


def test_a_server_that_comes_back_has_the_adapter_before_it_serves(
    fleet: Fleet, make_pool: MakePool, adapter: str
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.load_lora_adapter("tuned", adapter)
    pool.load_lora_adapter("gone", adapter)
    pool.unload_lora_adapter("gone")
    sims[1].restart()
    eventually(lambda: adapters(sims[1:]) == [["tuned"]])
    eventually(lambda: all(b.eligible for b in pool.statistics().backends))
    for _ in range(3):
        pool.generate(PROMPTS, **by("tuned"))
    assert received(sims, "completions") == [3, 3]
    order = [r["endpoint"] for r in sims[1].state()["requests"]]
    assert order.index("load_lora_adapter") < order.index("completions")


def test_a_server_into_which_it_cannot_be_loaded_again_does_not_serve(
    fleet: Fleet, make_pool: MakePool, adapter: str
) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.load_lora_adapter("tuned", adapter)
    Path(adapter, "adapter_config.json").rename(Path(adapter, "moved"))
    sims[1].restart()
    reason = eventually(lambda: next((b.reason for b in pool.statistics().backends if "adapter" in b.reason), None))
    assert "could not load adapter 'tuned' again" in reason
    pool.generate(PROMPTS, **by("tuned"))
    assert received(sims, "completions") == [1, 0]
    Path(adapter, "moved").rename(Path(adapter, "adapter_config.json"))
    eventually(lambda: all(b.eligible for b in pool.statistics().backends))


def test_a_broken_connection_is_no_reason_to_load_it_again(fleet: Fleet, make_pool: MakePool, adapter: str) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.load_lora_adapter("tuned", adapter)
    sims[1].faults("refuse", seconds=0.3)
    eventually(lambda: not pool.statistics().backends[1].eligible)
    eventually(lambda: pool.statistics().backends[1].eligible)
    assert adapters(sims) == [["tuned"]] * 2


def test_a_server_that_joins_gets_the_adapters(fleet: Fleet, make_pool: MakePool, adapter: str) -> None:
    sims = fleet(2)
    pool = make_pool(sims[:1])
    pool.load_lora_adapter("tuned", adapter)
    pool.add_backend(sims[1].url)
    assert adapters(sims) == [["tuned"]] * 2


def test_a_server_that_refuses_an_adapter_is_named(fleet: Fleet, make_pool: MakePool, adapter: str) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    sims[1].faults("status", status=500, endpoints=["load_lora_adapter"], times=1)
    with pytest.raises(ControlError, match="Loading adapter 'tuned' failed") as caught:
        pool.load_lora_adapter("tuned", adapter)
    assert [caught.value.results[sim.url].ok for sim in sims] == [True, False]
    with pytest.raises(ControlError, match="no adapter at its path"):
        pool.load_lora_adapter("other", "/nowhere")
    with pytest.raises(ControlError, match="Unloading adapter 'other' failed"):
        pool.unload_lora_adapter("other")


def test_adapters_outlive_weight_updates(fleet: Fleet, make_pool: MakePool, adapter: str) -> None:
    sims = fleet(2)
    pool = make_pool(sims)
    pool.load_lora_adapter("tuned", adapter)
    pool.init_communicator()
    before = pool.generate(PROMPTS, **by("tuned"))
    pool.update_model_params(Model())
    after = pool.generate(PROMPTS, **by("tuned"))
    assert before["completion_ids"] != after["completion_ids"]
    assert adapters(sims) == [["tuned"]] * 2


def test_the_asynchronous_class_loads_and_unloads_them(fleet: Fleet, adapter: str) -> None:
    sims = fleet(2)

    async def main() -> None:
        async with AsyncVLLMClientPool([sim.url for sim in sims], connection_timeout=10, config=quick()) as pool:
            await pool.load_lora_adapter("tuned", adapter)
            assert await asyncio.to_thread(adapters, sims) == [["tuned"]] * 2
            await pool.unload_lora_adapter("tuned")
            assert await asyncio.to_thread(adapters, sims) == [[]] * 2

    asyncio.run(main())
