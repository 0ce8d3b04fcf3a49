"""Finds the pipeline in a loss: `find_cut` is the whole way, in its order.

1. Trace: the loss is traced for one microbatch's shapes, and becomes a graph of values, each with
   the last layer on whose parameters it depends (`inputs`, `graph`).
2. Terms: outputs that are sums over layers are taken apart, so that a layer's loss stays in its
   layer (`terms`).
3. Cut: between layers the fewest bytes cross; each value that does gets a slot of x (`crossing`).
4. Align: a layer whose boundaries are known shows where another one begins and ends (`align`).
5. Kinds: layers that are the same program become one block, with tables for all in which they
   differ (`layers`, `kinds`), and recipes for values of the microbatch alone (`free`).
6. Check: each block is compared with its layers on another way (`check`, `verify`).

The two cuts that are tried differ in ties alone: the last place at which the fewest bytes cross, or
the first one.
"""

from collections.abc import Callable
from typing import Any

import jax

from dualpipe_jax._from_loss import requirements
from dualpipe_jax._from_loss.align import align
from dualpipe_jax._from_loss.check import Check
from dualpipe_jax._from_loss.crossing import cut_between_layers
from dualpipe_jax._from_loss.cut import Cut
from dualpipe_jax._from_loss.equality import Equality
from dualpipe_jax._from_loss.free import recipe
from dualpipe_jax._from_loss.graph import Graph
from dualpipe_jax._from_loss.inputs import Inputs, make_inputs, require_outputs, trace
from dualpipe_jax._from_loss.kinds import group
from dualpipe_jax._from_loss.layers import Layer
from dualpipe_jax._from_loss.places import Places
from dualpipe_jax._from_loss.terms import split_outputs
from dualpipe_jax._from_loss.values import Operand, Stack, needed
from dualpipe_jax._model.types import Batch


def find_cut(
    loss_fn: Callable[..., Any],
    places: Places,
    microbatch: Batch,
    key: Any,
    *,
    has_aux: bool,
    is_weighted: bool,
    max_kinds: int | None,
    max_x: int,
) -> Cut:
    """Finds the pipeline in a loss.

    Args:
      loss_fn: `(params, microbatch)` or `(params, microbatch, key) -> loss`.
      places: The places of the parameters.
      microbatch: The shapes of a microbatch.
      key: The type of a key, or None.
      has_aux: Whether loss_fn returns `(loss, metrics)`.
      is_weighted: Whether the loss is divided by a weight.
      max_kinds: The most kinds of layers; None for half of the layers, but two to four.
      max_x: The largest part of x that layers make, as a multiple of the bytes that half of the
        layers read and write.

    Raises:
      ValueError: If it has no pipeline by the rules of docs/from_loss.md.
      TypeError: If loss_fn returns a wrong type.
    """
    program, out = trace(loss_fn, places, microbatch, key)
    require_outputs(out, has_aux=has_aux)
    found: list[Cut] = []
    reasons: list[ValueError] = []
    graph = Graph(Equality())
    inputs, operands = make_inputs(places, microbatch, key)
    outputs = graph.append(program, operands)
    requirements.require_layers(outputs)
    for prefer_late in (True, False):
        try:
            cut = _cut(
                graph,
                inputs,
                outputs,
                structure=jax.tree.structure(out),
                is_weighted=is_weighted,
                prefer_late=prefer_late,
                max_kinds=max_kinds,
                max_x=max_x,
            )
        except ValueError as error:
            reasons.append(error)
            continue
        if len(cut.kinds) == 1:
            return cut
        found.append(cut)
    if not found:
        raise reasons[0]
    return min(found, key=lambda cut: len(cut.kinds))


def _cut(
    graph: Graph,
    inputs: Inputs,
    outputs: list[Operand | Stack],
    *,
    structure: Any,
    is_weighted: bool,
    prefer_late: bool,
    max_kinds: int | None,
    max_x: int,
) -> Cut:
    num_layers = len(inputs.layers)
    terms = split_outputs(graph, outputs, num_layers, is_weighted=is_weighted)
    nodes = needed(terms.values)
    graph.require_open(nodes)
    requirements.require_own_parameters(nodes, num_layers, is_weighted=is_weighted)
    slots = cut_between_layers(terms, prefer_late=prefer_late)

    def layer(index: int) -> Layer:
        types = {name: (v.aval.shape, v.aval.dtype) for name, v in inputs.layers[index].items()}
        return Layer.of(index, slots, terms.of_layers[index], types)

    align(nodes, terms, slots, layer, inputs.layers, prefer_late=prefer_late)
    requirements.require_known_in_head(terms, slots)
    if not slots.avals:
        raise ValueError("loss_fn: no value crosses between its layers: they are no pipeline")
    layers = [layer(index) for index in range(num_layers)]
    kinds = group(layers, max_kinds=max_kinds)
    requirements.require_narrow(slots, layers, max_x)
    recipes = [[recipe(column, kind.indices, num_layers) for column in kind.free] for kind in kinds]
    check = Check(graph.equality.derivative)
    doubts = {
        layer.index: check.doubt(kind, of_kind, number)
        for kind, of_kind in zip(kinds, recipes, strict=True)
        for number, layer in enumerate(kind.layers)
    }
    found = [f for of_kind in recipes for r in of_kind for f in r.families.values() if f.travels]
    return Cut(
        inputs=inputs,
        outputs=outputs,
        structure=structure,
        terms=terms,
        slots=slots,
        kinds=kinds,
        recipes=recipes,
        families=list({family.values: family for family in found}.values()),
        notes=list(dict.fromkeys(graph.notes)),
        doubts={layer: where for layer, where in doubts.items() if where},
    )
