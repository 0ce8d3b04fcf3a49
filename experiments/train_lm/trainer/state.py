"""The state of a run, its optimizer, and the step as one jitted program.

A step is loss, gradients and update. If the loss or a gradient is not finite, the update is left
out: parameters and the optimizer's moments stay as they are, and the step is counted.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

PyTree = Any
Figures = dict[str, Any]
# `(params, batch, key, **frozen) -> ((loss, figures), grads)`; figures are arrays for the log.
GradFn = Callable[..., tuple[tuple[jax.Array, Figures], PyTree]]


@flax.struct.dataclass
class State:
    """Everything that a step reads and writes, and that a checkpoint holds.

    Attributes:
      step: int32[], how many steps were taken.
      params: The parameters.
      opt_state: The optimizer's state, an `optax.ApplyIfFiniteState`.
      rng: uint32[2], the data of the key from which each step's key is made.
    """

    step: Any
    params: PyTree
    opt_state: Any
    rng: Any


def is_matrix(params: PyTree) -> PyTree:
    """Says for every parameter whether it is a matrix of a Flax layer, by its name."""
    # Not by ndim: the biases of the blocks are stacked, so they have two dims as well.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def make_optimizer(
    *,
    learning_rate: float,
    steps: int,
    is_decayed: Callable[[PyTree], PyTree] = is_matrix,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes AdamW behind clipping by the global norm, and its learning rate over the updates.

    Args:
      learning_rate: Its peak.
      steps: Updates in all.
      is_decayed: Says for every parameter whether its weight decays.
    """
    learning_rates = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / 10,
        peak_value=learning_rate,
        warmup_steps=max(1, min(steps // 10, 100)),
        decay_steps=steps + 1,
        end_value=learning_rate / 10,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rates, b2=0.99, weight_decay=0.1, mask=is_decayed),
    )
    return optimizer, learning_rates


def skipping(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes an optimizer that leaves out each update that is not finite, however many they are."""
    return optax.apply_if_finite(optimizer, max_consecutive_errors=2**31 - 1)


def make_init(
    init_params: Callable[[jax.Array], PyTree], optimizer: optax.GradientTransformation
) -> Callable[..., State]:
    """Makes a function from a key to the first state, to be jitted with the state's shardings.

    Parameters that are there already may be given beside the key.
    """

    def init(key: jax.Array, params: PyTree = None) -> State:
        params = init_params(key) if params is None else params
        rng = jax.random.key_data(jax.random.fold_in(key, 1))
        return State(
            step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), rng=rng
        )

    return init


def make_step(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    learning_rates: optax.Schedule,
    *,
    after_update: Callable[[PyTree, Figures, jax.Array], PyTree] | None = None,
) -> Callable[..., tuple[State, Figures]]:
    """Makes a step, `(state, batch, **frozen) -> (state, figures)`.

    Figures are those of grad_fn, the `loss`, the `learning_rate` and `grad_norm` of the update,
    and of updates that were left out `skipped` in all and `skipped_in_a_row`.

    Args:
      grad_fn: Gives loss, figures and gradients.
      optimizer: One made by `skipping`.
      learning_rates: The learning rate of each update.
      after_update: Changes parameters once more, by grad_fn's figures; told whether the update was
        finite, bool[].
    """

    def step(state: State, batch: jax.Array, **frozen: Any) -> tuple[State, Figures]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        (loss, figures), grads = grad_fn(state.params, batch, key, **frozen)
        # A loss that is not finite must not pass because its gradients happen to be.
        poison = jnp.where(jnp.isfinite(loss), 0.0, jnp.nan)
        grads = jax.tree.map(lambda grad: grad + poison.astype(grad.dtype), grads)
        updated = optimizer.update(grads, state.opt_state, state.params)
        updates: PyTree = updated[0]
        opt_state: Any = updated[1]
        params = optax.apply_updates(state.params, updates)
        if after_update is not None:
            params = after_update(params, figures, opt_state.last_finite)
        figures = figures | {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rates(state.step - state.opt_state.total_notfinite),
            "skipped": opt_state.total_notfinite,
            "skipped_in_a_row": opt_state.notfinite_count,
        }
        return State(
            step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng
        ), figures

    return step


def digest(state: PyTree) -> list[int]:
    """Gives a number for each leaf, below 2^32, that changes if any of its bits does.

    It does not depend on how the leaf is sharded, and is computed where the shards are: a sum
    modulo 2^32 of the words, each times an odd number that depends on its place.
    """
    # A program for each shape, not one that has as many parts as there are leaves; and one after
    # another, as collectives of several at once can lock the threads of fake devices.
    return [int(_digest_of(leaf)) for leaf in jax.tree.leaves(state)]


@jax.jit
def _digest_of(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = leaf.dtype.itemsize
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
    bits = jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)
    place = jnp.full((), 0x9E3779B9, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    return jnp.sum(bits * (2 * _mixed(place) + 1), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Spreads neighbouring numbers over all 32 bits (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
