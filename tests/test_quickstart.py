"""The quickstart does, as a user runs it, what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(90)
def test_the_quickstart_loses_no_prompt_and_says_so() -> None:
    """In under a minute, with a server killed in mid-step that is back in use afterwards, and through the gateway."""
    started = time.monotonic()
    environ = {name: value for name, value in os.environ.items() if name != "BACKENDS"}
    run = subprocess.run(
        [sys.executable, "examples/quickstart.py"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - started < 60
    text = run.stdout
    assert "Traceback" not in run.stderr
    assert text.count("768 completions in") == 3
    assert "all 96 prompts answered, in order; same tokens as before: True" in text
    (served,) = re.findall(r"back in use: it served (\d+) prompts", text)
    assert int(served) == 32
    tables = re.findall(
        r"server +prompts +share +in flight +ejections +fail-overs +latency +state\n((?: +http.*\n)+)", text
    )
    rows = [[line.split() for line in table.splitlines()] for table in tables]
    assert [[row[-1] for row in table] for table in (rows[0], rows[2])] == [["up"] * 3] * 2
    prompts = [[int(row[1]) for row in table] for table in rows]
    assert prompts[0] == [32, 32, 32]
    assert [sum(counts) for counts in prompts] == [96, 2 * 96, 3 * 96]
    assert "is down (connection refused)" in tables[1]
    assert re.search(r"POST /generate/  200, 24 completions,\n  served by .+, .+, ", text)
    assert re.search(r"with x-session-id: 42 always by 127\.0\.0\.1:\d+", text)
    assert 'GET /health/     {"status":"ok","eligible":3,"not_eligible":{}}' in text
