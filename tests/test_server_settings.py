"""The gateway's settings: documented names and defaults, and one line for whatever is wrong with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import eventually
from test_server_process import GatewayProcess, children_of, clean_environment

from trl_pool.errors import ConfigurationError
from trl_pool.server import GatewaySettings
from trl_pool.server.lifecycle import refuse_workers
from trl_pool.sim import SimProcess

DOCUMENTED: dict[str, Any] = {
    "REQUIRED_MODEL_VERSION": None,
    "FAIL_EJECT_THRESHOLD": 3,
    "COOLDOWN_SECONDS": 30.0,
    "HEALTH_INTERVAL": 3.0,
    "REQUEST_TIMEOUT": 90.0,
    "MAX_BODY_MB": 20.0,
    "MAX_INFLIGHT_PER_BACKEND": 8,
    "STICKY_HEADER": "x-session-id",
    "PROMPT_STICKY_PREFIX_CHARS": 200,
    "SPLIT_BATCHES": True,
    "MAX_QUEUE": 1024,
    "QUEUE_TIMEOUT": 30.0,
}

GIVEN: dict[str, tuple[str, Any]] = {
    "BACKENDS": ("http://n1:8000,http://n2:8000", ("http://n1:8000", "http://n2:8000")),
    "REQUIRED_MODEL_VERSION": ("v7", "v7"),
    "FAIL_EJECT_THRESHOLD": ("5", 5),
    "COOLDOWN_SECONDS": ("1.5", 1.5),
    "HEALTH_INTERVAL": ("0.5", 0.5),
    "REQUEST_TIMEOUT": ("600", 600.0),
    "MAX_BODY_MB": ("0.5", 0.5),
    "MAX_INFLIGHT_PER_BACKEND": ("2", 2),
    "STICKY_HEADER": ("X-Episode", "X-Episode"),
    "PROMPT_STICKY_PREFIX_CHARS": ("50", 50),
    "SPLIT_BATCHES": ("0", False),
    "MAX_QUEUE": ("0", 0),
    "QUEUE_TIMEOUT": ("0", 0.0),
}

# Variable, bad value, a word of what is allowed.
BAD: list[tuple[str, str, str]] = [
    ("BACKENDS", "ftp://n1:21", "http:// or https://"),
    ("BACKENDS", "http://n1:8000, n1:8000/", "listed twice; allowed: each server once"),
    ("BACKENDS", "http://n1:8000?x=1", "query"),
    ("BACKENDS", "http://n1:seven", "HOST:PORT"),
    ("BACKENDS", "http://n1:99999", "HOST:PORT"),
    ("BACKENDS", "http://n1:8000 http://n2:8000", "HOST:PORT"),
    ("BACKENDS", "http://n1 :8000", "HOST:PORT"),
    ("BACKENDS", "http://[::1", "HOST:PORT"),
    ("BACKENDS", ",,", "URL[,URL...]"),
    ("FAIL_EJECT_THRESHOLD", "0", "greater than or equal to 1"),
    ("FAIL_EJECT_THRESHOLD", "2.5", "valid integer"),
    ("COOLDOWN_SECONDS", "-1", "greater than 0"),
    ("COOLDOWN_SECONDS", "inf", "finite"),
    ("HEALTH_INTERVAL", "often", "valid number"),
    ("HEALTH_INTERVAL", "nan", "finite"),
    ("REQUEST_TIMEOUT", "0", "greater than 0"),
    ("REQUEST_TIMEOUT", "90s", "valid number"),
    ("MAX_BODY_MB", "0", "greater than 0"),
    ("MAX_BODY_MB", "20\n30", "valid number"),
    ("MAX_INFLIGHT_PER_BACKEND", "0", "greater than or equal to 1"),
    ("STICKY_HEADER", "x session", "match pattern"),
    ("PROMPT_STICKY_PREFIX_CHARS", "0", "greater than or equal to 1"),
    ("SPLIT_BATCHES", "maybe", "valid boolean"),
    ("MAX_QUEUE", "-1", "greater than or equal to 0"),
    ("QUEUE_TIMEOUT", "-0.1", "greater than or equal to 0"),
]


def test_defaults_are_the_documented_ones() -> None:
    settings = GatewaySettings.from_env({"BACKENDS": "n1:8000"})
    assert {name: getattr(settings, name.lower()) for name in DOCUMENTED} == DOCUMENTED
    assert settings.max_body_bytes == 20_000_000


def test_every_documented_variable_is_read() -> None:
    settings = GatewaySettings.from_env({name: text for name, (text, _) in GIVEN.items()})
    assert {name: getattr(settings, name.lower()) for name in GIVEN} == {name: v for name, (_, v) in GIVEN.items()}


def test_set_and_empty_is_unset() -> None:
    settings = GatewaySettings.from_env({**dict.fromkeys(DOCUMENTED, " "), "BACKENDS": "n1:8000"})
    assert settings == GatewaySettings(backends=("n1:8000",))


def test_backends_are_a_string_or_a_sequence() -> None:
    as_string = GatewaySettings(backends="n1:8000, n2:8000")  # type: ignore[arg-type]
    assert as_string == GatewaySettings(backends=("http://n1:8000", "http://n2:8000"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://n1:8000", ["http://n1:8000"]),
        (" http://n1:8000/ ,, https://n2 ,", ["http://n1:8000", "https://n2:443"]),
        ("HTTP://N1:8000//", ["http://n1:8000"]),
        ("n1:8000,n2", ["http://n1:8000", "http://n2:80"]),
        ("http://[::1]:8000,[fe80::2]:8001", ["http://[::1]:8000", "http://[fe80::2]:8001"]),
        ("https://n1:8443/vllm/a/,https://n1:8443/vllm/b", ["https://n1:8443/vllm/a", "https://n1:8443/vllm/b"]),
    ],
)
def test_backends_are_read_as_people_write_them(text: str, expected: list[str]) -> None:
    """Spaces, trailing slashes, empty items, IPv6, https and path prefixes."""
    assert list(GatewaySettings.from_env({"BACKENDS": text}).backends) == expected


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_bad_value_is_one_line_with_variable_value_and_what_is_allowed(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        GatewaySettings.from_env({"BACKENDS": "n1:8000", name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value.strip()!r}: ")
    assert allowed in message
    assert "\n" not in message


def test_every_bad_value_is_in_the_same_line() -> None:
    with pytest.raises(ConfigurationError, match=r"MAX_QUEUE='x': .*; BACKENDS is not set; allowed: URL") as caught:
        GatewaySettings.from_env({"MAX_QUEUE": "x"})
    assert "\n" not in str(caught.value)


def test_a_password_in_an_address_is_refused_and_never_shown() -> None:
    with pytest.raises(ConfigurationError, match=r"BACKENDS.*user name or password") as caught:
        GatewaySettings.from_env({"BACKENDS": "http://me:hunter2@n1:8000"})
    assert "hunter2" not in str(caught.value)


def test_a_cooldown_may_be_longer_than_the_longest_by_default() -> None:
    """A documented variable by itself never contradicts an undocumented one."""
    assert GatewaySettings.from_env({"BACKENDS": "n1:8000", "COOLDOWN_SECONDS": "400"}).cooldown_seconds == 400


# What the shell sees. The processes are started together: each takes a moment.

STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "module without backends": ("module", {}),
    "module with a bad number": ("module", {"backends": "n1:8000", "request_timeout": "soon"}),
    "uvicorn without backends": ("uvicorn", {}),
    "uvicorn with a bad address": ("uvicorn", {"backends": "ftp://n1:21"}),
}
LINES = {
    "without backends": "trl_pool.server: BACKENDS is not set; allowed: URL[,URL...]",
    "with a bad address": "trl_pool.server: BACKENDS='ftp://n1:21': backend address 'ftp://n1:21': scheme 'ftp'; "
    "allowed: http:// or https://, HOST:PORT (IPv6 in brackets) and an optional path prefix",
    "with a bad number": "trl_pool.server: REQUEST_TIMEOUT='soon': "
    "Input should be a valid number, unable to parse string as a number",
}


@pytest.fixture(scope="module")
def ended() -> dict[str, tuple[int, str]]:
    """Exit status and standard error of each of `STARTS`."""

    def run(name: str) -> tuple[int, str]:
        form, environ = STARTS[name]
        with GatewayProcess(form, **{"backends": None, **environ}) as gateway:
            return gateway.wait(), gateway.log

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(STARTS, threads.map(run, STARTS), strict=True))


@pytest.mark.parametrize("name", STARTS)
def test_a_bad_setting_ends_the_start_with_one_line(name: str, ended: dict[str, tuple[int, str]]) -> None:
    code, log = ended[name]
    assert log == LINES[name.partition(" ")[2]] + "\n"
    assert code in (1, 2)


def test_a_bad_option_is_told_like_the_variable() -> None:
    with GatewayProcess("module", "n1:8000", ["--max-body-mb", "huge"]) as gateway:
        assert gateway.wait() == 2
        assert gateway.log == (
            "trl_pool.server: MAX_BODY_MB='huge': Input should be a valid number, unable to parse string as a number\n"
        )


def test_importing_the_package_reads_no_environment_and_makes_no_app() -> None:
    """`app` is made when it is asked for, once."""
    script = (
        "import os\n"
        "os.environ['BACKENDS'] = 'ftp://wrong'\n"
        "import trl_pool.server, trl_pool.server.application, trl_pool.server.lifecycle\n"
        "assert 'app' not in vars(trl_pool.server)\n"
        "os.environ['BACKENDS'] = 'http://n1:8000'\n"
        "from trl_pool.server import app\n"
        "assert app.state.settings.backends == ('http://n1:8000',)\n"
        "assert trl_pool.server.app is app\n"
        "try:\n"
        "    trl_pool.server.no_such_name\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=clean_environment({}), capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "module 'trl_pool.server' has no attribute 'no_such_name'\n"


# More than one worker process.

WHY = "limits, circuit breakers and the weight fence live in one process"


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["uvicorn", "--workers", "2"], {}, "--workers=2"),
        (["uvicorn", "--workers=3"], {}, "--workers=3"),
        (["gunicorn", "-w", "4"], {}, "-w=4"),
        ([], {"WEB_CONCURRENCY": "2"}, "WEB_CONCURRENCY=2"),
        (["uvicorn", "--workers"], {"WEB_CONCURRENCY": "2"}, None),
        (["uvicorn", "--workers", "1"], {"WEB_CONCURRENCY": "2"}, None),
        (["uvicorn"], {"WEB_CONCURRENCY": "1"}, None),
        (["uvicorn"], {"WEB_CONCURRENCY": ""}, None),
        (["uvicorn"], {}, None),
    ],
)
def test_more_than_one_worker_is_refused_by_name(argv: list[str], environ: dict[str, str], named: str | None) -> None:
    """However it is asked for; the command line wins over the variable, as in uvicorn."""
    if named is None:
        refuse_workers(argv, environ)
        return
    with pytest.raises(ConfigurationError) as caught:
        refuse_workers(argv, environ)
    assert str(caught.value) == f"{named}: allowed: 1, since {WHY}"


def test_the_module_refuses_web_concurrency_with_one_line() -> None:
    with GatewayProcess("module", "n1:8000", web_concurrency=2) as gateway:
        assert gateway.wait() == 2
        assert gateway.log == f"trl_pool.server: WEB_CONCURRENCY=2: allowed: 1, since {WHY}\n"


@pytest.mark.parametrize(
    ("options", "environ", "named"),
    [(["--workers", "2"], {}, "--workers=2"), ([], {"web_concurrency": 2}, "WEB_CONCURRENCY=2")],
)
def test_uvicorn_with_two_workers_ends_and_leaves_nobody(
    options: list[str], environ: dict[str, Any], named: str
) -> None:
    """Though its supervisor would start workers that end again and again."""
    with GatewayProcess("uvicorn", "n1:8000", options, **environ) as gateway:
        seen: set[int] = set()

        def is_over() -> bool:
            seen.update(children_of(gateway.child.pid))
            return gateway.child.poll() is not None

        eventually(is_over, 30)
        assert f"trl_pool.server: {named}: allowed: 1, since {WHY}" in gateway.log
        assert "Application startup complete" not in gateway.log
        assert "Traceback" not in gateway.log
        eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in seen))


def test_an_empty_web_concurrency_is_none(fleet: Callable[[int], list[SimProcess]]) -> None:
    with GatewayProcess("module", fleet(1), web_concurrency="") as gateway:
        gateway.ready()
