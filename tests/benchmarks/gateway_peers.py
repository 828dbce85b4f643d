"""What is measured beside the gateway: how each peer is started, and the servers behind all of them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import httpx

# A C program that answers from the page cache, so that what is measured is the proxy. A POST to a file is an error to
# nginx; `error_page` turns an error of ours into the file.
_NGINX_BACKENDS = Template(
    """
    server {
      listen 127.0.0.1:$vllm1; listen 127.0.0.1:$vllm2; root $folder;
      location = /v1/completions { error_page 418 =200 /answer.json; return 418; }
      location = /v1/chat/completions { error_page 418 =200 /large.json; return 418; }
      location = /v1/models { return 200 '{"data":[{"id":"m"}]}'; }
      location = /version { return 200 '{"version":"0.31.0"}'; }
      location = /health { return 200; }
    }
    server {
      listen 127.0.0.1:$trl1; listen 127.0.0.1:$trl2; root $folder;
      location = /generate/ { error_page 418 =200 /generated.json; return 418; }
      location = /health/ { return 200 '{"status":"ok"}'; }
      location = /get_world_size/ { return 200 '{"world_size":1}'; }
    }
"""
)

_NGINX = Template(
    """worker_processes 1; daemon off; pid $folder/$name.pid; error_log $folder/$name.log crit;
events { worker_connections 1024; }
http {
    access_log off; sendfile on; tcp_nodelay on; default_type application/json; log_not_found off;
    keepalive_requests 1000000000; client_body_buffer_size 64k; client_max_body_size 20m; open_file_cache max=16;
    client_body_temp_path $folder/$name.body; proxy_temp_path $folder/$name.proxy;
    fastcgi_temp_path $folder/$name.1; uwsgi_temp_path $folder/$name.2; scgi_temp_path $folder/$name.3;
$servers
}
"""
)

_NGINX_PROXY = Template(
    """
    upstream servers { hash $$http_x_session_id consistent; server $one; server $two; keepalive 64; }
    server {
      listen 127.0.0.1:$port;
      location / { proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection ""; $buffers }
    }
"""
)

_HAPROXY = Template(
    """global
    maxconn 1024
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option http-no-delay
frontend front
    bind 127.0.0.1:$port
    default_backend servers
backend servers
    balance hdr(x-session-id)
    hash-type consistent
    hash-balance-factor 150
    server one $one check
    server two $two check
