"""Which TRL is installed and where its `VLLMClient` is defined, found out without importing it.

TRL's client module imports torch, transformers and vLLM; a script that has not asked for them yet shall not pay for
them because of a patch.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder

from ..errors import UnsupportedTRLError

logger = logging.getLogger(__name__)

CLIENT = "VLLMClient"
"""The name that is replaced."""

CLIENT_MODULES = ("trl.generation.vllm_client", "trl.extras.vllm_client")
"""Where TRL defines it: the first since 0.28, the second before."""

OLDEST_TESTED, NEWEST_TESTED = (0, 24), (1, 16)


@dataclass(frozen=True)
class InstalledTrl:
    """The TRL that a script would import.

    Args:
        version (`str`): Its version, `"unknown"` if it has no metadata.
        client_module (`str`): The module that defines `VLLMClient`.
    """

    version: str
    client_module: str

    @property
    def release(self) -> tuple[int, int] | None:
        """Major and minor number, if the version begins with them."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def has_generation_class(self) -> bool:
        """Whether generation is a class of its own (`VLLMGeneration`) and not part of each trainer."""
        return self.client_module == CLIENT_MODULES[0]

    def warn_if_untested(self) -> None:
        """Says in the log when the version is outside the range that the tests cover."""
        tested = f"{_shown(OLDEST_TESTED)} – {_shown(NEWEST_TESTED)}"
        if self.release is None:
            logger.warning("TRL has no version that can be read (%r); tested are %s", self.version, tested)
        elif not OLDEST_TESTED <= self.release <= NEWEST_TESTED:
            age = "newer" if self.release > NEWEST_TESTED else "older"
            logger.warning(
                "TRL %s is %s than the tested versions (%s). Its VLLMClient is replaced all the same; a method or an "
                "argument that the pool does not have would fail when it is used",
                self.version,
                age,
                tested,
            )


def find_trl() -> InstalledTrl:
    """Looks for TRL and its client.

    Raises:
        [`UnsupportedTRLError`]: when TRL is not installed, or has no `VLLMClient` in any of [`CLIENT_MODULES`].
    """
    try:
        package = importlib.util.find_spec("trl")
    except ValueError:  # a module in sys.modules that has no spec
        package = None
    if package is None or package.submodule_search_locations is None:
        raise UnsupportedTRLError('TRL is not installed here; install it (pip install "trl[vllm]"), then patch it')
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    for name in CLIENT_MODULES:
        if _defines_client(name, package.submodule_search_locations):
            return InstalledTrl(version, name)
    raise UnsupportedTRLError(
        f"TRL {version} in {', '.join(package.submodule_search_locations)} defines no {CLIENT} in "
        f"{' or '.join(CLIENT_MODULES)}: there is nothing to replace. Tested are TRL {_shown(OLDEST_TESTED)} – "
        f"{_shown(NEWEST_TESTED)}; with another one make a VLLMClientPool yourself"
    )


def _shown(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def _defines_client(name: str, locations: Iterable[str]) -> bool:
    if name in sys.modules:
        return CLIENT in vars(sys.modules[name])
    spec = _find_submodule(name, list(locations))
    if spec is None or spec.loader is None:
        return False
    get_source = getattr(spec.loader, "get_source", None)
    source = get_source(name) if get_source is not None else None
    if source is None:  # compiled: to be seen when it is imported
        return True
    return any(isinstance(node, ast.ClassDef) and node.name == CLIENT for node in ast.parse(source).body)


def _find_submodule(name: str, locations: list[str]) -> ModuleSpec | None:
    """The spec of a module of the package `trl`. (`importlib.util.find_spec` would import what it lies in.)"""
    found: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(2, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:depth]), locations)
        if found is None:
            return None
        locations = list(found.submodule_search_locations or ())
    return found
