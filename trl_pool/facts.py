"""Two of the three facts about a backend, each a small state machine without I/O: its health, as probes see it, and
the weights it holds. The third, what its traffic shows, is the breaker.

They are kept apart because they fail apart: a busy server answers no probe, a server back from the dead is healthy
and stale, a server with a dead worker says "ok" and answers nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Health(enum.Enum):
    UNKNOWN = "not probed yet"
    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"


@dataclass
class HealthFact:
    """What probes say.

    Args:
        silent_means_suspect (`bool`): Whether an idle server that does not answer may merely be busy with somebody
            else's work (a `trl` server answers nothing while it generates). Otherwise silence twice in a row means
            down.
    """

    silent_means_suspect: bool
    state: Health = Health.UNKNOWN
    reason: str = "not probed yet"
    model_version: str | None = None
    max_model_len: int | None = None
    unreached: int = 0

    @property
    def usable(self) -> bool:
        return self.state in (Health.UP, Health.SUSPECT)

    def answered(self, model_version: str | None = None, max_model_len: int | None = None) -> bool:
        """A probe was answered with 200. Returns whether the server came back from the dead."""
        returned = self.state is Health.DOWN
        self.state, self.reason, self.unreached = Health.UP, "", 0
        self.model_version, self.max_model_len = model_version, max_model_len
        return returned

    def served(self) -> None:
        """A request was answered, which proves more than any probe."""
        if self.state is not Health.DOWN:
            self.state, self.reason, self.unreached = Health.UP, "", 0

    def refused(self, reason: str) -> None:
        """Nobody listens there."""
        self.state, self.reason = Health.DOWN, reason

    def unreachable(self, reason: str) -> None:
        """No connection within the time. Even a busy server's kernel accepts one, so twice in a row means down."""
        self.unreached += 1
        self.reason = reason
        if self.unreached > 1:
            self.state = Health.DOWN
        elif self.state is Health.UP:
            self.state = Health.SUSPECT

    def wrong(self, reason: str) -> None:
        """A probe was answered, but not with 200."""
        self.state, self.reason = Health.DOWN, reason

    def silent(self, *, busy: bool, lagged: bool, reason: str) -> None:
        """A probe was accepted and not answered in time.

        Args:
            busy (`bool`): Whether the server has work of ours, so that silence is what to expect.
            lagged (`bool`): Whether our own loop was late, so that the probe proves nothing.
            reason (`str`): In words.
        """
        self.unreached = 0  # somebody accepted the connection
        if busy or lagged or self.state is Health.DOWN:
            return
        self.reason = reason
        if self.state is Health.UNKNOWN:
            return  # it has never answered: not up yet
        again = self.state is Health.SUSPECT
        self.state = Health.DOWN if again and not self.silent_means_suspect else Health.SUSPECT


@dataclass
class SyncFact:
    """Which weights a backend holds.

    Args:
        held (`int` or `None`, *optional*, defaults to `0`):
            Weight version in the pool's count; `None` when unknown or mixed. Version 0 is what the servers loaded.
        reason (`str`, *optional*): Why it is unknown.
        believed (`int` or `None`, *optional*): What it held before its process may have been replaced.
        conflict (`str`, *optional*): Why it may not even serve with the weights it was started with: servers report
            different versions of them.
        half (`bool`, *optional*): Whether an update was begun on it and not ended, so that it has to be healed.
    """

    held: int | None = 0
    reason: str = ""
    believed: int | None = None
    conflict: str = ""
    half: bool = False

    def lost(self, reason: str) -> None:
        """The backend's weights are not known any more."""
        self.held, self.reason, self.believed = None, reason, None

    def doubted(self, reason: str) -> None:
        """Its process may be a new one. A server that keeps its weights' version can clear the doubt."""
        if self.held is not None:
            self.held, self.reason, self.believed = None, reason, self.held

    def reached(self, version: int) -> None:
        """A whole update has reached the backend, or it has proved that one had."""
        self.held, self.reason, self.believed = version, "", None

    def why_stale(self, required: int, staleness: int = 0) -> str | None:
        """Why the backend may not serve, or `None` when it holds the required version, or one of the `staleness`
        versions before it."""
        if required == 0 and self.conflict:
            return self.conflict
        if self.held is not None and required - staleness <= self.held <= required:
            return None
        if self.held is None:
            return f"out of sync ({self.reason}), needs weights v{required}"
        return f"holds weights v{self.held}, needs v{required}"
