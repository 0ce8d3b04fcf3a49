"""One tick of one rank: store the values that arrived, run this rank's action, send.

The tables name the action; everything but the rank is static. For each chunk the program has each
kind of action once, which the rank's opcode runs or skips, without a collective over the pipeline
axis. The tick's exchange follows: two permutes that send activations and cotangents to the right
and to the left between the ranks of its pairs. For each part of the line of ranks the program has a
branch for each exchange, and all ranks take the same branch.

Lazy tables have no exchanges: a tick begins with two permutes between all neighbours, which send
the values of the tick before, and ends by storing the values that arrive. The action reads none of
these, so that a compiler may start the permutes before the action and wait for them after it.

Actions are chosen by loops that run their body once or not at all (`when`), not by `lax.switch`:
XLA copies every array that passes through a conditional, in every tick all slots and sums, but
updates an array that passes through a loop in place. (On CPU, a transformer of width 256 on two
ranks: a switch copied every buffer twice a tick, loops copy nothing.)
"""

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax import _scopes
from dualpipe_jax._executor import buffers
from dualpipe_jax._executor.actions import embed, embed_grad, head, run_backward, run_forward
from dualpipe_jax._executor.buffers import when
from dualpipe_jax._executor.layer import LayerWork
from dualpipe_jax._executor.rank import Rank, Row
from dualpipe_jax._executor.state import State
from dualpipe_jax._leaves.pick import pick, put_leaves
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.actions import (
    COTANGENT,
    DEFERRED,
    FORWARD,
    MIDDLE,
    Opcode,
    X,
    opcodes_that,
)
from dualpipe_jax._schedule.tables import Exchange, Pairs, Tables

# The columns of the slots in which values from the left and from the right are stored.
ARRIVALS = ("from_left", "from_right")


def rows_of(tables: Tables, columns: Sequence[str], axis: str) -> Row:
    """Takes this rank's columns of the tables: int32[num_ticks] for each, and `exchange`."""
    table = np.stack([getattr(tables, name) for name in columns], axis=-1)
    columns_of_rank = lax.dynamic_index_in_dim(
        jnp.asarray(table, jnp.int32), lax.axis_index(axis), axis=1, keepdims=False
    )
    rows = {name: columns_of_rank[:, i] for i, name in enumerate(columns)}
    return {**rows, "exchange": jnp.asarray(tables.exchange)}


def make_tick(rank: Rank, tables: Tables) -> Callable[[State, Row], State]:
    """Makes the function that runs one row of the tables."""

    @jax.named_scope(_scopes.RAMP)
    def tick(state: State, row: Row) -> State:
        slot = spare_slots(state, row, "read", "keep")
        if rank.settings.defers:
            slot |= _deferred_slots(row)
        if tables.is_lazy:
            arrived = _permute(rank, tables.neighbours, *state.messages)
        else:
            state, arrived = store_arrivals(state, row, state.messages), ()
        state, out = _act(rank, tables, state, {**row, **slot})
        if rank.settings.poison:
            state, out = _poison_dead(rank, tables, state, out, {**row, **slot})
        state = state._replace(received=buffers.write(state.received, out, slot["keep"]))
        if tables.is_lazy:
            return store_arrivals(state, row, arrived)._replace(messages=(out,))
        if "send" in row:
            state, out = _sent(rank, state, out, row)
        return state._replace(messages=_exchange(rank, tables.exchanges, row["exchange"], out))

    return tick


def _sent(rank: Rank, state: State, out: PyTree, row: Row) -> tuple[State, PyTree]:
    """Chooses the value that a rank sends: its action's output, or one that it has kept until now.

    A kept value is read after the output was stored: a write after the read would copy all slots.
    """
    slot = spare_slots(state, row, "send")["send"]
    kept, is_late = buffers.read(state.received, slot), row["send"] >= 0
    out = jax.tree.map(partial(jnp.where, is_late), kept, out)
    if rank.settings.poison:
        state = state._replace(received=buffers.poison(state.received, slot))
    return state, out


def store_arrivals(state: State, row: Row, arrived: Sequence[PyTree]) -> State:
    """Stores the values that have arrived from the left and from the right."""
    slot = spare_slots(state, row, *ARRIVALS)
    received = state.received
    for name, values in zip(ARRIVALS, arrived, strict=True):
        received = buffers.write(received, values, slot[name])
    return state._replace(received=received)


