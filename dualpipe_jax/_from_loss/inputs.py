"""Traces a loss for the shapes of one microbatch, and makes the inputs of its graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._errors import is_array, raise_all, show
from dualpipe_jax._from_loss.places import Place, Places
from dualpipe_jax._from_loss.values import Source, Stack, Value
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


def trace(loss_fn: Callable[..., Any], places: Places, microbatch: Batch, key: Any) -> Any:
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


def require_outputs(out: Any, *, has_aux: bool) -> None:
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


def make_inputs(places: Places, microbatch: Batch, key: Any) -> tuple[Inputs, list[Any]]:
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
