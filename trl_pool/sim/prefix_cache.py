"""How much of its prompts a simulated server has seen before.

It counts as vLLM does and saves no time: whole blocks are kept, the least recently used are given up first, the last
token of a prompt is always computed, and each of a prompt's n completions looks for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_TOKENS = 16
"""vLLM's block size."""


class PrefixCache:
    """Blocks of prompts, each known by all tokens up to its end.

    Args:
        capacity (`int`, *optional*, defaults to `65536`): Blocks that are kept.
    """

    def __init__(self, capacity: int = 65536) -> None:
        self.queries = self.hits = 0
        self._capacity = capacity
        self._blocks: dict[int, None] = {}  # least recently used first

    def __repr__(self) -> str:
        return f"<PrefixCache {len(self._blocks)} blocks, {self.hits} of {self.queries} tokens found>"

    def look_up(self, prompt: Sequence[int], n: int = 1, salt: str = "") -> None:
        """Counts a prompt's tokens, and those that are here, and keeps it.

        Args:
            prompt (`Sequence[int]`): Token ids.
            n (`int`, *optional*, defaults to `1`): Completions.
            salt (`str`, *optional*): Equal tokens are another prompt with another adapter, or other images.
        """
        key, found, missed = hash(salt), 0, False
        whole = (len(prompt) - 1) // BLOCK_TOKENS
        for end in range(BLOCK_TOKENS, whole * BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = hash((key, *prompt[end - BLOCK_TOKENS : end]))
            missed = missed or key not in self._blocks
            found += not missed
            self._blocks.pop(key, None)
            self._blocks[key] = None
        while len(self._blocks) > self._capacity:
            del self._blocks[next(iter(self._blocks))]
        self.queries += n * len(prompt)
        self.hits += BLOCK_TOKENS * (found + (n - 1) * whole)

    def reset(self) -> None:
        """Forgets all blocks. The counts stay: they only ever rise."""
        self._blocks.clear()

    def metrics(self, model: str) -> str:
        """The counts as `vllm serve` tells them at `/metrics`."""
        lines = []
        for name, what, value in (
            ("queries", "Tokens looked for in the prefix cache.", self.queries),
            ("hits", "Tokens found in the prefix cache.", self.hits),
        ):
            metric = f"vllm:prefix_cache_{name}_total"
            lines += [f"# HELP {metric} {what}", f"# TYPE {metric} counter"]
            lines.append(f'{metric}{{engine="0",model_name="{model}"}} {float(value)}')
        return "\n".join(lines) + "\n"
