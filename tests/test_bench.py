"""`python -m trl_pool.bench` on simulated servers."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import eventually
from test_server_process import Gateway, gateways
from vllm_sims import Apps

from trl_pool import ConfigurationError, PoolConfig, RolloutError
from trl_pool.bench.__main__ import main
from trl_pool.bench.figures import figures
from trl_pool.bench.measure import Bench, Plan
from trl_pool.bench.workload import Workload
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]

gateway = pytest.fixture(gateways)

SMALL = ("--prompts", "9", "--n", "2", "--max-tokens", "4", "--prompt-tokens", "40", "--seed", "1", "--quiet")


@pytest.fixture(params=["trl", "vllm"])
def sims(request: pytest.FixtureRequest, fleet: Fleet, vllm_fleet: Fleet) -> list[SimProcess]:
    """Three servers of either dialect."""
    return (fleet if request.param == "trl" else vllm_fleet)(3)


def of(sims: Sequence[SimProcess], *options: str) -> list[str]:
    """A command line; the trl dialect does not tell how long a prompt may be."""
    return ["--backends", ",".join(sim.url for sim in sims), "--max-model-len", "4096", *SMALL, *options]


def served(sim: SimProcess) -> list[tuple[int, int]]:
    """Prompts and n of every request that generated, as the server saw it."""
    return [(r["prompts"], r["n"]) for r in sim.state()["requests"] if r["n"] is not None]


def rows(printed: str, table: int) -> list[list[str]]:
    """Cells of a printed table, its head first."""
    blocks = [block.splitlines() for block in printed.split("\n\n") if block.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[table] if "---" not in line]


def test_figures_are_what_the_servers_saw(
    sims: list[SimProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert main(of(sims, "--steps", "2", "--warm-up", "0", "--json", str(path))) == 0
    (found,) = json.loads(path.read_text())["fleets"]
    # One request has n=1: the text from which token ids are learnt.
    assert sorted(n for sim in sims for _, n in served(sim))[0] == 1
    seen = [sum(prompts for prompts, n in served(sim) if n == 2) for sim in sims]
    assert [server["prompts"] for server in found["per_server"]] == seen == [6, 6, 6]
    assert [server["requests"] for server in found["per_server"]] == [
        len([n for _, n in served(sim) if n == 2]) for sim in sims
    ]
    assert [server["tokens"] for server in found["per_server"]] == [6 * 2 * 4] * 3
    assert sum(server["share"] for server in found["per_server"]) == pytest.approx(1)
    assert (found["steps"], found["calls"], found["speed_up"]) == (2, 2, None)
    assert found["tokens_per_second"] == pytest.approx(8 * found["prompts_per_second"])
    printed = rows(capsys.readouterr().out, 1)
    assert [row[:3] for row in printed[1:]] == [[sim.url, "6", "33 %"] for sim in sims]


def test_a_comparison_measures_the_first_so_many_servers_and_prints_what_json_has(
    sims: list[SimProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert main(of(sims, "--steps", "1", "--servers", "3,1", "--json", str(path))) == 0
    value = json.loads(path.read_text())
    assert [fleet["servers"] for fleet in value["fleets"]] == [1, 3]
    assert [[s["url"] for s in fleet["per_server"]] for fleet in value["fleets"]] == [
        [sims[0].url],
        [sim.url for sim in sims],
    ]
    # Warm-up and step: nine prompts each on one server, then three on each of three.
    assert [sum(prompts for prompts, n in served(sim) if n == 2) for sim in sims] == [2 * 9 + 2 * 3, 2 * 3, 2 * 3]
    printed = capsys.readouterr().out
    head, *body = rows(printed, 0)
    for cells, fleet in zip(body, value["fleets"], strict=True):
        row = dict(zip(head, cells, strict=True))
        assert row["servers"] == str(fleet["servers"])
        assert row["speed-up"] == f"{fleet['speed_up']:.2f}"
        assert row["efficiency"] == f"{100 * fleet['efficiency']:.0f} %"
    assert value["notes"][0] in printed
    assert value["plan"]["workload"]["seed"] == 1
    assert value["about"]["complete"] is True


def test_compare_means_every_number_of_servers() -> None:
    plan = Plan(Workload(), compare=True)
    assert plan.resolved(4) == (1, 2, 3, 4)
    assert Plan(Workload()).resolved(4) == (4,)
    with pytest.raises(ConfigurationError, match="--servers 5: there are 4; allowed: 1-4"):
        Plan(Workload(), counts=(1, 5)).resolved(4)


class SlowApps(Apps):
    """Simulated servers that take a time of their own for each prompt, on a clock that knows nothing else."""

    def __init__(self, **seconds_per_prompt: float) -> None:
        super().__init__(**{host: {} for host in seconds_per_prompt})
        self._seconds = seconds_per_prompt
        self._busy = dict.fromkeys(seconds_per_prompt, 0.0)

    def clock(self) -> float:
        return max(self._busy.values())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/completions":
            body = json.loads(request.content)
            if body["max_tokens"] > 1:  # not the text from which token ids are learnt
                self._busy[request.url.host] += len(body["prompt"]) * self._seconds[request.url.host]
        return await super().handle_async_request(request)


def measured(plan: Plan, transport: httpx.AsyncBaseTransport, urls: list[str], **options: Any) -> Bench:
    """A benchmark that has run in this process."""
    bench = Bench(urls, plan, transport=transport, **options)
    asyncio.run(bench.run())
    return bench


def test_speed_up_and_efficiency_follow_the_clock() -> None:
    """Two alike, and a third that takes three times as long and gets as much: it takes away more than it gives."""
    steps = []
    for count in (1, 2, 3):
        apps = SlowApps(a=1.0, b=1.0, c=3.0)
        plan = Plan(Workload(prompts=12, n=1, max_tokens=2), steps=2, warm_up=0, counts=(count,))
        bench = measured(plan, apps, apps.urls, clock=apps.clock)
        steps += bench.steps
    found = figures(steps)
    assert [fleet.step_seconds for fleet in found] == [12, 6, 12]
    assert [fleet.tokens_per_second for fleet in found] == [2, 4, 2]
    assert [fleet.speed_up for fleet in found] == [1, 2, 1]
    assert [fleet.efficiency for fleet in found] == pytest.approx([1, 1, 1 / 3])
    assert [fleet.adds for fleet in found] == [None, 1, -1]


def test_independent_calls_are_timed_one_by_one_and_counted_for_the_server_that_served_them(
    sims: list[SimProcess], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    options = ("--concurrency", "4", "--length-sigma", "0.5", "--steps", "1", "--warm-up", "0", "--json", str(path))
    assert main(of(sims, *options)) == 0
    (found,) = json.loads(path.read_text())["fleets"]
    assert found["calls"] == 9
    assert 0 < found["call_p50"] <= found["call_p99"] <= found["step_seconds"]
    seen = [[prompts for prompts, n in served(sim) if n == 2] for sim in sims]
    assert [server["prompts"] for server in found["per_server"]] == [len(requests) for requests in seen]
    assert {prompts for requests in seen for prompts in requests} == {1}
    for server in found["per_server"]:
        assert (server["call_p50"] is None) == (server["prompts"] == 0)


def test_a_conversations_next_prompt_is_the_last_one_and_its_answer() -> None:
    apps = Apps(a={}, b={})
    work = Workload(prompts=3, n=2, max_tokens=4, prompt_tokens=20, turns=3, turn_tokens=5)
    bench = measured(Plan(work, steps=1, warm_up=0), apps, apps.urls)
    bodies = [json.loads(request.content) for request in apps.asked("/v1/completions")]
    prompts = [prompt for body in bodies if body["n"] == 2 for prompt in body["prompt"]]
    turns = [[prompt for prompt in prompts if len(prompt) == length] for length in (20, 29, 38)]
    assert [len(turn) for turn in turns] == [3, 3, 3]
    for before, after in itertools.pairwise(turns):
        assert {tuple(prompt) for prompt in before} == {tuple(prompt[: len(before[0])]) for prompt in after}
    assert len(bench.steps[0].call_seconds) == 3
    assert {body.get("ignore_eos") for body in bodies if body["n"] == 2} == {True}


def test_cache_hits_are_told_where_a_server_tells_them(tmp_path: Path, vllm_fleet: Fleet) -> None:
    path = tmp_path / "figures.json"
    line = of(vllm_fleet(2), "--shared-prefix", "160", "--n", "1", "--steps", "2", "--json", str(path))
    assert main(line) == 0
    (found,) = json.loads(path.read_text())["fleets"]
    assert found["cache_hits"] == pytest.approx(160 / 200)  # the warm-up has brought it there
    assert main([*line, "--reset-caches"]) == 0
    (emptied,) = json.loads(path.read_text())["fleets"]
    # Of each server's four or five prompts the first finds nothing.
    assert emptied["cache_hits"] == pytest.approx(7 / 9 * 160 / 200)


def test_prompts_of_a_dataset_are_sent_as_they_are(tmp_path: Path) -> None:
    apps = Apps(a={}, b={})
    talk = [[{"role": "user", "content": f"Hello {index}"}] for index in range(4)]
    work = Workload(prompts=4, n=1, max_tokens=3, until_eos=True, turns=2, turn_tokens=2)
    bench = measured(Plan(work, steps=1, warm_up=0, dataset=talk), apps, apps.urls)
    bodies = [json.loads(request.content) for request in apps.asked("/v1/chat/completions")]
    assert sorted(body["messages"][0]["content"] for body in bodies) == [f"Hello {index}" for index in range(4)]
    assert not any(body.get("ignore_eos") for body in bodies)
    assert sum(part.prompts for part in bench.steps[0].parts.values()) == 8


def test_prompts_of_a_dataset_that_came_again_are_mentioned(
    vllm_fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {index}"}) + "\n" for index in range(18)))
    line = of(vllm_fleet(2), "--dataset", str(path), "--steps", "1")
    assert main(line) == 0
    assert "came again" not in capsys.readouterr().out
    assert main([*line, "--compare"]) == 0
    printed = capsys.readouterr().out
    assert "36 prompts were sent: some came again" in printed
    assert "Each of the 2:" in printed
    assert main([*line, "--compare", "--reset-caches"]) == 0
    assert "came again" not in capsys.readouterr().out


def test_no_prompt_is_sent_that_a_server_may_hang_on(
    fleet: Fleet, vllm_fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    (trl,), (vllm,) = fleet(1), vllm_fleet(1)
    assert main(["--backends", trl.url, *SMALL]) == 2
    assert "--max-model-len" in capsys.readouterr().err
    assert main(["--backends", vllm.url, *SMALL, "--prompt-tokens", "5000"]) == 2
    assert "has 5004 tokens and the servers take 4096: lower --prompt-tokens" in capsys.readouterr().err
    assert served(trl) == served(vllm) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "no servers: give --backends URL,URL or set BACKENDS"),
        (("--backends", "http://a,http://a"), "--backends 'http://a,http://a': backend http://a:80 is listed twice"),
        (("--backends", "http://a", "--steps", "0"), "--steps 0: must be at least 1"),
        (("--backends", "http://a", "--warm-up", "-1"), "--warm-up -1: must be at least 0"),
        (("--backends", "http://a", "--wait", "-1"), "--wait -1: must not be negative"),
        (("--backends", "http://a", "--max-model-len", "1"), "MAX_MODEL_LEN='1': Input should be greater"),
        (("--backends", "http://a", "--json", "/no/such/folder/x"), "there is no folder /no/such/folder"),
        (("--backends", "http://a", "--dataset", "/no/such/file"), "--dataset /no/such/file"),
    ],
)
def test_wrong_settings_end_it_with_2(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BACKENDS", raising=False)
    assert main(options) == 2
    printed = capsys.readouterr()
    assert said.replace("'1'", "1") in printed.err.replace("'1'", "1")
    assert printed.out == ""


def test_more_servers_than_there_are_is_a_wrong_setting(vllm_fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(of(vllm_fleet(2), "--servers", "1,3")) == 2
    assert "--servers 3: there are 2; allowed: 1-2" in capsys.readouterr().err


def test_servers_that_are_not_there_end_it_with_1(vllm_fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    (sim,) = vllm_fleet(1)
    line = ["--backends", f"{sim.url},http://127.0.0.1:1", "--wait", "0", *SMALL]
    assert main(line) == 1
    printed = capsys.readouterr()
    assert "http://127.0.0.1:1" in printed.err
    assert "--wait longer" in printed.err
    assert printed.out == ""


def test_servers_come_from_the_environment_too(
    vllm_fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sims = vllm_fleet(2)
    monkeypatch.setenv("BACKENDS", ",".join(sim.url for sim in sims))
    assert main([*SMALL, "--steps", "1"]) == 0
    assert [row[0] for row in rows(capsys.readouterr().out, 1)[1:]] == [sim.url for sim in sims]


def test_what_was_measured_before_a_failure_is_kept() -> None:
    apps = Apps(a={}, b={})
    plan = Plan(Workload(prompts=4, n=1, max_tokens=2), steps=2, warm_up=0, counts=(1, 2))

    class Breaking:
        """A bar during whose last step both servers start to fail."""

        calls = 0

        def update(self, n: float | None = 1) -> None:
            self.calls += 1
            if self.calls == 3:
                for host in "ab":
                    apps.faults(host, "status", status=500)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None: ...

        def reset(self, total: float | None = None) -> None:
            assert total == 2 * 2 * 4

    config = PoolConfig(backoff_seconds=0, backend_wait_seconds=0)
    bench = Bench(apps.urls, plan, config=config, transport=apps, bar=Breaking())
    with pytest.raises(RolloutError):
        asyncio.run(bench.run())
    assert [(step.servers, step.number) for step in bench.steps] == [(1, 0), (1, 1), (2, 0)]


def test_an_interrupt_prints_what_was_measured(vllm_fleet: Fleet, tmp_path: Path) -> None:
    sims = vllm_fleet(2)
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "trl_pool.bench", *of(sims, "--compare", "--steps", "1", "--warm-up", "0")]
    sims[1].faults("hang", endpoints=["completions"])  # the second of both fleets never ends
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(
        [*command, "--json", str(path)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        eventually(lambda: sims[1].state()["in_flight"], timeout=20)
        child.send_signal(signal.SIGINT)
        printed, said = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert [row[0] for row in rows(printed, 0)[1:]] == ["1"]
    assert json.loads(path.read_text())["about"]["complete"] is False


def test_servers_behind_a_gateway_are_measured_one_by_one(
    vllm_fleet: Fleet, gateway: Callable[..., Gateway], capsys: pytest.CaptureFixture[str]
) -> None:
    sims = vllm_fleet(2)
    assert main(["--backends", gateway(sims).url, *SMALL, "--steps", "1", "--servers", "1,2"]) == 0
    tables = capsys.readouterr().out
    assert [row[0] for row in rows(tables, 0)[1:]] == ["1", "2"]
    assert [row[0] for row in rows(tables, 1)[1:]] == [sim.url for sim in sims]
