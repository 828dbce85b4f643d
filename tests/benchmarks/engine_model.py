"""A discrete-event model of a vLLM server, for questions of balance: hours of a fleet's time in seconds, repeatable.

What is modelled is what decides how long a step takes: continuous batching with a maximum of sequences, a decode step
that costs more with every sequence in it, prefill of what the prefix cache does not hold, and the cache's eviction.
What is not: preemption, chunked prefill (a prefill holds up the decoding of the others), pipeline and network.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 16
"""vLLM's default block size."""


@dataclass(frozen=True)
class Engine:
    """A server's figures. The defaults are an 8-billion-parameter model in bfloat16 on one H100 (SXM), from its data
    sheet: 3.35 TB/s, 989 Tflop/s, of which half is reached.

    Args:
        max_num_seqs (`int`, *optional*, defaults to `256`): Sequences that run at once (vLLM's default).
        step_seconds (`float`, *optional*): A decode step without any sequence: 16 GB of weights are read once.
        sequence_seconds (`float`, *optional*): What each sequence adds to a step: 16 Gflop, and 1,000 tokens of
            context of 128 KiB each (Llama 3 8B: 32 layers, 8 key/value heads of 128, two bytes) that are read.
        prefill_seconds (`float`, *optional*): Per token of a prompt that is not cached: 16 Gflop.
        cache_blocks (`int`, *optional*): Blocks that the prefix cache can hold beside what runs: of 80 GB, 16 are
            weights, 8 are not given to vLLM, and half of the rest belongs to running sequences.
        slowness (`float`, *optional*, defaults to `1.0`): Multiplies every time: 2 is a server half as fast.
    """

    max_num_seqs: int = 256
    step_seconds: float = 16e9 / 3.35e12
    sequence_seconds: float = 16e9 / 494e12 + 1000 * 131072 / 3.35e12
    prefill_seconds: float = 16e9 / 494e12
    cache_blocks: int = int(28e9 / 131072 / BLOCK_TOKENS)
    slowness: float = 1.0

    def step(self, running: int) -> float:
        """Seconds of a decode step, in which each of the running sequences gets one token."""
        return self.slowness * (self.step_seconds + running * self.sequence_seconds)

    @property
    def best_rate(self) -> float:
        """Most tokens per second."""
        return self.max_num_seqs / self.step(self.max_num_seqs)


class Clock:
    """Virtual time: events in their order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), event))

    def run(self) -> None:
        """Lets every event happen."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


class Prompt:
    """A prompt: how long it is, and, where the cache matters, its token ids.

    Args:
        length (`int`): In tokens.
        ids (`list[int]`, *optional*): They are hashed block by block, each block with all before it, as vLLM does it.
        key (`str`, *optional*): Whose it is; what a ring by session would hash.
    """

    __slots__ = ("_blocks", "ids", "key", "length")

    def __init__(self, length: int, ids: list[int] | None = None, key: str = "") -> None:
        self.length, self.ids, self.key = length, ids, key
        self._blocks: list[int] | None = None

    @property
    def blocks(self) -> list[int]:
        if self._blocks is None:
            self._blocks = hashes(self.ids) if self.ids is not None else []
        return self._blocks


def hashes(ids: Sequence[int]) -> list[int]:
    """The hash of every whole block and all before it."""
    found, so_far = [], 0
    for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        so_far = hash((so_far, *ids[start : start + BLOCK_TOKENS]))
        found.append(so_far)
    return found


@dataclass(eq=False)
class Request:
    """Prompts that were sent together; answered when the last of their sequences has ended.

    Args:
        prompts (`list[Prompt]`): What is asked.
        lengths (`list[list[int]]`): Per prompt, the tokens of each completion.
        done (`Callable[[Request], None]`): Called with the answer.
        answers (`list[list[int]]`, *optional*): Per prompt, ids of its first completion, which the cache keeps.
    """

    prompts: list[Prompt]
    lengths: list[list[int]]
    done: Callable[[Request], None]
    answers: list[list[int]] | None = None
    sent: float = 0.0
    left: int = 0
    indices: list[int] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        return sum(map(len, self.lengths))


