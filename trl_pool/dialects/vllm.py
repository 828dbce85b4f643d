"""The `vllm` dialect: the OpenAI-like protocol of `vllm serve`, as TRL 1.11 and later speak it."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec

from .answers import GenerateAnswer, ScoreAnswer, expect, merge_generated, slices
from .base import Dialect, Endpoint, Job
from .logprobs import CompletionLogprobs, at_a_stretch, rank, ranked

FINAL_ONLY = 2
"""vLLM's `RequestOutputKind` under which all n completions come back. (Left alone, `/inference/v1/generate` answers
only those that finished last.)"""

_PREFIX = len("token_id:")

_SAMPLING = ("n", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_tokens", "logprobs")


class _Top(msgspec.Struct, gc=False):
    token: str
    logprob: float | None


class _Position(msgspec.Struct, gc=False):
    token: str
    logprob: float | None
    top_logprobs: list[_Top] = []


class _ChatLogprobs(msgspec.Struct):
    """Of a chat completion, and of `/inference/v1/generate`: one entry per token."""

    content: list[_Position] | None = None


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"null")  # the same with each of a prompt's completions
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _ChatChoice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _ChatLogprobs | None = None
    finish_reason: str | None = None


class _Chat(msgspec.Struct):
    choices: list[_ChatChoice]
    prompt_token_ids: list[int] | None = None


class _PromptLogprob(msgspec.Struct):
    logprob: float | None
    rank: int | None = None


class _ScoredChoice(msgspec.Struct):
    index: int
    prompt_logprobs: list[dict[str, _PromptLogprob] | None]


class _Scored(msgspec.Struct):
    choices: list[_ScoredChoice]


_decode_completion = msgspec.json.Decoder(_Completion).decode
_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_ids = msgspec.json.Decoder(list[int] | None).decode
_decode_scored = msgspec.json.Decoder(_Scored).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class VllmDialect(Dialect):
    """Encodes and decodes for `vllm serve`."""

    name = "vllm"
    health_path = "/health"
    world_size_path = "/get_world_size"
    close_group_path = None
    one_request_at_a_time = False
    silent_while_busy = False
    scoring_is_exclusive = False
    survives_bad_requests = True

    def path(self, job: Job) -> str:
        if job.endpoint is Endpoint.PASS:
            return job.target
        if job.endpoint is Endpoint.RENDER:
            return "/v1/chat/completions/render"
        if job.endpoint is Endpoint.CHAT:
            return "/v1/chat/completions"
        return "/inference/v1/generate" if job.features is not None else "/v1/completions"

    def units_per_request(self, job: Job) -> int | None:
        single = job.endpoint in (Endpoint.CHAT, Endpoint.RENDER) or job.features is not None
        return 1 if single else None

    def encode(self, job: Job, indices: Sequence[int]) -> bytes:
        if job.body is not None and len(indices) == len(job.units):
            return job.body
        units = [job.units[i] for i in indices]
        if job.raw:  # the fields are the client's own
            return _encode({**job.fields, "prompt": units})
        if job.endpoint is Endpoint.SCORE:
            return _encode(
                {
                    "model": job.model,
                    "prompt": [sequence for sequence, _ in units],
                    "max_tokens": 1,
                    "temperature": job.fields["temperature"],
                    "prompt_logprobs": job.fields["top_logprobs"],
                }
            )
        if job.endpoint is Endpoint.RENDER:
            return _encode({"model": job.model, "messages": units[0], "max_tokens": 1})
        if job.features is not None:
            return _encode(
                {
                    "request_id": f"trl-pool-{uuid.uuid4().hex}",
                    "model": job.model,
                    "token_ids": units[0],
                    "features": job.features[indices[0]],
                    "sampling_params": {**_sampling(job.fields), "output_kind": FINAL_ONLY},
                }
            )
        body = {"model": job.model, "return_token_ids": True, "return_tokens_as_token_ids": True}
        if job.endpoint is Endpoint.CHAT:
            return _encode({**body, "messages": units[0], **_chat_fields(job.fields)})
        return _encode({**body, "prompt": units, **_sampling(job.fields)})

    def decode(self, job: Job, indices: Sequence[int], body: bytes) -> list[Any]:
        if job.endpoint is Endpoint.PASS:
            return [_json(body)]
        if job.raw:
            return _raw_answers(job, indices, body)
        if job.endpoint is Endpoint.SCORE:
            return self._decode_scored(job, indices, body)
        if job.endpoint is Endpoint.RENDER:
            features = _decode_object(body).get("features")
            if not isinstance(features, dict):
                raise ValueError("the answer has no features")
            return [features]
        n = job.n
        if self.units_per_request(job) == 1:
            chat = at_a_stretch(_decode_chat, body)
            expect("choices", len(chat.choices), n)
            _require_whole(chat.choices)
            choices = sorted(chat.choices, key=lambda choice: choice.index)
            prompt_ids = job.units[indices[0]] if job.features is not None else chat.prompt_token_ids
            if prompt_ids is None:
                raise ValueError("the answer has no prompt_token_ids; vLLM 0.11 or later is needed")
            with_logprobs = all(choice.logprobs is not None for choice in choices)
            pairs = [_of_positions(choice.logprobs) for choice in choices if choice.logprobs is not None]
            return [
                GenerateAnswer(
                    prompt_ids,
                    [choice.token_ids for choice in choices],
                    [logprobs for logprobs, _ in pairs] if with_logprobs else None,
                    [ids for _, ids in pairs] if with_logprobs else None,
                )
            ]
        answer = _decode_completion(body)
        expect("choices", len(answer.choices), n * len(indices))
        _require_whole(answer.choices)
        flat = sorted(answer.choices, key=lambda choice: choice.index)
        logprobs: list[Any] | None = None
        token_ids: list[Any] | None = None
        completions = [(choice.token_ids, choice.logprobs) for choice in flat if choice.logprobs is not None]
        if len(completions) == len(flat):
            logprobs, token_ids = ranked(completions)
        found = []
        for k, index in enumerate(indices):
            given = _decode_ids(flat[k * n].prompt_token_ids)
            if given is None:
                raise ValueError("a choice has no prompt_token_ids; vLLM 0.11 or later is needed")
            if isinstance(job.units[index], list) and job.units[index] != given and not _truncates(job):
                raise ValueError(f"prompt_token_ids are not those of prompt {index}: the answer is to another request")
            found.append(given)
        return list(
            map(
                GenerateAnswer,
                found,
                slices([choice.token_ids for choice in flat], n),
                slices(logprobs, n, len(indices)),
                slices(token_ids, n, len(indices)),
            )
        )

    def merge(self, job: Job, answers: Sequence[Any]) -> dict[str, Any]:
        if job.endpoint is Endpoint.PASS:
            passed: dict[str, Any] = answers[0]
            return passed
        if job.raw:
            return _raw_merge(answers)
        if job.endpoint is Endpoint.RENDER:
            return {"features": list(answers)}
        if job.endpoint is not Endpoint.SCORE:
            return merge_generated(answers)
        return {column: [getattr(answer, column) for answer in answers] for column in ScoreAnswer._fields}

    def _decode_scored(self, job: Job, indices: Sequence[int], body: bytes) -> list[Any]:
        answer = at_a_stretch(_decode_scored, body)
        expect("choices", len(answer.choices), len(indices))
        top = job.fields["top_logprobs"]
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        found = []
        for index, choice in zip(indices, choices, strict=True):
            sequence, prompt_length = job.units[index]
            expect(f"prompt_logprobs of sequence {index}", len(choice.prompt_logprobs), len(sequence))
            rows = [
                _score(position or {}, token, top)
                for position, token in zip(
                    choice.prompt_logprobs[prompt_length:], sequence[prompt_length:], strict=True
                )
            ]
            found.append(
                ScoreAnswer(
                    [logprobs for logprobs, _, _ in rows],
                    [ids for _, ids, _ in rows],
                    [[actual] for _, _, actual in rows],
                    [[token] for token in sequence[prompt_length:]],
                )
            )
        return found


def _require_whole(choices: Sequence[_Choice] | Sequence[_ChatChoice]) -> None:
    """An aborted request (`/pause?mode=abort`, `/abort_requests`) is answered 200, with the tokens that it had."""
    if any(choice.finish_reason == "abort" for choice in choices):
        raise ValueError("the server was told to abort the request")


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters as the wire has them; `generation_kwargs` win."""
    found = {name: fields[name] for name in _SAMPLING}
    if fields["structured_outputs_regex"] is not None:
        found["structured_outputs"] = {"regex": fields["structured_outputs_regex"]}
    return {**found, **fields["generation_kwargs"]}


