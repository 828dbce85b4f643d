"""What the gateway costs beside its peers."""

from __future__ import annotations

import argparse

from .report import Report

SUMMARY = "the gateway beside HAProxy, nginx and other routers, measured with wrk"


def add_options(group: argparse._ArgumentGroup) -> None:
    """Nothing yet."""


def run(options: argparse.Namespace) -> Report:
    return Report()
