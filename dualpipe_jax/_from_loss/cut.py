"""Finds the pipeline in a traced loss: `find_cut` is the whole way, in its order.

The loss is traced for one microbatch's shapes and becomes a graph; its outputs become terms of
layers and of the head; the values that cross between layers get their slots of x; layers that are
the same program become kinds; and each kind gets recipes for the free values of its block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._errors import is_array, raise_all, show
from dualpipe_jax._from_loss.align import align
from dualpipe_jax._from_loss.check import Check
from dualpipe_jax._from_loss.crossing import Slots, cut_between_layers, position
from dualpipe_jax._from_loss.equality import Equality
from dualpipe_jax._from_loss.free import Family, Recipe, recipe
from dualpipe_jax._from_loss.graph import Graph
from dualpipe_jax._from_loss.kinds import Kind, group
from dualpipe_jax._from_loss.layers import Layer
from dualpipe_jax._from_loss.places import Place, Places
from dualpipe_jax._from_loss.terms import Terms, split_outputs
from dualpipe_jax._from_loss.values import Node, Operand, Source, Stack, Value, needed
from dualpipe_jax._model import semantics
from dualpipe_jax._model.types import Batch


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Holds the inputs of a traced loss.

    Attributes:
      ends: The parameters outside of the layers, by path.
      layers: The parameters of each layer, by name.
      batch: The leaves of the microbatch.
      key: The microbatch's key, or None.
    """

    ends: dict[str, Value]
    layers: list[dict[str, Value]]
    batch: list[Value]
    key: Value | None


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Holds the pipeline of a traced loss.

    Attributes:
      inputs: Its inputs.
      outputs: Its outputs: the loss, and the leaves of its metrics.
      structure: The structure of the loss and its metrics.
      terms: The outputs of layers and head.
      slots: The values that cross, by slot of x.
      kinds: The kinds of layers.
      recipes: For each kind, how its block makes the free values that it reads.
      families: The families of keys that travel in x, behind the slots.
      notes: Remarks for the user.
      doubtful: The layers of which `check` cannot tell whether their kind's block is their program.
    """

    inputs: Inputs
    outputs: list[Operand | Stack]
    structure: Any
    terms: Terms
    slots: Slots
    kinds: list[Kind]
    recipes: list[list[Recipe]]
    families: list[Family] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubtful: list[int] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.inputs.layers)

    @property
    def layout(self) -> tuple[str | None, ...]:
        """The name of the kind of every layer; None for layers of one kind."""
        if len(self.kinds) == 1:
            return (None,) * self.num_layers
        names = {i: f"kind_{n}" for n, kind in enumerate(self.kinds) for i in kind.indices}
        return tuple(names[layer] for layer in range(self.num_layers))

    @property
    def has_tracers(self) -> bool:
        """Whether the loss reads values of a trace around it."""
        read = [v for node in needed(self.terms.values) for v in node.reads]
        arrays = [v.source.array for v in read if v.source is not None]
        return any(isinstance(array, jax.core.Tracer) for array in arrays)

    @functools.cached_property
    def shared(self) -> frozenset[str]:
        """The paths of the parameters of the ends that layers read."""
        found: set[str] = set()
        for layer in (layer for kind in self.kinds for layer in kind.layers):
            read = {v for node in layer.nodes for v in node.reads}
            read.update(v for v in layer.targets if isinstance(v, Value))
            tokens = [layer.token(v) for v in read]
            found.update(token[1] for token in tokens if token and token[0] == "ends")
        return frozenset(found)


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
    program, out = _trace(loss_fn, places, microbatch, key)
    _require_outputs(out, has_aux=has_aux)
    found: list[Cut] = []
    reasons: list[ValueError] = []
    graph = Graph(Equality())
    inputs, operands = _make_inputs(places, microbatch, key)
    outputs = graph.append(program, operands)
    if not any(isinstance(a, Value) and a.position >= 0 for a in outputs[:1]):
        raise ValueError(
            "loss_fn: its loss does not depend on the parameters of any layer; name in layers= the "
            "layers that it runs"
        )
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


def _trace(loss_fn: Callable[..., Any], places: Places, microbatch: Batch, key: Any) -> Any:
    """Traces loss_fn; returns its program, and the shapes of its outputs."""
    params = places.structure.unflatten(places.avals)
    arguments = (params, microbatch) if key is None else (params, microbatch, key)

    def checked(*arguments: Any) -> Any:
        out = semantics.as_arrays(semantics.pytree("loss_fn", loss_fn(*arguments)))
        raise_all(
            "loss_fn: must return a scalar loss, or (loss, metrics) of arrays with has_aux=True",
            (
                f"its result{jax.tree_util.keystr(path)} is {show(leaf)}"
                for path, leaf in jax.tree_util.tree_leaves_with_path(out)
                if not is_array(leaf)
            ),
            error=TypeError,
        )
        return out

    try:
        return jax.make_jaxpr(checked, return_shape=True)(*arguments)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise ValueError(
            f"loss_fn: names a mesh axis in a collective ({error}), which from_loss cannot trace; "
            "write the model as embed, block and head with manual_axes="
        ) from error


def _require_outputs(out: Any, *, has_aux: bool) -> None:
    """Requires a loss, or `(loss, metrics)`.

    Raises:
      TypeError: If loss_fn returned something else.
      ValueError: If its loss is no floating-point scalar.
    """
    is_pair = isinstance(out, tuple) and len(out) == 2
    loss = out[0] if has_aux and is_pair else out
    if has_aux and not is_pair:
        raise TypeError("loss_fn: with has_aux=True it must return (loss, metrics)")
    if not jax.tree_util.all_leaves([loss]):
        raise TypeError(
            "loss_fn: must return a scalar loss; to return metrics beside it, give has_aux=True"
        )
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn: must return a floating-point scalar, got {loss.dtype}{list(loss.shape)}; "
            "reduce it over the microbatch"
        )


def _make_inputs(places: Places, microbatch: Batch, key: Any) -> tuple[Inputs, list[Any]]:
    """Makes the inputs of the graph, and the operands of the loss's program."""
    layers: list[dict[str, Value]] = [{} for _ in range(places.num_layers)]
    ends: dict[str, Value] = {}
    operands: list[Any] = []

    def of_layer(place: Place, layer: int, aval: Any) -> Value:
        source = Source("layer", place.name, layer)
        layers[layer][place.name] = Value(aval, source=source, position=layer, of_layers=1 << layer)
        return layers[layer][place.name]

    for place, shape in zip(places.leaves, places.avals, strict=True):
        aval = jax.core.ShapedArray(shape.shape, shape.dtype)
        if place.layer is None:
            ends[place.path] = Value(aval, source=Source("ends", place.path), of_ends=True)
            operands.append(ends[place.path])
        elif place.num_stacked is None:
            operands.append(of_layer(place, place.layer, aval))
        else:
            inner = jax.core.ShapedArray(shape.shape[1:], shape.dtype)
            items = [of_layer(place, layer, inner) for layer in place.layers]
            operands.append(Stack(items, aval))
    batch = [
        Value(
            jax.core.ShapedArray(leaf.shape, leaf.dtype),
            source=Source("batch", str(number)),
            of_batch=True,
        )
        for number, leaf in enumerate(jax.tree.leaves(microbatch))
    ]
    key_value = None
    if key is not None:
        aval = jax.core.ShapedArray(key.shape, key.dtype)
        key_value = Value(aval, source=Source("key"), of_batch=True)
    operands += [*batch, *([key_value] if key_value is not None else [])]
    return Inputs(ends=ends, layers=layers, batch=batch, key=key_value), operands


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
    _require_own_parameters(nodes, num_layers, is_weighted=is_weighted)
    slots = cut_between_layers(terms, prefer_late=prefer_late)

    def layer(index: int) -> Layer:
        types = {name: (v.aval.shape, v.aval.dtype) for name, v in inputs.layers[index].items()}
        return Layer.of(index, slots, terms.of_layers[index], types)

    align(nodes, terms, slots, layer, inputs.layers, prefer_late=prefer_late)
    _require_known_in_head(terms, slots)
    if not slots.avals:
        raise ValueError("loss_fn: no value crosses between its layers: they are no pipeline")
    layers = [layer(index) for index in range(num_layers)]
    kinds = group(layers, max_kinds=max_kinds)
    _require_narrow(slots, layers, max_x)
    recipes = [[recipe(column, kind.indices, num_layers) for column in kind.free] for kind in kinds]
    check = Check(graph.equality.derivative)
    doubtful = [
        layer.index
        for kind, of_kind in zip(kinds, recipes, strict=True)
        for layer in kind.layers
        if not check.is_same(kind, of_kind, layer)
    ]
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
        doubtful=doubtful,
    )


