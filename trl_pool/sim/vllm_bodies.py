"""The request bodies of the `vllm` dialect: the fields that the simulated server acts on.

Others are ignored, as `vllm serve` ignores fields that it does not know. Coercions are pydantic's, as there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

_INT64 = 2**63

TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """What a stream tells besides the tokens."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class SamplingBody(BaseModel):
    """What completions and chats have in common."""

    model: str | None = None
    n: int | None = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(default=None, ge=-_INT64, le=_INT64 - 1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None

    def sampling_fields(self) -> dict[str, Any]:
        """Those that `SamplingParams` takes under the same name and that are set."""
        names = (
            *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "bad_words"),
            *("structured_outputs", "prompt_logprobs"),
        )
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class CompletionBody(SamplingBody):
    """`POST /v1/completions`: one prompt or several, each a text or token ids."""

    n: int = 1
    prompt: list[TokenId] | list[list[TokenId]] | str | list[str] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions` and `/render`: one conversation."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    @field_validator("messages")
    @classmethod
    def _have_roles(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not all(isinstance(message.get("role"), str) for message in messages):
            raise ValueError("every message needs a role")
        return messages


class Placeholder(BaseModel):
    """Where an image's tokens are in the prompt."""

    offset: int = Field(ge=0)
    length: int = Field(gt=0)


class Features(BaseModel):
    """Processed images: hashes, places and data, per kind of medium (`"image"`)."""

    mm_hashes: dict[str, list[str]]
    mm_placeholders: dict[str, list[Placeholder]]
    kwargs_data: dict[str, list[str | None]] | None = None
    mm_metadata: dict[str, list[str | None]] | None = None

    @model_validator(mode="after")
    def _parallel(self) -> Features:
        for name, values in (("mm_placeholders", self.mm_placeholders), ("kwargs_data", self.kwargs_data)):
            if values is None:
                continue
            sizes = {kind: len(items) for kind, items in values.items()}
            if sizes != {kind: len(hashes) for kind, hashes in self.mm_hashes.items()}:
                raise ValueError(f"{name} must have one entry for each of mm_hashes")
        return self


class GenerateBody(BaseModel):
    """`POST /inference/v1/generate`: one prompt of token ids, with processed images."""

    request_id: str | None = None
    model: str | None = None
    token_ids: list[int] = Field(min_length=1)
    features: Features | None = None
    sampling_params: dict[str, Any]
    return_token_ids: bool | None = None
    stream: bool | None = False

    @field_validator("token_ids")
    @classmethod
    def _not_negative(cls, token_ids: list[int]) -> list[int]:
        if min(token_ids) < 0:
            raise ValueError("token ids must not be negative")
        return token_ids

    @model_validator(mode="after")
    def _within(self) -> GenerateBody:
        places = self.features.mm_placeholders.values() if self.features else ()
        if any(place.offset + place.length > len(self.token_ids) for kind in places for place in kind):
            raise ValueError("mm_placeholders must lie within token_ids")
        return self


class LoadAdapterBody(BaseModel):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(BaseModel):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str


PauseMode = Literal["abort", "wait", "keep"]
