"""Tests against real `trl vllm-serve` processes on a CPU; README.md says how to run them."""
