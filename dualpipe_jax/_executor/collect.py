"""The ranks' sums after the loop become gradients and metrics where the parameters are.

In: the state in which a rank ends. Out: its part of gradients and metrics, as they leave the step.
"""

import jax

from dualpipe_jax._executor.actions import Rank
from dualpipe_jax._executor.state import State
from dualpipe_jax._leaves.gradient import accumulated, combine, gradients_of
from dualpipe_jax._leaves.rules import SUM
from dualpipe_jax._model import varying
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import PyTree


def collect_gradients(rank: Rank, params: dict[str, PyTree], state: State) -> dict[str, PyTree]:
    """Sums gradients over ranks and shards, and returns those of layers to the layers' ranks.

    Returns:
      A tree like `params` with a device's part of each gradient; None for a leaf that gets none.
    """
    leaves, stages = rank.gradients.leaves, rank.stages
    outside = {part: tree for part, tree in leaves.items() if part != "blocks"}
    totals = combine(accumulated(outside), [*state.ends_grads, *state.shared_grads])
    num_ends = len(state.ends_grads)
    of_part = {"ends": totals[:num_ends], "shared": totals[num_ends:]}
    grads = {part: gradients_of(outside[part], params[part], of_part[part]) for part in outside}

    of_kind = {kind: accumulated(stack) for kind, stack in leaves["blocks"].items()}
    rules = {kind: [gradient.leaf.rule for gradient in of] for kind, of in of_kind.items()}
    blocks = {}
    for kind, sums in stages.collect(state.block_grads, rules).items():
        blocks[kind] = gradients_of(
            leaves["blocks"][kind],
            params["blocks"][kind],
            combine(of_kind[kind], sums),
            num_layers=stages.stacks[kind].shard_layers,
        )
    return {**grads, "blocks": blocks}


def collect_metrics(rank: Rank, batch_axes: tuple[str, ...], state: State) -> dict[Kind, PyTree]:
    """Sums the blocks' metrics over shards, each kind's stacked where its layers are."""
    metrics = {kind: aux.metrics for kind, aux in rank.functions.outputs.aux.items()}
    rules = {kind: [SUM] * len(jax.tree.leaves(tree)) for kind, tree in metrics.items()}
    stacks = {}
    for kind, leaves in rank.stages.collect(state.block_metrics, rules).items():
        summed = varying.sum_over(leaves, batch_axes)
        stacks[kind] = jax.tree.unflatten(jax.tree.structure(metrics[kind]), summed)
    return stacks
