"""Tests in the environment with TRL 1.16 and vLLM 0.31: `vllm serve`."""
