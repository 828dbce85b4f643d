"""The request bodies of the `trl` dialect, as the servers of TRL 1.0 – 1.10 declare them.

One set of models serves everybody who has to agree on them: the pool checks a caller's arguments against them before
anything is sent, the gateway answers 422 from them, and the simulated server declares its endpoints with them.
Coercions (`"2"` for an integer, say) are pydantic's, because they are the real server's.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class SamplingFields(BaseModel):
    """The sampling fields that `/generate/` and `/chat/` share."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = 0
    structured_outputs_regex: str | None = None
    generation_kwargs: dict[str, Any] = Field(default_factory=dict)


class GenerateRequest(SamplingFields):
    """`POST /generate/`: prompts are all strings or all lists of token ids; images are base64 PNGs per prompt."""

    prompts: list[str] | list[list[int]]
    images: list[list[str] | None] | None = None


class ChatRequest(SamplingFields):
    """`POST /chat/`: a list of conversations, each a list of messages."""

    messages: list[list[dict[str, Any]]]
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: list[Any] | None = None


class SequenceLogprobsRequest(BaseModel):
    """`POST /get_sequence_logprobs/`: whole sequences and how many of their first tokens are the prompt."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    top_logprobs: int = 100
    temperature: float = 1.0
    response_format: str = "json"


class InitCommunicatorRequest(BaseModel):
    """`POST /init_communicator/`: the rendezvous of the weight update group. The server ignores `world_size`."""

    host: str
    port: int
    world_size: int
    client_device_uuid: str


class UpdateNamedParamRequest(BaseModel):
    """`POST /update_named_param/`: the announcement of one tensor; `dtype` reads like `"torch.bfloat16"`."""

    name: str
    dtype: str
    shape: list[int]
