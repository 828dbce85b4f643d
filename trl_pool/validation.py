"""Arguments are checked here before anything is sent.

A `trl vllm-serve` answers a bare 500 to some wrong requests, and dies of others: one prompt that its engine refuses,
among however many good ones, and it never answers again. Neither must be taken for a broken server, nor tried on the
next.
"""

from __future__ import annotations

import base64
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from . import sampling
from .config import PoolConfig
from .conversations import conversation_fault
from .dialects.base import Dialect, Endpoint, Job
from .dialects.trl_requests import ChatRequest, GenerateRequest, SamplingFields, SequenceLogprobsRequest
from .errors import InvalidRequestError

ModelT = TypeVar("ModelT", bound=BaseModel)


# FastAPI's words for a body that is no object.
_NO_OBJECT = {
    "model_type": {
        "type": "model_attributes_type",
        "msg": "Input should be a valid dictionary or object to extract fields from",
    }
}


def parse(model: type[ModelT], values: Mapping[str, Any] | bytes) -> ModelT:
    """Reads arguments or a JSON body into a request model.

    Raises:
        [`InvalidRequestError`]: with FastAPI's 422 details.
    """
    try:
        if isinstance(values, bytes):
            return model.model_validate_json(values)
        return model.model_validate(dict(values))
    except ValidationError as error:
        details: list[dict[str, Any]] = [
            {**fault, **_NO_OBJECT.get(fault["type"], {}), "loc": ["body", *fault["loc"]]}
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        first = "; ".join(f"{'.'.join(map(str, d['loc'][1:]))}: {d['msg']}" for d in details[:5])
        raise InvalidRequestError(f"invalid arguments: {first}", details=details) from None


def parse_object(body: bytes) -> dict[str, Any]:
    """Reads a JSON body that has to be an object; an empty one counts as one.

    Raises:
        [`InvalidRequestError`]: with FastAPI's 422 details, `json_invalid` for what is no JSON.
    """
    if not body.strip():
        return {}
    try:
        value = msgspec.json.decode(body)
    except ValueError as error:
        detail = {"type": "json_invalid", "loc": ["body"], "msg": f"Invalid JSON: {error}"}
        raise InvalidRequestError(f"invalid JSON: {error}", details=[detail]) from None
    if not isinstance(value, dict):
        problem = _NO_OBJECT["model_type"]
        raise InvalidRequestError(problem["msg"], details=[{**problem, "loc": ["body"]}])
    return value


def generate_job(
    request: GenerateRequest,
    config: PoolConfig,
    *,
    raw: bool = False,
    body: bytes | None = None,
    lenient: bool = False,
) -> Job:
    """A `/generate/` body as a job.

    Args:
        request ([`GenerateRequest`]): Its fields.
        config ([`PoolConfig`]): Limits.
        raw (`bool`, *optional*, defaults to `False`): Whether answers are only passed on.
        body (`bytes`, *optional*): As it came.
        lenient (`bool`, *optional*, defaults to `False`):
            Whether the servers answer 400 to what they refuse (`vllm serve`), so that only what they could not answer
            right is refused here.
    """
    fields = _sampling_fields(request, config, lenient)
    prompts = request.prompts
    if request.images is not None and len(request.images) not in (0, len(prompts)):
        raise _fault("images", f"{len(request.images)} image lists for {len(prompts)} prompts; give one per prompt")
    strange = [i for i, few in enumerate(request.images or ()) if few is not None and not all(map(_is_image, few))]
    if strange:
        raise _fault("images", f"not base64 of an image at {_shown(strange)}", strange)
    _check_lengths("prompts", prompts, config)
    return Job(Endpoint.GENERATE, prompts, fields, _completions(fields), request.images or None, raw, body)


def with_features(job: Job, features: Sequence[Mapping[str, Any] | None], dialect: Dialect) -> Job:
    """A job whose prompts' images have been processed already.

    Raises:
        [`InvalidRequestError`]: when they do not fit the prompts, or the servers.
    """
    if dialect.name != "vllm":
        raise _fault("features", "`trl vllm-serve` takes images=, not features=")
    if len(features) != len(job.units):
        raise _fault("features", f"{len(features)} for {len(job.units)} prompts; give one per prompt, or None")
    texts = [index for index, unit in enumerate(job.units) if isinstance(unit, str)]
    if texts:
        raise _fault("features", f"go with token ids, and there is text at {_shown(texts)}", texts)
    return replace(job, features=list(features))


def chat_job(
    request: ChatRequest,
    config: PoolConfig,
    *,
    raw: bool = False,
    body: bytes | None = None,
    lenient: bool = False,
    chat_template: str | None = None,
) -> Job:
    """A `/chat/` body as a job; the arguments are those of [`generate_job`]."""
    fields = _sampling_fields(request, config, lenient)
    fields["chat_template_kwargs"] = request.chat_template_kwargs
    fields["tools"] = request.tools
    if lenient:
        fields["chat_template"] = chat_template
        return Job(Endpoint.CHAT, request.messages, fields, _completions(fields), None, raw, body)
    for index, conversation in enumerate(request.messages):
        fault = conversation_fault(conversation)
        if fault is not None:
            raise _fault("messages", f"conversation {index} {fault}", [index])
    for tool in request.tools or ():
        if not isinstance(tool, dict):
            raise _fault("tools", f"must be JSON schemas, got {tool!r}")
    if "messages" in request.chat_template_kwargs:
        raise _fault("chat_template_kwargs", "must not contain 'messages'")
    return Job(Endpoint.CHAT, request.messages, fields, _completions(fields), None, raw, body)


def score_job(
    request: SequenceLogprobsRequest,
    config: PoolConfig,
    *,
    raw: bool = False,
    body: bytes | None = None,
    lenient: bool = False,
) -> Job:
    """A `/get_sequence_logprobs/` body as a job; the arguments are those of [`generate_job`]."""
    sequences, lengths = request.sequences, request.prompt_lengths
    if not 0 < request.temperature <= 2:
        raise _fault("temperature", f"must be positive and at most 2, got {request.temperature}")
    if len(sequences) != len(lengths):
        raise _fault("prompt_lengths", f"{len(lengths)} prompt lengths for {len(sequences)} sequences")
    for index, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        if not 0 <= length <= len(sequence):
            raise _fault(
                "prompt_lengths",
                f"prompt length {length} of sequence {index} is not in 0-{len(sequence)}",
                [index],
            )
    if request.response_format not in ("json", "binary"):
        raise _fault("response_format", f"{request.response_format!r}; allowed: 'json', 'binary'")
    if not lenient:
        _refuse(sampling.logprobs_faults("top_logprobs", request.top_logprobs, config))
    elif request.top_logprobs < 0:
        raise _fault("top_logprobs", f"must not be negative, got {request.top_logprobs}")
    _check_lengths("sequences", sequences, config)
    fields = {
        "top_logprobs": request.top_logprobs,
        "temperature": request.temperature,
        "response_format": request.response_format,
    }
    return Job(Endpoint.SCORE, list(zip(sequences, lengths, strict=True)), fields, 1, None, raw, body)


_NOT_THE_CALLERS = frozenset(
    {"stream", "prompt", "messages", "echo", "return_token_ids", "return_tokens_as_token_ids"}
)
"""What the pool says itself in a body of `vllm serve`; another value would give an answer of another form."""


def _sampling_fields(request: SamplingFields, config: PoolConfig, lenient: bool) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in SamplingFields.model_fields}
    if lenient:
        taken = _NOT_THE_CALLERS & request.generation_kwargs.keys()
        _refuse((f"generation_kwargs.{name}", "is set by the pool; leave it out") for name in sorted(taken))
        n = request.generation_kwargs.get("n", request.n)
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise _fault("n", f"must be an integer of at least 1, got {n!r}")
        return fields
    found = [
        (f"generation_kwargs.{name}", f"vLLM's SamplingParams has no such parameter{_hint(name)}")
        for name in request.generation_kwargs
        if name not in sampling.NAMES
    ]
    found += sampling.faults({**fields, **request.generation_kwargs}, config)
    _refuse(found)
    return fields


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, sampling.NAMES, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _refuse(found: Iterable[sampling.Fault]) -> None:
    """Raises if there is any fault, naming them all."""
    found = list(found)
    if found:
        raise InvalidRequestError(
            "; ".join(f"{name}: {message}" for name, message in found),
            details=[_detail(name, message) for name, message in found],
        )


