"""Optimizers over stacked layers: an Optax transformation, applied to each layer separately.

In: a transformation as for a model whose layers are separate. Out: the same for parameters with a
layers' dim, by `jax.vmap` over that dim.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, count
from math import comb
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.shard_alike import shard_alike
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from dualpipe_jax._errors import brief, is_array, raise_all, require_name, show
from dualpipe_jax._model import call_checks, semantics
from dualpipe_jax._model.kinds import is_stacked, keys_of
from dualpipe_jax._model.types import PyTree

__all__ = ["per_layer"]

# The keys of a parameter's path in the tree.
Stack = tuple[Any, ...]
# The number of layers of every parameter; None if it is not stacked.
NumLayers = Mapping[Stack, int | None]
OfLayer = Callable[[Sequence[Any]], PyTree]


def per_layer(
    tx: optax.GradientTransformation, *, blocks: str = "blocks"
) -> optax.GradientTransformationExtraArgs:
    """Applies a transformation to each layer separately, where layers are stacked.

    To Optax a stack `[num_layers, ...]` is one parameter. Its norm is over all layers; and it has
    one dim more than a layer's parameter, so that a mask by ndim decays biases, and Muon leaves
    matrices to Adam. Here `tx` is given the parameters of one layer, without the layers' dim and
    under the same keys. Updates and state equal those of a model whose layers are separate:

    >>> import jax, jax.numpy as jnp, optax, dualpipe_jax as dpj
    >>> params = {"ends": jnp.ones(3), "blocks": {"w": jnp.ones((4, 3, 3)), "b": jnp.ones((4, 3))}}
    >>> def is_matrix(params):
    ...     return jax.tree.map(lambda leaf: leaf.ndim == 2, params)
    >>> adamw = optax.adamw(0.1, weight_decay=0.5, mask=is_matrix)
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), dpj.optimizers.per_layer(adamw))
    >>> grads = jax.tree.map(jnp.zeros_like, params)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> jax.tree.map(lambda leaf: float(jnp.abs(leaf).max().round(3)), updates)  # w decays
    {'blocks': {'b': 0.0, 'w': 0.05}, 'ends': 0.0}
    >>> state[1][0].mu["blocks"]["w"].shape, state[1][0].count.shape
    ((4, 3, 3), ())

    A norm over all parameters belongs outside, as `clip_by_global_norm` above, where the norm of a
    stack is that of its layers; inside it is refused. Noise (`optax.add_noise`) belongs outside
    too: inside, all layers would get the same noise, and no check finds that.

    Each device updates its own layers, and the program does not grow with their number. The state
    has the layers' dim where the parameters have it, and `dpj.shardings` shards it as the
    parameters. For a state too large for one device call `jax.jit(tx.init, out_shardings=...)`.

    Args:
      tx: The transformation. Its masks and labels, functions or trees, are for one layer.
      blocks: The key or attribute under which the layers are stacked, as for `dpj.shardings`. With
        `Model.layout` the stacks of all kinds are there, each with its own number of layers.

    Returns:
      The transformation for stacked layers. An extra argument of its `update` may hold trees like
      the parameters, which are stacked too; all other values reach `tx` unchanged.

    Raises:
      TypeError: If an argument has a wrong type; by `init` and `update`, if a leaf is no array.
      ValueError: By `init` and `update`, if no parameter is under `blocks`, if one there is a
        scalar, or if `tx` combines different parameters.
    """
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise TypeError(f"tx={brief(tx)}: must be an optax transformation, as optax.adam makes")
    require_name("blocks", blocks)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        return _over_layers(tx.init, params, _num_layers(params, blocks))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        def of_layer(trees: Any) -> tuple[optax.Updates, optax.OptState]:
            updates, state, params, extra_args = trees
            return tx.update(updates, state, params, **extra_args)

        num_layers = _num_layers(updates, blocks)
        trees = updates, state, params, extra_args
        updates, new_state = _over_layers(of_layer, trees, num_layers)
        return updates, _sharded_alike(state, new_state, num_layers)

    return optax.GradientTransformationExtraArgs(init, update)


def _num_layers(params: PyTree, blocks: str) -> NumLayers:
    """Finds the stacks among parameters, and the number of layers of each."""
    call_checks.arrays(semantics.pytree("params", params), "params")
    flat, _ = tree_flatten_with_path(params, is_leaf=_is_masked)
    # `optax.tree_map_params` calls `init` with a tree that has no leaves.
    if flat and not any(blocks in keys_of(path) for path, _ in flat):
        raise_all(
            f"blocks={brief(blocks)}: must be the key or attribute of the parameters under which "
            "the layers are stacked",
            (f"params{keystr(path)} is {show(leaf)}" for path, leaf in flat),
        )
    found = [(path, leaf, is_stacked(path, blocks)) for path, leaf in flat if not _is_masked(leaf)]
    raise_all(
        "params: every leaf under blocks must have the layers as its leading dim",
        (
            f"params{keystr(path)} is {show(leaf)}"
            for path, leaf, is_stack in found
            if is_stack and not np.ndim(leaf)
        ),
    )
    return {
        tuple(keys_of(path)): np.shape(leaf)[0] if is_stack else None
        for path, leaf, is_stack in found
    }


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _over_layers(function: Callable[[Any], PyTree], trees: PyTree, num_layers: NumLayers) -> PyTree:
    """Calls a function of one layer's trees, vmapped over the layers' dim of all stacks.

    Stacks of different lengths, which are of different kinds, are vmapped one after the other.
    """
    lengths = {length for length in num_layers.values() if length is not None}
    if not lengths:
        return function(trees)
    flat, structure = tree_flatten_with_path(trees)
    leaves = [leaf for _, leaf in flat]
    found = [_stack_of(path, num_layers) if is_array(leaf) else None for path, leaf in flat]
    stack_at = {index: stack for index, stack in enumerate(found) if stack is not None}

    def of_layer(of_stacks: Sequence[Any]) -> PyTree:
        replaced = dict(zip(stack_at, of_stacks, strict=True))
        return function(
            jax.tree.unflatten(structure, [replaced.get(i, leaf) for i, leaf in enumerate(leaves)])
        )

    stacked, stacks = [leaves[index] for index in stack_at], [*stack_at.values()]
    out = jax.eval_shape(of_layer, [_layer_of(leaf) for leaf in stacked])
    flat_out, structure_out = tree_flatten_with_path(out)
    stacks_out = [_stack_of(path, num_layers) for path, _ in flat_out]
    _refuse_combining(of_layer, stacked, stacks, stacks_out)
    by_length = [
        {stack for stack in num_layers if num_layers[stack] == length} for length in sorted(lengths)
    ]
    mapped = _vmapped(of_layer, by_length, stacks, stacks_out)
    return jax.tree.unflatten(structure_out, mapped(stacked))


def _stack_of(path: Sequence[Any], num_layers: NumLayers) -> Stack | None:
    """Finds the stack of a leaf in any tree: the leaf's path contains the keys of the stack.

    It may contain the keys of several parameters, such as `ends, tower, blocks, kernel` and
    `blocks, kernel`: the longest ones count, or the last ones, after labels of `optax.partition`.
    """
    keys = tuple(keys_of(path))
    parts = (keys[i:j] for j in range(len(keys), 0, -1) for i in range(j))
    param = max((part for part in parts if part in num_layers), key=len, default=None)
    return None if param is None or num_layers[param] is None else param


def _layer_of(leaf: Any, num_dims: int = 0) -> jax.ShapeDtypeStruct:
    """Gives the type of one layer of a stack, with `num_dims` dims of size 1 before its own."""
    sharding = jax.typeof(leaf).sharding
    return jax.ShapeDtypeStruct(
        (*[1] * num_dims, *leaf.shape[1:]),
        leaf.dtype,
        sharding=sharding.update(spec=jax.P(*[None] * num_dims, *sharding.spec[1:])),
    )


def _vmapped(
    of_layer: OfLayer,
    levels: Sequence[set[Stack]],
    stacks: Sequence[Stack],
    stacks_out: Sequence[Stack | None],
) -> Callable[[Sequence[Any]], list[Any]]:
    """Vmaps a function once for each of `levels`, over the leading dims of the level's stacks.

    Results are a list of leaves. A result of a stack that is not in a level must not have its dim.
    """

    def mapped(of_stacks: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves(of_layer(of_stacks))

    for level in levels:
        in_axes, out_axes = (
            [0 if stack in level else None for stack in own] for own in (stacks, stacks_out)
        )
        mapped = jax.vmap(mapped, in_axes=(in_axes,), out_axes=out_axes)
    return mapped


def _refuse_combining(
    of_layer: OfLayer,
    stacked: Sequence[Any],
    stacks: Sequence[Stack],
    stacks_out: Sequence[Stack | None],
) -> None:
    """Refuses a function if a result for one stack, or for none, depends on another stack.

    In a trace each stack is vmapped over half of a few dims, no two stacks over the same half: if a
    result depends on another stack, JAX finds a dim that the result must not have.
    """
    names = list(dict.fromkeys(stacks))
    num_dims = next(n for n in count(2) if comb(n, n // 2) >= len(names))
    choices = combinations(range(num_dims), num_dims // 2)
    halves = {name: next(choices) for name in names}
    levels = [{stack for stack in names if dim in halves[stack]} for dim in range(num_dims)]
    levels = [level for level in levels if level]
    types = [_layer_of(leaf, num_dims // 2) for leaf in stacked]
    try:
        jax.eval_shape(_vmapped(of_layer, levels, stacks, stacks_out), types)
    except ValueError as error:
        raise ValueError(
            "tx: must transform each parameter separately, but it combines several, as "
            "clip_by_global_norm and apply_if_finite do; apply these outside of per_layer: "
            "optax.chain(optax.clip_by_global_norm(1.0), per_layer(optax.adamw(1e-3)))"
        ) from error


def _sharded_alike(old: PyTree, new: PyTree, num_layers: NumLayers) -> PyTree:
    """Shards stacks of a new state as those of the old one, where a program is compiled.

    XLA would replicate a value that is the same for all layers, such as the zeros in place of the
    moments that Adafactor does not keep, and the next call would compile the program again.
    """

    def alike(path: Any, before: Any, after: Any) -> Any:
        is_stack = isinstance(after, jax.core.Tracer) and _stack_of(path, num_layers) is not None
        return shard_alike(before, after)[1] if is_stack and before.shape == after.shape else after

    return tree_map_with_path(alike, old, new)
