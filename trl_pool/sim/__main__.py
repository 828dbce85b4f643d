"""`python -m trl_pool.sim`: a simulated vLLM server for tests, examples and load tests."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from importlib.util import find_spec

from trl_pool.extras import needs_server_extra
from trl_pool.sim.config import DIALECTS, UNFINISHED_UPDATES, WEIGHT_TRANSFERS, SimConfig
from trl_pool.sim.engine import TOKEN_LIMIT, Latency

with needs_server_extra("A simulated server"):
    from trl_pool.sim.serve import ServeOptions, serve


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_pool.sim",
        description="A simulated vLLM server. Prints a line of JSON (url, control_url, pid) once it listens.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dialect", choices=DIALECTS, default="trl", help="wire protocol")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port of the dialect's routes; 0 for any free one")
    add("--control-port", type=int, default=0, help="port of the /sim/ routes; 0 for any free one")
    add("--weights", default="checkpoint", help="name of the weights to start with: same name, same tokens")
    add("--model-version", default=None, help="trl: model_version told by /health/; real ones tell none")
    add(
        "--max-model-len",
        type=int,
        default=4096,
        help="a prompt of this many tokens is poison to trl, refused by vllm",
    )
    add("--vocab-size", type=int, default=TOKEN_LIMIT, help="the same for a token id of this or more")
    add("--max-logprobs", type=int, default=-1, help="more per token kill a trl worker, vllm refuses; -1: any number")
    add("--tensor-parallel-size", type=int, default=1, help="factor of the world size")
    add("--data-parallel-size", type=int, default=1, help="factor of the world size")
    add("--latency-ms", type=float, default=0.0, help="time per request")
    add("--prefill-ms-per-token", type=float, default=0.0, help="time per prompt token")
    add("--decode-ms-per-token", type=float, default=0.0, help="time per step of the longest completion")
    add("--model", default="sim-model", help="vllm: the model's id")
    add("--vllm-version", default="0.31.0", help="vllm: told by /version; decides which endpoints there are")
    add("--dtype", default="bfloat16", help="vllm: told by /server_info")
    add("--logprobs-mode", default="processed_logprobs", help="vllm: told by /server_info")
    add("--api-key", default=None, help="vllm: guards /v1, /v2 and /inference")
    add("--weight-transfer", choices=WEIGHT_TRANSFERS, default="control", help="vllm: gloo needs torch")
    add("--unfinished-update", choices=UNFINISHED_UPDATES, default="mixed", help="vllm: what generating meets then")
    add("--max-num-seqs", type=int, default=256, help="vllm: sequences that run at once; more wait")
    add("--trust-request-chat-template", action="store_true", help="vllm: requests may bring chat templates")
    add("--timeout-keep-alive", type=float, default=5.0, help="seconds until idle connections are closed")
    add("--start-delay", type=float, default=0.0, help="seconds until it listens")
    add("--watch-stdin", action="store_true", help="end when standard input ends")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a simulated server until it is told to stop."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.weight_transfer == "gloo" and find_spec("torch") is None:
        parser.error("--weight-transfer gloo needs torch")
    try:
        config = SimConfig(
            dialect=args.dialect,
            weights=args.weights,
            max_model_len=args.max_model_len,
            vocab_size=args.vocab_size,
            max_logprobs=args.max_logprobs,
            tensor_parallel_size=args.tensor_parallel_size,
            data_parallel_size=args.data_parallel_size,
            model_version=args.model_version,
            latency=Latency(args.latency_ms, args.prefill_ms_per_token, args.decode_ms_per_token),
            model=args.model,
            vllm_version=args.vllm_version,
            dtype=args.dtype,
            logprobs_mode=args.logprobs_mode,
            api_key=args.api_key,
            weight_transfer=args.weight_transfer,
            unfinished_update=args.unfinished_update,
            trust_request_chat_template=args.trust_request_chat_template,
            max_num_seqs=args.max_num_seqs,
        )
    except ValueError as error:
        parser.error(str(error))
    options = ServeOptions(
        host=args.host,
        port=args.port,
        control_port=args.control_port,
        keep_alive_seconds=args.timeout_keep_alive,
        start_delay_seconds=args.start_delay,
        watch_stdin=args.watch_stdin,
    )
    try:
        asyncio.run(serve(config, options, announce=lambda line: print(line, flush=True)))
    except OSError as error:  # a port that is taken, say
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
