import pytest

from dualpipe_jax import schedules
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax.schedules import Schedule
from tests.schedules_under_test import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 6), (4, 8), (8, 20)])
def test_csv_round_trip(name, size):
    schedule = schedules.make(name, num_ranks=size[0], num_microbatches=size[1])
    assert Schedule.from_csv(schedule.to_csv(), name=name) == schedule


def test_spaces_and_empty_cells_are_ignored():
    tidy = parse_program("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", name="x")
    loose = parse_program("\n 0F0 ,0F1,,0B0, 0 B1,\r\n1F0,  1B0,1F1 ,,1B1,,\n\n", name="x")
    assert loose == tidy
    pairs = parse_program("( 0F0 ; 1B1 ) OVERLAP_F_B", name="x").rows[0]
    assert [str(cell) for cell in pairs] == ["(0F0;1B1)OVERLAP_F_B"]


def test_forwards_alone_are_forward_only():
    assert parse_program("0F0\n1F0", name="x").forward_only
    assert not parse_program("0F0,0I0,0W0", name="x").forward_only


@pytest.mark.parametrize(
    "cell",
    [
        "0G0",
        "F0",
        "0F",
        "-1F0",
        "0F0;1B0",
        "(0B0;1F0)OVERLAP_F_B",
        "(0F0;1W0)OVERLAP_F_B",
        "0F" + "9" * 20,
    ],
)
def test_a_wrong_cell_is_named(cell):
    with pytest.raises(ValueError, match="'mine' has cells that are neither") as error:
        parse_program(f"0F0,0B0\n1F0,,{cell},1B0,0x0", name="mine")
    assert str(error.value).endswith(f"\n  row 1, column 2: {cell!r}\n  row 1, column 4: '0x0'")


def test_no_actions():
    with pytest.raises(ValueError, match=r"schedule 'csv' has no actions; got ' ,\\n,'"):
        Schedule.from_csv(" ,\n,")
