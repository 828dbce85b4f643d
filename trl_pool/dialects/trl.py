"""The `trl` dialect: the protocol of `trl vllm-serve` of TRL 1.0 – 1.10."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .answers import GenerateAnswer, ScoreAnswer, expect, merge_generated, slices
from .base import Dialect, Endpoint, Job
from .logprobs import at_a_stretch


class _Generated(msgspec.Struct):
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[list[float | None]]] | None
    logprob_token_ids: list[list[list[int]]] | None


class _RawGenerated(msgspec.Struct):
    prompt_ids: list[msgspec.Raw]
    completion_ids: list[msgspec.Raw]
    logprobs: list[msgspec.Raw] | None
    logprob_token_ids: list[msgspec.Raw] | None


class _Scored(msgspec.Struct):
    logprobs: list[list[list[float | None]]]
    logprob_token_ids: list[list[list[int]]]


class _RawScored(msgspec.Struct):
    logprobs: list[msgspec.Raw]
    logprob_token_ids: list[msgspec.Raw]


class _ScoredBinary(msgspec.Struct):
    logprobs_b64: str
    token_ids_b64: str
    shape: tuple[int, int, int]
    completion_lengths: list[int]
    actual_logprobs_b64: str | None = None
    actual_token_ids_b64: str | None = None


_NULLS = dict.fromkeys(
    (
        "logprobs",
        "logprob_token_ids",
        "logprobs_b64",
        "token_ids_b64",
        "actual_logprobs_b64",
        "actual_token_ids_b64",
        "shape",
        "completion_lengths",
    )
)
"""A server sends the fields of the format that was not asked for as null."""


_decode_generated: Callable[[bytes], Any] = msgspec.json.Decoder(_Generated).decode
_decode_raw_generated: Callable[[bytes], Any] = msgspec.json.Decoder(_RawGenerated).decode
_decode_scored: Callable[[bytes], Any] = msgspec.json.Decoder(_Scored).decode
_decode_raw_scored: Callable[[bytes], Any] = msgspec.json.Decoder(_RawScored).decode
_decode_binary = msgspec.json.Decoder(_ScoredBinary).decode
_encode = msgspec.json.Encoder().encode


class TrlDialect(Dialect):
    """Encodes and decodes for `trl vllm-serve`."""

    name = "trl"
    health_path = "/health/"
    world_size_path = "/get_world_size/"
    close_group_path = "/close_communicator/"
    one_request_at_a_time = True
    silent_while_busy = True
    scoring_is_exclusive = True
    survives_bad_requests = False

    def path(self, job: Job) -> str:
        return f"/{job.endpoint.value}/"

    def encode(self, job: Job, indices: Sequence[int]) -> bytes:
        if job.body is not None and len(indices) == len(job.units):
            return job.body
        units = [job.units[i] for i in indices]
        body = dict(job.fields)
        if job.endpoint is Endpoint.GENERATE:
            body["prompts"] = units
            body["images"] = [job.images[i] for i in indices] if job.images else None
        elif job.endpoint is Endpoint.CHAT:
            body["messages"] = units
        else:
            body["sequences"] = [sequence for sequence, _ in units]
            body["prompt_lengths"] = [length for _, length in units]
        return _encode(body)

    def decode(self, job: Job, indices: Sequence[int], body: bytes) -> list[Any]:
        if job.endpoint is not Endpoint.SCORE:
            return self._decode_generated(job, indices, body)
        if job.fields["response_format"] == "binary":
            return self._decode_binary(job, indices, body)
        decode = _decode_raw_scored if job.raw else _decode_scored
        scored: _Scored | _RawScored = at_a_stretch(decode, body)
        expect("logprobs", len(scored.logprobs), len(indices))
        expect("logprob_token_ids", len(scored.logprob_token_ids), len(indices))
        if isinstance(scored, _Scored):
            _check_scored(job, indices, list(map(len, scored.logprobs)))
            _check_scored(job, indices, list(map(len, scored.logprob_token_ids)))
        return list(map(ScoreAnswer, scored.logprobs, scored.logprob_token_ids))

    def merge(self, job: Job, answers: Sequence[Any]) -> dict[str, Any]:
        if job.endpoint is not Endpoint.SCORE:
            return merge_generated(answers)
        if job.fields["response_format"] == "binary":
            return _pack(answers, job.fields["top_logprobs"]) if job.raw else _unpack(answers)
        lists = {
            "logprobs": [answer.logprobs for answer in answers],
            "logprob_token_ids": [answer.logprob_token_ids for answer in answers],
        }
        return {**_NULLS, **lists} if job.raw else lists

    def _decode_generated(self, job: Job, indices: Sequence[int], body: bytes) -> list[Any]:
        decode = _decode_raw_generated if job.raw else _decode_generated
        answer: _Generated | _RawGenerated = at_a_stretch(decode, body)
        n = job.n
        sequences = len(indices) * n
        expect("prompt_ids", len(answer.prompt_ids), len(indices))
        expect("completion_ids", len(answer.completion_ids), sequences)
        for field in ("logprobs", "logprob_token_ids"):
            if getattr(answer, field) is not None:
                expect(field, len(getattr(answer, field)), sequences)
        if (answer.logprobs is None) != (answer.logprob_token_ids is None):
            raise ValueError("only one of logprobs and logprob_token_ids is null")
        if isinstance(answer, _Generated):
            _check_generated(job, indices, answer)
        return list(
            map(
                GenerateAnswer,
                answer.prompt_ids,
                slices(answer.completion_ids, n),
                slices(answer.logprobs, n, len(indices)),
                slices(answer.logprob_token_ids, n, len(indices)),
            )
        )

    def _decode_binary(self, job: Job, indices: Sequence[int], body: bytes) -> list[Any]:
        answer = _decode_binary(body)
        batch, length, top = answer.shape
        expect("shape[0]", batch, len(indices))
        expect("shape[2]", top, job.fields["top_logprobs"])
        _check_scored(job, indices, answer.completion_lengths)
        if any(not 0 <= completion <= length for completion in answer.completion_lengths):
            raise ValueError(f"completion_lengths {answer.completion_lengths} do not fit shape {answer.shape}")
        columns: list[Any] = [
            _array(answer.logprobs_b64, np.float32, (batch, length, top)),
            _array(answer.token_ids_b64, np.int32, (batch, length, top)),
        ]
        if answer.actual_logprobs_b64 is not None and answer.actual_token_ids_b64 is not None:
            columns.append(_array(answer.actual_logprobs_b64, np.float32, (batch, length, 1)))
            columns.append(_array(answer.actual_token_ids_b64, np.int32, (batch, length, 1)))
        return [
            ScoreAnswer(*(column[k, :completion] for column in columns))
            for k, completion in enumerate(answer.completion_lengths)
        ]


def _check_generated(job: Job, indices: Sequence[int], answer: _Generated) -> None:
    """Finds answers that are well formed and not to this request."""
    if answer.logprobs is not None and answer.logprob_token_ids is not None:
        for ids, logprobs, token_ids in zip(
            answer.completion_ids, answer.logprobs, answer.logprob_token_ids, strict=True
        ):
            if not len(ids) == len(logprobs) == len(token_ids):
                raise ValueError("a completion and its logprobs differ in length")
    # Images expand into placeholder tokens and truncation cuts, so only plain token-id prompts come back as sent.
    if job.images or "truncate_prompt_tokens" in job.fields.get("generation_kwargs", {}):
        return
    for index, prompt_ids in zip(indices, answer.prompt_ids, strict=True):
        if isinstance(job.units[index], list) and job.endpoint is Endpoint.GENERATE:  # noqa: SIM102
            if job.units[index] != prompt_ids:
                raise ValueError(f"prompt_ids are not those of prompt {index}: the answer is to another request")


def _check_scored(job: Job, indices: Sequence[int], lengths: Sequence[int]) -> None:
    """Finds scores of other sequences: a server that was asked to generate meanwhile may swap its replies."""
    expected = [len(sequence) - prompt for sequence, prompt in (job.units[i] for i in indices)]
    if list(lengths) != expected:
        raise ValueError(f"completions of lengths {list(lengths)[:8]} where {expected[:8]} were asked for")


def _array(encoded: str, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(encoded), dtype=dtype).reshape(shape)


_COLUMNS = ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")


def _unpack(answers: Sequence[ScoreAnswer]) -> dict[str, Any]:
    """Binary answers as the nested lists that TRL's client returns."""
    return {
        column: at_a_stretch(list, map(np.ndarray.tolist, [getattr(answer, column) for answer in answers]))
        for column in _COLUMNS
        if column in _COLUMNS[:2] or (answers and all(getattr(a, column) is not None for a in answers))
    }


def _pack(answers: Sequence[ScoreAnswer], top: int) -> dict[str, Any]:
    """Binary answers as one server would pack them: padded to the longest with -inf and token 0."""
    lengths = [len(answer.logprobs) for answer in answers]
    shape = (len(answers), max(lengths, default=0), answers[0].logprobs.shape[1] if answers else top)
    packed: dict[str, Any] = {
        "logprobs": None,
        "logprob_token_ids": None,
        "shape": shape,
        "completion_lengths": lengths,
    }
    wire_names = ("logprobs_b64", "token_ids_b64", "actual_logprobs_b64", "actual_token_ids_b64")
    for column, wire_name in zip(_COLUMNS, wire_names, strict=True):
        if any(getattr(answer, column) is None for answer in answers):
            continue
        floats = "logprobs" in wire_name
        width = 1 if column.startswith("actual") else shape[2]
        array = np.full(
            (shape[0], shape[1], width), -np.inf if floats else 0, dtype=np.float32 if floats else np.int32
        )
        for row, answer in enumerate(answers):
            array[row, : lengths[row]] = getattr(answer, column)
        packed[wire_name] = base64.b64encode(array.tobytes()).decode("ascii")
    return packed
