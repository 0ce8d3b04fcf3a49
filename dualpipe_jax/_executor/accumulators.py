"""Where gradients are added up: of a chunk's layers, by kind, and of what all blocks share.

An action adds to some of them only; those alone go through its loop over layers. The metrics of a
chunk's layers are added up alike, by the forward.
"""

from typing import Any, NamedTuple

import jax

from dualpipe_jax._executor import buffers
from dualpipe_jax._leaves.rules import SUM, Rule
from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Aux

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


def take(
    layers: LayerGrads, shared: list[jax.Array], places: dict[Kind, Places]
) -> tuple[LayerGrads, dict[int, jax.Array]]:
    """Takes the accumulators at `places`, those of shared by their places."""
    of_shared = sorted({i for each in places.values() for i in each.shared})
    of_layers = {kind: [layers[kind][i] for i in each.layer] for kind, each in places.items()}
    return of_layers, {i: shared[i] for i in of_shared}


def add(
    layers: list[Any],
    shared: dict[int, jax.Array],
    gradients: list[jax.Array],
    *,
    places: Places,
    layer: Any,
    taken: Places | None = None,
) -> tuple[list[Any], dict[int, jax.Array]]:
    """Adds a block's gradients at `places` to what was taken, there or at the `taken` ones.

    `layer` is the layer's entry in the chunk.
    """
    count = len(places.layer)
    mine = [(taken or places).layer.index(place) for place in places.layer]
    sums = buffers.accumulate([layers[i] for i in mine], gradients[:count], layer, places.rules)
    changed = dict(zip(mine, sums, strict=True))
    layers = [changed.get(i, old) for i, old in enumerate(layers)]
    added = zip(places.shared, gradients[count:], strict=True)
    return layers, {**shared, **{i: semantics.add(shared[i], grad) for i, grad in added}}


def add_aux(loss: Any, metrics: list[Any], aux: Aux, *, layer: Any) -> tuple[Any, list[Any]]:
    """Adds what a block's forward gave to the loss of all, and to the metrics of its kind."""
    if aux.loss is not None:
        loss = semantics.add(loss, aux.loss)
    rules = [SUM] * len(metrics)
    return loss, buffers.accumulate(metrics, jax.tree.leaves(aux.metrics), layer, rules)


def put(
    layers: LayerGrads,
    shared: list[jax.Array],
    places: dict[Kind, Places],
    taken: tuple[LayerGrads, dict[int, jax.Array]],
) -> tuple[LayerGrads, list[jax.Array]]:
    """Puts back what was taken."""
    of_layers, of_shared = taken
    layers = {kind: list(old) for kind, old in layers.items()}
    for kind, each in places.items():
        for i, grad in zip(each.layer, of_layers[kind], strict=True):
            layers[kind][i] = grad
    return layers, [of_shared.get(i, old) for i, old in enumerate(shared)]
