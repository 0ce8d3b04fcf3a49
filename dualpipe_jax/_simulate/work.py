"""Tables and costs -> how long each rank acts in each tick: what the replays take."""

import numpy as np

from dualpipe_jax._schedule.ir import WEIGHT_GRAD, Tables
from dualpipe_jax._simulate.costs import Costs
from dualpipe_jax._simulate.replay import as_full_backwards
from dualpipe_jax._stage_sizes import first_half


def work_of(
    tables: Tables,
    costs: Costs,
    *,
    layers_of_stage: np.ndarray | None = None,
    full_backward: bool = False,
) -> np.ndarray:
    """Finds how long each tick's action takes on each rank.

    >>> from dualpipe_jax import schedules
    >>> tables = schedules.make("zb-h1", num_ranks=2, num_microbatches=2).compiled().tables
    >>> work_of(tables, Costs(forward=3, input_grad=1, weight_grad=2)).T.tolist()
    [[3.0, 3.0, 0.0, 1.0, 2.0, 1.0, 2.0], [0.0, 3.0, 1.0, 3.0, 1.0, 2.0, 2.0]]

    Args:
      tables: The tables.
      costs: What actions cost.
      layers_of_stage: int[num_stages]; None for stages that are equal, of two halves alike.
      full_backward: Whether the tables have a weight grad run with the input grad that it follows.

    Returns:
      float64[num_ticks, num_ranks]; idle ones 0.
    """
    layers = np.ones(tables.num_stages) if layers_of_stage is None else layers_of_stage
    cost = costs.of_stages(
        num_ranks=tables.num_ranks, layers_of_stage=layers, forward_only=tables.forward_only
    )
    work = cost[tables.opcode, tables.stage]  # an idle tick has stage -1, and costs 0 there too
    share = layers * (tables.num_ranks / layers.sum())
    is_deferred = (tables.opcode == WEIGHT_GRAD) & (tables.deferred >= 0)
    work = work + is_deferred * costs.recompute * share[tables.stage]
    if not full_backward:
        return work
    halves = np.full(tables.num_stages, 0.5)
    return as_full_backwards(
        tables,
        work,
        last_layers=halves if layers_of_stage is None else first_half(layers) / layers,
        cost=costs.full_backward_share,
        embed_grad=costs.embed_grad,
    )
