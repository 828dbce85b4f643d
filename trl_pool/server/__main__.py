"""`python -m trl_pool.server`: the gateway on uvicorn."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import uvicorn

from ..errors import ConfigurationError
from .application import create_app
from .lifecycle import keep_for_good, refuse_workers
from .settings import NOT_FOR_GATEWAYS, GatewaySettings


def parser() -> argparse.ArgumentParser:
    """The command line: an option for every setting; what is not given comes from the environment."""
    options = argparse.ArgumentParser(
        prog="python -m trl_pool.server",
        description="Many `trl vllm-serve` servers behind the endpoints of one. Every setting is also an environment "
        "variable: the option's name in upper case, underscores for dashes.",
        allow_abbrev=False,
    )
    options.add_argument("--host", default="0.0.0.0", help="address to listen on (default: %(default)s)")
    options.add_argument(
        "--port", type=_port, default=8080, help="port to listen on, 0 for any (default: %(default)s)"
    )
    options.add_argument("--log-level", default="info", choices=list(uvicorn.config.LOG_LEVELS))
    for name, field in GatewaySettings.model_fields.items():
        if name in NOT_FOR_GATEWAYS:
            continue
        default = "required" if field.is_required() else f"default: {field.default}"
        options.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=f"({default})")
    return options


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port; allowed: 0-65535")
    return port


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the gateway until it is told to end. Returns the exit status; 2 for a wrong setting."""
    options = vars(parser().parse_args(argv))
    host, port, log_level = options.pop("host"), options.pop("port"), options.pop("log_level")
    try:
        refuse_workers((), os.environ)
        settings = GatewaySettings.from_env(**{name: value for name, value in options.items() if value is not None})
    except ConfigurationError as error:
        print(f"trl_pool.server: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=log_level.upper().replace("TRACE", "DEBUG"), format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for every request and probe
    app = create_app(settings)
    keep_for_good()
    uvicorn.run(
        app,
        host=host,
        port=port,
        workers=1,
        log_level=log_level,
        access_log=False,
        proxy_headers=False,  # nothing here depends on who the client is
        http="httptools",  # uvicorn chooses uvloop by itself where it is installed, and httptools is
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
