"""What stands in TRL for its `VLLMClient`: the pool, with TRL's constructor and the settings of the patch."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..client import VLLMClientPool
from ..config import PoolConfig
from ..fleet import DEFAULT_HOST, DEFAULT_PORT
from ..pool import DEFAULT_GROUP_PORT
from .parameter_walk import WalkGuard

logger = logging.getLogger(__name__)

DDP_SHARE = 0.9
"""Part of the process group's time-out that a call may take. The rest is for what the trainer does around it."""


@dataclass(frozen=True)
class ClientSettings:
    """What a patch gives to the clients that TRL makes.

    Args:
        config ([`PoolConfig`]): The pool's settings.
        backends (`str`, *optional*): Servers of the trained model, comma-separated, whatever URL TRL gives.
        scorers (`bool`): Whether this TRL also makes clients for other models' servers.
        trained (`set[str]`): URLs that TRL takes for the trained model's; filled as they become known.
    """

    config: PoolConfig
    backends: str | None
    scorers: bool
    trained: set[str] = field(default_factory=set)

    def servers(self, base_url: str | None, group_port: int | None) -> str | None:
        """Which URLs a client gets.

        TRL's trainers name a group port (or know only one client) where the trained model is served. A distillation's
        teacher is asked for scores only, so it gets no group port; its servers are others, except where it is the
        trained model itself (SDFT, SDPO).
        """
        if self.backends is None:
            return base_url
        scores_only = self.scorers and base_url is not None and group_port is None and base_url not in self.trained
        return base_url if scores_only else self.backends


class TrainerClient(WalkGuard, VLLMClientPool):
    """[`VLLMClientPool`] as TRL's trainers make it. A patch derives a class with its settings from it.

    Args:
        base_url (`str`, *optional*): One or more URLs, comma-separated.
        host (`str`, *optional*, defaults to `"0.0.0.0"`): Address of a single server.
        server_port (`int`, *optional*, defaults to `8000`): Port of a single server.
        group_port (`int`, *optional*, defaults to `51216`): Port of the weight update group.
        connection_timeout (`float`, *optional*, defaults to `0.0`): Seconds to wait for the servers to be up.
        pool_arguments: Keyword arguments of [`VLLMClientPool`] that TRL does not know.
    """

    settings: ClassVar[ClientSettings]

    def __init__(
        self,
        base_url: str | None = None,
        host: str = DEFAULT_HOST,
        server_port: int = DEFAULT_PORT,
        group_port: int | None = None,
        connection_timeout: float = 0.0,
        **pool_arguments: Any,
    ) -> None:
        settings = self.settings
        servers = settings.servers(base_url, group_port)
        if servers != base_url:
            logger.info("Backends %s are used instead of %s", servers, base_url or f"http://{host}:{server_port}")
        pool_arguments["config"] = within_ddp_timeout(
            pool_arguments.get("config") or settings.config, process_group_timeout()
        )
        super().__init__(
            servers,
            host,
            server_port,
            DEFAULT_GROUP_PORT if group_port is None else group_port,
            connection_timeout,
            **pool_arguments,
        )


def within_ddp_timeout(config: PoolConfig, ddp_timeout: float | None) -> PoolConfig:
    """Lowers `total_timeout` so that a call ends before the ranks that wait for it give up.

    Args:
        config ([`PoolConfig`]): The settings.
        ddp_timeout (`float`, *optional*): Seconds after which a collective fails; `None` where there is none.
    """
    if ddp_timeout is None or config.total_timeout <= DDP_SHARE * ddp_timeout:
        return config
    limit = DDP_SHARE * ddp_timeout
    # A value that somebody has set is worth a warning; the default is not.
    level = logging.WARNING if "total_timeout" in config.model_fields_set else logging.INFO
    logger.log(
        level,
        "total_timeout lowered from %g s to %g s: the other ranks wait %g s in a collective (ddp_timeout), then they "
        "end the job",
        config.total_timeout,
        limit,
        ddp_timeout,
    )
    return config.model_copy(update={"total_timeout": limit})


def process_group_timeout() -> float | None:
    """Seconds that the default process group's collectives wait for a rank.

    Returns:
        `float`, *optional*: The shortest of its backends'; `None` without other ranks, or where torch does not tell.
    """
    torch = sys.modules.get("torch")
    distributed: Any = getattr(torch, "distributed", None)
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_world_size() == 1:
        return None
    try:
        # There is no public way to ask.
        group = distributed.group.WORLD
        options = [group._get_backend(device).options for device in group._device_types]
        return min((option._timeout.total_seconds() for option in options), default=None)
    except (AttributeError, RuntimeError) as error:
        logger.info("The process group does not tell its time-out (%s); total_timeout is left as it is", error)
        return None
