"""Sampling parameters as vLLM's `SamplingParams` checks them.

`trl vllm-serve` hands a request's fields, overridden by its `generation_kwargs`, to `SamplingParams(...)`
inside the endpoint; whatever that raises reaches the client as a bare 500. `vllm serve` answers it with a 400.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GREEDY_BELOW = 1e-5  # vllm.sampling_params._SAMPLING_EPS
LOWEST_TEMPERATURE = 1e-2  # vllm.sampling_params._MAX_TEMP: lower ones, except 0, are raised to it
MAX_N = 16384  # VLLM_MAX_N_SEQUENCES

# The fields of vLLM 0.27's SamplingParams: its constructor takes these keywords and no others.
KNOWN = frozenset(
    {
        "n",
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
        "skip_clone",
        "output_text_buffer_length",
        "structured_outputs",
        "logit_bias",
        "allowed_token_ids",
        "extra_args",
        "routed_experts_prompt_start",
        "bad_words",
        "skip_reading_prefix_cache",
        "thinking_token_budget",
        "repetition_detection",
    }
)

_STRUCTURED = frozenset({"json", "regex", "choice", "grammar", "json_object", "structural_tag"})
_STRUCTURED_OPTIONS = frozenset({"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"})


class InvalidSampling(ValueError):
    """vLLM would refuse these sampling parameters.

    Args:
        message (`str`):
            What is wrong with them.
        parameter (`str`, *optional*):
            The one at fault, where vLLM's answer tells it.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class Sampling:
    """Checked sampling parameters: those that the simulated engine acts on.

    Penalties, biases, stop strings and structured outputs are checked and then have no effect: the simulated
    tokens mean nothing, so there is nothing to penalise or to constrain.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = 0
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    regex: str | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def poison(self) -> bool:
        """Whether the constructor takes these parameters and the worker then dies of them: a regex that is none."""
        try:
            re.compile(self.regex or "")
        except (re.error, TypeError):
            return True
        return False

    @classmethod
    def checked(cls, fields: Mapping[str, Any]) -> Sampling:
        """Check the keywords that the server would pass to `SamplingParams`.

        Args:
            fields (`Mapping[str, Any]`):
                The request's sampling fields, already overridden by its `generation_kwargs`.

        Returns:
            `Sampling`: The parameters, temperature 0 for greedy.

        Raises:
            InvalidSampling: If vLLM would raise, whatever it would raise.
        """
        unknown = set(fields) - KNOWN
        if unknown:
            raise InvalidSampling(f"Unexpected keyword argument {min(unknown)!r}")
        try:
            return cls._checked(fields)
        except (TypeError, AttributeError, OverflowError) as error:  # a string where a number belongs, say
            raise InvalidSampling(str(error)) from error

    @classmethod
    def _checked(cls, fields: Mapping[str, Any]) -> Sampling:
        get = fields.get
        n, max_tokens, min_tokens = get("n", 1), get("max_tokens", 16), get("min_tokens", 0)
        temperature, top_p = get("temperature", 1.0), get("top_p", 1.0)
        top_k, min_p = get("top_k", 0), get("min_p", 0.0)
        logprobs, seed = get("logprobs"), get("seed")
        stop_token_ids = get("stop_token_ids") or []
        if 0 < temperature < LOWEST_TEMPERATURE:
            temperature = LOWEST_TEMPERATURE
        _require(isinstance(n, int) and 1 <= n <= MAX_N, "n must be an int of at least 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2.0 <= get(name, 0.0) <= 2.0, f"{name} must be in [-2, 2]")
        _require(0.0 < get("repetition_penalty", 1.0) < math.inf, "repetition_penalty must be greater than zero")
        _require(0.0 <= temperature <= 2.0, "temperature must be in [0, 2]", "temperature")
        _require(0.0 < top_p <= 1.0, "top_p must be in (0, 1]", "top_p")
        _require(isinstance(top_k, int) and top_k >= -1, "top_k must be 0 (disable), or at least 1")
        _require(0.0 <= min_p <= 1.0, "min_p must be in [0, 1]")
        _require(max_tokens is None or max_tokens >= 1, "max_tokens must be at least 1", "max_tokens")
        _require(min_tokens >= 0, "min_tokens must not be negative")
        _require(max_tokens is None or min_tokens <= max_tokens, "min_tokens must be at most max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            number = get(name)
            _require(number is None or number >= -1, f"{name} must be non-negative or -1", name)
        _require(all(isinstance(i, int) for i in stop_token_ids), "stop_token_ids must be integers")
        for name in ("stop", "bad_words"):
            texts = get(name)
            _require(texts is None or all([texts] if isinstance(texts, str) else texts), f"empty text in {name}")
        structured = get("structured_outputs")
        if isinstance(structured, Mapping):
            _require(set(structured) <= _STRUCTURED | _STRUCTURED_OPTIONS, "unknown structured output option")
            kinds = sum(structured.get(kind) is not None for kind in _STRUCTURED)
            _require(kinds == 1, "exactly one kind of structured output is needed")
        greedy = temperature < GREEDY_BELOW
        _require(not (greedy and n > 1), "n must be 1 when using greedy sampling")
        return cls(
            n=int(n),
            temperature=0.0 if greedy else float(temperature),
            top_p=1.0 if greedy else float(top_p),
            top_k=0 if greedy else max(int(top_k), 0),
            min_p=0.0 if greedy else float(min_p),
            max_tokens=None if max_tokens is None else int(max_tokens),
            min_tokens=int(min_tokens),
            logprobs=None if logprobs is None else int(logprobs),
            seed=0 if seed is None or seed == -1 else int(seed),
            ignore_eos=bool(get("ignore_eos", False)),
            stop_token_ids=frozenset(stop_token_ids),
            regex=structured.get("regex") if isinstance(structured, Mapping) else None,
        )


def _require(holds: bool, message: str, parameter: str | None = None) -> None:
    if not holds:
        raise InvalidSampling(message, parameter)
