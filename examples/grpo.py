"""GRPO with the rollouts spread over many vLLM servers: TRL's own trainer, and one line before it.

On GPUs, with the same model behind `vllm serve` on every server (how to start them: weight-updates.md, slurm.sh):

    pip install "trl[vllm,math-verify]"
    python examples/grpo.py --servers http://n1:8000,http://n2:8000
    accelerate launch --num_processes 8 examples/grpo.py --servers http://n1:8000,http://n2:8000

With no GPU and no download: `examples/serve_cpu.sh` starts two servers and prints the line to train with.
"""

from __future__ import annotations

import argparse
import logging

import trl_pool

STALENESS = "sampling/sampling_logp_difference/mean"
"""TRL's own measure at each step: how far the servers' logprobs are from those of the weights that are trained. With
every server in sync it is rounding, around 0.001 with `--tiny`; stale weights read two hundred times as much."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="name or path; what the servers serve")
    parser.add_argument(
        "--servers",
        metavar="URL,URL",
        default="http://n1:8000,http://n2:8000",
        help="comma-separated; the environment variable BACKENDS wins over it (default: %(default)s)",
    )
    parser.add_argument("--max-steps", type=int, help="default: one epoch; 5 with --tiny")
    parser.add_argument("--output-dir", default="grpo-output", help="for checkpoints (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="for the servers of serve_cpu.sh: CPU, no downloads")
    arguments = parser.parse_args()

    # The pool says in its log which servers it uses, and which it has lost and why.
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("trl_pool").setLevel(logging.INFO)

    # The one line. On every rank, and before a trainer is made: the trainer then makes a VLLMClientPool where it would
    # have made its VLLMClient, and repeats a weight sync that lost a server, on all ranks together.
    trl_pool.patch_trl()

    # Below the parser: `--help` needs none of this.
    from trl import GRPOConfig, GRPOTrainer

    settings, rewards, dataset = tiny() if arguments.tiny else math()
    if arguments.max_steps is not None:
        settings["max_steps"] = arguments.max_steps
    trainer = GRPOTrainer(
        model=arguments.model,
        reward_funcs=rewards,
        train_dataset=dataset,
        args=GRPOConfig(
            output_dir=arguments.output_dir,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=arguments.servers,
            bf16=True,
            logging_steps=1,  # the staleness figure, for every step
            **settings,
        ),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:  # the other ranks have no client
        report(trainer)


def math():
    """Settings, reward and dataset as in TRL's documentation."""
    from datasets import load_dataset
    from trl.rewards import accuracy_reward

    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_generations": 8,
        "max_completion_length": 1024,
        "gradient_checkpointing": True,
        # The servers load the model while the trainer does; this many seconds it waits for them.
        "vllm_server_timeout": 1200,
    }
    return settings, accuracy_reward, load_dataset("trl-lib/DeepMath-103K", split="train")


def tiny():
    """The same in a minute on a CPU: a model of random weights learns to use many different characters."""
    from datasets import Dataset

    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": 32,
        "num_generations": 4,
        "max_completion_length": 16,
        "max_steps": 5,
        # Moves the weights so far at each step that a server which missed an update shows at once.
        "learning_rate": 1e-2,
        "vllm_server_timeout": 60,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }

    def different_characters(completions, **kwargs):
        return [float(len(set(text))) for text in completions]

    prompts = [f"Question {i}: what is {i} + {i * 7 % 13}?" for i in range(64)]
    return settings, different_characters, Dataset.from_dict({"prompt": prompts})


def report(trainer) -> None:
    """Who served how much, and how stale it was."""
    client = getattr(trainer, "vllm_generation", trainer).vllm_client  # older TRLs have it in the trainer itself
    statistics = client.statistics()
    print(f"\nweights {statistics.weight_version}")
    for backend in statistics.backends:
        print(f"  {backend.url}  {backend.prompts} prompts, {backend.reason or backend.health}")
    print(STALENESS)
    for entry in trainer.state.log_history:
        if STALENESS in entry:
            print(f"  step {entry['step']}: {entry[STALENESS]:.5f}")
    client.close()


if __name__ == "__main__":
    main()
