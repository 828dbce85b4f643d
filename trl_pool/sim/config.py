"""What a simulated server is started with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from trl_pool.sim.engine import TOKEN_LIMIT, Latency

DIALECTS = ("trl", "vllm")
WEIGHT_TRANSFERS = ("control", "gloo", "none")
UNFINISHED_UPDATES = ("mixed", "fatal")


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
            poison to a `trl` server, which never answers again; a `vllm` server refuses it.
        vocab_size (`int`, *optional*, defaults to `2**31`):
            A prompt with a token id of this or more is poison (or refused), too. The default takes the ids of any
            tokenizer; completions consist of ids below 512 in any case.
        max_logprobs (`int`, *optional*, defaults to `-1`):
            A request for more logprobs per token than this kills a `trl` server's worker, and is refused by a `vllm`
            server; -1 allows any. (vLLM's default is 20.)
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            One factor of the world size that the server tells.
        data_parallel_size (`int`, *optional*, defaults to `1`):
            The other factor.
        model_version (`str`, *optional*):
            Told by a `trl` server's `/health/` when set. Real servers tell none.
        latency (`Latency`, *optional*):
            How long requests keep the engine; by default no longer than the simulation itself takes.

    The rest concerns the `vllm` dialect.

    Args:
        model (`str`, *optional*, defaults to `"sim-model"`):
            The id that `/v1/models` tells and requests may name.
        vllm_version (`str`, *optional*, defaults to `"0.31.0"`):
            Told by `/version`. It decides which endpoints there are.
        dtype (`str`, *optional*, defaults to `"bfloat16"`), logprobs_mode (`str`, *optional*):
            Told by `/server_info`, `logprobs_mode` being `"processed_logprobs"` by default. Nothing depends on them.
        api_key (`str`, *optional*):
            Needed for everything below `/v1`, `/v2` and `/inference`, and for nothing else.
        weight_transfer (`str`, *optional*, defaults to `"control"`):
            `"gloo"` takes part in real broadcasts (this needs torch), `"control"` takes the announcement for the
            tensors, `"none"` is a server without `--weight-transfer-config`.
        unfinished_update (`str`, *optional*, defaults to `"mixed"`):
            What becomes of a request while an update is unfinished: `"mixed"` answers it from weights that no other
            state of the server has, `"fatal"` ends the server, as vLLM 0.31 on the CPU does.
        trust_request_chat_template (`bool`, *optional*, defaults to `False`):
            Whether requests may bring a chat template of their own.
        max_num_seqs (`int`, *optional*, defaults to `256`):
            Sequences that each of its engines runs at once, told by `/server_info`. What is more waits. A request is
            let in as a whole, and one of more sequences than that runs by itself.
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
    model: str = "sim-model"
    vllm_version: str = "0.31.0"
    dtype: str = "bfloat16"
    logprobs_mode: str = "processed_logprobs"
    api_key: str | None = None
    weight_transfer: str = "control"
    unfinished_update: str = "mixed"
    trust_request_chat_template: bool = False
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        for name, known in (
            ("dialect", DIALECTS),
            ("weight_transfer", WEIGHT_TRANSFERS),
            ("unfinished_update", UNFINISHED_UPDATES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not self.vllm_release:
            raise ValueError(f"vllm_version must begin with a number, got {self.vllm_version!r}")
        for name in ("max_model_len", "vocab_size", "tensor_parallel_size", "data_parallel_size", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs must be at least -1, got {self.max_logprobs}")

    @property
    def world_size(self) -> int:
        """Number of ranks that the server brings to a weight update group."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def vllm_release(self) -> tuple[int, ...]:
        """The numbers that `vllm_version` begins with: `(0, 31, 0)`."""
        found = re.match(r"\d+(\.\d+)*", self.vllm_version)
        return tuple(map(int, found[0].split("."))) if found else ()
