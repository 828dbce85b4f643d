"""Who is in the pool: backends that come, go, are probed, drained and counted."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import httpx
import msgspec

from ._version import __version__
from .addresses import BackendAddress, parse_backends
from .backend import Backend, find
from .config import PoolConfig, shown
from .dialects.base import Dialect
from .dialects.trl import TrlDialect
from .dialects.vllm import VllmDialect
from .dispatch import Dispatcher
from .errors import (
    AttemptError,
    BackendMismatchError,
    BackendsUnreachableError,
    ConfigurationError,
    DuplicateBackendError,
    NoBackendAvailableError,
)
from .exchange import Exchange
from .facts import Health
from .health import HealthMonitor
from .identity import Identity
from .leases import BackendStatistics
from .lifetime import Lifetime, guarded
from .weights.coordinator import WeightCoordinator

logger = logging.getLogger(__name__)

USER_AGENT = f"trl_pool/{__version__}"

DEFAULT_HOST = "0.0.0.0"
DEFAULT_PORT = 8000

CLOSE_SECONDS = 5.0
"""Longest time that closing a pool may take."""


@dataclass(frozen=True)
class PoolStatistics:
    """The pool at one moment.

    Args:
        backends (`tuple[BackendStatistics, ...]`): Every backend.
        waiting (`int`): Pieces of work that wait for a slot.
        weight_version (`str`): `<run id>:<n>`, n counting the weight updates.
        gate (`str` or `None`): Why no request is sent to anybody now (a weight update), or `None`.
    """

    backends: tuple[BackendStatistics, ...]
    waiting: int
    weight_version: str
    gate: str | None


def resolve_backends(
    base_url: str | Iterable[str] | None, host: str, server_port: int
) -> tuple[list[BackendAddress], bool]:
    """Which backends the constructor's arguments mean, and whether they came from the environment.

    `base_url` wins, then `host` and `server_port` if one of them was given, then `BACKENDS`.
    """
    if base_url is not None:
        return parse_backends(base_url), False
    if (host, server_port) == (DEFAULT_HOST, DEFAULT_PORT) and os.environ.get("BACKENDS", "").strip():
        try:
            return parse_backends(os.environ["BACKENDS"]), True
        except ConfigurationError as error:
            raise ConfigurationError(f"BACKENDS={shown(os.environ['BACKENDS'])}: {error}") from None
    return parse_backends(f"http://{f'[{host}]' if ':' in host else host}:{server_port}"), False


class Fleet:
    """The backends and everything that watches over them.

    Args:
        addresses (`Iterable[BackendAddress]`): The backends to begin with.
        config ([`PoolConfig`]): Settings.
        connection_timeout (`float`, *optional*, defaults to `0.0`): Seconds that entering it waits for the servers.
        transport (`httpx.AsyncBaseTransport`, *optional*): Instead of sockets.
        control_only (`bool`, *optional*, defaults to `False`):
            Whether somebody else moves the tensors of weight updates (the gateway's client).
        clock (`Callable[[], float]`, *optional*): Monotonic seconds.
        rng (`random.Random`, *optional*): Decides ties.
    """

    def __init__(
        self,
        addresses: Iterable[BackendAddress],
        config: PoolConfig,
        *,
        connection_timeout: float = 0.0,
        transport: httpx.AsyncBaseTransport | None = None,
        control_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.lifetime = Lifetime(type(self).__name__)
        self._connection_timeout = connection_timeout
        self._transport = transport
        self._control_only = control_only
        self._clock = clock
        self._dialects: dict[str, Dialect] = {"trl": TrlDialect(), "vllm": VllmDialect()}
        rng = rng or random.Random()
        self._dispatcher = Dispatcher(config, clock=clock, rng=rng)
        self._weights = WeightCoordinator(self._dispatcher, config, clock=clock, all_or_nothing=control_only)
        self._monitor = HealthMonitor(
            lambda: self._dispatcher.backends.values(),
            config,
            rng=rng,
            changed=self._probed,
            recognised=self._recognised,
            version_of=self._weights.version_of,
            proved=self._weights.same_process,
        )
        for address in addresses:
            self._dispatcher.add(self._backend(address))

    def _backend(self, address: BackendAddress) -> Backend:
        return Backend(
            address,
            dialect=self.dialect,
            config=self.config,
            exchange=Exchange(
                address, self.config, transport=self._transport, user_agent=USER_AGENT, clock=self._clock
            ),
            clock=self._clock,
            required_weights=lambda: self._weights.number,
            changed=self._dispatcher.changed,
            doubted=self._monitor.probe_soon,
            restarted=lambda backend: self._dispatcher.memory.forget(backend.name),
            tally=self._dispatcher.tally,
        )

    async def restore(self, backend: Backend, identity: Identity) -> None:
        """Gives a server what it should have before it serves; a fleet without weights has nothing to give."""

    async def _recognised(self, backend: Backend, identity: Identity) -> None:
        """Compares a server that has said who it is with those that have before it."""
        await self.restore(backend, identity)
        others = [
            b
            for b in self._dispatcher.backends.values()
            if b is not backend and b.identity is not None and b.refusal is None
        ]
        backend.recognise(identity, self._dialects.get(identity.dialect, backend.dialect))
        if identity.dialect not in self._dialects:
            backend.refusal = f"is a {identity.dialect}, not a server"
            return
        differences = [] if not others or others[0].identity is None else identity.differences(others[0].identity)
        backend.refusal = "; ".join(differences) or None
        if backend.refusal is not None:
            logger.error("%s cannot share work with %s: it %s", backend.url, others[0].url, backend.refusal)

    def _probed(self) -> None:
        self._compare_start_weights()
        self._dispatcher.changed()

    def _compare_start_weights(self) -> None:
        """Version 0 is what the servers were started with. If they report different versions of that, one of them
        holds something else, and nobody serves before the first update."""
        told = {b.health.model_version for b in self._dispatcher.backends.values() if b.health.model_version}
        kept = all(b.identity is None or b.identity.keeps_version for b in self._dispatcher.backends.values())
        for backend in self._dispatcher.backends.values():
            conflict = len(told) > 1 and kept and self.config.required_model_version is None
            backend.sync.conflict = (
                f"reports weights {backend.health.model_version!r}, and the servers differ in that "
                f"({', '.join(sorted(told))}); none serves before the first weight update"
                if conflict
                else ""
            )

    async def _learn_from_gateways(self) -> bool:
        """Puts the backends behind gateways in the place of the gateways. Returns whether there were any."""
        gateways = [
            b for b in self._dispatcher.backends.values() if b.identity is not None and b.identity.dialect == "gateway"
        ]
        for gateway in gateways:
            try:
                answer = await gateway.exchange.once("GET", "/pool/backends", timeout=self.config.connect_timeout)
                told = msgspec.json.decode(answer.body)["backends"]
                addresses = parse_backends([entry["url"] for entry in told])
            except (AttemptError, ConfigurationError, ValueError, KeyError, TypeError) as error:
                raise BackendsUnreachableError(
                    {gateway.url: f"is a gateway and did not tell its backends: {error}"}
                ) from error
            logger.info("%s is a gateway to %s", gateway.url, ", ".join(address.url for address in addresses))
            await self._leave(gateway)
            for address in addresses:
                if address.name not in self._dispatcher.backends:
                    self._dispatcher.add(self._backend(address))
        return bool(gateways)

    # Life

    async def __aenter__(self) -> Self:
        try:
            await self.check_server(self._connection_timeout)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes communicators (in bounded time) and connections. A second time, and in a forked child, nothing."""
        if self.lifetime.over:
            return
        self.lifetime.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.lifetime.unused()
                if self._weights.group and not self._control_only:
                    await self.close_groups()
        except TimeoutError:
            logger.warning("Closing communicators took longer than %g s; left behind", CLOSE_SECONDS)
        finally:
            self._weights.close()
            self._dispatcher.close()
            await self._monitor.aclose()
            for backend in self._dispatcher.backends.values():
                await backend.aclose()

    async def close_groups(self) -> None:
        """Leaves weight update groups; a fleet without weights has none."""

    def __repr__(self) -> str:
        return describe(type(self).__name__, self.statistics())

    @guarded
    async def start(self) -> None:
        """Probes every server once and goes on whatever that gave; those that are down join when they come up."""
        await self._monitor.probe_once()
        self._monitor.start()

    @guarded
    async def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Waits until all servers are up or the time is over, then goes on if at least `min_backends` are.

        Servers that come up later join by themselves.

        Args:
            total_timeout (`float`, *optional*, defaults to `0.0`):
                Seconds to wait. It also holds for servers that accept a connection and answer nothing, or an error.
            retry_interval (`float`, *optional*, defaults to `2.0`): Seconds between two tries.

        Raises:
            `requests.ConnectionError` ([`BackendsUnreachableError`]): when fewer than `min_backends` are up in time.
        """
        deadline = self._clock() + total_timeout
        left = total_timeout
        while True:
            down = [b for b in self._dispatcher.backends.values() if not b.health.usable]
            # Without any time to wait there is one full probe.
            await self._monitor.probe_once(down, timeout=left if total_timeout > 0 else None)
            left = deadline - self._clock()
            if await self._learn_from_gateways():
                continue
            missing = [b for b in down if not b.health.usable]
            if not missing or left <= 0:
                break
            pause = min(retry_interval, left)
            names = ", ".join(backend.url for backend in missing)
            logger.info("%d servers are not up yet (%s); retrying in %g s", len(missing), names, pause)
            await asyncio.sleep(pause)
            left = deadline - self._clock()
            if left <= 0:
                break
        refused = {b.url: b.refusal for b in self._dispatcher.backends.values() if b.refusal is not None}
        if refused:
            raise BackendMismatchError("These servers cannot share work with the others", refused)
        up = len(self._dispatcher.backends) - len(missing)
        reasons = {b.url: b.why_ineligible() or b.health.reason for b in missing}
        if up < self.config.min_backends:
            raise BackendsUnreachableError(
                reasons,
                headline=(
                    f"{up} of {len(self._dispatcher.backends)} vLLM servers reached after {total_timeout:g} s, "
                    f"min_backends={self.config.min_backends}; make sure that they run (`vllm serve`, or "
                    "`trl vllm-serve` of TRL 1.10 and before) and that the addresses are right"
                ),
            )
        for url, reason in reasons.items():
            logger.warning("Starting without %s, which %s; it joins when it comes up", url, reason)
        self._monitor.start()

    # Members

    @guarded
    async def add_backend(self, url: str) -> str:
        """Adds a server; it takes requests once a probe has found it. After a weight update it waits for the next.

        Returns:
            `str`: Its name.

        Raises:
            [`ConfigurationError`]: for a malformed address, or one that is there already.
            [`BackendMismatchError`]: for a server of another dialect, model, length, logprobs mode or dtype.
        """
        address = BackendAddress.parse(url)
        if address.name in self._dispatcher.backends:
            raise DuplicateBackendError(f"backend {address.url} is in the pool already")
        backend = self._backend(address)
        if self._weights.number or self._weights.updating:
            backend.sync.lost("it joined after the last update")
        self._dispatcher.add(backend)
        await self._monitor.probe_once([backend])
        if backend.refusal is not None:
            refusal = backend.refusal
            await self._leave(backend)
            raise BackendMismatchError("The server cannot share work with the others", {backend.url: refusal})
        logger.info("Added %r", backend)
        return backend.name

    def address_of(self, name: str) -> BackendAddress:
        """Where a backend is.

        Raises:
            [`UnknownBackendError`]: when there is none of that name.
        """
        return find(self._dispatcher.backends, name).address

    def stop_backend(self, name: str) -> BackendStatistics:
        """Gives a server no further requests, and does not wait.

        Raises:
            [`UnknownBackendError`]: when there is none of that name.
        """
        self.lifetime.check()
        backend = find(self._dispatcher.backends, name)
        backend.draining = True
        self._dispatcher.changed()
        return backend.statistics()

    @guarded
    async def drain_backend(self, name: str, *, timeout: float | None = None) -> None:
        """Gives a server no further requests and waits for those it has.

        Args:
            name (`str`): Its name or URL.
            timeout (`float`, *optional*): Seconds to wait, `config.drain_timeout` by default.

        Raises:
            [`UnknownBackendError`]: when there is none of that name.
            `TimeoutError`: when its requests did not end in time; it stays draining.
        """
        self.stop_backend(name)
        backend = find(self._dispatcher.backends, name)
        limit = self.config.drain_timeout if timeout is None else timeout
        await self._dispatcher.until(lambda: None if backend.inflight else True, timeout=limit)

    @guarded
    async def remove_backend(self, name: str, drain: bool = True, *, timeout: float | None = None) -> None:
        """Takes a server out of the pool.

        Args:
            name (`str`): Its name or URL.
            drain (`bool`, *optional*, defaults to `True`):
                Whether its requests may end first. Otherwise they are broken off and served elsewhere.
            timeout (`float`, *optional*): Seconds that draining may take; then the rest is broken off.

        Raises:
            [`UnknownBackendError`]: when there is none of that name.
        """
        self.stop_backend(name)
        backend = find(self._dispatcher.backends, name)
        if drain:
            try:
                await self.drain_backend(name, timeout=timeout)
            except TimeoutError:
                logger.warning("%s did not drain in time; breaking off %d requests", backend.url, backend.inflight)
        await self._leave(backend)
        logger.info("Removed %s", backend.url)

    async def _leave(self, backend: Backend) -> None:
        self._dispatcher.remove(backend)
        self._monitor.forget(backend)
        self._weights.forget(backend)
        await backend.aclose()

    def statistics(self) -> PoolStatistics:
        """The pool at this moment."""
        return PoolStatistics(
            backends=tuple(backend.statistics() for backend in self._dispatcher.backends.values()),
            waiting=self._dispatcher.waiting,
            weight_version=self._weights.version,
            gate=self._dispatcher.gate,
        )

    def limits(self) -> PoolConfig:
        """The settings with what servers told: the shortest `max_model_len` counts."""
        told = [b.health.max_model_len for b in self._dispatcher.backends.values()]
        lengths = [length for length in (self.config.max_model_len, *told) if length is not None]
        if not lengths or min(lengths) == self.config.max_model_len:
            return self.config
        return self.config.model_copy(update={"max_model_len": min(lengths)})

    def closing_urls(self) -> list[str]:
        """Where to post at exit, so that servers that are up leave their update groups."""
        members = [self._dispatcher.backends.get(name) for name in self._weights.group]
        return [
            b.url + b.dialect.close_group_path
            for b in members
            if b is not None and b.health.state is not Health.DOWN and b.dialect.close_group_path is not None
        ]

    @property
    def weights(self) -> WeightCoordinator:
        """The coordinator of weight updates."""
        return self._weights

    @property
    def dialect(self) -> Dialect:
        """The fleet's protocol: that of the first server that has said who it is; `trl` until then."""
        return next(
            (b.dialect for b in self._dispatcher.backends.values() if b.identity is not None and b.refusal is None),
            self._dialects["trl"],
        )

    def require_recognised(self) -> None:
        """Refuses to take `trl` for more than a guess.

        Raises:
            [`NoBackendAvailableError`]: while no server has said who it is.
        """
        if all(b.identity is None or b.refusal is not None for b in self._dispatcher.backends.values()):
            raise NoBackendAvailableError(self._dispatcher.reasons(), retry_after=self.config.health_interval)

    @property
    def model(self) -> str | None:
        """What the servers call the model; `None` if they do not say (`trl vllm-serve` does not)."""
        identities = (b.identity for b in self._dispatcher.backends.values() if b.refusal is None)
        return next((i.model for i in identities if i is not None and i.model is not None), None)


async def resolve(host: str) -> str:
    """The host as an IP address if it resolves, else as it is."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return host
    return str(found[0][4][0])


def describe(kind: str, statistics: PoolStatistics) -> str:
    """A pool's `repr`: which backends, which are eligible, why the others are not."""
    eligible = sum(backend.eligible for backend in statistics.backends)
    backends = "; ".join(f"{b.name} {b.reason or b.health}, {b.inflight} in flight" for b in statistics.backends)
    gate = f", {statistics.gate}" if statistics.gate else ""
    return (
        f"<{kind} {eligible} of {len(statistics.backends)} backends eligible, weights {statistics.weight_version}"
        f"{gate}: {backends}>"
    )
