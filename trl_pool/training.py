"""A fleet whose weights are a trainer's: update groups, updates, versions, for both dialects."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import anyio.to_thread
import msgspec

from .backend import Backend
from .errors import (
    AttemptError,
    ControlResult,
    Outcome,
    RequestRejectedError,
    WeightSyncError,
)
from .exchange import judge
from .grouping import GroupedFleet
from .identity import Identity
from .lifetime import guarded
from .weights.ahead import Run
from .weights.coordinator import require_all
from .weights.stream import TensorStream

logger = logging.getLogger(__name__)

caller: contextvars.ContextVar[object] = contextvars.ContextVar("trl_pool_caller", default=None)
"""Who calls: a weight update may be ended by a `generate` of whoever makes it, and by nobody else's. The synchronous
face sets it to the calling thread; otherwise it is the task that makes the update, and tasks it starts."""


def _me() -> object:
    if caller.get() is None:
        caller.set(object())
    return caller.get()


class UpdateFeed:
    """Takes the tensors of one update, on whatever thread reads them.

    Args:
        fleet ([`TrainedFleet`]): Whose update.
        stream ([`TensorStream`], *optional*): Where tensors go that were all announced at once (`vllm` dialect);
            its `put` blocks and belongs on the thread that reads the tensors.
        run ([`Run`], *optional*): Tensors that are announced a few at a time, ahead of their turn (`trl` dialect).
        publish (`bool`, *optional*, defaults to `True`): Whether `close` ends the update, where there is no
            `weight_update` around it.
    """

    def __init__(
        self, fleet: TrainedFleet, stream: TensorStream | None = None, run: Run | None = None, *, publish: bool = True
    ) -> None:
        self._fleet, self.stream, self._run, self._publish = fleet, stream, run, publish

    async def put(self, name: str, tensor: Any) -> None:
        """Takes one tensor.

        Raises:
            [`WeightSyncError`]: when it can reach too few servers.
            `ValueError`: when it is not the one that was announced.
        """
        if self.stream is not None:
            await anyio.to_thread.run_sync(self.stream.put, name, tensor)
        elif self._run is not None:
            await self._fleet.separate.send(self._run, name, tensor)
        else:
            await self._fleet.announce(name, tensor)

    async def close(self) -> None:
        """There are no more tensors: waits for all to arrive, and publishes unless a `weight_update` goes on.

        Raises:
            [`WeightSyncError`]: when too few servers got all of them.
            `ValueError`: when fewer came than were announced.
        """
        try:
            if self.stream is not None:
                await anyio.to_thread.run_sync(self.stream.end)
            await self._fleet.end_feed(self.stream, self._run, publish=self._publish)
        except BaseException as error:
            await self.abort(f"{type(error).__name__} at its end")
            raise

    async def abort(self, why: str) -> None:
        """There will be no more tensors, and what was sent counts for nothing."""
        if self.stream is not None:
            self.stream.fail(why)
        await self._fleet.abort_feed(self.stream, why)


class TrainedFleet(GroupedFleet):
    """A fleet that takes weights and adapters. Its arguments are [`GroupedFleet`]'s."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapters: dict[str, bytes] = {}
        self._in_block: object = None

    # Adapters

    @guarded
    async def load_lora_adapter(self, /, lora_name: str, lora_path: str, **options: Any) -> None:
        """Loads a LoRA adapter into every `vllm serve` (started with `--enable-lora` and
        `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`), and later into those that come back, before they serve.

        A request names it as its model: `generation_kwargs={"model": lora_name}`.

        Args:
            lora_name (`str`): Its name.
            lora_path (`str`): Where the servers find it.
            options: Further fields of the request, `load_inplace` for one.

        Raises:
            [`ControlError`]: when a server did not take it; the others have it.
        """
        body = msgspec.json.encode({"lora_name": lora_name, "lora_path": lora_path, **options})
        require_all(f"Loading adapter {lora_name!r}", await self.broadcast_adapter(lora_name, body, load=True))

    @guarded
    async def unload_lora_adapter(self, lora_name: str) -> None:
        """Takes a LoRA adapter out of every server.

        Args:
            lora_name (`str`): Its name.

        Raises:
            [`ControlError`]: when a server did not do so.
        """
        body = msgspec.json.encode({"lora_name": lora_name})
        require_all(f"Unloading adapter {lora_name!r}", await self.broadcast_adapter(lora_name, body, load=False))

    async def broadcast_adapter(self, lora_name: str, body: bytes, *, load: bool) -> dict[str, ControlResult]:
        """Loads or unloads an adapter everywhere, and remembers it for servers that come back."""
        if not load:
            self._adapters.pop(lora_name, None)
        path = "/v1/load_lora_adapter" if load else "/v1/unload_lora_adapter"
        results = await self.relay.everywhere(path, body)
        if load and any(result.ok for result in results.values()):
            self._adapters[lora_name] = body
        return results

    async def restore(self, backend: Backend, identity: Identity) -> None:
        """Loads the adapters into a server whose process is new."""
        if identity.dialect != "vllm":
            return
        for name, body in self._adapters.items():
            answer = await backend.exchange.once(
                "POST", "/v1/load_lora_adapter", body, timeout=self.config.control_timeout
            )
            try:
                judge(backend.url, answer)
            except RequestRejectedError as error:
                if b"already been loaded" in answer.body:  # the same process after all
                    continue
                problem = f"could not load adapter {name!r} again: {error}"
                raise AttemptError(backend.url, Outcome.REJECTED, problem, status=error.status) from error
            logger.info("Loaded adapter %r into %s again", name, backend.url)

    # Updates

    @guarded
    async def update_named_param(self, name: str, weights: Any) -> None:
        """Sends one parameter to every server of the group.

        On `vllm serve` that is an update of its own, unless inside [`~TrainedFleet.weight_update`]. On a `trl` server
        the first one closes the gate for requests and waits for those that are out;
        [`~TrainedFleet.reset_prefix_cache`] or the next generation ends the update.

        A server that fails drops out and is out of sync; the update goes on with the others where it can.

        Args:
            name (`str`): Name of the parameter.
            weights (`torch.Tensor`): Its new value.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` servers are left.
        """
        if self.one_group:
            await self.update_named_params([_described(name, weights)], iter([(name, weights)]))
        else:
            await self.announce(name, weights)

    async def announce(self, name: str, weights: Any) -> None:
        """Sends one parameter to every server of a `trl` fleet."""
        await self._gather_separate()
        dtype, shape = str(weights.dtype), [int(size) for size in weights.shape]
        body = msgspec.json.encode({"name": name, "dtype": dtype, "shape": shape})
        await self.separate.announce(name, body, tensor=weights, owner=_me())

    async def _gather_separate(self) -> None:
        """Takes in, before an update of a `trl` fleet begins, who is there again."""
        if not self._weights.updating and self._weights.group:
            await self._weights.somebody()
            await self._take_back()

    async def update_named_params(
        self, metadata: Sequence[tuple[str, str, Sequence[int]]], named_params: Iterable[tuple[str, Any]]
    ) -> None:
        """Sends parameters to every server, as one update unless inside [`~TrainedFleet.weight_update`].

        Args:
            metadata (`list[tuple[str, str, list[int]]]`): `(name, dtype, shape)` per parameter, in the order in which
                they come; dtypes read `"bfloat16"`.
            named_params (`Iterator[tuple[str, torch.Tensor]]`): The parameters. Read once, on this thread, and always
                to its end: its steps may be collectives.

        Raises:
            [`WeightSyncError`]: at the end, when too few servers got all of them.
            `ValueError`: when the parameters are not those of `metadata`.
        """
        await self._send_all(metadata, named_params)

    async def _send_all(
        self,
        metadata: Sequence[tuple[str, str, Sequence[int]]],
        named_params: Iterable[tuple[str, Any]],
        *,
        publish: bool = True,
    ) -> None:
        feed: UpdateFeed | None = None
        failure: Exception | None = None
        try:
            feed = await self.open_feed(metadata, publish=publish)
        except Exception as error:
            failure = error
        try:
            for name, tensor in named_params:
                if feed is not None and failure is None:
                    try:
                        await feed.put(name, tensor)
                    except Exception as error:
                        failure = error
        except BaseException as error:
            if feed is not None:
                await feed.abort(f"{type(error).__name__} in the middle of it")
            raise
        if feed is not None and failure is None:
            await feed.close()
            return
        if feed is not None:
            await feed.abort(str(failure))
        if failure is not None:
            raise failure

    async def update_model_params(self, model: Any) -> None:
        """Sends every parameter of a model. On `vllm serve` an update that failed is repeated over the servers that
        are left, up to `config.sync_retries` times. On `trl` servers those that fail drop out, and the update goes on
        until [`~TrainedFleet.reset_prefix_cache`] or the next generation ends it.

        Args:
            model (`torch.nn.Module`): The model.

        Raises:
            [`WeightSyncError`]: when the last try failed, too.
        """
        metadata = described(model)
        if not self.one_group:
            await self._send_all(metadata, parameters_of(model), publish=False)
            return
        for left in tries(self.config.sync_retries):
            try:
                await self.update_named_params(metadata, parameters_of(model))
                return
            except WeightSyncError as error:
                if not left:
                    raise
                logger.warning("%s; trying again, %d tries left", error, left)

    @contextlib.asynccontextmanager
    async def weight_update(self) -> AsyncIterator[None]:
        """Makes one update, with one version, of everything that is sent inside it.

        When its block raises, nothing is published, and whoever took part is out of sync. Generating inside raises.
        """
        await self.enter_update()
        try:
            yield
        except BaseException as error:
            await self.leave_update(error)
            raise
        await self.leave_update(None)

    @guarded
    async def enter_update(self) -> None:
        """Begins what [`~TrainedFleet.weight_update`] is."""
        if self._in_block is not None:
            raise WeightSyncError("weight_update() inside another one; end that first", self._weights.everybody_says())
        owner = _me()
        if self.one_group:
            await self.joint.start(owner)
        self._in_block = owner

    @guarded
    async def leave_update(self, error: BaseException | None) -> None:
        """Ends it; `error` is what its block raised."""
        self._in_block = None
        if error is not None:
            await self._abandon(f"{type(error).__name__} in its block")
        elif self.one_group:
            await self.joint.finish()
        elif self._weights.updating:
            await self.separate.reset_caches()

    @guarded
    async def open_feed(
        self, metadata: Sequence[tuple[str, str, Sequence[int]]], *, publish: bool = True
    ) -> UpdateFeed:
        """Begins to send parameters; see [`~TrainedFleet.update_named_params`].

        Args:
            metadata (`list[tuple[str, str, list[int]]]`): `(name, dtype, shape)` per parameter, in order.
            publish (`bool`, *optional*, defaults to `True`): Whether the end of the feed ends the update on `trl`
                servers, too.

        Raises:
            [`WeightSyncError`]: when there is nobody to send them to.
        """
        if not self.one_group:
            if not metadata:  # nothing is known beforehand
                return UpdateFeed(self, publish=publish)
            await self._gather_separate()
            return UpdateFeed(self, run=await self.separate.open_run(metadata, owner=_me()), publish=publish)
        if self._in_block is None:
            await self.joint.start(_me())
        try:
            return UpdateFeed(self, stream=await self.joint.open_stream(metadata))
        except BaseException as error:
            await self._abandon(f"{type(error).__name__} at its announcement")
            raise

    @guarded
    async def end_feed(self, stream: TensorStream | None, run: Run | None, *, publish: bool) -> None:
        """Ends what `open_feed` began."""
        if stream is not None:
            await self.joint.close_stream(stream)
        elif run is not None:
            await self.separate.end_run(run)
        if self._in_block is not None or not publish:
            return
        if stream is not None:
            await self.joint.finish()
        elif self._weights.updating:
            await self.separate.reset_caches()

    async def abort_feed(self, stream: TensorStream | None, why: str) -> None:
        """Ends what `open_feed` began, with nothing published."""
        if stream is not None:
            with contextlib.suppress(WeightSyncError):
                await self.joint.close_stream(stream)
        await self._abandon(why)

    async def _abandon(self, why: str) -> None:
        if self.one_group:
            await self.joint.abort(why)
        else:
            await self.separate.abandon(why)

    @guarded
    async def reset_prefix_cache(self) -> None:
        """Resets the servers' prefix caches. On a `trl` fleet, after `update_named_param`, it ends the update and
        publishes it; on `vllm serve` every update has done so by itself.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` servers completed an update.
            [`ControlError`]: when a server says that it failed. One that is gone has no cache.
        """
        if self.one_group:
            was_update = False
            results = await self.joint.reset_caches()
        else:
            was_update = self._weights.updating
            results = await self.separate.reset_caches()
        answered = {name: result for name, result in results.items() if result.ok or result.status is not None}
        if not was_update:
            require_all("Resetting the prefix caches", answered)

    async def before_request(self) -> None:
        """A request of whoever makes an update ends it, where it has no end of its own.

        Raises:
            [`WeightSyncError`]: inside `weight_update()`: the answer would come from nobody knows which weights.
        """
        if self._control_only or not self._weights.updating or self._weights.owner != caller.get():
            return
        if self._in_block is not None or self.one_group:
            raise WeightSyncError(
                "Generating inside weight_update() has no weights to generate with; end the block first",
                self._weights.everybody_says(),
            )
        await self.separate.reset_caches()


def tries(retries: int) -> Iterator[int]:
    """Counts down the tries that are left after each."""
    return iter(range(retries, -1, -1))


def _described(name: str, tensor: Any) -> tuple[str, str, list[int]]:
    return name, str(tensor.dtype).removeprefix("torch."), [int(size) for size in tensor.shape]


def described(model: Any) -> list[tuple[str, str, list[int]]]:
    """`(name, dtype, shape)` of every parameter of a model.

    Args:
        model (`torch.nn.Module`): The model.
    """
    return [_described(name, tensor) for name, tensor in parameters_of(model)]


def parameters_of(model: Any) -> Iterator[tuple[str, Any]]:
    """`(name, tensor)` of every parameter of a model.

    Args:
        model (`torch.nn.Module`): The model.
    """
    return ((name, parameter.data) for name, parameter in model.named_parameters())
