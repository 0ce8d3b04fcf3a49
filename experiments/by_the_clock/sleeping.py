"""A device that sleeps instead of computing -> a model whose layers run on it.

The values are real, and small: a wrong order or a lost transfer changes the loss.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import dualpipe_jax as dpj
from experiments.by_the_clock.tasks import ACTIONS

# 4 KiB a value: XLA runs programs of 512 bytes and less in another way.
WIDTH = 1024
_ZERO = np.zeros((), np.float32)


class Device:
    """Takes as long as its actions are to take, one after the other: mostly it sleeps.

    The seconds are read when an action runs, so that a program may be compiled without sleeping.

    Attributes:
      seconds: How long each action of a layer takes, by its name.
      callback: For how much longer than it sleeps an action keeps its rank, by `calibrate`.
      num_sleeps: The actions that have run.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(ACTIONS, 0.0)
        self.callback = 0.0
        self.num_sleeps = 0
        # XLA may run two operations that do not depend on each other at once on a CPU's threads. A
        # device that computes would be full with one of them.
        self._busy = threading.Lock()

    def taking(self, action: str) -> Callable[[jax.Array], jax.Array]:
        """Makes the identity that takes as long as an action."""

        def sleep(value: Any) -> np.ndarray:
            with self._busy:
                time.sleep(max(0.0, self.seconds[action] - self.callback))
                self.num_sleeps += 1
            return _ZERO

        def run(value: jax.Array) -> jax.Array:
            # A callback takes and gives a scalar: JAX takes longer to hand over arrays.
            scalar = jax.ShapeDtypeStruct((), value.dtype)
            return value + jax.pure_callback(sleep, scalar, value.reshape(-1)[0])

        return run

    def calibrate(self, seconds: float) -> None:
        """Finds `callback`: runs actions of so many seconds that wait for nothing else.

        XLA comes to Python and back for each, and a sleep is a little too long.
        """
        self.seconds, self.callback, count = dict.fromkeys(ACTIONS, seconds), 0.0, 16
        take = self.taking(ACTIONS[0])
        run = jax.jit(lambda value: jax.lax.fori_loop(0, count, lambda _, each: take(each), value))
        value = np.zeros((1, WIDTH), np.float32)
        took = []
        for _ in range(4):
            start = time.perf_counter()
            run(value).block_until_ready()
            took.append(time.perf_counter() - start)
        # The first one compiles. The least of the others was disturbed the least.
        self.callback = max(0.0, min(took[1:]) / count - seconds)


def make_model(device: Device) -> dpj.Model:
    """Makes a model of layers `y = x * weights`; embedding and head do not sleep.

    Input grad and weight grad sleep in callbacks of their own, so that the library's split of the
    backward separates them.
    """
    forward, input_grad, weight_grad = (device.taking(action) for action in ACTIONS)

    @jax.custom_vjp
    def layer(weights: jax.Array, x: jax.Array) -> jax.Array:
        return forward(x * weights)

    def with_residuals(weights: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
        return forward(x * weights), (weights, x)

    def backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, x = residuals
        return weight_grad((dy * x).sum(0)), input_grad(dy * weights)

    layer.defvjp(with_residuals, backward)
    return dpj.Model(
        embed=lambda ends, ctx: ctx.microbatch * ends,
        block=lambda weights, x, ctx: layer(weights, x),
        head=lambda ends, x, ctx: (x * ends).mean(),
    )


def make_arguments(*, num_layers: int, num_microbatches: int) -> tuple[Any, np.ndarray]:
    """Draws parameters and a batch of one row a microbatch, the same in every process."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        # Around 1, so that no layer's part of the loss vanishes beside another's.
        return rng.uniform(0.8, 1.2, size=shape).astype(np.float32)

    params = {"ends": draw(WIDTH), "blocks": draw(num_layers, WIDTH)}
    return params, draw(num_microbatches, WIDTH)


def loss_of(params: Any, batch: np.ndarray) -> float:
    """Computes the loss without JAX."""
    ends = params["ends"].astype(np.float64)
    return float((batch * ends**2 * params["blocks"].astype(np.float64).prod(0)).mean())
