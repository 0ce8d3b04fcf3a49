"""Placement by the clock: the same program, in ticks in which ranks wait less for each other."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule import compile as compiling
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.durations import Durations
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._schedule.replay import replay, replay_dependencies
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._schedule.verify import verify_tables
from tests import table_interpreter
from tests.schedule.mutations import draw_changed
from tests.schedule.random_programs import programs
from tests.schedules_under_test import NAMES

# The timetables in which a value may be read a tick after it is made.
TIMETABLES = ("shortest", "aligned")
# Odd and even sizes, with a steady phase in the aligned timetable and without.
SIZES = ((1, 1), (1, 5), (2, 3), (2, 8), (3, 4), (3, 10), (4, 9), (5, 16), (8, 18))


def make_durations(num_stages: int, **changed: Any) -> Durations:
    """Makes those of equal stages that take 1 each, but for the changes."""
    equal: dict[str, Any] = {
        "of_opcode": ((0.0,) * num_stages, *[(1.0,) * num_stages] * 3),
        "recompute": (0.0,) * num_stages,
        "upper_share": (0.5,) * num_stages,
        "full_backward": None,
        "embed_grad": 0.0,
        "transfer": 0.0,
    }
    return Durations(**equal | changed)


@st.composite
def durations(draw: Any, num_stages: int, *, full_backward: bool = False) -> Durations:
    """Draws those of unlike stages, some of whose actions take no time."""
    # Not too small: sums of very unlike terms lose the small ones.
    each = st.integers(0, 3).map(float) | st.floats(0.01, 3)

    def of_stages(values: st.SearchStrategy[float]) -> tuple[float, ...]:
        return tuple(draw(st.lists(values, min_size=num_stages, max_size=num_stages)))

    forward, input_grad, weight_grad = (of_stages(each) for _ in range(3))
    return make_durations(
        num_stages,
        of_opcode=((0.0,) * num_stages, forward, input_grad, weight_grad),
        recompute=of_stages(st.just(0.0) | st.just(1.0)),
        upper_share=of_stages(st.sampled_from([0.5, 2 / 3, 1.0])),
        full_backward=draw(st.sampled_from([0.8, 1.0])) if full_backward else None,
        transfer=draw(st.sampled_from([0.0, 0.1, 2.0])),
    )


def order_of(made: Compiled) -> list[list[str]]:
    """Lists each rank's actions, tick after tick: knows no program."""
    return [
        [action for action in row if action] for row in zip(*made.timeline.actions, strict=True)
    ]


def seconds(made: Compiled, durations: Durations, *, idle: float = 0.0) -> float:
    work = durations.work(made.tables)
    work[made.tables.opcode == 0] = idle
    return float(replay(made.tables, work, transfer=durations.transfer).max())


def assert_only_waits_less(program: Program, durations: Durations, **options: Any) -> Compiled:
    """Compiles a program with and without durations; all verifiers run there."""
    plain = compile_program(program, **options)
    placed = compile_program(program, **options, durations=durations)
    assert order_of(placed) == order_of(plain)
    one, other = plain.tables.steady, placed.tables.steady
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        for name in ("num_beats", "x_pairs", "cotangent_pairs", "idle"):
            assert getattr(one, name) == getattr(other, name), name
        assert plain.timeline.actions[one.ticks] == placed.timeline.actions[other.ticks]
    # How many live at once hangs on each rank's order alone, but for values on their way.
    for name in plain.tables.num_slots.keys() - {"received"}:
        assert plain.tables.num_slots[name] == placed.tables.num_slots[name], name
    # Idle ticks cost a little, by the compiler's measure.
    idle = 0.02 * min(durations.of_opcode[1])
    assert seconds(placed, durations, idle=idle) <= seconds(plain, durations, idle=idle) + 1e-9
    # With the same order all values can be there as soon as without.
    least = [
        replay_dependencies(m.timeline, durations.work(m.tables), transfer=durations.transfer).max()
        for m in (plain, placed)
    ]
    np.testing.assert_allclose(*least, rtol=1e-12)
    assert least[1] <= seconds(placed, durations) * (1 + 1e-12)
    return placed


# ---- of all programs


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_random_programs_only_wait_less(data: Any) -> None:
    program = data.draw(programs())
    full_backward = data.draw(st.booleans())
    drawn = data.draw(durations(program.num_stages, full_backward=full_backward))
    stash_deferred = data.draw(st.booleans())
    placed = assert_only_waits_less(
        program, drawn, full_backward=full_backward, stash_deferred=stash_deferred
    )
    if not program.forward_only:
        table_interpreter.assert_computes_loss_and_grads(placed.tables)


