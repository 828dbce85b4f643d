"""The bodies in which `vllm serve` answers completions, chats and generates, and the parts that they share."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_pool.sim.engine import Scored, detokenize, token_bytes
from trl_pool.sim.scheduler import Progress
from trl_pool.sim.scores import END_TOKEN

_LOWEST = -9999.0  # JSON has no -inf


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Token counts of a whole answer."""
    return {
        **short_usage(prompt_tokens, completion_tokens),
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def short_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Token counts in a stream."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def count(progress: Progress) -> int:
    """How many tokens have been sampled."""
    return sum(len(progress.tokens(i)) for i in range(len(progress.completions.completion_ids)))


def prompt_logprobs(scored: Scored, top: int) -> list[dict[int, dict[str, Any]] | None]:
    """`[token]`: the actual token first, then the `top` most likely; none for the first token."""
    logprobs, ids = scored.lists(top)
    ranks = [0] * scored.first + (scored.ranks + 1).tolist()
    actual = [0] * scored.first + scored.tokens.tolist()
    found: list[dict[int, dict[str, Any]] | None] = []
    for i, token in enumerate(actual):
        if i < scored.first:
            found.append(None)
            continue
        pairs = dict(zip(ids[i], logprobs[i], strict=True))
        places = {other: place for place, other in enumerate(pairs, 1)} | {token: ranks[i]}
        ordered = [token, *(other for other in pairs if other != token)]
        found.append({t: _ranked(t, pairs[t], places[t]) for t in ordered})
    return found


def _ranked(token: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": max(logprob, _LOWEST), "rank": rank, "decoded_token": detokenize([token])}


def completion_logprobs(
    progress: Progress, sequence: int, tokens: range, k: int, as_ids: bool, text_offset: int = 0
) -> dict[str, Any]:
    """Logprobs as `/v1/completions` has them: the sampled token, and up to `k` more.

    Args:
        progress (`Progress`): Has them.
        sequence (`int`): Which sequence.
        tokens (`range`): Which of its tokens.
        k (`int`): `logprobs` of the request.
        as_ids (`bool`): Whether tokens read `"token_id:5"`.
        text_offset (`int`, *optional*, defaults to `0`): Characters before the first of them.
    """
    offsets, names, values, tops = [], [], [], []
    for position in tokens:
        pairs = _pairs(progress, sequence, position)
        offsets.append(text_offset)
        names.append(_name(pairs[0][0], as_ids))
        values.append(pairs[0][1])
        tops.append({_name(token, as_ids): logprob for token, logprob in pairs[: k + 1]})
        text_offset += len(names[-1])
    return {"text_offset": offsets, "token_logprobs": values, "tokens": names, "top_logprobs": tops}


def chat_logprobs(progress: Progress, sequence: int, tokens: range, k: int, as_ids: bool) -> dict[str, Any]:
    """Logprobs as `/v1/chat/completions` has them: `k` of the sampled token and the most likely, -1 for all."""
    content = []
    for position in tokens:
        pairs = _pairs(progress, sequence, position)
        token, logprob = pairs[0]
        top = [_entry(other, value, as_ids) for other, value in (pairs if k == -1 else pairs[:k])]
        text = list(detokenize([token]).encode())
        content.append({"token": _name(token, as_ids), "logprob": logprob, "bytes": text, "top_logprobs": top})
    return {"content": content}


def _entry(token: int, logprob: float, as_ids: bool) -> dict[str, Any]:
    name = _name(token, as_ids)
    return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


def generate_logprobs(progress: Progress, sequence: int, k: int) -> dict[str, Any]:
    """Logprobs as `/inference/v1/generate` has them: always ids, and at least the sampled one."""
    content = []
    for position in range(len(progress.tokens(sequence))):
        pairs = _pairs(progress, sequence, position)
        entries = [{"token": _name(t, True), "logprob": p, "bytes": None} for t, p in pairs]
        content.append({**entries[0], "top_logprobs": entries if k == -1 else entries[: max(k, 1)]})
    return {"content": content}


def _pairs(progress: Progress, sequence: int, position: int) -> list[tuple[int, float]]:
    """(token, logprob), the sampled one first, the others by falling probability."""
    done = progress.completions
    assert done.logprobs is not None
    assert done.logprob_token_ids is not None
    sampled = done.completion_ids[sequence][position]
    rows = zip(done.logprob_token_ids[sequence][position], done.logprobs[sequence][position], strict=True)
    pairs = [(token, max(logprob, _LOWEST)) for token, logprob in rows]
    return sorted(pairs, key=lambda pair: pair[0] != sampled)


def _name(token: int, as_id: bool) -> str:
    return f"token_id:{token}" if as_id else detokenize([token])


class Text:
    """The text of a sequence as it grows: characters come when all their bytes have."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def more(self, tokens: Iterable[int], last: bool) -> str:
        """What these tokens add to it. The end token has no text."""
        raw = b"".join(token_bytes(token) for token in tokens if token != END_TOKEN)
        return self._decoder.decode(raw, final=last)


def text(progress: Progress, sequence: int) -> str:
    """The whole text of a sequence. A stop token is no part of it."""
    return Text().more(spoken(progress, sequence), last=True)


def spoken(progress: Progress, sequence: int) -> list[int]:
    """The tokens of a sequence that have text."""
    tokens = progress.tokens(sequence)
    return tokens[:-1] if progress.finish_reason(sequence) == "stop" else tokens


def completion_choice(
    progress: Progress, sequence: int, logprobs: dict[str, Any] | None, scored: Any, ids: Sequence[int] | None
) -> dict[str, Any]:
    """One choice of `/v1/completions`. `ids` are the prompt's, and `None` unless token ids are asked for."""
    return {
        "index": sequence,
        "text": text(progress, sequence),
        "logprobs": logprobs,
        "finish_reason": progress.finish_reason(sequence),
        "stop_reason": progress.stop_reason(sequence),
        "token_ids": None if ids is None else progress.tokens(sequence),
        "prompt_logprobs": scored,
        "prompt_token_ids": ids,
        "routed_experts": None,
    }


def chat_choice(
    progress: Progress, sequence: int, role: str, logprobs: dict[str, Any] | None, with_ids: bool
) -> dict[str, Any]:
    """One choice of `/v1/chat/completions`."""
    message = {
        "role": role,
        "content": text(progress, sequence),
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    return {
        "index": sequence,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": progress.finish_reason(sequence),
        "stop_reason": progress.stop_reason(sequence),
        "token_ids": progress.tokens(sequence) if with_ids else None,
        "routed_experts": None,
    }


@dataclass(frozen=True)
class Head:
    """What an answer and the chunks of a stream have in common.

    Args:
        id (`str`): Of the request, with its kind before it.
        object (`str`): What kind of answer it is.
        model (`str`): Who answers.
        fingerprint (`str`): Of the server.
        created (`int`, *optional*): Seconds since 1970.
    """

    id: str
    object: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """As they begin every body."""
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}


def completion_body(head: Head, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
    """The whole of `/v1/completions`."""
    return {
        **head.fields(),
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": head.fingerprint,
        "usage": used,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def chat_body(
    head: Head, choices: list[dict[str, Any]], used: dict[str, Any], scored: Any, ids: Sequence[int] | None
) -> dict[str, Any]:
    """The whole of `/v1/chat/completions`."""
    return {
        **completion_body(head, choices, used),
        "prompt_logprobs": scored,
        "prompt_token_ids": ids,
        "prompt_text": None,
    }


def generate_body(
    request_id: str, model: str, progress: Progress, k: int | None, scored: Any, ids: Sequence[int] | None
) -> dict[str, Any]:
    """The whole of `/inference/v1/generate`."""
    choices = [
        {
            "index": sequence,
            "logprobs": None if k is None else generate_logprobs(progress, sequence, k),
            "finish_reason": progress.finish_reason(sequence),
            "token_ids": progress.tokens(sequence),
            "routed_experts": None,
            "sampling_mask": None,
        }
        for sequence in range(len(progress.completions.completion_ids))
    ]
    return {
        "request_id": request_id,
        "model": model,
        "created": int(time.time()),
        "choices": choices,
        "usage": usage(len(progress.completions.prompt_ids[0]), count(progress)),
        "prompt_logprobs": scored,
        "prompt_token_id_logprobs": None,
        "prompt_token_ids": ids,
        "mm_placeholders": None,
        "metrics": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }
