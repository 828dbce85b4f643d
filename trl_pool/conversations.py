"""Conversations that must not reach a `trl vllm-serve`: its worker dies of what vLLM or the chat template refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

# What vLLM 0.27 reads (`MM_PARSER_MAP` in `vllm/entrypoints/chat_utils.py`); it dies of any other.
_PART_TYPES = frozenset(
    {
        "audio_embeds",
        "audio_url",
        "image_embeds",
        "image_pil",
        "image_url",
        "input_audio",
        "input_image",
        "input_text",
        "output_text",
        "prompt_embeds",
        "refusal",
        "text",
        "thinking",
        "tool_reference",
        "video_url",
    }
)


def conversation_fault(conversation: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with a conversation, or `None`."""
    if not conversation:
        return "is empty"
    for position, message in enumerate(conversation):
        fault = _message_fault(message)
        if fault is not None:
            return f"has a message {position} {fault}"
    try:
        msgspec.json.encode(conversation)
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        return f"cannot be sent: {error}"
    return None


def _message_fault(message: Mapping[str, Any]) -> str | None:
    if not isinstance(message.get("role"), str):
        return "without a role"
    if "content" not in message:
        return "without content (it may be null)"
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_tool_call, calls))):
        return "with malformed tool_calls; allowed: a list of {'function': {'name', 'arguments'}}"
    content = message["content"]
    if content is None or isinstance(content, str):
        return None
    if not isinstance(content, list):
        return f"with {type(content).__name__} content; allowed: a string, a list of parts, null"
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _PART_TYPES:
            kind = part.get("type") if isinstance(part, dict) else part
            return f"with a content part of type {kind!r}; allowed: {', '.join(sorted(_PART_TYPES))}"
    return None


def _is_tool_call(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return False
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return arguments is None or isinstance(arguments, dict)
    try:
        return not arguments or isinstance(msgspec.json.decode(arguments), dict)
    except ValueError:
        return False
