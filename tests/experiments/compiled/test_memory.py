"""The memory experiment: its rows, its table, and what it refuses."""

import jax
import pytest

from experiments.benchmarks import variants
from experiments.compiled import memory

SIZES = memory.Sizes(
    topology="tpu:v5e:2x2",
    ranks=4,
    layers=4,
    width=128,
    heads=1,
    sequence=128,
    vocabulary=128,
    microbatch_size=1,
)


@pytest.mark.slow
@pytest.mark.parametrize("split_backward", [True, False])
def test_a_step_of_the_library_has_an_account_beside_its_peak(split_backward: bool) -> None:
    with jax.enable_x64(False):
        row, account = memory.measure(
            "1f1b", SIZES, remat="block", microbatches=16, split_backward=split_backward
        )
    assert row.terms is not None
    assert row.peak > 0
    assert f"{row.terms / 2**20:,.1f} MiB" in account.splitlines()[-1]
    assert ("stash of a full backward" in account) != split_backward


def test_table_has_a_line_for_every_row() -> None:
    rows = [
        memory.Row(name="dualpipe", remat="none", microbatches=16, peak=2**21, terms=3 * 2**20),
        memory.Row(name=variants.RECIPE, remat="block", microbatches=4, peak=2**20, terms=None),
        memory.Row(
            name=variants.RECIPE, remat="none", microbatches=4, peak=2**30, terms=None, fits=False
        ),
    ]
    assert memory.table(rows).splitlines()[2:] == [
        "| dualpipe | none | 16 | 2.0 | 3 | 1.50 |",
        "| gpipe-recipe | block | 4 | 1.0 | - | - |",
        "| gpipe-recipe | none | 4 | 1,024.0, does not fit | - | - |",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 6", "--layers 6: must be a multiple of --ranks 4"),
        ("--width 0", "0 is not in the range"),
        ("--wide 3", "No such option"),
        ("--schedule gpipes", "'gpipes' is not one of"),
        ("--remat all", "'all' is not one of"),
    ],
)
def test_mistake_is_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        memory.main(flags.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
