"""TRL 1.10's `GRPOTrainer` over two real `trl vllm-serve` that run the CPU stand-in."""

from __future__ import annotations

import time
from pathlib import Path

from trl_pool import PoolConfig

from ..grpo import IN_SYNC, Steps, train
from ..servers import TrlServer

Pair = tuple[TrlServer, TrlServer]
CONFIG = PoolConfig(health_interval=0.5, control_timeout=20, request_timeout=60)


def test_training_keeps_both_servers_in_sync(mortal_servers: Pair, model_dir: Path, tmp_path: Path) -> None:
    training = train(model_dir, [server.url for server in mortal_servers], tmp_path, config=CONFIG)
    print(training)
    assert len(training.differences) == 6
    assert max(training.differences) < IN_SYNC
    assert all(training.prompts.values())
    assert training.completions == [32] * 6


def test_training_survives_the_death_and_the_return_of_a_server(
    mortal_servers: Pair, model_dir: Path, tmp_path: Path
) -> None:
    """SIGKILL while step 2 is being generated, started again before step 4."""
    victim = mortal_servers[1]
    served: dict[int, int] = {}

    class Mortal(Steps):
        def before(self, step: int) -> None:
            served[step] = next(b.prompts for b in self.client.statistics().backends if b.url == victim.url)
            if step == 4:
                victim.start()
                victim.wait_ready().warm_up()
                deadline = time.monotonic() + 30
                while next(b.health for b in self.client.statistics().backends if b.url == victim.url) != "up":
                    assert time.monotonic() < deadline, "the pool has not noticed"

        def generating(self, step: int) -> None:
            if step == 2:
                victim.kill()

    urls = [server.url for server in mortal_servers]
    training = train(model_dir, urls, tmp_path, steps=Mortal(), config=CONFIG)
    print(training, f"prompts of the victim before each step: {served}")
    assert training.completions == [32] * 6
    assert max(training.differences) < IN_SYNC
    assert served[3] == served[4]
    assert served[5] > served[4]
