"""Lets a trainer's walk over its parameters come to its end, whatever the client meets on the way.

TRL pushes its weights from inside a walk whose steps are collectives over the training ranks, and which begins with a
merge of PEFT adapters and ends with their unmerge. An exception in the middle leaves the other ranks in a collective
and the adapters merged. So it is kept here, what follows is dropped, and it is raised where the walk is over: in
`reset_prefix_cache`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Walk:
    """One walk over the parameters: its first error, and whether it came to its end."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.ended = False

    def attempt(self, call: Callable[..., Any], *args: Any) -> None:
        """Calls; the first error is kept."""
        try:
            call(*args)
        except Exception as error:
            if self.error is None:
                self.error = error


class WalkGuard:
    """A class to put before a client in a list of bases: what the client raises inside [`walking`] is kept.

    The client's own `deferred_update_errors()` is entered as well. It keeps `WeightSyncError` only, but it knows what
    else has to be done about one.
    """

    _walk: Walk | None = None

    @contextlib.contextmanager
    def walking(self) -> Iterator[Walk]:
        """Inside it no update raises; `reset_prefix_cache` raises the first error that there was."""
        deferred = getattr(self, "deferred_update_errors", contextlib.nullcontext)
        with deferred():
            self._walk = walk = Walk()
            try:
                yield walk
            finally:
                self._walk = None

    def update_named_param(self, name: str, weights: Any) -> None:
        parent: Any = super()
        walk = self._walk
        if walk is None:
            parent.update_named_param(name, weights)
        elif walk.error is None:
            walk.attempt(parent.update_named_param, name, weights)

    def update_named_params(self, metadata: Any, named_params: Iterable[tuple[str, Any]]) -> None:
        parent: Any = super()
        walk = self._walk
        if walk is None:
            parent.update_named_params(metadata, named_params)
            return
        steps = _Steps(named_params)
        if walk.error is None:
            walk.attempt(parent.update_named_params, metadata, steps)
        if steps.error is not None:  # the trainer's own failure: there is no end to go on to
            raise steps.error
        for _ in steps:
            pass

    @contextlib.contextmanager
    def weight_update(self) -> Iterator[None]:
        parent: Any = super()
        walk = self._walk
        if walk is None:
            with parent.weight_update():
                yield
            return
        block = contextlib.ExitStack()
        if walk.error is None:
            walk.attempt(lambda: block.enter_context(parent.weight_update()))
        try:
            yield
        except BaseException as error:
            block.__exit__(type(error), error, error.__traceback__)
            raise
        # A block in which something was dropped must end as one that failed, or it would be published.
        failed = walk.error
        if failed is None:
            walk.attempt(block.close)
        else:
            walk.attempt(block.__exit__, type(failed), failed, failed.__traceback__)

    def reset_prefix_cache(self) -> None:
        parent: Any = super()
        walk = self._walk
        if walk is not None:
            walk.ended = True
            if walk.error is not None:
                raise walk.error
        parent.reset_prefix_cache()


class _Steps:
    """An iterator that remembers whether a step of its own has failed."""

    def __init__(self, steps: Iterable[tuple[str, Any]]) -> None:
        self._steps = iter(steps)
        self.error: Exception | None = None

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> tuple[str, Any]:
        try:
            return next(self._steps)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise
