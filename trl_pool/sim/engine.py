"""The simulated engine: tokenizer, weights, generation, scoring and how long they take.

Pure: no I/O, no clock, no state but the weights' digest. The same prompt, seed and weights give the same
tokens on every server, in whatever batch they arrive, so a test can tell a misplaced answer or one from stale
weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_pool.sim.sampling import Sampling
from trl_pool.sim.scores import (
    END_TOKEN,
    F32,
    I64,
    U64,
    VOCABULARY,
    RankTable,
    context,
    contributions,
    mix,
    rank_table,
    ranks_of,
    tokens_at,
    uniform,
)

TOKEN_LIMIT = 2**31
"""Token ids are 32-bit numbers in vLLM."""


def tokenize(text: str) -> list[int]:
    """The token ids of a text: its UTF-8 bytes."""
    return list(text.encode("utf-8", errors="surrogatepass"))


def detokenize(ids: Iterable[int]) -> str:
    """The text of token ids: bytes decoded as UTF-8, other ids as `<|id|>`. The inverse of `tokenize`."""
    return b"".join(map(token_bytes, ids)).decode("utf-8", errors="replace")


def token_bytes(token: int) -> bytes:
    """What one token adds to a text, which may be a part of a character only."""
    return bytes([token]) if 0 <= token < 256 else f"<|{token}|>".encode()


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt that a conversation becomes: a fixed ChatML-like template.

    Raises:
        KeyError: If a message has no `role` or `content`, or a content part no `type`, as on the real server.
    """
    lines = []
    for name, value in (("template", template_kwargs), ("tools", tools)):
        if value:
            lines.append(f"<|{name}|>{json.dumps(value, sort_keys=True)}<|end|>\n")
    for message in messages:
        content = message["content"] or ""
        if isinstance(content, list):
            content = "".join(part["text"] if part["type"] == "text" else image_marker(part) for part in content)
        lines.append(f"<|{message['role']}|>{content}<|end|>\n")
    lines.append("<|assistant|>")
    return "".join(lines)