def _completions(fields: Mapping[str, Any]) -> int:
    """How many completions a prompt gets: `generation_kwargs` overrides the argument on the server."""
    return int(fields["generation_kwargs"].get("n", fields["n"]))


def _check_lengths(field: str, prompts: Sequence[str | list[int]], config: PoolConfig) -> None:
    empty = [index for index, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise _fault(field, f"empty at {_shown(empty)}; an empty prompt kills the server's worker", empty)
    unsendable = [index for index, prompt in enumerate(prompts) if isinstance(prompt, str) and not _is_unicode(prompt)]
    if unsendable:
        raise _fault(field, f"half a surrogate pair, which is no text, at {_shown(unsendable)}", unsendable)
    ids = [(index, prompt) for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    vocabulary = config.vocab_size or 2**31  # the engine's token ids are 32-bit integers
    foreign = [index for index, prompt in ids if min(prompt) < 0 or max(prompt) >= vocabulary]
    if foreign:
        raise _fault(field, f"token ids outside 0-{vocabulary - 1} at {_shown(foreign)}", foreign)
    # One token has to fit behind the prompt: a prompt of exactly the limit hangs a real server too.
    too_long = [index for index, prompt in ids if len(prompt) >= (config.max_model_len or math.inf)]
    if too_long:
        raise _fault(
            field,
            f"no room for a prompt and one token within max_model_len={config.max_model_len} at {_shown(too_long)}",
            too_long,
        )


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# PNG, JPEG, GIF, WebP (RIFF), BMP, TIFF
_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def _is_image(encoded: str) -> bool:
    """Whether base64 text begins like an image; the server answers 500 to what it cannot open."""
    try:
        return base64.b64decode(encoded[:16], validate=True).startswith(_IMAGE_STARTS)
    except ValueError:
        return False


def _shown(indices: Sequence[int]) -> str:
    listed = ", ".join(map(str, indices[:20]))
    kind = "index" if len(indices) == 1 else "indices"
    return f"{kind} {listed}{', …' if len(indices) > 20 else ''}"


def _detail(field: str, message: str) -> dict[str, Any]:
    return {"type": "value_error", "loc": ["body", *field.split(".")], "msg": message}


def _fault(field: str, message: str, indices: Sequence[int] = ()) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {message}", details=[_detail(field, message)], indices=indices)
