"""Servers of either protocol that answer a generate request at once, out of answers made before.

What they answer to a prompt depends on the prompt's first token id alone, so everybody gets the same completions,
however the prompts were spread. `python -m tests.benchmarks.canned_server --servers 8 --dialect vllm` prints the
servers' URLs, one line each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import struct
from collections.abc import Sequence

import msgspec

VOCABULARY = 151_936  # Qwen's
_FACTS = {
    "trl": {"/health/": b'{"status":"ok"}', "/get_world_size/": b'{"world_size":1}'},
    "vllm": {
        "/health": b"",
        "/get_world_size": b'{"world_size":1}',
        "/v1/models": b'{"object":"list","data":[{"id":"canned","object":"model","max_model_len":32768}]}',
        "/server_info": b'{"vllm_config":{"model_config":{"model":"canned","max_model_len":32768,'
        b'"logprobs_mode":"processed_logprobs","dtype":"torch.bfloat16"}}}',
        "/weight_info": b'{"weight_version":"default"}',
    },
}
"""What a client asks before it generates; everything else is answered 404."""


def prompts(count: int, length: int) -> list[list[int]]:
    """Token-id prompts whose first id is their place in the list."""
    rng = random.Random(1)
    return [[place, *(rng.randrange(VOCABULARY) for _ in range(length - 1))] for place in range(count)]


class Answers:
    """Every prompt's part of an answer, as JSON text.

    Args:
        dialect (`str`): `"trl"` or `"vllm"`.
        sent (`Sequence[Sequence[int]]`): The prompts that will come.
        tokens (`int`): Length of a completion.
        logprobs (`int`): Tokens whose logprobs come with the sampled one's.
    """

    def __init__(self, dialect: str, sent: Sequence[Sequence[int]], tokens: int, logprobs: int) -> None:
        rng = random.Random(2)
        self._vllm = dialect == "vllm"
        self.facts = _FACTS[dialect]
        self._parts = [
            (_choice if self._vllm else _columns)(prompt, [_position(rng, logprobs) for _ in range(tokens)])
            for prompt in sent
        ]

    def answer(self, request: bytes) -> list[bytes]:
        """What a generate request is answered, in pieces."""
        body = msgspec.json.decode(request)
        places = [prompt[0] for prompt in body["prompt" if self._vllm else "prompts"]]
        pieces: list[bytes] = []
        if self._vllm:
            pieces.append(b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"canned","choices":[')
            for index, place in enumerate(places):
                pieces += b'%s{"index":%d,' % (b"," if index else b"", index), self._parts[place][0]
            pieces.append(b'],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":1,')
            pieces.append(b'"total_tokens":2,"completion_tokens":1,"prompt_tokens_details":null}}')
            return pieces
        for column, name in enumerate((b"prompt_ids", b"completion_ids", b"logprobs", b"logprob_token_ids")):
            pieces.append(b'%s"%s":[' % (b"," if column else b"{", name))
            for index, place in enumerate(places):
                pieces += b"," if index else b"", self._parts[place][column]
            pieces.append(b"]")
        pieces.append(b"}")
        return pieces


def _position(rng: random.Random, logprobs: int) -> list[tuple[int, float]]:
    """The sampled token, then the most probable ones, as vLLM has them: the sampled is the first of them three times
    in five, and outside of them one time in ten."""
    ranked = [(rng.randrange(VOCABULARY), value) for value in sorted(_values(rng, logprobs), reverse=True)]
    if not ranked or rng.random() < 0.1:
        return [(rng.randrange(VOCABULARY), _values(rng, 1)[0] - 20.0), *ranked][: logprobs + 1]
    rank = 0 if rng.random() < 2 / 3 else rng.randrange(len(ranked))
    return [ranked[rank], *ranked[:rank], *ranked[rank + 1 :]]


def _values(rng: random.Random, count: int) -> list[float]:
    """Logprobs with the digits of 32-bit floats."""
    return list(struct.unpack(f"{count}f", struct.pack(f"{count}f", *(-rng.expovariate(1.5) for _ in range(count)))))


def _text(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _columns(prompt: Sequence[int], positions: Sequence[Sequence[tuple[int, float]]]) -> tuple[bytes, ...]:
    ranked = [sorted(position, key=lambda pair: -pair[1]) for position in positions]
    return (
        _text(prompt),
        _text([position[0][0] for position in positions]),
        _text([[value for _, value in position] for position in ranked]),
        _text([[token for token, _ in position] for position in ranked]),
    )


def _choice(prompt: Sequence[int], positions: Sequence[Sequence[tuple[int, float]]]) -> tuple[bytes, ...]:
    """All but its index, with the fields and in the order of vLLM 0.31."""
    tokens = [position[0][0] for position in positions]
    names = [f"token_id:{token}" for token in tokens]
    offsets, offset = [], 0
    for name in names:
        offsets.append(offset)
        offset += len(name)
    choice = {
        "text": "word " * len(tokens),
        "logprobs": {
            "text_offset": offsets,
            "token_logprobs": [position[0][1] for position in positions],
            "tokens": names,
            "top_logprobs": [{f"token_id:{token}": value for token, value in position} for position in positions],
        },
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": tokens,
        "prompt_logprobs": None,
        "prompt_token_ids": prompt,
        "routed_experts": None,
    }
    return (_text(choice)[1:],)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as clients of a benchmark speak it: whole requests with a content length, one at a time."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end]).decode("latin-1")
            first, *fields = head.split("\r\n")
            headers = {name.strip().lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
            whole = end + 4 + int(headers.get("content-length", 0))
            if len(self._received) < whole:
                return
            body = bytes(self._received[end + 4 : whole])
            del self._received[:whole]
            method, target, _ = first.split(" ", 2)
            self._respond(method, target.partition("?")[0], body)

    def _respond(self, method: str, path: str, body: bytes) -> None:
        status, pieces = "200 OK", [b""]
        if method == "POST" and path in ("/generate/", "/v1/completions"):
            pieces = self._answers.answer(body)
        elif path in self._answers.facts:
            pieces = [self._answers.facts[path]]
        else:
            status = "404 Not Found"
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {sum(map(len, pieces))}\r\n\r\n"
        )
        self._transport.write(b"".join([head.encode(), *pieces]))


async def serve(count: int, answers: Answers) -> None:
    """Listens on free ports until it is ended, and says so when it begins."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: _Connection(answers), "127.0.0.1", 0) for _ in range(count)]
    for server in servers:
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.benchmarks.canned_server", description=__doc__)
    options.add_argument("--servers", type=int, default=1)
    options.add_argument("--dialect", choices=("trl", "vllm"), required=True)
    options.add_argument("--prompts", type=int, default=256)
    options.add_argument("--prompt-tokens", type=int, default=512)
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--logprobs", type=int, default=0)
    given = options.parse_args()
    sent = prompts(given.prompts, given.prompt_tokens)
    asyncio.run(serve(given.servers, Answers(given.dialect, sent, given.tokens, given.logprobs)))


if __name__ == "__main__":
    main()