def _chat_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = _sampling({**fields, "generation_kwargs": {}})
    # The chat endpoint splits what the other one says in one number.
    found["top_logprobs"] = found["logprobs"]
    found["logprobs"] = found["logprobs"] is not None
    if fields["tools"]:  # an empty list is refused
        # Whoever calls parses tool calls; the server only renders the tools into the prompt.
        found |= {"tools": fields["tools"], "tool_choice": "none"}
    if fields.get("chat_template") is not None:
        found["chat_template"] = fields["chat_template"]
    if fields["chat_template_kwargs"]:
        found["chat_template_kwargs"] = fields["chat_template_kwargs"]
    return {**found, **fields["generation_kwargs"]}


def _truncates(job: Job) -> bool:
    return "truncate_prompt_tokens" in job.fields["generation_kwargs"]


def _of_positions(logprobs: _ChatLogprobs) -> tuple[list[Any], list[Any]]:
    positions = [
        rank(
            int(entry.token[_PREFIX:]),
            entry.logprob,
            {int(top.token[_PREFIX:]): top.logprob for top in entry.top_logprobs},
        )
        for entry in logprobs.content or ()
    ]
    return [[value for _, value in p] for p in positions], [[token for token, _ in p] for p in positions]


def _score(position: Mapping[str, _PromptLogprob], token: int, top: int) -> tuple[list[float], list[int], float]:
    """One position: the `top` most probable by rank, padded with -inf and token 0, and the actual token's."""
    ranked = sorted(position.items(), key=lambda item: math.inf if item[1].rank is None else item[1].rank)[:top]
    missing = top - len(ranked)
    actual = position.get(str(token))
    return (
        [_finite(entry.logprob) for _, entry in ranked] + [-math.inf] * missing,
        [int(name) for name, _ in ranked] + [0] * missing,
        -math.inf if actual is None else _finite(actual.logprob),
    )


