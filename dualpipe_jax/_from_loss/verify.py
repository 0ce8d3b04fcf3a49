"""Runs a loss and its pipeline, one layer after the other, and compares values and gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax._from_loss import functions
from dualpipe_jax._from_loss.canonical import Conversion
from dualpipe_jax._from_loss.cut import Cut
from dualpipe_jax._from_loss.values import is_key, needed
from dualpipe_jax._model.kinds import indices_in_stack
from dualpipe_jax._model.types import Aux, Context, PyTree

# A loss with more than this is not run on random arrays: bytes of all values that it computes.
_MOST_BYTES = 2**28
# Of the largest entry: sums of a layer's losses may be taken in another order.
_TOLERANCE = 1e-3


def doubt(
    cut: Cut, conversion: Conversion, loss: Callable[..., Any], microbatch: PyTree, key: Any
) -> str:
    """Compares a loss and its pipeline on random arrays, where `check` left a doubt.

    Returns:
      A remark for the user: that they are equal, or why they cannot be compared.

    Raises:
      ValueError: If they differ.
    """
    where = ", ".join(dict.fromkeys(cut.doubts.values()))
    layers = f"layers {', '.join(map(str, sorted(cut.doubts)))} ({where})"
    size = sum(v.num_bytes for node in needed(cut.terms.values) for v in node.results)
    if size > _MOST_BYTES:
        return f"{layers} rest on faith: {size:,} bytes of values are too many to compare"
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if is_key(leaf):
            words = jax.eval_shape(jax.random.key_data, leaf)
            drawn = jnp.asarray(random.integers(0, 2**31, words.shape), words.dtype)
            return jax.random.wrap_key_data(drawn, impl=functions.algorithm(leaf))
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.asarray(random.uniform(0.1, 1, leaf.shape), leaf.dtype)
        return jnp.asarray(random.integers(0, 2, leaf.shape), leaf.dtype)

    places = conversion.places
    params = places.structure.unflatten(list(map(draw, places.avals)))
    arguments = jax.tree.map(draw, (microbatch, key))
    try:
        error = difference(cut, conversion, loss, params, *arguments)
    except Exception as raised:  # noqa: BLE001  a user's function may raise anything
        return f"{layers} rest on faith: the loss cannot be run here ({type(raised).__name__})"
    if not error <= _TOLERANCE:
        raise ValueError(
            f"loss_fn: {layers} hold functions or values on the host that look like those of other "
            f"layers and are none: loss or gradients differ by {error:.1e} of their largest entry; "
            "write the model as embed, block and head, and please report this"
        )
    return f"{layers} were compared by values: equal to {error:.0e}"


def difference(
    cut: Cut,
    conversion: Conversion,
    loss: Callable[..., Any],
    params: PyTree,
    microbatch: PyTree,
    key: Any,
) -> float:
    """Gives the largest difference in loss and gradients, over the largest entry of a leaf.

    Args:
      cut: The pipeline.
      conversion: Converts its parameters.
      loss: `(params, microbatch, key) -> loss`.
      params: Parameters, in the user's own tree.
      microbatch: A microbatch.
      key: A key, or None.
    """

    def pipeline(params: PyTree) -> Any:
        return _run(cut, conversion, params, microbatch, key)

    wanted = jax.jit(jax.value_and_grad(lambda p: loss(p, microbatch, key), allow_int=True))(params)
    found = jax.jit(jax.value_and_grad(pipeline, allow_int=True))(params)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        one, other = (np.asarray(x, np.result_type(np.float64, x.dtype)) for x in (a, b))
        if np.array_equal(one, other, equal_nan=True):
            continue
        scale = max(np.abs(one).max(initial=0), np.finfo(np.float32).tiny)
        error = float(np.abs(one - other).max(initial=0) / scale)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def _run(cut: Cut, conversion: Conversion, params: PyTree, microbatch: PyTree, key: Any) -> Any:
    """Computes the loss by embed, blocks and head."""
    canonical = conversion.params(params)
    ends, blocks = canonical["ends"], canonical["blocks"]
    ctx = Context(microbatch=microbatch, microbatch_rng=key, shared=canonical.get("shared"))
    x: Any = functions.embed(cut, ends, ctx)
    numbers = {i: n for n, kind in enumerate(cut.kinds) for i in kind.indices}
    losses: list[Any] = []
    for layer, row in enumerate(indices_in_stack(cut.layout)):
        stack = blocks if len(cut.kinds) == 1 else blocks[cut.layout[layer]]
        of_layer = jax.tree.map(lambda leaf, row=row: leaf[row], stack)
        here = Context(
            microbatch=microbatch,
            microbatch_rng=key,
            shared=ctx.shared,
            layer=jnp.int32(layer),
        )
        result = functions.block(cut, numbers[layer], of_layer, x, here)
        if cut.kinds[numbers[layer]].first.terms:
            x, aux = result
            assert isinstance(aux, Aux)
            losses += [] if aux.loss is None else [aux.loss]
        else:
            x = result
    return functions.head(cut, ends, x, ctx, has_aux=False) + sum(losses)
