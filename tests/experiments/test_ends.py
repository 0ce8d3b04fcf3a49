"""The experiment on embedding and head: its bytes, its idle shares, and what it refuses."""

import jax
import pytest

from experiments.sharded import ends

SIZES = ends.Sizes(ranks=4, microbatches=4, layers=8, width=8, vocabulary=512, context=4)


def test_what_lies_over_the_ranks_takes_less() -> None:
    with jax.enable_x64(False):
        rows = {layout: ends.measure(SIZES, layout) for layout in ends.LAYOUTS}
    everywhere, over_ranks = (rows[layout].state for layout in ends.LAYOUTS)
    # Two tables, each with two moments, of which three quarters are on other ranks.
    assert everywhere - over_ranks == 2 * 3 * SIZES.vocabulary * SIZES.width * 4 * 3 // 4
    temporaries = [rows[layout].temporaries for layout in ends.LAYOUTS]
    assert temporaries[0] < temporaries[1]
    assert f"| {everywhere / 2**20:,.0f} |" in ends.bytes_table(rows).splitlines()[2]


def test_layers_that_leave_the_heads_stage() -> None:
    assert ends.layers_per_stage(16, 4, 0) == [4] * 4
    assert ends.layers_per_stage(32, 4, 3) == [8, 10, 9, 5]
    even, *shorter = ends.idle_shares(SIZES, "1f1b", head_layers=2)
    # Stages of two layers can miss one, and no more.
    assert shorter[1:] == [None, None]
    assert even is not None
    assert shorter[0] is not None
    assert shorter[0] < even
    table = ends.idle_table(SIZES, heads=(2,)).splitlines()
    assert table[2] == f"| 1f1b | 2 | {even:.1%} | {shorter[0]:.1%} | - | - |"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 12", "--layers 12: must be a multiple of 16"),
        ("--layers 12 --vocabulary 9", "--vocabulary 9: must be a multiple of 8"),
        ("--ranks 2", "2 is not in the range"),
    ],
)
def test_mistake_is_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        ends.main(flags.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