def _finite(logprob: float | None) -> float:
    return -math.inf if logprob is None else logprob


def _json(body: bytes) -> Any:
    """JSON as it came. Only its ends are looked at: a body that was cut is found, a million numbers stay unread."""
    text = body.strip()
    if not (text.startswith(b"{") and text.endswith(b"}")):
        raise ValueError("the answer is no JSON object")
    return msgspec.Raw(text)


def _raw_answers(job: Job, indices: Sequence[int], body: bytes) -> list[Any]:
    """Per unit its choices as they came, and with the first unit what the answer says about all of them."""
    answer = _decode_object(body)
    choices = answer.pop("choices", None)
    if not isinstance(choices, list):
        raise ValueError("the answer has no choices")
    expect("choices", len(choices), job.n * len(indices))
    choices.sort(key=lambda choice: choice.get("index", 0))
    parts: list[Any] = [{"choices": part} for part in slices(choices, job.n)]
    if parts:
        parts[0]["rest"] = answer
    return parts


def _raw_merge(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One OpenAI-like answer: choices numbered anew, token counts added up, the rest as the first server said it."""
    rests = [answer["rest"] for answer in answers if "rest" in answer]
    choices = [choice for answer in answers for choice in answer["choices"]]
    for index, choice in enumerate(choices):
        choice["index"] = index
    merged = {**(rests[0] if rests else {}), "choices": choices}
    usages = [rest["usage"] for rest in rests if isinstance(rest.get("usage"), dict)]
    if usages:
        merged["usage"] = _sum(usages)
    return merged


def _sum(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts added up by name, those in objects (`prompt_tokens_details`) as well."""
    total: dict[str, Any] = {}
    for name in dict.fromkeys(chain.from_iterable(counts)):
        values = [count[name] for count in counts if count.get(name) is not None]
        if values and all(isinstance(value, dict) for value in values):
            total[name] = _sum(values)
        elif values and all(isinstance(value, int) for value in values):
            total[name] = sum(values)
        else:
            total[name] = values[0] if values else None
    return total
