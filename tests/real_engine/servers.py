"""Starts, watches and ends real `trl vllm-serve` processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final

import requests

from trl_pool.sim.process import hold_port

HOST: Final = "127.0.0.1"
# Half of the model's own limit: "longer than the server allows" is then not also "longer than the model can".
MAX_MODEL_LEN: Final = 256
START_SECONDS: Final = 240.0
_TAIL_BYTES: Final = 6000
# How multiprocessing heads the traceback of a child that raised.
_WORKER_DIED: Final = b"\nProcess Process-"


class ServerError(RuntimeError):
    """A server did not start or did not answer; the message ends with the tail of its log."""


def server_environment() -> dict[str, str]:
    """The caller's environment with what the CPU build and an offline run need."""
    environment = dict(os.environ)
    # Proxies of the surroundings must not see requests between server and worker.
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        environment.pop(name, None)
        environment.pop(name.upper(), None)
    environment.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    return environment


class TrlServer:
    """One `trl vllm-serve` in a process group of its own.

    Args:
        model_dir (`Path`):
            Checkpoint to serve.
        log_dir (`Path`, *optional*):
            Where the log file goes; a fresh temporary directory if not given.
        python (`str`, *optional*, defaults to the running interpreter):
            Interpreter of the environment that has TRL and vLLM.
        max_model_len (`int`, *optional*, defaults to `256`):
            Limit on prompt plus completion, in tokens.
    """

    def __init__(
        self,
        model_dir: Path,
        log_dir: Path | None = None,
        python: str = sys.executable,
        max_model_len: int = MAX_MODEL_LEN,
    ) -> None:
        self.model_dir = model_dir
        self.max_model_len = max_model_len
        self.port: int | None = None
        self._python = python
        self._log_dir = log_dir if log_dir is not None else Path(tempfile.mkdtemp(prefix="trl-server-"))
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._held: socket.socket | None = None
        self.log_path: Path | None = None

    def __repr__(self) -> str:
        where = self.url if self.port else "no port"
        if self._process is None:
            return f"TrlServer({where}, not started)"
        return f"TrlServer({where}, pid {self._process.pid}, exit code {self._process.poll()})"

    def __enter__(self) -> TrlServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base URL, without a trailing slash."""
        if self.port is None:
            raise ServerError("the server was not started")
        return f"http://{HOST}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the parent process lives; its worker may be lost all the same (see `answers`)."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> TrlServer:
        """Starts the process and returns at once, on a free port that stays the same over restarts."""
        if self._process is not None:
            raise ServerError(f"{self!r} was already started; kill() or stop() it first")
        if self._held is None:
            # It listens after half a minute, and outgoing connections take their ports from the same range.
            self._held = hold_port(HOST)
            assert self._held is not None, "these tests run on Linux"
        self.port = int(self._held.getsockname()[1])
        self._starts += 1
        self.log_path = self._log_dir / f"server-{self.port}-{self._starts}.log"
        # The script beside the interpreter: the environment need not be activated.
        command = [
            *(str(Path(self._python).with_name("trl")), "vllm-serve"),
            *("--model", str(self.model_dir)),
            *("--host", HOST),
            *("--port", str(self.port)),
            *("--dtype", "bfloat16"),
            *("--max_model_len", str(self.max_model_len)),
            *("--enforce_eager", "true"),
        ]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(),
                cwd=self._log_dir,
                # Workers outlive a killed parent and keep the port: only the whole group can be ended.
                start_new_session=True,
            )
        return self

    def wait_ready(self, deadline: float = START_SECONDS) -> TrlServer:
        """Waits up to `deadline` seconds for `/health/`; raises `ServerError` with the log's tail."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if not self.running:
                raise self._error("ended before it was ready")
            if _WORKER_DIED in self._log_bytes():
                # The parent waits for its lost worker for ever; the test need not.
                raise self._error("lost its worker before it was ready")
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health/", timeout=2).status_code == 200:
                    return self
            time.sleep(0.5)
        raise self._error(f"was not ready after {deadline:.0f} s")

    def warm_up(self, deadline: float = 120.0) -> TrlServer:
        """Sends one small generate: the first one takes 10 - 20 s, which would look like a hang to a test."""
        try:
            self._generate(deadline)
        except requests.RequestException as error:
            raise self._error(f"failed the warm-up: {error}") from error
        return self

    def answers(self, deadline: float = 10.0) -> bool:
        """Whether a small generate comes back in time: `/health/` also says ok when the worker is lost."""
        try:
            self._generate(deadline)
        except requests.RequestException:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to the whole group: what a lost machine looks like. Nothing to kill is no error."""
        self._end(signal.SIGKILL, grace_seconds=0)

    def stop(self, grace_seconds: float = 10.0) -> None:
        """SIGTERM to the whole group, SIGKILL to what is left after `grace_seconds`."""
        self._end(signal.SIGTERM, grace_seconds)

    def pause(self) -> None:
        """SIGSTOP to the whole group: connections stay open and nothing answers, as on a hung machine."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT to the whole group."""
        self._signal(signal.SIGCONT)

    def log_tail(self, size: int = _TAIL_BYTES) -> str:
        """The last `size` bytes of the log of the latest start."""
        return self._log_bytes()[-size:].decode("utf-8", errors="replace") or "(nothing)"

    def _log_bytes(self) -> bytes:
        return self.log_path.read_bytes() if self.log_path is not None and self.log_path.exists() else b""

    def _generate(self, deadline: float) -> None:
        response = requests.post(
            f"{self.url}/generate/", json={"prompts": [[5, 6, 7]], "max_tokens": 2}, timeout=deadline
        )
        response.raise_for_status()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            # The group's id is the parent's pid, also when the parent is gone and only workers are left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _group_alive(self) -> bool:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _end(self, number: signal.Signals, grace_seconds: float) -> None:
        if self._process is None:
            return
        self._signal(number)
        # A paused process takes no signal but SIGKILL.
        self._signal(signal.SIGCONT)
        end = time.monotonic() + grace_seconds
        while time.monotonic() < end:
            # poll() reaps the parent; unreaped, it would keep the group in existence.
            if self._process.poll() is not None and not self._group_alive():
                break
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self._process.wait(timeout=30)
        self._process = None

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{self!r} {what}. Log ({self.log_path}) ends with:\n{self.log_tail()}")
