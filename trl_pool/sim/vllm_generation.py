"""The routes of the `vllm` dialect that make the engine work, and the one that renders conversations."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from trl_pool.sim.engine import digest_of, image_marker, render_chat, score, tokenize
from trl_pool.sim.sampling import KNOWN, InvalidSampling, Sampling
from trl_pool.sim.scheduler import Progress
from trl_pool.sim.vllm_answers import (
    Head,
    chat_body,
    chat_choice,
    chat_logprobs,
    completion_body,
    completion_choice,
    completion_logprobs,
    count,
    generate_body,
    prompt_logprobs,
    usage,
)
from trl_pool.sim.vllm_bodies import ChatBody, CompletionBody, Features, GenerateBody, SamplingBody
from trl_pool.sim.vllm_errors import Refused, json_response, not_found
from trl_pool.sim.vllm_stream import chat_events, completion_events
from trl_pool.sim.vllm_worker import Adapter, VLLMWorker
from trl_pool.sim.worker import computed

_MOST_PROMPTS = 1024  # VLLM_MAX_COMPLETION_PROMPTS


def add_generation_routes(app: FastAPI, worker: VLLMWorker) -> None:
    """Declare `/v1/completions`, `/v1/chat/completions`, its `/render` and `/inference/v1/generate`.

    Args:
        app (`FastAPI`):
            Gets the routes.
        worker (`VLLMWorker`):
            Does the work.
    """
    config = worker.config
    limit = config.max_model_len
    fingerprint = f"vllm-{config.vllm_version}-{digest_of(repr(config))[:8]}"

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        _require_stream_fields(body)
        adapter = _adapter(worker, body.model)
        prompts = _prompts(body.prompt)
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        for prompt in prompts:
            _require_fit(worker, prompt, max_tokens)
        sampling = _checked(worker, {**body.sampling_fields(), "max_tokens": max_tokens, "logprobs": body.logprobs})
        head = Head(_id(request, body.request_id, "cmpl"), "text_completion", _name(worker, adapter), fingerprint)
        ids = tuple(f"{head.id}-{i}" for i in range(len(prompts)))
        run = worker.generate(ids, prompts, sampling, adapter, stepwise=bool(body.stream))
        if body.stream:
            return StreamingResponse(completion_events(body, head, prompts, run), media_type="text/event-stream")
        progress = await _finished(run)
        scores = await _scores(progress, prompts, body.prompt_logprobs)

        def encoded() -> Response:
            choices = []
            for i, tokens in enumerate(progress.completions.completion_ids):
                logprobs = None
                if body.logprobs is not None:
                    as_ids = bool(body.return_tokens_as_token_ids)
                    told = range(min(len(tokens), progress.steps))
                    logprobs = completion_logprobs(progress, i, told, body.logprobs, as_ids)
                prompt = i // sampling.n
                ids = prompts[prompt] if body.return_token_ids else None
                choices.append(completion_choice(progress, i, logprobs, scores[prompt], ids))
            return json_response(completion_body(head, choices, usage(sum(map(len, prompts)), count(progress))))

        return await computed(_size(progress, prompts, body.logprobs, body.prompt_logprobs), encoded)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        _require_stream_fields(body)
        adapter = _adapter(worker, body.model)
        prompt, sampling = _chat(worker, body)
        role = "assistant" if body.add_generation_prompt else body.messages[-1]["role"]
        object_name = "chat.completion.chunk" if body.stream else "chat.completion"
        head = Head(_id(request, body.request_id, "chatcmpl"), object_name, _name(worker, adapter), fingerprint)
        run = worker.generate((head.id,), [prompt], sampling, adapter, stepwise=bool(body.stream))
        if body.stream:
            return StreamingResponse(chat_events(body, head, prompt, role, run), media_type="text/event-stream")
        progress = await _finished(run)
        (scored,) = await _scores(progress, [prompt], body.prompt_logprobs)

        def encoded() -> Response:
            choices = []
            for i, tokens in enumerate(progress.completions.completion_ids):
                logprobs = None
                if body.logprobs and body.top_logprobs is not None:
                    as_ids = bool(body.return_tokens_as_token_ids)
                    told = range(min(len(tokens), progress.steps))
                    logprobs = chat_logprobs(progress, i, told, body.top_logprobs, as_ids)
                choices.append(chat_choice(progress, i, role, logprobs, bool(body.return_token_ids)))
            ids = prompt if body.return_token_ids else None
            return json_response(chat_body(head, choices, usage(len(prompt), count(progress)), scored, ids))

        return await computed(_size(progress, [prompt], sampling.logprobs, body.prompt_logprobs), encoded)

    @app.post("/v1/chat/completions/render")
    async def render(body: ChatBody) -> Response:
        _adapter(worker, body.model)
        prompt, sampling = _chat(worker, body)
        return json_response(
            {
                "request_id": f"chatcmpl-{secrets.token_hex(8)}",
                "token_ids": prompt,
                "token_offsets": None,
                "features": _features(body, prompt),
                "content_parts": None,
                "sampling_params": _rendered_sampling(body, sampling),
                "model": body.model,
                "return_token_ids": None,
                "stream": bool(body.stream),
                "stream_options": None,
                "cache_salt": None,
                "priority": 0,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
            }
        )

    @app.post("/inference/v1/generate")
    async def generate(request: Request, body: GenerateBody) -> Response:
        if body.stream:
            raise Refused("the simulated server does not stream this endpoint", "stream")
        adapter = _adapter(worker, body.model)
        prompt = body.token_ids
        _require_known(worker, prompt)
        if len(prompt) >= limit:
            raise Refused(f"a prompt of {len(prompt)} tokens leaves no room within the limit of {limit}")
        fields = {"max_tokens": limit - len(prompt), **body.sampling_params}
        sampling = _checked(worker, {name: value for name, value in fields.items() if name in KNOWN})
        request_id = _id(request, body.request_id, "generate-tokens")
        images = [_image_key(body.features)] if body.features else None
        run = worker.generate((request_id,), [prompt], sampling, adapter, images)
        progress = await _finished(run)
        (scored,) = await _scores(progress, [prompt], body.sampling_params.get("prompt_logprobs"))
        ids = prompt if body.return_token_ids else None
        k = sampling.logprobs
        return await computed(
            _size(progress, [prompt], k, None),
            lambda: json_response(generate_body(request_id, _name(worker, adapter), progress, k, scored, ids)),
        )


def _chat(worker: VLLMWorker, body: ChatBody) -> tuple[list[int], Sampling]:
    """The prompt that a conversation becomes, and how to continue it."""
    if not body.messages:
        raise Refused("a conversation needs a message")
    if body.tools == []:
        raise Refused("tools must not be empty", "tools")
    if body.tools and body.tool_choice != "none":
        raise Refused('tools are parsed by nobody here: tool_choice must be "none"')
    if body.chat_template is not None and not worker.config.trust_request_chat_template:
        raise Refused("a chat template came with the request, and --trust-request-chat-template is not set")
    if body.top_logprobs and not body.logprobs:
        raise Refused("top_logprobs needs logprobs", "top_logprobs")
    template = dict(body.chat_template_kwargs or {})
    if body.chat_template is not None:
        template["chat_template"] = body.chat_template
    try:
        text = render_chat([{"content": None, **message} for message in body.messages], body.tools, template)
    except (KeyError, TypeError) as error:
        raise Refused(f"a message is ill-formed: {error}") from error
    prompt = tokenize(text if body.add_generation_prompt else text.removesuffix("<|assistant|>"))
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    _require_fit(worker, prompt, 1 if asked is None else asked)
    fields = body.sampling_fields()
    fields["max_tokens"] = worker.config.max_model_len - len(prompt) if asked is None else asked
    fields["logprobs"] = body.top_logprobs if body.logprobs else None
    return prompt, _checked(worker, fields)


def _prompts(prompt: list[int] | list[list[int]] | str | list[str] | None) -> list[list[int]]:
    if prompt is None or prompt == "":
        raise Refused("a prompt is needed", "prompt")
    if isinstance(prompt, str):
        return [tokenize(prompt)]
    if not prompt:
        raise Refused("at least one prompt is needed")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > _MOST_PROMPTS:
        raise Refused(f"{len(prompt)} prompts are more than {_MOST_PROMPTS}", "prompt")
    return [tokenize(one) if isinstance(one, str) else one for one in prompt]


def _adapter(worker: VLLMWorker, model: str | None) -> Adapter | None:
    if not model or model == worker.config.model:
        return None
    if model in worker.adapters:
        return worker.adapters[model]
    raise not_found(f"The model `{model}` does not exist.", "model")


def _name(worker: VLLMWorker, adapter: Adapter | None) -> str:
    return worker.config.model if adapter is None else adapter.name


def _id(request: Request, given: str | None, kind: str) -> str:
    return f"{kind}-{request.headers.get('x-request-id') or given or secrets.token_hex(8)}"


def _require_known(worker: VLLMWorker, prompt: Sequence[int]) -> None:
    if not prompt:
        raise Refused("a prompt must not be empty")
    if max(prompt) >= worker.config.vocab_size:
        raise Refused(f"Token id {max(prompt)} is out of vocabulary")


def _require_fit(worker: VLLMWorker, prompt: Sequence[int], max_tokens: int) -> None:
    _require_known(worker, prompt)
    limit = worker.config.max_model_len
    if len(prompt) + max(max_tokens, 0) > limit or len(prompt) >= limit:
        raise Refused(
            f"This model's maximum context length is {limit} tokens; the prompt has {len(prompt)} and {max_tokens} "
            "more were asked for",
            "input_tokens",
        )


def _require_stream_fields(body: SamplingBody) -> None:
    if body.stream_options and not body.stream:
        raise Refused("stream_options need stream", "stream_options")
    if body.stream and body.prompt_logprobs:
        raise Refused("there are no prompt_logprobs in a stream", "prompt_logprobs")


def _checked(worker: VLLMWorker, fields: Mapping[str, Any]) -> Sampling:
    sampling = Sampling.checked(fields)
    most = worker.config.max_logprobs
    most = worker.config.vocab_size if most == -1 else most
    for name in ("logprobs", "prompt_logprobs"):
        asked = fields.get(name) or 0
        if (worker.config.vocab_size if asked == -1 else asked) > most:
            raise InvalidSampling(f"{name} is {asked}, and at most {most} are allowed", name)
    if any(not 0 <= token < worker.config.vocab_size for token in sampling.stop_token_ids):
        raise InvalidSampling("stop_token_ids must be within the vocabulary", "stop_token_ids")
    if sampling.poison:
        raise InvalidSampling("the regular expression is none")
    return sampling


async def _finished(run: AsyncIterator[Progress]) -> Progress:
    *_, last = [progress async for progress in run]
    return last


async def _scores(progress: Progress, prompts: list[list[int]], top: int | None) -> list[Any]:
    """The prompts' logprobs, or `None` for each where none are asked for."""
    if top is None:
        return [None] * len(prompts)

    def scores() -> list[Any]:
        return [prompt_logprobs(score(prompt, 0, progress.weights), top) for prompt in prompts]

    return await computed(sum(map(len, prompts)) * (1 + abs(top)), scores)


