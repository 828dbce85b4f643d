"""TRL 1.16's `GRPOTrainer` over two real `vllm serve`: what the pool is for.

The trainer measures staleness by itself: at each step it logs how far the servers' logprobs are from those of its own
weights. At this learning rate one stale server shows at once, which the control run proves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from trl_pool import PoolConfig
from trl_pool.weights.gloo import open_group
from trl_pool.weights.packing import Packer
from trl_pool.weights.rendezvous import listen

from ..gateway import running_gateway
from ..grpo import IN_SYNC, STALE, Steps, train
from ..pushing import SEQUENCES, metadata, random_model, reference_scores, weight_version, worst_difference
from ..servers import HOST, VllmServer

Pair = tuple[VllmServer, VllmServer]
TOLERANCE = 0.02
CONFIG = PoolConfig(health_interval=0.5, control_timeout=15, weight_buffer_mb=1)


def urls(servers: Pair) -> list[str]:
    return [server.url for server in servers]


def until_up(steps: Steps, url: str) -> None:
    """The pool has noticed that a server is there again."""
    deadline = time.monotonic() + 30
    while next(b.health for b in steps.client.statistics().backends if b.url == url) != "up":
        assert time.monotonic() < deadline, f"{url} was not noticed"


def test_training_keeps_both_servers_in_sync(mortal_vllm_servers: Pair, model_dir: Path, tmp_path: Path) -> None:
    training = train(model_dir, urls(mortal_vllm_servers), tmp_path)
    print(training)
    assert len(training.differences) == 6
    assert max(training.differences) < IN_SYNC
    assert all(training.prompts.values())
    assert training.completions == [32] * 6


def test_the_figure_shows_a_server_whose_updates_are_suppressed(
    mortal_vllm_servers: Pair, model_dir: Path, tmp_path: Path
) -> None:
    """The control run: one of two servers keeps its first weights, and the pool is made to believe that it has not."""
    stale = mortal_vllm_servers[1].url

    class Believed(Steps):
        def before(self, step: int) -> None:
            backends = self.client._pool._dispatcher.backends
            backend = next(b for b in backends.values() if b.url == stale)
            backend.draining = True  # left out of the update that this step sends …

        def generating(self, step: int) -> None:
            pass

    steps = Believed()

    def prepare(trainer: Any) -> None:
        generate = trainer.vllm_generation.vllm_client.generate

        def generate_with_stale(*args: Any, **kwargs: Any) -> Any:
            pool = steps.client._pool
            backend = next(b for b in pool._dispatcher.backends.values() if b.url == stale)
            backend.draining = False  # … and taken for one that had it
            backend.sync.reached(pool.weights.number)
            return generate(*args, **kwargs)

        trainer.vllm_generation.vllm_client.generate = generate_with_stale

    training = train(model_dir, urls(mortal_vllm_servers), tmp_path, steps=steps, prepare=prepare, max_steps=4)
    print(training)
    assert training.prompts[stale]
    assert max(training.differences[1:]) > STALE


def test_training_survives_the_death_and_the_return_of_a_server(
    mortal_vllm_servers: Pair, model_dir: Path, tmp_path: Path
) -> None:
    """SIGKILL while step 2 is being generated, started again before step 4: no prompt is lost, nobody is stale at any
    step, and the returned server serves again after an update."""
    victim = mortal_vllm_servers[1]
    served: dict[int, int] = {}

    class Mortal(Steps):
        def before(self, step: int) -> None:
            served[step] = next(b.prompts for b in self.client.statistics().backends if b.url == victim.url)
            if step == 4:
                victim.start()
                victim.wait_ready().warm_up()
                until_up(self, victim.url)

        def generating(self, step: int) -> None:
            if step == 2:
                victim.kill()

    training = train(model_dir, urls(mortal_vllm_servers), tmp_path, steps=Mortal(), config=CONFIG)
    print(training, f"prompts of the victim before each step: {served}")
    assert training.completions == [32] * 6
    assert max(training.differences) < IN_SYNC
    assert served[3] == served[4]
    assert served[5] > served[4]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole model", "LoRA adapter"])
def test_training_survives_a_death_in_the_middle_of_a_weight_sync(
    mortal_vllm_servers: Pair, model_dir: Path, tmp_path: Path, adapter: bool
) -> None:
    """Killed from inside the trainer's own parameter iterator, after some tensors: the sync is repeated over the
    survivor within its deadline, adapters are not left merged, and the run goes on."""
    from peft import LoraConfig

    victim = mortal_vllm_servers[1]
    seconds: list[float] = []

    def prepare(trainer: Any) -> None:
        generation = trainer.vllm_generation
        walk, syncs = generation._iter_named_params, [0]

        def killing() -> Iterator[Any]:
            syncs[0] += 1
            for position, item in enumerate(walk()):
                if syncs[0] == 4 and position == 5:  # the first walk only collects names; the others are steps 1, 2, 3
                    victim.kill()
                yield item

        generation._iter_named_params = killing
        sync = generation.sync_weights

        def timed() -> None:
            started = time.monotonic()
            sync()
            seconds.append(time.monotonic() - started)
            if adapter:
                assert not any(getattr(module, "merged", False) is True for module in trainer.model.modules())

        generation.sync_weights = timed

    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapter else None
    training = train(
        model_dir,
        urls(mortal_vllm_servers),
        tmp_path,
        max_steps=4,
        config=CONFIG,
        peft_config=peft_config,
        prepare=prepare,
    )
    print(training, f"syncs {[round(s, 1) for s in seconds]} s")
    assert not victim.running
    assert len(training.differences) == 4
    assert max(training.differences) < IN_SYNC
    assert max(seconds) < 60


def test_with_two_processes_only_the_main_one_talks_to_the_servers(
    mortal_vllm_servers: Pair, model_dir: Path, tmp_path: Path
) -> None:
    """`accelerate launch -m trl_pool.run SCRIPT`, the script knowing nothing of the pool."""
    script = tmp_path / "plain_grpo.py"
    script.write_text(PLAIN_SCRIPT)
    environment = {
        **os.environ,
        "BACKENDS": ",".join(urls(mortal_vllm_servers)),
        "CONTROL_TIMEOUT": "30",
        "TOKENIZERS_PARALLELISM": "false",
        # What starts two processes on one machine's CPU; `--cpu` with `--num_processes 2` starts one.
        "ACCELERATE_USE_CPU": "true",
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "-m", "trl_pool.run", str(script), str(model_dir), str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    print([rank["differences"] for rank in ranks], [(rank["client"], rank["threads"]) for rank in ranks])
    assert len(ranks[0]["differences"]) == 3
    assert max(ranks[0]["differences"]) < IN_SYNC
    assert ranks[0]["client"] == "VLLMClientPool"
    assert "trl-pool" in ranks[0]["threads"]
    assert ranks[1]["client"] is None
    assert not [name for name in ranks[1]["threads"] if name.startswith("trl-pool")]


PLAIN_SCRIPT = """
import json, sys, threading
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model, output = sys.argv[1:]
trainer = GRPOTrainer(
    model=model,
    reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
    args=GRPOConfig(
        output_dir=output, use_vllm=True, vllm_mode="server", use_cpu=True, bf16=True, learning_rate=1e-2,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=16, max_steps=3, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, vllm_server_timeout=60,
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"hello {i} world" for i in range(64)]}),
)
trainer.train()
client = getattr(trainer.vllm_generation, "vllm_client", None)
figure = "sampling/sampling_logp_difference/mean"
Path(output, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps({
    "client": None if client is None else type(client).__name__,
    "threads": [thread.name for thread in threading.enumerate()],
    "differences": [entry[figure] for entry in trainer.state.log_history if figure in entry],
}))
"""


def test_a_stock_trainer_feeds_two_servers_through_the_gateway_in_one_group(
    mortal_vllm_servers: Pair, model_dir: Path
) -> None:
    """World size from `/get_world_size`, `rank_offset` 1, one broadcast: the protocol of TRL's own client, with gloo
    in the place of NCCL."""
    model = random_model(model_dir, 81)
    with running_gateway(urls(mortal_vllm_servers), "--control-timeout", "30") as gateway:
        calls: dict[str, requests.Response] = {}

        def post(path: str, body: dict[str, Any]) -> None:
            calls[path] = requests.post(gateway + path, json=body, timeout=60)

        def beside(path: str, body: dict[str, Any]) -> threading.Thread:
            thread = threading.Thread(target=post, args=(path, body))
            thread.start()
            return thread

        started = time.monotonic()
        world_size = requests.get(f"{gateway}/get_world_size", timeout=30).json()["world_size"] + 1
        listener = listen(HOST)
        port = int(listener.getsockname()[1])
        init_info = {"master_address": HOST, "master_port": port, "rank_offset": 1, "world_size": world_size}
        joining = beside("/init_weight_transfer_engine", {"init_info": init_info})
        group = open_group(HOST, port, 0, world_size, master=True, timeout=30, listener=listener)
        joining.join()
        assert world_size == group.world_size == 3

        post("/start_weight_update", {})
        names, dtypes, shapes = (list(field) for field in zip(*metadata(model), strict=True))
        update_info = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        receiving = beside("/update_weights", {"update_info": update_info})
        packer = Packer(metadata(model), device="cpu")
        buffers = [packer.add(name, parameter.data) for name, parameter in model.named_parameters()]
        for buffer in (*buffers, packer.flush()):
            if buffer is not None:
                group.broadcast(buffer, src=0)
        receiving.join()
        post("/finish_weight_update", {})
        post("/reset_prefix_cache", {})
        seconds = time.monotonic() - started
        group.close()
        assert {path: answer.status_code for path, answer in calls.items()} == dict.fromkeys(calls, 200), calls
        version = requests.get(f"{gateway}/weight_info", timeout=30).json()["weight_version"]
    assert [weight_version(server) for server in mortal_vllm_servers] == [version] * 2
    expected = reference_scores(model)
    found = [worst_difference(server.scores(SEQUENCES), expected) for server in mortal_vllm_servers]
    print(f"group of {world_size}, {len(names)} tensors, {seconds:.2f} s in all, worst differences {found}")
    assert max(found) < TOLERANCE
