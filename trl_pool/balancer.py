"""The choice of a backend, without knowing what a backend is: names, loads and affinity keys in, names out.

Load is counted in completions (prompts × n): a request of one prompt with sixteen completions weighs as much as one
of sixteen prompts.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

CHARS_PER_TOKEN = 4
"""About how many characters of English a token makes; turns the documented number of characters into tokens."""

_AFFINITY_DEPTH = 16
"""How far along the ring a prompt looks for room. Beyond that any place is as cold as any other."""


def affinity_key(unit: Any, prefix_chars: int) -> str:
    """What a prompt is hashed by: its first characters, so that prompts that share a prefix meet the same cache.

    Args:
        unit (`str`, `list[int]`, or `list[dict]`): A prompt, its token ids, or a conversation.
        prefix_chars (`int`): Characters that count, white space collapsed. Of token ids a quarter as many.
    """
    if isinstance(unit, str):
        # White space may make up most of a prompt's beginning; four times as much is read before it is collapsed.
        return " ".join(unit[: 4 * prefix_chars].split())[:prefix_chars]
    if unit and all(isinstance(message, dict) for message in unit):
        text = ""
        for message in unit:
            text += f"{message.get('role')}: {_content_text(message.get('content'))}\n"
            if len(text) >= 4 * prefix_chars:
                break
        return affinity_key(text, prefix_chars)
    return ",".join(map(str, unit[: max(1, prefix_chars // CHARS_PER_TOKEN)]))


def session_key(session_id: str) -> str:
    """What a session is hashed by."""
    return f"session:{session_id}"


def _content_text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", part.get("type"))) for part in content if isinstance(part, dict))
    return str(content)


def shares(count: int, weight: int, loads: Mapping[str, int], tie: Callable[[], float]) -> dict[str, int]:
    """How many of `count` equal prompts each backend gets so that the highest load ends as low as possible.

    Args:
        count (`int`): Prompts.
        weight (`int`): Load of each.
        loads (`Mapping[str, int]`): Load that is out already, per backend.
        tie (`Callable[[], float]`): Decides between equals, so that no place in a list is favoured.
    """
    given = dict.fromkeys(loads, 0)
    heap = [(load, tie(), name) for name, load in loads.items()]
    heapq.heapify(heap)
    for _ in range(count):
        load, rank, name = heap[0]
        given[name] += 1
        heapq.heapreplace(heap, (load + weight, rank, name))
    return given


def split(
    keys: Sequence[str],
    weight: int,
    loads: Mapping[str, int],
    walk: Callable[[str], Iterator[str]],
    rng: random.Random,
) -> dict[str, list[int]]:
    """Spreads a batch: evenly first, since evenness decides how long a step takes, by affinity second.

    Every backend gets exactly its share ([`shares`]); within that, each prompt goes to the first backend on its walk
    around the ring that still has room.

    Args:
        keys (`Sequence[str]`): Affinity key per prompt.
        weight (`int`): Load of each prompt (its completions).
        loads (`Mapping[str, int]`): Load that is out already, per backend that may take part.
        walk (`Callable[[str], Iterator[str]]`): Ring order for a key.
        rng (`random.Random`): For ties.

    Returns:
        `dict[str, list[int]]`: Indices of prompts per backend, ascending; backends without work are left out.
    """
    room = shares(len(keys), weight, loads, rng.random)
    # Seats at the highest level are drawn by lot between equals; whom they go to, the prompts' affinity may say.
    top = max((loads[name] + weight * count for name, count in room.items() if count), default=0)
    takers = {name for name, count in room.items() if loads[name] + weight * (count + 1) == top}
    seats = 0
    for name, count in room.items():
        if count and loads[name] + weight * count == top:
            room[name] -= 1
            takers.add(name)
            seats += 1
    placed: dict[str, list[int]] = {}
    orders: dict[str, list[str]] = {}
    homeless: list[int] = []

    def has_room(name: str) -> bool:
        return room[name] > 0 or (seats > 0 and name in takers)

    def place(index: int, name: str) -> None:
        nonlocal seats
        if room[name]:
            room[name] -= 1
        else:
            takers.discard(name)
            seats -= 1
        placed.setdefault(name, []).append(index)

    for index, key in enumerate(keys):
        if key not in orders:
            near = (name for name in walk(key) if name in room)
            orders[key] = list(itertools.islice(near, _AFFINITY_DEPTH))
        found = next((name for name in orders[key] if has_room(name)), None)
        if found is None:
            homeless.append(index)
        else:
            place(index, found)
    everybody = itertools.cycle(room)
    for index in homeless:
        place(index, next(name for name in everybody if has_room(name)))
    return {name: sorted(indices) for name, indices in placed.items()}


def sticky_order(
    key: str, weight: int, loads: Mapping[str, int], walk: Callable[[str], Iterator[str]], factor: float
) -> list[str]:
    """Where a request that does not split should go: its walk around the ring, overloaded backends last.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016): a backend is passed over while
    its load exceeds `factor` times the mean by more than this request weighs.

    Args:
        key (`str`): Affinity key.
        weight (`int`): Load of the request.
        loads (`Mapping[str, int]`): Load that is out already, per backend that may take part.
        walk (`Callable[[str], Iterator[str]]`): Ring order for a key.
        factor (`float`): How far above the mean a backend may be.
    """
    order = [name for name in walk(key) if name in loads]
    bound = factor * sum(loads.values()) / max(1, len(loads)) + weight
    return sorted(order, key=lambda name: loads[name] > bound)


def least_loaded(loads: Mapping[str, int], rng: random.Random) -> list[str]:
    """Names by load, equals in random order."""
    return sorted(loads, key=lambda name: (loads[name], rng.random()))
