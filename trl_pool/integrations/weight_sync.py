"""A trainer's weight sync, made repeatable: all ranks learn how it went on the main process and repeat it together.

TRL calls its sync on every rank: the main process pushes, the others take part in the collectives that gather the
parameters. If only the main process knows that a server was lost, it cannot repeat anything, since a second walk over
the parameters needs the others. So after each walk the main process broadcasts one small object.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import WeightSyncError
from .parameter_walk import Walk, WalkGuard

logger = logging.getLogger(__name__)

SYNC_METHODS = ("sync_weights", "_move_model_to_vllm")
"""What TRL calls it: of `VLLMGeneration` since 0.28; of the trainers themselves before, and of online DPO (and 0.28's
GOLD) still."""

# accelerate's distributed types under which a walk over the parameters consists of collectives (DeepSpeed's stage 3).
_SHARDED = frozenset({"DEEPSPEED", "FSDP", "MEGATRON_LM"})


@dataclass(frozen=True)
class Verdict:
    """What the main process tells the others after a walk.

    Args:
        error (`Exception`, *optional*): How it failed, in a form that can be sent.
        repeat (`bool`, *optional*, defaults to `False`): Whether all ranks do it once more.
    """

    error: Exception | None = None
    repeat: bool = False


def repeatable(sync: Callable[..., None], retries: int) -> Callable[..., None]:
    """Wraps a sync method of a trainer or of `VLLMGeneration`. In other modes than `"server"` it does what it did.

    Only [`WeightSyncError`] is repeated. In the end every rank raises: the main process its own error, the others a
    copy of it.

    Args:
        sync (`Callable`): The method; its object has `accelerator`, `model`, `mode` or `vllm_mode`, and on the main
            process `vllm_client`.
        retries (`int`): How often it is repeated at most.
    """

    @functools.wraps(sync)
    def sync_and_tell(trainer: Any, *args: Any, **kwargs: Any) -> None:
        mode = trainer.vllm_mode if hasattr(trainer, "vllm_mode") else trainer.mode
        if mode != "server":
            return sync(trainer, *args, **kwargs)
        accelerator = trainer.accelerator
        attempt = 0
        while True:  # the main process says when it is enough
            attempt += 1
            failure, in_step = _walk_once(trainer, functools.partial(sync, trainer, *args, **kwargs))
            if failure is not None and not in_step:
                # The others are in a collective of the walk. A broadcast now would be taken for a part of it.
                raise failure
            verdict = _tell(accelerator, _judge(failure, last=attempt > retries), failure)
            if failure is not None and not (verdict.repeat and isinstance(failure, WeightSyncError)):
                raise failure
            if verdict.error is None:
                return None
            if not verdict.repeat:
                verdict.error.add_note(f"This was on the main process; process {accelerator.process_index} waited.")
                raise verdict.error
            if accelerator.is_main_process:
                logger.warning(
                    "Weight sync failed, attempt %d of %d; all ranks repeat it: %s",
                    attempt,
                    retries + 1,
                    verdict.error,
                )

    return sync_and_tell


def _walk_once(trainer: Any, sync: Callable[[], None]) -> tuple[Exception | None, bool]:
    """One pass of the sync on this rank.

    Returns:
        `tuple[Exception | None, bool]`: How it failed, and whether this rank is in step with the others: they are at
        the end of the walk, or will get there without it.
    """
    model = trainer.model
    merged_before = _merged(model)
    sharded = _is_sharded(trainer.accelerator)
    walk: Walk | None = None
    try:
        with _walking(trainer) as walk:
            sync()
    except BaseException as error:
        if not merged_before and not sharded and _merged(model):  # where it is sharded, that is a collective too
            model.unmerge_adapter()
        if not isinstance(error, Exception):  # Ctrl-C, exit: the launcher ends the others
            raise
        return error, not sharded or (walk is not None and walk.ended)
    return None, True


def _walking(trainer: Any) -> contextlib.AbstractContextManager[Walk]:
    # A client that was made before the patch is TRL's own. It raises nothing that would be repeated, but the other
    # ranks cannot know, so the rest is the same for it.
    if trainer.accelerator.is_main_process and isinstance(trainer.vllm_client, WalkGuard):
        return trainer.vllm_client.walking()
    return contextlib.nullcontext(Walk())


def _is_sharded(accelerator: Any) -> bool:
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "DEEPSPEED":
        return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)
    return kind in _SHARDED


def _merged(model: Any) -> bool:
    """Whether a model has PEFT adapters that are merged into its weights now."""
    if not hasattr(model, "unmerge_adapter"):
        return False
    return any(getattr(module, "merged", False) is True for module in model.modules())


def _judge(failure: Exception | None, *, last: bool) -> Verdict:
    if failure is None:
        return Verdict()
    if not isinstance(failure, WeightSyncError):
        return Verdict(_of_main_process(f"raised {type(failure).__name__}: {failure}"))
    try:
        pickle.dumps(failure)
    except Exception:  # whatever somebody has put into it
        failure = _of_main_process(f"raised {failure}")
    return Verdict(failure, repeat=not last)


def _of_main_process(result: str) -> WeightSyncError:
    return WeightSyncError("weight sync", {"the main process": result})


def _tell(accelerator: Any, verdict: Verdict, failure: Exception | None) -> Verdict:
    """Gives every rank the main process's verdict."""
    if accelerator.num_processes == 1:
        return verdict
    from accelerate.utils import broadcast_object_list

    told = [verdict]
    try:
        broadcast_object_list(told, from_process=0)
    except Exception as error:
        if failure is None:
            raise
        failure.add_note(f"The other ranks could not be told of it: {error}")
        raise failure from error
    return told[0]
