"""Tests against real vLLM servers on a CPU, of both generations; README.md says how to run them."""
