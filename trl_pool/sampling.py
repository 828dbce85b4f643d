"""Sampling parameters that must not reach a `trl vllm-serve`.

Its front end answers a bare 500 to those that vLLM's `SamplingParams` refuses (`_verify_args` in
`vllm/sampling_params.py`). Those that only the engine refuses are worse: the worker that meets one dies or waits for
ever, and the server answers nobody any more. Each rule here was seen on a real server (TRL 1.10, vLLM 0.27.1).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from .config import PoolConfig

Fault = tuple[str, str]
"""Which parameter, and what it must be."""

_GREEDY_BELOW = 1e-5  # vLLM's threshold under which a temperature means greedy
_MAX_N = 16384  # vLLM's VLLM_MAX_N_SEQUENCES
_MAX_INT = 2**63 - 1

# What is wrong in every dialect of regular expressions. Python's other complaints (an escape it does not know) may
# be fine for the server.
_BROKEN_REGEX = ("unterminated", "unbalanced", "nothing to repeat", "multiple repeat", "bad character range")
_CHARACTER_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_ESCAPED = re.compile(r"\\[^1-9]", re.DOTALL)
_NOT_REGULAR = re.compile(r"\(\?(?:[=!(]|<[=!]|P=)|\\[1-9]")


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for infinity and nan, and an integer may be beyond both


def _integer(value: Any, low: int, high: int = _MAX_INT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _list_of(value: Any, kind: Callable[[Any], bool], *, least: int = 0) -> bool:
    return isinstance(value, list) and len(value) >= least and all(kind(item) for item in value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_KINDS_OF_STRUCTURE = frozenset({"regex", "choice", "grammar", "json", "json_object", "structural_tag"})

_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "n": (f"an integer of 1 to {_MAX_N}", lambda v: _integer(v, 1, _MAX_N)),
    "max_tokens": ("an integer of at least 1", lambda v: _integer(v, 1)),
    "min_tokens": ("an integer of at least 0", lambda v: _integer(v, 0)),
    "temperature": ("in [0, 2]", lambda v: _number(v) and 0 <= v <= 2),
    "top_p": ("in (0, 1]", lambda v: _number(v) and 0 < v <= 1),
    "min_p": ("in [0, 1]", lambda v: _number(v) and 0 <= v <= 1),
    "top_k": ("-1 or 0 (off) or a positive integer", lambda v: _integer(v, -1)),
    "repetition_penalty": ("positive", lambda v: _number(v) and v > 0),
    "presence_penalty": ("in [-2, 2]", lambda v: _number(v) and -2 <= v <= 2),
    "frequency_penalty": ("in [-2, 2]", lambda v: _number(v) and -2 <= v <= 2),
    "seed": ("a 64-bit integer", lambda v: _integer(v, -_MAX_INT - 1, 2**64 - 1)),
    "stop": ("a string or a list of strings, none empty", lambda v: _nonempty(v) or _list_of(v, _nonempty)),
    "stop_token_ids": ("a list of token ids", lambda v: _list_of(v, lambda i: _integer(i, 0))),
    "allowed_token_ids": ("a list of at least one token id", lambda v: _list_of(v, lambda i: _integer(i, 0), least=1)),
    "logprob_token_ids": ("a list of at least one token id", lambda v: _list_of(v, lambda i: _integer(i, 0), least=1)),
    "bad_words": ("a list of words", lambda v: _list_of(v, _text)),
    "logit_bias": ("left out: JSON makes its token ids strings, and the engine dies of them", lambda v: v == {}),
    "thinking_token_budget": ("left out: this server has no reasoning parser", lambda v: False),
    "extra_args": ("a dictionary", lambda v: isinstance(v, dict)),
    "structured_outputs": (
        "a dictionary with exactly one well-formed regex, choice, grammar, json, json_object or structural_tag",
        lambda v: isinstance(v, dict) and len(v.keys() & _KINDS_OF_STRUCTURE) == 1 and _is_structure(v),
    ),
    "output_kind": ("0, 1 or 2", lambda v: _integer(v, 0, 2)),
    "repetition_detection": (
        "a dictionary of integers of at least 0",
        lambda v: isinstance(v, dict) and all(_integer(number, 0) for number in v.values()),
    ),
    "stream_interval": ("a positive integer", lambda v: _integer(v, 1)),
    **{
        name: ("true or false", lambda v: isinstance(v, bool))
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "flat_logprobs",
            "skip_reading_prefix_cache",
        )
    },
}

_MAY_BE_NULL = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "extra_args",
        "logit_bias",
        "logprob_token_ids",
        "max_tokens",
        "seed",
        "skip_reading_prefix_cache",
        "stop",
        "stop_token_ids",
        "stream_interval",
        "structured_outputs",
        "thinking_token_budget",
    }
)

# Fields of SamplingParams without a rule in the table: these two have a function of their own. Others (`best_of`,
# `truncate_prompt_tokens`, `skip_clone` …) are gone from vLLM, which answers 500, or its own affair, and a value of
# the wrong type there cost a real server its worker.
_OTHERS = frozenset({"logprobs", "prompt_logprobs"})

NAMES = frozenset(_RULES) | _OTHERS
"""What `generation_kwargs` may name."""


def _is_structure(value: Mapping[str, Any]) -> bool:
    schema = value.get("json", {})
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except ValueError:
            return False
    tag = value.get("structural_tag")
    return (
        isinstance(schema, dict)
        and _known_types(schema)
        and (tag is None or _is_structural_tag(tag))
        and ("choice" not in value or _list_of(value["choice"], _nonempty, least=1))
        and value.get("json_object", True) is True
        and all(_nonempty(value[name]) for name in ("grammar", "structural_tag") if name in value)
    )


_JSON_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})


def _known_types(schema: Any) -> bool:
    """Whether every `type` in a JSON schema is one that there is; the engine's compiler hangs on others."""
    if isinstance(schema, list):
        return all(map(_known_types, schema))
    if not isinstance(schema, dict):
        return True
    kinds = schema.get("type", [])
    named = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if any(kind not in _JSON_TYPES for kind in named if isinstance(kind, str)):
        return False
    for name, inner in schema.items():
        # Among named schemas a "type" is one of the names.
        inners = list(inner.values()) if name in _NAMED_SCHEMAS and isinstance(inner, dict) else inner
        if name not in _PLAIN_VALUES and not _known_types(inners):
            return False
    return True


