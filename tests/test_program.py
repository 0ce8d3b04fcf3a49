"""The compiled step is one program, the same size for any N, in place, with nothing stray."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from dualpipe_jax import _scopes
from dualpipe_jax._api import build
from dualpipe_jax._executor import Step, offload
from dualpipe_jax._executor.rank import Rank
from dualpipe_jax._executor.stages import Stages
from dualpipe_jax._predict import TRANSFER, StageLayers, compile_for, decide, usual_costs
from dualpipe_jax._predict.simulation import durations_of
from dualpipe_jax._schedule.actions import Opcode
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.exchanges import add_exchanges
from dualpipe_jax._schedule.generators.forward_only import forward_only
from dualpipe_jax._schedule.tables import Tables
from tests.hlo import AS_EVER, instructions, loop_lines
from tests.jaxprs import bytes_in, loops
from tests.models import (
    LENGTH,
    ROWS,
    WIDTH,
    assert_close,
    make_batch,
    make_mesh,
    make_model,
    make_params,
    sequential_value_and_grad,
)

NUM_RANKS, STAGE_LAYERS = 4, 2
# From a few more microbatches than ranks on, pipelines are full, and ticks have the same exchanges.
FEW, MANY = 12, 28
FEW_WITH_RUN, MANY_WITH_RUN = 24, 40

SHORTEST = dpj.Execution(overlap=False, split_backward=True)
FULL = dpj.Execution(overlap=False, split_backward=False)
RECOMPUTES_SPLIT = dpj.Execution(split_backward=True, deferred="recompute")
# Whether a deferred weight grad recomputes or finds a stash.
RECOMPUTES, STORES = (
    dpj.Execution(split_backward=False, deferred=each) for each in ("recompute", "store")
)


def lower_step(
    schedule: str, num_microbatches: int, *, trains: bool = False, **options: Any
) -> Any:
    """Lowers loss and gradients, and an AdamW update with them if it `trains`, as one program."""
    made = dpj.schedules.make(schedule, num_ranks=NUM_RANKS, num_microbatches=num_microbatches)
    model, params = make_model(), make_params(STAGE_LAYERS * made.num_stages)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    batch = make_batch(num_microbatches)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(NUM_RANKS),
        num_microbatches=num_microbatches,
        schedule=schedule,
        **options,
    )

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    if not trains:
        return jax.jit(grad_fn).lower(params, batch)
    return jax.jit(step).lower(params, optimizer.init(params), batch)


def compile_step(*args: Any, **options: Any) -> Any:
    return lower_step(*args, **options).compile(AS_EVER)


def make_tables(schedule: str, num_microbatches: int, *, overlap: bool) -> Tables:
    made = dpj.schedules.make(schedule, num_ranks=NUM_RANKS, num_microbatches=num_microbatches)
    return made.compiled(overlap=overlap).tables


@pytest.fixture(scope="module", params=dpj.schedules.names())
def compiled(request: pytest.FixtureRequest) -> Any:
    """A step of each schedule, and the number of lines of larger and smaller ones."""
    name = request.param
    options = {"execution": FULL, "trains": name == "dualpipe"}
    steps = {n: lower_step(name, n, **options) for n in (FEW, MANY)}
    lines = {n: step.as_text().count("\n") for n, step in steps.items()}
    return {"name": name, "lines": lines, FEW: steps[FEW].compile(AS_EVER), MANY: steps[MANY]}


@pytest.mark.slow
def test_one_executable_with_permutes_both_ways(compiled: Any) -> None:
    executable = compiled[FEW].runtime_executable()
    assert len(executable.hlo_modules()) == 1
    text = compiled[FEW].as_text()
    pairs = set(re.findall(r"collective-permute\(.*source_target_pairs=(\{\{.*?\}\})", text))
    for neighbours in ("0,1", "1,2", "2,3", "1,0", "2,1", "3,2"):
        assert any(f"{{{neighbours}}}" in pair for pair in pairs)
    mirror = "{{0,3},{1,2},{2,1},{3,0}}"
    assert (mirror in pairs) == (compiled["name"] in ("dualpipe", "chimera"))
    # Blocks stay where they are: nobody gathers them, and no gradient is reduced in the loop.
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert not any("all-reduce" in line for line in loop_lines(text))


@pytest.mark.slow
def test_program_size_does_not_grow_with_microbatches(compiled: Any) -> None:
    """But for exchanges, whose sets of pairs are others where actions are placed otherwise.

    (interleaved-paired has 2.1 % more lines with twice as many microbatches: more sets of pairs.)
    """
    assert compiled["lines"][MANY] == pytest.approx(compiled["lines"][FEW], rel=0.03)


@pytest.mark.slow
def test_buffers_are_updated_in_place(compiled: Any) -> None:
    """No loop copies a slot buffer, an accumulator or a stage's weights."""
    made = dpj.schedules.make(compiled["name"], num_ranks=NUM_RANKS, num_microbatches=FEW)
    costs = usual_costs(recomputes=False)
    options: dict[str, Any] = {"costs": costs, "transfer": TRANSFER * costs.forward}
    options["layers"] = StageLayers.cut((STAGE_LAYERS,) * made.num_stages)
    execution = decide(made, FULL, recomputes=False, **options)
    num_slots = compile_for(made, execution, **options)[0].tables.num_slots
    names = ("residual", "weight_residual", "deferred")
    _assert_in_place(compiled[FEW].as_text(), {num_slots[n] for n in names if n in num_slots})


