"""The layers of each stage, by number and by cost: `StageLayers`, which all predictions take.

In: how many layers each stage has, and the relative cost of every layer. Out: a record of the
stages, from which the durations of their actions follow.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dualpipe_jax._errors import brief
from dualpipe_jax._schedule.stage_sizes import upper_layers


@dataclass(frozen=True)
class StageLayers:
    """Counts the layers of each stage, and their share of the model's work.

    >>> StageLayers.cut((2, 1), layer_weights=[1.0, 1.0, 4.0])
    StageLayers(sizes=(2, 1), weights=(1.0, 2.0), upper_shares=(0.5, 1.0))

    Attributes:
      sizes: The layers of each stage, in model order.
      weights: Their cost, in layers of mean cost; the sizes where all layers cost the same.
      upper_shares: The share of each stage's cost in its upper layers, which a full backward in
        halves runs first.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    upper_shares: tuple[float, ...]

    @classmethod
    def cut(
        cls, sizes: Sequence[int], layer_weights: Sequence[float] | None = None
    ) -> "StageLayers":
        """Cuts a model into stages of so many layers.

        Args:
          sizes: The layers of each stage, in model order.
          layer_weights: The relative cost of every layer, in model order; None if all cost the
            same.
        """
        if layer_weights is None:
            uppers = (upper_layers(size) / size if size else 0.5 for size in sizes)
            return cls(tuple(map(int, sizes)), tuple(map(float, sizes)), tuple(uppers))
        ends = np.cumsum([0, *sizes])
        costs = cumulated(layer_weights, num_layers=int(ends[-1]))
        weights = np.diff(costs[ends])
        uppers = [
            costs[end] - costs[end - upper_layers(end - start)] for start, end in pairwise(ends)
        ]
        shares = (
            float(upper / weight) if weight else 0.5
            for upper, weight in zip(uppers, weights, strict=True)
        )
        return cls(tuple(map(int, sizes)), tuple(weights.tolist()), tuple(shares))

    @classmethod
    def of(cls, stages: Iterable[tuple[int, float, float]]) -> "StageLayers":
        """Makes them of the three figures of each stage, as `of_each` gives them."""
        return cls(*zip(*stages, strict=True))

    @property
    def of_each(self) -> tuple[tuple[int, float, float], ...]:
        """The three figures of each stage."""
        return tuple(zip(self.sizes, self.weights, self.upper_shares, strict=True))

    @property
    def are_alike(self) -> bool:
        """Whether all stages have equally many layers, at the same cost."""
        return len(set(self.sizes)) == len(set(self.weights)) == 1


def cumulated(layer_weights: Sequence[float] | None, *, num_layers: int) -> np.ndarray:
    """Adds up the layers' costs, in layers of mean cost: float64[num_layers + 1], from 0.

    >>> cumulated([1, 1, 4], num_layers=3).tolist()
    [0.0, 0.5, 1.0, 3.0]
    """
    if layer_weights is None:
        return np.arange(num_layers + 1.0)
    costs = np.cumsum([0.0, *layer_weights])
    return costs * (num_layers / costs[-1])


def require_layout(layout: Any) -> None:
    """Requires the kind of every layer, or None.

    Raises:
      TypeError: If it is neither.
    """
    is_sequence = isinstance(layout, list | tuple)
    if layout is not None and not (is_sequence and all(isinstance(each, str) for each in layout)):
        raise TypeError(
            f"layout={brief(layout)}: must be the name of the kind of every layer, in a list or a "
            "tuple, or None"
        )


def weights_by_kind(
    layer: Mapping[Hashable, float] | None, layout: Sequence[Hashable] | None
) -> tuple[float, ...] | None:
    """Gives every layer the cost of its kind: `Costs.layer` of each entry of `Model.layout`.

    Returns:
      The relative cost of every layer, in model order; None if all cost the same.

    Raises:
      ValueError: If there are costs of kinds but no layout, a kind of the layout has no cost, or
        all layers cost nothing.
    """
    if layer is None:
        return None
    if layout is None:
        raise ValueError(
            f"costs=Costs(layer={brief(dict(layer))}): must come with the kind of every layer, "
            "which is the layout of the model (layout= of simulate); leave layer out if all layers "
            "are of one kind"
        )
    missing = [kind for kind in dict.fromkeys(layout) if kind not in layer]
    if missing:
        raise ValueError(
            f"costs=Costs(layer={brief(dict(layer))}): must have the cost of a layer of every kind "
            f"in the layout, but has none for {', '.join(map(brief, missing))}"
        )
    weights = tuple(float(layer[kind]) for kind in layout)
    if not any(weights):
        raise ValueError(
            f"costs=Costs(layer={brief(dict(layer))}): a layer of some kind in the layout must "
            "cost more than 0"
        )
    return weights