def spare_slots(state: State, row: Row, *columns: str) -> Row:
    """Replaces a received slot of -1, none, by the last one, the spare."""
    last = jax.tree.leaves(state.received)[0].shape[0] - 1
    return {name: jnp.where(row[name] < 0, last, row[name]) for name in columns}


def _exchange(
    rank: Rank, exchanges: Sequence[Sequence[Exchange]], numbers: jax.Array, out: PyTree
) -> tuple[PyTree, PyTree]:
    """Sends to the right and to the left, and returns the values from the left and the right.

    Each link belongs to one part, in which its value arrives.
    """
    first, *others = exchanges
    if not others:
        # Not in a loop: there 1F1B took 262 MiB instead of 179 (TPU v5e, MLP of width 1024).
        return lax.switch(numbers[0], [partial(_permute, rank, pairs, out) for pairs in first])

    def in_part(
        part: Sequence[Exchange], number: jax.Array, arrived: tuple[PyTree, PyTree]
    ) -> tuple[PyTree, PyTree]:
        # Not the first one, which is empty.
        new = lax.switch(number - 1, [partial(_permute, rank, pairs, out) for pairs in part[1:]])
        from_left, from_right = (
            jax.tree.map(partial(jnp.where, _is_target(rank, links)), *both)
            for links, *both in zip(_links(part), new, arrived, strict=True)
        )
        return from_left, from_right

    nothing = buffers.allocate(out, poison=rank.settings.poison)
    arrived = nothing, nothing
    for number, part in zip(numbers, exchanges, strict=True):
        # Skipped where nothing is sent: a part's arrivals are not merged in every tick.
        arrived = when(number > 0, partial(in_part, part, number), arrived)
    return arrived


