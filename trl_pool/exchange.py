"""One HTTP exchange with one backend, and the one table that turns foreign errors into ours."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import functools
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from .addresses import BackendAddress
from .config import PoolConfig
from .errors import AttemptError, Outcome, RequestRejectedError

STALE_SECONDS = 1.0
"""How soon after sending a kept-alive connection has to break to count as one the server had closed before. Idle
connections are closed by uvicorn after 5 s; the news of it crosses our request and arrives within a round trip."""

KEEPALIVE_SECONDS = 4.0
"""Idle connections are dropped on our side before uvicorn drops them."""

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


@functools.cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


@dataclass(frozen=True)
class Answer:
    """What a backend answered."""

    status: int
    headers: httpx.Headers
    body: bytes


class _Trace:
    """What httpx tells while it sends: whether the connection is new, and how far the exchange came."""

    def __init__(self) -> None:
        self.connected = self.sent = self.answered = self.seen = False

    async def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        self.seen = True
        if event.startswith("connection.connect"):
            self.connected = True
        elif event.endswith("send_request_body.complete"):
            self.sent = True
        elif event.endswith("receive_response_headers.complete"):
            self.answered = True

    def stale(self, seconds: float) -> bool:
        """Whether the exchange failed because the server had closed the kept connection before it."""
        reused = self.seen and not self.connected
        return reused and not self.answered and (not self.sent or seconds < STALE_SECONDS)


class Sentinel:
    """A connection to a server that lives as long as the server's process.

    uvicorn leaves a connection alone on which no request was made. Whatever is answered on it comes from the process
    that accepted it: a server that was restarted, with or without a farewell, cannot.

    Args:
        reader (`asyncio.StreamReader`): Its one end.
        writer (`asyncio.StreamWriter`): Its other.
        secure (`bool`): Whether TLS would have to be spoken on it, so that it can prove nothing.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, secure: bool) -> None:
        self._reader, self._writer, self._secure = reader, writer, secure
        self._proof: asyncio.Future[bool] | None = None

    async def ended(self) -> None:
        """Returns when the server closes it."""
        try:
            with contextlib.suppress(OSError):
                while await self._reader.read(65536):
                    if self._proof is not None and not self._proof.done():
                        self._proof.set_result(True)
        finally:
            if self._proof is not None and not self._proof.done():
                self._proof.set_result(False)
            self._writer.close()

    async def prove(self, path: str, *, timeout: float) -> bool | None:
        """Whether the process still lives that accepted this connection; `None` when that has not shown in the time,
        and may when it is asked again. It serves once: the server would close it soon after, as an idle one.

        Args:
            path (`str`): Of a GET that it answers with anything at all.
            timeout (`float`): Seconds that it has for the answer.
        """
        if self._secure or self._writer.is_closing() or (self._proof is not None and self._proof.done()):
            return False
        if self._proof is None:
            self._proof = asyncio.get_running_loop().create_future()
            self._writer.write(f"GET {path} HTTP/1.1\r\nHost: trl-pool\r\n\r\n".encode())
        try:
            async with asyncio.timeout(timeout):
                proved = await asyncio.shield(self._proof)
        except TimeoutError:
            return None
        self._writer.close()
        return proved


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
        self._address = address
        self._clock = clock
        self._shares_transport = transport is not None
        self._closed = False
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        headers = {"user-agent": user_agent, "accept": "application/json"}
        if config.backend_api_key is not None:
            headers["authorization"] = f"Bearer {config.backend_api_key.get_secret_value()}"
        common: dict[str, Any] = {
            # Reading the system's certificates takes long; they are read once, and only for https.
            "verify": _certificates() if address.scheme == "https" else False,
            "transport": transport,
            "trust_env": config.trust_env,
            "timeout": httpx.Timeout(None, connect=config.connect_timeout),
            "headers": headers,
            "follow_redirects": False,
        }
        self._client = httpx.AsyncClient(
            **common,
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS
            ),
        )
        # Probes and control calls are never sent again, so they never take a connection that may be stale.
        self._fresh = httpx.AsyncClient(
            **common, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )

    async def aclose(self) -> None:
        """Closes the connections once nothing is under way on them; a transport that was given from outside is its
        owner's to close."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _CLOSE_SECONDS)
        if not self._shares_transport:
            await self._client.aclose()
            await self._fresh.aclose()

    @property
    def has_sockets(self) -> bool:
        """Whether there is a real server behind it, rather than a transport given from outside."""
        return not self._shares_transport

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
        trace = _Trace()
        started = self._clock()
        try:
            return await self._send(self._client, "POST", path, body, timeout, headers, trace)
        except AttemptError as error:
            elapsed = self._clock() - started
            if error.outcome is not Outcome.LOST or not trace.stale(elapsed):
                raise
            left = None if timeout is None else max(0.0, timeout - elapsed)
            try:
                return await self._send(self._fresh, "POST", path, body, left, headers, _Trace())
            except AttemptError as second:
                if second.outcome is Outcome.UNREACHED and trace.sent:
                    # Not stale after all: the server died with the request in its hands.
                    raise AttemptError(
                        self.url,
                        Outcome.LOST,
                        f"{error.detail}, then {second.detail}",
                        refused=second.refused,
                    ) from second
                raise

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
        return await self._send(self._fresh, method, path, body, timeout, headers, _Trace())

    async def _send(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: bytes | None,
        timeout: float | None,
        headers: Mapping[str, str] | None,
        trace: _Trace,
    ) -> Answer:
        request = self._request(client, method, path, body, timeout, headers, trace)
        with self._counted():
            try:
                async with asyncio.timeout(timeout):
                    response = await client.send(request)
            except (httpx.HTTPError, httpx.StreamError, OSError) as error:
                raise translate(self.url, error, timeout) from error
        return Answer(response.status_code, response.headers, response.content)

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, body: bytes, *, timeout: float, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """Sends a request over a new connection, and gives the answer as soon as its head is there.

        Args:
            path (`str`): Where to.
            body (`bytes`): What.
            timeout (`float`): Seconds until the head, and then between two pieces of the body.
            headers (`Mapping[str, str]`): Sent along.

        Raises:
            [`AttemptError`]: when there is no answer.
        """
        request = self._request(self._fresh, "POST", path, body, timeout, headers, _Trace())
        request.extensions["timeout"]["read"] = timeout
        with self._counted():
            try:
                async with asyncio.timeout(timeout):
                    response = await self._fresh.send(request, stream=True)
            except (httpx.HTTPError, httpx.StreamError, OSError) as error:
                raise translate(self.url, error, timeout) from error
            try:
                yield response
            finally:
                await response.aclose()

    async def read(self, response: httpx.Response) -> Answer:
        """The whole of a streamed answer.

        Raises:
            [`AttemptError`]: when it breaks off.
        """
        try:
            body = await response.aread()
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise translate(self.url, error, None) from error
        return Answer(response.status_code, response.headers, body)

    def _request(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: bytes | None,
        timeout: float | None,
        headers: Mapping[str, str] | None,
        trace: _Trace,
    ) -> httpx.Request:
        if self._closed:
            raise AttemptError(self.url, Outcome.UNAVAILABLE, "it was removed from the pool")
        request = client.build_request(
            method,
            self.url + path,
            content=body,
            headers={**(headers or {}), **({"content-type": "application/json"} if body else {})},
            extensions={"trace": trace},
        )
        # A given extensions dictionary replaces the client's own time-outs.
        timeouts = client.timeout.as_dict()
        if timeout is not None:
            # Below the whole: "no connection" and "no answer" mean different things.
            timeouts["connect"] = min(timeouts["connect"] or timeout, 0.8 * timeout)
        request.extensions["timeout"] = timeouts
        return request

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """What is under way is waited for when the connections are closed."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()


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