def _require_own_parameters(nodes: Sequence[Node], num_layers: int, *, is_weighted: bool) -> None:
    """Requires layers in order, each once, with parameters of their own.

    Raises:
      ValueError: If a layer, or the head, reads parameters of an earlier layer.
    """
    for node in nodes:
        here = position(node)
        for value in node.reads:
            if not value.is_weights or value.crosses or not 0 <= value.position < here:
                continue
            if node.results[0].is_weights and node.name in ("stack", "concatenate"):
                raise ValueError(
                    f"loss_fn: an equation at {node.where} mixes the parameters of several layers "
                    f"({value.position} and {here}) in one array; let it act on each layer's own "
                    "parameters, or compute its value outside of loss_fn"
                )
            if node.results[0].is_weights:
                why = "the loss is divided by weight=" if is_weighted else "is no sum over layers"
                raise ValueError(
                    f"loss_fn: the value of {node.name} at {node.where} depends on the parameters "
                    f"of several layers ({value.position} and {here}), and {why}; "
                    "compute it outside of loss_fn (a norm of all parameters, say, beside the "
                    "optimizer's update)"
                )
            reader = f"layer {here}" + (" (or the head)" if here == num_layers - 1 else "")
            raise ValueError(
                f"loss_fn: {reader} reads parameters of layer {value.position} in {node.name} at "
                f"{node.where}: {value}; layers must run in the order of their numbers, each once; "
                "name parameters that several layers use in shared=, and layers that run "
                "alternately with others by a pattern for each"
            )


