"""`python -m tests.benchmarks [NAME…]`: measures the pool and the gateway beside their peers.

Every benchmark is a module with `SUMMARY`, `add_options(parser)` and `run(options) -> Report`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .report import about

NAMES = ("steps", "client", "gateway", "weights", "routing")


def parser() -> argparse.ArgumentParser:
    """The command line; each benchmark adds options of its own."""
    options = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measures the pool and the gateway beside their peers. Figures are ratios within one run: this "
        "never fails because a machine is slow.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:9}{_module(name).SUMMARY}" for name in NAMES),
    )
    options.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run, of {', '.join(NAMES)}; all")
    options.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    options.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for JSON and pictures (default: results/ beside this file)",
    )
    for name in NAMES:
        _module(name).add_options(options.add_argument_group(name))
    return options


def _module(name: str):
    return importlib.import_module(f"{__package__}.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs benchmarks, prints their tables and writes their results."""
    options = parser().parse_args(argv)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown or options.rounds < 1:
        print(
            f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}" if unknown else "--rounds: at least 1"
        )
        return 2
    machine = about(("trl", "aiohttp", "fastapi", "uvicorn", "torch"))
    print("\n".join(f"{what}: {value}" for what, value in machine.items()), end="\n\n")
    for name in options.names or NAMES:
        report = _module(name).run(options)
        for table in report.tables:
            print(table.markdown(), flush=True)
        for path in report.save(name, options.out, machine):
            print(f"wrote {path}")
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
