"""Equations on arrays with a row for each layer, by which rows must stay the user's own.

Every dim has the same size, so that an equation that takes one for another shows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dualpipe_jax._from_loss.equality import Equality
from dualpipe_jax._from_loss.evaluate import evaluate
from dualpipe_jax._from_loss.graph import Graph
from dualpipe_jax._from_loss.values import Source, Stack, Value, needed

SIZE = 3
SHAPE = (SIZE, SIZE, SIZE)
ROWS = np.random.default_rng(0).standard_normal(SHAPE)
BATCH = np.random.default_rng(1).standard_normal(SHAPE)
INDICES = np.array([2, 0, 0])

# Functions of an array with a row for each layer, and of an array of the batch.
APART: dict[str, Callable[[Any, Any], Any]] = {
    "elementwise": lambda a, b: jnp.tanh(a) ** 2 * 3 + 1,
    "with another array": lambda a, b: a * b,
    "with one row of another array": lambda a, b: a - b[:1],
    "with a column of another array": lambda a, b: jnp.maximum(b[:, :1], a),
    "with a scalar": lambda a, b: a / b[0, 0, 0],
    "two choices": lambda a, b: jnp.where(b > 0, a, jnp.exp(a)),
    "clipped": lambda a, b: jnp.clip(a, -0.5, 0.5).astype(jnp.float32),
    "rows in another order": lambda a, b: a[::-1],
    "columns in another order": lambda a, b: a[:, ::-1],
    "some rows": lambda a, b: a[1:],
    "no rows": lambda a, b: a[1:1].sum() + a[2:3].max((1, 2)) + a[:0].reshape(0, 2).sum(),
    "some columns": lambda a, b: a[:, 1:] - a[..., ::2, 1:2] + b[0, 2, 1],
    "columns chosen by the batch": lambda a, b: lax.dynamic_slice_in_dim(a, b.argmax(), 2, 1),
    "one row": lambda a, b: a[1] + a[-1],
    "transposed rows": lambda a, b: a.transpose(0, 2, 1),
    "reshaped rows": lambda a, b: a.reshape(SIZE, -1),
    "more dims": lambda a, b: jnp.broadcast_to(a[..., None], (*SHAPE, 2)),
    "sum of rows": lambda a, b: a.sum(0),
    "sum of all": lambda a, b: a.sum(),
    "sum of the last dim": lambda a, b: a.sum(-1),
    "maximum of columns": lambda a, b: a.max((1, 2)),
    "mean and variance of columns": lambda a, b: a.mean(1) + jnp.var(a, axis=2),
    "weighted sum": lambda a, b: jnp.tensordot(b[0, 0], a, (0, 0)),
    "weighted sums": lambda a, b: jnp.tensordot(a, b, (0, 0)),
    "contracted row by row": lambda a, b: (
        jnp.einsum("lij,lkj->lik", a, b) + jax.vmap(jnp.vdot)(a, a)[:, None, None]
    ),
    "contracted rows and columns": lambda a, b: (
        jnp.einsum("lij,lik,jm->jkm", a, b, b[0]) + jnp.einsum("ilj,ilj->", a, a)
    ),
    "stacked again": lambda a, b: jnp.stack([a[i] * i for i in range(SIZE)]),
    "chosen rows": lambda a, b: a[INDICES],
    "maximum of rows": lambda a, b: a.max(0),
    "every second row": lambda a, b: a[::2],
    "a chosen row": lambda a, b: jnp.take(a, 2, axis=0) + a[jnp.int32(1)],
    "a row by a counted index": lambda a, b: a[(jnp.arange(SIZE) * 2)[1] - 1],
    "split rows and columns": lambda a, b: (
        jnp.split(a, SIZE)[1][0, 1:] + jnp.split(a, [1], 1)[1][0]
    ),
    "rows of two parts": lambda a, b: jnp.concatenate([a[2:], a[:2]]),
    "minimum and product of rows": lambda a, b: a.min(0) - a.prod(0),
    "all and any of rows": lambda a, b: (a > 0).all(0) | (a > 1).any(0),
}
WHOLE: dict[str, Callable[[Any, Any], Any]] = {
    "sum of joined rows": lambda a, b: jnp.concatenate([a[i] for i in range(SIZE)]).sum(),
    "joined rows": lambda a, b: jnp.concatenate([a[i][None] for i in range(SIZE)]),
    "one row as a scalar": lambda a, b: a[2:].max((1, 2)).reshape(()),
    "contracted rows with columns": lambda a, b: jnp.einsum("lij,jlk->ik", a, b),
    "transposed": lambda a, b: a.T,
    "first two dims": lambda a, b: a.transpose(1, 0, 2),
    "rolled": lambda a, b: jnp.roll(a, 1, 0),
    "sums so far": lambda a, b: jnp.cumsum(a, 0),
    "sorted": lambda a, b: jnp.sort(a, 0),
    "all elements in a row": lambda a, b: a.reshape(-1),
    "broadcast to other rows": lambda a, b: jnp.broadcast_to(a[:1], SHAPE) + a[:1].sum(),
    "added to a dim": lambda a, b: jnp.broadcast_to(a[None], (SIZE, *SHAPE)),
    "contracted columns": lambda a, b: a @ b,
    "columns by rows": lambda a, b: jnp.einsum("ilj,lij->lij", a, b),
    "contracted with itself": lambda a, b: jnp.einsum("lij,lkj->ik", a, a),
    "padded": lambda a, b: jnp.pad(a, ((1, 0), (0, 0), (0, 0))),
    "tiled": lambda a, b: jnp.tile(a, (2, 1, 1)),
    "sorted columns": lambda a, b: jnp.sort(a, 1),
    "scanned over columns": lambda a, b: lax.cumsum(a, 2),
}


@pytest.mark.parametrize("is_weights", [True, False], ids=["parameters", "values"])
@pytest.mark.parametrize("name", [*APART, *WHOLE])
def test_rows_are_those_of_the_whole_array(name: str, is_weights: bool) -> None:
    f = {**APART, **WHOLE}[name]
    aval = jax.core.ShapedArray(SHAPE[1:], ROWS.dtype)
    batch = Value(jax.typeof(BATCH), source=Source("batch", "0"), of_batch=True)
    rows = [
        Value(
            aval,
            source=Source("layer", "w", layer),
            position=layer,
            of_layers=1 << layer,
            of_batch=not is_weights,
        )
        for layer in range(SIZE)
    ]
    graph = Graph(Equality())
    program = jax.make_jaxpr(f)(ROWS, BATCH)
    (out,) = graph.append(program, [Stack([*rows], jax.typeof(ROWS)), batch])
    found = graph.as_value(out)
    arrays = {batch: BATCH, **dict(zip(rows, ROWS, strict=True))}
    (given,) = evaluate([found], arrays)
    wanted = f(ROWS, BATCH)
    assert given.dtype == wanted.dtype
    np.testing.assert_allclose(given, wanted, rtol=1e-6 if given.dtype == "float32" else 1e-12)
    if name in APART:
        apart = out.values if isinstance(out, Stack) else [out]
        assert not {"stack", "concatenate"} & {node.name for node in needed(apart)}
