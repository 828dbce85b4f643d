"""What every wire protocol has to offer the pool: encode, decode, and flags that say what its servers are like."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Endpoint(enum.Enum):
    """What a call asks of a backend."""

    GENERATE = "generate"
    CHAT = "chat"
    SCORE = "get_sequence_logprobs"
    RENDER = "render"
    PASS = "pass on"


@dataclass(frozen=True)
class Job:
    """A checked call, independent of which backends will serve it.

    Args:
        endpoint ([`Endpoint`]): What is asked.
        units (`Sequence`): What can be served apart: prompts, conversations, or `(sequence, prompt length)` pairs.
        fields (`Mapping[str, Any]`): Everything that all units share, as the wire names it.
        n (`int`, *optional*, defaults to `1`): Completions per unit; they never split.
        images (`Sequence` or `None`, *optional*): Per unit, base64 images or `None`.
        raw (`bool`, *optional*, defaults to `False`): Leave the values in the answers as JSON bytes: whoever only
            passes them on (the gateway) need not parse a million numbers.
        body (`bytes`, *optional*): The whole job as it came over the wire, to be passed on as it is where it is not
            split.
        features (`Sequence` or `None`, *optional*): Per unit, images that a server has processed already.
        model (`str`, *optional*): What the servers call the model, where a request has to say so.
        target (`str`, *optional*): Path of a job that is passed on as it is (`Endpoint.PASS`), with the answer.
    """

    endpoint: Endpoint
    units: Sequence[Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    images: Sequence[Any] | None = None
    raw: bool = False
    body: bytes | None = None
    features: Sequence[Any] | None = None
    model: str | None = None
    target: str = ""


class Dialect(abc.ABC):
    """One wire protocol."""

    name: str
    health_path: str
    world_size_path: str
    close_group_path: str | None
    """Where a server is told at exit that its update group is no more; `None` if it need not be told."""

    one_request_at_a_time: bool
    """Servers work through requests one after the other, so a second shard of a call only queues behind the first."""

    silent_while_busy: bool
    """Servers answer no probe while they generate."""

    scoring_is_exclusive: bool
    """Scoring and generating at once on one server swaps their replies."""

    survives_bad_requests: bool
    """Servers answer 400 to a request that they refuse. Others answer a bare 500, or die of it, so the pool has to
    find out before it sends anything."""

    @abc.abstractmethod
    def path(self, job: Job) -> str:
        """Where a job's requests go."""

    def units_per_request(self, job: Job) -> int | None:
        """Most units that one request can carry; `None` if there is no limit."""
        return None

    @abc.abstractmethod
    def encode(self, job: Job, indices: Sequence[int]) -> bytes:
        """The body of a request for some of the job's units."""

    @abc.abstractmethod
    def decode(self, job: Job, indices: Sequence[int], body: bytes) -> list[Any]:
        """One answer per unit, in the order of `indices`.

        Raises:
            `ValueError`: when the body is not the answer to this request.
        """

    @abc.abstractmethod
    def merge(self, job: Job, answers: Sequence[Any]) -> dict[str, Any]:
        """The answers to the whole job as one server would have given them."""
