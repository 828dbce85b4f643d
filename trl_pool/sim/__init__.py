"""A simulated vLLM server: deterministic tokens, the real server's traits, and faults on demand.

`python -m trl_pool.sim` runs one; `SimProcess` and `start_fleet` run them from a test or an example. They
need only httpx; the server itself also needs FastAPI, uvicorn, numpy and msgspec.
"""

from trl_pool.sim.process import SimFleet, SimProcess, start_fleet

__all__ = ["SimFleet", "SimProcess", "start_fleet"]
