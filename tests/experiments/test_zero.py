"""The experiment on ZeRO: the figures in the docs, and what moves over the data axis."""

import jax
import pytest

from experiments import documents
from experiments.sharded import zero
from tests.hlo import collectives

SMALL = zero.Sizes(ranks=2, shards=2, microbatches=2, layers=2, width=8, vocabulary=64, context=4)
AXES = {"pipe": 2, "data": 2}


@pytest.mark.slow
def test_the_table_in_the_docs() -> None:
    with jax.enable_x64(False):
        rows = {name: zero.measure(zero.Sizes(), each) for name, each in zero.DEGREES.items()}
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


# Of four leaves, over the data axis: sums, gathers and scatters outside of loops.
MOVED = {
    "nothing": {"all-reduce": 4},
    "optimizer state": {"all-reduce": 4, "all-gather": 4},
    "and gradients": {"reduce-scatter": 4, "all-gather": 4},
    "and parameters": {"all-gather": 4, "reduce-scatter": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_what_moves_over_the_data_axis(name: str) -> None:
    with jax.enable_x64(False):
        compiled, *_ = zero.compile_step(SMALL, zero.DEGREES[name])
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 3", "--layers 3: must be a multiple of 2"),
        ("--shards 3", "--width 256: must be a multiple of 3; --vocabulary 4096: must be"),
        ("--ranks 0", "0 is not in the range"),
    ],
)
def test_mistake_is_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        zero.main(flags.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
