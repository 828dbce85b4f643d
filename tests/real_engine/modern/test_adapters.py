"""LoRA adapters on a real `vllm serve`: loaded through the pool, and again on a server that comes back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from trl_pool import PoolConfig, RequestRejectedError, VLLMClientPool

from ..servers import VllmServer

PROMPT = [[5, 6, 7, 8]]
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}


def save_adapter(model_dir: Path, directory: Path) -> None:
    """An adapter that changes what the tiny model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype="bfloat16"), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(directory)


def test_an_adapter_is_loaded_again_on_a_server_that_comes_back(model_dir: Path, tmp_path: Path) -> None:
    save_adapter(model_dir, tmp_path)
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    server = VllmServer(model_dir, tmp_path, arguments=["--enable-lora"], environment=allowed)
    try:
        server.start().wait_ready().warm_up()
        with VLLMClientPool(server.url, connection_timeout=30, config=PoolConfig(health_interval=0.5)) as pool:

            def adapted() -> Any:
                return pool.generate(PROMPT, **GREEDY, generation_kwargs={"model": "mine"})["completion_ids"]

            pool.load_lora_adapter("mine", str(tmp_path))
            found = adapted()
            assert found != pool.generate(PROMPT, **GREEDY)["completion_ids"]
            server.kill()
            server.start().wait_ready()
            deadline = time.monotonic() + 60
            while not pool.statistics().backends[0].eligible:
                assert time.monotonic() < deadline, repr(pool)
            assert adapted() == found
            pool.unload_lora_adapter("mine")
            with pytest.raises(RequestRejectedError, match="404"):
                adapted()
    finally:
        server.close()
