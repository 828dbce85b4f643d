"""Settings as values: frozen, checked when they are made, readable from the documented environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from .errors import ConfigurationError

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def shown(value: object) -> str:
    """A setting's value for a message, without what stands before an `@`: that may be a password."""
    return re.sub(r"[^,\s'\"]*@", "***@", repr(value))


class PoolConfig(BaseModel):
    """How a pool balances, retries and gives up.

    Every field can also come from the environment variable of the same name in upper case ([`PoolConfig.from_env`]).

    Args:
        fail_eject_threshold (`int`, *optional*, defaults to `3`):
            Consecutive failures after which a backend is ejected.
        cooldown_seconds (`float`, *optional*, defaults to `30.0`):
            How long a first ejection lasts; the k-th in a row lasts k times as long.
        max_cooldown_seconds (`float`, *optional*, defaults to `300.0`):
            Longest ejection (never shorter than `cooldown_seconds`).
        health_interval (`float`, *optional*, defaults to `3.0`):
            Seconds between two health probes of a backend.
        health_timeout (`float`, *optional*, defaults to `2.0`):
            Seconds a probe may take.
        connect_timeout (`float`, *optional*, defaults to `10.0`):
            Seconds to reach a backend.
        request_timeout (`float`, *optional*, defaults to `900.0`):
            Seconds one attempt on one backend may take.
        total_timeout (`float`, *optional*, defaults to `1700.0`):
            Seconds a whole call may take, waiting and fail-over included. It stays below torch's default
            `ddp_timeout` of 1800 s, after which the other ranks kill a job whose main process still waits. Never
            shorter than `request_timeout`, unless it is set so.
        control_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds one control call (weights, caches) may take.
        drain_timeout (`float`, *optional*, defaults to `900.0`):
            Seconds a weight update or a removal waits for requests that are out.
        update_idle_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds without any control call after which an unfinished weight update counts as abandoned.
        max_inflight_per_backend (`int`, *optional*, defaults to `8`):
            HTTP requests a backend has from us at once.
        max_attempts (`int`, *optional*, defaults to `5`):
            Rounds of fail-over for a shard.
        backoff_seconds (`float`, *optional*, defaults to `0.2`):
            First upper bound of the jittered wait before a round of fail-over; it doubles up to 10 s.
        backend_wait_seconds (`float`, *optional*, defaults to `60.0`):
            How long a call waits for a backend to come back when none is eligible, before it raises.
        prompt_sticky_prefix_chars (`int`, *optional*, defaults to `200`):
            Characters of a prompt that make its affinity key; a quarter as many tokens of a token-id prompt.
        split_batches (`bool`, *optional*, defaults to `True`):
            Whether the prompts of a request are spread over the backends. Otherwise a request goes as a whole to
            the backend of its first prompt.
        prefix_memory (`int`, *optional*, defaults to `65536`):
            Beginnings of prompts of which the pool remembers who served them last, so that conversations come back
            to their cache even where all of them begin alike. About 200 bytes each; 0 remembers none.
        balance_factor (`float`, *optional*, defaults to `1.25`):
            Sticky requests leave their backend when its load exceeds this many times the mean (a quarter more, where
            no other has the beginning of their prompt in its cache).
        virtual_nodes (`int`, *optional*, defaults to `160`):
            Points of each backend on the hash ring.
        max_queue (`int`, *optional*):
            New calls that may wait for a slot; unbounded without it (the gateway's default is 1024).
        queue_timeout (`float`, *optional*):
            Seconds a new call may wait for its first slot; until its deadline without it (the gateway: 30).
        min_backends (`int`, *optional*, defaults to `1`):
            Servers that must be up for `check_server` to succeed when its time is over, and that a weight update
            must reach.
        max_staleness (`int`, *optional*, defaults to `0`):
            How many weight versions a backend may be behind and still serve. Only for trainers that expect it.
        required_model_version (`str`, *optional*):
            Serve only from backends whose health answer carries this `model_version`, or whose `/weight_info` says so,
            until the pool's own first weight update.
        max_model_len (`int`, *optional*):
            The servers' `--max_model_len`. Token-id prompts that leave no room for one more token within it are
            refused before they are sent: they hang a `trl vllm-serve` for good, and it tells its limit to nobody.
        vocab_size (`int`, *optional*):
            The model's. Token ids beyond it are refused before they are sent; they, too, hang the server for good.
        max_logprobs (`int`, *optional*, defaults to `20`):
            Most logprobs per token that the servers return (vLLM's `--max-logprobs`; `trl vllm-serve` has no option
            for it, so it is vLLM's default). `-1` switches the check off.
        backend_api_key (`SecretStr`, *optional*):
            Sent to the backends as `Authorization: Bearer`.
        weight_transport (`str`, *optional*, defaults to `"auto"`):
            What carries weights to the servers: `"nccl"`, `"gloo"`, or `"auto"`, which takes what a `vllm serve` was
            started with, and for `trl vllm-serve` what the trainer's device allows.
        update_group_host (`str`, *optional*):
            Address under which `vllm serve` reaches the trainer for weights; by default the one from which each
            server is reached.
        weight_buffer_mb (`int`, *optional*, defaults to `256`):
            Size in MiB of a buffer that tensors are packed into on their way to `vllm serve`. At most three exist at a
            time; a larger tensor makes a larger one.
        sync_retries (`int`, *optional*, defaults to `2`):
            How often a weight update that can be repeated (`update_model_params`) is repeated over the servers that
            are left.
        trust_env (`bool`, *optional*, defaults to `False`):
            Whether `HTTP_PROXY` and the like are obeyed. Off, because a proxy between a trainer and its servers
            answers 503 for ever.
        progress (`bool`, *optional*, defaults to `False`):
            Whether calls show a progress bar unless they say otherwise.

    Raises:
        `pydantic.ValidationError` (a `ValueError`): for an unknown field or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    fail_eject_threshold: int = Field(3, ge=1)
    cooldown_seconds: Seconds = 30.0
    max_cooldown_seconds: Seconds = 300.0
    health_interval: Seconds = 3.0
    health_timeout: Seconds = 2.0
    connect_timeout: Seconds = 10.0
    request_timeout: Seconds = 900.0
    total_timeout: Seconds = 1700.0
    control_timeout: Seconds = 120.0
    drain_timeout: Seconds = 900.0
    update_idle_timeout: Seconds = 600.0
    max_inflight_per_backend: int = Field(8, ge=1)
    max_attempts: int = Field(5, ge=1)
    backoff_seconds: float = Field(0.2, ge=0, allow_inf_nan=False)
    backend_wait_seconds: float = Field(60.0, ge=0, allow_inf_nan=False)
    prompt_sticky_prefix_chars: int = Field(200, ge=1)
    split_batches: bool = True
    prefix_memory: int = Field(65536, ge=0)
    balance_factor: float = Field(1.25, ge=1, allow_inf_nan=False)
    virtual_nodes: int = Field(160, ge=150, le=10_000)
    max_queue: int | None = Field(None, ge=0)
    queue_timeout: float | None = Field(None, ge=0, allow_inf_nan=False)
    min_backends: int = Field(1, ge=1)
    max_staleness: int = Field(0, ge=0)
    required_model_version: str | None = Field(None, min_length=1)
    max_model_len: int | None = Field(None, ge=2)
    vocab_size: int | None = Field(None, ge=1)
    max_logprobs: int = Field(20, ge=-1)
    backend_api_key: SecretStr | None = Field(None, min_length=1)
    weight_transport: Literal["auto", "nccl", "gloo"] = "auto"
    update_group_host: str | None = Field(None, min_length=1)
    weight_buffer_mb: int = Field(256, ge=1)
    sync_retries: int = Field(2, ge=0)
    trust_env: bool = False
    progress: bool = False

    @model_validator(mode="after")
    def _total_covers_one_attempt(self) -> Self:
        # A longer request_timeout alone would be cut short by a total_timeout that nobody has asked for.
        if "total_timeout" not in self.model_fields_set and self.total_timeout < self.request_timeout:
            object.__setattr__(self, "total_timeout", self.request_timeout)
        return self

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Reads the variables named like the fields in upper case; unset and empty ones keep their defaults.

        Args:
            environ (`Mapping[str, str]`, *optional*): Where to read; the process's environment by default.
            overrides: Fields that win over the environment.

        Raises:
            [`ConfigurationError`]: one line that names the variable, its value and what is allowed.
        """
        source = os.environ if environ is None else environ
        values: dict[str, Any] = {
            field: source[field.upper()].strip() for field in cls.model_fields if source.get(field.upper(), "").strip()
        }
        values.update(overrides)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigurationError(cls._in_one_line(error, values)) from None

    @classmethod
    def _in_one_line(cls, error: ValidationError, values: Mapping[str, Any]) -> str:
        """Every fault of a settings error: `VARIABLE=value: what is allowed`."""
        faults = []
        for fault in error.errors():
            field = str(fault["loc"][0]) if fault["loc"] else ""
            message = fault["msg"].removeprefix("Value error, ")
            if not field:
                faults.append(message)
            elif fault["type"] in ("bool_parsing", "bool_type"):
                given = f"{field.upper()}={shown(values.get(field))}"
                faults.append(f"{given}: not a valid boolean; allowed: 1, 0, true, false, yes, no, on, off")
            elif fault["type"] == "missing":
                faults.append(f"{field.upper()} is not set; allowed: {cls.model_fields[field].description}")
            else:
                faults.append(f"{field.upper()}={shown(values.get(field))}: {message}")
        return "; ".join(faults)