@pytest.mark.parametrize("timetable", TIMETABLES)
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_schedules_only_wait_less(name: str, timetable: str, data: Any) -> None:
    size = data.draw(st.sampled_from(SIZES))
    program = GENERATORS[name](num_ranks=size[0], num_microbatches=size[1])
    full_backward = data.draw(st.booleans())
    drawn = data.draw(durations(program.num_stages, full_backward=full_backward))
    placed = assert_only_waits_less(
        program,
        drawn,
        timetable=timetable,
        full_backward=full_backward,
        stash_deferred=data.draw(st.booleans()),
    )
    table_interpreter.assert_computes_loss_and_grads(placed.tables)


@pytest.mark.parametrize("name", ["interleaved-1f1b", "dualpipe"])
@given(column=st.sampled_from(Tables.columns()), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_entry_is_caught_where_values_are_sent_later(
    name: str, column: str, data: Any
) -> None:
    program = GENERATORS[name](num_ranks=4, num_microbatches=8)
    of_opcode = _of_opcode(1, 2.08, 0.84, num_stages=program.num_stages)
    unlike = make_durations(program.num_stages, of_opcode=of_opcode)
    tables = compile_program(program, timetable="aligned", durations=unlike).tables
    assert (tables.send >= 0).any()
    assert (tables.steady is not None) == (name == "dualpipe")
    with pytest.raises(ScheduleError):
        verify_tables(draw_changed(data, tables, column))


@pytest.mark.parametrize("name", NAMES)
def test_equal_durations_leave_ticks_as_they_were(name: str) -> None:
    for num_ranks, num_microbatches in SIZES:
        program = GENERATORS[name](num_ranks=num_ranks, num_microbatches=num_microbatches)
        for timetable in ("shortest", "aligned"):
            plain = compile_program(program, timetable=timetable)
            equal = make_durations(program.num_stages)
            placed = compile_program(program, timetable=timetable, durations=equal)
            # Alignment costs ticks before a steady phase of odd sizes, or of rounds of the ranks;
            # placement by the clock gives these back.
            is_odd = num_ranks % 2 or num_microbatches % 2 or name == "interleaved-paired"
            if (
                plain.tables.steady is not None
                and is_odd
                and placed.timeline.num_ticks < plain.timeline.num_ticks
            ):
                continue
            assert (placed.timeline.tick_of == plain.timeline.tick_of).all(), (num_ranks, timetable)
            assert len(placed.tables.exchanges) == 1


@pytest.mark.parametrize("name", ["interleaved-1f1b", "dualpipe", "dualpipev"])
def test_is_made_once_and_made_the_same_again(name: str) -> None:
    program = GENERATORS[name](num_ranks=4, num_microbatches=10)
    unlike = make_durations(
        program.num_stages,
        of_opcode=tuple((each,) * program.num_stages for each in (0, 1, 2.08, 0.923)),
        transfer=0.1,
    )
    made = []
    for _ in range(2):
        compiling._compile.cache_clear()
        made.append(compile_program(program, timetable="aligned", durations=unlike))
        again = dataclasses.replace(unlike)
        assert compile_program(program, timetable="aligned", durations=again) is made[-1]
    first, second = made
    assert first is not second
    assert (first.timeline.tick_of == second.timeline.tick_of).all()
    assert first.tables.exchanges == second.tables.exchanges
    assert (first.tables.exchange == second.tables.exchange).all()


def test_large_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    program = GENERATORS["interleaved-1f1b"](num_ranks=4, num_microbatches=8)
    unlike = make_durations(
        program.num_stages, of_opcode=tuple((each,) * program.num_stages for each in (0, 1, 3, 2))
    )
    plain = compile_program(program)

    def is_left_alone(most_placed: int) -> bool:
        monkeypatch.setattr(compiling, "_MOST_PLACED", most_placed)
        compiling._compile.cache_clear()
        placed = compile_program(program, durations=unlike)
        compiling._compile.cache_clear()
        return bool(
            placed.timeline.num_ticks == plain.timeline.num_ticks
            and (placed.timeline.tick_of == plain.timeline.tick_of).all()
            and placed.tables.exchanges == plain.tables.exchanges
        )

    # So are timetables in which no transfer is urgent.
    lazy = [compile_program(program, timetable="two-tick", durations=d) for d in (None, unlike)]
    assert (lazy[0].timeline.tick_of == lazy[1].timeline.tick_of).all()
    assert is_left_alone(len(program.units) - 1)
    assert not is_left_alone(len(program.units))


def _of_opcode(*of_each: float, embed_grad: float = 0.0, num_stages: int = 8) -> Any:
    rows = [[each] * num_stages for each in (0.0, *of_each)]
    rows[2][0] += embed_grad
    return tuple(map(tuple, rows))


@pytest.mark.parametrize(
    ("name", "size", "field", "value", "more", "options"),
    [
        ("gpipe", (4, 6), "transfer", 1.0, {}, {}),
        ("dualpipev", (4, 6), "recompute", (2.0,) * 8, {}, {"stash_deferred": False}),
        ("dualpipev", (4, 8), "upper_share", (0.9,) * 8, {}, {"full_backward": True}),
        ("dualpipev", (4, 8), "full_backward", 0.5, {}, {"full_backward": True}),
        (
            *("dualpipev", (4, 8), "embed_grad", 2.0),
            {"of_opcode": _of_opcode(1, 1, 1, embed_grad=2)},
            {"full_backward": True},
        ),
    ],
)
def test_each_of_the_durations_counts(
    name: str, size: tuple[int, int], field: str, value: Any, more: Any, options: Any
) -> None:
    """A program placed by them is faster than one placed without one of them."""
    program = GENERATORS[name](num_ranks=size[0], num_microbatches=size[1])
    if options.get("full_backward"):
        more = {"full_backward": 1.0, **more}
    without = make_durations(program.num_stages, **more)
    those = dataclasses.replace(without, **{field: value})
    made, of_those = (
        compile_program(program, durations=each, **options) for each in (without, those)
    )
    assert seconds(of_those, those) < seconds(made, those) * (1 - 1e-3)


@pytest.mark.parametrize(
    ("constant", "fewer", "name", "size", "of_each"),
    [
        ("_PATIENCE", (np.inf,), "interleaved-1f1b", (5, 20), (1, 2.08, 0.84)),
        ("_PARTS", (1,), "interleaved-1f1b", (8, 16), (0.5, 1.04, 0.4615)),
    ],
)
def test_tried_timetables_pay(
    constant: str,
    fewer: Any,
    name: str,
    size: tuple[int, int],
    of_each: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Patience, and exchanges in parts, by two hundredths at the least."""
    program = GENERATORS[name](num_ranks=size[0], num_microbatches=size[1])
    of_opcode = _of_opcode(*of_each, num_stages=program.num_stages)
    those = make_durations(program.num_stages, of_opcode=of_opcode, transfer=0.1)
    compiling._compile.cache_clear()
    tried = compile_program(program, timetable="aligned", durations=those)
    monkeypatch.setattr(compiling, constant, fewer)
    compiling._compile.cache_clear()
    without = compile_program(program, timetable="aligned", durations=those)
    compiling._compile.cache_clear()
    assert seconds(tried, those) * 1.02 < seconds(without, those)


# ---- by hand


def test_false_waits_by_hand() -> None:
    """Forwards take three: rank 0 need not wait for 1I1 before 0F2, but after it, for nothing."""
    program = GENERATORS["zb-h1"](num_ranks=2, num_microbatches=3)
    forward_3 = make_durations(2, of_opcode=_of_opcode(3, 1, 1, num_stages=2))
    plain, placed = (compile_program(program, durations=each) for each in (None, forward_3))
    # 1I1 ends at 11. Sent as early as possible, it leaves between 0W0, which ends at 9, and 0F2:
    # that ends at 11 + 3. Placed by the clock, rank 1 keeps it, ends 1W1 at 12, and sends it then,
    # as 0F2 ends at 9 + 3.
    for made in (plain, placed):
        assert show(made) == [
            "0F0 0F1 ... 0I0 0W0 0F2 0I1 0W1 0I2 0W2",
            "... 1F0 1I0 1F1 1I1 1W1 1F2 1I2 1W2 1W0",
        ]
    name, sent_in = placed.program.units.name, placed.timeline.sent_in
    late = np.flatnonzero(sent_in > placed.timeline.tick_of).tolist()
    assert [(name(action), int(sent_in[action])) for action in late] == [("1I1", 5)]
    assert plain.timeline.sent_in.tolist() == plain.timeline.tick_of.tolist()
    assert (seconds(plain, forward_3), seconds(placed, forward_3)) == (20, 18)


def show(made: Compiled) -> list[str]:
    """Draws a timeline, a line a rank."""
    rows = zip(*made.timeline.actions, strict=True)
    return [" ".join(action or "..." for action in row) for row in rows]
