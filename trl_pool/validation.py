"""Arguments are checked here before anything is sent.

A `trl vllm-serve` answers a bare 500 to some wrong requests, and dies of others: one prompt that its engine refuses,
among however many good ones, and it never answers again. Neither must be taken for a broken server, nor tried on the
next.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from . import sampling
from .config import PoolConfig
from .dialects.base import Endpoint, Job
from .dialects.trl_requests import ChatRequest, GenerateRequest, SamplingFields, SequenceLogprobsRequest
from .errors import InvalidRequestError

ModelT = TypeVar("ModelT", bound=BaseModel)


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
            {**fault, "loc": ["body", *fault["loc"]]}
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        first = "; ".join(f"{'.'.join(map(str, d['loc'][1:]))}: {d['msg']}" for d in details[:5])
        raise InvalidRequestError(f"invalid arguments: {first}", details=details) from None


def generate_job(request: GenerateRequest, config: PoolConfig, *, raw: bool = False, body: bytes | None = None) -> Job:
    """A `/generate/` body as a job."""
    fields = _sampling_fields(request, config)
    prompts = request.prompts
    if request.images is not None and len(request.images) not in (0, len(prompts)):
        raise _fault("images", f"{len(request.images)} image lists for {len(prompts)} prompts; give one per prompt")
    _check_lengths("prompts", prompts, config)
    return Job(Endpoint.GENERATE, prompts, fields, _completions(fields), request.images or None, raw, body)


def chat_job(request: ChatRequest, config: PoolConfig, *, raw: bool = False, body: bytes | None = None) -> Job:
    """A `/chat/` body as a job."""
    fields = _sampling_fields(request, config)
    fields["chat_template_kwargs"] = request.chat_template_kwargs
    fields["tools"] = request.tools
    for index, conversation in enumerate(request.messages):
        if not conversation:
            raise _fault("messages", f"conversation {index} is empty", [index])
        for position, message in enumerate(conversation):
            wrong = _message_fault(message)
            if wrong:
                raise _fault("messages", f"message {position} of conversation {index} {wrong}", [index])
    for tool in request.tools or ():
        if not isinstance(tool, dict):
            raise _fault("tools", f"must be JSON schemas, got {tool!r}")
    if "messages" in request.chat_template_kwargs:
        raise _fault("chat_template_kwargs", "must not contain 'messages'")
    return Job(Endpoint.CHAT, request.messages, fields, _completions(fields), None, raw, body)


def _message_fault(message: Mapping[str, Any]) -> str | None:
    """What the server fails or dies of in one message."""
    if not isinstance(message.get("role"), str):
        return "has no role"
    if "content" not in message:
        return "has no content; it may be null"
    content = message["content"]
    if content is None or isinstance(content, str):
        return None
    if not isinstance(content, list):
        return f"has {type(content).__name__} content; allowed: a string, a list of parts, null"
    if any(not isinstance(part, dict) or not isinstance(part.get("type"), str) for part in content):
        return "has a content part that is no dictionary with a type"
    return None


def score_job(
    request: SequenceLogprobsRequest, config: PoolConfig, *, raw: bool = False, body: bytes | None = None
) -> Job:
    """A `/get_sequence_logprobs/` body as a job."""
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
    _refuse(sampling.logprobs_faults("top_logprobs", request.top_logprobs, config))
    _check_lengths("sequences", sequences, config)
    fields = {
        "top_logprobs": request.top_logprobs,
        "temperature": request.temperature,
        "response_format": request.response_format,
    }
    return Job(Endpoint.SCORE, list(zip(sequences, lengths, strict=True)), fields, 1, None, raw, body)


def _sampling_fields(request: SamplingFields, config: PoolConfig) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in SamplingFields.model_fields}
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
    ids = [(index, prompt) for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    vocabulary = config.vocab_size or math.inf
    foreign = [index for index, prompt in ids if min(prompt) < 0 or max(prompt) >= vocabulary]
    if foreign:
        allowed = f"0-{config.vocab_size - 1}" if config.vocab_size else "0 and above"
        raise _fault(field, f"token ids outside {allowed} at {_shown(foreign)}", foreign)
    # One token has to fit behind the prompt: a prompt of exactly the limit hangs a real server too.
    too_long = [index for index, prompt in ids if len(prompt) >= (config.max_model_len or math.inf)]
    if too_long:
        raise _fault(
            field,
            f"no room for a prompt and one token within max_model_len={config.max_model_len} at {_shown(too_long)}",
            too_long,
        )


def _shown(indices: Sequence[int]) -> str:
    listed = ", ".join(map(str, indices[:20]))
    kind = "index" if len(indices) == 1 else "indices"
    return f"{kind} {listed}{', …' if len(indices) > 20 else ''}"


def _detail(field: str, message: str) -> dict[str, Any]:
    return {"type": "value_error", "loc": ["body", *field.split(".")], "msg": message}


def _fault(field: str, message: str, indices: Sequence[int] = ()) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {message}", details=[_detail(field, message)], indices=indices)
