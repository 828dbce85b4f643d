"""The routes of the `trl` dialect, as `trl vllm-serve` of TRL 1.0 – 1.10 has them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response

from trl_pool.dialects.trl_requests import (
    ChatRequest,
    GenerateRequest,
    InitCommunicatorRequest,
    SamplingFields,
    SequenceLogprobsRequest,
    UpdateNamedParamRequest,
)
from trl_pool.sim.engine import Completions, Scored, render_chat, tokenize
from trl_pool.sim.sampling import Sampling
from trl_pool.sim.worker import ServerError, Worker, computed

# The real response model shows every field, unset ones as null.
_SCORE_FIELDS = (
    "logprobs",
    "logprob_token_ids",
    "logprobs_b64",
    "token_ids_b64",
    "actual_logprobs_b64",
    "actual_token_ids_b64",
    "shape",
    "completion_lengths",
)


def add_trl_routes(app: FastAPI, worker: Worker) -> None:
    """Declare the dialect's endpoints.

    Args:
        app (`FastAPI`):
            Gets the routes. Each request's `state` must have what `trl_pool.sim.gate` puts there.
        worker (`Worker`):
            Does the work.
    """
    config = worker.config

    @app.get("/health/")
    async def health() -> Response:
        version = {} if config.model_version is None else {"model_version": config.model_version}
        return _json({"status": "ok", **version})

    @app.get("/get_world_size/")
    async def get_world_size() -> Response:
        return _json({"world_size": config.world_size})

    @app.post("/generate/")
    async def generate(request: Request, body: GenerateRequest) -> Response:
        images = body.images or [None] * len(body.prompts)
        if len(images) != len(body.prompts):
            raise ServerError("zip() of prompts and images")
        keys = ["".join(map(_image_key, of_prompt or ())) for of_prompt in images]
        prompts = [tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        return _json(await worker.generate(prompts, _sampling(body), keys, request.state.gone))

    @app.post("/chat/")
    async def chat(request: Request, body: ChatRequest) -> Response:
        texts = [render_chat(messages, body.tools, body.chat_template_kwargs) for messages in body.messages]
        prompts = [tokenize(text) for text in texts]
        return _json(await worker.generate(prompts, _sampling(body), None, request.state.gone))

    @app.post("/get_sequence_logprobs/")
    async def get_sequence_logprobs(request: Request, body: SequenceLogprobsRequest) -> Response:
        top = body.top_logprobs
        if len(body.sequences) != len(body.prompt_lengths):
            raise ServerError("sequences and prompt_lengths must have the same length.")
        for sequence, length in zip(body.sequences, body.prompt_lengths, strict=True):
            if not 0 <= length <= len(sequence) <= config.max_model_len:
                raise ServerError("prompt_length out of range, or sequence longer than max_model_len")
        Sampling.checked({"max_tokens": 1, "temperature": body.temperature, "prompt_logprobs": top})
        scored = await worker.score(body.sequences, body.prompt_lengths, top, request.state.use)
        encode = binary_scores if body.response_format == "binary" else json_scores
        fields = await computed((1 + abs(top)) * sum(one.length for one in scored), lambda: encode(scored, top))
        return _json({name: fields.get(name) for name in _SCORE_FIELDS})

    @app.post("/init_communicator/")
    async def init_communicator(body: InitCommunicatorRequest) -> Response:
        worker.init_communicator()
        return _json({"message": "Request received, initializing communicator"})

    @app.post("/update_named_param/")
    async def update_named_param(body: UpdateNamedParamRequest) -> Response:
        worker.update_named_param(body.name, body.dtype, body.shape)
        return _json({"message": "Request received, updating named parameter"})

    @app.post("/reset_prefix_cache/")
    async def reset_prefix_cache(request: Request) -> Response:
        await worker.reset_prefix_cache(request.state.gone)
        done = not request.state.false_reset
        return _json({"message": f"Request received, resetting prefix cache status: {done}"})

    @app.post("/close_communicator/")
    async def close_communicator() -> Response:
        worker.close_communicator()
        return _json({"message": "Request received, closing communicator"})


def json_scores(scored: Sequence[Scored], top: int) -> dict[str, object]:
    """The JSON form of scores: nested lists `[sequence][token][k]`."""
    pairs = [one.lists(top) for one in scored]
    return {"logprobs": [logprobs for logprobs, _ in pairs], "logprob_token_ids": [ids for _, ids in pairs]}


def binary_scores(scored: Sequence[Scored], top: int) -> dict[str, object]:
    """The binary form of scores: arrays in base64, padded to the longest completion with -inf and token 0."""
    longest = max((one.length for one in scored), default=0)
    logprobs = np.full((len(scored), longest, top), -np.inf, dtype=np.float32)
    token_ids = np.zeros((len(scored), longest, top), dtype=np.int32)
    actual_logprobs = np.full((len(scored), longest, 1), -np.inf, dtype=np.float32)
    actual_token_ids = np.zeros((len(scored), longest, 1), dtype=np.int32)
    for i, one in enumerate(scored):
        top_logprobs, top_ids, actual = one.arrays(top)
        known = slice(one.first, one.length)
        logprobs[i, known, : top_logprobs.shape[1]] = top_logprobs
        token_ids[i, known, : top_ids.shape[1]] = top_ids
        actual_logprobs[i, known, 0] = actual
        actual_token_ids[i, known, 0] = one.tokens
    return {
        "logprobs_b64": _base64(logprobs),
        "token_ids_b64": _base64(token_ids),
        "actual_logprobs_b64": _base64(actual_logprobs),
        "actual_token_ids_b64": _base64(actual_token_ids),
        "shape": [len(scored), longest, top],
        "completion_lengths": [one.length for one in scored],
    }


def _base64(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _json(content: dict[str, Any] | Completions) -> Response:
    # -inf becomes null, as it does in the real server's answers.
    return Response(msgspec.json.encode(content), media_type="application/json")


def _sampling(body: SamplingFields) -> Sampling:
    fields: dict[str, Any] = {
        "n": body.n,
        "repetition_penalty": body.repetition_penalty,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "max_tokens": body.max_tokens,
        "logprobs": body.logprobs,
        **body.generation_kwargs,
    }
    if body.structured_outputs_regex is not None:
        fields["structured_outputs"] = {"regex": body.structured_outputs_regex}
    return Sampling.checked(fields)


def _image_key(image: str) -> str:
    # What is no base64 raises, as on the real server (which also wants a picture in it).
    base64.b64decode(image, validate=True)
    return image
