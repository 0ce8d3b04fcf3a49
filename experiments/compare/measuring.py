"""Contenders, all compiled first -> the same steps of each, in turns -> losses and seconds.

A contender is a schedule over some ranks, or the same model without a pipeline, on one device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

import dualpipe_jax as dpj
from experiments.train_lm.model import LanguageModel

AXIS = "pipe"
SEQUENTIAL = "sequential"
# Parameters, then the optimizer's state.
State = tuple[Any, optax.OptState]


@dataclass(kw_only=True, eq=False)
class Contender:
    """One compiled training step, the state of its training, and the seconds of its steps.

    The first step is in `losses`, but not in the seconds: it is the one that warms up.
    """

    name: str
    num_ranks: int
    schedule: dpj.Schedule | None  # None without a pipeline
    step: jax.stages.Compiled
    compile_seconds: float
    state: State
    losses: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def memory(self) -> Any:
        """The program's memory on a device, by XLA's own account."""
        analysis = self.step.memory_analysis()
        assert analysis is not None, "this backend does not say how much memory a program takes"
        return analysis

    def take_step(self, batch: np.ndarray) -> None:
        """Takes a step and waits for it on all devices."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, loss = jax.block_until_ready(self.step(self.state, batch))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if self.losses:
            self.wall_seconds.append(wall)
            self.cpu_seconds.append(cpu)
        self.losses.append(float(loss))


def compile_contender(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    model: LanguageModel,
    params: Any,
    optimizer: optax.GradientTransformation,
    batch: np.ndarray,
) -> Contender:
    """Compiles a schedule, or with the name `SEQUENTIAL` the model without a pipeline."""
    if name == SEQUENTIAL:
        schedule = None
        grad_fn = jax.value_and_grad(
            dpj.sequential(model.for_pipeline(), num_microbatches=num_microbatches)
        )
        mesh = jax.make_mesh((1,), (AXIS,), devices=jax.devices()[:1])
    else:
        mesh = jax.make_mesh((num_ranks,), (AXIS,), devices=jax.devices()[:num_ranks])
        schedule = dpj.schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
        grad_fn = dpj.value_and_grad(
            model.for_pipeline(),
            mesh=mesh,
            num_microbatches=num_microbatches,
            schedule=schedule,
            axis=AXIS,
            # Full backwards are the least work, and work is all that fake devices show.
            execution=dpj.Execution(overlap=True, split_backward=False),
        )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, dpj.shardings(params, mesh=mesh, axis=AXIS))
        state = (params, jax.jit(optimizer.init)(params))
        start = time.perf_counter()
        step = _compile_step(grad_fn, optimizer, state, batch)
        compile_seconds = time.perf_counter() - start
    return Contender(
        name=name,
        num_ranks=num_ranks,
        schedule=schedule,
        step=step,
        compile_seconds=compile_seconds,
        state=state,
    )


def _compile_step(
    grad_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    state: State,
    batch: np.ndarray,
) -> jax.stages.Compiled:
    """Compiles loss, gradients and update to one program, `(state, batch) -> (state, loss)`."""

    def step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
        params, opt_state = state
        loss, grads = grad_fn(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def race(
    contenders: Sequence[Contender], batches: Iterator[np.ndarray], *, num_steps: int
) -> Iterator[None]:
    """Takes the same steps with all of them, in turns; yields after each.

    Each round begins with another one, so that nobody always runs after the same neighbour.
    """
    for index in range(num_steps):
        batch = next(batches)
        turn = index % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            contender.take_step(batch)
            yield
