"""The simulated engine behind a `vllm serve`: batches requests, keeps weights and adapters, takes part in updates.

On a real server the API answers probes by itself and asks the engine's process for everything else. That process does
one such call at a time, and while it receives weights it does nothing else: `_call` stands for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_pool.sim.config import SimConfig
from trl_pool.sim.engine import Weights, digest_of
from trl_pool.sim.parameters import Parameters, WorkerError
from trl_pool.sim.prefix_cache import PrefixCache
from trl_pool.sim.receiver import ControlReceiver, GlooReceiver, Receiver
from trl_pool.sim.sampling import Sampling
from trl_pool.sim.scheduler import Job, Progress, Scheduler


class EngineDead(Exception):
    """The engine's process has ended, and the server is about to."""

    def __init__(self) -> None:
        super().__init__("the engine has died")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that answers to its name.

    Args:
        name (`str`): What requests call it.
        path (`str`): Where it was loaded from.
        digest (`str`): Stands for its files.
    """

    name: str
    path: str
    digest: str


class VLLMWorker:
    """One simulated engine.

    Args:
        config (`SimConfig`):
            Its traits.
        clock (`Callable[[], float]`):
            Monotonic seconds.
        sleep (`Callable[[float], Awaitable[None]]`):
            Waits for that many seconds.
    """

    poisoned = False  # no request does that to a `vllm serve`: what is wrong with it is a 400

    def __init__(
        self,
        config: SimConfig,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.config = config
        self.clock, self.sleep = clock, sleep
        self.parameters = Parameters(Weights.checkpoint(config.weights))
        # By name, so that whoever takes clock and sleep over later is obeyed.
        self.scheduler = Scheduler(
            config.latency,
            config.max_model_len,
            lambda: self.clock(),
            lambda seconds: self.sleep(seconds),
            config.max_num_seqs * config.data_parallel_size,
        )
        self.prefix_cache = PrefixCache()
        self.adapters: dict[str, Adapter] = {}
        self.dead = False
        self.died = asyncio.Event()
        self._receiver = _receiver(config)
        self._calls = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<VLLMWorker: {self.parameters!r}, {self.scheduler!r}>"

    def state(self) -> dict[str, object]:
        """What `/sim/state` tells of it."""
        weights = self.parameters.weights
        return {
            "weights": {"digest": weights.digest, "updates": weights.updates},
            "weight_version": self.parameters.version,
            "updating": self.parameters.active,
            "whole": self.parameters.whole,
            "communicator": self._receiver is not None and self._receiver.joined,
            "adapters": {adapter.name: adapter.path for adapter in self.adapters.values()},
            "paused": self.scheduler.paused,
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
            "mixed": 0,
            "poisoned": self.poisoned,
            "dead_worker": self.dead,
        }

    def metrics(self) -> str:
        """What `vllm serve` tells at `/metrics`: how many sequences run and wait, and what its prefix cache has
        found. All engines count as one."""
        running, waiting = self.scheduler.queue()
        labels = f'engine="0",model_name="{self.config.model}"'
        lines = []
        for name, what, value in (
            ("running", "Requests that are being generated.", running),
            ("waiting", "Requests that wait.", waiting),
        ):
            metric = f"vllm:num_requests_{name}"
            lines += [f"# HELP {metric} {what}", f"# TYPE {metric} gauge", f"{metric}{{{labels}}} {float(value)}"]
        by_reason = "vllm:num_requests_waiting_by_reason"
        lines += [f"# HELP {by_reason} The same by reason.", f"# TYPE {by_reason} gauge"]
        for reason, value in (("capacity", waiting), ("deferred", 0)):
            lines.append(f'{by_reason}{{{labels},reason="{reason}"}} {float(value)}')
        return "\n".join(lines) + "\n" + self.prefix_cache.metrics(self.config.model)

    def forget(self) -> None:
        """There are no counters here."""

    def generate(
        self,
        ids: tuple[str, ...],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        adapter: Adapter | None = None,
        images: Sequence[str] | None = None,
        stepwise: bool = False,
    ) -> AsyncIterator[Progress]:
        """Complete prompts, beside whatever else is running. The arguments are a `Job`'s.

        Raises:
            EngineDead: If the engine has died, or dies of this.
        """
        job = Job(ids, prompts, sampling, lambda: self.weights(adapter), images)
        for prompt, image in zip(prompts, images or [""] * len(prompts), strict=True):
            self.prefix_cache.look_up(prompt, sampling.n, f"{adapter.name if adapter else ''} {image}")
        return self.scheduler.run(job, stepwise)

    def weights(self, adapter: Adapter | None = None) -> Weights:
        """What is sampled from at this moment.

        Raises:
            EngineDead: If the engine has died, or dies of its unfinished weights.
        """
        if self.config.unfinished_update == "fatal" and not self.parameters.whole:
            self.dead = True
            self.died.set()
            self.scheduler.notify()
        if self.dead:
            raise EngineDead
        base = self.parameters.weights
        return base if adapter is None else Weights(digest_of(f"{base.digest} {adapter.digest}"), base.updates)

    async def call(self, function: Callable[[], Any] = lambda: None) -> Any:
        """Do something in the engine's process, when it is not busy with another call."""
        async with self._calls:
            if self.dead:
                raise EngineDead
            return function()

    async def pause(self, mode: str) -> None:
        """Pause as `/pause?mode=` says."""
        await self.call()
        await self.scheduler.pause(mode)

    async def reset_prefix_cache(self, running_too: bool) -> bool:
        """Whether it could be reset: running requests hold it, unless they are to give it up."""
        done: bool = await self.call(lambda: running_too or not self.scheduler.running)
        if done:
            self.prefix_cache.reset()
        return done

    async def init_weight_transfer(self, info: Mapping[str, Any]) -> None:
        """Join an update group."""
        with self._busy():
            async with self._calls:
                await self._configured().join(info)

    async def start_weight_update(self) -> None:
        """Begin an update."""
        self._configured()
        await self.call(self.parameters.start)
        self.scheduler.notify()

    async def update_weights(self, info: Mapping[str, Any]) -> None:
        """Receive weights. Nothing is generated meanwhile."""
        receiver = self._configured()
        with self._busy():
            async with self._calls:
                self.parameters.require_active()
                try:
                    await receiver.receive(info, self.parameters.receive)
                except BaseException:
                    self.parameters.fail()
                    raise

    async def finish_weight_update(self, version: str | None) -> None:
        """End the update."""
        self._configured()
        await self.call(lambda: self.parameters.finish(version))
        self.scheduler.notify()

    async def shutdown_weight_transfer(self) -> None:
        """Leave the update group, if there is one."""
        await self.call(self._configured().leave)

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter, in place of one of the same name.

        Raises:
            FileNotFoundError: If there is none at the path.
        """
        digest = await asyncio.to_thread(_digest_of_files, Path(path))
        await self.call(lambda: self.adapters.update({name: Adapter(name, path, digest)}))

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.scheduler.stall()
        try:
            yield
        finally:
            self.scheduler.unstall()

    def _configured(self) -> Receiver:
        if self._receiver is None:
            raise WorkerError("weight transfer is not configured: the server has no weight_transfer_config")
        return self._receiver


def _receiver(config: SimConfig) -> Receiver | None:
    if config.weight_transfer == "control":
        return ControlReceiver(config.vllm_release)
    return GlooReceiver(config.world_size) if config.weight_transfer == "gloo" else None


def _digest_of_files(directory: Path) -> str:
    if not (directory / "adapter_config.json").is_file():
        raise FileNotFoundError(directory)
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return digest_of(" ".join(f"{path.name} {digest_of(path.read_bytes())}" for path in files))