@pytest.mark.slow
@pytest.mark.parametrize(("unroll", "full_backward"), [(True, False), (False, True)])
def test_buffers_of_layers_in_loops_are_updated_in_place(unroll: bool, full_backward: bool) -> None:
    """And of unrolled ones."""
    num_slots = make_tables("dualpipe", 8, overlap=False).num_slots
    names = ["residual", "weight_residual"] if full_backward else ["stash"]
    execution = dpj.Execution(overlap=False, unroll=unroll, split_backward=not full_backward)
    text = compile_step("dualpipe", 8, execution=execution).as_text()
    _assert_in_place(text, {num_slots[name] for name in names}, is_apart=unroll)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "full_backward"), [("dualpipe", False), ("zb-h1", True)])
def test_deferred_slots_are_updated_in_place(schedule: str, full_backward: bool) -> None:
    made = dpj.schedules.make(schedule, num_ranks=NUM_RANKS, num_microbatches=8)
    num_slots = compile_program(made.program, stash_deferred=False).tables.num_slots
    execution = dpj.Execution(overlap=False, split_backward=not full_backward)
    text = compile_step(schedule, 8, remat="block", execution=execution).as_text()
    _assert_in_place(text, {num_slots["weight_residual"], num_slots["deferred"]})


def _assert_in_place(text: str, num_slots: set[int], *, is_apart: bool = True) -> None:
    """Looks for copies; where `is_apart`, every layer has buffers and accumulators of its own."""
    layers = "" if is_apart else f"{STAGE_LAYERS},"
    buffers = [f"f64[{n},{layers}{ROWS},{LENGTH}," for n in num_slots]
    weights = [f"f64[{layers}{WIDTH},{WIDTH + 1}]", f"f64[{layers}{WIDTH + 1},{WIDTH}]"]
    lines = loop_lines(text)
    for shape in (*buffers, *weights):
        mine = [line for line in lines if f"= {shape}" in line]
        assert mine  # the shape looked for does exist in loops
        assert not [line for line in mine if " copy(" in line]


# ---- with a steady phase, unrolled


@pytest.fixture(scope="module", params=["dualpipe", "dualpipev"])
def compiled_with_run(request: pytest.FixtureRequest) -> Any:
    return {
        n: compile_step(request.param, n, execution=dpj.Execution(overlap=True))
        for n in (FEW_WITH_RUN, MANY_WITH_RUN)
    } | {"name": request.param}


def steady_lines(text: str) -> list[str]:
    """Lists the instructions that stand in the loop of the steady phase."""
    return [line for line in loop_lines(text) if _scopes.STEADY in line]


@pytest.mark.slow
def test_a_run_sends_between_the_pairs_that_it_names(compiled_with_run: Any) -> None:
    """Two permutes a beat, an x and a cotangent; nothing is sent for the weight grads."""
    steady = make_tables(compiled_with_run["name"], FEW_WITH_RUN, overlap=True).steady
    assert steady is not None
    sent = [
        re.search(r"source_target_pairs=\{(\S*)\}", line)
        for line in steady_lines(compiled_with_run[FEW_WITH_RUN].as_text())
        if " collective-permute(" in line
    ]
    named = [
        ",".join(f"{{{source},{target}}}" for source, target in pairs)
        for pairs in (*steady.x_pairs, *steady.cotangent_pairs)
    ]
    assert sorted(match[1] for match in sent if match) == sorted(named)


