"""How fast each server is, learnt from what it has answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_ALIKE = 1.25
"""Backends within this factor of the usual pace count as equal: that much is noise, and evenness is worth more."""

_SHARE_LIMITS = (0.1, 4.0)

_EAGERNESS = 0.7
"""How much of what a share was too large or too small by is corrected at once."""

_FORGETTING = 0.9
"""A share that has proved right moves back to the usual one by so little each time that a server that only was slow
for a while is found out, and one that is slow is not overloaded again."""

_SHORTEST_SECONDS = 1.0
"""Calls that end sooner show more of the network and of the machine than of the servers."""


@dataclass
class _Mean:
    """A mean that forgets: the newest observation counts `newest`, the first ones all the same."""

    newest: float
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(self.newest, 1 / self.count)


class Pace:
    """What a pool knows of its servers' speed."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._sides: dict[str, int] = {}  # 1 if it was slower when it was last unusual, -1 if it was faster
        self._piece_seconds: dict[str, _Mean] = {}
        self._occupancy = _Mean(0.02, 0.5, 8)
        self._longest = _Mean(0.02)
        self._longest_ever = 0.0

    def __repr__(self) -> str:
        pieces = ", ".join(f"{name} {mean.value:.3g} s" for name, mean in self._piece_seconds.items())
        return f"<Pace shares {self._shares}; requests {pieces}; occupancy {self._occupancy.value:.2f}>"

    def observe_piece(self, name: str, seconds: float, lengths: Sequence[int]) -> None:
        """One of many small requests was answered.

        Args:
            name (`str`): By which backend.
            seconds (`float`): After how long.
            lengths (`Sequence[int]`): Tokens of each of its completions.
        """
        longest = max(lengths, default=0)
        if longest:
            self._piece_seconds.setdefault(name, _Mean(0.1)).add(seconds)
            self._occupancy.add(sum(lengths) / (longest * len(lengths)))
            self._longest.add(longest)
            self._longest_ever = max(longest, 0.999 * self._longest_ever)

    def observe_call(self, shares: Mapping[str, tuple[float, int, int]], max_num_seqs: Mapping[str, int]) -> None:
        """A call was answered in which every backend had its share from the beginning.

        A share's decode steps are at least those of its longest completion, and at least what all of them need
        together at `max_num_seqs` tokens a step; time over steps is comparable between shares of any size.

        Args:
            shares (`Mapping[str, tuple[float, int, int]]`): Per backend, the seconds that its share took, the tokens
                of all its completions, and those of the longest.
            max_num_seqs (`Mapping[str, int]`): Sequences that each backend runs at once.
        """
        paces = {
            name: seconds / max(longest, tokens / max_num_seqs[name])
            for name, (seconds, tokens, longest) in shares.items()
            if longest > 0
        }
        if len(paces) < 2 or max(seconds for seconds, _, _ in shares.values()) < _SHORTEST_SECONDS:
            return
        usual = sorted(paces.values())[(len(paces) - 1) // 2]
        low, high = _SHARE_LIMITS
        for name, pace in paces.items():
            share = self._shares.get(name, 1.0)
            side = 0 if 1 / _ALIKE <= pace / usual <= _ALIKE else 1 if pace > usual else -1
            if side == 0:
                share **= _FORGETTING
            elif side == self._sides.get(name):  # once may be chance, or a server that warms up
                share = min(high, max(low, share * (usual / pace) ** _EAGERNESS))
            self._shares[name] = share
            self._sides[name] = side or self._sides.get(name, 0)

    def forget(self, name: str) -> None:
        """The backend is gone, or somebody else stands in its place."""
        self._shares.pop(name, None)
        self._sides.pop(name, None)
        self._piece_seconds.pop(name, None)

    @property
    def occupancy(self) -> float:
        """Of the completions of a small request, the share that runs, averaged over its time: 1 when all are equally
        long. By Little's law a server that has so many completions out is working on `occupancy` of them."""
        return self._occupancy.value

    def piece_seconds(self, name: str) -> float | None:
        """What the backend is expected to need for a small request sent now; `None` when that is not known."""
        mean = self._piece_seconds.get(name)
        return None if mean is None else mean.value

    @property
    def spread(self) -> float:
        """The longest completion of all over that of a usual request: what the last request of a batch may take,
        compared with most."""
        return self._longest_ever / self._longest.value if self._longest.count else 1.0

    def shares(self, names: Iterable[str]) -> dict[str, float]:
        """How much of the work each backend should get, 1 being the usual; those that are much like the others get
        that."""
        found = {}
        for name in names:
            share = self._shares.get(name, 1.0)
            found[name] = 1.0 if 1 / _ALIKE <= share <= _ALIKE else share
        return found
