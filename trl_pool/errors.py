"""Everything the pool raises.

```
PoolError
├── ConfigurationError            (ValueError)      a setting or an address is wrong
│   └── DuplicateBackendError                       a backend of that address is in the pool already
├── PoolClosedError               (RuntimeError)    used after close()
├── ForkedProcessError            (RuntimeError)    used in a forked child
├── InvalidRequestError           (ValueError)      the call is wrong; nothing was sent
├── RequestRejectedError                            a backend answered 4xx: the request is wrong
├── NoBackendAvailableError       (requests.ConnectionError)  nobody may take the request now; says why, per backend
│   └── BackendsUnreachableError                    too few servers came up in time
├── OverloadedError                                 every slot is taken and the queue is full, or the wait was over
├── RolloutError                  (requests.ConnectionError)  some prompts could not be served; carries the others
│   └── RolloutTimeoutError       (requests.Timeout)          … because the time was up
├── ControlError                  (RuntimeError)    a broadcast failed on some backend; a result per backend
│   ├── WeightSyncError                             … in a weight update
│   └── BackendMismatchError                        backends that must agree do not
├── UnknownBackendError           (KeyError)        no backend of that name
├── UnsupportedTRLError           (ImportError)     patch_trl() found no TRL, or nothing in it to replace
└── AttemptError                                    one request to one backend failed (inside the other errors)
```

Where TRL's `VLLMClient` lets a `requests` exception or a `ValueError` through, the error here is also that, so that a
training script that catches TRL's errors catches these.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests


class Outcome(enum.Enum):
    """How one request to one backend ended. What follows from each is the table in `retry`."""

    OK = "answered"
    UNREACHED = "not reached"
    LOST = "connection lost"
    TIMED_OUT = "timed out"
    UNAVAILABLE = "unavailable"
    SERVER_ERROR = "server error"
    BAD_ANSWER = "bad answer"
    BUSY = "busy"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Attempt:
    """One request that was sent, or could not be sent, to one backend.

    Args:
        backend (`str`): URL of the backend.
        outcome ([`Outcome`]): How it ended.
        detail (`str`): What was seen, in words.
        prompts (`int`): How many prompts the request carried.
        seconds (`float`): How long it took.
    """

    backend: str
    outcome: Outcome
    detail: str
    prompts: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.backend} {self.outcome.value} after {self.seconds:.1f} s: {self.detail}"


@dataclass(frozen=True)
class ControlResult:
    """What a control call gave on one backend.

    Args:
        url (`str`): The backend.
        ok (`bool`): Whether it succeeded.
        message (`str`): The server's message, or what went wrong.
        status (`int`, *optional*): HTTP status, if there was an answer.
    """

    url: str
    ok: bool
    message: str
    status: int | None = None

    def __str__(self) -> str:
        return "succeeded" if self.ok else self.message


class PoolError(Exception):
    """Base of everything the pool raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Their constructors take more than the message; pickle must not call them with it.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[PoolError], args: tuple[Any, ...], state: dict[str, Any]) -> PoolError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(PoolError, ValueError):
    """A setting or a backend's address is wrong. The message names it, its value and what is allowed."""


class DuplicateBackendError(ConfigurationError):
    """A backend of that address is in the pool already."""


class PoolClosedError(PoolError, RuntimeError):
    """The pool was used after `close()`."""


class ForkedProcessError(PoolError, RuntimeError):
    """The pool was used in a process forked from the one that made it."""


