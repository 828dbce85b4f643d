"""Tests in the environment with TRL 1.10 and vLLM 0.27.1: `trl vllm-serve`."""