_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_PLAIN_VALUES = frozenset({"enum", "const", "default", "examples"})


def _is_structural_tag(text: Any) -> bool:
    try:
        tag = msgspec.json.decode(text) if isinstance(text, str) else None
    except ValueError:
        return False
    return isinstance(tag, dict) and (tag.keys() >= {"structures", "triggers"} or isinstance(tag.get("format"), dict))


def _nonempty(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def faults(effective: Mapping[str, Any], config: PoolConfig) -> Iterator[Fault]:
    """Everything that is wrong with sampling parameters.

    Args:
        effective (`Mapping[str, Any]`): The parameters as the server will see them, `generation_kwargs` merged in.
        config ([`PoolConfig`]): For `max_logprobs` and `vocab_size`.
    """
    found = list(_single_faults(effective, config))
    yield from found
    if not found:  # only then can they be compared with each other
        yield from _joint_faults(effective)


def _single_faults(effective: Mapping[str, Any], config: PoolConfig) -> Iterator[Fault]:
    for name, (allowed, holds) in _RULES.items():
        if name in effective and not (effective[name] is None and name in _MAY_BE_NULL):
            value = effective[name]
            if not holds(value):
                yield name, f"must be {allowed}, got {value!r}"
            elif (
                config.vocab_size is not None
                and name.endswith("token_ids")
                and max(value, default=0) >= (config.vocab_size)
            ):
                yield name, f"must be below vocab_size={config.vocab_size}, got {max(value)}"
    for name in ("logprobs", "prompt_logprobs"):
        if effective.get(name) is not None:
            yield from logprobs_faults(name, effective[name], config)
    regexes = [("structured_outputs_regex", effective.get("structured_outputs_regex"))]
    structured = effective.get("structured_outputs")
    if isinstance(structured, dict):
        regexes.append(("structured_outputs.regex", structured.get("regex")))
    for name, regex in regexes:
        if regex is not None:
            yield from _regex_faults(name, regex)


def _joint_faults(effective: Mapping[str, Any]) -> Iterator[Fault]:
    most = effective.get("max_tokens")
    if most is not None and effective.get("min_tokens", 0) > most:
        yield "min_tokens", f"must not exceed max_tokens={most}, got {effective['min_tokens']}"
    if effective["n"] > 1 and effective["temperature"] < _GREEDY_BELOW:
        yield "n", f"must be 1 with temperature 0 (greedy), got {effective['n']}"
    chosen, top = effective.get("logprob_token_ids"), effective.get("logprobs")
    if chosen and top is not None and top != len(chosen):
        yield "logprob_token_ids", f"needs logprobs={len(chosen)} or null, got {top}"
    if effective.get("stop") and effective.get("detokenize") is False:
        yield "stop", "needs detokenize=true"


def logprobs_faults(name: str, value: Any, config: PoolConfig) -> Iterator[Fault]:
    """What is wrong with a number of logprobs: more than the server's limit kills its worker, and so does -1."""
    if not _integer(value, 0):
        yield name, f"must be an integer of at least 0, got {value!r}"
    elif 0 <= config.max_logprobs < value:
        yield (
            name,
            f"{value} is more than the servers return (max_logprobs={config.max_logprobs}); raise the pool's "
            "max_logprobs only if the servers' own limit is higher",
        )


def _regex_faults(name: str, regex: Any) -> Iterator[Fault]:
    if not isinstance(regex, str):
        yield name, f"must be a string, got {regex!r}"
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # about what a later Python may read differently
            re.compile(regex)
    except (OverflowError, RecursionError):
        yield name, "is too large a regular expression"
        return
    except re.error as error:
        if any(word in str(error) for word in _BROKEN_REGEX):
            yield name, f"is not a regular expression: {error}"
            return
    # What is escaped, or inside a character class, is only itself; an escaped digit is a back-reference.
    bare = _CHARACTER_CLASS.sub("", _ESCAPED.sub("", regex))
    if _NOT_REGULAR.search(bare):
        yield name, "must not use look-around, conditions or back-references: the engine dies of them"
