"""Twenty steps of training under the pipeline equal twenty of the sequential model, in float64.

Pipelines go wrong where an optimizer does more with gradients than add them up: a norm that misses
a stage, a mask or a schedule that sees another tree, an average that drifts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import dualpipe_jax as dpj
from tests.hlo import AS_EVER
from tests.models import assert_close, make_batch, make_mesh, make_model, make_params

NUM_STEPS, NUM_MICROBATCHES, NUM_LAYERS, NUM_SHARDS = 20, 2, 4, 2
LIMIT = 1.5  # some gradients of these runs are longer, and some are not
MODEL = make_model(frozenset(["weight"]))


def is_matrix(params: Any) -> Any:
    """The mask of those that decay: the matrices, not the vectors, of each layer."""
    return {
        "ends": jax.tree.map(lambda leaf: leaf.ndim > 1, params["ends"]),
        "blocks": jax.tree.map(lambda leaf: leaf.ndim > 2, params["blocks"]),
    }


def adamw(**more: Any) -> Any:
    return optax.adamw(optax.warmup_cosine_decay_schedule(0, 0.05, 4, NUM_STEPS), **more)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "global norm and weight-decay mask": lambda: optax.chain(
        optax.clip_by_global_norm(LIMIT),
        adamw(weight_decay=0.3, mask=is_matrix),
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(LIMIT), adamw()), every_k_schedule=3
    ),
}


def make_params_of_floats() -> Any:
    """Makes parameters without integers and empty leaves, which optimizers do not take."""
    params = make_params(NUM_LAYERS)
    return {
        part: {name: leaf for name, leaf in tree.items() if leaf.dtype == np.float64 and leaf.size}
        for part, tree in params.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps(name: str) -> None:
    """With an average of the parameters kept beside them, as of `optax.ema`."""
    optimizer, average = OPTIMIZERS[name](), optax.ema(0.9)
    mesh = make_mesh(2, data=NUM_SHARDS)
    pipelined = dpj.value_and_grad(
        MODEL, mesh=mesh, num_microbatches=NUM_MICROBATCHES, batch_axes="data"
    )
    plain = jax.value_and_grad(
        dpj.sequential(MODEL, num_microbatches=NUM_MICROBATCHES * NUM_SHARDS)
    )

    def train(grad_fn: Any, params: Any) -> Any:
        # Adam makes full steps also from gradients that are hardly more than rounding.
        @functools.partial(jax.jit, compiler_options=AS_EVER)
        def step(params: Any, state: Any, mean: Any, batch: Any) -> Any:
            loss, grads = grad_fn(params, batch)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            _, mean = average.update(params, mean)
            return params, state, mean, (loss, optax.tree.norm(grads))

        state, mean, seen = optimizer.init(params), average.init(params), []
        for number in range(NUM_STEPS):
            batch = make_batch(NUM_MICROBATCHES * NUM_SHARDS, seed=number)
            params, state, mean, figures = step(params, state, mean, batch)
            seen.append(figures)
        return params, state, mean, jnp.asarray(seen)

    params = make_params_of_floats()
    want = train(plain, params)
    blocks = jax.device_put(params["blocks"], jax.NamedSharding(mesh, P("pipe")))
    got = train(pipelined, {**params, "blocks": blocks})
    assert_close(got, want)
    norms = np.asarray(want[-1][:, 1])
    assert norms.min() < LIMIT < norms.max()
