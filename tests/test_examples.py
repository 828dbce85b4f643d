"""The examples parse and start, and the guide names only what there is."""

from __future__ import annotations

import ast
import os
import py_compile
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_pool
from trl_pool import AsyncVLLMClientPool, PoolConfig, VLLMClientPool
from trl_pool.server import GatewaySettings, create_app

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
GUIDE = (EXAMPLES / "weight-updates.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL))
"""What the guide sets as code, commands aside."""


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_python_example_compiles(script: Path, tmp_path: Path) -> None:
    py_compile.compile(str(script), cfile=str(tmp_path / "compiled.pyc"), doraise=True)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_a_shell_example_parses_and_may_be_run(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=20)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert os.access(script, os.X_OK)


def test_the_training_explains_itself_without_trl_and_torch() -> None:
    hidden = "import runpy, sys; sys.modules.update(trl=None, torch=None, datasets=None, transformers=None)"
    script = str(EXAMPLES / "grpo.py")
    run = f"{hidden}; sys.argv = ['grpo.py', '--help']; runpy.run_path({script!r}, run_name='__main__')"
    shown = subprocess.run(
        [sys.executable, "-c", run],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert shown.returncode == 0, shown.stderr
    for option in ("--model", "--servers", "--max-steps", "--output-dir", "--tiny"):
        assert option in shown.stdout


def test_the_servers_have_a_model_maker() -> None:
    """The one of the tests with real engines, by its path."""
    (path,) = re.findall(r'"\$examples/(\S+\.py)"', (EXAMPLES / "serve_cpu.sh").read_text())
    assert (EXAMPLES / path).is_file()


def test_slurm_nodes_become_a_trainer_and_backends(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: the first node trains, each of the others gets a server of its own."""
    for name, line in {
        "scontrol": 'test "$*" = "show hostnames n[1-3]" && printf "n1\\nn2\\nn3\\n"',
        "srun": 'echo "$*" >>"$RECORD.$BASHPID"; echo "BACKENDS=${BACKENDS-}" >>"$RECORD.$BASHPID"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "BACKENDS"}
    environ |= {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "RECORD": str(tmp_path / "ran"),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    # Its output is piped to the servers' steps as well: `run` returns when all have ended.
    finished = subprocess.run(
        ["bash", str(EXAMPLES / "slurm.sh"), "some/model"], env=environ, capture_output=True, text=True, timeout=30
    )
    assert finished.returncode == 0, finished.stderr
    steps = {}
    for record in tmp_path.glob("ran.*"):
        command, backends = record.read_text().splitlines()
        steps[re.findall(r"--nodelist=(\S+)", command)[0]] = command, backends
    assert sorted(steps) == ["n1", "n2", "n3"]
    assert "accelerate launch --num_processes 4" in steps["n1"][0]
    assert steps["n1"][1] == "BACKENDS=http://n2:8000,http://n3:8000"
    for node in ("n2", "n3"):
        assert "vllm serve some/model --host 0.0.0.0 --port 8000" in steps[node][0]


def test_kubernetes_names_as_many_backends_as_it_starts() -> None:
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    (replicas,) = re.findall(r"replicas: (\d+)", text)
    (backends,) = re.findall(r"value: (http\S+)", text)
    assert backends.split(",") == [f"http://vllm-{index}.vllm:8000" for index in range(int(replicas))]


def test_the_guide_tells_the_settings_and_their_defaults() -> None:
    table = GUIDE.partition("## Settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.MULTILINE)
    assert len(rows) >= 10
    for name, default in rows:
        value = PoolConfig.model_fields[name].default
        assert default.strip("`") == (
            "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        )


def test_the_guide_names_settings_that_there_are() -> None:
    named = {name for code in CODE for name in re.findall(r"\b([a-z]\w*)=", code)}
    others = {"config", "mode"}  # of patch_trl() and of /pause
    assert len(named) > 4
    assert named - others <= set(PoolConfig.model_fields)


def test_the_guide_names_methods_that_there_are() -> None:
    called = {name for code in CODE for name in re.findall(r"\b([A-Za-z]\w*)\(", code)}
    assert len(called) > 8
    for name in called - {"print"}:
        assert name in trl_pool.__all__ or all(
            callable(getattr(pool, name, None)) for pool in (VLLMClientPool, AsyncVLLMClientPool)
        ), name
    for code in CODE:
        for attribute in re.findall(r"\bpool\.(\w+)", code):
            assert hasattr(VLLMClientPool, attribute), attribute


def test_the_guide_names_endpoints_that_the_gateway_has() -> None:
    app = create_app(GatewaySettings(backends="http://n1:8000"))
    paths = {re.sub(r"\{[^}]+\}", "NAME", getattr(route, "path", "")).rstrip("/") for route in app.routes}
    named = {path for code in CODE for path in re.findall(r"^(?:[A-Z]+ )?(/[\w/]+)", code)}
    assert len(named) > 8
    assert {path.rstrip("/") for path in named} <= paths


def literals() -> set[str]:
    """The constant pieces of every string in the package."""
    found = set()
    for module in (ROOT / "trl_pool").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # Of a log message's, too: what its arguments stand between.
                found.update(piece.strip(" :;,(){}'\"") for piece in re.split(r"%[sdgr]", node.value))
    return {text for text in found if len(text) >= 8}


def test_the_guide_quotes_messages_that_the_code_gives() -> None:
    """Most of each quoted message consists of pieces that stand in the code."""
    tables = [GUIDE.partition(head)[2].partition("\n\n## ")[0] for head in ("| you see |", "| answer 502 with |")]
    cells = [line.split(" | ")[0] for table in tables for line in table.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 25
    pieces = literals()
    for message in messages:
        known = {piece for piece in pieces if piece in message}
        covered = {
            index for piece in known for start in [message.find(piece)] for index in range(start, start + len(piece))
        }
        assert len(covered) > 0.4 * len(message), (message, known)
