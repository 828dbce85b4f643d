"""The weights of a simulated `vllm serve`: what it holds under each name, and the update that is under way.

Pure. The digest depends on *what* a server holds, not on how it came to it: two servers that took the same update have
the same weights even if one of them was restarted before. While an update is unfinished the weights are mixed, which
the digest, and so every token, shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from trl_pool.sim.engine import Weights, digest_of

FIRST_VERSION = "default"
"""The weight version of a server that was never told one."""


class WorkerError(Exception):
    """The worker raises, and the API server answers 500 with its message."""


@dataclass(frozen=True)
class Announced:
    """A tensor, as `update_info` announces it.

    Args:
        name (`str`): Of the parameter.
        dtype (`str`): `"bfloat16"`.
        shape (`tuple[int, ...]`): Of the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Parameters:
    """What is held, and what may happen to it.

    | | needs | leads to |
    |---|---|---|
    | `start()` | no update under way | an update under way |
    | `receive()` | an update under way | the same |
    | `fail()` | an update under way | none, and weights that stay mixed |
    | `finish()` | an update under way | none, and whole weights |

    With one exception, the real worker's: a failed update leaves its layers half loaded, and the next one mistakes
    what is left of them for its own. Weights stay mixed then until there was a `start()` and a `finish()` with nothing
    in between, which puts the layers together.

    Args:
        checkpoint (`Weights`):
            What the server starts with.
    """

    def __init__(self, checkpoint: Weights) -> None:
        self.version = FIRST_VERSION
        self.active = False
        self._checkpoint = checkpoint
        self._contents: dict[str, str] = {}
        self._torn = False
        self._session: dict[str, Announced | None] = {}  # those whose content is told at the end, and the others
        self._finished = 0
        self._received = 0

    def __repr__(self) -> str:
        condition = "updating" if self.active else "torn" if self._torn else "whole"
        return f"<Parameters {self.weights.digest[:8]}: {condition}, version {self.version!r}>"

    @property
    def whole(self) -> bool:
        """Whether no update is under way and none has failed."""
        return not (self.active or self._torn)

    @property
    def weights(self) -> Weights:
        """What the next token is sampled from."""
        if self.whole and not self._contents:
            return Weights(self._checkpoint.digest, self._received)
        held = [self._checkpoint.digest, sorted(self._contents.items()), self.whole]
        return Weights(digest_of(json.dumps(held)), self._received)

    def start(self) -> None:
        """Begin an update.

        Raises:
            WorkerError: If there is one under way.
        """
        if self.active:
            raise WorkerError("a weight update is already active: finish_weight_update must come first")
        self.active = True
        self._session = {}

    def require_active(self) -> None:
        """Raise `WorkerError` unless an update is under way."""
        if not self.active:
            raise WorkerError("update_weights needs a start_weight_update before it")

    def receive(self, tensor: Announced, content: str | None) -> None:
        """Take one tensor.

        Args:
            tensor (`Announced`):
                What it is.
            content (`str` or `None`):
                Stands for its bytes. `None` if none came: then the version that `finish()` is told stands for them, or
                without one the number of the update.
        """
        self.require_active()
        self._received += 1
        self._session[tensor.name] = tensor if content is None else None
        self._contents[tensor.name] = content or _stand_in(tensor, "unfinished")

    def fail(self) -> None:
        """End the update because it has failed in the middle."""
        self.active = False
        self._torn = True

    def finish(self, version: str | None = None) -> None:
        """End the update.

        Raises:
            WorkerError: If there is none.
        """
        if not self.active:
            raise WorkerError("finish_weight_update without a matching start_weight_update")
        self.active = False
        self._finished += 1
        self._torn = self._torn and bool(self._session)
        for name, tensor in self._session.items():
            if tensor is not None:
                self._contents[name] = _stand_in(tensor, self._finished if version is None else version)
        if version is not None:
            self.version = version


def _stand_in(tensor: Announced, version: object) -> str:
    """Stands for bytes that never came."""
    return digest_of(json.dumps([tensor.dtype, tensor.shape, version]))