def _links(part: Sequence[Exchange]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Lists the pairs of a part's exchanges, to the right and to the left."""
    right, left = ({pair for pairs in part for pair in pairs[side]} for side in range(2))
    return right, left


def _permute(rank: Rank, exchange: Exchange, out: PyTree) -> tuple[PyTree, PyTree]:
    """Runs the permutes of an exchange."""
    nothing = buffers.allocate(out, poison=rank.settings.poison)

    def permute(pairs: Pairs) -> PyTree:
        if not pairs:
            return nothing
        with jax.named_scope(_scopes.SEND):
            arrived = lax.ppermute(out, rank.stages.axis, pairs)
        if not rank.settings.poison:
            return arrived
        # A permute gives zeros to ranks to which nothing is sent.
        is_target = _is_target(rank, pairs)
        return jax.tree.map(partial(jnp.where, is_target), arrived, nothing)

    to_right, to_left = exchange
    return permute(to_right), permute(to_left)


def _is_target(rank: Rank, pairs: Collection[tuple[int, int]]) -> jax.Array:
    """Whether something is sent to this rank."""
    ranks = np.arange(rank.stages.stage_of.shape[1])
    is_target = np.isin(ranks, [target for _, target in pairs])
    return jnp.asarray(is_target)[lax.axis_index(rank.stages.axis)]


def _act(rank: Rank, tables: Tables, state: State, row: Row) -> tuple[State, PyTree]:
    """Runs this tick's action, and returns the value that it sends: an x, or a cotangent of one.

    Two ranks with a stage each, while microbatch 1 is in its forward and 0 in its backward:
    rank 0 runs `0F1`: read the received slot or embed -> layers -> send x to rank 1.
    rank 1 runs `1I0`: read the kept cotangent -> layers, backwards -> send dx to rank 0.
    The program has all other pieces too, and skips them.
    """
    has_gradients = rank.functions.gradients is not None
    opcode, stage = row["opcode"], row["stage"]
    is_first, is_last = stage == 0, stage == rank.stages.num_stages - 1
    # One value goes through: the one that the action reads, then the output of its layers.
    out = buffers.read(state.received, row["read"])
    out = lax.cond((opcode == FORWARD) & is_first, lambda: embed(rank, row), lambda: out)
    for chunk in range(len(rank.chunks)):
        is_chunk = row["chunk"] == chunk
        work = partial(LayerWork, rank=rank, forward=(chunk, row), backward=(chunk, row))
        state, out = run_forward(work(), state, out, is_chunk & (opcode == FORWARD))
        for act in _backwards(rank, tables) if has_gradients else ():
            is_on = [is_chunk & _is_one_of(part, tables, row) for part in act.opcodes]
            state, dx = run_backward(
                work(stores=act.stores, source=act.source),
                act.actions,
                state,
                None if act.actions == "W" else pick(out),
                is_on[0] if len(is_on) == 1 else tuple(is_on),
            )
            out = out if dx is None else put_leaves(out, dx)
    state, out = when(
        (opcode == FORWARD) & is_last,
        lambda carry: head(rank, carry[0], carry[1], row),
        (state, out),
    )
    if has_gradients:
        state = when(
            _is_one_of(opcodes_that(makes=COTANGENT), tables, row) & is_first,
            lambda state: embed_grad(rank, state, pick(out), row),
            state,
        )
    return state, out


class _Backward(NamedTuple):
    """Describes a loop over the layers of a stage that a tick may run.

    Attributes:
      actions: As `run_backward` takes them.
      opcodes: The opcodes with which it runs; in two parts those of the upper and of the lower
        layers.
      stores, source: As `LayerWork` takes them.
    """

    actions: str
    opcodes: tuple[tuple[Opcode, ...], ...]
    stores: tuple[str, ...] = ()
    source: str = "stash"


def _backwards(rank: Rank, tables: Tables) -> list[_Backward]:
    """Lists the backward loops of a tick's program, each for one or several opcodes.

    Without full backwards every I writes a stash, to no harm where its W is deferred: no stash is
    in use in that tick. So one loop runs all I's.
    """
    deferred = _Backward("W", ((Opcode.WEIGHT_GRAD_DEFERRED,),), source=DEFERRED)
    if rank.settings.full_backward:
        parts = ((Opcode.BACKWARD, Opcode.BACKWARD_UPPER), (Opcode.BACKWARD, Opcode.BACKWARD_LOWER))
        in_parts = Opcode.BACKWARD_UPPER in tables.opcodes
        deferring = _Backward("I", ((Opcode.INPUT_GRAD_DEFERRING,),), stores=(DEFERRED,))
        full = _Backward("IW", parts if in_parts else parts[:1])
        return [full, deferring, deferred] if rank.settings.defers else [full]
    input_grads = ((Opcode.INPUT_GRAD, Opcode.INPUT_GRAD_DEFERRING),)
    weight_grad = _Backward("W", ((Opcode.WEIGHT_GRAD,),))
    if rank.settings.defers:
        return [_Backward("I", input_grads, stores=("stash", DEFERRED)), deferred, weight_grad]
    return [_Backward("I", input_grads, stores=("stash",)), weight_grad]


def _is_one_of(opcodes: Iterable[Opcode], tables: Tables, row: Row) -> jax.Array:
    """Whether this tick's opcode is one of some; those that the tables lack are left out."""
    found = [row["opcode"] == int(opcode) for opcode in opcodes if opcode in tables.opcodes]
    return reduce(operator.or_, found) if found else jnp.zeros((), bool)


def _deferred_slots(row: Row) -> Row:
    """Says whether an I defers its W, and replaces slots of -1, none, by slot 0."""
    return {
        "is_deferring": row["opcode"] == int(Opcode.INPUT_GRAD_DEFERRING),
        "deferred": jnp.maximum(row["deferred"], 0),
        "stash": jnp.maximum(row["stash"], 0),
    }


def _poison_dead(
    rank: Rank, tables: Tables, state: State, out: PyTree, row: Row
) -> tuple[State, PyTree]:
    """Overwrites every slot whose last read was in this tick, and a value that nobody may send."""

    def overwrite(name: str) -> PyTree:
        is_dead = _is_one_of(opcodes_that(frees=name), tables, row)
        return when(
            is_dead,
            lambda of_kinds: {kind: slots.poison(row[name]) for kind, slots in of_kinds.items()},
            state.slots[name],
        )

    names = ["residual", "weight_residual"]
    names += ["stash"] * (not rank.settings.full_backward) + [DEFERRED] * rank.settings.defers
    changed = {name: overwrite(name) for name in names}
    received = buffers.poison(state.received, row["read"])
    state = state.with_slots(changed)._replace(received=received)
    makes = (opcodes_that(makes=value) for value in (X, MIDDLE, COTANGENT))
    sends = reduce(operator.or_, (_is_one_of(opcodes, tables, row) for opcodes in makes))
    nothing = buffers.allocate(out, poison=True)
    return state, jax.tree.map(lambda a, b: jnp.where(sends, a, b), out, nothing)
