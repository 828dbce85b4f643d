"""The choice of a backend, without knowing what a backend is: names, loads and affinity keys in, names out.

Load is counted in completions (prompts × n): a request of one prompt with sixteen completions weighs as much as one
of sixteen prompts.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

CHARS_PER_TOKEN = 4
"""About how many characters of English a token makes; turns the documented number of characters into tokens."""

_AFFINITY_DEPTH = 16
"""How far along the ring a prompt looks for room. Beyond that any place is as cold as any other."""


_FEW = 2
_ALONE = 1.25
"""A beginning that no more than so many backends have is worth so much more load on one of them."""

_DRAWN = 8
"""Backends of which the least loaded is taken, where affinity has nothing to say."""


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
        return affinity_key(conversation_text(unit, 4 * prefix_chars), prefix_chars)
    return ",".join(map(str, unit[: max(1, prefix_chars // CHARS_PER_TOKEN)]))


def conversation_text(messages: Sequence[Any], enough: int | None = None) -> str:
    """A conversation as one text, to be compared with others'.

    Args:
        messages (`list[dict]`): The conversation.
        enough (`int`, *optional*): Characters after which the rest is left out.
    """
    parts, length = [], 0
    for message in messages:
        parts.append(f"{message.get('role')}: {_content_text(message.get('content'))}\n")
        length += len(parts[-1])
        if enough is not None and length >= enough:
            break
    return "".join(parts)


def session_key(session_id: str) -> str:
    """What a session is hashed by."""
    return f"session:{session_id}"


def _content_text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", part.get("type"))) for part in content if isinstance(part, dict))
    return str(content)


def shares(
    count: int,
    weight: int,
    loads: Mapping[str, int],
    tie: Callable[[], float],
    speeds: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """How many of `count` equal prompts each backend gets so that the highest load ends as low as possible.

    Args:
        count (`int`): Prompts.
        weight (`int`): Load of each.
        loads (`Mapping[str, int]`): Load that is out already, per backend.
        tie (`Callable[[], float]`): Decides between equals, so that no place in a list is favoured.
        speeds (`Mapping[str, float]`, *optional*): A backend of speed 2 counts its load by half.
    """
    given = dict.fromkeys(loads, 0)
    costs = {name: 1 / (speeds or {}).get(name, 1.0) for name in loads}
    # What a backend would come to with one prompt more, so that a slow one gets none where a fast one ends sooner.
    heap = [((load + weight) * costs[name], tie(), name) for name, load in loads.items()]
    heapq.heapify(heap)
    for _ in range(count):
        load, rank, name = heap[0]
        given[name] += 1
        heapq.heapreplace(heap, (load + weight * costs[name], rank, name))
    return given


def split(
    keys: Sequence[str],
    weight: int,
    loads: Mapping[str, int],
    walk: Callable[[str], Iterator[str]],
    rng: random.Random,
    *,
    speeds: Mapping[str, float] | None = None,
    holders: Sequence[Sequence[str]] | None = None,
) -> dict[str, list[int]]:
    """Spreads a batch: evenly first, since evenness decides how long a step takes, by affinity second.

    Every backend gets exactly its share ([`shares`]). Within that, a prompt goes to a backend that is known to have
    its beginning, else to the first on its walk around the ring that has room.

    Args:
        keys (`Sequence[str]`): Affinity key per prompt.
        weight (`int`): Load of each prompt (its completions).
        loads (`Mapping[str, int]`): Load that is out already, per backend that may take part.
        walk (`Callable[[str], Iterator[str]]`): Ring order for a key.
        rng (`random.Random`): For ties.
        speeds (`Mapping[str, float]`, *optional*): A backend of speed 2 gets twice as much as one of speed 1.
        holders (`Sequence[Sequence[str]]`, *optional*): Per prompt, the backends that have its beginning.

    Returns:
        `dict[str, list[int]]`: Indices of prompts per backend, ascending; backends without work are left out.
    """
    seats = _Seats(shares(len(keys), weight, loads, rng.random, speeds), weight, loads, speeds or {})
    rest: list[int] = []
    # Those whose place is known first: the others do as well anywhere.
    for index, names in enumerate(holders or [()] * len(keys)):
        found = max((name for name in names if seats.free(name)), key=seats.room, default=None) if names else None
        if found is None:
            rest.append(index)
        else:
            seats.place(index, found)
    walks: dict[str, _Walk] = {}
    homeless: list[int] = []
    for index in rest:
        key = keys[index]
        if key not in walks:
            walks[key] = _Walk(name for name in walk(key) if name in loads)
        found = walks[key].first(seats)
        if found is None:
            homeless.append(index)
        else:
            seats.place(index, found)
    everybody = itertools.cycle(loads)
    for index in homeless:
        seats.place(index, next(name for name in everybody if seats.free(name)))
    return {name: sorted(indices) for name, indices in seats.placed.items()}


class _Walk:
    """A walk around the ring, gone as far as was needed: prompts with the same key go the same way, and room that is
    gone does not come back."""

    __slots__ = ("_here", "_walk")

    def __init__(self, walk: Iterator[str]) -> None:
        self._walk = itertools.islice(walk, _AFFINITY_DEPTH)
        self._here = next(self._walk, None)

    def first(self, seats: _Seats) -> str | None:
        """The first that has room."""
        while self._here is not None and not seats.free(self._here):
            self._here = next(self._walk, None)
        return self._here


class _Seats:
    """Room that is left while a batch is spread.

    Seats that end last are drawn by lot between equals; whom they go to, the prompts' affinity may say.
    """

    def __init__(
        self, room: dict[str, int], weight: int, loads: Mapping[str, int], speeds: Mapping[str, float]
    ) -> None:
        self._room = room
        self.placed: dict[str, list[int]] = {}
        # With its last seat, and with one more.
        ends = {name: (loads[name] + weight * count) / speeds.get(name, 1.0) for name, count in room.items()}
        more = {name: (loads[name] + weight * (count + 1)) / speeds.get(name, 1.0) for name, count in room.items()}
        top = max((ends[name] for name, count in room.items() if count), default=0.0)
        self._takers = {name for name, end in more.items() if end == top}
        self._extra = 0
        for name, count in room.items():
            if count and ends[name] == top:
                room[name] -= 1
                self._takers.add(name)
                self._extra += 1

    def free(self, name: str) -> bool:
        """Whether a backend takes part and has room."""
        return self._room.get(name, 0) > 0 or (self._extra > 0 and name in self._takers)

    def room(self, name: str) -> int:
        """How much."""
        return self._room[name]

    def place(self, index: int, name: str) -> None:
        """Gives a backend a prompt."""
        if self._room[name]:
            self._room[name] -= 1
        else:
            self._takers.discard(name)
            self._extra -= 1
        self.placed.setdefault(name, []).append(index)


def sticky(
    walk: Iterator[str],
    holders: Sequence[str],
    load: Callable[[str], int | None],
    *,
    mean: float,
    weight: int,
    factor: float,
    keep: bool,
    rng: random.Random,
    names: Sequence[str],
) -> str | None:
    """Where a single request should go, found without a look at everybody.

    To the least loaded of those who have its beginning in their cache, else to the first on its walk around the ring:
    consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016), which passes over a backend whose
    load is too far above the mean. Where all of those are (a beginning that everybody asks for), to the least loaded
    of a few drawn by lot: nearly as even as the least loaded of all (Mitzenmacher, 2001).

    Args:
        walk (`Iterator[str]`): Ring order for its key.
        holders (`Sequence[str]`): Who has its beginning.
        load (`Callable[[str], int | None]`): Load that is out on a backend; `None` if it cannot take the request now.
        mean (`float`): Mean load.
        weight (`int`): Load of the request.
        factor (`float`): How far above the mean a backend may be that has something to offer.
        keep (`bool`): Whether the ring's place has something to offer: a session's may, a prompt's whose beginning
            nobody has does not.
        rng (`random.Random`): For the lot.
        names (`Sequence[str]`): Everybody.

    Returns:
        `str` or `None`: `None` when none of them can take it; there may be others.
    """
    found: str | None = None
    least = factor * mean * (_ALONE if len(holders) <= _FEW else 1) + weight
    for name in holders:
        its = load(name)
        if its is not None and (its < least or (its == least and found is None)):
            found, least = name, its
    if found is not None:
        return found
    bound = factor * mean + weight if keep else mean
    for name in itertools.islice(walk, _AFFINITY_DEPTH):
        its = load(name)
        if its is not None and its <= bound:
            return name
    least = math.inf
    for _ in range(_DRAWN if names else 0):
        name = names[int(rng.random() * len(names))]
        its = load(name)
        if its is not None and its < least:
            found, least = name, its
    return found


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
