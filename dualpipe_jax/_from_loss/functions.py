"""The functions of a model that a cut gives: embed, a block for each kind, head."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax._from_loss.cut import Cut
from dualpipe_jax._from_loss.evaluate import Arrays, evaluate
from dualpipe_jax._from_loss.free import Recipe
from dualpipe_jax._from_loss.kinds import Kind
from dualpipe_jax._from_loss.terms import Term
from dualpipe_jax._from_loss.values import Value, is_key
from dualpipe_jax._model import semantics
from dualpipe_jax._model.types import Aux, Context, PyTree

X = tuple[jax.Array, ...]


def embed(cut: Cut, ends: PyTree, ctx: Context) -> X:
    """Computes x_0: the first slots, empty slots of zeros, and the keys of all layers."""
    arrays = _arrays(cut, ctx, ends)
    before = cut.slots.before[0]
    values = dict(zip(before, evaluate(list(before.values()), arrays), strict=True))
    x = [
        _pack(values[slot]) if slot in values else _zeros(value.aval)
        for slot, value in enumerate(cut.slots.avals)
    ]
    for family in cut.families:
        members = evaluate(list(family.values), arrays)
        x.append(jnp.stack([_pack(member) for member in members]))
    return tuple(x)


def block(cut: Cut, number: int, params: PyTree, x: X, ctx: Context) -> Any:
    """Computes a layer of the kind `number`."""
    kind, first = cut.kinds[number], cut.kinds[number].first
    layer = ctx.layer
    assert layer is not None
    base = _arrays(cut, ctx, {})
    arrays = dict(base)
    for one in cut.recipes[number]:
        arrays[one.value] = _make_free(cut, one, base, layer, x)
    arrays.update((v, _unpack(v, _read(x, slots, layer))) for v, slots in kind.reads.items())
    arrays.update((v, params[name]) for name, v in cut.inputs.layers[first.index].items())
    tables = {key: jnp.asarray(table)[layer] for key, table in kind.tables.items()}
    values = evaluate(first.targets, arrays, tables)
    count = len(first.outputs)
    new = list(x)
    for slots, value in zip(kind.writes, map(_pack, values[:count]), strict=True):
        _write(new, slots, layer, value)
    y = tuple(new)
    if not first.terms:
        return y
    scaled = [
        (term, _scaled(cut, term, _factor(kind, number, layer), value))
        for number, (term, value) in enumerate(zip(first.terms, values[count:], strict=True))
    ]
    losses = [value for term, value in scaled if term.is_loss]
    metrics = tuple(value for term, value in scaled if not term.is_loss)
    return y, Aux(loss=sum(losses) if losses else None, metrics=metrics or None)


def _read(x: X, slots: np.ndarray, layer: jax.Array) -> Any:
    """Gives the value of a layer's slot; chosen by its index, where layers differ."""
    used, index = np.unique(slots, return_inverse=True)
    if len(used) == 1:
        return x[used[0]]
    which = jnp.asarray(index, jnp.int32)[layer]
    return lax.select_n(which, *(x[slot] for slot in used))


def _write(x: list[Any], slots: np.ndarray, layer: jax.Array, value: Any) -> None:
    """Puts a value into a layer's slot."""
    used = np.unique(slots)
    if len(used) == 1:
        x[used[0]] = value
        return
    which = jnp.asarray(slots, jnp.int32)[layer]
    for slot in used:
        x[slot] = lax.select(which == slot, value, x[slot])


def head(cut: Cut, ends: PyTree, x: X, ctx: Context, *, has_aux: bool) -> Any:
    """Computes the loss, or `(loss, metrics)`: the metrics that are the head's, in a tuple."""
    arrays = _arrays(cut, ctx, ends)
    arrays.update((v, _unpack(v, x[slot])) for slot, v in cut.slots.before[-1].items())
    values = evaluate([term.value for term in cut.terms.of_head], arrays)
    scaled = [
        (term, _scaled(cut, term, term.factor, value))
        for term, value in zip(cut.terms.of_head, values, strict=True)
    ]
    losses = [value for term, value in scaled if term.is_loss]
    loss = jnp.asarray(sum(losses), cut.outputs[0].aval.dtype)
    if not has_aux:
        return loss
    return loss, tuple(value for term, value in scaled if not term.is_loss)


def _arrays(cut: Cut, ctx: Context, ends: PyTree) -> Arrays:
    """Collects the arrays that a function is given."""
    inputs = cut.inputs
    arrays: Arrays = dict(zip(inputs.batch, jax.tree.leaves(ctx.microbatch), strict=True))
    if inputs.key is not None:
        arrays[inputs.key] = ctx.microbatch_rng
    given = {**(ctx.shared or {}), **ends}
    arrays.update((v, given[path]) for path, v in inputs.ends.items() if path in given)
    return arrays


def _make_free(cut: Cut, one: Recipe, base: Arrays, layer: jax.Array, x: X) -> Any:
    """Makes a free value for a layer."""
    arrays = dict(base)
    arrays.update(zip(one.same, evaluate(one.same, base), strict=True))
    for value, family in one.families.items():
        index = jnp.asarray(family.index)[layer]
        if family.travels:
            position = [f.values for f in cut.families].index(family.values)
            arrays[value] = _unpack(value, x[len(cut.slots.avals) + position][index])
        else:
            arrays[value] = jnp.stack(evaluate(list(family.values), base))[index]
    for value, table in one.constants.items():
        arrays[value] = jnp.asarray(table)[layer]
    tables = {key: jnp.asarray(table)[layer] for key, table in one.tables.items()}
    return evaluate([one.value], arrays, tables)[0]


def _factor(kind: Kind, number: int, layer: jax.Array) -> Any:
    """Gives the factor of a layer's term; from a table, where the layers of a kind differ."""
    factors = {of.index: of.terms[number].factor for of in kind.layers}
    if len(set(factors.values())) == 1:
        return kind.first.terms[number].factor
    return jnp.asarray([factors.get(i, 0.0) for i in range(max(factors) + 1)])[layer]


def _scaled(cut: Cut, term: Term, factor: Any, value: Any) -> Any:
    """Computes a term."""
    value = jnp.asarray(value)
    if isinstance(factor, float) and factor == 1:
        return value
    # The user's factor may stand behind a conversion, and have no place in a narrow value's dtype.
    numbers = [leaf + 1 for leaf, _ in term.places] or [0]
    dtypes = [cut.outputs[number].aval.dtype for number in numbers]
    dtype = semantics.accumulator_dtype(reduce(semantics.wider_dtype, dtypes, value.dtype))
    return jnp.asarray(factor, dtype) * value.astype(dtype)


def _pack(value: Any) -> Any:
    """Gives a value as x has it: keys as their words."""
    return jax.random.key_data(value) if is_key(jnp.asarray(value)) else jnp.asarray(value)


def _unpack(value: Value, array: Any) -> Any:
    """Gives a value of x as the layer has it."""
    if not is_key(value.aval):
        return array
    return jax.random.wrap_key_data(array, impl=algorithm(value.aval))


def algorithm(aval: Any) -> Any:
    """Finds the algorithm of a type of keys."""
    found: list[Any] = []

    def look(key: Any) -> None:
        found.append(jax.random.key_impl(key))

    jax.eval_shape(look, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return found[0]


def _zeros(aval: Any) -> Any:
    """Makes an empty slot."""
    if is_key(aval):
        shape = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return jnp.zeros(shape.shape, shape.dtype)
    return jnp.zeros(aval.shape, aval.dtype)
