"""Tells when a module of a package has been imported, so that it can be changed before anybody uses it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class ImportHook(MetaPathFinder):
    """Calls a function with each module of a package right after its code has run.

    Nothing is imported by it: it finds what the other finders find.

    Args:
        package (`str`): The package's name; its modules are `package.…`.
        imported (`Callable[[ModuleType], None]`): Called in the importing thread, before the import returns.
    """

    def __init__(self, package: str, imported: Callable[[ModuleType], None]) -> None:
        self._prefix = f"{package}."
        self._imported = imported

    def install(self) -> None:
        """Listens from now on."""
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Listens no longer."""
        with contextlib.suppress(ValueError):  # somebody has set the list anew
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self._prefix):
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if find is None or finder is self:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _TellingLoader(spec.loader, self._imported)
                return spec
        return None


class _TellingLoader(Loader):
    """Stands before a module's loader for the time of its execution."""

    def __init__(self, loader: Loader, imported: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._imported = imported

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if it had been imported without us: inspect and pickle ask its loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # Packages of TRL put a lazy module in their own place.
        self._imported(sys.modules.get(module.__name__, module))
