"""What a benchmark asks of servers: how many prompts, how long, and what they share.

Prompts are token ids, so that their lengths are exact with any tokenizer; which ids there are is learnt from one
answer of the servers to a text of common words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError

Prompt = Any
"""A text, a list of token ids, or a conversation (a list of messages)."""

WORDS = (
    "the people of this small town have always known that time and water would change what they had made by hand so "
    "each year after the long winter some young men go down to the river with old books and new tools look for good "
    "stone or wood and then build again a house school road where every child can play think read write find friends "
    "but never once did anyone ask how much work it took because most days were just like other days here"
)
"""Common words, of which common tokenizers make one token each."""

# Streams of random numbers, so that lengths stay the same when prompts differ.
_PREFIX, _PROMPTS, _TURNS, _LENGTHS = range(4)


@dataclass(frozen=True)
class Workload:
    """One step's work. A later step has other prompts of the same lengths.

    Args:
        prompts (`int`, *optional*, defaults to `32`):
            Prompts of a step; with several turns, conversations.
        n (`int`, *optional*, defaults to `8`):
            Completions per prompt.
        max_tokens (`int`, *optional*, defaults to `128`):
            Tokens per completion.
        prompt_tokens (`int`, *optional*, defaults to `256`):
            Tokens of a prompt that are its own.
        shared_prefix (`int`, *optional*, defaults to `0`):
            Tokens before them that all prompts share, as a system prompt is.
        turns (`int`, *optional*, defaults to `1`):
            Turns of a conversation: each prompt is the one before it, its first completion, and `turn_tokens` more.
        turn_tokens (`int`, *optional*, defaults to `32`):
            New tokens of a later turn.
        concurrency (`int`, *optional*):
            Prompts that are out at once, each in a call of its own. Without it a turn of all prompts is one call, as
            a trainer's step is.
        until_eos (`bool`, *optional*, defaults to `False`):
            Whether the model may end a completion before `max_tokens`.
        length_sigma (`float`, *optional*, defaults to `0.0`):
            With `concurrency`: lengths of completions are log-normal with this sigma around half of `max_tokens`,
            which is the longest.
        seed (`int`, *optional*, defaults to `0`):
            Same seed, same prompts.

    Raises:
        [`ConfigurationError`]: for values that make no sense, in the words of the command line.
    """

    prompts: int = 32
    n: int = 8
    max_tokens: int = 128
    prompt_tokens: int = 256
    shared_prefix: int = 0
    turns: int = 1
    turn_tokens: int = 32
    concurrency: int | None = None
    until_eos: bool = False
    length_sigma: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "n", "max_tokens", "prompt_tokens", "turns", "turn_tokens", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        for name in ("shared_prefix", "length_sigma", "seed"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"--{name.replace('_', '-')} {value}: must not be negative")
        if self.length_sigma and self.concurrency is None:
            raise ConfigurationError(
                "--length-sigma needs --concurrency: a call has one max_tokens for all of its prompts. Lengths as the "
                "model ends them come with --until-eos"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its completion."""
        later = (self.turns - 1) * (self.max_tokens + self.turn_tokens)
        return self.shared_prefix + self.prompt_tokens + later + self.max_tokens

    def lengths(self, step: int) -> list[int]:
        """`max_tokens` of each prompt of a step."""
        if not self.length_sigma:
            return [self.max_tokens] * self.prompts
        drawn = self._random(_LENGTHS, step).lognormal(math.log(self.max_tokens / 2), self.length_sigma, self.prompts)
        return [int(length) for length in np.clip(np.rint(drawn), 1, self.max_tokens)]

    def grown(self, prompt: Sequence[int], completion: Sequence[int], where: tuple[int, ...]) -> list[int]:
        """A conversation's next prompt.

        Args:
            prompt (`Sequence[int]`): The one before, as token ids; the new ones are drawn from it.
            completion (`Sequence[int]`): What was answered.
            where (`tuple[int, ...]`): Step, index and turn: what makes it different from others.
        """
        new = self._random(_TURNS, *where).choice(np.asarray(prompt), self.turn_tokens)
        return [*prompt, *completion, *new.tolist()]

    def synthetic(self, vocabulary: Sequence[int], step: int, salt: int) -> list[Prompt]:
        """The prompts of a step.

        Args:
            vocabulary (`Sequence[int]`): Token ids to draw from.
            step (`int`): Which.
            salt (`int`): Others have other prompts, so that nobody finds them in a cache.
        """
        ids = np.asarray(vocabulary)
        shared = ids[self._random(_PREFIX, salt).integers(0, len(ids), self.shared_prefix)].tolist()
        drawn = self._random(_PROMPTS, salt, step).integers(0, len(ids), (self.prompts, self.prompt_tokens))
        return [[*shared, *own] for own in ids[drawn].tolist()]

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])


def from_dataset(prompts: Sequence[Prompt], count: int, step: int) -> list[Prompt]:
    """The prompts of a step: the next ones, and from the start again when there are no more."""
    return [prompts[(step * count + index) % len(prompts)] for index in range(count)]


def read_dataset(path: Path) -> list[Prompt]:
    """Reads prompts from a file of JSON lines, each with a `"prompt"`.

    Returns:
        `list`: Texts, lists of token ids or conversations; all of one kind.

    Raises:
        [`ConfigurationError`]: naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--dataset {path}: {error}") from None
    found: list[Prompt] = []
    kinds: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigurationError(f"--dataset {path}, line {number}: no JSON: {error}") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        kind = kind_of(prompt)
        if kind is None:
            raise ConfigurationError(
                f'--dataset {path}, line {number}: needs a "prompt" that is a text, a list of token ids or a list of '
                "messages, and not empty"
            )
        kinds.setdefault(kind, number)
        if len(kinds) > 1:
            shown = ", ".join(f"{kind} in line {first}" for kind, first in kinds.items())
            raise ConfigurationError(f"--dataset {path}: prompts must be all of one kind, there are {shown}")
        found.append(prompt)
    if not found:
        raise ConfigurationError(f"--dataset {path}: no prompt in it")
    return found


def kind_of(prompt: Any) -> str | None:
    """`"text"`, `"token ids"` or `"messages"`; `None` for what is no prompt."""
    if isinstance(prompt, str):
        return "text" if prompt else None
    if not isinstance(prompt, list) or not prompt:
        return None
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        return "token ids"
    return "messages" if all(isinstance(item, Mapping) for item in prompt) else None
