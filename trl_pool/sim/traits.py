"""What tells one dialect's server from the other's, before its routes: the names of its endpoints, and how it behaves
when several requests come at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Traits:
    """The traits of one dialect.

    Args:
        name (`str`):
            Of the dialect.
        paths (`Mapping[str, str]`):
            Path of every endpoint to its name; every other path is called `other`.
        work (`tuple[str, ...]`):
            Endpoints that make the engine work.
        sampling (`tuple[str, ...]`):
            Those of them that sample, `n` times for each prompt.
        worker (`frozenset[str]`):
            Endpoints that wait for the worker's reply: they are not answered when it is lost.
        one_at_a_time (`bool`):
            Whether nothing at all is answered while a request is served. Otherwise requests do not notice each other.
        threaded (`frozenset[str]`, *optional*):
            With `one_at_a_time`: endpoints that wait on a thread, and so leave the server free meanwhile.
        abandoned (`frozenset[str]`, *optional*):
            Endpoints whose request ends with its client's connection. The others are served to their end.
        counted (`tuple[str, ...]`):
            Fields of an answer that have one entry per completion or scored sequence.
        openai_errors (`bool`):
            Whether errors have OpenAI's body, `{"error": {…}}`, instead of FastAPI's.
    """

    name: str
    paths: Mapping[str, str]
    work: tuple[str, ...]
    sampling: tuple[str, ...]
    worker: frozenset[str]
    one_at_a_time: bool
    counted: tuple[str, ...]
    openai_errors: bool
    threaded: frozenset[str] = field(default=frozenset())
    abandoned: frozenset[str] = field(default=frozenset())

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Every endpoint's name, `other` last."""
        return (*self.paths.values(), "other")

    def endpoint(self, path: str) -> str:
        """The name of the endpoint at a path."""
        return self.paths.get(path, "other")


_TRL_WORK = ("generate", "chat", "get_sequence_logprobs")
_TRL_CONTROL = ("init_communicator", "update_named_param", "reset_prefix_cache", "close_communicator")

TRL = Traits(
    name="trl",
    paths={f"/{name}/": name for name in ("health", "get_world_size", *_TRL_WORK, *_TRL_CONTROL)},
    work=_TRL_WORK,
    sampling=("generate", "chat"),
    worker=frozenset({*_TRL_WORK, "reset_prefix_cache"}),
    one_at_a_time=True,
    threaded=frozenset({"get_sequence_logprobs"}),
    counted=("completion_ids", "logprobs", "logprob_token_ids", "completion_lengths"),
    openai_errors=False,
)
"""`trl vllm-serve` of TRL 1.0 – 1.10: paths end with a slash, and generating takes the event loop."""

# Those that the API server answers by itself.
_VLLM_ASKED = {
    "/health": "health",
    "/version": "version",
    "/server_info": "server_info",
    "/get_world_size": "get_world_size",
    "/metrics": "metrics",
    "/v1/models": "models",
    "/v1/chat/completions/render": "render",
}
_VLLM_WORK = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat_completions",
    "/inference/v1/generate": "generate",
}
_VLLM_CONTROL = {
    f"/{name}": name
    for name in (
        "reset_prefix_cache",
        "pause",
        "resume",
        "is_paused",
        "abort_requests",
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "weight_info",
        "update_weight_version",
        "shutdown_weight_transfer_engine",
    )
}
_VLLM_ADAPTERS = {
    "/v1/load_lora_adapter": "load_lora_adapter",
    "/v1/unload_lora_adapter": "unload_lora_adapter",
}

VLLM = Traits(
    name="vllm",
    paths={**_VLLM_ASKED, **_VLLM_WORK, **_VLLM_CONTROL, **_VLLM_ADAPTERS},
    work=tuple(_VLLM_WORK.values()),
    sampling=tuple(_VLLM_WORK.values()),
    # Unloading an adapter only forgets its name; loading one asks the worker, and so do all control calls. Aborting
    # sends a message and waits for nothing.
    worker=frozenset({*_VLLM_WORK.values(), *_VLLM_CONTROL.values(), "load_lora_adapter"} - {"abort_requests"}),
    one_at_a_time=False,
    abandoned=frozenset(_VLLM_WORK.values()),
    counted=("choices",),
    openai_errors=True,
)
"""`vllm serve` with its development endpoints: no trailing slash, and requests are batched as they come."""

ALL_TRAITS = {traits.name: traits for traits in (TRL, VLLM)}
