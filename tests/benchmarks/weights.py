"""What a weight update costs with more servers."""

from __future__ import annotations

import argparse

from .report import Report

SUMMARY = "weight updates to 1, 2, 4 and 8 servers"


def add_options(group: argparse._ArgumentGroup) -> None:
    """Nothing yet."""


def run(options: argparse.Namespace) -> Report:
    return Report()
