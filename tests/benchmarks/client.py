"""What the client itself costs."""

from __future__ import annotations

import argparse

from .report import Report

SUMMARY = "CPU time, wall time and memory of the pool beside TRL's own client"


def add_options(group: argparse._ArgumentGroup) -> None:
    """Nothing yet."""


def run(options: argparse.Namespace) -> Report:
    return Report()
