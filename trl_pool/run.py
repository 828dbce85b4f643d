"""`python -m trl_pool.run train.py ARGS…`: a training script over many servers, with no change in it.

```
python -m trl_pool.run train.py ARGS…
python -m trl_pool.run -m package.module ARGS…
accelerate launch … -m trl_pool.run train.py ARGS…
```

TRL is patched ([`patch_trl`]) and the script then runs as `__main__`, as if it had been started by itself. `BACKENDS`
gives the servers of the trained model; without it the script's own `vllm_server_base_url` does, which may be a
comma-separated list. Every setting of [`PoolConfig`] comes from the environment variable of its name. A script that
calls `patch_trl()` itself is free to: its patch replaces this one.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import NamedTuple

from .config import PoolConfig
from .errors import ConfigurationError, UnsupportedTRLError

_PROGRAM = "trl_pool.run"
_USAGE = "usage: python -m trl_pool.run [-h] (SCRIPT | -m MODULE) [ARGS…]"


class UsageError(Exception):
    """The command line names nothing that can be run."""


class Target(NamedTuple):
    """What is to be run.

    Args:
        name (`str`): Path of a script, or dotted name of a module.
        is_module (`bool`): Which of the two.
        arguments (`list[str]`): Its own arguments.
    """

    name: str
    is_module: bool
    arguments: list[str]


def parse(argv: Sequence[str]) -> Target:
    """Reads the command line. Everything behind the script's name is the script's.

    Raises:
        [`UsageError`]: when there is no script, it does not exist, or an option is unknown.
    """
    if not argv:
        raise UsageError(f"no script given\n{_USAGE}")
    first, *rest = argv
    if first == "-m":
        if not rest:
            raise UsageError(f"-m needs a module's name\n{_USAGE}")
        name, *arguments = rest
        # Only the first part: to look further would import it, and TRL is not patched yet.
        package = name.partition(".")[0]
        if not package or importlib.util.find_spec(package) is None:
            raise UsageError(f"no module named {name!r}")
        return Target(name, True, arguments)
    if first.startswith("-"):
        raise UsageError(f"unknown option {first!r}; a script's options stand behind its name\n{_USAGE}")
    if not os.path.exists(first):
        raise UsageError(f"can't open {first!r}: no such file (looked in {os.getcwd()})")
    return Target(first, False, rest)


def run(target: Target) -> None:
    """Runs it as `__main__`, with `sys.argv` and `sys.path[0]` as Python would have set them. What it raises, exits
    included, goes through."""
    sys.argv[:] = [target.name, *target.arguments]
    if target.is_module:
        # sys.path[0] is the working directory for `python -m`, ours and theirs.
        runpy.run_module(target.name, run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]  # what `python -m` has put there for us
    path = os.path.abspath(target.name)
    if pkgutil.get_importer(path) is not None:  # a directory or an archive with a __main__.py
        runpy.run_path(path, run_name="__main__")
    else:
        _run_script(path)


def _run_script(path: str) -> None:
    """A file as `__main__`. (`runpy.run_path` would make `__file__` and `sys.argv[0]` the same, and take the module
    away again before exit functions run that may need it.)"""
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    loader = SourceFileLoader("__main__", path)
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__=path, __cached__=None, __loader__=loader)
    code = loader.source_to_code(loader.get_data(path), path)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def main(argv: Sequence[str] | None = None) -> int:
    """Patches TRL and runs the script. Returns the exit status 2 for what is wrong before it starts."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n{__doc__}")
        return 0
    from .integrations.trl import install

    try:
        target = parse(argv)
        patch = install(config=PoolConfig.from_env(), provisional=True)
    except (UsageError, ConfigurationError, UnsupportedTRLError) as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(f"{_PROGRAM}: {patch!r}", file=sys.stderr)
    run(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
