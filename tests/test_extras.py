"""Without the extras: whoever needs one says so."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["trl_pool.server", "trl_pool.sim"])
def test_what_needs_the_server_extra_says_how_to_install_it(module: str) -> None:
    hidden = "import sys, runpy; sys.modules['fastapi'] = sys.modules['uvicorn'] = None; "
    code = f"{hidden}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    run = subprocess.run([sys.executable, "-c", code, "--port", "0"], capture_output=True, text=True, timeout=30)
    assert run.returncode != 0
    assert 'pip install "trl-pool[server]"' in run.stderr


def test_a_benchmark_says_how_to_install_what_it_needs() -> None:
    code = "import sys, runpy; sys.modules['tabulate'] = None; runpy.run_module('trl_pool.bench', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.returncode != 0
    assert 'pip install "trl-pool[bench]"' in run.stderr


def test_the_pool_itself_does_without() -> None:
    code = "import sys; sys.modules['fastapi'] = sys.modules['uvicorn'] = sys.modules['torch'] = None; import trl_pool"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
