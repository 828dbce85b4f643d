"""`python -m trl_pool.bench --backends URL,URL`: what a fleet does under a chosen workload, and whether each of its
servers pays.

| module | |
|---|---|
| `command_line` | options, and what they mean |
| `workload` | what is asked: prompts, lengths, turns |
| `measure` | asks it of pools over the first 1, 2, … servers, in turns, and takes the time |
| `metrics` | what `vllm serve` tells about its prefix cache |
| `figures` | from measurements to rates, shares, percentiles and speed-ups; no I/O |
| `tables` | figures for the eye and as JSON |
"""
