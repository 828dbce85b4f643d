"""The command line, and what it means."""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..addresses import parse_backends
from ..config import PoolConfig, shown
from ..errors import ConfigurationError
from .measure import Plan
from .workload import Workload, read_dataset

PROGRAM = "python -m trl_pool.bench"

_EPILOG = """\
The work of a step is the same for every number of servers. Prompts are token ids drawn at random, and never the same
twice, so that none is in a cache but for what it shares; completions are as long as --max-tokens says unless
--until-eos. The servers are taken as they are: nobody else should use them meanwhile.

Tables: a call is all prompts of a turn, or one prompt with --concurrency. "cache hits" is the part of the prompts'
tokens that was in the prefix cache, where a server tells (vllm serve does). It holds whole blocks, of 16 tokens and on
a CPU of 128, and each of a prompt's n completions looks for itself: n = 8 alone makes up to 7/8. "speed-up" is in
tokens/s.

  which number of servers pays         --compare
  a step of GRPO                       --prompts 64 --n 8 --prompt-tokens 512 --max-tokens 1024 --reset-caches
  a tool loop with a system prompt     --n 1 --turns 5 --shared-prefix 400
  users of the gateway                 --n 1 --concurrency 64 --prompts 1000 --length-sigma 0.8

Every other setting of the pool comes from the environment variable of its name: BACKEND_API_KEY, REQUEST_TIMEOUT,
MAX_INFLIGHT_PER_BACKEND, …
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = {field.name: field.default for field in dataclasses.fields(Workload)}
    options = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measures your own servers under a workload of your choice: throughput, each server's share, "
        "latencies, cache hits, and what each further server adds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument
    add("--backends", metavar="URL,URL", help="servers, or a gateway before them (default: BACKENDS)")
    add("--wait", type=float, default=10.0, metavar="SECONDS", help="for servers to be up (default: %(default)g)")

    group = options.add_argument_group("which servers")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--compare", action="store_true", help="measure the first one, the first two, … and all")
    which.add_argument("--servers", type=_numbers, metavar="1,2,4", help="measure the first so many, in turn")

    add = options.add_argument_group("what they are asked").add_argument
    for name, what in (
        ("prompts", "prompts of a step"),
        ("n", "completions per prompt"),
        ("max_tokens", "tokens per completion"),
        ("prompt_tokens", "tokens of a prompt that are its own"),
        ("shared_prefix", "tokens before them that all prompts share"),
        ("turns", "turns: each prompt is the last one with its answer and more"),
        ("turn_tokens", "new tokens of a later turn"),
    ):
        default = defaults[name]
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    add(
        "--concurrency",
        type=int,
        metavar="N",
        help="so many prompts out at once, each in a call of its own (default: a turn is one call, as a trainer's)",
    )
    add("--until-eos", action="store_true", help="let the model end completions before --max-tokens")
    add(
        "--length-sigma",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="with --concurrency: log-normal lengths, median half of --max-tokens, none longer",
    )
    add("--dataset", type=Path, metavar="FILE", help='JSON lines with a "prompt": text, token ids or messages')
    add("--max-model-len", type=int, metavar="N", help="the servers'; trl vllm-serve does not tell it")
    add(
        "--reset-caches",
        action="store_true",
        help="empty the servers' prefix caches before every step, as a weight update does",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="same seed, same prompts, which caches may know by then (default: another one each time)",
    )

    add = options.add_argument_group("how often, and what comes of it").add_argument
    add("--steps", type=int, default=5, metavar="N", help="steps that count (default: %(default)s)")
    add("--warm-up", type=int, default=1, metavar="N", help="steps before them (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--quiet", action="store_true", help="no progress bar")
    return options


def _numbers(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r}; allowed: numbers separated by commas") from None


class Command(NamedTuple):
    """What a command line asks for.

    Args:
        urls (`list[str]`): The servers.
        plan ([`Plan`]): What is measured.
        config ([`PoolConfig`]): The pools' settings.
        wait_seconds (`float`): For servers to be up.
        json (`Path` or `None`): Where figures are written.
        quiet (`bool`): Whether there is no progress bar.
    """

    urls: list[str]
    plan: Plan
    config: PoolConfig
    wait_seconds: float
    json: Path | None
    quiet: bool


def read(argv: Sequence[str] | None = None) -> Command:
    """Reads a command line.

    Raises:
        [`ConfigurationError`]: naming the option, its value and what is allowed.
        `SystemExit`: with status 2, for a line that argparse does not understand.
    """
    options = parser().parse_args(argv)
    for name in ("steps", "warm_up"):
        least = int(name == "steps")
        if getattr(options, name) < least:
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")
    if not 0 <= options.wait < float("inf"):
        raise ConfigurationError(f"--wait {options.wait:g}: must not be negative")
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigurationError(f"--json {options.json}: there is no folder {options.json.parent}")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    fields = {field.name for field in dataclasses.fields(Workload)} - {"seed"}
    workload = Workload(**{name: getattr(options, name) for name in fields}, seed=seed)
    plan = Plan(
        workload,
        steps=options.steps,
        warm_up=options.warm_up,
        counts=options.servers,
        compare=options.compare,
        dataset=None if options.dataset is None else read_dataset(options.dataset),
        reset_caches=options.reset_caches,
    )
    limits = {} if options.max_model_len is None else {"max_model_len": options.max_model_len}
    config = PoolConfig.from_env(**limits)
    return Command(_urls(options.backends), plan, config, options.wait, options.json, options.quiet)


def _urls(backends: str | None) -> list[str]:
    given = backends if backends is not None else os.environ.get("BACKENDS", "")
    name = "BACKENDS" if backends is None else "--backends"
    if not given.strip():
        raise ConfigurationError("no servers: give --backends URL,URL or set BACKENDS")
    try:
        return [address.url for address in parse_backends(given)]
    except ConfigurationError as error:
        raise ConfigurationError(f"{name} {shown(given)}: {error}") from None
