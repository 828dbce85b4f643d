"""Connections that say nothing, whose end tells of the end of a process."""

from __future__ import annotations

import asyncio
import contextlib


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
