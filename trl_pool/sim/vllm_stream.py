"""Streamed answers: server-sent events, one per token, ended by `[DONE]`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from trl_pool.sim.answer import openai_error
from trl_pool.sim.scheduler import Progress
from trl_pool.sim.vllm_answers import (
    Head,
    Text,
    chat_logprobs,
    completion_logprobs,
    short_usage,
    spoken,
)
from trl_pool.sim.vllm_bodies import ChatBody, CompletionBody
from trl_pool.sim.vllm_worker import EngineDead


@dataclass
class Delta:
    """What one sequence has got since the last time.

    Args:
        sequence (`int`): Its index.
        tokens (`range`): Places of the new tokens.
        text (`str`): What they add.
        text_offset (`int`): Characters before that.
        finish_reason (`str` or `None`): Set with the last delta.
    """

    sequence: int
    tokens: range
    text: str
    text_offset: int
    finish_reason: str | None


class Deltas:
    """Turns progress into deltas.

    Args:
        sequences (`int`):
            How many there are.
    """

    def __init__(self, sequences: int) -> None:
        self._texts = [Text() for _ in range(sequences)]
        self._told = [0] * sequences
        self._characters = [0] * sequences
        self._ended = [False] * sequences

    def of(self, progress: Progress) -> list[Delta]:
        """What is new in every sequence that goes on or ends."""
        found = []
        for i, text in enumerate(self._texts):
            if self._ended[i]:
                continue
            have, reason = len(progress.tokens(i)), progress.finish_reason(i)
            new = range(self._told[i], have)
            added = text.more(spoken(progress, i)[new.start :], last=reason is not None)
            found.append(Delta(i, new, added, self._characters[i], reason))
            self._told[i], self._ended[i] = have, reason is not None
            self._characters[i] += len(added)
        return found

    @property
    def tokens(self) -> int:
        """How many tokens were told."""
        return sum(self._told)

    def tokens_of(self, sequence: int) -> int:
        """How many tokens of one sequence were told."""
        return self._told[sequence]


async def completion_events(
    body: CompletionBody, head: Head, prompts: list[list[int]], run: AsyncIterator[Progress]
) -> AsyncIterator[bytes]:
    """The events of a streamed `/v1/completions`.

    Args:
        body (`CompletionBody`): The request.
        head (`Head`): Begins every event.
        prompts (`list[list[int]]`): Token ids.
        run (`AsyncIterator[Progress]`): The job.
    """
    deltas = Deltas(len(prompts) * body.n)
    try:
        async for progress in run:
            for delta in deltas.of(progress):
                i, first = delta.sequence, delta.tokens.start == 0
                prompt = prompts[i // body.n]
                logprobs = None
                if body.logprobs is not None:
                    as_ids, offset = bool(body.return_tokens_as_token_ids), delta.text_offset
                    logprobs = completion_logprobs(progress, i, delta.tokens, body.logprobs, as_ids, offset)
                with_ids = body.return_token_ids
                choice = {
                    "index": i,
                    "text": delta.text,
                    "logprobs": logprobs,
                    "finish_reason": delta.finish_reason,
                    "stop_reason": progress.stop_reason(i) if delta.finish_reason else None,
                    "prompt_token_ids": prompt if with_ids and first else None,
                    "token_ids": progress.tokens(i)[delta.tokens.start :] if with_ids else None,
                }
                yield _event(_chunk(head, choice, body, delta, len(prompt), deltas.tokens_of(i)))
        if _usage_wanted(body):
            yield _event(_last_chunk(head, sum(map(len, prompts)), deltas.tokens))
    except EngineDead as error:
        yield _event(openai_error(500, str(error), "InternalServerError"))
    yield b"data: [DONE]\n\n"


async def chat_events(
    body: ChatBody, head: Head, prompt: list[int], role: str, run: AsyncIterator[Progress]
) -> AsyncIterator[bytes]:
    """The events of a streamed `/v1/chat/completions`: for each choice its role first, then its tokens.

    Args:
        body (`ChatBody`): The request.
        head (`Head`): Begins every event.
        prompt (`list[int]`): Token ids.
        role (`str`): Whose message it is.
        run (`AsyncIterator[Progress]`): The job.
    """
    n = body.n or 1
    deltas = Deltas(n)
    continuous = bool(body.stream_options and body.stream_options.continuous_usage_stats)
    introduced = False
    try:
        async for progress in run:
            if not introduced:
                introduced = True
                for i in range(n):
                    choice: dict[str, Any] = {
                        "index": i,
                        "delta": {"role": role, "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                    extra = {"usage": _so_far(body, len(prompt), 0)} if continuous else {}
                    ids = prompt if body.return_token_ids else None
                    yield _event(
                        {**head.fields(), "choices": [choice], **extra, "prompt_token_ids": ids, "prompt_text": None}
                    )
            for delta in deltas.of(progress):
                i = delta.sequence
                logprobs = None
                if body.logprobs and body.top_logprobs is not None:
                    as_ids = bool(body.return_tokens_as_token_ids)
                    logprobs = chat_logprobs(progress, i, delta.tokens, body.top_logprobs, as_ids)
                choice = {
                    "index": i,
                    "delta": {"content": delta.text},
                    "logprobs": logprobs,
                    "finish_reason": delta.finish_reason,
                    **({"stop_reason": progress.stop_reason(i)} if delta.finish_reason else {}),
                    "token_ids": progress.tokens(i)[delta.tokens.start :] if body.return_token_ids else None,
                }
                yield _event(_chunk(head, choice, body, delta, len(prompt), deltas.tokens_of(i)))
        if _usage_wanted(body):
            yield _event(_last_chunk(head, len(prompt), deltas.tokens))
    except EngineDead as error:
        yield _event(openai_error(500, str(error), "InternalServerError"))
    yield b"data: [DONE]\n\n"


def _usage_wanted(body: CompletionBody | ChatBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _chunk(
    head: Head,
    choice: dict[str, Any],
    body: CompletionBody | ChatBody,
    delta: Delta,
    prompt_tokens: int,
    tokens: int,
) -> dict[str, Any]:
    chunk = {**head.fields(), "choices": [choice]}
    if _usage_wanted(body):
        if body.stream_options and body.stream_options.continuous_usage_stats:
            chunk["usage"] = _so_far(body, prompt_tokens, tokens)
    elif delta.finish_reason is not None:
        chunk["system_fingerprint"] = head.fingerprint
    return chunk


def _so_far(body: CompletionBody | ChatBody, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    used = short_usage(prompt_tokens, tokens)
    return {**used, "completion_tokens_details": None} if isinstance(body, ChatBody) else used


def _last_chunk(head: Head, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    used = short_usage(prompt_tokens, tokens)
    return {**head.fields(), "choices": [], "usage": used, "system_fingerprint": head.fingerprint}


def _event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
