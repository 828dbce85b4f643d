"""What a simulated server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl_pool.sim.engine import TOKEN_LIMIT, Latency

DIALECTS = ("trl",)


@dataclass(frozen=True)
class SimConfig:
    """The traits of one simulated server.

    Args:
        dialect (`str`, *optional*, defaults to `"trl"`):
            The wire protocol; one of `DIALECTS`.
        weights (`str`, *optional*, defaults to `"checkpoint"`):
            Name of the weights that the server starts with; servers with the same name give the same tokens.
        max_model_len (`int`, *optional*, defaults to `4096`):
            Prompt and completion together are never longer. A prompt that leaves no room for one new token is
            poison: the server never answers again.
        vocab_size (`int`, *optional*, defaults to `2**31`):
            A prompt with a token id of this or more is poison, too. The default takes the ids of any tokenizer;
            completions consist of ids below 512 in any case.
        max_logprobs (`int`, *optional*, defaults to `-1`):
            A request for more logprobs per token than this kills the worker; -1 allows any. (vLLM's default
            is 20.)
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            One factor of the world size that the server tells.
        data_parallel_size (`int`, *optional*, defaults to `1`):
            The other factor.
        model_version (`str`, *optional*):
            Told by `/health/` when set. Real servers tell none.
        latency (`Latency`, *optional*):
            How long requests keep the engine; by default no longer than the simulation itself takes.
    """

    dialect: str = "trl"
    weights: str = "checkpoint"
    max_model_len: int = 4096
    vocab_size: int = TOKEN_LIMIT
    max_logprobs: int = -1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    model_version: str | None = None
    latency: Latency = field(default_factory=Latency)

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect must be one of {DIALECTS}, got {self.dialect!r}")
        for name in ("max_model_len", "vocab_size", "tensor_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs must be at least -1, got {self.max_logprobs}")

    @property
    def world_size(self) -> int:
        """Number of ranks that the server brings to a weight update group."""
        return self.tensor_parallel_size * self.data_parallel_size
