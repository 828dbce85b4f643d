"""One call: its prompts are split, leased, sent, failed over and merged here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import msgspec

from . import balancer, prefixes, retry
from .backend import Backend
from .breaker import Verdict
from .config import PoolConfig
from .dialects.answers import GenerateAnswer
from .dialects.base import Dialect, Endpoint, Job
from .dispatch import Dispatcher, Want
from .errors import (
    Attempt,
    AttemptError,
    NoBackendAvailableError,
    Outcome,
    OverloadedError,
    RequestRejectedError,
    RolloutError,
    RolloutTimeoutError,
)
from .exchange import judge
from .leases import Lane, Lease
from .provenance import ProgressBar, PromptReport, RolloutReport, RolloutResult, Route
from .pulling import Pull
from .schedule import SURPLUS

logger = logging.getLogger(__name__)


_GRACE_SECONDS = 0.25


class _Suspicion:
    """A 500 or a broken answer: the backend's fault if others serve all its prompts, the request's if they fail
    alike."""

    def __init__(self, backend: Backend, indices: Sequence[int], reason: str) -> None:
        self.backend, self.open, self.reason = backend, set(indices), reason


class Rollout:
    """One call under way.

    Args:
        job ([`Job`]): What is asked; already checked.
        route ([`Route`]): How its prompts find their backends.
        dialect ([`Dialect`]): The fleet's protocol.
        dispatcher ([`Dispatcher`]): Gives leases.
        config ([`PoolConfig`]): Time-outs and limits.
        clock (`Callable[[], float]`): Monotonic seconds.
        headers (`Mapping[str, str]`, *optional*): Sent along (a request id).
        progress ([`ProgressBar`], *optional*): Told of every prompt that is done.
    """

    def __init__(
        self,
        job: Job,
        route: Route,
        *,
        dialect: Dialect,
        dispatcher: Dispatcher,
        config: PoolConfig,
        clock: Callable[[], float],
        headers: Mapping[str, str] | None = None,
        progress: ProgressBar | None = None,
    ) -> None:
        self._job, self._route, self._dialect = job, route, dialect
        self._dispatcher, self._config, self._clock = dispatcher, config, clock
        self._headers, self._progress = headers, progress
        self._lane = Lane.SCORE if job.endpoint is Endpoint.SCORE else Lane.GENERATE
        self._path = dialect.path(job)
        self._units_per_request = dialect.units_per_request(job)
        self._deadline = clock() + config.total_timeout
        count = len(job.units)
        self._answers: list[Any] = [None] * count
        self._served_by: list[str | None] = [None] * count
        self._provenance: list[tuple[str, int | None] | None] = [None] * count
        self._history: list[list[Attempt]] = [[] for _ in range(count)]
        self._turned_away: dict[int, Attempt] = {}  # the last "busy" of each prompt, which is no failure
        self._costs = [0] * count
        self._errors = [0] * count
        self._given_up: set[int] = set()
        self._charged: set[str] = set()
        self._suspicions: list[_Suspicion] = []
        self._beginnings: Sequence[Sequence[int]] = ()  # marks per prompt, where they are of use
        self._whole: msgspec.Raw | None = None  # an answer to all of it, to be passed on as it came
        self._began = 0.0
        self._pull: Pull | None = None
        self._shares: dict[str, tuple[float, int, int]] = {}  # seconds, tokens, longest: of shares that were whole
        self._no_backend: NoBackendAvailableError | OverloadedError | None = None

    async def run(self) -> RolloutResult:
        """Serves every prompt, or raises with what was served.

        Raises:
            [`RequestRejectedError`]: a backend answered 4xx.
            [`NoBackendAvailableError`], [`OverloadedError`]: nothing could be sent.
            [`RolloutError`], [`RolloutTimeoutError`]: some prompts have no answer; the error carries the others.
        """
        try:
            # Attempts and waits end at the deadline by themselves, and say where; this is for all the rest.
            async with asyncio.timeout(self._deadline - self._clock() + _GRACE_SECONDS):
                await self._serve_all()
        except TimeoutError:
            raise self._failure(RolloutTimeoutError, self._too_late()) from None
        except BaseExceptionGroup as group:
            error = _gravest(group)
            if isinstance(error, TimeoutError):
                raise self._failure(RolloutTimeoutError, self._too_late()) from None
            raise error from None
        if self._given_up:
            if self._no_backend is not None and not any(self._history) and not any(self._served_by):
                raise self._no_backend
            raise self._failure(RolloutError, str(self._no_backend or ""))
        names = dict.fromkeys(name for name in self._served_by if name is not None)
        value = self._dialect.merge(self._job, self._answers) if self._whole is None else self._whole
        return RolloutResult(value, tuple(names))

    def report(self) -> RolloutReport:
        """Who answered what, as far as it has come."""
        return RolloutReport(
            tuple(
                PromptReport(None, None, tuple(history)) if source is None else PromptReport(*source, tuple(history))
                for source, history in zip(self._provenance, self._history, strict=True)
            )
        )

    async def _serve_all(self) -> None:
        indices = list(range(len(self._job.units)))
        if not indices:
            return
        keys = self._keys()
        shards: Sequence[tuple[Lease, list[int]]] | None = None
        whole = self._route.session_id is not None or not self._config.split_batches
        pulls = not whole and self._is_large()
        each = self._want(indices[:1], pulls=pulls)
        if self._remembers():
            self._beginnings = [prefixes.marks(unit) for unit in self._job.units]
        if whole or len(indices) == 1:
            want = self._want(indices, key=keys[0], marks=self._beginnings[0] if self._beginnings else ())
            lease = await self._dispatcher.lease(want, until=self._deadline, new_call=True)
            shards = [(lease, indices)]
        else:
            beginnings = self._beginnings or None
            try:
                shards = self._dispatcher.split(each, keys, beginnings)
            except NoBackendAvailableError:
                shards = None  # the queue knows how long to hope
            if shards is None:
                want = self._want(indices, key=keys[0], pulls=pulls)
                lease = await self._dispatcher.lease(want, until=self._deadline, new_call=True)
                shards = self._dispatcher.spread(lease, each, keys, beginnings)
        # From here on the call belongs to the weights it began with: an update waits for its end, not only for what
        # is out at the moment.
        self._dispatcher.under_way.add(self)
        self._began = self._clock()
        try:
            if pulls:
                await self._serve_pulled(each, shards)
            elif len(shards) == 1:  # most requests of a gateway: nothing to wait for but this one
                await self._serve_shard(*shards[0])
            else:
                async with asyncio.TaskGroup() as group:
                    for lease, share in shards:
                        group.create_task(self._serve_shard(lease, share))
                self._learn()
        finally:
            self._dispatcher.under_way.discard(self)
            for lease, _ in shards:  # a task that was cancelled before its first step has not seen its lease
                lease.backend.release_unused(lease)

    async def _serve_pulled(self, each: Want, shards: Sequence[tuple[Lease, list[int]]]) -> None:
        """More than the servers can run at once: they come for it as they answer."""
        self._pull = pull = Pull(
            each, shards, dispatcher=self._dispatcher, clock=self._clock, timeout=self._config.health_timeout
        )
        watch = asyncio.create_task(pull.watch())
        watch.add_done_callback(_log_end)
        try:
            async with asyncio.TaskGroup() as group:
                for lease, _ in shards:
                    piece = pull.begin(lease)
                    if piece:
                        group.create_task(self._serve_shard(lease, piece))
                while pull.schedule.held:
                    try:
                        lease, piece = await self._dispatcher.patiently(pull.take, self._lane, until=self._deadline)
                    except NoBackendAvailableError as error:
                        self._no_backend = error
                        self._given_up.update(pull.schedule.drop())
                        break
                    group.create_task(self._serve_shard(lease, piece))
        finally:
            watch.cancel()
            pull.release()

    def _is_large(self) -> bool:
        """Whether the batch is more than the servers can run at once, and they work on many requests at a time."""
        backends = self._dispatcher.backends.values()
        if self._dialect.one_request_at_a_time or self._lane is Lane.SCORE or len(backends) < 2:
            return False
        able = (b for b in backends if b.why_ineligible() is None)
        rooms = (int(b.max_num_seqs * (1 + SURPLUS)) - b.load for b in able)
        return len(self._job.units) * self._job.n > sum(max(0, room) for room in rooms)

    def _remembers(self) -> bool:
        """Whether it is worth knowing who has which beginning of a prompt."""
        return (
            self._config.prefix_memory > 0
            and self._route.session_id is None
            and self._lane is Lane.GENERATE
            and self._job.endpoint is not Endpoint.RENDER
            and len(self._dispatcher.backends) > 1
        )

    def _learn(self) -> None:
        """What the call says about the servers' speed, if each had its share from the beginning to the end."""
        if not any(self._history):
            sequences = {b.name: b.max_num_seqs for b in self._dispatcher.backends.values()}
            known = {name: share for name, share in self._shares.items() if name in sequences}
            self._dispatcher.pace.observe_call(known, sequences)

    def _keys(self) -> list[str]:
        if self._route.session_id is not None:
            return [balancer.session_key(self._route.session_id)] * len(self._job.units)
        chars = self._config.prompt_sticky_prefix_chars
        scoring = self._job.endpoint is Endpoint.SCORE
        return [balancer.affinity_key(unit[0] if scoring else unit, chars) for unit in self._job.units]

    def _weight(self, indices: Sequence[int]) -> int:
        return self._job.n * len(indices)

    async def _serve_shard(self, lease: Lease, share: list[int]) -> None:
        """A shard on its backend, then, in rounds, what is left of it in smaller pieces elsewhere."""
        home = lease.backend.name
        first: Lease | None = lease
        failed = 0
        sizes = [limit for limit in (self._route.chunk_size, self._units_per_request) if limit]
        if len(share) <= min(sizes, default=len(share)):
            await self._serve_piece(share, lease, home)
            first, failed = None, len(self._left(share))
            if not failed:
                return
        try:
            async for attempt in retry.rounds(
                attempts=self._config.max_attempts,
                backoff_seconds=self._config.backoff_seconds,
                sleep=asyncio.sleep,
            ):
                with attempt:
                    left = self._left(share)
                    if failed and attempt.retry_state.attempt_number == 1:
                        raise retry.PromptsOutstandingError  # the first round has been already
                    size = retry.piece_size(failed, len(self._dispatcher.backends) - 1) if failed else len(left)
                    size = min([size, *sizes])
                    pieces = [left[i : i + size] for i in range(0, len(left), size)]
                    async with asyncio.TaskGroup() as group:
                        for piece in pieces:
                            group.create_task(self._serve_piece(piece, first, None if failed else home))
                            first = None
                    left = self._left(share)
                    failed = max((len(p) for p in pieces if any(i in left for i in p)), default=0)
                    if left:
                        raise retry.PromptsOutstandingError
        except retry.PromptsOutstandingError:
            self._given_up.update(self._left(share))

    def _left(self, share: Sequence[int]) -> list[int]:
        return [i for i in share if self._answers[i] is None and i not in self._given_up]

    async def _serve_piece(self, piece: list[int], lease: Lease | None, home: str | None) -> None:
        """One piece on one backend; a busy one only passes it on."""
        if lease is not None:
            lease.backend.reweigh(lease, self._weight(piece))
        while True:
            if lease is None:
                try:
                    lease = await self._lease(piece, home)
                except (NoBackendAvailableError, OverloadedError) as error:
                    # Other pieces may be on their way to an answer: this one alone is given up.
                    self._no_backend = error
                    self._given_up.update(piece)
                    return
            backend = lease.backend
            try:
                outcome = await self._attempt(lease, piece)
            finally:
                backend.release_unused(lease)
            if outcome is not Outcome.BUSY:
                return
            lease, home = None, None

    async def _lease(self, piece: Sequence[int], home: str | None) -> Lease:
        if self._clock() >= self._deadline:
            raise TimeoutError
        tried = {attempt.backend for i in piece for attempt in self._history[i]}
        names = {b.name for b in self._dispatcher.backends.values() if b.url in tried}
        want = self._want(piece, home=home, tried=names)
        # A call that nobody has accepted yet may still be turned away; one that is under way waits its turn.
        return await self._dispatcher.lease(want, until=self._deadline, new_call=self._untouched())

    def _untouched(self) -> bool:
        under_way = any(b.leased_to(self) for b in self._dispatcher.backends.values())
        return not (under_way or any(self._history) or any(self._served_by))

    def _want(
        self,
        piece: Sequence[int],
        *,
        key: str | None = None,
        marks: Sequence[int] = (),
        home: str | None = None,
        tried: Container[str] = (),
        pulls: bool = False,
    ) -> Want:
        single = self._units_per_request is not None
        bounded = single or self._route.chunk_size or self._dialect.one_request_at_a_time
        per_backend = self._route.per_backend if bounded else None
        return Want(
            self._lane,
            self._weight(piece),
            key,
            marks,
            self._route.session_id is not None or not self._config.split_batches,
            home,
            tried,
            self,
            per_backend,
            shares_slot=single or pulls or self._pull is not None,
        )

    async def _attempt(self, lease: Lease, piece: list[int]) -> Outcome:
        """Sends a piece on a lease, gives the lease back, and keeps the books."""
        backend = lease.backend
        started = self._clock()
        if self._beginnings:
            # Not where they were planned for: another may have come for them, or taken them over.
            for index in piece:
                self._dispatcher.memory.served(self._beginnings[index], backend.name)
        try:
            answer = await backend.post(
                lease,
                self._path,
                self._dialect.encode(self._job, piece),
                patience=self._config.request_timeout,
                until=self._deadline,
                headers=self._headers,
            )
            judge(backend.url, answer)
            try:
                answers = self._dialect.decode(self._job, piece, answer.body)
            except ValueError as error:
                detail = f"{error} ({len(answer.body)} bytes)"
                raise AttemptError(backend.url, Outcome.BAD_ANSWER, detail, status=answer.status) from error
        except AttemptError as error:
            now = self._clock()
            # The end of the whole call's time says nothing about this backend.
            cut_short = error.outcome is Outcome.TIMED_OUT and now >= self._deadline
            self._failed(lease, piece, error, now - started, charge=not cut_short)
            return error.outcome
        if self._job.raw and len(piece) == len(self._answers):
            self._whole = msgspec.Raw(answer.body)  # checked above; nobody has to write it anew
        self._succeeded(lease, piece, answers)
        return Outcome.OK

    # Books: synchronous, so that no other task sees them half kept

    def _succeeded(self, lease: Lease, piece: Sequence[int], answers: Sequence[Any]) -> None:
        for index, answer in zip(piece, answers, strict=True):
            self._answers[index] = answer
            self._served_by[index] = lease.backend.name
            self._provenance[index] = lease.backend.url, lease.weight_version
        lengths = [
            len(ids) for answer in answers if isinstance(answer, GenerateAnswer) for ids in answer.completion_ids
        ]
        if self._pull is not None:
            self._pull.answered(lease, lengths)
        elif lengths:
            _, tokens, longest = self._shares.get(lease.backend.name, (0.0, 0, 0))
            seconds = self._clock() - self._began
            self._shares[lease.backend.name] = seconds, tokens + sum(lengths), max(longest, *lengths)
        lease.backend.served(lease, len(piece), lengths)
        lease.backend.release(lease, retry.RULES[Outcome.OK].verdict)
        if self._progress is not None:
            self._progress.update(len(piece))
        for suspicion in self._suspicions:
            suspicion.open.difference_update(piece)
            if not suspicion.open:
                self._charge(suspicion.backend, suspicion.reason)
        self._suspicions = [suspicion for suspicion in self._suspicions if suspicion.open]

    def _failed(
        self, lease: Lease, piece: Sequence[int], error: AttemptError, seconds: float, *, charge: bool
    ) -> None:
        backend, outcome = lease.backend, error.outcome
        rule = retry.RULES[outcome]
        reason = f"{outcome.value}: {error.detail}"
        attempt = Attempt(backend.url, outcome, error.detail, len(piece), seconds)
        level = logging.INFO if outcome is Outcome.BUSY else logging.WARNING
        logger.log(level, "%d prompts: %s", len(piece), attempt)
        charged = rule.verdict is Verdict.FAILURE and charge and backend.name not in self._charged
        if charged:
            self._charged.add(backend.name)
        if self._pull is not None:
            self._pull.ended(lease)
        if self._beginnings:
            for index in piece:
                self._dispatcher.memory.missed(self._beginnings[index], backend.name)
        backend.failed(error)
        backend.release(lease, Verdict.FAILURE if charged else Verdict.NEUTRAL, reason=reason)
        if outcome is Outcome.BUSY:
            self._turned_away.update(dict.fromkeys(piece, attempt))
            return
        backend.moved(len(piece))
        for index in piece:
            self._history[index].append(attempt)
            self._costs[index] += rule.costs
            self._errors[index] += rule.compare
        if rule.compare:
            self._suspect(backend, piece, reason)
        self._given_up.update(
            i for i in piece if self._costs[i] >= retry.MAX_COSTS or self._errors[i] >= retry.MAX_SERVER_ERRORS
        )

    def _suspect(self, backend: Backend, piece: Sequence[int], reason: str) -> None:
        """A second backend that fails alike clears the first: the request is at fault."""
        alike = [s for s in self._suspicions if s.backend is not backend and not s.open.isdisjoint(piece)]
        self._suspicions = [s for s in self._suspicions if s not in alike]
        if not alike:
            self._suspicions.append(_Suspicion(backend, piece, reason))

    def _charge(self, backend: Backend, reason: str) -> None:
        if backend.name not in self._charged:
            self._charged.add(backend.name)
            backend.breaker.record(Verdict.FAILURE, reason=reason)

    def _too_late(self) -> str:
        waiting = ""
        if not all(
            history or answer is not None for history, answer in zip(self._history, self._answers, strict=True)
        ):
            waiting = f"; what was never sent waited for a slot: {self._dispatcher.pressure(self._lane)}"
        return f"total_timeout of {self._config.total_timeout:g} s reached{waiting}"

    def _failure(self, kind: type[RolloutError], reason: str) -> RolloutError:
        completed = [i for i, answer in enumerate(self._answers) if answer is not None]
        failed = {
            i: self._history[i] or [self._turned_away[i]] if i in self._turned_away else self._history[i]
            for i, answer in enumerate(self._answers)
            if answer is None
        }
        result = self._dialect.merge(self._job, [self._answers[i] for i in completed]) if completed else None
        return kind(failed, completed=completed, result=result, reason=reason)


def _log_end(watch: asyncio.Task[None]) -> None:
    if not watch.cancelled() and watch.exception() is not None:
        logger.error("Nobody looks at the servers' queues any more in this call", exc_info=watch.exception())


def _gravest(group: BaseExceptionGroup[Any]) -> BaseException:
    """The single error to raise for a group: a bug before a refusal before a deadline."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(reversed(error.exceptions))
        else:
            flat.append(error)
    return min(flat, key=lambda e: (isinstance(e, TimeoutError), isinstance(e, RequestRejectedError)))
