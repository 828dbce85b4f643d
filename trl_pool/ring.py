"""A consistent-hash ring: the same key meets the same backend, and a change of one backend moves only its keys."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Iterator


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process (`hash()` is salted) and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class HashRing:
    """Names on a ring, each at many points (Karger et al., 1997).

    Args:
        names (`Iterable[str]`, *optional*): Backends' names.
        virtual_nodes (`int`, *optional*, defaults to `160`): Points per name. The share of keys of one name has a
            relative standard deviation of about `1 / sqrt(virtual_nodes)`: 8 % at 160.
    """

    def __init__(self, names: Iterable[str] = (), *, virtual_nodes: int = 160) -> None:
        self._virtual_nodes = virtual_nodes
        self._names: set[str] = set()
        self._points: list[tuple[int, str]] = []
        for name in names:
            self.add(name)

    def __repr__(self) -> str:
        return f"<HashRing {len(self._names)} names × {self._virtual_nodes} points>"

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """Puts a name on the ring; a name that is there already stays as it is."""
        if name in self._names:
            return
        self._names.add(name)
        self._points.extend((stable_hash(f"{name}#{i}"), name) for i in range(self._virtual_nodes))
        self._points.sort()

    def remove(self, name: str) -> None:
        """Takes a name off the ring; an unknown name is ignored."""
        if name in self._names:
            self._names.discard(name)
            self._points = [point for point in self._points if point[1] != name]

    def walk(self, key: str) -> Iterator[str]:
        """All names, each once, in the order in which a walk from the key's place on the ring meets them."""
        if not self._points:
            return
        seen: set[str] = set()
        # (hash, "") sorts before every point with that hash, whatever its name.
        start = bisect.bisect_left(self._points, (stable_hash(key), ""))
        for offset in range(len(self._points)):
            name = self._points[(start + offset) % len(self._points)][1]
            if name not in seen:
                seen.add(name)
                yield name
                if len(seen) == len(self._names):
                    return
