"""Starts, watches and ends real servers: `trl vllm-serve` and `vllm serve`."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import requests

from trl_pool.sim.process import hold_port

HOST: Final = "127.0.0.1"
# Half of the model's own limit: "longer than the server allows" is then not also "longer than the model can".
MAX_MODEL_LEN: Final = 256
START_SECONDS: Final = 240.0
_TAIL_BYTES: Final = 6000
# How multiprocessing heads the traceback of a child that raised.
_WORKER_DIED: Final = b"\nProcess Process-"


def quiet_ports(count: int) -> int:
    """The first of so many ports in a row, all free, that no outgoing connection takes.

    A worker cannot listen on a port that a connection has, and outgoing connections, the pool's own among them, take
    theirs from the range in which free ports are usually looked for.
    """
    outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        first = random.randrange(15_000, outgoing - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        return first


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


class Server:
    """One server in a process group of its own; what is particular to a generation is in the subclasses.

    Args:
        model_dir (`Path`):
            Checkpoint to serve.
        log_dir (`Path`, *optional*):
            Where the log file goes; a fresh temporary directory if not given.
        python (`str`, *optional*, defaults to the running interpreter):
            Interpreter of the environment that has TRL and vLLM.
        max_model_len (`int`, *optional*, defaults to `256`):
            Limit on prompt plus completion, in tokens.
        arguments (`Sequence[str]`, *optional*):
            More of them, for the command line.
        environment (`Mapping[str, str]`, *optional*):
            More variables.
    """

    health_path = "/health"

    def __init__(
        self,
        model_dir: Path,
        log_dir: Path | None = None,
        python: str = sys.executable,
        max_model_len: int = MAX_MODEL_LEN,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.max_model_len = max_model_len
        self.port: int | None = None
        self.arguments = list(arguments)
        self.environment = dict(environment or {})
        self._python = python
        self._log_dir = log_dir if log_dir is not None else Path(tempfile.mkdtemp(prefix="server-"))
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._held: socket.socket | None = None
        self.log_path: Path | None = None

    def __repr__(self) -> str:
        where = self.url if self.port else "no port"
        if self._process is None:
            return f"{type(self).__name__}({where}, not started)"
        return f"{type(self).__name__}({where}, pid {self._process.pid}, exit code {self._process.poll()})"

    def __enter__(self) -> Self:
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

    def start(self) -> Self:
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
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command(), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self._log_dir,
                # Workers outlive a killed parent and keep the port: only the whole group can be ended.
                start_new_session=True,
            )
        return self

    def wait_ready(self, deadline: float = START_SECONDS) -> Self:
        """Waits up to `deadline` seconds for the health check; raises `ServerError` with the log's tail."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if not self.running:
                raise self._error("ended before it was ready")
            if _WORKER_DIED in self._log_bytes():
                # The parent waits for its lost worker for ever; the test need not.
                raise self._error("lost its worker before it was ready")
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}{self.health_path}", timeout=2).status_code == 200:
                    return self
            time.sleep(0.5)
        raise self._error(f"was not ready after {deadline:.0f} s")

    def warm_up(self, deadline: float = 120.0) -> Self:
        """Sends one small generate: the first one takes 10 - 20 s, which would look like a hang to a test."""
        try:
            self._generate(deadline)
        except requests.RequestException as error:
            raise self._error(f"failed the warm-up: {error}") from error
        return self

    def answers(self, deadline: float = 10.0) -> bool:
        """Whether a small generate comes back in time: the health check also says ok when the worker is lost."""
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

    def close(self) -> None:
        """Ends it for good: its port is free for others then."""
        self.kill()
        if self._held is not None:
            self._held.close()
            self._held = None

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

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The logprob of each token but the first, per sequence."""
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {**server_environment(), **self.environment}

    def _script(self, name: str) -> str:
        # Beside the interpreter: the environment need not be activated.
        return str(Path(self._python).with_name(name))

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _generate(self, deadline: float) -> None:
        raise NotImplementedError

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


class TrlServer(Server):
    """`trl vllm-serve` of TRL up to 1.10."""

    health_path = "/health/"

    def _command(self) -> list[str]:
        return [
            *(self._script("trl"), "vllm-serve"),
            *("--model", str(self.model_dir)),
            *("--host", HOST),
            *("--port", str(self.port)),
            *("--dtype", "bfloat16"),
            *("--max_model_len", str(self.max_model_len)),
            *("--enforce_eager", "true"),
        ]

    def _generate(self, deadline: float) -> None:
        body = {"prompts": [[5, 6, 7]], "max_tokens": 2}
        requests.post(f"{self.url}/generate/", json=body, timeout=deadline).raise_for_status()

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As [`Server`]'s."""
        body = {"sequences": sequences, "prompt_lengths": [1] * len(sequences), "top_logprobs": 1}
        response = requests.post(
            f"{self.url}/get_sequence_logprobs/", json={**body, "response_format": "binary"}, timeout=60
        )
        response.raise_for_status()
        answer = response.json()
        batch, length, _ = answer["shape"]
        values = np.frombuffer(base64.b64decode(answer["actual_logprobs_b64"]), np.float32).reshape(batch, length)
        return [values[i, :n].tolist() for i, n in enumerate(answer["completion_lengths"])]


class VllmServer(Server):
    """`vllm serve` with the endpoints for training, as TRL from 1.11 uses it.

    Args:
        weight_transfer (`str`, *optional*, defaults to `"gloo"`): Name of the weight transfer engine.
        the others: As in [`Server`].
    """

    def __init__(
        self,
        model_dir: Path,
        log_dir: Path | None = None,
        python: str = sys.executable,
        max_model_len: int = MAX_MODEL_LEN,
        *,
        weight_transfer: str = "gloo",
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model_dir, log_dir, python, max_model_len, arguments=arguments, environment=environment)
        self.weight_transfer = weight_transfer

    @property
    def model(self) -> str:
        """Name that requests have to give."""
        return str(self.model_dir)

    def _environment(self) -> dict[str, str]:
        return {**server_environment(), "VLLM_SERVER_DEV_MODE": "1", **self.environment}

    def _command(self) -> list[str]:
        return [
            *(self._script("vllm"), "serve", str(self.model_dir)),
            *("--host", HOST),
            *("--port", str(self.port)),
            *("--dtype", "bfloat16"),
            *("--max-model-len", str(self.max_model_len)),
            "--enforce-eager",
            *("--logprobs-mode", "processed_logprobs"),
            *("--max-logprobs", "-1"),
            *("--weight-transfer-config", json.dumps({"backend": self.weight_transfer})),
        ]

    def _generate(self, deadline: float) -> None:
        body = {"model": self.model, "prompt": [5, 6, 7], "max_tokens": 2}
        requests.post(f"{self.url}/v1/completions", json=body, timeout=deadline).raise_for_status()

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As [`Server`]'s."""
        body = {"model": self.model, "prompt": sequences, "prompt_logprobs": 0, "max_tokens": 1}
        response = requests.post(f"{self.url}/v1/completions", json=body, timeout=60)
        response.raise_for_status()
        return [
            [
                entry[str(token)]["logprob"]
                for token, entry in zip(sequence[1:], choice["prompt_logprobs"][1:], strict=True)
            ]
            for sequence, choice in zip(sequences, response.json()["choices"], strict=True)
        ]
