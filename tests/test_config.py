"""Settings as values."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from trl_pool import PoolConfig
from trl_pool.errors import ConfigurationError

DEFAULTS: dict[str, Any] = {
    "fail_eject_threshold": 3,
    "cooldown_seconds": 30.0,
    "max_cooldown_seconds": 300.0,
    "health_interval": 3.0,
    "health_timeout": 2.0,
    "connect_timeout": 10.0,
    "request_timeout": 900.0,
    "total_timeout": 1700.0,
    "control_timeout": 120.0,
    "drain_timeout": 900.0,
    "update_idle_timeout": 600.0,
    "max_inflight_per_backend": 8,
    "max_attempts": 5,
    "backoff_seconds": 0.2,
    "backend_wait_seconds": 60.0,
    "prompt_sticky_prefix_chars": 200,
    "split_batches": True,
    "prefix_memory": 65536,
    "balance_factor": 1.25,
    "virtual_nodes": 160,
    "max_queue": None,
    "queue_timeout": None,
    "min_backends": 1,
    "max_staleness": 0,
    "required_model_version": None,
    "max_model_len": None,
    "vocab_size": None,
    "max_logprobs": 20,
    "backend_api_key": None,
    "weight_transport": "auto",
    "update_group_host": None,
    "weight_buffer_mb": 256,
    "sync_retries": 2,
    "trust_env": False,
    "progress": False,
}

POSITIVE_SECONDS = [
    "cooldown_seconds",
    "max_cooldown_seconds",
    "health_interval",
    "health_timeout",
    "connect_timeout",
    "request_timeout",
    "total_timeout",
    "control_timeout",
    "drain_timeout",
    "update_idle_timeout",
]

OUT_OF_RANGE: list[tuple[str, Any]] = [
    *((field, value) for field in POSITIVE_SECONDS for value in (0, -1.0, float("nan"), float("inf"), "soon", None)),
    *((field, value) for field in ("backoff_seconds", "backend_wait_seconds") for value in (-0.1, float("inf"))),
    *((field, value) for field in ("backoff_seconds", "queue_timeout") for value in (-0.1, float("nan"))),
    *((field, 0) for field in ("fail_eject_threshold", "max_inflight_per_backend", "max_attempts", "min_backends")),
    *((field, 2.5) for field in ("fail_eject_threshold", "max_inflight_per_backend", "max_attempts", "max_queue")),
    ("prompt_sticky_prefix_chars", 0),
    ("prefix_memory", -1),
    ("prefix_memory", 1.5),
    ("balance_factor", 0.99),
    ("balance_factor", float("inf")),
    ("virtual_nodes", 149),
    ("virtual_nodes", 10_001),
    ("max_queue", -1),
    ("max_staleness", -1),
    ("required_model_version", ""),
    ("backend_api_key", ""),
    ("weight_transport", "ipc"),
    ("update_group_host", ""),
    ("weight_buffer_mb", 0),
    ("sync_retries", -1),
    ("max_model_len", 1),
    ("vocab_size", 0),
    ("max_logprobs", -2),
    ("split_batches", "perhaps"),
    ("trust_env", 2),
    ("progress", None),
]


def test_the_defaults_are_the_documented_ones() -> None:
    assert PoolConfig().model_dump() == DEFAULTS


def test_the_docstring_names_every_field_with_its_default() -> None:
    text = " ".join((PoolConfig.__doc__ or "").split())
    for field, default in DEFAULTS.items():
        said = text.split(f" {field} (`")[1].split("):")[0]
        if default is None:
            assert "defaults" not in said, field
        else:
            shown = f'"{default}"' if isinstance(default, str) else default
            assert f"*optional*, defaults to `{shown}`" in said, field


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        PoolConfig(**{field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fail_eject_threshold", 1),
        ("cooldown_seconds", 0.001),
        ("cooldown_seconds", 300),
        ("backoff_seconds", 0),
        ("backend_wait_seconds", 0),
        ("prefix_memory", 0),
        ("balance_factor", 1),
        ("virtual_nodes", 150),
        ("virtual_nodes", 10_000),
        ("max_queue", 0),
        ("queue_timeout", 0),
        ("max_model_len", 2),
        ("vocab_size", 1),
        ("max_logprobs", -1),
        ("max_logprobs", 0),
    ],
)
def test_a_value_on_the_border_is_accepted(field: str, value: Any) -> None:
    assert getattr(PoolConfig(**{field: value}), field) == value


def test_every_field_with_a_range_is_among_those_tested() -> None:
    free = {"split_batches", "trust_env", "progress"}
    assert {field for field, _ in OUT_OF_RANGE} | free == set(PoolConfig.model_fields)


def test_a_first_cooldown_above_the_cap_is_accepted_because_the_variable_alone_should_do() -> None:
    assert PoolConfig.from_env({"COOLDOWN_SECONDS": "600"}).cooldown_seconds == 600


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"cooldown\n.*Extra inputs are not permitted"):
        PoolConfig(cooldown=3)  # type: ignore[call-arg]


def test_settings_cannot_be_changed_and_equal_ones_are_equal() -> None:
    config = PoolConfig(max_attempts=2)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.max_attempts = 3  # type: ignore[misc]
    assert config.max_attempts == 2
    assert config == PoolConfig(max_attempts=2) != PoolConfig()
    assert len({config, PoolConfig(max_attempts=2)}) == 1


def test_every_field_can_come_from_the_variable_of_its_name() -> None:
    changed: dict[str, Any] = {
        field: {bool: not value, int: 151, float: 77.5, str: "gloo", type(None): None}[type(value)]
        for field, value in DEFAULTS.items()
    }
    changed.update(
        update_group_host="10.0.0.1",
        backend_api_key="k",
        max_queue=9,
        queue_timeout=1.5,
        required_model_version="step-7",
        max_model_len=256,
        vocab_size=512,
    )
    environ = {field.upper(): str(value) for field, value in changed.items()}
    read = PoolConfig.from_env(environ)
    assert read.backend_api_key is not None
    assert "'k'" not in repr(read)
    assert {**read.model_dump(), "backend_api_key": read.backend_api_key.get_secret_value()} == changed


def test_the_process_environment_is_read_when_no_other_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEALTH_INTERVAL", "5")
    assert PoolConfig.from_env().health_interval == 5.0
    assert PoolConfig().health_interval == 3.0


@pytest.mark.parametrize("empty", ["", "  ", "\t\n"])
def test_an_empty_variable_is_as_good_as_none(empty: str) -> None:
    assert PoolConfig.from_env(dict.fromkeys(map(str.upper, DEFAULTS), empty)) == PoolConfig()


def test_spaces_around_a_value_do_not_matter() -> None:
    config = PoolConfig.from_env({"MAX_ATTEMPTS": " 7 ", "REQUIRED_MODEL_VERSION": " step-7\n"})
    assert (config.max_attempts, config.required_model_version) == (7, "step-7")


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("YES", True), ("0", False), ("False", False), ("off", False)]
)
def test_switches_read_the_usual_words(text: str, value: bool) -> None:
    assert PoolConfig.from_env({"SPLIT_BATCHES": text}).split_batches is value


def test_other_variables_and_lower_case_ones_are_left_alone() -> None:
    assert PoolConfig.from_env({"PATH": "/bin", "max_attempts": "9", "BACKENDS": "n1"}) == PoolConfig()


def test_overrides_win_over_the_environment_even_over_a_wrong_one() -> None:
    assert PoolConfig.from_env({"MAX_ATTEMPTS": "7"}, max_attempts=2).max_attempts == 2
    assert PoolConfig.from_env({"MAX_ATTEMPTS": "x"}, max_attempts=2).max_attempts == 2
    assert PoolConfig.from_env({"MAX_QUEUE": "7"}, max_queue=None).max_queue is None


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("FAIL_EJECT_THRESHOLD", "0", "greater than or equal to 1"),
        ("COOLDOWN_SECONDS", "thirty", "valid number"),
        ("HEALTH_INTERVAL", "-3", "greater than 0"),
        ("REQUEST_TIMEOUT", "inf", "finite number"),
        ("REQUEST_TIMEOUT", "nan", "finite number"),
        ("MAX_INFLIGHT_PER_BACKEND", "8.5", "valid integer"),
        ("VIRTUAL_NODES", "10", "greater than or equal to 150"),
        ("SPLIT_BATCHES", "maybe", "valid boolean"),
        ("MAX_QUEUE", "many\nlines", "valid integer"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value_and_what_is_allowed_in_one_line(
    variable: str, value: str, allowed: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PoolConfig.from_env({variable: value})
    message = str(caught.value)
    assert message.startswith(f"{variable}={value!r}: ")
    assert allowed in message
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_every_wrong_variable_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        PoolConfig.from_env({"MAX_ATTEMPTS": "0", "MAX_QUEUE": "-1"}, nonsense=1)
    assert str(caught.value).count("; ") == 2
    for part in ("MAX_ATTEMPTS='0': ", "MAX_QUEUE='-1': ", "NONSENSE=1: "):
        assert part in str(caught.value)


def test_a_password_in_a_wrong_variable_is_not_shown() -> None:
    with pytest.raises(ConfigurationError, match=r"MAX_QUEUE='\*\*\*@n1:8000': ") as caught:
        PoolConfig.from_env({"MAX_QUEUE": "http://user:s3cret@n1:8000"})
    assert "s3cret" not in str(caught.value)


def test_a_longer_request_timeout_alone_is_not_cut_short_by_the_whole_calls() -> None:
    assert PoolConfig(request_timeout=3000).total_timeout == 3000
    assert PoolConfig.from_env({"REQUEST_TIMEOUT": "3000"}).total_timeout == 3000
    assert PoolConfig(request_timeout=3000, total_timeout=20).total_timeout == 20
