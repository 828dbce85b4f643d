"""What a call is told of its way, and what it tells of its answers: values, and nothing that happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .errors import Attempt


class ProgressBar(Protocol):
    """What is needed of a tqdm bar."""

    def update(self, n: float | None = 1) -> bool | None: ...


@dataclass(frozen=True)
class Route:
    """How a call's prompts find their backends.

    Args:
        session_id (`str`, *optional*): Keeps the whole call on one backend.
        chunk_size (`int`, *optional*, defaults to `0`): Most prompts per request; 0 is unbounded.
        per_backend (`int`, *optional*, defaults to `1`): Requests of this call that a backend has at once.
    """

    session_id: str | None = None
    chunk_size: int = 0
    per_backend: int = 1


@dataclass(frozen=True)
class RolloutResult:
    """What a call gave.

    Args:
        value (`dict` or `msgspec.Raw`): The merged answer; JSON as it came, of a raw job that one request served.
        backends (`tuple[str, ...]`): Names of the backends that served it, in the order of the prompts.
    """

    value: Any
    backends: tuple[str, ...]


@dataclass(frozen=True)
class PromptReport:
    """Where one prompt's answer comes from.

    Args:
        backend (`str` or `None`): URL of the backend that served it; `None` when nobody did.
        weight_version (`int` or `None`): Weights that the backend held, in the pool's count.
        attempts (`tuple[Attempt, ...]`): What was tried before, in vain.
    """

    backend: str | None
    weight_version: int | None
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class RolloutReport:
    """The provenance of a call's answers.

    Args:
        prompts (`tuple[PromptReport, ...]`): One per prompt, in order.
    """

    prompts: tuple[PromptReport, ...]
