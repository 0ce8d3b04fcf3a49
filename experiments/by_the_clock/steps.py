"""A task and this process's rank of the mesh -> measured steps, checked one by one.

All ranks run the same programs in the same order, and meet before and after every step.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from experiments.by_the_clock.sleeping import Device, loss_of, make_arguments, make_model
from experiments.by_the_clock.tasks import (
    ACTIONS,
    LAYERS_A_RANK,
    MICROBATCHES_A_RANK,
    NO_SLEEPS,
    Measured,
    Program,
    Task,
    make_schedule,
    predict,
)

AXIS = "pipe"
# Float32 products of some ten factors and sums of 1024: a few 1e-7. A layer or a microbatch left
# out changes the loss by far more.
_TOLERANCE = 1e-5


def run(task: Task) -> Iterator[Measured]:
    """Runs all programs of a task, in the same order on all ranks."""
    mesh = jax.make_mesh((task.num_ranks,), (AXIS,))
    device = Device()
    num_microbatches = MICROBATCHES_A_RANK * task.num_ranks
    params, batch = make_arguments(
        num_layers=LAYERS_A_RANK * task.num_ranks, num_microbatches=num_microbatches
    )
    loss = loss_of(params, batch)
    placed = {
        "ends": place(params["ends"], mesh, PartitionSpec()),
        "blocks": place(params["blocks"], mesh, PartitionSpec(AXIS)),
    }
    arguments = placed, place(batch, mesh, PartitionSpec())
    meet = _make_meeting(mesh)
    meet()
    device.calibrate(min(each for seconds in task.sleeps.values() for each in seconds.values()))
    for program in task.programs:
        for number, (name, seconds) in enumerate(task.sleeps.items()):
            of_actions: dict[str, Any] = {each: LAYERS_A_RANK * seconds[each] for each in ACTIONS}
            costs = dpj.Costs(**of_actions)
            step = make_step(
                program, costs, mesh=mesh, device=device, num_microbatches=num_microbatches
            )

            def take(step: Callable[..., Any] = step, program: Program = program) -> float:
                before = device.num_sleeps
                seconds, found = take_step(step, arguments, meet=meet)
                require_right(
                    program,
                    loss=(found, loss),
                    num_sleeps=(
                        device.num_sleeps - before,
                        # Every rank has as much work, whatever the schedule.
                        len(ACTIONS) * LAYERS_A_RANK * num_microbatches,
                    ),
                )
                return seconds

            device.seconds = dict.fromkeys(ACTIONS, 0.0)
            take()  # compiles
            if number == 0:
                yield Measured(**vars(program), costs=NO_SLEEPS, seconds=[take()])
            device.seconds = seconds
            yield Measured(
                **vars(program), costs=name, seconds=[take() for _ in range(task.repeats)]
            )


def make_step(
    program: Program, costs: dpj.Costs, *, mesh: Mesh, device: Device, num_microbatches: int
) -> Callable[..., Any]:
    """Makes the step, placed by these costs, with the backwards that are predicted to be faster."""
    return jax.jit(
        dpj.value_and_grad(
            make_model(device),
            mesh=mesh,
            num_microbatches=num_microbatches,
            schedule=make_schedule(program.schedule, num_ranks=mesh.size),
            execution=predict(program, costs, num_ranks=mesh.size).execution,
            costs=costs,
        )
    )


def take_step(
    step: Callable[..., Any], arguments: tuple[Any, Any], *, meet: Callable[[], None]
) -> tuple[float, float]:
    """Takes a step with all ranks; returns its seconds, from the first rank to the last, and loss.

    The ranks meet before it, so that none begins before the clock does, and after it.
    """
    meet()
    start = time.perf_counter()
    meet()
    loss, _ = jax.block_until_ready(step(*arguments))
    meet()
    return time.perf_counter() - start, float(loss)


def require_right(
    program: Program, *, loss: tuple[float, float], num_sleeps: tuple[int, int]
) -> None:
    """Raises if a step's loss, or the number of actions that it ran, is not as expected."""
    if not abs(loss[0] / loss[1] - 1) <= _TOLERANCE:  # not >, so that NaN is wrong
        raise RuntimeError(f"{program}: the loss is {loss[0]:.7g}, must be {loss[1]:.7g}")
    if num_sleeps[0] != num_sleeps[1]:
        slept, must = num_sleeps
        raise RuntimeError(f"{program}: a rank slept {slept} times, must be {must}")


def place(array: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Puts this rank's part of an array, which all ranks have, onto its device."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _make_meeting(mesh: Mesh) -> Callable[[], None]:
    """Makes the function that returns when all ranks have called it."""
    parts = place(np.ones(mesh.size, np.float32), mesh, PartitionSpec(AXIS))
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def meet() -> None:
        jax.block_until_ready(add(parts))

    return meet
