"""How long a step takes, on a virtual clock."""

from __future__ import annotations

import argparse

from .report import Report

SUMMARY = "step time of the pool's own balancer against other policies and the lower bound, on a virtual clock"


def add_options(group: argparse._ArgumentGroup) -> None:
    """Nothing yet."""


def run(options: argparse.Namespace) -> Report:
    return Report()
