"""The simulated model: what is the next token's distribution after a given prefix?

A real model maps a prefix to 512 scores. This one maps it to a 64-bit hash, and the hash to a *ranking* of
the vocabulary and a *sharpness*; the probability of a token then depends on its rank and the sharpness alone.
So a sampled token, its logprob and the k most likely tokens cost a few array operations whatever the size of
the vocabulary, and generating and scoring agree: both ask for the distribution after the same prefix under
the same weights.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

VOCABULARY = 512
"""Number of token ids: 0 – 255 are bytes, 256 ends a completion, the rest have no text."""

END_TOKEN = 256
"""The end-of-sequence token."""

OUT_OF_VOCABULARY_LOGPROB = -25.0
"""Logprob of a scored token id that the vocabulary does not have (prompts may come from a real tokenizer)."""

_SHARPNESSES = 64
_MASK = VOCABULARY - 1
# The end token's rank is moved to a fixed place, so that completions end with a small probability at every
# step: after one prefix in 64 it is the most likely token (greedy completions end, too), else it sits far
# down the ranking.
_LIKELY_END_ONE_IN = 64
_UNLIKELY_END_RANK = 24
# Odd numbers are invertible modulo a power of two: rank -> (a * rank + b) % 512 is a permutation for each of
# them.
_INVERSE = np.array([pow(2 * i + 1, -1, VOCABULARY) for i in range(VOCABULARY // 2)], dtype=np.int64)


def mix(x: U64) -> U64:
    """Scramble 64-bit values: the finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
    number generators", OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def contributions(tokens: I64, positions: I64) -> U64:
    """What each (token, position) adds to the sum that stands for a prefix.

    A sum rather than a chain: the prefix sums of a whole sequence are then one `cumsum`.
    """
    keyed = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64)
    return mix(mix(keyed) + np.uint64(0xD1B54A32D192ED03))


def context(prefix_sums: U64, salt: int) -> U64:
    """The hash that decides the next token's distribution, from prefix sums and the weights' salt."""
    return mix(prefix_sums + np.uint64(salt))


def uniform(contexts: U64, streams: U64) -> F64:
    """One number in [0, 1) per context, different for each random stream (seed and completion index).

    40 bits, so that adding a row number below 64 to it (`RankTable.sample`) never rounds up to the next row.
    """
    return (mix(contexts ^ streams) >> np.uint64(24)).astype(np.float64) * 2.0**-40


def _permutation(contexts: U64) -> tuple[I64, I64, I64]:
    index = ((contexts >> np.uint64(9)) & np.uint64(255)).astype(np.int64)
    offset = (contexts & np.uint64(_MASK)).astype(np.int64)
    likely = ((contexts >> np.uint64(23)) % np.uint64(_LIKELY_END_ONE_IN)) == 0
    return index, offset, np.where(likely, 0, _UNLIKELY_END_RANK)


def tokens_at(contexts: U64, ranks: I64) -> I64:
    """The token ids at the given ranks (0 is the most likely); the two arguments broadcast."""
    index, offset, end_rank = _permutation(contexts)
    factor = 2 * index + 1
    tokens = (factor * ranks + offset) & _MASK
    displaced = (factor * end_rank + offset) & _MASK  # changes places with the end token
    tokens = np.where(tokens == END_TOKEN, displaced, tokens)
    return np.where(ranks == end_rank, END_TOKEN, tokens)


def ranks_of(contexts: U64, tokens: I64) -> I64:
    """The ranks of the given token ids: the inverse of `tokens_at`. Ids outside the vocabulary rank `VOCABULARY`."""
    index, offset, end_rank = _permutation(contexts)
    displaced = ((2 * index + 1) * end_rank + offset) & _MASK
    swapped = np.where(tokens == displaced, END_TOKEN, tokens)
    ranks = ((swapped - offset) * _INVERSE[index]) & _MASK
    ranks = np.where(tokens == END_TOKEN, end_rank, ranks)
    return np.where((tokens < 0) | (tokens >= VOCABULARY), VOCABULARY, ranks)


class RankTable:
    """Logprob by sharpness and rank, for one set of sampling parameters.

    The score of rank r is `-a * log(1 + r)`, with the exponent a between 0.5 and 1.5 by sharpness: flat
    enough that two completions of one prompt part within a token or two. Temperature divides it, then top-k,
    top-p and min-p cut the tail and the rest is normalised again (vLLM's `processed_logprobs`).

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            0 is greedy; as in vLLM the logprobs are then those of temperature 1.
        top_k (`int`, *optional*, defaults to `0`):
            Keep this many ranks; 0 and -1 keep all.
        top_p (`float`, *optional*, defaults to `1.0`):
            Keep the fewest ranks whose probabilities add up to this.
        min_p (`float`, *optional*, defaults to `0.0`):
            Keep ranks at least this likely relative to the first.
    """

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> None:
        ranks = np.arange(VOCABULARY, dtype=np.int64)[None, :]
        exponents = np.linspace(0.5, 1.5, _SHARPNESSES)[:, None]
        scores: F64 = -exponents * np.log1p(ranks) / (temperature or 1.0)
        p: F64 = np.exp(scores)  # rank 0 has score 0: no overflow
        p /= p.sum(axis=1, keepdims=True)
        if temperature > 0:
            keep = (np.cumsum(p, axis=1) - p < top_p) & (p >= min_p * p[:, :1])
            if top_k > 0:
                keep &= ranks < top_k
            keep[:, 0] = True
            scores = np.where(keep, scores, -np.inf)
        weights: F64 = np.exp(scores)
        total: F64 = weights.sum(axis=1, keepdims=True)
        self.logprobs: F32 = (scores - np.log(total)).astype(np.float32)
        self._last: I64 = np.isfinite(scores).sum(axis=1) - 1
        cumulative: F64 = np.minimum(np.cumsum(weights / total, axis=1), 1.0)
        cumulative[ranks >= self._last[:, None]] = 1.0
        # All rows in one sorted array: row s covers [s, s + 1).
        rows = np.arange(_SHARPNESSES, dtype=np.float64)[:, None]
        self._cumulative: F64 = (cumulative + rows).ravel()

    @staticmethod
    def sharpness(contexts: U64) -> I64:
        """The row of the table that holds for each context."""
        return ((contexts >> np.uint64(17)) & np.uint64(_SHARPNESSES - 1)).astype(np.int64)

    def sample(self, contexts: U64, draws: F64) -> I64:
        """The rank that each draw in [0, 1) falls on."""
        rows = self.sharpness(contexts)
        found: I64 = np.searchsorted(self._cumulative, draws + rows, side="right") - rows * VOCABULARY
        return np.minimum(found, self._last[rows])

    def at(self, contexts: U64, ranks: I64) -> F32:
        """The logprobs of the given ranks; the two arguments broadcast. -inf for those cut off."""
        rows = self.sharpness(contexts)
        known = self.logprobs[rows, np.minimum(ranks, VOCABULARY - 1)]
        return np.where(ranks < VOCABULARY, known, np.float32(OUT_OF_VOCABULARY_LOGPROB))


@lru_cache(maxsize=32)
def rank_table(temperature: float, top_k: int, top_p: float, min_p: float) -> RankTable:
    """The table for these parameters, kept for the next request that has the same."""
    return RankTable(temperature, top_k, top_p, min_p)
