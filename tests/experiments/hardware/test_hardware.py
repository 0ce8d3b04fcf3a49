"""The experiment on hardware, small: it runs over fake devices, and its figures follow from times.

No test here looks at how long anything takes.
"""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import dualpipe_jax as dpj
from experiments import documents, tables
from experiments.compiled import models
from experiments.hardware import (
    commands,
    graphs,
    hardware,
    layer,
    one_rank,
    programs,
    report,
    schedules,
    timing,
)
from experiments.hardware.tasks import Figure, Sizes, Task
from tests.commands import run_script

ROOT = Path(__file__).resolve().parents[3]
TINY = "--family mlp --width 16 --tokens 8 --microbatches 2 --rounds 2 --schedule dualpipe"
SIZES = Sizes(family="transformer", width=128, layers=2, tokens=64, microbatches=4, rounds=3)
MACHINE = {
    "device": "Fast 9000",
    "platform": "gpu",
    "devices": 2,
    "line": "2 of 2 x Fast 9000",
    "memory_bytes": None,
    "peak_flops": 1e12,
    "versions": {"jax": "1.2.3"},
    "driver": "the driver",
}


@pytest.mark.slow
def test_all_parts_run_over_fake_devices(tmp_path: Path) -> None:
    said = run_script("hardware.hardware", *TINY.split(), output=tmp_path)
    found = report.Report.from_dict(json.loads((tmp_path / "cpu" / "report.json").read_text()))
    assert found.failures == []
    assert [each.name for each in found.outcomes] == ["step", "tick", "layer", "schedules-dualpipe"]
    assert not any(each.is_left_out for each in found.outcomes)
    plain = [one_rank.UNROLLED, one_rank.LOOPED]
    assert found.rows(one_rank.STEP) == ["1f1b", *plain]
    assert found.rows(one_rank.TICK) == ["1f1b", plain[0]]
    assert found.rows(layer.TABLE) == [layer.OURS, layer.VJP]
    # As many samples as rounds, of each figure that is a time.
    of_times = [each for each in found.figures if each.table != schedules.TABLE]
    assert {len(each.samples) for each in of_times} == {2}
    columns = {each.column for each in found.figures if each.table == schedules.TABLE}
    # Not the peak: a CPU's runtime counts none.
    always = {"execution", "account", "compiler", "seconds", "idle", "preflight"}
    assert columns - {"simulated"} == always
    assert 0 < (found.median(schedules.TABLE, "dualpipe", "idle") or 0) < 1
    page = (tmp_path / "cpu" / "report.md").read_text()
    assert page == report.to_page(found)
    assert page in said
    titles = ["A layer", "A step over one rank", "A tick by itself", "Schedules"]
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == titles


def test_a_program_that_fails_is_left_out_and_the_others_go_on() -> None:
    calls: list[str] = []

    def good() -> Any:
        return lambda: calls.append("good")

    def refused() -> Any:
        raise ValueError("no such\noption")

    def breaks_later() -> Any:
        steps = iter([None, None])
        return lambda: next(steps)

    programs_of_test = {"refused": refused, "breaks later": breaks_later, "good": good}
    times = timing.side_by_side(programs_of_test, rounds=3)
    assert list(times.samples) == ["good"]
    assert len(times.samples["good"]) == 3
    assert len(calls) == 4  # a step warms up
    assert times.failures == {
        "refused": "ValueError: no such option",
        "breaks later": "StopIteration: ",
    }


def test_a_layers_figures_are_differences() -> None:
    """Steps of known ends, layers and microbatches: the ends cancel."""
    f, i, w, full, ends = 3.0, 5.0, 2.0, 6.0, 100.0

    def step(num_layers: int, of_layer: float) -> tuple[float, ...]:
        return tuple(noise + ends + 4 * num_layers * of_layer for noise in (0.0, 1.0))

    costs = {"forward": f, "frozen": f + i, "split": f + i + w, "full": f + full}
    samples = {f"{name}, {n} layers": step(n, cost) for name, cost in costs.items() for n in (1, 2)}
    samples |= {"block": (8.0, 8.0), "input grad": (20.0, 24.0), "gradients": (32.0, 40.0)}
    found = {
        (each.row, each.column): each.samples
        for each in layer.figures_of(samples, half=1, whole=2, microbatches=4)
    }
    assert found == {
        ("executor", "F"): (f, f),
        ("executor", "I"): (i, i),
        ("executor", "W"): (w, w),
        ("executor", "B"): (full, full),
        ("executor", "I + W"): (i + w, i + w),
        ("jax.vjp", "F"): (2.0, 2.0),
        ("jax.vjp", "I"): (3.0, 4.0),
        ("jax.vjp", "W"): (3.0, 4.0),
        ("jax.vjp", "B"): (6.0, 8.0),
    }
    # Without a program that failed, the figures that need it are missing.
    del samples["frozen, 2 layers"]
    left = layer.figures_of(samples, half=1, whole=2, microbatches=4)
    assert [each.column for each in left if each.row == "executor"] == ["F", "B", "I + W"]


