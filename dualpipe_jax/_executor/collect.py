"""What the ranks added up of layers and ends, after the loop: summed, and back in its places.

In: the state in which a rank ends. Out: its part of gradients and metrics, as they leave the step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax._executor.actions import Rank
from dualpipe_jax._executor.state import State
from dualpipe_jax._leaves.pick import select
from dualpipe_jax._leaves.plan import Plan
from dualpipe_jax._leaves.rules import SUM, Rule
from dualpipe_jax._leaves.specs import Dims
from dualpipe_jax._model import varying
from dualpipe_jax._model.kinds import Kind

PyTree = Any


def gradients(rank: Rank, plan: Plan, params: PyTree, state: State) -> dict[str, Any]:
    """Sums gradients over ranks and shards, and brings those of the layers to their places.

    Returns:
      For each part of `params` a list with the gradients of the leaves that get one, of blocks for
      each kind.
    """
    functions, layout = rank.gradients, rank.layout
    specs, scatters = plan.of_wanted(plan.specs), plan.of_wanted(plan.scatters)
    over = plan.summed_over([*specs["ends"], *specs.get("shared", [])])
    summed = _combined(
        [*state.ends_grads, *state.shared_grads],
        [(plan.axis, *o, *m) for o, m in zip(over, functions.reduce_axes, strict=True)],
        [plan.real(dims) for dims in [*scatters["ends"], *scatters.get("shared", [])]],
        functions.outside_rules,
    )
    # What neither embed nor head has a gradient of is still what it was at the start.
    uses = zip(summed, functions.embed_rules, functions.head_rules, strict=True)
    summed = [
        jnp.zeros_like(value) if embed is head is None else value for value, embed, head in uses
    ]
    num_ends = len(state.ends_grads)
    grads: dict[str, Any] = {"ends": summed[:num_ends], "blocks": {}}
    if "shared" in specs:
        grads["shared"] = summed[num_ends:]
    for kind, mine in layout.collect(state.block_grads, functions.layer_rules).items():
        leaves = jax.tree.leaves(params["blocks"][kind])
        has_grad = functions.block[kind].has_grad[: len(leaves)]
        over = plan.summed_over(select(plan.specs["blocks"][kind], has_grad))
        manual = select(functions.block[kind].reduce_axes[: len(leaves)], has_grad)
        dims = [plan.real(each) for each in plan.scatters["blocks"][kind]]
        axes = [(*o, *m) for o, m in zip(over, manual, strict=True)]
        rules = functions.layer_rules[kind]
        rest = iter(_combined(mine, axes, select(dims, has_grad), rules))
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
    metrics = {kind: aux.metrics for kind, aux in rank.functions.outputs.aux.items()}
    rules = {kind: [SUM] * len(jax.tree.leaves(each)) for kind, each in metrics.items()}
    for kind, leaves in rank.layout.collect(state.block_metrics, rules).items():
        summed = varying.sum_over(leaves, plan.batch_axes)
        stacks[kind] = jax.tree.unflatten(jax.tree.structure(metrics[kind]), summed)
    return stacks


def _combined(
    values: list[jax.Array],
    axes: list[tuple[str, ...]],
    dims: list[Dims],
    rules: Sequence[Rule],
) -> list[jax.Array]:
    """Combines each value over its axes by its rule.

    Of dims that lie over axes a device gets its part. Those with the same axes and rule go into one
    collective.
    """
    out, rest = [], []
    for value, over, lies, rule in zip(values, axes, dims, rules, strict=True):
        done = {name for names in lies.values() for name in names}
        if rule is not SUM:
            (value,), done = rule.over([value], over), set(over)
        for dim, names in lies.items():
            value = _part(value, names, dim, is_summed=rule is not SUM)
        out.append(value)
        rest.append(tuple(name for name in over if name not in done))
    for over in dict.fromkeys(rest):
        places = [i for i, each in enumerate(rest) if each == over]
        totals = varying.sum_over([out[i] for i in places], over)
        for i, total in zip(places, totals, strict=True):
            out[i] = total
    return out


def _part(value: jax.Array, axes: tuple[str, ...], dim: int, *, is_summed: bool) -> jax.Array:
    """Takes this device's part of a dim that lies over axes, summing it over them if it is not."""
    if not is_summed:
        return lax.psum_scatter(value, axes, scatter_dimension=dim, tiled=True)
    size = value.shape[dim] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(value, lax.axis_index(axes) * size, size, dim)
