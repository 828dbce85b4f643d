"""A fleet whose servers can be asked and told all at once, and made members of weight update groups."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from .addresses import BackendAddress
from .backend import Backend
from .config import PoolConfig
from .errors import (
    AttemptError,
    BackendMismatchError,
    ControlResult,
    NoBackendAvailableError,
    RequestRejectedError,
    WeightSyncError,
)
from .exchange import Answer, judge
from .fleet import Fleet, resolve
from .lifetime import guarded
from .weights.coordinator import require_all
from .weights.joint import JointUpdates
from .weights.relay import RelayedUpdates
from .weights.separate import SeparateGroups
from .weights.transport import (
    ControlOnlyJoint,
    ControlOnlyTransport,
    GroupMember,
    JointTransport,
    WeightTransport,
)
from .weights.transports import GlooJoint, NcclJoint, SeparateTransport, device_type

logger = logging.getLogger(__name__)


class GroupedFleet(Fleet):
    """A [`Fleet`] with weight update groups, of both dialects.

    Args:
        addresses (`Iterable[BackendAddress]`): The backends to begin with.
        config ([`PoolConfig`]): Settings.
        group_port (`int`): First port for update groups.
        weight_transport ([`WeightTransport`] or [`JointTransport`], *optional*): Instead of NCCL or gloo.
        options: As [`Fleet`]'s.
    """

    def __init__(
        self,
        addresses: Iterable[BackendAddress],
        config: PoolConfig,
        *,
        group_port: int,
        weight_transport: WeightTransport | JointTransport | None = None,
        **options: Any,
    ) -> None:
        super().__init__(addresses, config, **options)
        self.group_port = group_port
        self._weight_transport = weight_transport
        self.separate = SeparateGroups(self._weights, timeout=config.control_timeout)
        self.joint = JointUpdates(self._weights, config, group_port=group_port, world_sizes=self._world_sizes)
        self.relay = RelayedUpdates(self._weights, config, world_sizes=self._world_sizes)
        self._device: Any = None
        self._ports: dict[str, int] = {}  # the next one for an update group, per machine

    @property
    def one_group(self) -> bool:
        """Whether all servers share one update group (`vllm` dialect)."""
        return self.dialect.name == "vllm"

    async def close_groups(self) -> None:
        if self.one_group:
            await self.joint.close()
        else:
            await self.separate.close()

    # Sizes

    @guarded
    async def get_world_size(self) -> int:
        """The world size (tensor × data parallel): of a `vllm` fleet the sum, since one update group spans it; of
        one server of a `trl` fleet, since each has a group of its own.

        Raises:
            [`BackendMismatchError`]: when `trl` servers differ, naming them.
            `requests.ConnectionError` ([`NoBackendAvailableError`]): when none answers, or (`vllm`) one that is up.
        """
        sizes, failed = await self._world_sizes(self._weights.reachable())
        if not sizes or (failed and self.one_group):
            raise NoBackendAvailableError({**self._dispatcher.reasons(), **failed})
        if self.one_group:
            return sum(sizes.values())
        if len(set(sizes.values())) > 1:
            raise BackendMismatchError(
                "The servers differ in world size",
                {self._dispatcher.backends[name].url: f"has {size}" for name, size in sizes.items()},
            )
        return next(iter(sizes.values()))

    async def _world_sizes(self, backends: Sequence[Backend]) -> tuple[dict[str, int], dict[str, str]]:
        """Sizes by name, and what went wrong by URL."""

        async def ask(backend: Backend) -> int | str:
            try:
                answer = await backend.exchange.once(
                    "GET", backend.dialect.world_size_path, timeout=self.config.control_timeout
                )
                judge(backend.url, answer)
                return int(msgspec.json.decode(answer.body, type=dict[str, int])["world_size"])
            except AttemptError as error:
                return f"{error.outcome.value}: {error.detail}"
            except (RequestRejectedError, ValueError, KeyError) as error:
                return f"did not say: {error}"

        answers = list(zip(backends, await asyncio.gather(*(ask(backend) for backend in backends)), strict=True))
        sizes = {backend.name: answer for backend, answer in answers if isinstance(answer, int)}
        return sizes, {backend.url: answer for backend, answer in answers if isinstance(answer, str)}

    @guarded
    async def ask_one(self, path: str, *, headers: Mapping[str, str] | None = None) -> Answer:
        """One server's answer to a GET, 200 or 4xx; the next one is asked if one does not answer.

        Raises:
            `requests.ConnectionError` ([`NoBackendAvailableError`]): when none does.
        """
        reasons: dict[str, str] = {}
        for backend in self._weights.reachable():
            try:
                answer = await backend.exchange.once("GET", path, timeout=self.config.control_timeout, headers=headers)
                with contextlib.suppress(RequestRejectedError):
                    judge(backend.url, answer)
                return answer
            except AttemptError as error:
                reasons[backend.url] = f"{error.outcome.value}: {error.detail}"
        raise NoBackendAvailableError({**self._dispatcher.reasons(), **reasons})

    @guarded
    async def ask_all(self, path: str) -> dict[str, dict[str, Any]]:
        """What every server answers to a GET, as JSON objects per URL.

        Raises:
            [`ControlError`]: naming those that do not answer.
        """

        async def ask(backend: Backend) -> ControlResult:
            try:
                answer = await backend.exchange.once("GET", path, timeout=self.config.control_timeout)
                judge(backend.url, answer)
            except (AttemptError, RequestRejectedError) as error:
                return ControlResult(backend.url, False, str(error))
            return ControlResult(backend.url, True, answer.body.decode("utf-8", "replace"), answer.status)

        results = await asyncio.gather(*map(ask, self._weights.everybody()))
        require_all(f"GET {path}", {result.url: result for result in results})
        return {result.url: msgspec.json.decode(result.message, type=dict[str, Any]) for result in results}

    # Groups

    @guarded
    async def init_communicator(self, device: Any = 0) -> None:
        """Makes the weight update group: one over all `vllm serve` servers, with the trainer as rank 0; or one with
        every `trl` server, because such a server is the master of its own.

        Args:
            device (`torch.device`, `str` or `int`, *optional*, defaults to `0`): The trainer's device.

        Raises:
            [`WeightSyncError`]: when fewer than `min_backends` servers take part, or tensors could not be moved.
            [`BackendMismatchError`]: when the servers' weight transfer engines differ.
            `NotImplementedError`: for NCCL without a CUDA device.
        """
        if self.one_group:
            await self.joint.init(self._joint_transport(device), device)
        else:
            self._device, self._ports = device, {}
            await self._open_separate(self._weights.reachable())

    def _joint_transport(self, device: Any) -> JointTransport:
        if self._weight_transport is not None:
            return self._weight_transport  # type: ignore[return-value]
        identities = {b.url: b.identity for b in self._weights.reachable() if b.identity is not None}
        engines = {url: identity.weight_transfer for url, identity in identities.items()}
        if self._transport is not None or (engines and all(engine == "control" for engine in engines.values())):
            return ControlOnlyJoint()
        hidden = [url for url, identity in identities.items() if not identity.development]
        if hidden:
            raise WeightSyncError(
                "No weights can be sent: development endpoints are missing; restart with VLLM_SERVER_DEV_MODE=1",
                dict.fromkeys(hidden, "answers 404 to /server_info"),
            )
        without = [url for url, engine in engines.items() if engine is None]
        if without:
            raise WeightSyncError(
                'No weights can be sent: restart with --weight-transfer-config \'{"backend": "nccl"}\' (or "gloo")',
                dict.fromkeys(without, "has no weight transfer engine"),
            )
        if len(set(engines.values())) > 1:
            raise BackendMismatchError(
                "The servers' weight transfer engines differ", {url: f"has {e!r}" for url, e in engines.items()}
            )
        engine = next(iter(engines.values()), None)
        if self.config.weight_transport not in ("auto", engine):
            raise WeightSyncError(
                f"weight_transport={self.config.weight_transport!r} is not what the servers were started with",
                dict.fromkeys(engines, f"has {engine!r}"),
            )
        if engine == "gloo":
            return GlooJoint()
        if engine == "nccl":
            if device_type(device) != "cuda":
                raise NotImplementedError(
                    f"The servers take weights over NCCL, which needs a CUDA device, got {device!r}. On a CPU start "
                    'them with --weight-transfer-config \'{"backend": "gloo"}\'.'
                )
            return NcclJoint()
        raise WeightSyncError(
            f"Weight transfer engine {engine!r} is not supported; start the servers with 'nccl' or 'gloo'",
            dict.fromkeys(engines, f"has {engine!r}"),
        )

    def _separate_transport(self, members: Sequence[Backend], device: Any) -> WeightTransport:
        if self._weight_transport is not None:
            return self._weight_transport  # type: ignore[return-value]
        if self._transport is not None or all(backend.simulated for backend in members):
            return ControlOnlyTransport()
        if importlib.util.find_spec("torch") is None:
            raise WeightSyncError(
                "Sending weights needs torch, which is not installed here; nobody was asked to receive any",
                dict.fromkeys((b.url for b in members), "waits for tensors"),
            )
        backend = self.config.weight_transport
        if backend == "auto":
            backend = "nccl" if device_type(device) == "cuda" else "gloo"
        return SeparateTransport(backend, timeout=self.config.control_timeout)

    async def _open_separate(self, members: list[Backend], *, beside: bool = False) -> None:
        device = self._device
        transport = self.separate.transport if beside else None
        transport = transport or self._separate_transport(members, device)
        sizes, failed = await self._world_sizes(members)
        for url, reason in failed.items():
            logger.warning("%s is left out of weight updates until the next init_communicator: %s", url, reason)
        members = [backend for backend in members if backend.name in sizes]
        groups = []
        bodies = {}
        for backend in members:
            # Each server's worker binds the port on its own host, so servers that share a host need different ones,
            # by whatever names they go.
            host = backend.address.host
            machine = await resolve(host) if backend.exchange.has_sockets else host
            port = self._ports.get(machine, self.group_port)
            self._ports[machine] = port + 1
            world_size = sizes[backend.name] + 1
            groups.append(GroupMember(backend.name, host, port, world_size, world_size - 1))
            bodies[backend.name] = msgspec.json.encode(
                {
                    "host": "0.0.0.0",
                    "port": port,
                    "world_size": world_size,
                    "client_device_uuid": transport.device_uuid(device),
                }
            )
        results = await self.separate.open(bodies, members, fresh=True, beside=beside)
        failed.update({r.url: str(r) for r in results.values() if not r.ok})
        joined = [group for group in groups if results[group.backend].ok]
        if joined and (beside or len(joined) >= self.config.min_backends):
            lost = await self.separate.join(transport, joined, device)
            failed.update({self._dispatcher.backends[name].url: reason for name, reason in lost.items()})
            joined = [group for group in joined if group.backend not in lost]
        if beside:
            for url, reason in failed.items():
                logger.warning("%s does not take part in the next weight update: %s", url, reason)
        elif len(joined) < self.config.min_backends:
            raise WeightSyncError(
                f"{len(joined)} servers take part in weight updates, min_backends={self.config.min_backends}",
                failed or self._dispatcher.reasons(),
            )

    async def _take_back(self) -> None:
        """Makes groups with servers that have none (any more): they came back, joined later, or lost a connection."""
        if self._device is None:
            return
        grouped = {backend.name for backend in self._weights.grouped()}
        returned = [b for b in self._weights.reachable() if b.name not in grouped]
        if returned:
            logger.info("Taking %s into weight updates", ", ".join(b.url for b in returned))
            await self._open_separate(returned, beside=True)

    @guarded
    async def close_communicator(self) -> None:
        """Closes the weight update groups. Servers that are gone are passed over, as TRL's client does.

        Raises:
            [`ControlError`]: when a server answered with an error.
        """
        if self.one_group:
            await self.joint.close()
            return
        results = await self.separate.close()
        require_all(
            "Closing the communicators",
            {name: result for name, result in results.items() if result.ok or result.status is not None},
        )
