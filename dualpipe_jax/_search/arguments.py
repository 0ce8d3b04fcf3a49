"""The arguments of a search, as a user gives them -> a `Problem`."""

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dualpipe_jax._costs import (
    Costs,
    StageLayers,
    as_bytes,
    as_number,
    format_bytes,
    require_cost,
    require_layout,
    weights_by_kind,
)
from dualpipe_jax._errors import brief
from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.stage_sizes import (
    BALANCED,
    require_layers,
    require_sum,
    spread_evenly,
    stage_sizes,
)
from dualpipe_jax._search.problem import PLACEMENTS, Problem, routes_of
from dualpipe_jax._search.seeds import named_seeds

WAITS = ("program", "values")
_MOST_MOVES = 10**9
_ROUNDING = 1e-9


def make_problem(
    *,
    num_ranks: int,
    num_microbatches: int,
    costs: Costs | None,
    transfer: float,
    placement: str,
    num_stages_per_rank: int | None,
    layers_per_stage: Sequence[int] | None,
    layout: Sequence[str] | None,
    max_activations: float | None,
    memory: float | str | None,
) -> Problem:
    """Checks sizes, costs, placement and limit.

    The arguments are those of `schedules.search`.

    Raises:
      ValueError: As `schedules.search`.
      TypeError: As `schedules.search`.
    """
    require_one_of("placement", placement, PLACEMENTS)
    if num_stages_per_rank is not None and placement != "interleaved":
        raise ValueError(
            f"num_stages_per_rank={brief(num_stages_per_rank)}: is for placement='interleaved', "
            f"not for {placement!r}; leave it out"
        )
    num_ranks, num_microbatches, per_rank = check_sizes(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_stages_per_rank=2 if num_stages_per_rank is None else num_stages_per_rank,
    )
    if not isinstance(costs, Costs | None):
        raise TypeError(f"costs={brief(costs)}: must be a dualpipe_jax.Costs, or None")
    _require_one_limit(max_activations, memory, costs)
    transfer = as_number("transfer", transfer)
    require_cost("transfer", transfer)
    routes, microbatches = routes_of(
        placement,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_stages_per_rank=per_rank,
    )
    where = f" of placement {placement!r} on {num_ranks} ranks"
    layers = stage_sizes(layers_per_stage, num_stages=len(routes[0]), where=where)
    if layers == BALANCED:
        raise ValueError(
            'layers_per_stage="balanced": must be numbers, as layers are balanced for a given '
            "order; take those that `choose` found for a named one"
        )
    require_layout(layout)
    num_stages, costs = len(routes[0]), costs or Costs()
    weights = weights_by_kind(costs.layer, layout)
    if layout is not None:
        require_sum(layers, len(layout))
        least = 1 if layers else num_stages
        require_layers(len(layout), num_stages=least, where=where, argument="len(layout)")
        layers = layers or spread_evenly(len(layout), num_stages)
    problem = Problem(
        num_ranks=num_ranks,
        routes=routes,
        microbatches=microbatches,
        costs=replace(costs, layer=None),  # which are in the layers' weights
        transfer=transfer,
        layers=StageLayers.cut(layers or (1,) * num_stages, weights),
    )
    if memory is not None:
        return _limited_by_bytes(problem, memory)
    return _limited(problem, max_activations)


def _require_one_limit(
    max_activations: float | None, memory: float | str | None, costs: Costs | None
) -> None:
    """Requires one limit at the most, and for bytes those of an activation."""
    if memory is None:
        return
    if max_activations is not None:
        raise ValueError(
            f"memory={brief(memory)}, max_activations={brief(max_activations)}: must not both be "
            "given, as both limit the activations, memory in bytes; leave one of them out"
        )
    if costs is None or costs.activation_bytes is None:
        raise ValueError(
            f"memory={brief(memory)}: must come with the bytes of an activation, in "
            "costs=Costs(activation_bytes=...) (--activation-bytes): state them, or pass the costs "
            "that dualpipe_jax.choose counts from a model; or give max_activations= instead, which "
            "needs no bytes"
        )


def _limited_by_bytes(problem: Problem, memory: float | str) -> Problem:
    """Limits the bytes of activations, and of stashes."""
    limit, costs = as_bytes("memory", memory), problem.costs
    assert costs.activation_bytes is not None
    problem = replace(problem, stash=costs.stash_bytes / costs.activation_bytes)
    least = problem.peak_of(problem.rows_one_by_one())
    if limit / costs.activation_bytes < least - _ROUNDING:
        num_bytes = math.ceil(least * costs.activation_bytes)
        raise ValueError(
            f"memory={brief(memory)}: must be at least {num_bytes:,} bytes "
            f"({format_bytes(num_bytes)}), which a rank holds of a single microbatch; raise it, "
            "make microbatches smaller, or use more ranks"
        )
    return _at_most(problem, limit / costs.activation_bytes)


def _limited(problem: Problem, max_activations: float | None) -> Problem:
    """Limits activations to the number that is given, or that the fastest named order holds."""
    if max_activations is None:
        fastest, *_ = named_seeds(problem, keep_beats=False)
        return replace(problem, max_activations=problem.peak_of(fastest.rows))
    limit = as_number("max_activations", max_activations)
    least = problem.peak_of(problem.rows_one_by_one())
    if not limit >= least - _ROUNDING:  # not <, so that NaN is wrong
        raise ValueError(
            f"max_activations={brief(max_activations)}: must be at least {least:g}, which a rank "
            "holds of a single microbatch; raise it, or use more ranks"
        )
    return _at_most(problem, limit)


def _at_most(problem: Problem, limit: float) -> Problem:
    """Sets the limit; beyond all activations none differs from another."""
    lanes = problem.lanes
    most = (1 + lanes.stash) * float(np.bincount(lanes.rank, lanes.count * lanes.size).max())
    return replace(problem, max_activations=min(limit, most))


def require_one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Requires one of the known names."""
    if not isinstance(value, str) or value not in known:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}={brief(value)}: must be {', '.join(map(repr, known))}")


def require_flag(name: str, value: Any) -> None:
    """Requires a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={brief(value)}: must be True or False")


def as_count(name: str, value: Any, *, most: int = _MOST_MOVES) -> int:
    """Converts an integer from 0 up to a most."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    must = f"must be an integer, 0 or more and at most {most:,}"
    if number is None:
        raise TypeError(f"{name}={brief(value)}: {must}")
    if not 0 <= number <= most:
        raise ValueError(f"{name}={brief(value)}: {must}")
    return number
