"""One HTTP exchange with one backend, and the one table that turns foreign errors into ours."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import functools
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import httpx

from .addresses import BackendAddress
from .config import PoolConfig
from .errors import AttemptError, Outcome, RequestRejectedError
from .http1 import KEEPALIVE_SECONDS, Headers, Progress, Sockets
from .over_httpx import OverHttpx, httpx_is_patched
from .sentinel import Sentinel

STALE_SECONDS = 1.0
"""How soon after sending a kept-alive connection has to break to count as one the server had closed before. Idle
connections are closed by uvicorn after 5 s; the news of it crosses our request and arrives within a round trip."""

CONTROL_IDLE_SECONDS = 0.25
"""How long a connection may have been idle that a control call takes. uvicorn closes them after 5 s, and nobody as
soon as this; after a longer pause a new connection costs little beside it."""

MAX_RETRY_AFTER = 60.0

_CLOSE_SECONDS = 3.0

OUTCOMES: dict[type[BaseException], Outcome] = {
    httpx.ConnectError: Outcome.UNREACHED,
    httpx.ConnectTimeout: Outcome.UNREACHED,
    httpx.PoolTimeout: Outcome.UNREACHED,
    httpx.ProxyError: Outcome.UNREACHED,
    httpx.UnsupportedProtocol: Outcome.UNREACHED,
    httpx.ReadError: Outcome.LOST,
    httpx.WriteError: Outcome.LOST,
    httpx.CloseError: Outcome.LOST,
    httpx.RemoteProtocolError: Outcome.LOST,
    httpx.LocalProtocolError: Outcome.LOST,
    httpx.ReadTimeout: Outcome.TIMED_OUT,
    httpx.WriteTimeout: Outcome.TIMED_OUT,
    TimeoutError: Outcome.TIMED_OUT,
    httpx.DecodingError: Outcome.BAD_ANSWER,
    httpx.TooManyRedirects: Outcome.BAD_ANSWER,
    OSError: Outcome.LOST,
}


FOREIGN = (httpx.HTTPError, httpx.StreamError, OSError)
"""What is raised while sending, and has to be translated."""


@functools.cache
def _certificates() -> ssl.SSLContext:
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@dataclass(frozen=True)
class Answer:
    """What a backend answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class StreamedAnswer:
    """What a backend answers: its head, and its body as it comes, as it is encoded.

    Args:
        url (`str`): Of the backend.
        status (`int`): HTTP status.
        headers (`Mapping[str, str]`): As they came.
        pieces (`AsyncIterator[bytes]`): The body.
    """

    def __init__(self, url: str, status: int, headers: Mapping[str, str], pieces: AsyncIterator[bytes]) -> None:
        self.status, self.headers = status, headers
        self._url, self._pieces = url, pieces

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body.

        Raises:
            [`AttemptError`]: when it breaks off.
        """
        try:
            async for piece in self._pieces:
                yield piece
        except FOREIGN as error:
            raise translate(self._url, error, None) from error

    async def read(self) -> Answer:
        """The whole of it.

        Raises:
            [`AttemptError`]: when it breaks off.
        """
        body = b"".join([piece async for piece in self.pieces()])
        try:
            return Answer(self.status, self.headers, decoded(self.headers, body))
        except httpx.DecodingError as error:
            raise translate(self._url, error, None) from error


class Exchange:
    """HTTP to one backend.

    Args:
        address ([`BackendAddress`]): Where it is.
        config ([`PoolConfig`]): For `connect_timeout`, `trust_env` and the API key.
        transport (`httpx.AsyncBaseTransport`, *optional*): Instead of sockets.
        user_agent (`str`): Sent with every request.
        clock (`Callable[[], float]`, *optional*): Monotonic seconds.
    """

    def __init__(
        self,
        address: BackendAddress,
        config: PoolConfig,
        *,
        transport: httpx.AsyncBaseTransport | None,
        user_agent: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = address.url
        self._address, self._config = address, config
        self._clock = clock
        self._closed = False
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        headers = {"user-agent": user_agent, "accept": "application/json"}
        if config.backend_api_key is not None:
            headers["authorization"] = f"Bearer {config.backend_api_key.get_secret_value()}"
        # Reading the system's certificates takes long; they are read once, and only for https.
        context = _certificates() if address.scheme == "https" else None
        self._has_sockets = transport is None
        self._sockets = Sockets(address, context=context, headers=headers)
        self._over_httpx = OverHttpx(address, config, transport=transport, context=context, headers=headers)

    async def aclose(self) -> None:
        """Closes the connections once nothing is under way on them; a transport that was given from outside is its
        owner's to close."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _CLOSE_SECONDS)
        await self._sockets.aclose()
        await self._over_httpx.aclose()

    @property
    def has_sockets(self) -> bool:
        """Whether there is a real server behind it, rather than a transport given from outside."""
        return self._has_sockets

    async def stand_by(self) -> Sentinel:
        """Opens a connection that says nothing, so that its end tells of the end of the server's process.

        Raises:
            `OSError`: when there is no connection.
        """
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        return Sentinel(reader, writer, secure=self._address.scheme == "https")

    async def post(
        self, path: str, body: bytes, *, timeout: float | None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends a request over a kept connection if there is one.

        One that the server had closed meanwhile is replaced by a new one, once.

        Raises:
            [`AttemptError`]: when there is no answer.
        """
        progress = Progress()
        started = self._clock()
        try:
            return await self._send("POST", path, body, timeout, headers, KEEPALIVE_SECONDS, progress)
        except AttemptError as error:
            elapsed = self._clock() - started
            if error.outcome is not Outcome.LOST or not stale(progress, elapsed):
                raise
            left = None if timeout is None else max(0.0, timeout - elapsed)
            try:
                return await self._send("POST", path, body, left, headers, 0.0, Progress())
            except AttemptError as second:
                if second.outcome is Outcome.UNREACHED and progress.sent:
                    # Not stale after all: the server died with the request in its hands.
                    raise AttemptError(
                        self.url,
                        Outcome.LOST,
                        f"{error.detail}, then {second.detail}",
                        refused=second.refused,
                    ) from second
                raise

    async def control(
        self, path: str, body: bytes | None, *, timeout: float | None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Posts exactly once, over a connection that was used just before if there is one: an update is hundreds of
        calls, and a new connection costs more than the call.

        One that breaks is an error, however old it was. Whatever is answered on it comes from the process that
        answered before.

        Raises:
            [`AttemptError`]: when there is no answer.
        """
        return await self._send("POST", path, body, timeout, headers, CONTROL_IDLE_SECONDS, Progress())

    async def once(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Sends a request over a new connection, exactly once.

        Raises:
            [`AttemptError`]: when there is no answer.
        """
        return await self._send(method, path, body, timeout, headers, 0.0, Progress())

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout: float | None,
        headers: Mapping[str, str] | None,
        max_idle: float,
        progress: Progress,
    ) -> Answer:
        self._begin()
        try:
            if timeout is None:
                return await self._fetch(method, path, body, timeout, headers, max_idle, progress)
            async with asyncio.timeout(timeout):
                return await self._fetch(method, path, body, timeout, headers, max_idle, progress)
        except FOREIGN as error:
            raise translate(self.url, error, timeout) from error
        finally:
            self._end()

    async def _fetch(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout: float | None,
        headers: Mapping[str, str] | None,
        max_idle: float,
        progress: Progress,
    ) -> Answer:
        within = self._connect_within(timeout)
        if self._by_httpx():
            return Answer(
                *await self._over_httpx.fetch(
                    method, path, body, headers or {}, connect_within=within, max_idle=max_idle, progress=progress
                )
            )
        status, raw, content = await self._sockets.fetch(
            method, path, body or b"", headers or {}, connect_within=within, max_idle=max_idle, progress=progress
        )
        found = Headers(raw)
        return Answer(status, found, decoded(found, content) if found.encoded else content)

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, body: bytes, *, timeout: float, headers: Mapping[str, str]
    ) -> AsyncIterator[StreamedAnswer]:
        """Sends a request over a new connection, and gives the answer as soon as its head is there.

        Args:
            path (`str`): Where to.
            body (`bytes`): What.
            timeout (`float`): Seconds until the head, and then between two pieces of the body.
            headers (`Mapping[str, str]`): Sent along.

        Raises:
            [`AttemptError`]: when there is no answer.
        """
        opener = self._over_httpx if self._by_httpx() else self._sockets
        self._begin()
        try:
            try:
                async with asyncio.timeout(timeout):
                    incoming = await opener.open(
                        path, body, headers, connect_within=self._connect_within(timeout), read_within=timeout
                    )
            except FOREIGN as error:
                raise translate(self.url, error, timeout) from error
            try:
                yield StreamedAnswer(self.url, incoming.status, incoming.headers, incoming.pieces())
            finally:
                await incoming.aclose()
        finally:
            self._end()

    def _by_httpx(self) -> bool:
        """Whether httpx has to carry it: it was given a transport, it has to find a proxy, or somebody (pytest-httpx,
        for one) has put themselves in the place of its sockets."""
        return not self._has_sockets or self._config.trust_env or httpx_is_patched()

    def _connect_within(self, timeout: float | None) -> float:
        # Below the whole: "no connection" and "no answer" mean different things.
        limit = self._config.connect_timeout
        return limit if timeout is None else min(limit, 0.8 * timeout)

    def _begin(self) -> None:
        """What is under way is waited for when the connections are closed."""
        if self._closed:
            raise AttemptError(self.url, Outcome.UNAVAILABLE, "it was removed from the pool")
        self._under_way += 1
        self._idle.clear()

    def _end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()


def stale(progress: Progress, seconds: float) -> bool:
    """Whether an exchange failed because the server had closed the kept connection before it.

    Args:
        progress ([`Progress`]): How far it came.
        seconds (`float`): After how long it failed.
    """
    return progress.reused and not progress.answered and (not progress.sent or seconds < STALE_SECONDS)


def decoded(headers: Mapping[str, str], body: bytes) -> bytes:
    """A body without its content encoding, which an intermediary may have put around it.

    Raises:
        `httpx.DecodingError`: when it is not in that encoding.
    """
    if "content-encoding" not in headers:
        return body
    return httpx.Response(200, headers={"content-encoding": headers["content-encoding"]}, content=body).content


def translate(url: str, error: BaseException, timeout: float | None) -> AttemptError:
    """The table: a foreign error as ours."""
    outcome = next((OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES), Outcome.LOST)
    refused = _refused(error)
    if refused:
        detail = "connection refused"
    elif isinstance(error, TimeoutError):
        detail = str(error) if timeout is None else f"no answer within {timeout:.1f} s"
    elif outcome is Outcome.LOST:
        detail = f"connection broken ({str(error) or type(error).__name__})"
    else:
        detail = str(error) or type(error).__name__
    return AttemptError(url, outcome, detail, refused=refused)


def judge(url: str, answer: Answer) -> None:
    """Sorts an answer by its status; returns for 200.

    Raises:
        [`RequestRejectedError`]: for a 4xx other than 429.
        [`AttemptError`]: for everything else.
    """
    status = answer.status
    if status == 200:
        return
    text = answer.body[:300].decode("utf-8", "replace")
    retry_after = parse_retry_after(answer.headers.get("retry-after"))
    if status == 429 or (status == 503 and retry_after is not None):
        wait = 1.0 if retry_after is None else retry_after
        raise AttemptError(url, Outcome.BUSY, f"{status}, {text}", status=status, retry_after=wait)
    if status in (502, 503, 504):
        raise AttemptError(url, Outcome.UNAVAILABLE, f"{status}, {text}", status=status)
    if status >= 500:
        raise AttemptError(url, Outcome.SERVER_ERROR, f"{status}, {text}", status=status)
    if status >= 400:
        raise RequestRejectedError(url, status, answer.body, answer.headers.get("content-type", "application/json"))
    where = f" to {answer.headers['location']}" if "location" in answer.headers else ""
    raise AttemptError(
        url,
        Outcome.BAD_ANSWER,
        f"answered {status}{where} instead of 200; check that the address is the server's own",
        status=status,
    )


def parse_retry_after(value: str | None, *, now: Callable[[], float] = time.time) -> float | None:
    """Seconds to wait from a `Retry-After` header (seconds or a date), between 0 and 60; `None` without one."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if seconds == seconds else None


def _refused(error: BaseException | None) -> bool:
    """Whether a refused connection is at the bottom of an error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ConnectionRefusedError) or "refused" in str(error).lower():
            return True
        if "All connection attempts failed" in str(error):  # anyio's words for refused on every address
            causes = error.__cause__
            if isinstance(causes, BaseExceptionGroup):
                return all(_refused(cause) for cause in causes.exceptions)
        if isinstance(error, BaseExceptionGroup):
            return all(_refused(cause) for cause in error.exceptions)
        error = error.__cause__ or error.__context__
    return False
