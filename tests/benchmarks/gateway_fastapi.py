"""What one writes in an afternoon: FastAPI, aiohttp, bytes through to a server chosen by a hash: `PORT URL…`.

No queue, no limits, no health, no second try. It shows what the framework costs.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse


def create_app(urls: list[str]) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/{path:path}")
    async def forward(request: Request, path: str) -> StreamingResponse:
        key = request.headers.get("x-session-id", "")
        url = urls[zlib.crc32(key.encode()) % len(urls)]
        headers = {"content-type": request.headers.get("content-type", "application/json")}
        answer = await app.state.session.post(f"{url}/{path}", data=await request.body(), headers=headers)

        async def pieces() -> AsyncIterator[bytes]:
            async with answer:
                async for piece in answer.content.iter_any():
                    yield piece

        length = answer.headers.get("content-length")
        headers = {} if length is None else {"content-length": length}
        return StreamingResponse(pieces(), answer.status, headers, answer.content_type)

    return app


if __name__ == "__main__":
    uvicorn.run(
        create_app(sys.argv[2:]), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False
    )
