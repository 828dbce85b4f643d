"""`patch_trl()`: the pool in every place where the installed TRL has its `VLLMClient`."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Self

from ..addresses import parse_backends
from ..client import VLLMClientPool
from ..config import PoolConfig
from ..errors import ConfigurationError, UnsupportedTRLError
from .import_hook import ImportHook
from .installed import CLIENT, InstalledTrl, find_trl
from .trainer_client import ClientSettings, TrainerClient
from .weight_sync import SYNC_METHODS, repeatable

logger = logging.getLogger(__name__)

_PACKAGE = "trl"


class _Replaced(NamedTuple):
    """One attribute that was changed."""

    owner: Any
    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        if isinstance(self.owner, ModuleType):
            return f"{self.owner.__name__}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"


class TrlPatch:
    """A patch that is in force. Made by [`patch_trl`]; as a context manager it is undone at the end of its block.

    Attributes:
        trl ([`InstalledTrl`]): Which TRL was found.
        client (`type`): What stands in the place of its `VLLMClient`: a subclass of [`VLLMClientPool`].
        sync_retries (`int`): How often a failed weight sync is repeated.
        provisional (`bool`): Whether another patch may take its place.
    """

    def __init__(self, trl: InstalledTrl, settings: ClientSettings, sync_retries: int, *, provisional: bool) -> None:
        self.trl = trl
        self.sync_retries = sync_retries
        self.provisional = provisional
        self.client: type[TrainerClient] = type(
            VLLMClientPool.__name__, (TrainerClient,), {"settings": settings, "__module__": TrainerClient.__module__}
        )
        self._settings = settings
        self._original: type | None = None
        self._replaced: list[_Replaced] = []
        self._hook = ImportHook(_PACKAGE, self._adapt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "in force" if _active is self else "undone"
        servers = self._settings.backends or "the URLs that TRL gives"
        return f"<{type(self).__name__} of TRL {self.trl.version}, {state}: {len(self._replaced)} replaced; {servers}>"

    @property
    def replaced(self) -> tuple[str, ...]:
        """What is replaced now, as dotted names. Modules that are imported later add to it."""
        return tuple(map(str, self._replaced))

    def undo(self) -> None:
        """Gives TRL back what was replaced. Clients that exist already stay what they are. A second time, nothing."""
        global _active
        if _active is not self:
            return
        _active = None
        self._hook.remove()
        for replaced in reversed(self._replaced):
            if vars(replaced.owner).get(replaced.name) is replaced.now:
                setattr(replaced.owner, replaced.name, replaced.before)
            else:
                logger.warning("%s has been changed by somebody else since; it is left as it is", replaced)
        logger.info("Gave TRL %s back: %s", self.trl.version, ", ".join(self.replaced) or "nothing was imported")
        self._replaced.clear()

    def _apply(self) -> None:
        """Changes the modules that are imported, and listens for those to come."""
        self._hook.install()
        known = [module for name, module in list(sys.modules.items()) if name.startswith(f"{_PACKAGE}.")]
        # The client's own module first: the others are recognised by what they have from it.
        known.sort(key=lambda module: module.__name__ != self.trl.client_module)
        for module in known:
            self._adapt(module)
        if not self._replaced:
            logger.info("TRL %s: nothing of it that uses %s is imported yet", self.trl.version, CLIENT)

    def _adapt(self, module: ModuleType) -> None:
        """Changes one module, if it is one that has to do with the client."""
        bound = vars(module).get(CLIENT)
        if module.__name__ == self.trl.client_module:
            if bound is None:
                raise UnsupportedTRLError(f"{module.__name__} of TRL {self.trl.version} defines no {CLIENT}")
            self._original = bound
        elif bound is None or bound not in (self._original, self.client):
            return  # TRL's asynchronous trainers have a class of the same name, for a server's other endpoints
        self._replace(module, CLIENT, self._original, self.client)
        for owner in list(vars(module).values()):
            if isinstance(owner, type) and owner.__module__ == module.__name__:
                self._adapt_methods(owner)

    def _adapt_methods(self, owner: type) -> None:
        methods = vars(owner)
        for name in SYNC_METHODS:
            if name in methods:
                self._replace(owner, name, methods[name], repeatable(methods[name], self.sync_retries))
        if "_init_vllm" in methods and self._settings.backends is not None:
            noting = _noting_url(methods["_init_vllm"], self._settings.trained)
            self._replace(owner, "_init_vllm", methods["_init_vllm"], noting)

    def _replace(self, owner: Any, name: str, before: Any, now: Any) -> None:
        setattr(owner, name, now)
        replaced = _Replaced(owner, name, before, now)
        self._replaced.append(replaced)
        logger.info("TRL %s: replaced %s", self.trl.version, replaced)


_active: TrlPatch | None = None


def patch_trl(
    *,
    config: PoolConfig | None = None,
    backends: str | Sequence[str] | None = None,
    sync_retries: int = 2,
) -> TrlPatch:
    """Puts [`VLLMClientPool`] in every place where the installed TRL has its `VLLMClient`.

    To be called on every rank, before a trainer is made. Modules of TRL that are imported later are changed when they
    are; none is imported by this. Nothing is started and no server is asked: that happens where TRL makes its client,
    which for the trained model is the main process only. (Trainers that score with a teacher's server – SDFT, SDPO,
    IW-OPD, server distillation – make one client for it on every rank.)

    A second patch while one is in force is an error: the inner one's end would be the outer one's too, and which
    settings hold would depend on the order. Only the patch of `python -m trl_pool.run` gives way to a script's own.

    Args:
        config ([`PoolConfig`], *optional*):
            The pool's settings. Without it those of the environment if `BACKENDS` is set, otherwise the defaults.
            `total_timeout` is lowered to 0.9 times the process group's time-out (`ddp_timeout`) where it is more.
        backends (`str` or `Sequence[str]`, *optional*):
            URLs of the trained model's servers, as a list or comma-separated; without it the environment variable
            `BACKENDS`. They win over the URL that TRL gives. Without any, `vllm_server_base_url` counts, which may
            be a comma-separated list as well. A teacher's servers, and a client that the script makes with a
            `base_url` of its own, are not concerned.
        sync_retries (`int`, *optional*, defaults to `2`):
            How often a weight sync that ended with [`WeightSyncError`] is repeated, by all ranks together.

    Returns:
        [`TrlPatch`]: To undo it, or to use as a context manager.

    Raises:
        [`UnsupportedTRLError`]: when there is no TRL, or none with a `VLLMClient` to replace.
        [`ConfigurationError`]: for a malformed address or setting.
        `RuntimeError`: when a patch is in force.

    Example:

    ```python
    >>> import trl_pool
    >>> from trl import GRPOConfig, GRPOTrainer

    >>> trl_pool.patch_trl()
    >>> args = GRPOConfig(use_vllm=True, vllm_mode="server", vllm_server_base_url="http://n1:8000,http://n2:8000")
    >>> trainer = GRPOTrainer(model="Qwen/Qwen2.5-7B", args=args, ...)
    ```
    """
    return install(config=config, backends=backends, sync_retries=sync_retries)


def install(
    *,
    config: PoolConfig | None = None,
    backends: str | Sequence[str] | None = None,
    sync_retries: int = 2,
    provisional: bool = False,
) -> TrlPatch:
    """[`patch_trl`]; a provisional patch gives way to the next one."""
    global _active
    if _active is not None and not _active.provisional:
        raise RuntimeError(f"TRL is patched already ({_active!r}); call trl_pool.unpatch_trl() first")
    if sync_retries < 0:
        raise ConfigurationError(f"sync_retries={sync_retries}: allowed: 0 or more")
    from_environment = os.environ.get("BACKENDS", "").strip()
    servers = backends if backends is not None else from_environment or None
    settings_of = PoolConfig.from_env if from_environment and backends is None else PoolConfig
    trl = find_trl()
    settings = ClientSettings(
        config=settings_of() if config is None else config,
        backends=None if servers is None else ",".join(address.url for address in parse_backends(servers)),
        scorers=trl.has_generation_class,
    )
    trl.warn_if_untested()
    if _active is not None:
        _active.undo()
    patch = TrlPatch(trl, settings, sync_retries, provisional=provisional)
    _active = patch
    try:
        patch._apply()
    except BaseException:
        patch.undo()
        raise
    return patch


def unpatch_trl() -> None:
    """Undoes the patch that is in force; without one, nothing."""
    if _active is not None:
        _active.undo()


def _noting_url(init_vllm: Callable[..., None], trained: set[str]) -> Callable[..., None]:
    """Wraps `VLLMGeneration._init_vllm`, which runs on every rank, to learn the URL of the trained model's server."""

    @functools.wraps(init_vllm)
    def note_and_init(generation: Any, *args: Any, **kwargs: Any) -> None:
        if generation.mode == "server":
            trained.add(generation.server_base_url or f"http://{generation.server_host}:{generation.server_port}")
        init_vllm(generation, *args, **kwargs)

    return note_and_init