"""
)


LARGE_PATH = "/v1/chat/completions"
"""Where the servers answer 20 MB."""


@dataclass(frozen=True)
class Fleet:
    """Two servers that are measured through a proxy.

    Args:
        urls (`tuple[str, str]`): Where they are.
        path (`str`): What they are asked.
    """

    urls: tuple[str, str]
    path: str

    @property
    def hosts(self) -> tuple[str, str]:
        first, second = (url.removeprefix("http://") for url in self.urls)
        return first, second


class Programs:
    """Runs programs, and ends them with all their children.

    Args:
        folder (`Path`): For their settings and output.
        search (`Sequence[Path]`): Where peers are looked for, before the PATH.
    """

    def __init__(self, folder: Path, search: Sequence[Path]) -> None:
        self.folder, self._search = folder, search
        self._running: list[subprocess.Popen[bytes]] = []

    def find(self, name: str) -> str | None:
        """Path of a program, if it is installed; that of a folder named like it comes first."""
        places = sorted(self._search, key=lambda place: name not in place.parent.name)
        path = os.pathsep.join([*map(str, places), os.environ.get("PATH", ""), "/usr/sbin"])
        return shutil.which(name, path=path)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a program; what it says goes to a file of that name."""
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self._running.append(process)
        return process

    def nginx(self, name: str, servers: str) -> subprocess.Popen[bytes]:
        """Starts an nginx with these servers."""
        config = self.folder / f"{name}.conf"
        config.write_text(_NGINX.substitute(folder=self.folder, name=name, servers=servers))
        return self.start(name, [str(self.find("nginx")), "-e", str(self.folder / f"{name}.log"), "-c", str(config)])

    def stop(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def programs(folder: Path, search: Sequence[Path]) -> Iterator[Programs]:
    running = Programs(folder, search)
    try:
        yield running
    finally:
        running.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_backends(running: Programs, delay: float) -> dict[str, Fleet]:
    """The servers: nginx for answers at once, a small asyncio protocol for those that take `delay` seconds."""
    v1, v2, t1, t2, d1, d2 = free_ports(6)
    running.nginx("backends", _NGINX_BACKENDS.substitute(vllm1=v1, vllm2=v2, trl1=t1, trl2=t2, folder=running.folder))
    late = [sys.executable, "-m", "tests.benchmarks.gateway_backend", str(running.folder / "answer.json")]
    running.start("late", [*late, str(delay), str(d1), str(d2)])

    def urls(a: int, b: int) -> tuple[str, str]:
        return f"http://127.0.0.1:{a}", f"http://127.0.0.1:{b}"

    fleets = {
        "A /v1/completions": Fleet(urls(v1, v2), "/v1/completions"),
        "A /generate/": Fleet(urls(t1, t2), "/generate/"),
        "B /v1/completions": Fleet(urls(d1, d2), "/v1/completions"),
        "20 MB": Fleet(urls(v1, v2), LARGE_PATH),
    }
    for fleet in fleets.values():
        for url in fleet.urls:
            wait_for(url + fleet.path)
    return fleets


ROUTERS = {
    "vllm-router": ["--policy", "consistent_hash"],
    "sglang-router": ["launch", "--policy", "cache_aware"],
    "smg": ["launch", "--policy", "consistent_hashing"],
}
"""Routers of the same job in Rust: how each is told to keep a session where it is, as well as it can."""

PEERS = ("trl_pool", "fastapi", "haproxy", "nginx", *ROUTERS, "litellm")


def start_peer(name: str, fleet: Fleet, running: Programs, tag: str) -> str | None:
    """Starts a proxy in front of a fleet.

    Args:
        name (`str`): One of `PEERS`.
        fleet ([`Fleet`]): What it stands in front of.
        running ([`Programs`]): Runs it.
        tag (`str`): Tells files of this fleet's proxies from others'.

    Returns:
        `str` or `None`: Its URL; `None` when it is not installed, or cannot serve that path.
    """
    port, metrics = free_ports(2)
    url, (one, two) = f"http://127.0.0.1:{port}", fleet.hosts
    label = f"{tag}-{name}"
    if name == "trl_pool":
        options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
        command = [sys.executable, "-m", "trl_pool.server", "--backends", ",".join(fleet.urls), *options]
        process = running.start(label, command)
    elif name == "fastapi" and importlib.util.find_spec("aiohttp"):
        process = running.start(
            label, [sys.executable, "-m", "tests.benchmarks.gateway_fastapi", str(port), *fleet.urls]
        )
    elif name == "haproxy" and running.find(name):
        config = running.folder / f"{label}.cfg"
        config.write_text(_HAPROXY.substitute(port=port, one=one, two=two))
        process = running.start(label, [str(running.find(name)), "-f", str(config)])
    elif name == "nginx" and running.find(name):
        buffers = "proxy_buffers 16 64k; proxy_busy_buffers_size 128k; proxy_max_temp_file_size 0;"
        process = running.nginx(label, _NGINX_PROXY.substitute(port=port, one=one, two=two, buffers=buffers))
    elif name in ROUTERS and fleet.path.startswith("/v1/") and running.find(name):
        where = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *fleet.urls]
        watched = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--log-level", "error"]
        process = running.start(label, [str(running.find(name)), *ROUTERS[name], *where, *watched])
    elif name == "litellm" and fleet.path.startswith("/v1/") and running.find(name):
        config = running.folder / f"{label}.yaml"
        models = "".join(
            f"  - model_name: m\n    litellm_params: {{model: openai/m, api_base: '{u}/v1', api_key: x}}\n"
            for u in fleet.urls
        )
        config.write_text(f"model_list:\n{models}")
        process = running.start(label, [str(running.find(name)), "--config", str(config), "--port", str(port)])
    else:
        return None
    return url if wait_for(url + fleet.path, process, needed=name == "trl_pool") else None


def wait_for(
    url: str, process: subprocess.Popen[bytes] | None = None, *, seconds: float = 30.0, needed: bool = True
) -> bool:
    """Whether a POST is answered 200 before the time is over, or the process.

    Raises:
        `RuntimeError`: when it is not, though it is needed.
    """
    body = {"model": "m", "prompt": "x", "prompts": ["x"], "messages": [], "max_tokens": 8}
    end = time.monotonic() + seconds
    last = ""
    with httpx.Client(trust_env=False, timeout=10.0) as client:
        while time.monotonic() < end and (process is None or process.poll() is None):
            try:
                answer = client.post(url, json=body, headers={"x-session-id": "s"})
                if answer.status_code == 200:
                    return True
                last = f"{answer.status_code} {answer.text[:200]}"
            except httpx.HTTPError as error:
                last = str(error)
            time.sleep(0.1)
    if needed:
        raise RuntimeError(f"{url} does not answer: {last}")
    return False
