"""A whole GRPO training of TRL's on the CPU, over the servers of a test."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trl_pool
from trl_pool import PoolConfig, VLLMClientPool

LEARNING_RATE = 1e-2
"""Moves the weights so far at each step that one stale server shows at once."""

LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"
"""What TRL logs at each step: how far the servers' logprobs are from those of the trainer's own weights."""

IN_SYNC = 0.01
STALE = 0.05


@dataclasses.dataclass
class Training:
    """What a training gave.

    Args:
        differences (`list[float]`): `LOGP_DIFFERENCE` of each step.
        prompts (`dict[str, int]`): Prompts that each server has answered, per URL.
        completions (`list[int]`): Completions that each step's reward function was given.
        seconds (`float`): Wall time of `train()`.
    """

    differences: list[float]
    prompts: dict[str, int]
    completions: list[int]
    seconds: float

    def __str__(self) -> str:
        shown = " ".join(f"{difference:.4f}" for difference in self.differences)
        return f"{LOGP_DIFFERENCE} {shown}; prompts {self.prompts}; {self.seconds:.1f} s"


class Steps:
    """Called by the trainer; a test overrides what it needs.

    `client` is the pool of the training, from its beginning on.
    """

    client: VLLMClientPool

    def before(self, step: int) -> None:
        """Before a step, 1 being the first: before its weights are sent and its completions sampled."""

    def generating(self, step: int) -> None:
        """As soon as a step's requests are out; on a thread of its own."""


def train(
    model_dir: Path,
    urls: Sequence[str],
    output_dir: Path,
    *,
    steps: Steps | None = None,
    max_steps: int = 6,
    config: PoolConfig | None = None,
    model: Any = None,
    peft_config: Any = None,
    prepare: Callable[[Any], None] | None = None,
) -> Training:
    """Trains with `patch_trl` in force, and says how it went.

    Args:
        model_dir (`Path`): Checkpoint, the one that the servers serve.
        urls (`Sequence[str]`): The servers.
        output_dir (`Path`): For the trainer.
        steps ([`Steps`], *optional*): What happens beside it.
        max_steps (`int`, *optional*, defaults to `6`): Steps.
        config ([`PoolConfig`], *optional*): The pool's.
        model (`Any`, *optional*): Trained instead of the checkpoint.
        peft_config (`Any`, *optional*): Trains an adapter.
        prepare (`Callable`, *optional*): Is given the trainer before it begins.
    """
    import time

    from datasets import Dataset
    from transformers import TrainerCallback

    steps = steps or Steps()
    completions: list[int] = []
    current = [0]

    def reward(completions_: Sequence[Any], **_: Any) -> list[float]:
        completions.append(len(completions_))
        return [float(len(set(text))) for text in completions_]

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            current[0] = state.global_step + 1
            steps.before(current[0])

    config = config or PoolConfig(health_interval=0.5, control_timeout=30, weight_buffer_mb=1)
    with trl_pool.patch_trl(config=config):
        from trl import GRPOConfig, GRPOTrainer

        arguments = GRPOConfig(
            output_dir=str(output_dir),
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=",".join(urls),
            vllm_server_timeout=60,
            use_cpu=True,
            bf16=True,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=32,
            num_generations=4,
            max_completion_length=16,
            max_steps=max_steps,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=str(model_dir) if model is None else model,
            reward_funcs=lambda completions, **kwargs: reward(completions, **kwargs),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [f"hello {i} world" for i in range(64)]}),
            callbacks=[Callback()],
            peft_config=peft_config,
        )
        client = trainer.vllm_generation.vllm_client
        assert isinstance(client, VLLMClientPool)
        steps.client = client
        generate = client.generate

        def watched(*args: Any, **kwargs: Any) -> Any:
            watcher = threading.Thread(target=_when_out, args=(client, steps, current[0]), daemon=True)
            watcher.start()
            try:
                return generate(*args, **kwargs)
            finally:
                watcher.join(30)

        client.generate = watched  # type: ignore[method-assign]
        if prepare is not None:
            prepare(trainer)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        found = [entry[LOGP_DIFFERENCE] for entry in trainer.state.log_history if LOGP_DIFFERENCE in entry]
        prompts = {backend.url: backend.prompts for backend in client.statistics().backends}
        client.close()
    return Training(found, prompts, completions, seconds)


def _when_out(client: VLLMClientPool, steps: Steps, step: int) -> None:
    while not any(backend.inflight for backend in client.statistics().backends):
        pass
    steps.generating(step)
