import numpy as np

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.grammar import parse_program
from tests.schedules_under_test import compiled


def test_transfers_come_from_the_neighbour_that_sends():
    tables = compiled("dualpipe", 4, 8).tables
    assert not tables.wraps
    assert (tables.from_left[:, 0] == -1).all()
    assert (tables.from_right[:, 3] == -1).all()
    # Direction 0 sends x right and cotangents left, direction 1 the other way: 8 microbatches.
    assert [(column[:, 1] >= 0).sum() for column in (tables.from_left, tables.from_right)] == [8, 8]


def test_two_ranks_never_wrap():
    csv = "0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n"
    tables = compile_program(parse_program(csv, name="interleaved")).tables
    assert not tables.wraps
    assert (tables.from_left[:, 0] == -1).all()


def test_interleaved_stages_wrap_around_the_ring():
    csv = "0F0,3F0,3B0,0B0\n1F0,4F0,4B0,1B0\n2F0,5F0,5B0,2B0\n"
    tables = compile_program(parse_program(csv, name="interleaved")).tables
    assert tables.wraps
    assert (tables.from_left[:, 0] >= 0).sum() == 1  # 2F0's output
    assert (tables.from_right[:, 2] >= 0).sum() == 1  # 3I0's


def test_consecutive_stages_of_a_rank_hand_over_by_keeping():
    tables = compile_program(parse_program("0F0,1F0,1B0,0B0\n", name="one rank")).tables
    assert tables.opcode[:, 0].tolist() == [1, 1, 2, 3, 2, 3]
    assert (tables.keep[:, 0] >= 0).tolist() == [True, True, True, False, False, False]
    assert tables.num_slots == {
        "received": 1,
        "residual": 2,
        "weight_residual": 2,
        "stash": 1,
    }


def test_forward_only_last_stage_keeps_nothing():
    tables = compiled("forward-only", 3, 5).tables
    for column in (tables.keep, tables.residual, tables.weight_residual, tables.stash):
        assert (column == -1).all()


def test_tables_are_int32():
    tables = compiled("1f1b", 2, 3).tables
    assert {getattr(tables, column).dtype for column in tables.columns()} == {np.dtype(np.int32)}
    assert tables.stage_of.dtype == np.int32
