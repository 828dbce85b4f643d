"""Which backend has a prompt's beginning in its cache: what the pool remembers of the prompts that it has sent.

The documented affinity key looks at a prompt's first characters. Where all prompts share those (a system prompt), they
would all go to one place; what tells a conversation from others comes later. So every prompt is hashed at several
depths, each hash covering all before it, and the deepest one that is known says who served the same beginning last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from .balancer import CHARS_PER_TOKEN, conversation_text

_STEPS = ((64, 1024), (256, 8192), (1024, 1 << 62))
"""Tokens between two depths, and up to where: finer where most prompts differ, so that a prompt of any length has few
of them."""

_MANY = 16
"""A beginning that more backends than this have tells them apart no more."""


def depths(length: int) -> Iterator[int]:
    """Where a prompt of so many tokens is looked at."""
    depth = 0
    for step, limit in _STEPS:
        while depth < limit:
            depth += step
            if depth > length:
                return
            yield depth


def marks(unit: Any) -> list[int]:
    """A prompt's hashes, shallow to deep; none for one that is shorter than the first depth.

    Args:
        unit (`str`, `list[int]`, or `list[dict]`):
            A prompt, its token ids, or a conversation. Anything else has none: whoever gets it will say what is wrong
            with it.
    """
    pieces: Sequence[Any]
    if isinstance(unit, str):
        scale, pieces = CHARS_PER_TOKEN, unit
    elif not isinstance(unit, Sequence):
        return []
    elif unit and isinstance(unit[0], dict):
        if not all(isinstance(message, dict) for message in unit):
            return []
        scale, pieces = CHARS_PER_TOKEN, conversation_text(unit)
    else:
        scale, pieces = 1, unit
    found: list[int] = []
    so_far: int | None = None
    start = 0
    for depth in depths(len(pieces) // scale):
        end = depth * scale
        piece = pieces[start:end]
        try:
            # Salted per process, like all that `hash()` gives: nobody from outside can make prompts collide.
            so_far = hash((so_far, piece if isinstance(piece, str) else tuple(piece)))
        except TypeError:
            break
        found.append(so_far)
        start = end
    return found


class PrefixMemory:
    """Remembers, for the newest beginnings, which backends have served them.

    Args:
        entries (`int`): Most beginnings; the one that was not met for longest is forgotten first. 0 remembers none.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._holders: OrderedDict[int, list[str]] = OrderedDict()
        self._known: set[str] = set()  # backends that may be among them

    def __repr__(self) -> str:
        return f"<PrefixMemory {len(self._holders)} of {self._entries} beginnings>"

    def __len__(self) -> int:
        return len(self._holders)

    def served(self, prompt_marks: Sequence[int], name: str) -> None:
        """A backend gets this prompt, and will have its beginnings in its cache."""
        if not self._entries:
            return
        holders = self._holders
        self._known.add(name)
        for mark in prompt_marks:
            names = holders.get(mark)
            if names is None:
                holders[mark] = [name]
                if len(holders) > self._entries:
                    holders.popitem(last=False)
                continue
            holders.move_to_end(mark)
            if name not in names and len(names) <= _MANY:
                names.append(name)

    def missed(self, prompt_marks: Sequence[int], name: str) -> None:
        """A backend did not serve a prompt that it got. Its beginnings it may have from others, but not all of it."""
        for mark in prompt_marks[-1:]:
            names = self._holders.get(mark)
            if names is not None and name in names and len(names) <= _MANY:
                names.remove(name)
                if not names:
                    del self._holders[mark]

    def holders(self, prompt_marks: Sequence[int]) -> Sequence[str]:
        """Who has the longest beginning of a prompt that anybody has; nobody, if that tells nobody apart."""
        for mark in reversed(prompt_marks):
            names = self._holders.get(mark)
            if names:
                return names if len(names) <= _MANY else ()
        return ()

    def forget(self, name: str) -> None:
        """A backend's cache is empty. Of a beginning that too many have it does not matter who they are."""
        if name not in self._known:  # each refused connection of a server that is gone says so again
            return
        self._known.discard(name)
        for mark in [mark for mark, names in self._holders.items() if name in names and len(names) <= _MANY]:
            names = self._holders[mark]
            names.remove(name)
            if not names:
                del self._holders[mark]

    def clear(self) -> None:
        """All caches are empty."""
        self._holders.clear()
        self._known.clear()