@pytest.mark.parametrize("family", ["mlp", "transformer"])
def test_flops_are_those_of_the_matmuls(family: str) -> None:
    sizes = dataclasses.replace(SIZES, family=family)
    chosen = models.FAMILIES[family]
    # One layer: XLA counts a trip of each loop.
    args = chosen.avals(sizes.width, 1), jax.ShapeDtypeStruct((64,), np.int32)
    loss = dpj.sequential(chosen.model, num_microbatches=1)
    counted: Any = jax.jit(jax.value_and_grad(loss)).lower(*args).cost_analysis()
    # XLA counts elementwise operations as well.
    flops = programs.flops_per_step(sizes, layers=1, microbatches=1)
    assert flops == pytest.approx(counted["flops"], rel=0.06)


@pytest.mark.parametrize(
    ("kind", "platform", "coords", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", [None] * 4, "gpu:h100:4"),
        ("TPU v5 lite", "tpu", [(x, y, 0) for x in range(2) for y in range(4)], "tpu:v5e:2x4"),
        ("TPU v5", "tpu", [(x, 0, 0) for x in (2, 3)], "tpu:v5p:2x1x1"),
        ("NVIDIA A100-SXM4-80GB", "gpu", [None], None),
        ("Fast 9000", "gpu", [None], None),
    ],
)
def test_preflight_is_asked_for_these_devices(
    kind: str, platform: str, coords: list[Any], name: str | None
) -> None:
    devices = [SimpleNamespace(device_kind=kind, platform=platform, coords=at) for at in coords]
    assert programs.topology(SimpleNamespace(devices=np.array(devices))) == name


def figure(table: str, row: str, column: str, *samples: float, **more: Any) -> Figure:
    return Figure(table=table, row=row, column=column, samples=samples, **more)


def a_report(*figures: Figure, **more: Any) -> report.Report:
    return report.Report(machine=MACHINE, sizes=SIZES, minutes=7.5, figures=list(figures), **more)