def image_marker(part: Mapping[str, Any]) -> str:
    """What stands for an image (or whatever is no text) in a rendered conversation."""
    digest = hashlib.blake2b(json.dumps(part, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"<|{part['type']}:{digest}|>"


@dataclass(frozen=True)
class Weights:
    """What the server's weights are: a digest and how many updates led to it.

    Args:
        digest (`str`):
            Hexadecimal; equal digests mean equal weights.
        updates (`int`, *optional*, defaults to `0`):
            Number of parameters received since the start.
    """

    digest: str
    updates: int = 0

    @classmethod
    def checkpoint(cls, name: str = "checkpoint") -> Weights:
        """The weights that a server starts with."""
        return cls(digest_of(name))

    def updated(self, name: str, dtype: str, shape: Sequence[int]) -> Weights:
        """The weights after one more parameter. The same update twice gives two versions."""
        folded = json.dumps([self.digest, self.updates + 1, name, dtype, list(shape)])
        return Weights(digest_of(folded), self.updates + 1)

    @property
    def salt(self) -> int:
        """64 bits of the digest, for the hash of a prefix."""
        return int(self.digest[:16], 16)


def digest_of(content: str | bytes) -> str:
    """128 bits of the hash of a text or of bytes, hexadecimal."""
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Completions:
    """The answer to a generate or a chat, as the `trl` dialect orders it: n completions per prompt, prompt-major.

    Args:
        prompt_ids (`list[list[int]]`):
            `[prompt][token]`.
        completion_ids (`list[list[int]]`):
            `[sequence][token]`, with the end token where there is one.
        logprobs (`list[list[list[float]]]` or `None`):
            `[sequence][token][k]`, by falling probability; -inf for a token that the sampling parameters rule
            out.
        logprob_token_ids (`list[list[list[int]]]` or `None`):
            The token ids of `logprobs`.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[list[float]]] | None
    logprob_token_ids: list[list[list[int]]] | None

    @property
    def longest(self) -> int:
        """Tokens in the longest completion."""
        return max(map(len, self.completion_ids), default=0)


def is_poison(prompt: Sequence[int], max_model_len: int, vocabulary: int = TOKEN_LIMIT) -> bool:
    """Whether this prompt makes a real worker raise, after which the server never answers again.

    vLLM refuses an empty prompt and one that leaves no room for a single new token
    (`vllm.v1.engine.input_processor`, `_validate_prompt_len`): a prompt of exactly the limit is poison, too.
    """
    if not 0 < len(prompt) < max_model_len:
        return True
    return min(prompt) < 0 or max(prompt) >= vocabulary


def generate(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    weights: Weights,
    *,
    max_model_len: int = 4096,
    images: Sequence[str] | None = None,
    later: Sequence[tuple[int, Weights]] = (),
) -> Completions:
    """Complete each prompt `sampling.n` times.

    Args:
        prompts (`Sequence[Sequence[int]]`):
            Token ids, none of the prompts poison.
        sampling (`Sampling`):
            Seed and completion index choose the random stream; greedy sampling ignores both.
        weights (`Weights`):
            Other weights, other tokens.
        max_model_len (`int`, *optional*, defaults to `4096`):
            Prompt and completion together are never longer.
        images (`Sequence[str]`, *optional*):
            One text per prompt which stands for its images; other images, other tokens.
        later (`Sequence[tuple[int, Weights]]`, *optional*):
            Weights that take over from a step on, by rising step: the request was under way when they changed.
    """
    if not prompts:
        return Completions([], [], [], [])
    n = sampling.n
    sums = np.array([_sum(prompt) for prompt in prompts], dtype=np.uint64)
    if images is not None:
        sums += np.array([int(digest_of(image)[:16], 16) if image else 0 for image in images], dtype=np.uint64)
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    sums, positions = np.repeat(sums, n), np.repeat(lengths, n)
    room = max_model_len - positions
    wanted = max_model_len if sampling.max_tokens is None else min(sampling.max_tokens, max_model_len)
    limit = np.minimum(room, wanted)
    table = rank_table(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    streams = _streams(sampling.seed, n, len(prompts))
    ends_with = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else {END_TOKEN})
    stops = np.array(sorted(ends_with), dtype=np.int64)

    steps: list[tuple[U64, I64, I64]] = []
    ends = limit.copy()
    running = np.ones(len(sums), dtype=bool)
    salts = [(0, weights.salt), *((step, others.salt) for step, others in later)]
    while running.any():
        step = len(steps)
        salt = next(salt for first, salt in reversed(salts) if first <= step)
        contexts = context(sums, salt)
        ranks = np.zeros(len(sums), np.int64)
        if not sampling.greedy:
            ranks = table.sample(contexts, uniform(contexts, streams))
        tokens = tokens_at(contexts, ranks)
        stopped = np.isin(tokens, stops)
        if step < sampling.min_tokens:  # too early to stop: take a token nearby instead
            ranks, tokens = _avoid(contexts, ranks, tokens, stops)
            stopped = np.zeros(len(sums), dtype=bool)
        steps.append((contexts, ranks, tokens))
        ends = np.where(running & stopped, np.minimum(ends, step + 1), ends)
        running &= ends > step + 1
        sums = sums + contributions(tokens, positions)
        positions = positions + 1

    prompt_ids = [list(prompt) for prompt in prompts]
    contexts, ranks, tokens = (np.stack(parts, axis=1) for parts in zip(*steps, strict=True))
    stop = ends.tolist()
    completion_ids = [row[:end] for row, end in zip(tokens.tolist(), stop, strict=True)]
    if sampling.logprobs is None:
        return Completions(prompt_ids, completion_ids, None, None)
    logprobs, ids = _top(table, contexts, ranks, tokens, sampling.logprobs)
    return Completions(
        prompt_ids,
        completion_ids,
        [row[:end] for row, end in zip(logprobs, stop, strict=True)],
        [row[:end] for row, end in zip(ids, stop, strict=True)],
    )


def _sum(prompt: Sequence[int]) -> np.uint64:
    ids = np.array(prompt, dtype=np.int64)
    return np.uint64(contributions(ids, np.arange(len(ids), dtype=np.int64)).sum(dtype=np.uint64))


def _streams(seed: int, n: int, prompts: int) -> U64:
    completions = np.arange(n, dtype=np.uint64) * np.uint64(0xA24BAED4963EE407)
    streams = mix(mix(completions + np.uint64(1)) + np.uint64(seed % 2**64))
    return np.tile(streams, prompts)


def _avoid(contexts: U64, ranks: I64, tokens: I64, stops: I64) -> tuple[I64, I64]:
    for _ in range(VOCABULARY):
        unwanted = np.isin(tokens, stops)
        if not unwanted.any():
            break
        ranks = np.where(unwanted, (ranks + 1) % VOCABULARY, ranks)
        tokens = tokens_at(contexts, ranks)
    return ranks, tokens


def _top(
    table: RankTable, contexts: U64, ranks: I64, tokens: I64, k: int
) -> tuple[list[list[list[float]]], list[list[list[int]]]]:
    """The k most likely tokens at every position, and the actual one where it is not among them.

    Arrays are `[sequence][token]`; the answers `[sequence][token][k]`, k = -1 meaning the whole vocabulary.
    """
    actual = table.at(contexts, ranks).tolist()
    if k == 0:
        return [[[p] for p in row] for row in actual], [[[t] for t in row] for row in tokens.tolist()]
    first = np.arange(_width(k), dtype=np.int64)
    logprobs: list[list[list[float]]] = table.at(contexts[..., None], first).tolist()
    ids: list[list[list[int]]] = tokens_at(contexts[..., None], first).tolist()
    for row, column in np.argwhere(ranks >= len(first)).tolist():
        logprobs[row][column].append(actual[row][column])
        ids[row][column].append(int(tokens[row, column]))
    return logprobs, ids


def _width(k: int) -> int:
    return VOCABULARY if k == -1 else min(k, VOCABULARY)


@dataclass(frozen=True)
class Scored:
    """The distributions that one sequence's completion tokens come from.

    The arrays' first axis has one row per completion token. The very first token of a sequence has nothing
    before it and so no distribution: where the prompt is empty, the arrays begin with the second token.

    Args:
        length (`int`):
            Number of completion tokens.
        contexts (`np.ndarray`), ranks (`np.ndarray`), tokens (`np.ndarray`):
            `[token]`: the hash of what precedes it, its rank in the distribution, its id.
    """

    length: int
    contexts: U64
    ranks: I64
    tokens: I64

    @property
    def first(self) -> int:
        """Index of the first completion token that has a distribution: 0 or 1."""
        return self.length - len(self.tokens)

    def lists(self, top: int) -> tuple[list[list[float]], list[list[int]]]:
        """Logprobs and token ids `[token][k]`, as lists.

        The `top` most likely by falling probability, then the actual token where it is not among them. A token without
        a distribution has an empty list.
        """
        logprobs, ids = _top(_SCORES, self.contexts[None], self.ranks[None], self.tokens[None], top)
        empty_logprobs: list[list[float]] = [[] for _ in range(self.first)]
        empty_ids: list[list[int]] = [[] for _ in range(self.first)]
        return empty_logprobs + logprobs[0], empty_ids + ids[0]

    def arrays(self, top: int) -> tuple[F32, I64, F32]:
        """The `top` most likely logprobs and their ids `[token, k]`, and the actual tokens' logprobs `[token]`."""
        first = np.arange(_width(top), dtype=np.int64)
        return (
            _SCORES.at(self.contexts[:, None], first),
            tokens_at(self.contexts[:, None], first),
            _SCORES.at(self.contexts, self.ranks),
        )


# There is no temperature: vLLM computes prompt logprobs from the unprocessed logits, whatever the request's
# temperature (`gpu_model_runner._get_prompt_logprobs_dict`).
_SCORES = rank_table(1.0, 0, 1.0, 0.0)


def score(sequence: Sequence[int], prompt_length: int, weights: Weights) -> Scored:
    """Score the tokens of a sequence from `prompt_length` on.

    Args:
        sequence (`Sequence[int]`):
            Token ids of prompt and completion.
        prompt_length (`int`):
            How many of them are the prompt, 0 to all.
        weights (`Weights`):
            The same distributions as when generating with these weights.
    """
    ids = np.array(sequence, dtype=np.int64)
    before = np.zeros(len(ids), dtype=np.uint64)
    np.cumsum(contributions(ids, np.arange(len(ids)))[:-1], dtype=np.uint64, out=before[1:])
    first = max(prompt_length, 1)
    contexts, tokens = context(before[first:], weights.salt), ids[first:]
    return Scored(len(ids) - prompt_length, contexts, ranks_of(contexts, tokens), tokens)


@dataclass(frozen=True)
class Latency:
    """How long a request keeps the engine.

    Args:
        fixed_ms (`float`, *optional*, defaults to `0.0`):
            Milliseconds per request.
        prefill_ms_per_token (`float`, *optional*, defaults to `0.0`):
            Milliseconds per prompt token; all prompts of a request are prefilled one after the other.
        decode_ms_per_token (`float`, *optional*, defaults to `0.0`):
            Milliseconds per decoding step; all sequences step together, so the longest completion counts.
    """

    fixed_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    decode_ms_per_token: float = 0.0

    def seconds(self, prompt_tokens: int, steps: int) -> float:
        """The time for this many prompt tokens and decoding steps, in seconds."""
        prefill, decode = self.prefill_ms_per_token * prompt_tokens, self.decode_ms_per_token * steps
        return (self.fixed_ms + prefill + decode) / 1000.0
