"""The simulated worker of the `trl` dialect, behind the server's pipe: one engine, its weights, and the ways in
which it can be lost.

`trl vllm-serve` is an event loop that talks to its workers over pipes. Generating waits on the pipe *in* the
event loop, so meanwhile the server answers nothing at all; scoring waits on threads, so it goes on answering.
`turn` stands for that event loop: whoever holds it keeps everybody else waiting, first come, first served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from trl_pool.sim.config import SimConfig
from trl_pool.sim.engine import Completions, Scored, Weights, generate, is_poison, score
from trl_pool.sim.sampling import Sampling
from trl_pool.sim.scores import END_TOKEN

T = TypeVar("T")

# Work on fewer numbers than this is done in the event loop, more goes to a thread, so that /sim/ routes keep
# answering.
_INLINE_NUMBERS = 2000


class ServerError(Exception):
    """The real server would raise here: the client gets a bare 500."""


@dataclass(eq=False)
class PipeUse:
    """One request's use of the pipe. Two of different sorts at a time get each other's replies."""

    scoring: bool
    gone: Callable[[], bool]
    """Whether the client has disconnected since."""
    mixed: bool = False


class Worker:
    """One simulated engine.

    Args:
        config (`SimConfig`):
            Its traits.
        clock (`Callable[[], float]`):
            Monotonic seconds.
        sleep (`Callable[[float], Awaitable[None]]`):
            Waits for that many seconds.
    """

    def __init__(
        self,
        config: SimConfig,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.config = config
        self.clock, self.sleep = clock, sleep
        self.weights = Weights.checkpoint(config.weights)
        self.communicator_open = False
        self.dead = False
        self.poisoned = False
        self.mixed = 0
        self.turn = asyncio.Lock()
        self._scoring_turn = asyncio.Lock()  # scoring batches run one after the other
        self._uses: set[PipeUse] = set()

    def __repr__(self) -> str:
        condition = "poisoned" if self.poisoned else "dead" if self.dead else "alive"
        weights = self.weights
        return f"<Worker: {condition}, weights {weights.digest[:8]} after {weights.updates} updates>"

    def state(self) -> dict[str, object]:
        """What `/sim/state` tells of it."""
        return {
            "weights": {"digest": self.weights.digest, "updates": self.weights.updates},
            "communicator": self.communicator_open,
            "mixed": self.mixed,
            "poisoned": self.poisoned,
            "dead_worker": self.dead,
        }

    def forget(self) -> None:
        """Set the counter of mixed-up requests to zero."""
        self.mixed = 0

    @contextmanager
    def pipe(self, scoring: bool, gone: Callable[[], bool]) -> Iterator[PipeUse]:
        """Use the pipe, and be mixed up with those who use it for the other purpose at the same time.

        On a real server only a generate that starts while scoring runs is mixed up. The reverse counts as
        well here, unless the generate's client has gone: which of two requests under way arrives first is
        chance, and a client that sends both at a time must not get away with it by luck.
        """
        use = PipeUse(scoring, gone)
        others = [o for o in self._uses if o.scoring != scoring and (o.scoring or not o.gone())]
        if others:
            self.mixed += 1
            for one in (use, *others):
                one.mixed = True
        self._uses.add(use)
        try:
            yield use
        finally:
            self._uses.discard(use)

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        images: Sequence[str] | None,
        gone: Callable[[], bool],
    ) -> Completions:
        """Complete the prompts. Runs in the caller's turn, and never returns if a prompt is poison."""
        limit = self.config.max_model_len
        with self.pipe(scoring=False, gone=gone) as use:
            if self.dead:
                await hang_for_good()
            if self._poison(prompts) or self._too_many(sampling.logprobs) or sampling.poison:
                self.poisoned = True
                await hang_for_good()
            started = self.clock()
            given = sum(map(len, prompts))
            sampled = len(prompts) * sampling.n * min(sampling.max_tokens or limit, limit)
            done = await computed(
                given + sampled * (1 + abs(sampling.logprobs or 0)),
                lambda: generate(prompts, sampling, self.weights, max_model_len=limit, images=images),
            )
            await self._rest(started, given, done.longest)
        if use.mixed:  # what a scored sequence would have got: one token, of somebody else's prompt
            return Completions([[END_TOKEN]], [[END_TOKEN]], None, None)
        return done

    async def score(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], top: int, use: PipeUse
    ) -> list[Scored]:
        """Score the sequences, one batch after the other."""
        async with self._scoring_turn:
            if self._poison(sequences) or self._too_many(top):
                self.dead = True  # the event loop is none the wiser: it waits on a thread
            if self.dead:
                await hang_for_good()
            started, weights = self.clock(), self.weights
            done = await computed(
                sum(map(len, sequences)),
                lambda: [score(s, p, weights) for s, p in zip(sequences, prompt_lengths, strict=True)],
            )
            await self._rest(started, sum(map(len, sequences)), 1)
        if use.mixed:
            raise ServerError("prompt_logprobs is None.")
        return done

    async def reset_prefix_cache(self, gone: Callable[[], bool]) -> None:
        """Wait until the worker has done all that was sent to it before."""
        with self.pipe(scoring=False, gone=gone):
            if self.dead:
                await hang_for_good()

    def init_communicator(self) -> None:
        """Open the update group. A worker that has one dies of it, after the server has answered 200."""
        self.dead = self.dead or self.communicator_open
        self.communicator_open = True

    def update_named_param(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Receive a parameter. A worker without a group dies of it, after the server has answered 200."""
        self.dead = self.dead or not self.communicator_open
        if not self.dead:
            self.weights = self.weights.updated(name, dtype, shape)

    def close_communicator(self) -> None:
        """Leave the update group, if there is one."""
        self.communicator_open = False

    def _poison(self, prompts: Sequence[Sequence[int]]) -> bool:
        return any(is_poison(prompt, self.config.max_model_len, self.config.vocab_size) for prompt in prompts)

    def _too_many(self, logprobs: int | None) -> bool:
        if logprobs is None or self.config.max_logprobs == -1:
            return False
        return logprobs == -1 or logprobs > self.config.max_logprobs

    async def _rest(self, started: float, prompt_tokens: int, steps: int) -> None:
        seconds = self.config.latency.seconds(prompt_tokens, steps) - (self.clock() - started)
        if seconds > 0:
            await self.sleep(seconds)


async def hang_for_good() -> NoReturn:
    """Never return: there is nothing left that could answer."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def computed(numbers: int, compute: Callable[[], T]) -> T:
    """The result of `compute()`, which handles about this many numbers."""
    return compute() if numbers < _INLINE_NUMBERS else await asyncio.to_thread(compute)
