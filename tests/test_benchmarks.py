"""The benchmarks' own tools: ratios of spreads, tables, files, and the order of measurements."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import __main__ as command
from benchmarks import rounds
from benchmarks.report import Report, Spread, Table, about
from benchmarks.rounds import column, interleave


def test_a_spread_is_a_median_and_a_range() -> None:
    spread = Spread.of([3, 1, 2, 10])
    assert (spread.median, spread.low, spread.high) == (2.5, 1.0, 10.0)
    assert spread.text(1) == "2.5 (1.0 – 10.0)"
    assert Spread.of([0.123]).text() == "0.12"


def test_ratios_are_taken_round_by_round() -> None:
    """A round in which the machine was slow for both says as much as the others."""
    ours, theirs = Spread.of([1, 10, 2]), Spread.of([2, 20, 4])
    assert (ours / theirs).values == (0.5, 0.5, 0.5)
    assert (ours / theirs).text() == "0.50 (0.50 – 0.50)"


def test_spreads_of_different_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Spread.of([1, 2]) / Spread.of([1])


def test_a_table_is_markdown_with_its_notes_below() -> None:
    table = Table("Cost", ["what", "s"], [["pool", Spread.of([1, 2, 3])], ["peer", 4]], notes=["No nginx here."])
    title, blank, head, rule, first, second, *rest = table.markdown().splitlines()
    assert (title, blank) == ("### Cost", "")
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["what", "s"]
    assert set(rule) <= set("|-")
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["pool", "2.00 (1.00 – 3.00)"]
    assert [cell.strip() for cell in second.strip("|").split("|")] == ["peer", "4"]
    assert rest == ["", "No nginx here."]


def test_a_report_keeps_every_round_in_its_json(tmp_path: Path) -> None:
    report = Report(data={"ratio": Spread.of([1, 2, 4]), "rows": [{"n": 1}]})
    (path,) = report.save("cost", tmp_path / "new", {"machine": "this"})
    assert path == tmp_path / "new" / "cost.json"
    assert json.loads(path.read_text()) == {
        "about": {"machine": "this"},
        "ratio": {"median": 2.0, "low": 1.0, "high": 4.0, "values": [1.0, 2.0, 4.0]},
        "rows": [{"n": 1}],
    }


def test_what_has_no_place_in_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object has no place in JSON"):
        Report(data={"thing": object()}).save("cost", tmp_path, {})


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.filterwarnings("default")  # not ours
def test_a_report_draws_its_figures(tmp_path: Path) -> None:
    def draw(figure: Any) -> None:
        figure.subplots().plot([1, 2], [3, 4])

    written = Report(figures={"line": draw}).save("cost", tmp_path, {})
    assert [path.name for path in written] == ["cost.json", "line.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_about_names_the_machine_and_leaves_out_what_is_not_installed() -> None:
    found = about(("msgspec", "no-such-package"))
    assert {"machine", "system", "python", "msgspec"} <= found.keys()
    assert "no-such-package" not in found


def test_everybody_is_measured_once_a_round_and_every_other_round_backwards() -> None:
    order: list[str] = []

    def subject(name: str) -> Any:
        def measure() -> dict[str, int]:
            order.append(name)
            return {"at": len(order)}

        return measure

    found = interleave({name: subject(name) for name in "abc"}, 3, warm_up=1)
    assert "".join(order) == "abc" + "cba" + "abc" + "cba"
    # The warm-up does not count; results are in the order of the rounds.
    assert {name: column(found, name, "at") for name in found} == {
        "a": [6.0, 7.0, 12.0],
        "b": [5.0, 8.0, 11.0],
        "c": [4.0, 9.0, 10.0],
    }


def test_garbage_of_one_is_collected_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(rounds.gc, "collect", lambda: events.append("collect"))
    interleave({"a": lambda: events.append("a"), "b": lambda: events.append("b")}, 1, warm_up=0)
    assert events == ["collect", "a", "collect", "b"]


@pytest.mark.parametrize(
    ("line", "said"), [(["stepps"], "no benchmark stepps; there are steps"), (["steps", "--rounds", "0"], "--rounds")]
)
def test_a_wrong_command_line_ends_with_2_before_anything_is_measured(
    line: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "about", lambda packages: pytest.fail("it went on"))
    assert command.main(line) == 2
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", command.NAMES)
def test_a_benchmarks_options_have_its_name_in_front(name: str) -> None:
    module = command._module(name)
    fresh = argparse.ArgumentParser(add_help=False)
    module.add_options(fresh.add_argument_group(name))
    flags = [flag for action in fresh._actions for flag in action.option_strings]
    assert all(flag.startswith(f"--{name}") for flag in flags), flags
    assert module.SUMMARY
