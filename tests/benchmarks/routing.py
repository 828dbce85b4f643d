"""What a routing decision costs."""

from __future__ import annotations

import argparse

from .report import Report

SUMMARY = "picking a backend, planning a batch, building the ring"


def add_options(group: argparse._ArgumentGroup) -> None:
    """Nothing yet."""


def run(options: argparse.Namespace) -> Report:
    return Report()
