import dataclasses
from functools import cached_property
from typing import Any, get_type_hints

import jaxtyping
import numpy as np
import pytest

from dualpipe_jax._schedule import ir
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.ir import Action, Pair
from tests.schedules_under_test import NAMES, compiled


def test_cells_are_written_in_the_grammar():
    pair = Pair(Action("F", 0, 7), Action("B", 7, 3))
    assert str(pair) == "(0F7;7B3)OVERLAP_F_B"
    assert [str(action) for action in pair.unit_actions()] == ["0F7", "7I3", "7W3"]


def test_routes_chunks_and_directions_are_read_off_the_rows():
    # Four stages down and up again over two ranks, as in DualPipeV.
    csv = "0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n"
    program = parse_program(csv, name="v")
    assert program.routes == ((0, 1, 1, 0),)
    assert program.chunk_of.tolist() == [[0, 0, 1, 1]]
    assert program.stage_of.tolist() == [[0, 1], [3, 2]]


def test_a_rank_may_have_fewer_chunks():
    program = parse_program("0F0,0B0,1F0,1B0\n2F0,2B0\n", name="uneven")
    assert program.stage_of.tolist() == [[0, 2], [1, -1]]


def test_equal_programs_hash_alike_and_others_differ():
    make = GENERATORS["1f1b"]
    program = make(num_ranks=2, num_microbatches=3)
    assert program == make(num_ranks=2, num_microbatches=3)
    assert hash(program) == hash(make(num_ranks=2, num_microbatches=3))
    assert program != dataclasses.replace(program, rows=program.rows[::-1])


def test_timeline_gives_the_actions_that_a_plot_draws():
    timeline = compiled("dualpipe", 4, 8).timeline
    assert timeline.num_ticks == 3 * 8 + 4 // 2 - 1
    tick, rank = 8, 0
    assert timeline.actions[tick][rank] == "3I5"
    assert timeline.opcode[tick, rank] == 2
    assert (timeline.stage[tick, rank], timeline.microbatch[tick, rank]) == (3, 5)
    assert timeline.direction[tick, rank] == 1
    pair = timeline.pair[tick, rank]
    assert [timeline.actions[t][r] for t, r in np.argwhere(timeline.pair == pair)] == [
        "0F3",
        "3I5",
        "3W5",
    ]
    idle = timeline.opcode == 0
    assert (timeline.pair[idle] == -1).all()
    assert (timeline.direction[idle] == -1).all()
    assert [action is None for row in timeline.actions for action in row] == idle.ravel().tolist()


@pytest.mark.parametrize("timetable", ["shortest", "aligned", "two-tick"])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes_are_those_that_are_written(name: str, timetable: str) -> None:
    """A dim of one name has one size in all arrays of a compiled schedule."""
    made = compiled(name, 4, 10, timetable)
    timeline, tables, units = made.timeline, made.tables, made.timeline.program.units
    written = [(timeline, vars(ir.Timeline)), (tables, {}), (units, {})]
    checked = 0
    with jaxtyping.jaxtyped("context"):
        of_ranks: Any = jaxtyping.Float[np.ndarray, " num_ranks"]
        assert isinstance(np.empty(tables.num_ranks), of_ranks)
        for record, properties in written:
            hints = get_type_hints(type(record))
            for attribute, value in properties.items():
                if isinstance(value, cached_property):
                    hints[attribute] = get_type_hints(value.func)["return"]
            for attribute, hint in hints.items():
                if hasattr(hint, "dim_str"):  # of jaxtyping
                    assert isinstance(getattr(record, attribute), hint), attribute
                    checked += 1
    assert checked > 25
