#!/usr/bin/env bash
# N vLLM servers and one trainer on Slurm: the first node trains, each of the others serves.
#
#     sbatch --nodes=5 examples/slurm.sh Qwen/Qwen2.5-7B-Instruct     # 1 trainer, 4 servers
#
# Tried with stand-ins for scontrol and srun; not run on a cluster. Expects TRL, vLLM and this package in the
# environment that the job inherits, and open ports between the nodes (weight-updates.md says which).
#SBATCH --job-name=grpo
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail

model=${1:-Qwen/Qwen2.5-0.5B-Instruct}
port=8000
gpus=${SLURM_GPUS_ON_NODE:-8}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
trainer=${nodes[0]}
servers=("${nodes[@]:1}")
if [ "${#servers[@]}" = 0 ]; then
    echo "one node trains and at least one serves: --nodes=2 or more" >&2
    exit 2
fi

# One step per server, so that one that dies takes no other along, and starts again: its next weights make it useful.
for node in "${servers[@]}"; do
    # shellcheck disable=SC2016  # expanded on the node
    VLLM_SERVER_DEV_MODE=1 srun --nodes=1 --ntasks=1 --nodelist="$node" --kill-on-bad-exit=0 \
        bash -c 'until "$@"; do sleep 5; done' serve \
        vllm serve "$model" --host 0.0.0.0 --port "$port" --tensor-parallel-size "$gpus" \
        --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs --max-logprobs -1 &
done

BACKENDS=$(printf ",http://%s:$port" "${servers[@]}")
export BACKENDS=${BACKENDS:1} # trl_pool.patch_trl() takes the servers from it

# The trainer waits for the servers (vllm_server_timeout in grpo.py). A script that does not call patch_trl() is started
# with: accelerate launch … -m trl_pool.run train.py
# For TRL's async trainers, which know one URL, run `python -m trl_pool.server` beside it and give them that.
srun --nodes=1 --ntasks=1 --nodelist="$trainer" \
    accelerate launch --num_processes "$gpus" "${SLURM_SUBMIT_DIR:-.}/examples/grpo.py" --model "$model"
# When this script ends, Slurm ends the servers.
