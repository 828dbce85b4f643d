"""Continuous batching: requests run beside each other, and can be frozen, queued and aborted.

Time passes for a request only while it runs. A request that is under way when the weights change goes on with the new
ones from the token that it had come to, as on a real server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from trl_pool.sim.engine import Completions, Latency, Weights, generate
from trl_pool.sim.sampling import Sampling
from trl_pool.sim.scores import END_TOKEN
from trl_pool.sim.worker import computed


@dataclass(eq=False)
class Job:
    """One request to the engine.

    Args:
        ids (`tuple[str, ...]`):
            What `/abort_requests` may call it, one for each prompt.
        prompts (`Sequence[Sequence[int]]`):
            Token ids.
        sampling (`Sampling`):
            How to continue them.
        weights (`Callable[[], Weights]`):
            What it samples from at this moment.
        images (`Sequence[str]`, *optional*):
            One text per prompt that stands for its images.
    """

    ids: tuple[str, ...]
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    weights: Callable[[], Weights]
    images: Sequence[str] | None = None
    seconds: float = 0.0
    """For how long it has run."""
    schedule: list[tuple[int, Weights]] = field(default_factory=list)
    """From which step on it has had which weights."""
    running: bool = False
    aborted: bool = False

    @property
    def sequences(self) -> int:
        """How many run together."""
        return len(self.prompts) * self.sampling.n

    @property
    def requests(self) -> int:
        """How many vLLM counts: one per sequence, and one more for the `n` of a prompt together."""
        n = self.sampling.n
        return len(self.prompts) * (n if n == 1 else n + 1)


@dataclass(frozen=True)
class Progress:
    """How far a job has come.

    Args:
        completions (`Completions`):
            All that it will sample unless the weights change; true as far as `steps`.
        steps (`int`):
            Tokens per sequence that there are so far.
        sampling (`Sampling`):
            The job's.
        weights (`Weights`):
            Those that it began with, and that have seen the prompt.
        finished (`bool`):
            Whether no more will come.
    """

    completions: Completions
    steps: int
    sampling: Sampling
    weights: Weights
    finished: bool

    def tokens(self, sequence: int) -> list[int]:
        """A sequence's token ids so far."""
        return self.completions.completion_ids[sequence][: self.steps]

    def finish_reason(self, sequence: int) -> str | None:
        """`"stop"`, `"length"` or `"abort"`; `None` while the sequence goes on."""
        ids = self.completions.completion_ids[sequence]
        if len(ids) > self.steps:
            return "abort" if self.finished else None
        ends = self.sampling.stop_token_ids | (frozenset() if self.sampling.ignore_eos else {END_TOKEN})
        return "stop" if len(ids) > self.sampling.min_tokens and ids[-1] in ends else "length"

    def stop_reason(self, sequence: int) -> int | None:
        """The stop token that ended a sequence; `None` for the model's own end token."""
        last = self.completions.completion_ids[sequence][-1:]
        if self.finish_reason(sequence) == "stop" and last[0] in self.sampling.stop_token_ids:
            return last[0]
        return None


