"""The CPU stand-in in a real `trl vllm-serve`: it takes a new model's tensors without CUDA."""

from __future__ import annotations

from pathlib import Path

from ..pushing import SEQUENCES, metadata, push_to_trl, random_model, reference_scores, worst_difference
from ..servers import TrlServer

TOLERANCE = 0.02


def test_server_takes_all_tensors_twice(mortal_servers: tuple[TrlServer, TrlServer], model_dir: Path) -> None:
    """Each time in a group of its own, on a port of its own; the scores are the new model's then."""
    server, other = mortal_servers
    before = other.scores(SEQUENCES)
    for seed in (1, 2):
        model = random_model(model_dir, seed)
        expected = reference_scores(model)
        assert worst_difference(server.scores(SEQUENCES), expected) > 10 * TOLERANCE
        seconds = push_to_trl(server, model)
        difference = worst_difference(server.scores(SEQUENCES), expected)
        print(f"{len(metadata(model))} tensors in {seconds:.2f} s, worst difference {difference:.4f}")
        assert difference < TOLERANCE
    # Nobody told this one.
    assert worst_difference(other.scores(SEQUENCES), before) < TOLERANCE
