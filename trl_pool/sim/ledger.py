"""What has arrived at a simulated server, for tests and examples that ask afterwards."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from trl_pool.sim.traits import TRL, Traits

REMEMBERED_REQUESTS = 1000
_KEY_CHARS = 32


def prompt_key(prompt: object) -> str:
    """A short name for a prompt, the same wherever the prompt turns up; different prompts have different names.

    Args:
        prompt (`str`, `list[int]` or `list[dict]`):
            A text of up to 32 characters is its own key, a longer one its beginning with a hash; a list of
            token ids is a hash; a conversation has the key of its last message's text, hashed with the whole.
    """
    if isinstance(prompt, str):
        if len(prompt) <= _KEY_CHARS:
            return prompt
        return f"{prompt[: _KEY_CHARS - 9]}#{_hash(prompt)}"
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[-1], Mapping):
        last = str(prompt[-1].get("content"))
        return f"{last[: _KEY_CHARS - 9]}#{_hash(prompt)}"
    return f"#{_hash(prompt)}"


def _hash(value: object) -> str:
    return hashlib.blake2b(msgspec.json.encode(value), digest_size=4).hexdigest()


@dataclass
class RequestRecord:
    """One request: what it asked for, who sent it, when, and what became of it."""

    endpoint: str
    prompts: int
    prompt_keys: list[str]
    n: int | None
    user_agent: str | None
    x_request_id: str | None
    seconds: float
    """Arrival, since the start of the server."""
    status: int | None = None
    """Status of the answer, `None` while there is none."""


@dataclass
class EndpointCount:
    """Requests to one endpoint."""

    received: int = 0
    answered: int = 0
    in_flight: int = 0
    max_in_flight: int = 0


@dataclass
class Ledger:
    """Counts requests and remembers the latest.

    Args:
        clock (`Callable[[], float]`):
            Monotonic seconds.
        traits (`Traits`, *optional*):
            Names the endpoints.
    """

    clock: Callable[[], float]
    traits: Traits = TRL
    counts: dict[str, EndpointCount] = field(init=False)
    work: EndpointCount = field(default_factory=EndpointCount)
    requests: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))

    def __post_init__(self) -> None:
        self._started = self.clock()
        self.counts = {name: EndpointCount() for name in self.traits.endpoints}

    def arrived(self, endpoint: str, headers: Mapping[str, str], body: object) -> RequestRecord:
        """Note a request that has been received in full."""
        prompts = _prompts(body)
        record = RequestRecord(
            endpoint=endpoint,
            prompts=len(prompts),
            prompt_keys=[prompt_key(prompt) for prompt in prompts],
            n=_n(body) if isinstance(body, Mapping) and endpoint in self.traits.sampling else None,
            user_agent=headers.get("user-agent"),
            x_request_id=headers.get("x-request-id"),
            seconds=self.clock() - self._started,
        )
        self.requests.append(record)
        for count in self._concerned(endpoint):
            count.received += 1
            count.in_flight += 1
            count.max_in_flight = max(count.max_in_flight, count.in_flight)
        return record

    def left(self, record: RequestRecord, status: int | None) -> None:
        """Note the end of a request: its answer's status, `None` if it gets none."""
        record.status = status
        for count in self._concerned(record.endpoint):
            count.in_flight -= 1
            count.answered += status is not None

    def forget(self) -> None:
        """Start counting anew. Requests in flight stay in flight."""
        self.requests.clear()
        for count in (*self.counts.values(), self.work):
            count.received = count.answered = 0
            count.max_in_flight = count.in_flight

    def listing(self) -> dict[str, Any]:
        """Counts per endpoint, of work requests altogether, and the remembered requests, oldest first."""
        return {
            "endpoints": self.counts,
            "in_flight": self.work.in_flight,
            "max_in_flight": self.work.max_in_flight,
            "requests": list(self.requests),
        }

    def _concerned(self, endpoint: str) -> list[EndpointCount]:
        counts = [self.counts[endpoint]]
        return [*counts, self.work] if endpoint in self.traits.work else counts


def _n(body: Mapping[str, Any]) -> Any:
    nested = body.get("sampling_params")
    return (nested if isinstance(nested, Mapping) else body).get("n", 1)


def _prompts(body: object) -> Sequence[object]:
    if isinstance(body, Mapping):
        for name in ("prompts", "messages", "sequences", "prompt", "token_ids"):
            found = body.get(name)
            if isinstance(found, str):
                return [found]
            if isinstance(found, list):
                # One conversation is a list of messages, one prompt a list of token ids.
                return [found] if found and isinstance(found[0], Mapping | int) else found
    return []