def _size(progress: Progress, prompts: list[list[int]], k: int | None, top: int | None) -> int:
    """About how many numbers are in the answer."""
    return count(progress) * (1 + abs(k or 0)) + sum(map(len, prompts)) * (1 + abs(top or 0))


def _rendered_sampling(body: ChatBody, sampling: Sampling) -> dict[str, Any]:
    """The sampling parameters of a rendered conversation: what the request set, over what is always shown."""
    defaults = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "stop": [],
        "stop_token_ids": [],
        "max_tokens": sampling.max_tokens,
        "output_kind": 2,  # only when all is finished
        "skip_clone": True,
        "bad_words": [],
        "skip_reading_prefix_cache": body.prompt_logprobs is not None,
    }
    given = {name: value for name, value in body.sampling_fields().items() if name in body.model_fields_set}
    logprobs = {} if sampling.logprobs is None else {"logprobs": sampling.logprobs}
    return {**defaults, **given, **logprobs}


def _features(body: ChatBody, prompt: list[int]) -> dict[str, Any] | None:
    """What `/inference/v1/generate` needs to know of a conversation's images: the data itself, here."""
    contents = [message["content"] for message in body.messages if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content if part["type"] != "text"]
    if not parts:
        return None
    rendered, end = bytes(token for token in prompt if token < 256), 0
    hashes, places, data = [], [], []
    for part in parts:
        marker, source = image_marker(part).encode(), _data(part)
        start = rendered.index(marker, end)
        end = start + len(marker)
        places.append({"offset": start, "length": len(marker)})
        hashes.append(digest_of(source))
        data.append(source)
    return {
        "mm_hashes": {"image": hashes},
        "mm_placeholders": {"image": places},
        "kwargs_data": {"image": data},
        "mm_metadata": None,
    }


def _data(part: Mapping[str, Any]) -> str:
    """An image's data in base64 where it has some, else its address."""
    value = part.get(part["type"], "")
    url = str(value.get("url") if isinstance(value, Mapping) else value)
    return url.partition(";base64,")[2] or url


def _image_key(features: Features) -> str:
    """Stands for the images: with the same prompt it gives the same tokens as on a `trl` server."""
    data = features.kwargs_data or {}
    if any(item is None for kind in features.mm_hashes for item in data.get(kind, [None])):
        raise Refused("the simulated server keeps no images: kwargs_data must have them")
    return "".join(item or "" for kind in sorted(data) for item in data[kind])
