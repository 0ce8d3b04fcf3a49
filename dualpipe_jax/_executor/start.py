"""The state in which a rank starts: empty slots, and sums of nothing.

In: the model's functions and where its layers lie. Out: a `State`; and slots that are empty again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax._executor import barriers
from dualpipe_jax._executor import buffers as registers
from dualpipe_jax._executor.delivery import Delivery
from dualpipe_jax._executor.functions import Functions, Gradients
from dualpipe_jax._executor.stages import Layout
from dualpipe_jax._executor.state import State
from dualpipe_jax._leaves.leaves import pick
from dualpipe_jax._leaves.rules import SUM
from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._schedule.ir import DEFERRED

PyTree = Any


def empty_state(
    functions: Functions,
    layout: Layout,
    params: PyTree,
    *,
    slots: dict[str, int],
    wanted: dict[str, Any],
    delivery: Delivery | None,
    is_lazy: bool,
    poison: bool,
) -> State:
    """Makes the state.

    Args:
      functions: The model's functions.
      layout: Where the layers lie.
      params: The parameters, as they lie on this device.
      slots: The slots of each buffer.
      wanted: For each part outside of blocks whether its leaves get a gradient.
      delivery: Where outputs go, in a program that gives them.
      is_lazy: Whether the tables are.
      poison: Whether slots start as values that spread, in tests.
    """
    outs, gradients = functions.outputs, functions.gradients
    num_chunks = len(layout.stage_of)

    def buffers(name: str) -> dict[Kind, PyTree]:
        if not slots.get(name):
            return dict.fromkeys(layout.stacks, ())
        return {
            kind: registers.allocate_layers(
                () if gradients is None else getattr(gradients.block[kind], name),
                slots[name],
                stack.max_layers,
                is_apart=layout.is_unrolled,
                poison=poison,
            )
            for kind, stack in layout.stacks.items()
        }

    outside_grads: list[jax.Array] = []
    if gradients is not None:
        parts = [part for part in ("ends", "shared") if part in params]
        leaves = [leaf for part in parts for leaf in pick(params[part], wanted[part])]
        outside_grads = [
            rule.start(leaf.shape, semantics.accumulator_dtype(leaf.dtype))
            for leaf, rule in zip(leaves, gradients.outside_rules, strict=True)
        ]
    num_ends = sum(wanted["ends"])

    def zero_grads(kind: Kind, stack: PyTree) -> list[Any]:
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(stack)
        ]
        assert gradients is not None
        has_grad = gradients.block[kind].has_grad[: len(leaves)]
        return layout.zero_sums(kind, pick(leaves, has_grad), gradients.layer_rules[kind])

    loss, aux, metrics = semantics.zeros_for_sum((outs.loss, outs.aux_sum, outs.metrics))
    metrics_of = {kind: jax.tree.leaves(aux.metrics) for kind, aux in outs.aux.items()}
    nothing = registers.allocate(outs.x, poison=poison)
    return State(
        received=registers.allocate(outs.x, slots["received"], poison=poison),
        residual=buffers("residual"),
        weight_residual=buffers("weight_residual"),
        stash=buffers("stash"),
        deferred=buffers(DEFERRED),
        block_grads=[]
        if gradients is None
        else [
            {kind: zero_grads(kind, stack) for kind, stack in params["blocks"].items()}
            for _ in range(num_chunks)
        ],
        ends_grads=outside_grads[:num_ends],
        shared_grads=outside_grads[num_ends:],
        loss=loss,
        aux=aux,
        metrics=metrics,
        block_metrics=[
            {
                kind: layout.zero_sums(kind, metrics, [SUM] * len(metrics))
                for kind, metrics in metrics_of.items()
            }
            for _ in range(num_chunks)
        ],
        messages=(nothing,) if is_lazy else (nothing, nothing),
        mail=None if delivery is None else delivery.start(outs.applied),
    )


def one_stash(gradients: Gradients, layout: Layout) -> dict[Kind, PyTree]:
    """Makes avals of a single slot for the stash of looped layers."""

    def of(kind: Kind, num_layers: int) -> PyTree:
        return tuple(
            jax.ShapeDtypeStruct((1, num_layers, *aval.shape), aval.dtype)
            for aval in gradients.block[kind].stash
        )

    return {kind: of(kind, stack.max_layers) for kind, stack in layout.stacks.items()}


def empty_after(buffers: PyTree, *, after: PyTree, poison: bool) -> PyTree:
    """Makes empty buffers like these, not before `after` is known.

    So slots that nothing is kept in take no memory for a while: they end, and are made again.
    """
    if barriers.xla_shards():  # an entry might be fetched from another device
        zero, _ = lax.optimization_barrier((jnp.zeros((), jnp.int32), after))
    else:
        zero = barriers.zero_after(after)

    def one(buffer: jax.Array) -> jax.Array:
        value = registers.allocate(jax.ShapeDtypeStruct((), buffer.dtype), poison=poison)
        # XLA does not know which; what it knows, it would fill before.
        return jnp.broadcast_to(jnp.where(zero == 0, value, jnp.ones_like(value)), buffer.shape)

    return jax.tree.map(one, buffers)
