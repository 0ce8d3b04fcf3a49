"""What the ranks added up of layers and ends, after the loop: summed, and back in its places.

In: the state in which a rank ends. Out: its part of gradients and metrics, as they leave the step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax import _varying
from dualpipe_jax._executor.leaves import pick, select
from dualpipe_jax._executor.plan import Plan
from dualpipe_jax._executor.rank import Rank
from dualpipe_jax._executor.state import State
from dualpipe_jax._kinds import Kind
from dualpipe_jax._parameters import Dims

PyTree = Any


def gradients(rank: Rank, plan: Plan, params: PyTree, state: State) -> dict[str, Any]:
    """Sums gradients over ranks and shards, and brings those of the layers to their places.

    Returns:
      For each part of `params` a list with the gradients of the leaves that get one, of blocks for
      each kind.
    """
    functions, layout = rank.gradients, rank.layout
    specs = plan.of_wanted(plan.specs)
    over = plan.summed_over([*specs["ends"], *specs.get("shared", [])])
    gathers = plan.of_wanted(plan.gathers)
    summed = _sums(
        *_scattered(
            [*state.ends_grads, *state.shared_grads],
            [(plan.axis, *o, *m) for o, m in zip(over, functions.reduce_axes, strict=True)],
            [plan.real(dims) for dims in [*gathers["ends"], *gathers.get("shared", [])]],
        )
    )
    num_ends = len(state.ends_grads)
    grads: dict[str, Any] = {"ends": summed[:num_ends], "blocks": {}}
    if "shared" in specs:
        grads["shared"] = summed[num_ends:]
    for kind, mine in layout.collect(state.block_grads).items():
        leaves = jax.tree.leaves(params["blocks"][kind])
        has_grad = functions.block[kind].has_grad[: len(leaves)]
        over = plan.summed_over(pick(plan.specs["blocks"][kind], has_grad))
        manual = functions.block[kind].reduce_axes
        more = [axes for axes, has in zip(manual, has_grad, strict=False) if has]
        dims = [plan.real(each) for each in plan.gathers["blocks"][kind]]
        axes = [(*o, *m) for o, m in zip(over, more, strict=True)]
        rest = iter(_sums(*_scattered(mine, axes, select(dims, has_grad))))
        # Leaves without a gradient of their own get zeros, as large as a device's part of them.
        size = layout.stacks[kind].shard_layers
        grads["blocks"][kind] = [
            next(rest)
            if has
            else jnp.zeros(plan.part_of((size, *leaf.shape[1:]), each), leaf.dtype)
            for leaf, has, each, is_wanted in zip(
                leaves, has_grad, dims, plan.wanted["blocks"][kind], strict=True
            )
            if is_wanted
        ]
    return grads


def block_metrics(rank: Rank, plan: Plan, state: State) -> dict[Kind, PyTree]:
    """Sums the blocks' metrics over shards, each kind's stacked where its layers lie."""
    stacks = {}
    for kind, leaves in rank.layout.collect(state.block_metrics).items():
        structure = jax.tree.structure(rank.functions.outputs.aux[kind].metrics)
        summed = _varying.sum_over(leaves, plan.batch_axes)
        stacks[kind] = jax.tree.unflatten(structure, summed)
    return stacks


def _scattered(
    values: list[jax.Array], axes: list[tuple[str, ...]], dims: list[Dims]
) -> tuple[list[jax.Array], list[tuple[str, ...]]]:
    """Sums over the axes over which dims lie, each device getting its part of them.

    Returns:
      The values, and the axes over which each is still to be summed.
    """
    out, rest = [], []
    for value, over, lies in zip(values, axes, dims, strict=True):
        for dim, names in lies.items():
            value = lax.psum_scatter(value, names, scatter_dimension=dim, tiled=True)
        done = {name for names in lies.values() for name in names}
        out.append(value)
        rest.append(tuple(name for name in over if name not in done))
    return out, rest


def _sums(values: list[jax.Array], axes: Sequence[tuple[str, ...]]) -> list[jax.Array]:
    """Sums each value over its axes, those with the same axes in one collective."""
    out = list(values)
    for over in dict.fromkeys(axes):
        if over:
            places = [i for i, each in enumerate(axes) if each == over]
            totals = _varying.sum_over([values[i] for i in places], over)
            for i, total in zip(places, totals, strict=True):
                out[i] = total
    return out
