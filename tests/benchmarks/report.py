"""What a benchmark found: tables for the eye, values for a program, figures where a picture says more."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class Spread:
    """Several measurements of the same thing.

    Args:
        values (`tuple[float, ...]`): In the order of the rounds.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        return cls(tuple(float(value) for value in values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def __truediv__(self, other: Spread) -> Spread:
        """Round by round: what slowed the machine down in a round slowed down both."""
        return Spread.of(mine / its for mine, its in zip(self.values, other.values, strict=True))

    def text(self, digits: int = 2) -> str:
        """Median and range, in one cell."""
        if len(self.values) == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} – {self.high:.{digits}f})"


@dataclass(frozen=True)
class Table:
    """Rows under a title.

    Args:
        title (`str`): What they show.
        columns (`Sequence[str]`): Heads, with units.
        rows (`Sequence[Sequence[object]]`): Cells; a [`Spread`] is shown as its median and range.
        notes (`Sequence[str]`, *optional*): Lines below it: targets reached or not, what was skipped.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        cells = [[cell.text() if isinstance(cell, Spread) else cell for cell in row] for row in self.rows]
        table = tabulate(cells, headers=list(self.columns), tablefmt="github", disable_numparse=True)
        return "\n".join([f"### {self.title}", "", table, *(f"\n{note}" for note in self.notes), ""])


@dataclass
class Report:
    """All that one benchmark found.

    Args:
        tables (`list[Table]`): To read.
        data (`dict`): The same as JSON values, with whatever else is worth keeping.
        figures (`dict[str, Callable[[Any], None]]`): Per name, a function that draws on a matplotlib figure.
    """

    tables: list[Table] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Callable[[Any], None]] = field(default_factory=dict)

    def save(self, name: str, folder: Path, about: Mapping[str, str]) -> list[Path]:
        """Writes `name.json`, and a PNG per figure where matplotlib is installed. Returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"about": dict(about), **self.data}, indent=1, default=_plain) + "\n")
        written = [path]
        try:
            import matplotlib
        except ImportError:
            return written
        matplotlib.use("Agg")
        from matplotlib.figure import Figure

        for title, draw in self.figures.items():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            draw(figure)
            path = folder / f"{title}.png"
            figure.savefig(path, dpi=110)
            written.append(path)
        return written


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return {"median": value.median, "low": value.low, "high": value.high, "values": value.values}
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def about(packages: Iterable[str] = ()) -> dict[str, str]:
    """The machine and the versions that figures belong to.

    Args:
        packages (`Iterable[str]`, *optional*): Names on PyPI; those that are not installed are left out.
    """
    found = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for package in ("trl-pool", "httpx", "msgspec", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
