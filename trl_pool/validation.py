"""Arguments are checked here before anything is sent.

A `trl vllm-serve` answers a bare 500 to sampling parameters that vLLM refuses, and never answers again once its worker
died of a prompt that vLLM refuses. Neither must be taken for a broken server, nor tried on the next.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .config import PoolConfig
from .dialects.base import Endpoint, Job
from .dialects.trl_requests import ChatRequest, GenerateRequest, SamplingFields, SequenceLogprobsRequest
from .errors import InvalidRequestError

ModelT = TypeVar("ModelT", bound=BaseModel)

# Fields of vLLM's SamplingParams from 0.10 to 0.27: what `generation_kwargs` may name on a `trl` server.
SAMPLING_PARAMS = frozenset(
    [
        "n",
        "best_of",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "bad_words",
        "ignore_eos",
        "max_tokens",
        "min_tokens",
        "logprobs",
        "prompt_logprobs",
        "logprob_token_ids",
        "flat_logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "output_text_buffer_length",
        "truncate_prompt_tokens",
        "guided_decoding",
        "structured_outputs",
        "logit_bias",
        "allowed_token_ids",
        "extra_args",
        "skip_reading_prefix_cache",
        "skip_clone",
        "thinking_token_budget",
        "repetition_detection",
        "routed_experts_prompt_start",
    ]
)

_GREEDY_BELOW = 1e-5  # vLLM's threshold under which a temperature means greedy
_MAX_N = 16384  # vLLM's VLLM_MAX_N_SEQUENCES

# What is wrong in every dialect of regular expressions. Others of Python's complaints (an escape it does not know)
# may be fine for the server.
_BROKEN_REGEX = ("unterminated", "unbalanced", "nothing to repeat", "multiple repeat", "bad character range")


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
            missing = {"role", "content"} - message.keys()
            if missing:
                raise _fault(
                    "messages",
                    f"message {position} of conversation {index} has no {' and no '.join(sorted(missing))}; "
                    "the server needs both (content may be null)",
                    [index],
                )
    return Job(Endpoint.CHAT, request.messages, fields, _completions(fields), None, raw, body)


def score_job(
    request: SequenceLogprobsRequest, config: PoolConfig, *, raw: bool = False, body: bytes | None = None
) -> Job:
    """A `/get_sequence_logprobs/` body as a job."""
    sequences, lengths = request.sequences, request.prompt_lengths
    if not request.temperature > 0 or not math.isfinite(request.temperature):
        raise InvalidRequestError(
            f"temperature must be positive, got {request.temperature}",
            details=[_detail("temperature", f"must be positive, got {request.temperature}")],
        )
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
    _check_logprobs("top_logprobs", request.top_logprobs, config, least=0)
    _check_lengths("sequences", sequences, config)
    fields = {
        "top_logprobs": request.top_logprobs,
        "temperature": request.temperature,
        "response_format": request.response_format,
    }
    return Job(Endpoint.SCORE, list(zip(sequences, lengths, strict=True)), fields, 1, None, raw, body)


def _check_regex(regex: str | None) -> None:
    if regex is None:
        return
    try:
        re.compile(regex)
    except re.error as error:
        if any(word in str(error) for word in _BROKEN_REGEX):
            raise _fault("structured_outputs_regex", f"not a regular expression: {error}") from None


def _sampling_fields(request: SamplingFields, config: PoolConfig) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in SamplingFields.model_fields}
    _check_regex(request.structured_outputs_regex)
    check_sampling({**fields, **request.generation_kwargs}, request.generation_kwargs, config)
    return fields


def _completions(fields: Mapping[str, Any]) -> int:
    """How many completions a prompt gets: `generation_kwargs` overrides the argument on the server."""
    return int(fields["generation_kwargs"].get("n", fields["n"]))


def check_sampling(effective: Mapping[str, Any], extra: Mapping[str, Any], config: PoolConfig) -> None:
    """Refuses what vLLM's `SamplingParams` refuses in every version (`_verify_args` in `vllm/sampling_params.py`).

    Args:
        effective (`Mapping[str, Any]`): The parameters as the server will see them.
        extra (`Mapping[str, Any]`): `generation_kwargs`, whose names are checked too.
        config ([`PoolConfig`]): For `max_logprobs`.

    Raises:
        [`InvalidRequestError`]: naming every parameter at fault.
    """
    faults: list[tuple[str, str]] = []

    for name in extra:
        if name not in SAMPLING_PARAMS:
            close = difflib.get_close_matches(name, SAMPLING_PARAMS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            faults.append((f"generation_kwargs.{name}", f"vLLM's SamplingParams has no such parameter{hint}"))

    def number(name: str, allowed: str, holds: Any, *, integer: bool = False, optional: bool = False) -> None:
        if name not in effective or (optional and effective[name] is None):
            return
        value = effective[name]
        kinds = (int,) if integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not holds(value):
            faults.append((name, f"must be {allowed}, got {value!r}"))

    number("n", f"an integer of 1 to {_MAX_N}", lambda v: 1 <= v <= _MAX_N, integer=True)
    number("max_tokens", "an integer of at least 1", lambda v: v >= 1, integer=True, optional=True)
    number("min_tokens", "an integer of at least 0", lambda v: v >= 0, integer=True)
    number("temperature", "in [0, 2]", lambda v: 0 <= v <= 2)
    number("top_p", "in (0, 1]", lambda v: 0 < v <= 1)
    number("min_p", "in [0, 1]", lambda v: 0 <= v <= 1)
    number("top_k", "-1 or 0 (off) or positive", lambda v: v >= -1, integer=True)
    number("repetition_penalty", "positive", lambda v: v > 0)
    number("presence_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2)
    number("frequency_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2)
    number("seed", "a 64-bit integer", lambda v: -(2**63) <= v < 2**63, integer=True, optional=True)
    if not faults:
        if effective.get("min_tokens", 0) > (effective.get("max_tokens") or math.inf):
            faults.append(("min_tokens", f"must not exceed max_tokens={effective['max_tokens']}"))
        if effective["n"] > 1 and effective["temperature"] < _GREEDY_BELOW:
            faults.append(("n", f"must be 1 with temperature 0 (greedy), got {effective['n']}"))
    for name in ("logprobs", "prompt_logprobs"):
        if effective.get(name) is not None:
            try:
                _check_logprobs(name, effective[name], config, least=0)
            except InvalidRequestError as error:
                faults.append((name, str(error).partition(": ")[2]))
    if faults:
        raise InvalidRequestError(
            "; ".join(f"{name}: {message}" for name, message in faults),
            details=[_detail(name, message) for name, message in faults],
        )


def _check_logprobs(name: str, value: Any, config: PoolConfig, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _fault(name, f"must be an integer of at least {least}, got {value!r}")
    if 0 <= config.max_logprobs < value:
        raise _fault(
            name,
            f"{value} is more than the servers return (max_logprobs={config.max_logprobs}); raise the pool's "
            "max_logprobs only if the servers' own limit is higher",
        )


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
