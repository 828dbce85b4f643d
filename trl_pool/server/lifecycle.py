"""How the gateway's process starts: from the environment, and alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from fastapi import FastAPI

from ..errors import ConfigurationError
from .application import create_app
from .settings import GatewaySettings


def app_from_environment() -> FastAPI:
    """The application for `uvicorn trl_pool.server:app`.

    Raises:
        `SystemExit`: with one line that says what is wrong.
    """
    try:
        refuse_workers(sys.argv, os.environ)
        app = create_app(GatewaySettings.from_env())
    except ConfigurationError as error:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:
            # A supervisor would start this worker again and again.
            os.kill(parent.pid, signal.SIGTERM)
        raise SystemExit(f"trl_pool.server: {error}") from None
    keep_for_good()
    return app


def keep_for_good() -> None:
    """Takes all there is out of the garbage collector's sight: modules, models and routes stay until the end, and
    looking through them again and again holds every request up for tens of milliseconds."""
    gc.collect()
    gc.freeze()


def refuse_workers(argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Refuses more than one worker process, as uvicorn and gunicorn are asked for them.

    Raises:
        [`ConfigurationError`]: because limits, breakers and the weight fence live in one process: two would each
            know half.
    """
    asked = environ.get("WEB_CONCURRENCY", "1")
    source = "WEB_CONCURRENCY"
    for position, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option in ("--workers", "-w"):
            source = option
            asked = value if equals else argv[position + 1] if position + 1 < len(argv) else ""
        elif option.startswith("-w") and option[2:].isdigit():
            source, asked = "-w", option[2:]
    if asked.strip() not in ("", "1"):
        raise ConfigurationError(
            f"{source}={asked}: allowed: 1, since limits, circuit breakers and the weight fence live in one process"
        )
