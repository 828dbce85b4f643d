"""Faults that a simulated server can be told to have.

A fault is a value, the book holds those that are switched on, and the server asks it once per request.
Nothing here does I/O: what a fault looks like on the wire is `gate`'s affair, and the two kinds that concern
the listening socket and idle connections rather than a request are `control`'s.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trl_pool.sim.traits import ALL_TRAITS, TRL

ENDPOINTS = TRL.endpoints
"""Every endpoint of the `trl` dialect by its path without slashes; `other` is any other path, redirects included."""

_KNOWN = frozenset().union(*(traits.endpoints for traits in ALL_TRAITS.values()))

AT_ONCE = frozenset({"refuse", "drop_idle"})
"""Kinds that happen when they are switched on, instead of to a request."""

Kind = Literal[
    "refuse",
    "drop_idle",
    "hang",
    "dead_worker",
    "slow",
    "status",
    "busy",
    "reset",
    "cut_json",
    "invalid_json",
    "wrong_count",
    "false_reset",
]

# What a fault concerns when its `endpoints` are not named. A dead worker is one behind a healthy /health/:
# only the endpoints that wait for the worker's reply notice.
_DEFAULT_ENDPOINTS = {
    "dead_worker": frozenset().union(*(traits.worker for traits in ALL_TRAITS.values())),
    "false_reset": frozenset({"reset_prefix_cache"}),
}


class Fault(BaseModel):
    """One fault.

    | kind | what happens |
    |---|---|
    | `refuse` | the port is closed and every connection reset, for `seconds` (0: until faults are cleared) |
    | `drop_idle` | kept-alive connections with no request on them are closed, once, now |
    | `hang` | no answer until faults are cleared, then the ordinary one; other requests are answered meanwhile |
    | `dead_worker` | the same, for what waits for the worker: health and world size stay fine |
    | `slow` | the answer takes `seconds` longer, and keeps a `trl` server busy as long |
    | `status` | an answer with this `status` and the dialect's body for it; `Retry-After` if `retry_after` is given |
    | `busy` | 429 with `Retry-After` (1 unless given) |
    | `reset` | TCP reset after the headers and `after_bytes` of the body (default: half; -1: before any byte) |
    | `cut_json` | a complete response with half of the JSON |
    | `invalid_json` | a complete response that is no JSON |
    | `wrong_count` | one completion (or scored sequence) less than asked for |
    | `false_reset` | `reset_prefix_cache` answers 200 and says in its body that it failed |

    A fault that changes or breaks a body has a streamed answer wait until it is complete.

    Args:
        kind (`str`):
            See the table.
        endpoints (`list[str]`, *optional*):
            Of the dialect's endpoints, see `trl_pool.sim.traits`. By default every one except `health`, unless the
            table says otherwise.
        times (`int`, *optional*):
            How many requests it happens to; by default all, until faults are cleared.
        seconds (`float`, *optional*, defaults to `0.0`):
            For `refuse` and `slow`.
        retry_after (`float`, *optional*):
            Value of the `Retry-After` header in seconds, for `busy` and `status`.
        after_bytes (`int`, *optional*):
            For `reset`.
        status (`int`, *optional*, defaults to `500`):
            For `status`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    endpoints: tuple[str, ...] | None = None
    times: int | None = Field(default=None, ge=1)
    seconds: float = Field(default=0.0, ge=0.0)
    retry_after: float | None = Field(default=None, ge=0.0)
    after_bytes: int | None = Field(default=None, ge=-1)
    status: int = Field(default=500, ge=400, le=599)

    @field_validator("endpoints")
    @classmethod
    def _known(cls, endpoints: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = set(endpoints or ()) - _KNOWN
        if unknown:
            raise ValueError(f"unknown endpoints {sorted(unknown)}; known are {sorted(_KNOWN)}")
        return endpoints

    @model_validator(mode="after")
    def _sensible(self) -> Fault:
        if self.kind in AT_ONCE and (self.times is not None or self.endpoints is not None):
            raise ValueError(f"{self.kind!r} concerns the whole server at once: no times, no endpoints")
        return self

    def concerns(self, endpoint: str) -> bool:
        """Whether it can happen to a request to this endpoint."""
        if self.endpoints is not None:
            return endpoint in self.endpoints
        default = _DEFAULT_ENDPOINTS.get(self.kind)
        return endpoint in default if default is not None else endpoint != "health"


class FaultBook:
    """The faults that are switched on, in the order in which they were."""

    def __init__(self) -> None:
        self._open: list[tuple[Fault, int | None]] = []

    def __repr__(self) -> str:
        kinds = ", ".join(f.kind if left is None else f"{f.kind} x{left}" for f, left in self._open)
        return f"<FaultBook: {kinds or 'none'}>"

    def add(self, fault: Fault) -> None:
        """Switch a fault on, after those that are on already."""
        if fault.kind in AT_ONCE:
            raise ValueError(f"{fault.kind!r} happens to no request")
        self._open.append((fault, fault.times))

    def clear(self) -> None:
        """Switch all faults off."""
        self._open.clear()

    def take(self, endpoint: str) -> Fault | None:
        """What happens to this request? The first fault that concerns it, one of its `times` used up."""
        for place, (fault, left) in enumerate(self._open):
            if fault.concerns(endpoint):
                if left == 1:
                    del self._open[place]
                elif left is not None:
                    self._open[place] = (fault, left - 1)
                return fault
        return None

    def listing(self) -> list[dict[str, object]]:
        """The faults that are on, with `times` as many as are left."""
        return [{**fault.model_dump(exclude_defaults=True), "times": left} for fault, left in self._open]