def _require_known_in_head(terms: Terms, slots: Slots) -> None:
    """Requires the head to read parameters of the ends only.

    Raises:
      ValueError: If it reads a layer's.
    """
    targets = [term.value for term in terms.of_head]
    for node in needed(targets, known=slots.before[-1].values()):
        for value in node.reads:
            if value.source is not None and value.source.kind == "layer":
                raise ValueError(
                    f"loss_fn: the head reads a parameter of layer {value.source.layer} in "
                    f"{node.name} at {node.where}: {value}; name it in shared=, or compute the "
                    "value outside of loss_fn"
                )


def _require_narrow(slots: Slots, layers: Sequence[Layer], max_x: int) -> None:
    """Requires x to be no larger than `max_x` times the bytes that half of the layers touch.

    Raises:
      ValueError: If it is larger.
    """
    # Values that embed makes are inputs: a table's rows, of which each layer reads its own.
    of_layers = {s for before in slots.before for s, v in before.items() if v.position >= 0}
    total = sum(aval.num_bytes for slot, aval in enumerate(slots.avals) if slot in of_layers)
    sizes = []
    for layer in layers:
        read = {v for node in layer.nodes for v in node.reads}
        touched = {slot for slot, v in layer.x.items() if v in read}
        touched.update(slot for slot, _ in layer.outputs)
        sizes.append(sum(slots.avals[slot].num_bytes for slot in touched))
    usual = sorted(sizes)[len(sizes) // 2]
    needed_x = math.ceil(total / max(usual, 1))
    lines = [
        f"{aval.num_bytes:,} bytes: "
        + "; ".join(
            f"before layer {b} {v}"
            for b, before in enumerate(slots.before)
            for s, v in before.items()
            if s == slot
        )
        for slot, aval in enumerate(slots.avals)
        if slot in of_layers
    ]
    raise_all(
        f"loss_fn: {total:,} bytes cross between layers, more than max_x={max_x} times the "
        f"{usual:,} that half of the layers read and write: values of several layers travel to the "
        f"end; use them in the layer that makes them, or allow it with max_x={needed_x}",
        lines if total > max_x * usual else (),
    )
