"""The pool, asynchronous: what TRL's `VLLMClient` can be asked, asked of a fleet."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio.to_thread
import httpx
import msgspec

from . import validation
from .backend import Backend
from .config import PoolConfig
from .dialects.base import Job
from .dialects.trl_requests import ChatRequest, GenerateRequest, SequenceLogprobsRequest
from .errors import (
    AttemptError,
    BackendMismatchError,
    InvalidRequestError,
    NoBackendAvailableError,
    RequestRejectedError,
    WeightSyncError,
)
from .exchange import judge
from .fleet import DEFAULT_HOST, DEFAULT_PORT, Fleet, resolve, resolve_backends
from .lifetime import guarded
from .media import encode_images, encode_messages, tool_schema
from .rollout import ProgressBar, Rollout, RolloutResult, Route
from .weights.coordinator import require_all
from .weights.transport import ControlOnlyTransport, GroupMember, WeightTransport

logger = logging.getLogger(__name__)

DEFAULT_GROUP_PORT = 51216

caller: contextvars.ContextVar[object] = contextvars.ContextVar("trl_pool_caller", default=None)
"""Who calls: a weight update may be ended by a `generate` of whoever makes it, and by nobody else's. The synchronous
face sets it to the calling thread; otherwise it is the task that makes the update, and tasks it starts."""


class AsyncVLLMClientPool(Fleet):
    """Many `trl vllm-serve` servers behind the methods of TRL's `VLLMClient`, for asyncio.

    Used as `async with AsyncVLLMClientPool(...) as pool:`, which waits for the servers as
    [`~AsyncVLLMClientPool.check_server`] does.

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
            Used instead of sockets, `httpx.MockTransport` for example. It is not closed by the pool.
        session_id (`str`, *optional*): Default of the calls' `session_id`.
        weight_transport ([`WeightTransport`], *optional*):
            Moves tensors to the servers. Without one only simulated servers and mocked transports can be "updated".
        clock (`Callable[[], float]`, *optional*): Monotonic seconds.
        rng (`random.Random`, *optional*): Decides ties.

    Raises:
        [`ConfigurationError`]: for addresses that make no sense.
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
        weight_transport: WeightTransport | None = None,
        control_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        addresses, from_env = resolve_backends(base_url, host, server_port)
        if config is None:
            config = PoolConfig.from_env() if from_env else PoolConfig()
        super().__init__(
            addresses,
            config,
            connection_timeout=connection_timeout,
            transport=transport,
            control_only=control_only,
            clock=clock,
            rng=rng,
        )
        self.group_port, self.session_id = group_port, session_id
        self._weight_transport = weight_transport

    # Mirrored from VLLMClient

    @guarded
    async def generate(
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
        session_id: str | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Generates completions; the prompts are spread over the servers.

        Args:
            prompts (`list[str]` or `list[list[int]]`): Texts or token ids.
            images (`list[list[PIL.Image] | None]`, *optional*): Per prompt.
            n (`int`, *optional*, defaults to `1`): Completions per prompt.
            repetition_penalty (`float`, *optional*, defaults to `1.0`): As vLLM's.
            temperature (`float`, *optional*, defaults to `1.0`): As vLLM's.
            top_p (`float`, *optional*, defaults to `1.0`): As vLLM's.
            top_k (`int`, *optional*, defaults to `0`): As vLLM's; 0 is off.
            min_p (`float`, *optional*, defaults to `0.0`): As vLLM's.
            max_tokens (`int`, *optional*, defaults to `16`): Most tokens per completion.
            logprobs (`int` or `None`, *optional*, defaults to `0`):
                Most probable tokens whose logprobs are returned besides the sampled one's; `None` for none at all.
            structured_outputs_regex (`str`, *optional*): Restricts the output.
            generation_kwargs (`dict`, *optional*): Further `SamplingParams`; they win over the arguments.
            session_id (`str`, *optional*): Keeps the request on one server; the pool's default otherwise.
            progress (`bool`, *optional*): Whether to show a progress bar; `config.progress` otherwise.

        Returns:
            `dict` with keys:
                - `prompt_ids` (`list[list[int]]`): `[prompt][token]`.
                - `completion_ids` (`list[list[int]]`): `[prompt × n][token]`, the completions of a prompt together.
                - `logprobs` (`list[list[list[float]]]` or `None`): `[prompt × n][token][k]`, descending.
                - `logprob_token_ids` (`list[list[list[int]]]` or `None`): The tokens of `logprobs`.

        Raises:
            `ValueError` ([`InvalidRequestError`]): for arguments that a server would refuse or die of.
            [`RequestRejectedError`]: when a server answered 4xx.
            `requests.ConnectionError` ([`NoBackendAvailableError`], [`RolloutError`]): when nobody could serve it.
            `requests.Timeout` ([`RolloutTimeoutError`]): after `total_timeout`.
        """
        if images:
            images = await anyio.to_thread.run_sync(encode_images, images)
        request = validation.parse(
            GenerateRequest,
            {
                "prompts": prompts,
                "images": images,
                "n": n,
                "repetition_penalty": repetition_penalty,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "max_tokens": max_tokens,
                "logprobs": logprobs,
                "structured_outputs_regex": structured_outputs_regex,
                "generation_kwargs": generation_kwargs or {},
            },
        )
        job = validation.generate_job(request, self.limits())
        return await self._value(job, self._route(session_id), progress, "generate")

    @guarded
    async def chat(
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
        *,
        session_id: str | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Generates completions for conversations; the conversations are spread over the servers.

        Args:
            messages (`list[list[dict]]`):
                Conversations. A part `{"type": "image_pil", "image_pil": image}` travels as a PNG.
            chat_template_kwargs (`dict`, *optional*): Passed to the chat template.
            tools (`list`, *optional*): JSON schemas, or functions that `transformers` makes them of.
            chat_template (`str`, *optional*): Not supported by these servers.

        The other arguments, the result and the errors are those of [`~AsyncVLLMClientPool.generate`].

        Raises:
            `NotImplementedError`: for a `chat_template`, as TRL's client.
        """
        if chat_template is not None:
            raise NotImplementedError(
                "Custom chat templates cannot be sent to `trl vllm-serve`; save the template with the tokenizer."
            )
        request = validation.parse(
            ChatRequest,
            {
                "messages": await anyio.to_thread.run_sync(encode_messages, messages),
                "n": n,
                "repetition_penalty": repetition_penalty,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "max_tokens": max_tokens,
                "logprobs": logprobs,
                "structured_outputs_regex": structured_outputs_regex,
                "generation_kwargs": generation_kwargs or {},
                "chat_template_kwargs": chat_template_kwargs or {},
                "tools": None if tools is None else [tool_schema(tool) for tool in tools],
            },
        )
        job = validation.chat_job(request, self.limits())
        return await self._value(job, self._route(session_id), progress, "chat")

    @guarded
    async def get_sequence_logprobs(
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
        """Scores sequences; they are spread over the servers. No server scores while it generates.

        Args:
            sequences (`list[list[int]]`): Prompt and completion, as token ids.
            prompt_lengths (`list[int]`): How many tokens of each are the prompt.
            top_logprobs (`int`, *optional*, defaults to `100`):
                Most probable tokens per position. More than the servers return (`max_logprobs`, 20 unless set) kills
                a real server's worker, so it is refused here.
            temperature (`float`, *optional*, defaults to `1.0`): Must be positive.
            use_binary (`bool`, *optional*, defaults to `True`): Whether the answer travels as arrays.
            chunk_size (`int`, *optional*, defaults to `0`): Most sequences per request; 0 sends each server its share
                in one.
            max_concurrent_requests (`int`, *optional*, defaults to `4`): Chunks that one server has at once.

        Returns:
            `dict` with keys:
                - `logprobs` (`list[list[list[float]]]`): `[sequence][completion token][k]`, descending.
                - `logprob_token_ids` (`list[list[list[int]]]`): The tokens of `logprobs`.
                - `actual_logprobs`, `actual_token_ids` (`[sequence][completion token][1]`): The tokens that are there;
                  with `use_binary` only.

        Raises:
            `ValueError` ([`InvalidRequestError`]): for a temperature ≤ 0 and other impossible arguments.
            The rest as [`~AsyncVLLMClientPool.generate`].
        """
        if chunk_size < 0 or max_concurrent_requests < 1:
            raise InvalidRequestError(
                f"chunk_size={chunk_size} must not be negative, "
                f"max_concurrent_requests={max_concurrent_requests} must be at least 1"
            )
        request = validation.parse(
            SequenceLogprobsRequest,
            {
                "sequences": sequences,
                "prompt_lengths": prompt_lengths,
                "top_logprobs": top_logprobs,
                "temperature": temperature,
                "response_format": "binary" if use_binary else "json",
            },
        )
        job = validation.score_job(request, self.limits())
        route = Route(None, chunk_size, max_concurrent_requests if chunk_size else 1)
        return await self._value(job, route, progress, "score")

    @guarded
    async def get_world_size(self) -> int:
        """The world size (tensor × data parallel) of one server: each has a weight update group of its own.

        Raises:
            [`BackendMismatchError`]: when servers differ, naming them.
            `requests.ConnectionError` ([`NoBackendAvailableError`]): when none answers.
        """
        sizes, failed = await self._world_sizes(self._weights.reachable())
        if not sizes:
            raise NoBackendAvailableError({**self._dispatcher.reasons(), **failed})
        if len(set(sizes.values())) > 1:
            raise BackendMismatchError(
                "The servers differ in world size",
                {self._dispatcher.backends[name].url: f"has {size}" for name, size in sizes.items()},
            )
        return next(iter(sizes.values()))

    async def _world_sizes(self, backends: Sequence[Backend]) -> tuple[dict[str, int], dict[str, str]]:
        """Sizes by name, and what went wrong by URL."""

        async def ask(backend: Backend) -> int | str:
            try:
                answer = await backend.exchange.once(
                    "GET", backend.dialect.world_size_path, timeout=self.config.control_timeout
                )
                judge(backend.url, answer)
                return int(msgspec.json.decode(answer.body, type=dict[str, int])["world_size"])
            except AttemptError as error:
                return f"{error.outcome.value}: {error.detail}"
            except (RequestRejectedError, ValueError, KeyError) as error:
                return f"did not say: {error}"

        answers = list(zip(backends, await asyncio.gather(*(ask(backend) for backend in backends)), strict=True))
        sizes = {backend.name: answer for backend, answer in answers if isinstance(answer, int)}
        return sizes, {backend.url: answer for backend, answer in answers if isinstance(answer, str)}

    @guarded
    async def reset_prefix_cache(self) -> None:
        """Resets the servers' prefix caches. After `update_named_param` it ends the update and publishes it.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` servers completed an update.
            [`ControlError`]: when a server says that it failed. One that is gone has no cache.
        """
        was_update = self._weights.updating
        results = await self._weights.reset_caches()
        answered = {name: result for name, result in results.items() if result.ok or result.status is not None}
        if not was_update:
            require_all("Resetting the prefix caches", answered)

    @guarded
    async def init_communicator(self, device: Any = 0) -> None:
        """Makes a weight update group with every server that is up: one each, because a `trl` server is the master of
        its own.

        Args:
            device (`torch.device`, `str` or `int`, *optional*, defaults to `0`): The trainer's device.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` servers take part, or tensors could not be moved.
        """
        members = self._weights.reachable()
        transport = self._transport_for(members)
        sizes, failed = await self._world_sizes(members)
        for url, reason in failed.items():
            logger.warning("%s is left out of weight updates until the next init_communicator: %s", url, reason)
        members = [backend for backend in members if backend.name in sizes]
        groups = []
        bodies = {}
        ports: dict[str, int] = {}
        for backend in members:
            # Each server's worker binds the port on its own host, so servers that share a host need different ones,
            # by whatever names they go.
            host = backend.address.host
            machine = await resolve(host) if backend.exchange.has_sockets else host
            port = ports.get(machine, self.group_port)
            ports[machine] = port + 1
            world_size = sizes[backend.name] + 1
            groups.append(GroupMember(backend.name, host, port, world_size, world_size - 1))
            bodies[backend.name] = msgspec.json.encode(
                {
                    "host": "0.0.0.0",
                    "port": port,
                    "world_size": world_size,
                    "client_device_uuid": transport.device_uuid(device),
                }
            )
        results = await self._weights.open_groups(bodies, members, fresh=True)
        joined = [group for group in groups if results[group.backend].ok]
        if len(joined) < self.config.min_backends:
            raise WeightSyncError(
                f"{len(joined)} servers take part in weight updates, min_backends={self.config.min_backends}",
                {**failed, **{r.url: r for r in results.values()}} or self._dispatcher.reasons(),
            )
        self._weights.transport = transport
        await self._weights.join(joined, device)

    def _transport_for(self, members: Sequence[Backend]) -> WeightTransport:
        if self._weight_transport is not None:
            return self._weight_transport
        real = [backend.url for backend in members if not backend.simulated]
        if real and self._transport is None:
            raise WeightSyncError(
                "This release announces weight updates but moves no tensors; a server that waits for them would "
                "hang, so it was not asked. Pass weight_transport=",
                dict.fromkeys(real, "is a real server"),
            )
        return ControlOnlyTransport()

    @guarded
    async def update_named_param(self, name: str, weights: Any) -> None:
        """Sends one parameter to every server of the group. The first of an update closes the gate for requests and
        waits for those that are out; [`~AsyncVLLMClientPool.reset_prefix_cache`] or the next generation ends it.

        A server that fails drops out and is out of sync; the update goes on with the others.

        Args:
            name (`str`): Name of the parameter.
            weights (`torch.Tensor`): Its new value.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` servers are left.
        """
        body = msgspec.json.encode(
            {"name": name, "dtype": str(weights.dtype), "shape": [int(size) for size in weights.shape]}
        )
        if caller.get() is None:
            caller.set(object())
        await self._weights.announce(name, body, tensor=weights, owner=caller.get())

    async def update_model_params(self, model: Any) -> None:
        """Sends every parameter of a model.

        Args:
            model (`torch.nn.Module`): The model.
        """
        for name, parameter in model.named_parameters():
            await self.update_named_param(name, parameter.data)

    @guarded
    async def close_communicator(self) -> None:
        """Closes the weight update groups. Servers that are gone are passed over, as TRL's client does.

        Raises:
            [`ControlError`]: when a server answered with an error.
        """
        results = await self._weights.close_groups()
        require_all(
            "Closing the communicators",
            {name: result for name, result in results.items() if result.ok or result.status is not None},
        )

    # Beyond VLLMClient

    @guarded
    async def submit(
        self,
        job: Job,
        *,
        session_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        progress: ProgressBar | None = None,
        route: Route | None = None,
    ) -> RolloutResult:
        """Serves a checked job; what [`~AsyncVLLMClientPool.generate`] and the gateway's routes are made of."""
        if self._weights.updating and not self._control_only and self._weights.owner == caller.get():
            await self._weights.reset_caches()
        rollout = Rollout(
            job,
            route or self._route(session_id),
            dialect=self._dialect,
            dispatcher=self._dispatcher,
            config=self.config,
            clock=self._clock,
            headers=headers,
            progress=progress,
        )
        return await rollout.run()

    def _route(self, session_id: str | None) -> Route:
        return Route(self.session_id if session_id is None else session_id)

    async def _value(self, job: Job, route: Route, progress: bool | None, what: str) -> dict[str, Any]:
        if not (self.config.progress if progress is None else progress):
            return (await self.submit(job, route=route)).value
        from tqdm import tqdm

        with tqdm(total=len(job.units), desc=what, unit="prompt", leave=False) as bar:
            return (await self.submit(job, route=route, progress=bar)).value