def cells(page: str, row: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_page_has_rates_of_the_medians() -> None:
    flops = programs.flops_per_step(SIZES, layers=4, microbatches=8)
    page = report.to_page(
        a_report(
            figure("schedules", "1f1b", "seconds", 0.5, 0.25, 1.0),
            figure("schedules", "1f1b", "account", 3 * 2.0**30),
            figure("schedules", "1f1b", "idle", 0.125),
            figure("schedules", "1f1b", "preflight", note="no cycles"),
            figure("one rank", "1f1b, default", "seconds", 0.3),
            figure("one rank", one_rank.LOOPED, "seconds", 0.2),
            figure("one rank", one_rank.UNROLLED, "seconds", 0.15),
        )
    )
    # Two devices, eight microbatches of 64 tokens.
    assert cells(page, "1f1b") == [
        *["1f1b", "500.00 (250.00 to 1,000.00)", "1,024", "512"],
        *[f"{flops / 1e12:,.1f}", f"{flops / 1e12:.1%}", "-", "3.00", "-", "12.5%", "-", "-"],
    ]
    assert "`1f1b`, preflight: no cycles." in page
    assert cells(page, "1f1b, default")[1:3] == ["300.00", "2.000"]
    assert "Failures" not in page
    assert "Left out" not in page


def test_the_page_names_failures_and_parts_left_out() -> None:
    failed = figure("one rank", "1f1b, none", "seconds", note="Error: refused", is_failure=True)
    outcomes = [
        report.Outcome(name="step", seconds=3.0),
        report.Outcome(name="layer", failure="killed"),
        report.Outcome(name="schedules-gpipe", is_left_out=True),
    ]
    made = a_report(failed, outcomes=outcomes)
    page = report.to_page(made)
    assert cells(page, "1f1b, none")[:3] == ["1f1b, none", "failed", "-"]
    assert "- layer: killed" in page
    assert "- one rank, 1f1b, none, seconds: Error: refused" in page
    assert "No time was left of 7.5 minutes for: schedules-gpipe." in page
    again = report.Report.from_dict(json.loads(json.dumps(made.to_dict())))
    assert report.to_page(again) == page


def test_the_replay_has_the_measured_costs_if_all_are_known() -> None:
    known = [figure("layer", "executor", kind, s) for kind, s in zip("FIW", (1, 2, 3), strict=True)]
    assert a_report(*known).costs() == (2.0, 4.0, 6.0)  # two layers
    assert a_report(*known[:2]).costs() is None
    assert a_report(*known[:2], figure("layer", "executor", "W", -1.0)).costs() is None


def test_parts_follow_from_the_devices() -> None:
    def plan(parts: tuple[str, ...] = hardware.PARTS, **machine: Any) -> list[tuple[str, ...]]:
        made = hardware.plan_parts({**MACHINE, **machine}, parts, ())
        return [tuple(fields.values()) for fields in made]

    alone = [("step",), ("tick",), ("layer",)]
    schedules_of_all = [("schedules", name) for name in dpj.schedules.names()]
    graphs_of_1f1b = [("commands", "1f1b", name) for name in programs.COMMANDS]
    graphs_of_dualpipe = [("commands", "dualpipe", name) for name in programs.COMMANDS]
    assert plan(devices=1) == [*alone, *graphs_of_1f1b, ("schedules", "1f1b")]
    assert plan() == [*alone, *graphs_of_dualpipe, *schedules_of_all]
    assert plan(platform="tpu") == [*alone, *schedules_of_all]
    assert plan(("schedules", "step")) == [("step",), *schedules_of_all]


def test_a_set_of_command_buffers_that_is_refused_stands_beside_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over fake devices; XLA's compiler for CPUs knows the option, and has no such command."""
    sets = {"bogus": {"xla_gpu_enable_command_buffer": "BOGUS"}}
    monkeypatch.setattr(programs, "COMMANDS", sets)
    sizes = Sizes(family="mlp", width=16, layers=1, tokens=8, microbatches=1, rounds=2)
    task = Task(
        part="commands", devices=2, sizes=sizes, schedule="gpipe", commands="bogus", output=""
    )
    with jax.enable_x64(False):
        found = {each.column: each for each in commands.measure(task)}
    for column in (commands.STEP, commands.TICK):
        assert found[column].is_failure
        assert "BOGUS" in found[column].note
    for column in (commands.DEFAULT_STEP, commands.DEFAULT_TICK):
        assert len(found[column].samples) == 2
    page = report.to_page(a_report(*found.values()))
    step, tick = (found[name] for name in (commands.DEFAULT_STEP, commands.DEFAULT_TICK))
    assert cells(page, "bogus") == [
        *["bogus", "failed", report.cell(step, unit=1e-3)],
        *["failed", report.cell(tick, unit=1e-6)],
    ]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Replaces the workers: the part `tick` fails, `layer` does not end in time; lists tasks."""
    asked: list[Task] = []

    def work(task: Task, log: Path, deadline: float) -> str:
        if task.part == "machine":
            Path(task.output).write_text(json.dumps(MACHINE))
            return ""
        asked.append(task)
        found = figure(schedules.TABLE, task.schedule, "preflight", note="no cycles")
        if task.part == "schedules":
            Path(task.output).write_text(f"{json.dumps(found.to_dict())}\n")
        if task.part == "layer":
            raise subprocess.TimeoutExpired("worker", 1)
        return "out of memory" if task.part == "tick" else ""

    monkeypatch.setattr(hardware, "_work", work)
    return asked


def test_parts_that_fail_or_take_too_long_are_reported(
    tmp_path: Path, workers: list[Task], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--schedule", "1f1b", "--schedule", "gpipe", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_info:
        hardware.main(args)
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == "hardware: tick: out of memory\n"
    found = report.Report.from_dict(json.loads((tmp_path / "fast-9000/report.json").read_text()))
    assert {each.name: (each.failure, each.is_left_out) for each in found.outcomes} == {
        "step": ("", False),
        "tick": ("out of memory", False),
        "layer": ("", True),
        **{f"commands-1f1b-{name.replace(', ', '-')}": ("", False) for name in programs.COMMANDS},
        "schedules-1f1b": ("", False),
        "schedules-gpipe": ("", False),
    }
    # It had no times of the first one, and is not asked again.
    assert [task.asks_preflight for task in workers] == [True] * (len(workers) - 1) + [False]
    assert found.sizes == Sizes(family="transformer", layers=2, **hardware.DEFAULTS)


def test_no_part_starts_when_the_time_is_over(
    tmp_path: Path, workers: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 1.0, 2.0, 61.0, 61.0, 62.0, 62.0])
    monkeypatch.setattr(hardware, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    args = ["--minutes", "1", "--part", "step", "--part", "schedules", "--schedule", "1f1b"]
    hardware.main([*args, "--output", str(tmp_path)])
    assert [task.name for task in workers] == ["step"]
    page = (tmp_path / "fast-9000" / "report.md").read_text()
    assert "No time was left of 1 minutes for: schedules-1f1b." in page


def test_the_committed_table_of_graphs_has_these_columns_and_rows() -> None:
    readme = ROOT / "experiments" / "hardware" / "README.md"
    head, _, *lines = documents.read_from(readme, name="graphs").splitlines()
    assert head == tables.markdown(graphs.COLUMNS, []).splitlines()[0]
    assert len(lines) == 3 * len(graphs.STEPS)
    of_all = [line for line in lines if "| conditionals, loops, collectives |" in line]
    assert {line.split("|")[5].strip() for line in of_all} == {"0"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 3", "--layers 3: must be even, as a layer is measured by the difference"),
        ("--width 100", "--width 100: must be a multiple of 128, the size of a head"),
        ("--tokens 1500", "--tokens 1500: must be a multiple of 1024, the window of attention"),
        ("--layers 3 --width 100", "half of them; --width 100"),
        ("--schedule zigzag", "Invalid value for '--schedule': 'zigzag' is not one of"),
        ("--part all", "Invalid value for '--part': 'all' is not one of"),
        ("--minutes 0", "Invalid value for '--minutes': 0.0 is not in the range x>0"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: str, message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal(hardware.main, flags.split(), name="hardware")
