"""The bytes of sharded steps: the figures in docs and README, and the collectives they take."""

from typing import Any

import jax
import pytest

from experiments import documents
from experiments.sharded import ends, steps, zero
from tests.hlo import collectives

SMALL = steps.Sizes(ranks=2, shards=2, microbatches=2, layers=2, width=8, vocabulary=64, context=4)
AXES = {"pipe": 2, "data": 2}


@pytest.mark.slow
def test_the_table_in_the_docs() -> None:
    with jax.enable_x64(False):
        sizes = steps.Sizes(**zero.DEFAULTS)
        rows = {name: steps.measure(sizes, each) for name, each in zero.DEGREES.items()}
    shown = documents.read_from(zero.DOCS, name="zero")
    titles, _, *lines = shown.splitlines()
    known_titles, _, *known_lines = zero.table(rows).splitlines()
    assert titles == known_titles
    for line, want in zip(lines, known_lines, strict=True):
        *sizes, temporaries, total = line.strip("| ").split(" | ")
        *known, _, _ = want.strip("| ").split(" | ")
        assert sizes == known
        # How XLA lays out temporaries is a matter of its release.
        row = rows[sizes[0]]
        assert float(temporaries) == pytest.approx(row.temporaries / 2**20, rel=0.1)
        assert float(total) == pytest.approx(row.total / 2**20, rel=0.1)


# Sums, gathers and scatters of four leaves over the data axis, outside of loops.
MOVED = {
    "nothing": {"all-reduce": 4},
    "optimizer state": {"all-reduce": 4, "all-gather": 4},
    "and gradients": {"reduce-scatter": 4, "all-gather": 4},
    "and parameters": {"all-gather": 4, "reduce-scatter": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_collectives_over_the_data_axis(name: str) -> None:
    with jax.enable_x64(False):
        compiled, *_ = steps.compile_step(SMALL, zero.DEGREES[name])
    moved = [
        each
        for each in collectives(str(compiled.as_text()), AXES)
        if "data" in each.axes and each.kind != "collective-permute"
    ]
    assert not [each for each in moved if each.in_loop]
    counts = {
        kind: sum(len(shape) > 0 for each in moved if each.kind == kind for shape in each.shapes)
        for kind in dict.fromkeys(each.kind for each in moved)
    }
    assert {kind: count for kind, count in counts.items() if count} == MOVED[name]


FEW = steps.Sizes(ranks=4, microbatches=4, layers=8, width=8, vocabulary=512, context=4)


def test_ends_over_the_ranks_take_less() -> None:
    with jax.enable_x64(False):
        rows = {name: steps.measure(FEW, layout) for name, layout in ends.LAYOUTS.items()}
    everywhere, over_ranks = (row.parameters + row.state for row in rows.values())
    # Two tables, each with two moments, of which three quarters are on other ranks.
    assert everywhere - over_ranks == 2 * 3 * FEW.vocabulary * FEW.width * 4 * 3 // 4
    temporaries = [row.temporaries for row in rows.values()]
    assert temporaries[0] < temporaries[1]
    assert f"| {everywhere / 2**20:,.0f} |" in ends.bytes_table(rows).splitlines()[2]


def test_layers_that_leave_the_heads_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends.layers_per_stage(16, 4, 0) == [4] * 4
    assert ends.layers_per_stage(32, 4, 3) == [8, 10, 9, 5]
    even, shorter, none = (
        ends.idle_share(FEW, "1f1b", head_layers=2, fewer=fewer) for fewer in (0, 1, 2)
    )
    # Stages of two layers can miss one, and no more.
    assert none is None
    assert even is not None
    assert shorter is not None
    assert shorter < even
    monkeypatch.setattr(ends, "HEADS", (2,))
    line = ends.idle_table(FEW).splitlines()[2]
    assert line == f"| 1f1b | 2 | {even:.1%} | {shorter:.1%} | - | - |"


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (zero.main, "--layers 3", "--layers 3: must be a multiple of 2"),
        (zero.main, "--shards 3", "--width 256: must be a multiple of 3; --vocabulary 4096: must"),
        (zero.main, "--ranks 0", "0 is not in the range"),
        (ends.main, "--layers 12", "--layers 12: must be a multiple of 16"),
        (ends.main, "--layers 12 --vocabulary 9", "--vocabulary 9: must be a multiple of 8"),
        (ends.main, "--ranks 2", "--ranks 2: must be at least 3"),
    ],
)
def test_mistake_is_one_line(
    main: Any, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(flags.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
