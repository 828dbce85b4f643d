"""The right to a request on a backend, and what a backend has done with such rights so far."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .breaker import Permit
from .errors import AttemptError

if TYPE_CHECKING:
    from .backend import Backend


class Lane(enum.Enum):
    """Work that may share a server with its own kind; on some servers not with the other."""

    GENERATE = "generating"
    SCORE = "scoring"


@dataclass(eq=False)
class Lease:
    """The right to one request on one backend. It is given back by [`Backend.release`], whatever happened."""

    backend: Backend
    lane: Lane
    weight: int
    permit: Permit
    started: float
    owner: object = None
    shares_slot: bool = False
    weight_version: int | None = None
    # While its request is out:
    scope: asyncio.Timeout | None = None
    patience: float = 0.0
    until: float = 0.0
    broken_off: AttemptError | None = None


@dataclass(frozen=True)
class BackendStatistics:
    """A backend at one moment.

    Args:
        name (`str`): `host:port` and path prefix.
        url (`str`): Its URL.
        eligible (`bool`): Whether it may take requests.
        reason (`str`): Why not, empty if it may.
        health (`str`): `"up"`, `"suspect"`, `"down"` or `"not probed yet"`.
        breaker (`str`): `"closed"`, `"open"` or `"half-open"`.
        weight_version (`int` or `None`): The weights it holds; `None` when unknown.
        model_version (`str` or `None`): What its health answer says.
        inflight (`int`): Requests out now.
        load (`int`): Completions out now.
        requests (`int`): Requests sent so far.
        prompts (`int`): Prompts it has answered.
        failures (`int`): Requests that failed.
        failovers (`int`): Prompts taken from it and sent elsewhere.
        ejections (`int`): Times its breaker opened.
        latency (`float` or `None`): Mean seconds of the requests it answered.
        draining (`bool`): Whether it is on its way out.
    """

    name: str
    url: str
    eligible: bool
    reason: str
    health: str
    breaker: str
    weight_version: int | None
    model_version: str | None
    inflight: int
    load: int
    requests: int
    prompts: int
    failures: int
    failovers: int
    ejections: int
    latency: float | None
    draining: bool
