"""The experiment on full backwards: its figures, its tables, and its refusals."""

import dataclasses
from typing import Any

import jax
import pytest

import dualpipe_jax as dpj
from dualpipe_jax._predict import of_transformer
from experiments import documents
from experiments.compiled import backwards, flags
from experiments.compiled.backwards import Row
from experiments.compiled.compiles import compile_case
from tests.experiments.compiled.figures import figures_of

# The compiler for TPUs takes longer the larger the arrays are.
SIZES: dict[str, Any] = {"widths": (128,), "layers": (2,), "tokens": 256}
CASE = backwards.cases("1f1b", **SIZES)[0]
APART = {"forward": 2e6, "input_grad": 3e6, "weight_grad": 1e6, "other": 1e5}
ROW = Row(
    case=CASE,
    apart=figures_of(cycles=APART, temporaries=2**30, predicted_seconds=0.1),
    full=figures_of(
        cycles={**APART, "input_grad": 1.5e6, "weight_grad": 1e6, "other": 6e5},
        temporaries=2**29,
        predicted_seconds=0.098,
    ),
)


def test_compiled_cases() -> None:
    sizes = {"widths": (1024, 2048), "layers": (2, 8), "tokens": 4096}
    ticks = backwards.cases("1f1b", **sizes)
    assert len(set(ticks)) == 12
    assert {(case.width, case.layers) for case in ticks} == {(1024, 2), (1024, 8), (2048, 2)}
    assert {(case.family, case.remat) for case in ticks} == {
        (family, remat) for family in ("mlp", "transformer") for remat in ("none", "block")
    }


def test_time_at_the_costs_of_a_row() -> None:
    assert ROW.share == 0.75
    made = dpj.schedules.make("1f1b", num_ranks=4, num_microbatches=16)
    apart = dpj.simulate(
        made, costs=dpj.Costs(forward=2, input_grad=3, weight_grad=1), transfer=0.2
    )
    full = dpj.simulate(
        made,
        costs=dpj.Costs(forward=2, input_grad=2, weight_grad=1),
        transfer=0.2,
        execution=dpj.Execution(split_backward=False),
    )
    expected = full.makespan / apart.makespan - 1
    assert ROW.change_of_time("1f1b", ranks=4) == pytest.approx(expected)
    # Under rematerialisation ZB-H1's deferred W cost more in both, so that the share is less.
    with_remat = dataclasses.replace(ROW, case=dataclasses.replace(CASE, remat="block"))
    changes = [row.change_of_time("zb-h1", ranks=4) for row in (ROW, with_remat)]
    assert changes[0] < changes[1] < 0


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backwards, "RANKS", (2, 4))
    made = {k: v.splitlines()[2] for k, v in backwards.make_tables([ROW], [ROW]).items()}
    assert made["ticks"] == (
        "| mlp | none | 128 | 2 | 2.00 | 3.00 | 1.00 | 3.00 | 0.75 | 1,024 | 512 |"
    )
    cells = made["times"].split(" | ")[4:]
    assert len(cells) == len(backwards.SCHEDULES)
    assert cells[1] == ", ".join(
        f"{100 * ROW.change_of_time('1f1b', ranks=ranks):+.0f}" for ranks in (2, 4)
    )
    assert made["beats"] == "| mlp | none | 128 | 2 | 1,525,000 | 1,275,000 | 1,024 | 512 | -2.0 |"


def test_the_library_counts_with_the_committed_figures() -> None:
    """The share of a full backward is the middle of the compiled cases."""
    readme = documents.read_from(flags.README, name="ticks")
    lines = [line.strip("| ").split(" | ") for line in readme.splitlines()[2:]]
    assert len(lines) == 12
    shares = sorted(float(line[8]) for line in lines)
    assert shares[0] > 0.8
    assert shares[-2] < 1
    counted = of_transformer(attention=0.1, recomputes=False)
    assert counted.full_backward_share == pytest.approx(sum(shares) / len(shares), abs=0.02)
    for line in lines:
        (input_grad, weight_grad, both), (apart, full) = (
            [float(cell.replace(",", "")) for cell in cells] for cells in (line[5:8], line[9:11])
        )
        assert both / (input_grad + weight_grad) == pytest.approx(float(line[8]), abs=0.01)
        assert full < apart


@pytest.mark.slow
def test_small_steps_compiled_for_tpus() -> None:
    beats = backwards.cases("dualpipe", **SIZES)[0]
    with jax.enable_x64(False):
        ticks, steady = Row.of(CASE, compile_case), Row.of(beats, compile_case)
    # A matrix unit's cycle is 131,072 FLOPs at most; two matmuls each, of two layers.
    matmuls = 2 * 2 * 2 * 256 * 128 * 512 / 131072
    assert min(map(ticks.cycles, ("forward", "input_grad", "weight_grad"))) > matmuls
    assert ticks.cycles("full_backward") > 2 * matmuls
    assert 0.5 < ticks.share < 1.2
    both = ticks.full.temporaries, ticks.apart.temporaries
    assert (both[0] or 0) < (both[1] or 0)
    for figures in (steady.apart, steady.full):
        assert figures.cycles_of_layers > 2 * 2 * 3 * matmuls / 2
        assert (figures.predicted_seconds or 0) > 0
    assert steady.apart.temporaries != steady.full.temporaries
