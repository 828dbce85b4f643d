"""Who a server is: found out by asking it, once after each start of its process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from .errors import AttemptError, Outcome, RequestRejectedError
from .exchange import Answer, Exchange, judge

GATEWAY_HEADER = "x-trl-pool"
"""Header of a gateway's answers; a pool that is given a gateway's address asks it for the backends behind it."""

_MUST_AGREE = ("model", "max_model_len", "logprobs_mode", "dtype")


@dataclass(frozen=True)
class Identity:
    """What a server says about itself. What it does not say is `None`.

    Args:
        dialect (`str`): `"trl"`, `"vllm"` or `"gateway"`.
        model (`str`, *optional*): What it calls its model.
        max_model_len (`int`, *optional*): Most tokens of a prompt and its completion.
        logprobs_mode (`str`, *optional*): Which logprobs it returns (`"processed_logprobs"`, for one).
        dtype (`str`, *optional*): Of its weights.
        weight_transfer (`str`, *optional*): Backend of its weight transfer engine.
        version (`str`, *optional*): Of vLLM.
        max_num_seqs (`int`, *optional*): Sequences that it runs at once, over all its engines.
        development (`bool`, *optional*, defaults to `False`): Whether its development endpoints are there, without
            which it takes no weights.
    """

    dialect: str
    model: str | None = None
    max_model_len: int | None = None
    logprobs_mode: str | None = None
    dtype: str | None = None
    weight_transfer: str | None = None
    version: str | None = None
    max_num_seqs: int | None = None
    development: bool = False

    def differences(self, other: Identity) -> list[str]:
        """What keeps two servers from sharing work, in words; what one of them does not say is no difference."""
        if self.dialect != other.dialect:
            return [f"speaks the {self.dialect!r} dialect, others {other.dialect!r}"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in _MUST_AGREE]
        return [f"has {name} {a!r}, others {b!r}" for name, a, b in pairs if None not in (a, b) and a != b]

    @property
    def keeps_version(self) -> bool:
        """Whether it remembers the version of its weights (vLLM 0.27.1 and later)."""
        return self.development and _numbers(self.version) >= (0, 27, 1)

    @property
    def frees_groups(self) -> bool:
        """Whether it can be told to give its side of an update group back (vLLM 0.32 and later). Others keep the last
        one until another takes its place."""
        return self.development and _numbers(self.version) >= (0, 32)


async def identify(exchange: Exchange, first: Answer, *, timeout: float) -> Identity | None:
    """Finds out who answered a probe at `/health/`.

    `trl vllm-serve` and gateways answer it; `vllm serve` has no slash there and redirects.

    Args:
        exchange ([`Exchange`]): HTTP to the server.
        first ([`Answer`]): Its answer to `GET /health/`.
        timeout (`float`): Seconds for each further question.

    Returns:
        [`Identity`] or `None`: `None` when it is nobody that a pool can use.

    Raises:
        [`AttemptError`]: when it did not answer the questions.
    """
    if GATEWAY_HEADER in first.headers:
        return Identity("gateway")
    if first.status == 200:
        return Identity("trl")
    if first.status not in (307, 308, 404, 405):
        return None
    models = await exchange.once("GET", "/v1/models", timeout=timeout)
    if models.status in (401, 403):
        raise AttemptError(
            exchange.url,
            Outcome.REJECTED,
            "it wants an API key; set api_key= or BACKEND_API_KEY",
            status=models.status,
        )
    card = _first_model(models)
    if card is None:
        return None
    version = _object(await exchange.once("GET", "/version", timeout=timeout)).get("version")
    info = await exchange.once("GET", "/server_info?config_format=json", timeout=timeout)
    config = _object(info).get("vllm_config")
    config = config if isinstance(config, dict) else {}
    model_config = config.get("model_config") or {}
    transfer = config.get("weight_transfer_config") or {}
    dtype = model_config.get("dtype")
    length = card.get("max_model_len")
    return Identity(
        dialect="vllm",
        model=str(card.get("id")),
        max_model_len=length if isinstance(length, int) else model_config.get("max_model_len"),
        logprobs_mode=model_config.get("logprobs_mode"),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        weight_transfer=transfer.get("backend"),
        version=None if version is None else str(version),
        max_num_seqs=_sequences(config),
        development=info.status == 200,
    )


def _sequences(config: dict[str, Any]) -> int | None:
    """`max_num_seqs` is each engine's, of which data parallelism has several."""
    each = (config.get("scheduler_config") or {}).get("max_num_seqs")
    engines = (config.get("parallel_config") or {}).get("data_parallel_size")
    return each * (engines if isinstance(engines, int) else 1) if isinstance(each, int) and each > 0 else None


async def weight_version(exchange: Exchange, *, timeout: float) -> str | None:
    """The version of the weights that a server says it has; `None` when it does not keep one.

    Raises:
        [`AttemptError`]: when it did not answer.
    """
    answer = await exchange.once("GET", "/weight_info", timeout=timeout)
    try:
        judge(exchange.url, answer)
    except RequestRejectedError:
        return None
    version = _object(answer).get("weight_version")
    return None if version is None else str(version)


def _first_model(answer: Answer) -> dict[str, Any] | None:
    data = _object(answer).get("data") if answer.status == 200 else None
    if isinstance(data, list) and data and isinstance(data[0], dict) and "id" in data[0]:
        return data[0]
    return None


def _object(answer: Answer) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(answer.body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(version: str | None) -> tuple[int, ...]:
    """`"0.31.0+cpu"` as `(0, 31, 0)`."""
    numbers = []
    for part in (version or "").partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
