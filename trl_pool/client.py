"""The pool, synchronous: TRL's `VLLMClient` as a training script sees it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeVar

import anyio
import httpx
from anyio.from_thread import BlockingPortal

from .at_exit import post_all
from .config import PoolConfig
from .errors import WeightSyncError
from .fleet import CLOSE_SECONDS, DEFAULT_HOST, DEFAULT_PORT, PoolStatistics, describe
from .lifetime import Lifetime
from .pool import DEFAULT_GROUP_PORT, AsyncVLLMClientPool
from .provenance import RolloutReport
from .training import UpdateFeed, caller, described, parameters_of, tries
from .weights.transport import JointTransport, WeightTransport

logger = logging.getLogger(__name__)

T = TypeVar("T")


class VLLMClientPool:
    """Many vLLM servers in the place of TRL's `VLLMClient`, of either generation.

    Every method forwards to an [`AsyncVLLMClientPool`] on an event loop in a thread of its own, where arguments,
    results and errors are described.

    Args:
        base_url (`str` or `Iterable[str]`, *optional*):
            One or more servers' URLs, as a list or separated by commas. Without it `host` and `server_port` if given,
            otherwise the environment variable `BACKENDS`.
        host (`str`, *optional*, defaults to `"0.0.0.0"`): Address of a single server.
        server_port (`int`, *optional*, defaults to `8000`): Port of a single server.
        group_port (`int`, *optional*, defaults to `51216`):
            Port of the weight update group. Servers that share a host get consecutive ones.
        connection_timeout (`float`, *optional*, defaults to `0.0`):
            Seconds to wait for the servers to be up.
        config ([`PoolConfig`], *optional*):
            Settings; the defaults, or the environment's if the backends came from `BACKENDS`.
        transport (`httpx.AsyncBaseTransport`, *optional*):
            Used instead of sockets, `httpx.MockTransport` for example: a training script can be tested without any
            server.
        session_id (`str`, *optional*): Default of the calls' `session_id`.
        api_key (`str`, *optional*): The servers' `--api-key`; `config.backend_api_key` otherwise.
        weight_transport ([`WeightTransport`] or [`JointTransport`], *optional*):
            Moves tensors to the servers, instead of NCCL or gloo.

    Raises:
        `requests.ConnectionError`: when fewer than `config.min_backends` servers are up in time.

    Example:

    ```python
    >>> from trl_pool import VLLMClientPool

    >>> client = VLLMClientPool("http://n1:8000,http://n2:8000", connection_timeout=240)
    >>> client.generate(["Hello, AI!", "Tell me a joke"], n=8, max_tokens=256)
    ```
    """

    def __init__(
        self,
        base_url: str | Iterable[str] | None = None,
        host: str = DEFAULT_HOST,
        server_port: int = DEFAULT_PORT,
        group_port: int = DEFAULT_GROUP_PORT,
        connection_timeout: float = 0.0,
        *,
        config: PoolConfig | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        session_id: str | None = None,
        api_key: str | None = None,
        weight_transport: WeightTransport | JointTransport | None = None,
    ) -> None:
        self._deferring = False
        self._deferred: WeightSyncError | None = None
        self._lifetime = Lifetime(type(self).__name__)
        self._portal, self._thread = _start_loop()
        try:
            self._pool = self._portal.call(
                lambda: AsyncVLLMClientPool(
                    base_url,
                    host,
                    server_port,
                    group_port,
                    config=config,
                    transport=transport,
                    session_id=session_id,
                    api_key=api_key,
                    weight_transport=weight_transport,
                )
            )
            self.base_url = ",".join(backend.url for backend in self.statistics().backends)
            self.group_port = group_port
            _at_exit.add(self)
            self.check_server(connection_timeout)
        except BaseException:
            self.close()
            raise

    # Life

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        # At interpreter exit modules may be gone already; then there is nothing left to close either.
        with contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        if self._lifetime.over:
            return f"<{type(self).__name__} {'closed' if self._lifetime.closed else 'of another process'}>"
        return describe(type(self).__name__, self.statistics())

    def close(self) -> None:
        """Closes communicators and connections, in a few seconds at most. A second time, and in a forked child,
        nothing."""
        if self._lifetime.over:
            return
        self._lifetime.close()
        _at_exit.discard(self)
        pool = getattr(self, "_pool", None)
        if threading.current_thread() is self._thread:  # collected as garbage in there: it cannot wait for itself
            task = asyncio.get_running_loop().create_task(_close_from_within(pool, self._portal))
            _closing.add(task)
            task.add_done_callback(_closing.discard)
            return
        try:
            if pool is not None:
                self._portal.start_task_soon(pool.aclose).result(2 * CLOSE_SECONDS)
        finally:
            self._portal.call(self._portal.stop, True)
            self._thread.join(CLOSE_SECONDS)

    def _close_at_exit(self) -> None:
        """Closes communicators without the event loop: it cannot even resolve names any more."""
        if self._lifetime.over:
            return
        self._lifetime.close()
        post_all(self._pool.closing_urls(), seconds=CLOSE_SECONDS)

    def _call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        """Runs a coroutine function on the loop; an interrupt (Ctrl-C) cancels it there and returns at once."""
        self._lifetime.check()
        token = caller.set(threading.get_ident())
        try:
            future: Future[T] = self._portal.start_task_soon(lambda: function(*args, **kwargs))
            try:
                return future.result()
            except BaseException:
                future.cancel()
                raise
        finally:
            caller.reset(token)

    # Forwarded

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """See [`AsyncVLLMClientPool.check_server`]."""
        self._call(self._pool.check_server, total_timeout, retry_interval)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        images: Sequence[Any] | None = None,
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        features: Sequence[Mapping[str, Any] | None] | None = None,
        session_id: str | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """See [`AsyncVLLMClientPool.generate`]."""
        return self._call(
            self._pool.generate,
            prompts,
            images,
            n,
            repetition_penalty,
            temperature,
            top_p,
            top_k,
            min_p,
            max_tokens,
            logprobs,
            structured_outputs_regex,
            generation_kwargs,
            features=features,
            session_id=session_id,
            progress=progress,
        )

    def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        max_concurrent_requests: int = 64,
        *,
        session_id: str | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """See [`AsyncVLLMClientPool.chat`]."""
        return self._call(
            self._pool.chat,
            messages,
            n,
            repetition_penalty,
            temperature,
            top_p,
            top_k,
            min_p,
            max_tokens,
            logprobs,
            structured_outputs_regex,
            generation_kwargs,
            chat_template_kwargs,
            tools,
            chat_template,
            max_concurrent_requests,
            session_id=session_id,
            progress=progress,
        )

    def get_sequence_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        top_logprobs: int = 100,
        temperature: float = 1.0,
        use_binary: bool = True,
        chunk_size: int = 0,
        max_concurrent_requests: int = 4,
        *,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """See [`AsyncVLLMClientPool.get_sequence_logprobs`]."""
        return self._call(
            self._pool.get_sequence_logprobs,
            sequences,
            prompt_lengths,
            top_logprobs,
            temperature,
            use_binary,
            chunk_size,
            max_concurrent_requests,
            progress=progress,
        )

    def image_features(
        self, images: Sequence[Sequence[Any] | None], max_concurrent_requests: int = 64
    ) -> list[dict[str, Any] | None]:
        """See [`AsyncVLLMClientPool.image_features`]."""
        return self._call(self._pool.image_features, images, max_concurrent_requests)

    def get_server_info(self) -> dict[str, Any]:
        """See [`AsyncVLLMClientPool.get_server_info`]."""
        return self._call(self._pool.get_server_info)

    @property
    def model(self) -> str | None:
        """What the servers call the model; `None` of `trl vllm-serve`, which does not say."""
        self._lifetime.check()
        return self._portal.call(lambda: self._pool.model)

    @property
    def last_report(self) -> RolloutReport | None:
        """Where the last call's answers come from: per prompt the backend, its weights, and what failed before."""
        return self._pool.last_report

    def get_world_size(self) -> int:
        """See [`AsyncVLLMClientPool.get_world_size`]."""
        return self._call(self._pool.get_world_size)

    def reset_prefix_cache(self) -> None:
        """See [`AsyncVLLMClientPool.reset_prefix_cache`]. Raises what `deferred_update_errors` has kept."""
        kept, self._deferred = self._deferred, None
        if kept is not None:
            raise kept
        self._call(self._pool.reset_prefix_cache)

    def init_communicator(self, device: Any = 0) -> None:
        """See [`AsyncVLLMClientPool.init_communicator`]."""
        self._call(self._pool.init_communicator, device)

    # Weight updates: the parameters are read here, on the caller's thread; the rest is forwarded

    def update_named_param(self, name: str, weights: Any) -> None:
        """See [`AsyncVLLMClientPool.update_named_param`]."""
        if self._deferred is None:
            with self._update_errors():
                self._call(self._pool.update_named_param, name, weights)

    def update_named_params(
        self, metadata: Sequence[tuple[str, str, Sequence[int]]], named_params: Iterable[tuple[str, Any]]
    ) -> None:
        """See [`AsyncVLLMClientPool.update_named_params`]."""
        self._send_all(metadata, named_params)

    def _send_all(
        self,
        metadata: Sequence[tuple[str, str, Sequence[int]]],
        named_params: Iterable[tuple[str, Any]],
        *,
        publish: bool = True,
    ) -> None:
        feed: UpdateFeed | None = None
        failure: Exception | None = self._deferred
        if failure is None:
            try:
                feed = self._call(self._pool.open_feed, metadata, publish=publish)
            except Exception as error:
                failure = error
        try:
            for name, tensor in named_params:
                if failure is None and feed is not None:
                    try:
                        self._feed(feed, name, tensor)
                    except Exception as error:
                        failure = error
        except BaseException as error:
            if feed is not None:
                self._call(feed.abort, f"{type(error).__name__} in the middle of it")
            raise
        if failure is self._deferred is not None:
            return
        with self._update_errors():
            if failure is None and feed is not None:
                self._call(feed.close)
                return
            if feed is not None:
                self._call(feed.abort, str(failure))
            if failure is not None:
                raise failure

    def _feed(self, feed: UpdateFeed, name: str, tensor: Any) -> None:
        if feed.stream is not None:
            feed.stream.put(name, tensor)
        else:
            self._call(feed.put, name, tensor)

    def update_model_params(self, model: Any) -> None:
        """See [`AsyncVLLMClientPool.update_model_params`]."""
        metadata = described(model)
        if not self._call(self._one_group):
            self._send_all(metadata, parameters_of(model), publish=False)
            return
        for left in tries(self._pool.config.sync_retries):
            try:
                self.update_named_params(metadata, parameters_of(model))
                return
            except WeightSyncError as error:
                if not left:
                    raise
                logger.warning("%s; trying again, %d tries left", error, left)

    async def _one_group(self) -> bool:
        return self._pool.one_group

    @contextlib.contextmanager
    def weight_update(self) -> Iterator[None]:
        """See [`AsyncVLLMClientPool.weight_update`]."""
        self._call(self._pool.enter_update)
        try:
            yield
        except BaseException as error:
            self._call(self._pool.leave_update, error)
            raise
        self._call(self._pool.leave_update, None)

    @contextlib.contextmanager
    def deferred_update_errors(self) -> Iterator[None]:
        """Lets `update_named_param(s)` fail quietly inside it, so that a trainer's walk over its parameters, which may
        be collectives over all ranks, comes to its end.

        The first [`WeightSyncError`] is kept, further tensors are dropped, and `reset_prefix_cache()`, or else the end
        of the block, raises it.
        """
        self._deferring, self._deferred = True, None
        try:
            yield
        finally:
            self._deferring = False
        kept, self._deferred = self._deferred, None
        if kept is not None:
            raise kept

    @contextlib.contextmanager
    def _update_errors(self) -> Iterator[None]:
        try:
            yield
        except WeightSyncError as error:
            if not self._deferring:
                raise
            self._deferred = error

    def close_communicator(self) -> None:
        """See [`AsyncVLLMClientPool.close_communicator`]."""
        self._call(self._pool.close_communicator)

    def load_lora_adapter(self, /, lora_name: str, lora_path: str, **options: Any) -> None:
        """See [`AsyncVLLMClientPool.load_lora_adapter`]."""
        self._call(self._pool.load_lora_adapter, lora_name, lora_path, **options)

    def unload_lora_adapter(self, lora_name: str) -> None:
        """See [`AsyncVLLMClientPool.unload_lora_adapter`]."""
        self._call(self._pool.unload_lora_adapter, lora_name)

    def add_backend(self, url: str) -> str:
        """See [`AsyncVLLMClientPool.add_backend`]."""
        return self._call(self._pool.add_backend, url)

    def drain_backend(self, name: str, *, timeout: float | None = None) -> None:
        """See [`AsyncVLLMClientPool.drain_backend`]."""
        self._call(self._pool.drain_backend, name, timeout=timeout)

    def remove_backend(self, name: str, drain: bool = True, *, timeout: float | None = None) -> None:
        """See [`AsyncVLLMClientPool.remove_backend`]."""
        self._call(self._pool.remove_backend, name, drain, timeout=timeout)

    def statistics(self) -> PoolStatistics:
        """See [`AsyncVLLMClientPool.statistics`]."""
        self._lifetime.check()
        return self._portal.call(self._pool.statistics)  # on the loop, where nothing changes meanwhile


def _start_loop() -> tuple[BlockingPortal, threading.Thread]:
    """An event loop in a daemon thread. (anyio's own helper is a generator; collected at interpreter exit, or in a
    forked child, it would wait for a thread that is no more.)"""
    ready: Future[BlockingPortal] = Future()

    async def main() -> None:
        async with BlockingPortal() as portal:
            ready.set_result(portal)
            await portal.sleep_until_stopped()

    thread = threading.Thread(target=anyio.run, args=(main,), name="trl-pool", daemon=True)
    thread.start()
    return ready.result(), thread


_closing: set[asyncio.Task[None]] = set()


async def _close_from_within(pool: AsyncVLLMClientPool | None, portal: BlockingPortal) -> None:
    if pool is not None:
        await pool.aclose()
    await portal.stop(True)


_at_exit: weakref.WeakSet[VLLMClientPool] = weakref.WeakSet()


@atexit.register
def _close_all_at_exit() -> None:
    for pool in list(_at_exit):
        pool._close_at_exit()
