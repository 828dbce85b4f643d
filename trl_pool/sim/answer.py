"""A whole HTTP response, the errors among them, and what faults make of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import msgspec

from trl_pool.sim.faults import Fault
from trl_pool.sim.traits import Traits


@dataclass(frozen=True)
class Answer:
    """A whole HTTP response."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def is_json(self) -> bool:
        """Whether its body says that it is JSON."""
        return any(name.lower() == b"content-type" and b"json" in value for name, value in self.headers)

    def with_body(self, body: bytes) -> Answer:
        """The same response with another body, complete by its own account."""
        kept = tuple(h for h in self.headers if h[0].lower() != b"content-length")
        return replace(self, headers=(*kept, (b"content-length", b"%d" % len(body))), body=body)

    @classmethod
    def of_error(
        cls, status: int, retry_after: float | None = None, *, openai: bool = False, message: str | None = None
    ) -> Answer:
        """The answer to a request that failed.

        Args:
            status (`int`): Its status.
            retry_after (`float`, *optional*): For the header of that name, in seconds.
            openai (`bool`, *optional*, defaults to `False`):
                As vLLM answers it. Otherwise as FastAPI does: the status's phrase, for a 500 as bare text.
            message (`str`, *optional*): What happened; only OpenAI's body has a place for it.
        """
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Error"
        kind = b"application/json"
        if openai:
            body = msgspec.json.encode(openai_error(status, message or phrase, phrase.replace(" ", "")))
        elif status == 500:
            kind, body = b"text/plain; charset=utf-8", b"Internal Server Error"
        else:
            body = msgspec.json.encode({"detail": phrase})
        headers = [(b"content-type", kind)]
        if retry_after is not None:
            headers.append((b"retry-after", b"%g" % retry_after))
        return cls(status, tuple(headers), b"").with_body(body)


def openai_error(status: int, message: str, kind: str, param: str | None = None) -> dict[str, dict[str, Any]]:
    """OpenAI's body of an error, as vLLM writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def altered(answer: Answer, fault: Fault, traits: Traits) -> Answer:
    """The answer as the fault leaves it; unchanged if the fault does not concern the body."""
    if fault.kind == "cut_json":
        return answer.with_body(answer.body[: len(answer.body) // 2])
    if fault.kind == "invalid_json":
        return answer.with_body(b'{"%s": [[1, 2, oops' % traits.counted[0].encode())
    if fault.kind == "wrong_count" and answer.is_json:
        fields: dict[str, Any] = msgspec.json.decode(answer.body)
        for name in traits.counted:
            if fields.get(name):
                fields[name] = fields[name][:-1]
        return answer.with_body(msgspec.json.encode(fields))
    return answer