class Server:
    """One server under way.

    All running sequences move at the same pace, so one counter of tokens (`_progress`) serves for all of them, and a
    sequence ends when the counter reaches a value that is known when it starts.
    """

    def __init__(self, engine: Engine, clock: Clock, name: str) -> None:
        self.engine, self.name, self._clock = engine, name, clock
        self._waiting: deque[tuple[Request, int, int]] = deque()
        self._running: list[tuple[float, int, Request, int, int]] = []
        self._numbers = itertools.count()
        self._progress = 0.0
        self._seen = 0.0
        self._debt = 0.0  # seconds in which no token comes: prefill, or a stall
        self._plan = 0
        self._cache: OrderedDict[int, None] = OrderedDict()
        self.asked_tokens = self.cached_tokens = self.made_tokens = 0
        self.busy_seconds = 0.0

    def submit(self, request: Request) -> None:
        request.sent, request.left = self._clock.now, request.sequences
        for index, lengths in enumerate(request.lengths):
            self._waiting.extend((request, index, which) for which in range(len(lengths)))
        self._go_on()

    def stall(self, seconds: float) -> None:
        """Makes no token for a while; what was sent goes on afterwards."""
        self._advance()
        self._debt += seconds
        self._schedule()

    def queue(self) -> tuple[int, int]:
        """Sequences that run, and that wait."""
        return len(self._running), len(self._waiting)

    def clear_cache(self) -> None:
        self._cache.clear()

    def _advance(self) -> None:
        """Brings the counter to the present."""
        passed = self._clock.now - self._seen
        self._seen = self._clock.now
        if not self._running:
            self._debt = max(0.0, self._debt - passed)
            return
        self.busy_seconds += passed
        paid = min(self._debt, passed)
        self._debt -= paid
        self._progress += (passed - paid) / self.engine.step(len(self._running))

    def _go_on(self) -> None:
        self._advance()
        ended: list[tuple[Request, int, int]] = []
        while self._running and self._running[0][0] <= self._progress + 1e-6:
            _, _, request, index, which = heapq.heappop(self._running)
            ended.append((request, index, which))
        while self._waiting and len(self._running) < self.engine.max_num_seqs:
            request, index, which = self._waiting.popleft()
            if which == 0:  # its siblings find the prompt in the cache
                self._admit(request, index)
            length = request.lengths[index][which]
            heapq.heappush(self._running, (self._progress + length, next(self._numbers), request, index, which))
        self._schedule()
        for request, index, which in ended:
            self.made_tokens += request.lengths[index][which]
            if request.answers is not None and which == 0:
                ids = request.prompts[index].ids or []
                self._keep(hashes([*ids, *request.answers[index]]))
            request.left -= 1
            if not request.left:
                request.done(request)

    def _admit(self, request: Request, index: int) -> None:
        prompt = request.prompts[index]
        held = 0
        for block in prompt.blocks:
            if block not in self._cache:
                break
            held += 1
        cached = held * BLOCK_TOKENS
        self.asked_tokens += prompt.length
        self.cached_tokens += cached
        self._keep(prompt.blocks)
        self._debt += (prompt.length - cached) * self.engine.prefill_seconds * self.engine.slowness

    def _keep(self, blocks: list[int]) -> None:
        for block in blocks:
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self.engine.cache_blocks:
            self._cache.popitem(last=False)

    def _schedule(self) -> None:
        self._plan += 1
        if not self._running:
            return
        plan = self._plan
        tokens = max(0.0, self._running[0][0] - self._progress)
        due = self._clock.now + self._debt + tokens * self.engine.step(len(self._running))

        def happen() -> None:
            if plan == self._plan:
                self._go_on()

        self._clock.at(due, happen)
