"""How images and tools travel: as TRL's client sends them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

from .errors import InvalidRequestError


def require_conversations(messages: Any) -> None:
    """Raises [`InvalidRequestError`] unless it is a list of conversations, each a list of messages."""
    for index, conversation in enumerate(messages):
        if isinstance(conversation, Mapping | str) or not isinstance(conversation, Sequence):
            raise InvalidRequestError(
                f"messages: a list of conversations, each a list of messages; item {index} is a "
                f"{type(conversation).__name__} (one conversation needs a list around it)",
                indices=[index],
            )
        for message in conversation:
            if not isinstance(message, Mapping):
                raise InvalidRequestError(
                    f"messages: conversation {index} has a {type(message).__name__} in the place of a message",
                    indices=[index],
                )
            content = message.get("content")
            if isinstance(content, list) and not all(isinstance(part, Mapping) for part in content):
                raise InvalidRequestError(
                    f"messages: conversation {index} has a content part that is no dictionary", indices=[index]
                )


def require_image_lists(images: Any) -> None:
    """Raises [`InvalidRequestError`] unless it is a list of image lists, `None` where a prompt has no image."""
    for index, few in enumerate(images):
        if few is not None and not isinstance(few, list | tuple):
            raise InvalidRequestError(
                f"images: one list of images per prompt, or None; item {index} is a {type(few).__name__}",
                indices=[index],
            )


def encode_images(images: Sequence[Any]) -> list[list[str] | None]:
    """PIL images as base64 PNGs, per prompt."""
    return [None if few is None else [_png(image) for image in few] for few in images]


def _png(image: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def encode_messages(
    messages: Sequence[Sequence[Mapping[str, Any]]], as_urls: bool = False
) -> list[list[dict[str, Any]]]:
    """Copies of the conversations with their PIL images as base64 PNGs; the caller's stay as they are.

    Args:
        messages (`Sequence[Sequence[Mapping]]`): Conversations.
        as_urls (`bool`, *optional*, defaults to `False`): Whether as `image_url` parts with a data URL, as `vllm
            serve` takes them, rather than as `image_pil` parts.
    """
    encode = _as_url if as_urls else _as_pil
    return [[_encode_message(message, encode) for message in conversation] for conversation in messages]


def _encode_message(message: Mapping[str, Any], encode: Callable[[Any], Any]) -> dict[str, Any]:
    encoded = dict(message)
    if isinstance(encoded.get("content"), list):
        encoded["content"] = [encode(part) for part in encoded["content"]]
    return encoded


def _as_pil(part: Any) -> Any:
    return {**part, "image_pil": _png(part["image_pil"])} if part.get("type") == "image_pil" else part


def _as_url(part: Any) -> Any:
    kind = part.get("type")
    if kind not in ("image", "image_pil"):
        return part
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(part[kind])}"}}


def tool_schema(tool: Any) -> Any:
    """The JSON schema of a tool that is a function; one that is a schema stays as it is."""
    if not callable(tool):
        return tool
    from transformers.utils import get_json_schema

    return get_json_schema(tool)
