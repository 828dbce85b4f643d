"""The routes of the `vllm` dialect, as `vllm serve` has them with `VLLM_SERVER_DEV_MODE=1`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import Body, FastAPI, Request, Response

from trl_pool.sim.vllm_bodies import LoadAdapterBody, PauseMode, UnloadAdapterBody
from trl_pool.sim.vllm_errors import (
    ApiKeyGuard,
    Refused,
    add_error_handlers,
    json_response,
    not_found,
)
from trl_pool.sim.vllm_generation import add_generation_routes
from trl_pool.sim.vllm_worker import VLLMWorker

# First releases that have the endpoint, or answer it with a body.
_ABORT_SINCE = (0, 26)
_RESET_SUCCESS_SINCE = (0, 26)
_VERSIONS_SINCE = (0, 27, 1)
_SHUTDOWN_SINCE = (0, 32)


def add_vllm_routes(app: FastAPI, worker: VLLMWorker) -> None:
    """Declare the dialect's endpoints.

    Args:
        app (`FastAPI`):
            Gets the routes. Each request's `state` must have what `trl_pool.sim.gate` puts there.
        worker (`VLLMWorker`):
            Does the work.
    """
    add_error_handlers(app)
    if worker.config.api_key is not None:
        app.add_middleware(ApiKeyGuard, api_key=worker.config.api_key)
    _add_information(app, worker)
    add_generation_routes(app, worker)
    _add_scheduling(app, worker)
    _add_weights(app, worker)
    _add_adapters(app, worker)


def _add_information(app: FastAPI, worker: VLLMWorker) -> None:
    config = worker.config

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if worker.dead else 200)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": config.vllm_version})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        cards = [_model_card(config.model, config.model, None, config.max_model_len)]
        cards += [_model_card(one.name, one.path, config.model, None) for one in worker.adapters.values()]
        return json_response({"object": "list", "data": cards})

    @app.get("/server_info")
    async def server_info(config_format: Literal["text", "json"] = "text") -> Response:
        found = _vllm_config(worker)
        shown = found if config_format == "json" else json.dumps(found)
        return json_response({"vllm_config": shown, "vllm_env": {}, "system_env": {}})

    @app.get("/get_world_size")
    async def get_world_size(include_dp: bool = True) -> Response:
        return json_response({"world_size": config.world_size if include_dp else config.tensor_parallel_size})


def _add_scheduling(app: FastAPI, worker: VLLMWorker) -> None:
    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request, reset_running_requests: bool = False) -> Response:
        done = await worker.reset_prefix_cache(reset_running_requests) and not request.state.false_reset
        if worker.config.vllm_release < _RESET_SUCCESS_SINCE:
            return Response(status_code=200)
        return json_response({"success": done})

    @app.post("/pause")
    async def pause(mode: PauseMode = "abort", wait_for_inflight_requests: bool = False) -> Response:
        await worker.pause("wait" if wait_for_inflight_requests else mode)
        return json_response({"status": "paused"})

    @app.post("/resume")
    async def resume() -> Response:
        await worker.call(worker.scheduler.resume)
        return json_response({"status": "resumed"})

    @app.get("/is_paused")
    async def is_paused() -> Response:
        return json_response({"is_paused": await worker.call(lambda: worker.scheduler.paused)})

    if worker.config.vllm_release >= _ABORT_SINCE:

        @app.post("/abort_requests")
        async def abort_requests(request: Request) -> Response:
            ids = (await _body(request)).get("request_ids")
            aborted = worker.scheduler.abort(ids or None)
            return json_response({"status": "aborted", "aborted": len(ids) if ids else aborted})


def _add_weights(app: FastAPI, worker: VLLMWorker) -> None:
    release = worker.config.vllm_release

    @app.post("/init_weight_transfer_engine")
    async def init_weight_transfer_engine(request: Request) -> Response:
        await worker.init_weight_transfer(await _field(request, "init_info"))
        return json_response({"message": "Weight transfer initialized"})

    @app.post("/start_weight_update")
    async def start_weight_update() -> Response:
        await worker.start_weight_update()
        return json_response({"message": "Weight update started"})

    @app.post("/update_weights")
    async def update_weights(request: Request) -> Response:
        info = await _field(request, "update_info")
        # One for all workers, or one for each.
        await worker.update_weights(info[0] if isinstance(info, list) and info else info)
        return json_response({"message": "Weights updated"})

    @app.post("/finish_weight_update")
    async def finish_weight_update(weight_version: Annotated[str | None, Body(embed=True)] = None) -> Response:
        await worker.finish_weight_update(weight_version)
        return json_response({"message": "Weight update finished"})

    if release >= _VERSIONS_SINCE:

        @app.get("/weight_info")
        async def weight_info() -> Response:
            return json_response({"weight_version": await worker.call(lambda: worker.parameters.version)})

        @app.post("/update_weight_version")
        async def update_weight_version(new_version: Annotated[str, Body(embed=True)]) -> Response:
            await worker.call(lambda: setattr(worker.parameters, "version", new_version))
            return json_response({"success": True, "new_version": new_version})

    if release >= _SHUTDOWN_SINCE:

        @app.post("/shutdown_weight_transfer_engine")
        async def shutdown_weight_transfer_engine() -> Response:
            await worker.shutdown_weight_transfer()
            return json_response({"message": "Weight transfer engine shut down"})


def _add_adapters(app: FastAPI, worker: VLLMWorker) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterBody) -> Response:
        name = body.lora_name
        if not name or not body.lora_path:
            raise Refused("lora_name and lora_path must not be empty", kind="InvalidUserInput")
        if name == worker.config.model:
            raise Refused(f"{name!r} is the name of the model itself", kind="InvalidUserInput")
        if name in worker.adapters and not body.load_inplace:
            raise Refused(f"the adapter {name!r} has already been loaded", kind="InvalidUserInput")
        try:
            await worker.load_adapter(name, body.lora_path)
        except FileNotFoundError as error:
            raise not_found(f"Loading lora {name} failed: no adapter at its path") from error
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterBody) -> Response:
        name = body.lora_name
        if not name:
            raise Refused("lora_name must not be empty", kind="InvalidUserInput")
        if worker.adapters.pop(name, None) is None:
            raise not_found(f"there is no adapter {name!r}")
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")


async def _body(request: Request) -> Mapping[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise Refused("Invalid JSON format", kind="Bad Request") from error
    if not isinstance(body, Mapping):
        # The real server does not check this, and fails.
        raise AttributeError(f"{type(body).__name__!r} object has no attribute 'get'")
    return body


async def _field(request: Request, name: str) -> Any:
    found = (await _body(request)).get(name)
    if found is None:
        raise Refused(f"Missing '{name}' in request body", kind="Bad Request")
    return found


def _model_card(model: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    now = int(time.time())
    permission = {
        "id": f"modelperm-{secrets.token_hex(8)}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": model,
        "object": "model",
        "created": now,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }


def _vllm_config(worker: VLLMWorker) -> dict[str, Any]:
    """As much of vLLM's configuration as its clients read."""
    config = worker.config
    transfer = None if config.weight_transfer == "none" else {"backend": config.weight_transfer}
    return {
        "model_config": {
            "model": config.model,
            "tokenizer": config.model,
            "dtype": f"torch.{config.dtype}",
            "seed": 0,
            "max_model_len": config.max_model_len,
            "max_logprobs": config.max_logprobs,
            "logprobs_mode": config.logprobs_mode,
            "served_model_name": config.model,
        },
        "parallel_config": {
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": 1,
            "data_parallel_size": config.data_parallel_size,
            "world_size": config.tensor_parallel_size,
            "rank": 0,
        },
        "scheduler_config": {"max_num_seqs": config.max_num_seqs},
        "weight_transfer_config": transfer,
    }
