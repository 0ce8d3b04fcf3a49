"""The actions of a rank: embedding, head, and F, I, W or both over the layers of a stage.

`layer.py` runs them for one layer. Slot buffers and sums pass through the loops over layers and are
updated in place; an action that is not on changes none of them.
"""

from contextlib import nullcontext
from typing import Any

import jax

from dualpipe_jax import _scopes
from dualpipe_jax._executor.buffers import lay_out, when
from dualpipe_jax._executor.layer import Flow, LayerWork
from dualpipe_jax._executor.rank import Rank, Row
from dualpipe_jax._executor.stages import Layer
from dualpipe_jax._executor.state import LayerBuffers, State, empty_after
from dualpipe_jax._leaves.pick import put_leaves
from dualpipe_jax._model import semantics
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.actions import DEFERRED


@jax.named_scope(_scopes.EMBED)
def embed(rank: Rank, row: Row) -> PyTree:
    """Runs the embedding."""
    return rank.functions.embed(rank.outside, rank.context(row, rank.stages.num_layers))


# The embedding's gradient follows the action that makes dx in the first stage. Its forward runs
# again rather than keeping its residuals in a slot; a table look-up needs no forward.
@jax.named_scope(_scopes.EMBED_GRAD)
def embed_grad(rank: Rank, state: State, dx: list[jax.Array], row: Row) -> State:
    """Adds the embedding's gradient to the sums; dx has the leaves of x that have a cotangent."""
    ctx = rank.context(row, rank.stages.num_layers)
    _, doutside = rank.gradients.embed(rank.outside, ctx, dx)
    return state.add_outside(doutside, rank.gradients.embed_rules)


# The head follows the last stage's F and computes its value and gradient at once, so that its
# residuals (the logits) never get a slot; only the cotangent of x is kept.
@jax.named_scope(_scopes.HEAD)
def head(rank: Rank, state: State, x: PyTree, row: Row) -> tuple[State, PyTree]:
    """Adds loss and metrics to the sums, and returns x with its cotangent in place of its leaves.

    In a program that returns outputs, it sends these towards their ranks instead.
    """
    ctx = rank.context(row, rank.stages.num_layers + 1)
    gradients = rank.functions.gradients
    if rank.settings.delivery is not None:
        assert rank.functions.output is not None
        assert state.mail is not None
        outputs = rank.functions.output(rank.outside, x, ctx)
        mail = rank.settings.delivery.post(state.mail, outputs, row["microbatch"], row["chunk"])
        return state._replace(mail=mail), x
    if gradients is None:
        assert rank.functions.head is not None
        loss, metrics = rank.functions.head(rank.outside, x, ctx)
    else:
        (loss, metrics, dx), doutside = gradients.head(rank.outside, x, ctx, rank.loss_cotangent)
        state, x = state.add_outside(doutside, gradients.head_rules), put_leaves(x, dx)
    sums = semantics.add((state.loss, state.metrics), (loss, metrics))
    return state._replace(loss=sums[0], metrics=sums[1]), x


def run_forward(work: LayerWork, state: State, x: PyTree, is_on: Any) -> tuple[State, PyTree]:
    """Runs a stage forward if `is_on`; else returns x unchanged."""
    state, flow = run_layers(work, "F", state, Flow(x=x, aux=state.aux), is_on)
    return state._replace(aux=flow.aux), flow.x


def run_backward(
    work: LayerWork, actions: str, state: State, dx: list[jax.Array] | None, is_on: Any
) -> tuple[State, Any]:
    """Runs I, W, or both of each layer in turn (`"IW"`) over a stage, if `is_on`.

    Args:
      work: How layers are run.
      actions: `"I"`, `"W"` or `"IW"`.
      state: The rank's state.
      dx: The cotangent of the stage's output; None for W.
      is_on: Whether to run; given two, of the upper and of the lower layers of a full backward.

    Returns:
      The state, and the cotangent of the stage's input, or dx unchanged.
    """
    rank = work.rank
    shared = state.take_shared(rank.gradients.index[actions])
    # Layers take turns where they recompute: in full backwards, and where W is deferred.
    recomputes = {
        "I": work.stores == (DEFERRED,),
        "W": work.source == DEFERRED,
        "IW": True,
    }[actions]
    assert work.backward is not None
    turn = rank.first_turn(work.backward[1]) if recomputes else None
    state, flow = run_layers(work, actions, state, Flow(dx=dx, shared=shared, turn=turn), is_on)
    assert flow.shared is not None
    return state.put_shared(flow.shared), flow.dx


def run_layers(
    work: LayerWork, actions: str, state: State, flow: Flow, is_on: Any
) -> tuple[State, Flow]:
    """Runs actions of each layer of a stage, in order, or in reverse for a backward."""
    rank, names, is_forward = work.rank, work.touches(actions), actions == "F"
    chunk_and_row = work.forward if is_forward else work.backward
    assert chunk_and_row is not None
    chunk, row = chunk_and_row
    index = {} if is_forward else rank.gradients.index[actions]

    def body(layer: Layer, flow: Flow, taken: tuple[Any, ...]) -> tuple[Flow, tuple[Any, ...]]:
        flow, buffers = work.run(actions, layer, flow, LayerBuffers.of(names, taken))
        return flow, buffers.entries(names)

    def loop(flow: Flow, taken: Any, is_on: Any) -> tuple[Flow, Any]:
        return rank.stages.loop(
            row["stage"], is_on, body, flow, taken, reverse=not is_forward, leave=lay_out
        )

    taken = state.take(names, chunk, index)
    if actions == "W" and work.source == DEFERRED and not rank.settings.full_backward:
        # A weight grad that recomputes takes the most memory, and no stash is in use meanwhile.
        def without_stash(carry: Any) -> Any:
            flow, taken, stash = carry
            flow, taken = loop(flow, taken, True)
            stash = empty_after(
                stash, after=((flow.shared, flow.turn), taken[0]), poison=rank.settings.poison
            )
            return flow, lay_out(taken), lay_out(stash)

        flow, taken, stash = when(is_on, without_stash, (flow, taken, state.slots["stash"]))
        state = state.with_slots({"stash": stash})
    else:
        is_full = actions == "IW"
        with jax.named_scope(_scopes.FULL_BACKWARD) if is_full else nullcontext():
            flow, taken = loop(flow, taken, is_on)
    return state.put(names, chunk, taken), flow
