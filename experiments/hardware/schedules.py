"""Measures a step of one schedule over all devices, in a process of its own.

Its peak of memory is then that of the step. The step has loss and gradients, no optimizer.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import dualpipe_jax as dpj
from experiments.hardware import programs
from experiments.hardware.tasks import Figure, Task
from experiments.hardware.timing import describe, side_by_side

TABLE = "schedules"
_IDLE = re.compile(r"([\d.]+)% idle")
_PROFILED = 3  # steps in a profile: the last whole one is read


def measure(task: Task) -> Iterator[Figure]:
    """Yields the figures of a schedule: time, memory, predictions, idle share."""
    sizes = task.sizes
    mesh = programs.make_mesh(task.devices)
    microbatches, layers = sizes.microbatches * task.devices, sizes.layers * task.devices
    args = programs.make_arrays(sizes, mesh, layers=layers, microbatches=microbatches)
    grad_fn = programs.pipelined(sizes, mesh, microbatches=microbatches, schedule=task.schedule)
    account = grad_fn.memory(*args)
    yield _figure(task, "execution", note=str(account.execution))
    yield _figure(task, "account", programs.bytes_on_device(args) + account.num_bytes)
    if task.costs is not None:
        yield _simulated(task, grad_fn.schedule, account.execution)

    compiled = programs.compile_step(grad_fn, args, programs.options_for_overlap())
    needed = programs.compiled_memory(compiled)
    if needed is not None:
        yield _figure(task, "compiler", needed)
    times = side_by_side({"": lambda: lambda: compiled(*args)}, rounds=sizes.rounds)
    if times.failures:
        yield _figure(task, "seconds", note=times.failures[""], is_failure=True)
        return
    yield _figure(task, "seconds", *times.samples[""])
    peak = programs.peak_memory(mesh)
    if peak is not None:
        yield _figure(task, "peak", peak)
    yield _idle(task, compiled, args)
    if task.asks_preflight:
        yield _preflight(task, grad_fn, args, mesh)


def _figure(
    task: Task, column: str, *samples: float, note: str = "", is_failure: bool = False
) -> Figure:
    return Figure(
        table=TABLE,
        row=task.schedule,
        column=column,
        samples=samples,
        note=note,
        is_failure=is_failure,
    )


def _simulated(task: Task, schedule: dpj.Schedule, execution: dpj.Execution) -> Figure:
    """Replays the schedule at the layer's measured costs, with transfers that take no time."""
    assert task.costs is not None
    forward, input_grad, weight_grad = task.costs
    found = dpj.simulate(
        schedule,
        costs=dpj.Costs(forward=forward, input_grad=input_grad, weight_grad=weight_grad),
        num_layers=task.sizes.layers * task.devices,
        execution=execution,
        rendezvous=programs.platform() != "gpu",
    )
    return _figure(task, "simulated", found.makespan)


def _idle(task: Task, compiled: Any, args: tuple[Any, ...]) -> Figure:
    """Profiles some steps, and has `dualpipe-jax measured` find the share in which ranks idle."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions would fill the buffers
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(_PROFILED):
            jax.block_until_ready(compiled(*args))
        jax.profiler.stop_trace()
        result = subprocess.run(
            [sys.executable, "-m", "dualpipe_jax", "measured", folder],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
    found = _IDLE.search(result.stdout)
    if found is None:
        words = (result.stderr.strip().splitlines() or ["nothing said"])[-1]
        return _figure(task, "idle", note=words, is_failure=True)
    return _figure(task, "idle", float(found[1]) / 100)


def _preflight(task: Task, grad_fn: Any, args: tuple[Any, ...], mesh: Any) -> Figure:
    """Asks preflight for the time of the step on these devices."""
    name = programs.topology(mesh)
    if name is None:
        kind = mesh.devices.flat[0].device_kind
        return _figure(task, "preflight", note=f"preflight knows no topology of {kind}")
    try:
        report = dpj.preflight(jax.jit(grad_fn), args, name, mesh=mesh)
    except Exception as error:  # noqa: BLE001, whatever the compiler says
        return _figure(task, "preflight", note=describe(error), is_failure=True)
    if report.prediction.seconds is None:
        return _figure(task, "preflight", note=report.prediction.reason)
    return _figure(task, "preflight", report.prediction.seconds)
