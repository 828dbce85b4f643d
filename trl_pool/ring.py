"""A consistent-hash ring: the same key meets the same backend, and a change of one backend moves only its keys.

Looked at millions of times and changed rarely, so it is two flat, sorted columns (a search touches nothing else), made
anew when they are first looked at after a change.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import numpy as np


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
        self._points: dict[str, bytes] = {}  # big-endian, eight bytes each
        self._columns: tuple[array[int], list[str]] | None = None
        for name in names:
            self.add(name)

    def __repr__(self) -> str:
        return f"<HashRing {len(self)} names × {self._virtual_nodes} points>"

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: str) -> bool:
        return name in self._points

    def add(self, name: str) -> None:
        """Puts a name on the ring; a name that is there already stays as it is."""
        if name not in self._points:
            self._points[name] = self._hashes(name)
            self._columns = None

    def remove(self, name: str) -> None:
        """Takes a name off the ring; an unknown name is ignored."""
        if self._points.pop(name, None) is not None:
            self._columns = None

    def walk(self, key: str) -> Iterator[str]:
        """All names, each once, in the order in which a walk from the key's place on the ring meets them."""
        if not self._points:
            return
        hashes, owners = self._columns or self._build()
        start = bisect_left(hashes, stable_hash(key))
        left = len(self._points)
        seen = set()
        for part in (range(start, len(owners)), range(start)):
            for place in part:
                name = owners[place]
                if name not in seen:
                    seen.add(name)
                    yield name
                    left -= 1
                    if not left:
                        return

    def _hashes(self, name: str) -> bytes:
        """`stable_hash(f"{name}#{i}")` of each point; what they begin with is hashed once."""
        begun = hashlib.blake2b(f"{name}#".encode(), digest_size=8)
        found = []
        for number in range(self._virtual_nodes):
            point = begun.copy()
            point.update(b"%d" % number)
            found.append(point.digest())
        return b"".join(found)

    def _build(self) -> tuple[array[int], list[str]]:
        # By name first, so that the order in which they came decides nothing, not even between equal hashes.
        names = sorted(self._points)
        points = np.frombuffer(b"".join(self._points[name] for name in names), dtype=">u8").astype(np.uint64)
        order = np.argsort(points, kind="stable")
        owners = [names[index] for index in (order // self._virtual_nodes).tolist()]
        self._columns = array("Q", points[order].tobytes()), owners
        return self._columns