@pytest.mark.slow
def test_a_run_makes_no_choices_but_of_its_ends(compiled_with_run: Any) -> None:
    """Head and embedding stand in loops of one trip or none; blocks run on every rank."""
    text = compiled_with_run[FEW_WITH_RUN].as_text()
    lines = steady_lines(text)
    assert not [line for line in lines if " conditional(" in line]
    # Every rank runs the head in one of two beats at most, and the embedding's gradient; the
    # loops that order slots on CPUs carry a number alone and never run.
    loops_of_state = [line for line in lines if " while(" in line and "= s32[] while(" not in line]
    assert len(loops_of_state) == 2
    chosen = [line for line in lines if f"{_scopes.STEADY}/while/" in line]
    for action in (_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD):
        assert any(action in line for line in lines)
        assert not any(action in line for line in chosen)


@pytest.mark.slow
def test_the_steady_phase_updates_in_place(compiled_with_run: Any) -> None:
    """Slot buffers, accumulators and weights, a layer's each."""
    tables = make_tables(compiled_with_run["name"], FEW_WITH_RUN, overlap=True)
    slots = {tables.num_slots[name] for name in ("residual", "weight_residual")}
    _assert_in_place(compiled_with_run[FEW_WITH_RUN].as_text(), slots)


@pytest.mark.slow
def test_a_run_takes_no_more_for_more_microbatches(compiled_with_run: Any) -> None:
    """The program is as large, and memory grows by the batch and the tables only."""
    few, many = (compiled_with_run[n] for n in (FEW_WITH_RUN, MANY_WITH_RUN))
    sizes = [len(instructions(each.as_text())) for each in (few, many)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    num_ticks = make_tables(compiled_with_run["name"], MANY_WITH_RUN, overlap=True).num_ticks
    table_bytes = num_ticks * NUM_RANKS * len(Tables.columns()) * 4
    batch_bytes = 16 * ROWS * (LENGTH + 2) * 8
    few, many = (each.memory_analysis().temp_size_in_bytes for each in (few, many))
    assert many - few <= table_bytes + 2 * batch_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_microbatches(compiled: Any) -> None:
    """Beyond the batch and the tables; GPipe's does, so the measure can tell.

    A program's buffers have as many entries as its tables have slots: of schedules whose tables
    have no more, one is compiled. The steady phases of two others are above.
    """
    slots_of = [
        dpj.schedules.make(compiled["name"], num_ranks=NUM_RANKS, num_microbatches=n)
        .compiled()
        .tables.num_slots
        for n in (FEW, MANY)
    ]
    assert (slots_of[0] == slots_of[1]) == (compiled["name"] != "gpipe")
    if compiled["name"] not in ("gpipe", "1f1b"):
        return
    steps = compiled[FEW], compiled[MANY].compile(AS_EVER)
    few, many = (step.memory_analysis().temp_size_in_bytes for step in steps)
    made = dpj.schedules.make(compiled["name"], num_ranks=NUM_RANKS, num_microbatches=MANY)
    num_ticks = made.timeline().num_ticks
    table_bytes = num_ticks * NUM_RANKS * len(Tables.columns()) * 4
    batch_bytes = 16 * ROWS * (LENGTH + 2) * 8
    slot_bytes = STAGE_LAYERS * ROWS * LENGTH * WIDTH * 8  # of one of a layer's several residuals
    if compiled["name"] == "gpipe":
        assert many - few > 16 * slot_bytes
    else:
        assert many - few <= table_bytes + 2 * batch_bytes


POISONED = make_model(frozenset(["pytree", "block_has_aux"]))


@functools.cache
def sequential_of(num_layers: int, num_microbatches: int) -> Any:
    """Loss and gradients of the model of `make_step`, once for all tests."""
    step = sequential_value_and_grad(POISONED, num_microbatches)
    return step(make_params(num_layers), make_batch(num_microbatches))


def make_step(
    schedule: dpj.Schedule,
    *,
    tables: Any = None,
    remat: str = "none",
    num_layers: int = 11,
    execution: dpj.Execution = RECOMPUTES_SPLIT,
    **options: Any,
) -> Step:
    return Step(
        model=POISONED,
        tables=tables or schedule.compiled().tables,
        mesh=make_mesh(schedule.num_ranks),
        axis="pipe",
        block=build.block_of(POISONED, remat),
        num_layers=num_layers,
        execution=execution,
        **options,
    )


def has_nan(tree: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]
    return any(np.isnan(leaf).any() for leaf in leaves)


def assert_dead_values_are_never_read(
    schedule: dpj.Schedule, *, num_layers: int = 11, **options: Any
) -> None:
    """NaNs in every slot and message that should not be read change nothing: all is finite."""
    N = schedule.num_microbatches
    step = make_step(schedule, num_layers=num_layers, poison=True, **options)
    loss, grads = jax.jit(step)(make_params(num_layers), make_batch(N), None)
    want, want_grads = sequential_of(num_layers, N)
    assert_close(loss, want)
    # A step has the gradients of the leaves that have any.
    for part in ("ends", "blocks"):
        assert_close(grads[part], want_grads[part])


# Every other one with some slots on the host, in a loop over layers and without.
DEAD = [(name, 5, None if number % 2 else 2) for number, name in enumerate(dpj.schedules.names())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_microbatches", "slots_on_device"), [*DEAD, ("dualpipe", 8, 1)]
)
def test_dead_values_are_never_read(
    name: str,
    num_microbatches: int,
    slots_on_device: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    assert_dead_values_are_never_read(
        dpj.schedules.make(name, num_ranks=4, num_microbatches=num_microbatches),
        execution=dataclasses.replace(
            RECOMPUTES_SPLIT,
            unroll=False if name == "chimera" else None,
            slots_on_device=slots_on_device,
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "full_backward"), [("interleaved-1f1b", False), ("zb-h1", True)])
def test_dead_values_are_never_read_in_two_ticks(name: str, full_backward: bool) -> None:
    schedule = dpj.schedules.make(name, num_ranks=4, num_microbatches=5)
    tables = compile_program(
        schedule.program,
        timetable="two-tick",
        stash_deferred=not full_backward,
        full_backward=full_backward,
    ).tables
    execution = dpj.Execution(split_backward=not full_backward, deferred="store")
    assert_dead_values_are_never_read(schedule, tables=tables, execution=execution)


@pytest.mark.slow
def test_poison_is_found_when_a_lazy_arrival_is_read_too_soon() -> None:
    """In the tick after the one that makes it, when it is on its way."""
    schedule = dpj.schedules.make("1f1b", num_ranks=2, num_microbatches=3)
    wrong = dataclasses.replace(schedule.compiled().tables, is_lazy=True)
    step = make_step(schedule, tables=wrong, num_layers=2, poison=True)
    _, grads = jax.jit(step)(make_params(2), make_batch(3), None)
    assert has_nan(grads["blocks"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_layers", "in_halves"),
    [("1f1b", 8, True), ("dualpipe", 8, True), ("zb-h1", 8, False), ("zb-h1", 11, True)],
)
def test_dead_values_are_never_read_by_full_backwards(
    name: str, num_layers: int, in_halves: bool
) -> None:
    """In a row and in a loop; stashes are kept for deferred weight grads alone."""
    schedule = dpj.schedules.make(name, num_ranks=4, num_microbatches=5)
    whole_stages = frozenset() if in_halves else frozenset(range(schedule.num_stages))
    made = compile_program(
        schedule.program, stash_deferred=False, full_backward=True, whole_stages=whole_stages
    )
    assert (Opcode.BACKWARD_UPPER in made.tables.opcodes) == in_halves
    assert_dead_values_are_never_read(
        schedule,
        tables=made.tables,
        num_layers=num_layers,
        execution=dpj.Execution(split_backward=False, deferred="store"),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "full_backward"),
    [("dualpipe", False), ("dualpipev", False), ("zb-h1", False), ("zb-h1", True)],
)
def test_dead_values_are_never_read_by_recomputing_weight_grads(
    name: str, full_backward: bool
) -> None:
    schedule = dpj.schedules.make(name, num_ranks=4, num_microbatches=5)
    tables = compile_program(
        schedule.program, stash_deferred=False, full_backward=full_backward
    ).tables
    assert tables.num_slots["deferred"]
    execution = dpj.Execution(split_backward=not full_backward, deferred="recompute")
    assert_dead_values_are_never_read(schedule, tables=tables, remat="block", execution=execution)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_layers", "remat", "unroll", "full_backward"),
    [
        ("dualpipe", 8, "block", None, False),
        ("dualpipe", 8, "none", False, False),
        ("dualpipe", 8, "block", False, True),
        ("dualpipe", 20, "none", 2, True),
        ("dualpipev", 11, "none", None, False),  # unlike stages
        ("dualpipev", 8, "none", None, True),
    ],
)
def test_dead_values_are_never_read_in_a_run(
    name: str,
    num_layers: int,
    remat: str,
    unroll: bool | int | None,
    full_backward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In both memories: of five slots or more, three stay on the device."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    schedule = dpj.schedules.make(name, num_ranks=4, num_microbatches=10)
    stash_deferred = remat == "none"
    tables = compile_program(
        schedule.program,
        timetable="aligned",
        stash_deferred=stash_deferred and not full_backward,
        full_backward=full_backward,
    ).tables
    assert tables.steady is not None
    assert (Opcode.BACKWARD_UPPER in tables.opcodes) == full_backward
    assert_dead_values_are_never_read(
        schedule,
        tables=tables,
        num_layers=num_layers,
        remat=remat,
        execution=dpj.Execution(
            unroll=unroll,
            split_backward=not full_backward,
            deferred="store" if stash_deferred else "recompute",
            slots_on_device=3,
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("late_ranks", "remat"), [((0, 1), "none"), ((1,), "block")])
def test_a_stash_in_use_through_the_steady_phase(late_ranks: tuple[int, ...], remat: str) -> None:
    """In a user's own schedule some ranks defer the W before their pairs until after them."""
    rows = dpj.schedules.make("dualpipe", num_ranks=2, num_microbatches=8).to_csv().splitlines()
    for rank in late_ranks:
        cells = [cell for cell in rows[rank].split(",") if cell]
        pairs = [i for i, cell in enumerate(cells) if "OVERLAP" in cell]
        early = max(i for i, cell in enumerate(cells[: pairs[0]]) if "B" in cell)
        cells.insert(pairs[-1] + 1, cells[early].replace("B", "W"))
        cells[early] = cells[early].replace("B", "I")
        rows[rank] = ",".join(cells)
    schedule = dpj.Schedule.from_csv("\n".join(rows))
    tables = compile_program(
        schedule.program, timetable="aligned", stash_deferred=remat == "none"
    ).tables
    assert tables.steady is not None
    assert tables.steady.idle == (() if remat == "none" else ("stash",))
    assert_dead_values_are_never_read(schedule, tables=tables, remat=remat, num_layers=4)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["x_slot", "cotangent_slot"])
def test_poison_is_found_when_a_run_leaves_a_value_elsewhere(field: str) -> None:
    schedule = dpj.schedules.make("dualpipe", num_ranks=2, num_microbatches=6)
    tables = schedule.compiled(overlap=True).tables
    assert tables.steady is not None
    nowhere: dict[str, Any] = {field: np.full_like(getattr(tables.steady, field), -1)}
    wrong = dataclasses.replace(tables, steady=dataclasses.replace(tables.steady, **nowhere))
    step = make_step(schedule, tables=wrong, num_layers=2, poison=True)
    _, grads = jax.jit(step)(make_params(2), make_batch(6), None)
    assert has_nan(grads["blocks"])


@pytest.mark.slow
def test_exchanges_in_parts_send_all_values() -> None:
    """Eight ranks in a ring, in four parts: exact with NaN in place of all that is not sent.

    Also where values are sent later than made.
    """
    schedule = dpj.schedules.make("interleaved-1f1b", num_ranks=8, num_microbatches=16)
    durations = durations_of(schedule, usual_costs(recomputes=False), transfer=TRANSFER)
    tables = compile_program(schedule.program, durations=durations).tables
    assert tables.wraps
    assert len(tables.exchanges) == 4
    assert (tables.send >= 0).any()
    assert_dead_values_are_never_read(schedule, tables=tables, num_layers=16)


@pytest.mark.slow
@pytest.mark.parametrize("num_parts", [1, 3])
def test_poison_is_found_when_a_pair_is_dropped(num_parts: int) -> None:
    schedule = dpj.schedules.make("1f1b", num_ranks=4, num_microbatches=5)
    tables = add_exchanges(schedule.compiled().tables, num_parts=num_parts)
    # The exchange with the most pairs to the right, of which others are left in one part.
    parts = [list(of_part) for of_part in tables.exchanges]
    of_part = max(parts, key=lambda of_part: max(len(right) for right, _ in of_part))
    number = max(range(len(of_part)), key=lambda number: len(of_part[number][0]))
    right, left = of_part[number]
    assert (len(right) > 1) == (num_parts == 1)
    of_part[number] = right[1:], left
    wrong = dataclasses.replace(tables, exchanges=tuple(map(tuple, parts)))
    step = make_step(schedule, tables=wrong, num_layers=4, poison=True)
    _, grads = jax.jit(step)(make_params(4), make_batch(5), None)
    assert has_nan(grads["blocks"])


@pytest.mark.slow
def test_poison_is_found_when_a_dead_deferred_value_is_read() -> None:
    schedule = dpj.schedules.make("zb-h1", num_ranks=4, num_microbatches=5)
    tables = compile_program(schedule.program, stash_deferred=False).tables
    deferred = tables.deferred.copy()
    tick, rank = np.argwhere(tables.opcode == Opcode.WEIGHT_GRAD_DEFERRED)[-1]
    deferred[tick, rank] = (deferred[tick, rank] + 1) % tables.num_slots["deferred"]
    wrong = dataclasses.replace(tables, deferred=deferred)
    step = make_step(schedule, tables=wrong, remat="block", num_layers=4, poison=True)
    _, grads = jax.jit(step)(make_params(4), make_batch(5), None)
    assert has_nan(grads["blocks"])


WIDE = dpj.Model(
    embed=lambda ends, ctx: ctx.microbatch * ends,
    block=lambda params, x, ctx: x + jnp.tanh(x @ params["up"]) @ params["down"],
    head=lambda ends, x, ctx: jnp.square(x).mean(),
)


def trace_wide_step(schedule: str, *, num_layers: int = 4, **options: Any) -> Any:
    """Traces loss and gradients of wide layers over four ranks."""
    width, rows = 16, 64
    shapes = {"up": (width, 8 * width), "down": (8 * width, width)}
    blocks = {name: jnp.ones((num_layers, *shape)) for name, shape in shapes.items()}
    params, batch = {"ends": jnp.ones(()), "blocks": blocks}, jnp.ones((8 * rows, width))
    grad_fn = dpj.value_and_grad(
        WIDE, mesh=make_mesh(4), num_microbatches=8, schedule=schedule, **options
    )
    return jax.jit(grad_fn).trace(params, batch)


def wide_step(schedule: str, **options: Any) -> Any:
    """Compiles it."""
    return trace_wide_step(schedule, **options).lower().compile(AS_EVER)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_idle_slots_are_not_carried_through_the_steady_phase(
    remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a beat has its stash; the slot it does without is an array [64, 128] at the least."""
    options = {"remat": remat, "execution": dpj.Execution(overlap=True, split_backward=True)}
    _, without = loops(trace_wide_step("dualpipe", **options).jaxpr)
    monkeypatch.setattr(Stages, "idle_in", lambda self, steady: ())
    _, carries_it = loops(trace_wide_step("dualpipe", **options).jaxpr)
    assert bytes_in(carries_it) - bytes_in(without) >= 64 * 128 * 8


@pytest.mark.slow
def test_layers_of_full_backwards_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else half of a stage recomputes at once: hidden units, [64, 128] a layer, are alive."""
    options = {
        "remat": "block",
        "execution": dpj.Execution(unroll=True, split_backward=False),
    }
    of_size = {}
    for takes_turns in (True, False):
        if not takes_turns:
            monkeypatch.setattr(Rank, "first_turn", lambda self, row: None)
        step = wide_step("1f1b", num_layers=24, **options)  # three layers in a half
        of_size[takes_turns] = step.memory_analysis().temp_size_in_bytes
    assert of_size[False] - of_size[True] >= 2 * 64 * 128 * 8


@pytest.mark.slow
def test_recomputing_weight_grads_have_no_stash_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slot of a stash, two arrays [64, 128] at least, ends before it and is made again."""
    options = {"remat": "block", "execution": SHORTEST}
    without = wide_step("zb-h1", **options).memory_analysis().temp_size_in_bytes
    monkeypatch.setattr("dualpipe_jax._executor.actions.empty_after", lambda stash, **_: stash)
    carried = wide_step("zb-h1", **options).memory_analysis().temp_size_in_bytes
    assert carried - without >= 64 * 128 * 8


@pytest.mark.slow
def test_slots_made_again_bring_no_collectives_where_xla_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They wait for accumulators, of which an entry may be on another device."""
    mesh = jax.make_mesh((2, 2), ("pipe", "model"), axis_types=(AxisType.Auto,) * 2)

    def over(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = {
        "ends": over(),
        "blocks": {"up": over("pipe", None, "model"), "down": over("pipe", "model", None)},
    }
    blocks = {"up": jnp.ones((2, 8, 16)), "down": jnp.ones((2, 16, 8))}
    params = jax.device_put({"ends": jnp.ones(()), "blocks": blocks}, shardings)
    batch = jax.device_put(jnp.ones((8, 8)), over())
    grad_fn = dpj.value_and_grad(
        WIDE,
        mesh=mesh,
        num_microbatches=4,
        schedule="zb-h1",
        remat="block",
        execution=dpj.Execution(split_backward=True),
    )

    def collectives() -> list[str]:
        text = jax.jit(lambda *args: grad_fn(*args)).lower(params, batch).compile().as_text()
        return re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)\(", text or "")

    mine = collectives()
    monkeypatch.setattr("dualpipe_jax._executor.actions.empty_after", lambda stash, **_: stash)
    assert mine == collectives()
    assert "all-reduce" in mine


@pytest.mark.slow
def test_deferred_weight_grads_take_less_memory_under_remat() -> None:
    """A layer's input and cotangent, [64, 16] each, replace the operands of its hidden units."""
    sizes = {
        stores: wide_step("zb-h1", remat="block", execution=execution)
        .memory_analysis()
        .temp_size_in_bytes
        for stores, execution in ((False, RECOMPUTES), (True, STORES))
    }
    made = dpj.schedules.make("zb-h1", num_ranks=4, num_microbatches=8)
    num_stashes = made.timeline().num_slots["stash"]
    # A stash is two arrays [64, 128] at least. One stays, for the weight grads that follow at once.
    assert sizes[True] - sizes[False] > (num_stashes - 1) * 64 * 128 * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "remat", "is_same"),
    [("zb-h1", "none", True), ("1f1b", "block", True), ("zb-h1", "block", False)],
)
def test_a_program_that_recomputes_nothing_is_as_it_was(
    schedule: str, remat: str, is_same: bool
) -> None:
    """Without remat, or with nothing deferred, there is no trace of it in the program."""
    few, many = (
        trace_wide_step(schedule, remat=remat, execution=each).lower().as_text()
        for each in (RECOMPUTES, STORES)
    )
    assert (few == many) == is_same


@pytest.mark.slow
def test_evaluation_never_reads_dead_values() -> None:
    schedule = dpj.Schedule(forward_only(num_ranks=4, num_microbatches=5))
    step = make_step(schedule, num_layers=4, poison=True)
    loss, _ = jax.jit(step)(make_params(4), make_batch(5), None)
    assert_close(loss, sequential_of(4, 5)[0])


@pytest.mark.slow
def test_poison_is_found_when_a_dead_value_is_read() -> None:
    """The test above can fail: one wrong slot in the tables, and the loss is NaN."""
    schedule = dpj.schedules.make("dualpipe", num_ranks=4, num_microbatches=8)
    tables = schedule.compiled().tables
    read = tables.read.copy()
    reads_a_slot = np.argwhere((tables.opcode == 1) & (read >= 0))
    tick, rank = reads_a_slot[len(reads_a_slot) // 2]
    read[tick, rank] = (read[tick, rank] + 1) % tables.num_slots["received"]
    wrong = dataclasses.replace(tables, read=read)
    step = make_step(schedule, tables=wrong, num_layers=4, poison=True)
    loss, _ = jax.jit(step)(make_params(4), make_batch(8), None)
    assert np.isnan(loss)
