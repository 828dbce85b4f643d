"""What follows from how an attempt ended: who is charged, what is tried again, when to stop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import tenacity

from .breaker import Verdict
from .errors import Outcome


@dataclass(frozen=True)
class Rule:
    """The consequences of one outcome.

    Args:
        verdict ([`Verdict`]): What it says about the backend.
        again (`bool`): Whether the prompts may be sent again. Sampling is repeatable, so even "sent, outcome unknown"
            may; control calls never come here.
        costs (`bool`): Whether it may have been the prompts that cost the backend: some requests hang or kill a real
            server for good, and twice is enough.
        compare (`bool`): Whether backend or request is at fault shows only elsewhere: the backend is charged when
            all the prompts are then served by others, and nobody is when they fail there alike.
    """

    verdict: Verdict
    again: bool
    costs: bool = False
    compare: bool = False


RULES: dict[Outcome, Rule] = {
    Outcome.OK: Rule(Verdict.SUCCESS, again=False),
    Outcome.UNREACHED: Rule(Verdict.FAILURE, again=True),
    Outcome.LOST: Rule(Verdict.FAILURE, again=True, costs=True),
    Outcome.TIMED_OUT: Rule(Verdict.FAILURE, again=True, costs=True),
    Outcome.UNAVAILABLE: Rule(Verdict.FAILURE, again=True),
    Outcome.SERVER_ERROR: Rule(Verdict.NEUTRAL, again=True, compare=True),
    Outcome.BAD_ANSWER: Rule(Verdict.NEUTRAL, again=True, compare=True),
    Outcome.BUSY: Rule(Verdict.NEUTRAL, again=True),
    Outcome.REJECTED: Rule(Verdict.NEUTRAL, again=False),
    Outcome.CANCELLED: Rule(Verdict.NEUTRAL, again=False),
}

MAX_COSTS = 2
"""Backends a prompt may cost (time-out, reset, death) before it is sent to no other."""

MAX_SERVER_ERRORS = 3
"""Times a prompt may meet a 500 or a broken answer before the request counts as the cause."""

MAX_BACKOFF_SECONDS = 10.0


class PromptsOutstandingError(Exception):
    """A round ended with prompts that may still be served: there is another round."""


def rounds(
    *, attempts: int, backoff_seconds: float, sleep: Callable[[float], Awaitable[None]]
) -> tenacity.AsyncRetrying:
    """The rounds of one shard: bounded in number, with full jitter between them (in time the call's deadline bounds).

    Args:
        attempts (`int`): Most rounds.
        backoff_seconds (`float`): Upper bound of the wait after the first round; it doubles up to 10 s.
        sleep (`Callable`): How to wait.
    """
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(PromptsOutstandingError),
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=backoff_seconds, max=MAX_BACKOFF_SECONDS),
        sleep=sleep,
        reraise=True,
    )


def piece_size(failed: int, others: int) -> int:
    """Prompts per piece when `failed` of them are sent again to `others` backends.

    At least four pieces, so that prompts that may have cost a backend take few innocent ones with them; more when
    more backends can share the work.
    """
    return max(1, -(-failed // max(4, others)))
