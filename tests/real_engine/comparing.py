"""What "the same answer" means on a real engine, where another batch moves logprobs by rounding."""

from __future__ import annotations

from typing import Any

TOLERANCE = 0.02
"""How far a logprob may move with the composition of its batch (bfloat16)."""


def assert_same_rollouts(found: dict[str, Any], expected: dict[str, Any], top: int) -> dict[str, float]:
    """Greedy answers are equal in structure and ids; where ids part, both had the two tokens as a near-tie, and what
    follows is another text. Both must have been asked for `top` > 1 logprobs.

    Returns:
        `dict[str, float]`: `compared` tokens, `parted` sequences, `worst` logprob difference.
    """
    assert top > 1
    assert found.keys() == expected.keys()
    assert found["prompt_ids"] == expected["prompt_ids"]
    assert len(found["completion_ids"]) == len(expected["completion_ids"])
    compared, parted, worst = 0, 0, 0.0
    for sequence, (ours, theirs) in enumerate(zip(found["completion_ids"], expected["completion_ids"], strict=True)):
        assert ours
        for position, (token, other) in enumerate(zip(ours, theirs, strict=False)):
            mine = top_logprobs(found, sequence, position)
            reference = top_logprobs(expected, sequence, position)
            if token != other:
                assert abs(reference[other] - reference.get(token, -99.0)) < 2 * TOLERANCE, (sequence, position)
                parted += 1
                break
            compared += 1
            worst = max(worst, abs(mine[token] - reference[token]))
        else:
            assert len(ours) == len(theirs)
    assert worst < TOLERANCE
    # Near-ties are the exception, or this comparison would say nothing.
    assert compared > 0.5 * sum(map(len, expected["completion_ids"]))
    return {"compared": compared, "parted": parted, "worst": worst}


def top_logprobs(answer: dict[str, Any], sequence: int, position: int) -> dict[int, float]:
    """Token to logprob at one place."""
    ids, values = answer["logprob_token_ids"][sequence][position], answer["logprobs"][sequence][position]
    return dict(zip(ids, values, strict=True))


def assert_same_scores(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Scores are equal in structure and, token by token, in value. Returns the worst difference."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for column in ("logprobs", "actual_logprobs"):
        if column not in expected:
            continue
        tokens = column.replace("logprobs", "token_ids") if column != "logprobs" else "logprob_token_ids"
        for sequence, values in enumerate(expected[column]):
            assert len(found[column][sequence]) == len(values)
            for position in range(len(values)):
                ours = dict(zip(found[tokens][sequence][position], found[column][sequence][position], strict=True))
                theirs = dict(zip(expected[tokens][sequence][position], values[position], strict=True))
                assert len(ours) == len(theirs)
                # At the end of the list near-ties change who is in it.
                for token in ours.keys() & theirs.keys():
                    worst = max(worst, abs(ours[token] - theirs[token]))
                assert len(ours.keys() & theirs.keys()) >= len(theirs) - 2
    assert worst < TOLERANCE
    return worst