class Scheduler:
    """Runs jobs.

    Args:
        latency (`Latency`):
            How long they take.
        max_model_len (`int`):
            Prompt and completion together are never longer.
        clock (`Callable[[], float]`):
            Monotonic seconds.
        sleep (`Callable[[float], Awaitable[None]]`):
            Waits for that many seconds.
        max_num_seqs (`int`, *optional*, defaults to `256`):
            Sequences that run at once. Jobs are let in as they came, each as a whole.
    """

    def __init__(
        self,
        latency: Latency,
        max_model_len: int,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        max_num_seqs: int = 256,
    ) -> None:
        self.paused = False
        self._latency, self._max_model_len = latency, max_model_len
        self._clock, self._sleep = clock, sleep
        self._max_num_seqs = max_num_seqs
        self._jobs: dict[Job, None] = {}  # a set that keeps its order
        self._stalled = 0
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        running = len(self._running)
        return f"<Scheduler {running} running, {len(self._jobs) - running} waiting{', paused' * self.paused}>"

    @property
    def _running(self) -> list[Job]:
        return [job for job in self._jobs if job.running]

    @property
    def running(self) -> int:
        """Number of jobs that run; those that are frozen or queued do not."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of jobs that are frozen or queued."""
        return len(self._jobs) - self.running

    def queue(self) -> tuple[int, int]:
        """Sequences that run, and that wait, as `vllm serve` counts them: no more run than may."""
        running = min(self._max_num_seqs, sum(job.sequences for job in self._running))
        return running, sum(job.sequences for job in self._jobs) - running

    async def run(self, job: Job, stepwise: bool = False) -> AsyncIterator[Progress]:
        """Run a job.

        Args:
            job (`Job`):
                A new one.
            stepwise (`bool`, *optional*, defaults to `False`):
                Tell after every step, and not only at the end.
        """
        self._jobs[job] = None
        self._let_in()
        prompt_tokens = sum(map(len, job.prompts))
        told = 0
        try:
            while (self._stalled or not job.running) and not job.aborted:
                await self._changed.wait()
            while True:
                steps = self._steps(job, prompt_tokens)
                if not job.schedule or job.weights() != job.schedule[-1][1]:
                    job.schedule.append((max(told, steps), job.weights()))
                done = await self._sampled(job)
                while told < done.longest and not job.aborted:
                    target = told + 1 if stepwise else done.longest
                    if not await self._pass(job, self._latency.seconds(prompt_tokens, target)):
                        break
                    told = target
                    if told < done.longest:
                        yield Progress(done, told, job.sampling, job.schedule[0][1], finished=False)
                if job.aborted or told >= done.longest:
                    told = max(told, min(self._steps(job, prompt_tokens), done.longest))
                    yield Progress(done, told, job.sampling, job.schedule[0][1], finished=True)
                    return
        finally:
            del self._jobs[job]
            self._let_in()
            self.notify()

    def _let_in(self) -> None:
        """Have those run for whom there is room, in the order in which they came."""
        used = sum(job.sequences for job in self._running)
        for job in () if self.paused else [job for job in self._jobs if not job.running]:
            if used and used + job.sequences > self._max_num_seqs:
                break
            job.running = True
            used += job.sequences

    async def pause(self, mode: str) -> None:
        """Stop scheduling: `keep` freezes what runs, `abort` ends all there is, frozen and queued as well, `wait`
        waits for what runs. New jobs queue."""
        self.paused = True
        if mode == "abort":
            self.abort()
        elif mode == "keep":
            for job in self._running:
                job.running = False
        self.notify()
        while mode != "keep" and self._running:
            await self._changed.wait()

    def resume(self) -> None:
        """Go on with what is frozen or queued."""
        self.paused = False
        self._let_in()
        self.notify()

    def abort(self, ids: Iterable[str] | None = None) -> int:
        """End jobs where they are.

        Args:
            ids (`Iterable[str]`, *optional*):
                Which; by default all.

        Returns:
            `int`: How many requests they were.
        """
        wanted = None if ids is None else set(ids)
        ended = [job for job in self._jobs if wanted is None or wanted & set(job.ids)]
        for job in ended:
            job.aborted = True
        self.notify()
        return sum(job.requests for job in ended)

    def stall(self) -> None:
        """Nothing runs until `unstall()`: the engine is busy with something else."""
        self._stalled += 1
        self.notify()

    def unstall(self) -> None:
        """The end of `stall()`."""
        self._stalled -= 1
        self.notify()

    def notify(self) -> None:
        """Have jobs look again at what they depend on; their weights, for instance."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _sampled(self, job: Job) -> Completions:
        (_, first), *later = job.schedule
        limit = self._max_model_len
        sampled = len(job.prompts) * job.sampling.n * min(job.sampling.max_tokens or limit, limit)
        return await computed(
            sum(map(len, job.prompts)) + sampled * (1 + abs(job.sampling.logprobs or 0)),
            lambda: generate(
                job.prompts, job.sampling, first, max_model_len=limit, images=job.images, later=tuple(later)
            ),
        )

    def _steps(self, job: Job, prompt_tokens: int) -> int:
        """Tokens that the time it has run is enough for."""
        per_step = self._latency.seconds(0, 1) - self._latency.seconds(0, 0)
        decoding = job.seconds - self._latency.seconds(prompt_tokens, 0)
        return 0 if per_step <= 0.0 or decoding < 0.0 else int(decoding / per_step)

    async def _pass(self, job: Job, seconds: float) -> bool:
        """Let time pass until the job has run this long; `False` if it was aborted or its weights changed before."""
        while job.seconds < seconds:
            if job.aborted:
                return False
            if self._stalled or not job.running:  # frozen, it does not touch its weights
                await self._changed.wait()
                continue
            if job.weights() != job.schedule[-1][1]:
                return False
            started = self._clock()
            if await self._slept(seconds - job.seconds):
                job.seconds = seconds
            else:
                job.seconds = min(seconds, job.seconds + self._clock() - started)
        return True

    async def _slept(self, seconds: float) -> bool:
        """Whether so many seconds have passed before anything changed."""
        sleeping = asyncio.ensure_future(self._sleep(seconds))
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({sleeping, changing}, return_when=asyncio.FIRST_COMPLETED)
            return sleeping.done()
        finally:
            sleeping.cancel()
            changing.cancel()
