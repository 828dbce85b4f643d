"""The simulated engine, without a server around it."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_pool.sim.config import SimConfig
from trl_pool.sim.engine import (
    Latency,
    Weights,
    detokenize,
    generate,
    is_poison,
    render_chat,
    score,
    tokenize,
)
from trl_pool.sim.sampling import Sampling
from trl_pool.sim.scores import END_TOKEN, VOCABULARY, RankTable, ranks_of, tokens_at
from trl_pool.sim.trl_routes import binary_scores, json_scores

CHECKPOINT = Weights.checkpoint()
PROMPTS = [tokenize(f"What is {i} and {i}?") for i in range(8)]


# Tokens.


@given(st.text())
def test_tokenizing_is_reversible(text: str) -> None:
    ids = tokenize(text)
    assert all(0 <= i < 256 for i in ids)
    assert detokenize(ids) == text


def test_tokenizing_takes_lone_surrogates() -> None:
    """JSON can carry them, so a server must not fall over them."""
    assert tokenize("\ud800") == [0xED, 0xA0, 0x80]


def test_tokens_without_text_are_shown_by_number() -> None:
    assert detokenize([104, 105, END_TOKEN, 300]) == "hi<|256|><|300|>"


def test_a_chat_is_rendered_with_every_part_of_it() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": "x"}]},
        {"role": "assistant", "content": None},
    ]
    text = render_chat(messages)
    assert text.startswith("<|system|>Be brief.<|end|>\n<|user|>Hi<|image_url:")
    assert text.endswith("<|assistant|><|end|>\n<|assistant|>")
    variants = [text, render_chat(messages, tools=[{"name": "f"}]), render_chat(messages, None, {"think": 1})]
    assert len(set(variants)) == 3


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, {"role": "u", "content": [{"a": 1}]}])
def test_a_message_without_its_parts_raises_as_on_the_real_server(message: dict[str, object]) -> None:
    with pytest.raises(KeyError):
        render_chat([message])


# Distributions.


def test_ranks_and_tokens_are_inverse_permutations_of_the_vocabulary() -> None:
    contexts = np.random.default_rng(0).integers(0, 2**63, 200, dtype=np.uint64)[:, None]
    everything = np.arange(VOCABULARY, dtype=np.int64)
    tokens = tokens_at(contexts, everything)
    assert (np.sort(tokens, axis=1) == everything).all()
    assert (ranks_of(contexts, tokens) == everything).all()


@pytest.mark.parametrize("parameters", [(1.0, 0, 1.0, 0.0), (0.3, 0, 0.9, 0.0), (2.0, 5, 1.0, 0.0), (0.01, 0, 1, 0.2)])
def test_the_probabilities_of_each_distribution_add_up_to_one(parameters: tuple[float, int, float, float]) -> None:
    p = np.exp(RankTable(*parameters).logprobs.astype(np.float64))
    assert p.sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    assert (np.diff(p, axis=1) <= 0).all()


def test_truncation_keeps_the_ranks_that_vllm_would_keep() -> None:
    assert (np.isfinite(RankTable(top_k=7).logprobs).sum(axis=1) == 7).all()
    plain = np.exp(RankTable().logprobs.astype(np.float64))
    kept = np.isfinite(RankTable(top_p=0.5).logprobs).sum(axis=1)
    assert all(row[: n - 1].sum() < 0.5 <= row[:n].sum() + 1e-6 for row, n in zip(plain, kept, strict=True))
    kept = np.isfinite(RankTable(min_p=0.26).logprobs).sum(axis=1)
    assert all(row[n - 1] >= 0.26 * row[0] > row[n] for row, n in zip(plain, kept, strict=True))


def test_tokens_are_sampled_as_often_as_their_logprobs_say() -> None:
    """Mean of -logprob over samples is the entropy, within sampling error."""
    done = generate([tokenize("x")], Sampling(n=4000, max_tokens=1, logprobs=-1), CHECKPOINT)
    assert done.logprobs is not None
    assert done.logprob_token_ids is not None
    p = np.exp(np.array(done.logprobs[0][0]))
    entropy = -(p * np.log(p)).sum()
    at = [
        dict(zip(ids[0], lps[0], strict=True)) for ids, lps in zip(done.logprob_token_ids, done.logprobs, strict=True)
    ]
    drawn = [-lps[c[0]] for lps, c in zip(at, done.completion_ids, strict=True)]
    assert np.mean(drawn) == pytest.approx(entropy, abs=4 * float(np.std(drawn)) / math.sqrt(len(drawn)))


# Generating.


def test_the_same_request_gives_the_same_answer() -> None:
    sampling = Sampling(n=3, logprobs=2)
    assert generate(PROMPTS, sampling, CHECKPOINT) == generate(PROMPTS, sampling, Weights.checkpoint())


def test_an_answer_does_not_depend_on_the_rest_of_the_batch() -> None:
    sampling = Sampling(n=2, max_tokens=32)
    together = generate(PROMPTS, sampling, CHECKPOINT).completion_ids
    apart = [c for prompt in PROMPTS for c in generate([prompt], sampling, CHECKPOINT).completion_ids]
    assert together == apart
    backwards = generate(PROMPTS[::-1], sampling, CHECKPOINT).completion_ids
    assert [backwards[i : i + 2] for i in range(14, -1, -2)] == [together[i : i + 2] for i in range(0, 16, 2)]


@pytest.mark.parametrize("max_tokens", [6, 64])
def test_prompts_completions_seeds_and_weights_all_make_a_difference(max_tokens: int) -> None:
    other = Weights.checkpoint("other")
    updated = CHECKPOINT.updated("w", "torch.float32", [2])
    seen = [
        tuple(c)
        for weights in (CHECKPOINT, other, updated)
        for seed in (0, 1)
        for c in generate(
            PROMPTS, Sampling(n=4, max_tokens=max_tokens, seed=seed, ignore_eos=True), weights
        ).completion_ids
    ]
    assert len(set(seen)) == len(seen) == 3 * 2 * 8 * 4


def test_images_make_a_difference() -> None:
    def first(images: list[str] | None) -> list[int]:
        return generate(PROMPTS[:1], Sampling(ignore_eos=True), CHECKPOINT, images=images).completion_ids[0]

    assert first(None) == first([""])
    assert first(["a"]) != first(["b"]) != first(None)


def test_greedy_sampling_takes_the_likeliest_tokens_whatever_the_seed() -> None:
    one = generate(PROMPTS, Sampling(temperature=0.0, seed=1, logprobs=1), CHECKPOINT)
    two = generate(PROMPTS, Sampling(temperature=0.0, seed=2, logprobs=1), CHECKPOINT)
    assert one == two
    assert one.logprob_token_ids == [[[t] for t in c] for c in one.completion_ids]


def test_completions_end_with_the_end_token_or_at_the_limit() -> None:
    done = generate(PROMPTS, Sampling(n=32, max_tokens=40), CHECKPOINT)
    lengths = {len(c) for c in done.completion_ids}
    assert len(lengths) > 10
    assert max(lengths) == done.longest == 40
    for completion in done.completion_ids:
        assert END_TOKEN not in completion[:-1]
        assert len(completion) == 40 or completion[-1] == END_TOKEN


def test_min_tokens_and_ignore_eos_keep_completions_going() -> None:
    longer = generate(PROMPTS, Sampling(n=32, max_tokens=40, min_tokens=20), CHECKPOINT).completion_ids
    assert all(len(c) >= 20 and END_TOKEN not in c[:19] for c in longer)
    full = generate(PROMPTS, Sampling(n=32, max_tokens=40, ignore_eos=True), CHECKPOINT).completion_ids
    assert {len(c) for c in full} == {40}
    assert any(END_TOKEN in c[:-1] for c in full)


def test_stop_tokens_end_completions_and_stay_in_them() -> None:
    sampling = Sampling(n=16, max_tokens=40, stop_token_ids=frozenset(range(50)))
    for completion in generate(PROMPTS, sampling, CHECKPOINT).completion_ids:
        assert all(t >= 50 for t in completion[:-1])


def test_a_sequence_never_outgrows_the_model() -> None:
    long, short = [7] * 30, [7] * 3
    endless = generate([long], Sampling(max_tokens=10**30, ignore_eos=True), CHECKPOINT, max_model_len=32)
    assert endless.longest == 2
    done = generate([long, short], Sampling(max_tokens=None, ignore_eos=True), CHECKPOINT, max_model_len=32)
    assert [len(c) for c in done.completion_ids] == [2, 29]


@pytest.mark.parametrize("k", [0, 1, 5, 600, -1])
def test_logprobs_are_the_likeliest_and_the_sampled_token_by_falling_probability(k: int) -> None:
    done = generate(PROMPTS, Sampling(n=4, logprobs=k), CHECKPOINT)
    assert done.logprobs is not None
    assert done.logprob_token_ids is not None
    full = VOCABULARY if k in (600, -1) else k
    widths = set()
    for completion, logprobs, ids in zip(done.completion_ids, done.logprobs, done.logprob_token_ids, strict=True):
        assert len(completion) == len(logprobs) == len(ids)
        for token, row, row_ids in zip(completion, logprobs, ids, strict=True):
            widths.add(len(row))
            assert len(row) == len(row_ids) == len(set(row_ids))
            assert row == sorted(row, reverse=True)
            assert token in row_ids
            assert token in row_ids[:full] or (row_ids[-1] == token and len(row) == full + 1)
    assert widths == {0: {1}, 1: {1, 2}, 5: {5, 6}}.get(k, {VOCABULARY})


def test_no_logprobs_wanted_none_given() -> None:
    done = generate(PROMPTS, Sampling(logprobs=None), CHECKPOINT)
    assert done.logprobs is None
    assert done.logprob_token_ids is None
    assert done.completion_ids == generate(PROMPTS, Sampling(), CHECKPOINT).completion_ids


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_no_prompts_give_empty_lists(logprobs: int | None) -> None:
    """Of the logprobs too, even unwanted ones: that is what the real server's loop over nothing gives."""
    done = generate([], Sampling(logprobs=logprobs), CHECKPOINT)
    assert (done.prompt_ids, done.completion_ids, done.logprobs, done.logprob_token_ids) == ([], [], [], [])


