"""The pool, asynchronous: what TRL's `VLLMClient` can be asked, asked of a fleet."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio.to_thread
import httpx
import msgspec
from pydantic import SecretStr

from . import balancer, validation
from .config import PoolConfig
from .dialects.base import Endpoint, Job
from .dialects.trl_requests import ChatRequest, GenerateRequest, SequenceLogprobsRequest
from .errors import (
    InvalidRequestError,
    RequestRejectedError,
)
from .exchange import StreamedAnswer, judge
from .fleet import DEFAULT_HOST, DEFAULT_PORT, resolve_backends
from .forwarding import Forwarder
from .lifetime import guarded
from .media import encode_images, encode_messages, require_conversations, require_image_lists, tool_schema
from .provenance import ProgressBar, RolloutReport, RolloutResult, Route
from .rollout import Rollout
from .training import TrainedFleet
from .weights.transport import JointTransport, WeightTransport

logger = logging.getLogger(__name__)

DEFAULT_GROUP_PORT = 51216

SINGLES_AT_ONCE = 64
"""Requests of one prompt each that a server has of one call at once, where the caller has no say in it; TRL's own."""


class AsyncVLLMClientPool(TrainedFleet):
    """Many vLLM servers behind the methods of TRL's `VLLMClient`, for asyncio.

    The servers are `vllm serve`, as TRL 1.11 and later use it, or `trl vllm-serve` of TRL 1.0 – 1.10; which, they are
    asked. One class has the methods of both generations of TRL's client.

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
        api_key (`str`, *optional*): The servers' `--api-key`; `config.backend_api_key` otherwise.
        weight_transport ([`WeightTransport`] or [`JointTransport`], *optional*):
            Moves tensors to the servers, instead of NCCL or gloo.
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
        api_key: str | None = None,
        weight_transport: WeightTransport | JointTransport | None = None,
        control_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        addresses, from_env = resolve_backends(base_url, host, server_port)
        if config is None:
            config = PoolConfig.from_env() if from_env else PoolConfig()
        if api_key is not None:
            config = config.model_copy(update={"backend_api_key": SecretStr(api_key)})
        super().__init__(
            addresses,
            config,
            group_port=group_port,
            weight_transport=weight_transport,
            connection_timeout=connection_timeout,
            transport=transport,
            control_only=control_only,
            clock=clock,
            rng=rng,
        )
        self.session_id = session_id
        self.last_report: RolloutReport | None = None

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
        features: Sequence[Mapping[str, Any] | None] | None = None,
        session_id: str | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Generates completions; the prompts are spread over the servers.

        Args:
            prompts (`list[str]` or `list[list[int]]`): Texts or token ids.
            images (`list[list[PIL.Image] | None]`, *optional*):
                Per prompt, for `trl` servers. Dictionaries in their place are `features`, which come second in
                TRL 1.11 and later.
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
            features (`list[dict | None]`, *optional*):
                Per prompt, what [`~AsyncVLLMClientPool.image_features`] made of its images, for `vllm serve`. The
                prompts must be token ids then.
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
        if images and any(isinstance(item, Mapping) for item in images):
            features, images = images, None
        if images:
            if self.dialect.name == "vllm":
                raise InvalidRequestError(
                    "`vllm serve` generates from token ids and features: pass features=client.image_features(images), "
                    "or conversations with images to chat()"
                )
            require_image_lists(images)
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
        lenient = self.dialect.survives_bad_requests
        job = validation.generate_job(request, self.limits(), lenient=lenient)
        if features is not None:
            job = validation.with_features(job, features, self.dialect)
        # With features a request carries one prompt, as TRL's client sends them.
        at_once = 1 if features is None else SINGLES_AT_ONCE
        return await self._value(job, self._route(session_id, at_once), progress, "generate")

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
        max_concurrent_requests: int = 64,
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
            chat_template (`str`, *optional*): Used instead of the model's. `trl` servers cannot take one.
            max_concurrent_requests (`int`, *optional*, defaults to `64`):
                Conversations that one `vllm serve` has of this call at once; its requests carry one each. They take
                one slot of `max_inflight_per_backend` together.

        The other arguments, the result and the errors are those of [`~AsyncVLLMClientPool.generate`].

        Raises:
            `NotImplementedError`: for a `chat_template` on `trl` servers, as TRL's client.
        """
        lenient = self.dialect.survives_bad_requests
        require_conversations(messages)
        if max_concurrent_requests < 1:
            raise InvalidRequestError(f"max_concurrent_requests must be at least 1, got {max_concurrent_requests}")
        if chat_template is not None and not lenient:
            raise NotImplementedError(
                "Custom chat templates cannot be sent to `trl vllm-serve`; save the template with the tokenizer."
            )
        request = validation.parse(
            ChatRequest,
            {
                "messages": await anyio.to_thread.run_sync(encode_messages, messages, self.dialect.name == "vllm"),
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
        job = validation.chat_job(request, self.limits(), lenient=lenient, chat_template=chat_template)
        return await self._value(job, self._route(session_id, max_concurrent_requests), progress, "chat")

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
            use_binary (`bool`, *optional*, defaults to `True`):
                Whether a `trl` server's answer travels as arrays; `vllm serve` has no such choice.
            chunk_size (`int`, *optional*, defaults to `0`): Most sequences per request; 0 sends each server its share
                in one.
            max_concurrent_requests (`int`, *optional*, defaults to `4`): Chunks that one server has at once.

        Returns:
            `dict` with keys:
                - `logprobs` (`list[list[list[float]]]`): `[sequence][completion token][k]`, descending; from
                  `vllm serve` padded with `-inf` to k.
                - `logprob_token_ids` (`list[list[list[int]]]`): The tokens of `logprobs`.
                - `actual_logprobs`, `actual_token_ids` (`[sequence][completion token][1]`): The tokens that are there
                  (`-inf` where `vllm serve` did not return it); from `trl` servers with `use_binary` only.

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
        job = validation.score_job(request, self.limits(), lenient=self.dialect.survives_bad_requests)
        route = Route(None, chunk_size, max_concurrent_requests if chunk_size else 1)
        return await self._value(job, route, progress, "score")

    @guarded
    async def image_features(
        self, images: Sequence[Sequence[Any] | None], max_concurrent_requests: int = 64
    ) -> list[dict[str, Any] | None]:
        """Lets `vllm serve` process images into what [`~AsyncVLLMClientPool.generate`] takes beside token ids.

        Args:
            images (`list[list[PIL.Image] | None]`): Per prompt.
            max_concurrent_requests (`int`, *optional*, defaults to `64`): Prompts that one server has at once.

        Returns:
            `list[dict | None]`: Per prompt; `None` where it has no image.

        Raises:
            `RuntimeError`: when the servers do not offer it.
            The rest as [`~AsyncVLLMClientPool.generate`].
        """
        if self.dialect.name != "vllm":
            raise RuntimeError("`trl vllm-serve` takes images with generate(images=…) and processes none apart")
        wanted = [index for index, few in enumerate(images) if few]
        contents = [[{"type": "image", "image": image} for image in images[index] or ()] for index in wanted]
        conversations = [[{"role": "user", "content": parts}] for parts in contents]
        messages = await anyio.to_thread.run_sync(encode_messages, conversations, True)
        job = Job(Endpoint.RENDER, messages)
        try:
            result = await self.submit(job, route=self._route(None, max_concurrent_requests))
        except RequestRejectedError as error:
            if error.status != 404:
                raise
            raise RuntimeError(
                f"{error.backend} does not serve /v1/chat/completions/render, which images need. From vLLM 0.30 on, "
                "start it with --enable-scale-out."
            ) from error
        found: list[dict[str, Any] | None] = [None] * len(images)
        for index, features in zip(wanted, result.value["features"], strict=True):
            found[index] = features
        return found

    @guarded
    async def get_server_info(self) -> dict[str, Any]:
        """The resolved configuration of one `vllm serve`: the others agree with it in what matters.

        Returns:
            `dict`: Its `VllmConfig` as a JSON tree.

        Raises:
            `RuntimeError`: when no server tells it (`VLLM_SERVER_DEV_MODE=1` is missing; `trl vllm-serve` never does).
        """
        if self.dialect.name != "vllm":
            raise RuntimeError("`trl vllm-serve` does not tell its configuration")
        answer = await self.ask_one("/server_info?config_format=json")
        if answer.status == 404:
            raise RuntimeError(
                "The servers do not expose their development endpoints, which weight updates need; restart them with "
                "VLLM_SERVER_DEV_MODE=1 in their environment"
            )
        judge("A server", answer)
        config: dict[str, Any] = msgspec.json.decode(answer.body)["vllm_config"]
        return config

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
        await self.before_request()
        rollout = Rollout(
            job if job.model is not None else dataclasses.replace(job, model=self.model),
            route or self._route(session_id),
            dialect=self.dialect,
            dispatcher=self._dispatcher,
            config=self.config,
            clock=self._clock,
            headers=headers,
            progress=progress,
        )
        try:
            return await rollout.run()
        finally:
            self.last_report = rollout.report()

    def _route(self, session_id: str | None, max_concurrent_requests: int = 1) -> Route:
        session_id = self.session_id if session_id is None else session_id
        return Route(session_id, per_backend=max_concurrent_requests)

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, body: bytes, *, key: str, weight: int, session_id: str | None, headers: Mapping[str, str]
    ) -> AsyncIterator[tuple[str, StreamedAnswer]]:
        """Passes a request on to one server and its answer back as it comes; see [`Forwarder.stream`]."""
        session_id = self.session_id if session_id is None else session_id
        forwarder = Forwarder(self._dispatcher, self.config, clock=self._clock)
        async with (
            self.lifetime.in_use(),
            forwarder.stream(
                path,
                body,
                key=key if session_id is None else balancer.session_key(session_id),
                keep=session_id is not None,
                weight=weight,
                headers=headers,
            ) as streamed,
        ):
            yield streamed

    async def _value(self, job: Job, route: Route, progress: bool | None, what: str) -> dict[str, Any]:
        value: dict[str, Any]
        if not (self.config.progress if progress is None else progress):
            value = (await self.submit(job, route=route)).value
            return value
        from tqdm import tqdm

        with tqdm(total=len(job.units), desc=what, unit="prompt", leave=False) as bar:
            value = (await self.submit(job, route=route, progress=bar)).value
        return value
