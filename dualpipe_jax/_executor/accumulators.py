"""Where gradients are added up: of a chunk's layers, by kind, and of what all blocks share.

An action adds to some of them only; those alone go through its loop over layers. The metrics of a
chunk's layers are added up alike, by the forward.
"""

from typing import Any, NamedTuple

from dualpipe_jax._leaves.rules import Rule
from dualpipe_jax._model.kinds import Kind

# Of one chunk: for each kind a list for the leaves that have a gradient.
LayerGrads = dict[Kind, list[Any]]
# The same for the leaves of the block's metrics.
LayerMetrics = dict[Kind, list[Any]]


class Places(NamedTuple):
    """Where a block's gradients are added up: those of the layer first, then those of shared.

    Attributes:
      layer: Places among the leaves of the layer that have a gradient.
      shared: Places among the wanted leaves of shared.
      rules: How those of the layer are added up.
    """

    layer: tuple[int, ...]
    shared: tuple[int, ...]
    rules: tuple[Rule, ...]


def either(first: dict[Kind, Places], second: dict[Kind, Places]) -> dict[Kind, Places]:
    """Joins the places of two actions; some may be of both."""

    def join(one: Places, other: Places) -> Places:
        rule_of = dict(zip((*one.layer, *other.layer), (*one.rules, *other.rules), strict=True))
        layer = tuple(sorted(rule_of))
        shared = tuple(sorted({*one.shared, *other.shared}))
        return Places(layer=layer, shared=shared, rules=tuple(rule_of[i] for i in layer))

    return {kind: join(places, second[kind]) for kind, places in first.items()}
