"""`simulate`: checks its arguments, decides the execution where it is left open, and replays it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualpipe_jax._costs import (
    Costs,
    StageLayers,
    as_number,
    require_cost,
    require_layout,
    weights_by_kind,
)
from dualpipe_jax._errors import brief
from dualpipe_jax._predict.balance import balance
from dualpipe_jax._predict.decide import replay_decided
from dualpipe_jax._predict.simulation import Simulation
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import (
    BALANCED,
    LayersPerStage,
    require_layers,
    require_sum,
    spread_evenly,
    stage_sizes,
)
from dualpipe_jax.schedules import Schedule


def simulate(
    schedule: Schedule,
    *,
    costs: Costs | None = None,
    transfer: float = 0.0,
    num_layers: int | None = None,
    layout: Sequence[str] | None = None,
    layers_per_stage: LayersPerStage = None,
    execution: Execution = Execution(split_backward=True),  # noqa: B008
    rendezvous: bool = True,
    placed_by: Costs | None = None,
) -> Simulation:
    """Replays a schedule by the clock: how long a step takes, and how long ranks idle.

    >>> from dualpipe_jax import schedules
    >>> schedule = schedules.make("zb-h1", num_ranks=2, num_microbatches=3)
    >>> simulation = simulate(schedule, costs=Costs(forward=3))
    >>> simulation.makespan, simulation.dependency_makespan, simulation.published_bubble
    (18.0, 18.0, 3.0)

    Args:
      schedule: The schedule.
      costs: How long actions take; by default 1 each.
      transfer: How long a value travels to a neighbour, whatever the size of a stage.
      num_layers: The layers of the model; if the stages do not divide them, the first stages get
        one more. By default all stages are equal.
      layout: The kind of every layer, as `Model.layout`, where `costs.layer` has a cost for each;
        gives num_layers.
      layers_per_stage: The layers of each stage, in model order, as for `value_and_grad`, or
        `"balanced"`: those with which the step is the fastest at these costs.
      execution: As for `value_and_grad`, where None is decided at these costs; by default input
        grads and weight grads are split. If the number of layers is not given, the two halves of a
        full backward are equal.
      rendezvous: Whether a sender waits for its receiver, as on CPUs and TPUs; not on GPUs.
      placed_by: The costs by which the step's actions were placed in ticks, if not `costs`: those
        of `value_and_grad(costs=)`, with a transfer of a tenth of the forward as there. (Steps of
        more than 20,000 actions, and of the two-tick timetable, are placed without costs.)

    Raises:
      ValueError: if the schedule cannot run or be aligned, `transfer` is negative, not finite or
        larger than 1e100, fewer layers than stages are to be spread evenly, or layers_per_stage
        does not fit.
      TypeError: if an argument has a wrong type.
    """
    _require_types(
        schedule=schedule,
        costs=costs,
        num_layers=num_layers,
        execution=execution,
        rendezvous=rendezvous,
        placed_by=placed_by,
    )
    require_layout(layout)
    costs, transfer = costs or Costs(), as_number("transfer", transfer)
    require_cost("transfer", transfer)
    layers = _layers(
        schedule,
        layers_per_stage,
        num_layers=_num_layers(num_layers, layout),
        argument="num_layers" if layout is None else "len(layout)",
        layer_weights=weights_by_kind(costs.layer, layout),
        execution=execution,
        costs=costs,
        transfer=transfer,
    )
    return replay_decided(
        schedule,
        execution,
        costs=costs,
        transfer=transfer,
        layers=layers,
        rendezvous=rendezvous,
        placed_by=placed_by,
    )


def _num_layers(num_layers: int | None, layout: Sequence[str] | None) -> int | None:
    """Counts the layers of the model; None if they are not given."""
    if layout is None:
        return num_layers
    if num_layers not in (None, len(layout)):
        raise ValueError(
            f"num_layers={brief(num_layers)}: must be the {len(layout)} layers whose kinds layout "
            "names, or left out"
        )
    return len(layout)


def _layers(
    schedule: Schedule,
    layers_per_stage: LayersPerStage,
    *,
    num_layers: int | None,
    argument: str,
    layer_weights: tuple[float, ...] | None,
    **costs: Any,
) -> StageLayers | None:
    """Cuts the model into stages; None if no layers are given."""
    num_ranks, num_stages = schedule.num_ranks, schedule.num_stages
    where = f" of schedule {schedule.name!r} on {num_ranks} ranks"
    sizes = stage_sizes(layers_per_stage, num_stages=num_stages, where=where)
    if num_layers is None:
        if sizes == BALANCED:
            raise ValueError(
                'layers_per_stage="balanced": must come with num_layers, or with the layout'
            )
        return None if sizes is None else StageLayers.cut(sizes)
    if sizes is None or sizes == BALANCED:
        least = num_stages if sizes is None else 1
        require_layers(num_layers, num_stages=least, where=where, argument=argument)
    if sizes == BALANCED:
        sizes = balance(schedule, num_layers=num_layers, layer_weights=layer_weights, **costs)
    require_sum(sizes, num_layers)
    return StageLayers.cut(sizes or spread_evenly(num_layers, num_stages), layer_weights)


def _require_types(**arguments: Any) -> None:
    """Requires the types that `simulate` states."""
    costs = (Costs, type(None)), "a dualpipe_jax.Costs, or None"
    wanted: dict[str, tuple[tuple[Any, ...], str]] = {
        "schedule": ((Schedule,), "a dualpipe_jax.Schedule"),
        "costs": costs,
        "num_layers": ((int, np.integer, type(None)), "an integer, or None"),
        "execution": ((Execution,), "a dualpipe_jax.Execution"),
        "rendezvous": ((bool,), "True or False"),
        "placed_by": costs,
    }
    for name, value in arguments.items():
        types, must = wanted[name]
        if isinstance(value, types) and not (name == "num_layers" and isinstance(value, bool)):
            continue
        fix = ""
        if isinstance(value, str) and name == "schedule":
            sizes = "num_ranks=, num_microbatches="
            fix = f": dualpipe_jax.schedules.make({brief(value)}, {sizes}) is one"
        raise TypeError(f"{name}={brief(value)}: must be {must}{fix}")
