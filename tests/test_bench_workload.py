"""What a benchmark asks for."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from trl_pool import ConfigurationError
from trl_pool.bench.workload import Workload, from_dataset, read_dataset

VOCABULARY = list(range(100, 160))


def test_prompts_have_the_lengths_that_were_asked_for_and_share_their_beginning() -> None:
    prompts = Workload(prompts=20, prompt_tokens=30, shared_prefix=12).synthetic(VOCABULARY, step=0, salt=1)
    assert [len(prompt) for prompt in prompts] == [42] * 20
    assert len({tuple(prompt[:12]) for prompt in prompts}) == 1
    assert len({tuple(prompt[12:]) for prompt in prompts}) == 20
    assert {token for prompt in prompts for token in prompt} <= set(VOCABULARY)


def test_another_step_another_salt_and_another_seed_have_other_prompts() -> None:
    found = [
        tuple(map(tuple, Workload(seed=seed).synthetic(VOCABULARY, step, salt)))
        for seed, step, salt in [(0, 0, 1), (0, 1, 1), (0, 0, 2), (1, 0, 1)]
    ]
    assert len({prompt for prompts in found for prompt in prompts}) == 4 * 32
    assert found[0] == tuple(map(tuple, Workload(seed=0).synthetic(VOCABULARY, 0, 1)))


def test_a_shared_prefix_stays_the_same_over_the_steps_of_one_fleet() -> None:
    work = Workload(prompts=1, shared_prefix=50)
    one, two, other = (work.synthetic(VOCABULARY, step, salt)[0][:50] for step, salt in [(0, 1), (1, 1), (0, 2)])
    assert one == two != other


def test_lengths_are_exact_unless_a_sigma_draws_them_below_a_cap() -> None:
    assert Workload(prompts=3, max_tokens=7).lengths(0) == [7, 7, 7]
    work = Workload(prompts=2000, max_tokens=200, concurrency=4, length_sigma=0.8)
    lengths = work.lengths(3)
    assert statistics.median(lengths) == pytest.approx(100, rel=0.1)
    assert max(lengths) == 200
    assert 1 <= min(lengths) < 20
    assert lengths == work.lengths(3) != work.lengths(4)


def test_a_next_turn_is_the_last_prompt_its_answer_and_new_tokens_of_its_own() -> None:
    work = Workload(turn_tokens=5)
    one, two = work.grown([1, 2, 3], [9, 9], (0, 0, 0)), work.grown([1, 2, 3], [9, 9], (0, 1, 0))
    assert one[:5] == two[:5] == [1, 2, 3, 9, 9]
    assert len(one) == len(two) == 10
    assert set(one[5:]) | set(two[5:]) <= {1, 2, 3}
    assert one != two


def test_the_longest_prompt_counts_all_turns() -> None:
    work = Workload(max_tokens=10, prompt_tokens=20, shared_prefix=5, turns=3, turn_tokens=2)
    assert work.longest == 5 + 20 + 2 * (10 + 2) + 10


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompts": 0}, "--prompts 0"),
        ({"n": -1}, "--n -1"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"shared_prefix": -1}, "--shared-prefix -1"),
        ({"concurrency": 0}, "--concurrency 0"),
        ({"turns": 0}, "--turns 0"),
        ({"concurrency": 2, "length_sigma": float("nan")}, "--length-sigma nan"),
        ({"length_sigma": 0.5}, "--length-sigma needs --concurrency"),
    ],
)
def test_impossible_values_are_named_as_the_command_line_names_them(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Workload(**wrong)


@pytest.mark.parametrize("prompt", ["Hello", [1, 2, 3], [{"role": "user", "content": "Hi"}]])
def test_a_dataset_has_prompts_of_any_kind(tmp_path: Path, prompt: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "other": 1}) + "\n\n" + json.dumps({"prompt": prompt}) + "\n")
    assert read_dataset(path) == [prompt, prompt]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no prompt in it"),
        ("{", "line 1: no JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', 'line 2: needs a "prompt"'),
        ('{"prompt": []}', 'line 1: needs a "prompt"'),
        ('{"prompt": [1, "a"]}', 'line 1: needs a "prompt"'),
        ('["a"]', 'line 1: needs a "prompt"'),
        ('{"prompt": "a"}\n{"prompt": [1]}', "text in line 1, token ids in line 2"),
    ],
)
def test_a_faulty_dataset_is_refused_with_its_line(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=fault):
        read_dataset(path)
    with pytest.raises(ConfigurationError, match="No such file"):
        read_dataset(tmp_path / "missing.jsonl")


def test_steps_take_a_datasets_next_prompts_and_begin_again_at_its_end() -> None:
    assert [from_dataset(["a", "b", "c"], 2, step) for step in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]
