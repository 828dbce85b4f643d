"""What vLLM loads in each of its processes when this package is installed (entry point `vllm.general_plugins`).

It must be quick, do its work any number of times, and never raise: vLLM would not start.
"""

from __future__ import annotations

import logging
from typing import Final

from . import stand_in

logger = logging.getLogger(__name__)

BACKEND: Final = "gloo"
_ENGINE_MODULE: Final = f"{__package__}.engine"


def register() -> None:
    """Makes `--weight-transfer-config '{"backend": "gloo"}'` work, and switches on the CPU stand-in if asked for."""
    try:
        _register_engine()
        if stand_in.asked_for():
            stand_in.install()
    except Exception:
        logger.exception("The vLLM plug-in of trl_pool could not be set up; vLLM goes on without it")


def _register_engine() -> None:
    try:
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        logger.debug("This vLLM has no weight transfer engines; the gloo engine is not registered")
        return
    if not hasattr(WeightTransferEngine, "start_weight_update"):
        logger.debug("This vLLM's weight transfer engines are of an older kind; the gloo engine is not registered")
        return
    if BACKEND not in WeightTransferEngineFactory._registry:
        # By name: its module, and torch with it, is imported only in the workers, and only when it is asked for.
        WeightTransferEngineFactory.register_engine(BACKEND, _ENGINE_MODULE, "GlooWeightTransferEngine")