def test_logprobs_ruled_out_are_null_in_json() -> None:
    done = generate(PROMPTS[:1], Sampling(top_k=2, max_tokens=1, logprobs=3), CHECKPOINT)
    (((_, _, third),),) = msgspec.json.decode(msgspec.json.encode(done))["logprobs"]
    assert third is None


def test_a_large_batch_takes_well_under_two_seconds() -> None:
    prompts = [tokenize(f"prompt number {i} " * 10) for i in range(256)]
    started = time.process_time()
    msgspec.json.encode(generate(prompts, Sampling(n=8, max_tokens=64), CHECKPOINT))
    assert time.process_time() - started < 1.5


# Scoring.


@given(st.integers(0, 30), st.integers(1, 12))
@settings(max_examples=25)
def test_scores_are_the_logprobs_that_generating_gave(seed: int, top: int) -> None:
    done = generate(PROMPTS[:2], Sampling(n=2, seed=seed, logprobs=top), CHECKPOINT)
    assert done.logprobs is not None
    assert done.logprob_token_ids is not None
    for i, completion in enumerate(done.completion_ids):
        prompt = PROMPTS[i // 2]
        scored = score(prompt + completion, len(prompt), CHECKPOINT)
        assert scored.lists(top) == (done.logprobs[i], done.logprob_token_ids[i])


def test_scores_change_with_the_weights() -> None:
    one, two = (score(PROMPTS[0], 3, weights).lists(1) for weights in (CHECKPOINT, Weights.checkpoint("b")))
    assert one != two


def test_the_first_token_of_a_sequence_has_no_distribution() -> None:
    logprobs, ids = score([1, 2, 3], 0, CHECKPOINT).lists(2)
    assert logprobs[0] == ids[0] == []
    assert len(logprobs) == 3
    assert (logprobs[1:], ids[1:]) == score([1, 2, 3], 1, CHECKPOINT).lists(2)


def test_a_sequence_that_is_all_prompt_has_no_scores() -> None:
    assert score([1, 2, 3], 3, CHECKPOINT).lists(2) == ([], [])


def test_token_ids_that_the_vocabulary_lacks_are_scored_as_very_unlikely() -> None:
    logprobs, ids = score([1, 151_644], 1, CHECKPOINT).lists(1)
    assert ids[0][1] == 151_644
    assert logprobs[0][1] == -25.0


def test_binary_scores_hold_the_same_numbers_padded() -> None:
    sequences, lengths, top = [[1, 2, 3, 4], [5, 6], [7]], [1, 0, 1], 2
    scored = [score(s, p, CHECKPOINT) for s, p in zip(sequences, lengths, strict=True)]
    lists: dict[str, Any] = json_scores(scored, top)
    fields = binary_scores(scored, top)
    assert fields["shape"] == [3, 3, 2]
    assert fields["completion_lengths"] == [3, 2, 0]

    def array(name: str, dtype: type, width: int) -> np.ndarray:
        decoded = msgspec.json.decode(msgspec.json.encode(fields[name]), type=bytes)
        return np.frombuffer(decoded, dtype=dtype).reshape(3, 3, width)

    logprobs, ids = array("logprobs_b64", np.float32, 2), array("token_ids_b64", np.int32, 2)
    actual = array("actual_logprobs_b64", np.float32, 1)[..., 0]
    actual_ids = array("actual_token_ids_b64", np.int32, 1)[..., 0]
    assert actual_ids.tolist() == [[2, 3, 4], [0, 6, 0], [0, 0, 0]]
    assert np.isneginf(actual).tolist() == [[False] * 3, [True, False, True], [True] * 3]
    assert logprobs[0].tolist() == [row[:2] for row in lists["logprobs"][0]]
    assert ids[0].tolist() == [row[:2] for row in lists["logprob_token_ids"][0]]
    assert np.isneginf(logprobs[1, 0]).all()
    assert lists["logprobs"][1][0] == []
    assert logprobs[1, 1].tolist() == lists["logprobs"][1][1][:2]


def test_more_top_logprobs_than_tokens_are_padded() -> None:
    fields = binary_scores([score([1, 2], 1, CHECKPOINT)], VOCABULARY + 3)
    assert fields["shape"] == [1, 1, VOCABULARY + 3]


# Weights, poison, latency.


def test_weights_fold_in_every_update_and_their_order() -> None:
    a, b = ("a", "torch.bfloat16", [2, 3]), ("b", "torch.bfloat16", [2, 3])
    ways = [[], [a], [b], [a, a], [a, b], [b, a], [("a", "torch.float32", [2, 3])], [("a", "torch.bfloat16", [3, 2])]]
    ends = []
    for updates in ways:
        weights = CHECKPOINT
        for update in updates:
            weights = weights.updated(*update)
        assert weights.updates == len(updates)
        ends.append(weights.digest)
    assert len(set(ends)) == len(ways)


@pytest.mark.parametrize(
    ("prompt", "poison"),
    [
        ([], True),
        ([1] * 7, False),
        ([1] * 8, True),
        ([1] * 9, True),
        ([-1], True),
        ([2**63], True),
        ([151_644], False),
    ],
)
def test_prompts_that_leave_no_room_for_a_token_are_poison(prompt: list[int], poison: bool) -> None:
    """Exactly max_model_len is too long already: vLLM wants room for at least one new token."""
    assert is_poison(prompt, max_model_len=8) is poison
    assert is_poison([512], max_model_len=8, vocabulary=512)


def test_latency_adds_up() -> None:
    assert Latency(5, 0.5, 2).seconds(prompt_tokens=100, steps=10) == pytest.approx(0.075)
    assert Latency().seconds(1000, 1000) == 0.0


@pytest.mark.parametrize(
    "trait", [{"dialect": "x"}, {"max_model_len": 0}, {"data_parallel_size": 0}, {"max_logprobs": -2}]
)
def test_impossible_traits_are_refused(trait: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(trait))):
        SimConfig(**trait)  # type: ignore[arg-type]
