"""Measurements in interleaved rounds: what disturbs the machine for a while disturbs everybody alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def interleave(
    subjects: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: int = 1, title: str = ""
) -> dict[str, list[T]]:
    """Measures everybody once per round.

    Args:
        subjects (`Mapping[str, Callable[[], T]]`): What is measured, by name; each call returns its figures.
        rounds (`int`): Rounds that count.
        warm_up (`int`, *optional*, defaults to `1`): Rounds before them.
        title (`str`, *optional*): On the progress bar.

    Returns:
        `dict[str, list[T]]`: Per name, one result per round.
    """
    results: dict[str, list[T]] = {name: [] for name in subjects}
    order = list(subjects)
    bar = tqdm(total=(rounds + warm_up) * len(order), desc=title, leave=False)
    with bar:
        for turn in range(rounds + warm_up):
            for name in order:
                gc.collect()
                result = subjects[name]()
                if turn >= warm_up:
                    results[name].append(result)
                bar.update()
            order.reverse()  # nobody always comes after the same neighbour
    return results


def column(results: Mapping[str, list[Mapping[str, Any]]], name: str, key: str) -> list[float]:
    """One figure of one subject, over the rounds."""
    return [float(result[key]) for result in results[name]]