class InvalidRequestError(PoolError, ValueError):
    """The arguments of a call are wrong; nothing was sent.

    Args:
        message (`str`): What is wrong.
        details (`list[dict]`, *optional*): One entry per fault, in the form of FastAPI's 422 (`type`, `loc`, `msg`).
        indices (`Sequence[int]`, *optional*): The prompts at fault.
    """

    def __init__(
        self, message: str, *, details: Sequence[Mapping[str, Any]] = (), indices: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.details = list(details) or [{"type": "value_error", "loc": ["body"], "msg": message}]
        self.indices = list(indices)


class RequestRejectedError(PoolError):
    """A backend answered 4xx: the request is at fault, so it goes nowhere else.

    Args:
        backend (`str`): URL of the backend.
        status (`int`): HTTP status.
        body (`bytes`): The answer as it came.
        content_type (`str`): Its content type.
    """

    def __init__(self, backend: str, status: int, body: bytes, content_type: str) -> None:
        text = body.decode("utf-8", "replace")
        super().__init__(f"Request failed: {status}, {text} (answered by {backend})")
        self.backend, self.status, self.body, self.content_type = backend, status, body, content_type


class NoBackendAvailableError(PoolError, requests.ConnectionError):
    """No backend may take the request now.

    Args:
        reasons (`Mapping[str, str]`): Why not, per backend URL.
        retry_after (`float`): Seconds after which another try makes sense.
        headline (`str`, *optional*): What is said before the reasons.
    """

    def __init__(
        self, reasons: Mapping[str, str], *, retry_after: float = 1.0, headline: str = "No backend available"
    ) -> None:
        why = "; ".join(f"{url} {reason}" for url, reason in reasons.items()) or "the pool has no backends"
        super().__init__(f"{headline}: {why}")
        self.reasons, self.retry_after = dict(reasons), retry_after


class BackendsUnreachableError(NoBackendAvailableError):
    """Fewer than `min_backends` servers came up within the time given."""


class OverloadedError(PoolError):
    """Every slot is taken and the queue is full, or the longest wait is over.

    Args:
        message (`str`): What happened.
        retry_after (`float`): Seconds after which another try makes sense.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RolloutError(PoolError, requests.ConnectionError):
    """Some prompts could not be served. The others' answers are not lost: they are in here.

    Args:
        failed (`Mapping[int, Sequence[Attempt]]`): Per prompt index without an answer, what was tried.
        completed (`Sequence[int]`): Indices of the prompts that were answered, ascending.
        result (`dict` or `None`): The answers to `completed` in that order, structured as the call's return value.
        reason (`str`): What ended it.
    """

    def __init__(
        self,
        failed: Mapping[int, Sequence[Attempt]],
        *,
        completed: Sequence[int] = (),
        result: Any = None,
        reason: str = "",
    ) -> None:
        self.failed = {index: tuple(attempts) for index, attempts in failed.items()}
        self.completed = list(completed)
        self.result = result
        self.reason = reason
        super().__init__(self._describe())

    @property
    def attempts(self) -> list[Attempt]:
        """Every attempt made for a failed prompt, each once, in the order of the prompts."""
        return list(dict.fromkeys(attempt for attempts in self.failed.values() for attempt in attempts))

    @property
    def timed_out(self) -> bool:
        """Whether every attempt ended by its deadline."""
        attempts = self.attempts
        return bool(attempts) and all(attempt.outcome is Outcome.TIMED_OUT for attempt in attempts)

    def _describe(self) -> str:
        groups: dict[tuple[Attempt, ...], list[int]] = {}
        for index, attempts in self.failed.items():
            groups.setdefault(attempts, []).append(index)
        lines = [
            f"prompts {_ranges(indices)}: " + (", then ".join(map(str, tried)) or "never sent")
            for tried, indices in groups.items()
        ]
        total = len(self.failed) + len(self.completed)
        head = f"{len(self.failed)} of {total} prompts could not be served"
        if self.reason:
            head += f" ({self.reason})"
        return (
            f"{head}: " + "; ".join(lines) + f". The {len(self.completed)} answers that arrived are in `.result`, "
            "their indices in `.completed`."
        )


class RolloutTimeoutError(RolloutError, requests.Timeout):
    """The time was up before every prompt was served."""


class ControlError(PoolError, RuntimeError):
    """A control call did not succeed on every backend it was for.

    Args:
        message (`str`): What was attempted, and what to do.
        results (`Mapping[str, ControlResult | str]`): What happened, per backend URL.
    """

    def __init__(self, message: str, results: Mapping[str, ControlResult | str]) -> None:
        super().__init__(f"{message}: " + "; ".join(f"{url} {result}" for url, result in results.items()))
        self.results = {
            url: ControlResult(url, False, result) if isinstance(result, str) else result
            for url, result in results.items()
        }


class WeightSyncError(ControlError):
    """A weight update did not reach a backend; those that missed it serve nothing until a whole update has."""


class BackendMismatchError(ControlError):
    """Backends that have to agree before they share work do not."""


class UnknownBackendError(PoolError, KeyError):
    """No backend has that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnsupportedTRLError(PoolError, ImportError):
    """There is no TRL, or none in which there is anything to replace. The message says what was looked for."""


class AttemptError(PoolError):
    """One request to one backend failed.

    Args:
        backend (`str`): URL of the backend.
        outcome ([`Outcome`]): How.
        detail (`str`): What was seen.
        status (`int`, *optional*): HTTP status, where there was an answer.
        retry_after (`float`, *optional*): Seconds the backend asked to be left alone.
        refused (`bool`, *optional*, defaults to `False`): Whether the connection was refused: nobody listens there.
    """

    def __init__(
        self,
        backend: str,
        outcome: Outcome,
        detail: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        refused: bool = False,
    ) -> None:
        super().__init__(f"{backend} {outcome.value}: {detail}")
        self.backend, self.outcome, self.detail = backend, outcome, detail
        self.status, self.retry_after, self.refused = status, retry_after, refused


def _ranges(indices: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`, so that a message about 200 prompts stays readable."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
