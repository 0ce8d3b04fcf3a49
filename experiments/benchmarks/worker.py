"""One variant in a process of its own: compiles, warms up, then takes a step whenever it is told.

In: a Task as JSON, the only argument; then lines "step" on stdin, until it ends. Out, on stdout:
a Compiled as a line of JSON, then a Step for each line. Between steps it waits for the next line,
and takes nothing from the others.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from experiments.benchmarks import variants
from experiments.benchmarks.tasks import Compiled, Step, Task
from experiments.train_lm.model import LanguageModel


def compile_task(task: Task) -> tuple[jax.stages.Compiled, tuple[Any, jax.Array], float]:
    """Compiles the step of a task; returns it, its arguments, and the seconds that it took."""
    sizes = task.sizes
    model = LanguageModel(
        layers=sizes.layers,
        width=sizes.width,
        heads=sizes.heads,
        vocabulary=sizes.vocabulary,
    )
    grad_fn, mesh = variants.make(
        task.variant,
        model=model.for_pipeline(),
        num_layers=sizes.layers,
        num_ranks=task.ranks,
        num_microbatches=task.microbatches,
        remat=task.remat,
    )
    params = jax.device_get(jax.jit(model.init)(jax.random.key(sizes.seed)))
    params = jax.device_put(params, dpj.shardings(params, mesh=mesh, axis=variants.AXIS))
    # Random tokens: nothing is to be learned here.
    text = np.random.default_rng(sizes.seed).integers(
        0,
        sizes.vocabulary,
        size=(task.microbatches * sizes.microbatch_size, sizes.sequence + 1),
        dtype=np.int32,
    )
    batch = jax.device_put(text, NamedSharding(mesh, PartitionSpec()))
    start = time.perf_counter()
    options = variants.compiler_options(task.variant)
    step = jax.jit(grad_fn).lower(params, batch).compile(options)
    return step, (params, batch), time.perf_counter() - start


def describe(
    step: jax.stages.Compiled, arguments: tuple[Any, jax.Array], compile_seconds: float
) -> Compiled:
    """Describes the program, after a warm-up step."""
    memory: Any = step.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    loss, grads = step(*arguments)
    return Compiled(
        compile_seconds=compile_seconds,
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        # Added to JAX in the course of time; 0 where the backend does not fill it in.
        peak_bytes=getattr(memory, "peak_memory_in_bytes", 0) or None,
        loss=float(loss),
        gradient_norms=_norms(jax.device_get(grads)),
    )


def _norms(grads: dict[str, Any]) -> list[float]:
    # In float64: sums of the same numbers in another order are to come to the same.
    def squares(leaf: np.ndarray) -> np.ndarray:
        rows = leaf.astype(np.float64).reshape(len(leaf), -1)
        return np.square(rows).sum(axis=1)

    ends = sum(squares(leaf[None]) for leaf in jax.tree.leaves(grads["ends"]))
    layers = sum(squares(leaf) for leaf in jax.tree.leaves(grads["blocks"]))
    return np.sqrt(np.concatenate([ends, layers])).tolist()


def take_step(step: jax.stages.Compiled, arguments: tuple[Any, jax.Array]) -> Step:
    """Takes a step and waits for it on all devices."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss, _ = jax.block_until_ready(step(*arguments))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Step(
        wall_seconds=wall,
        cpu_seconds=cpu,
        resident_bytes=_resident_bytes(),
        loss=float(loss),
    )


def forget_resident_peak() -> None:
    """Lets the most resident memory count from here on, where Linux does: compiling takes more."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]  # in KiB
    return int(peaks[0]) * 1024 if peaks else None


def main() -> None:
    """Runs the worker."""
    task = Task.from_dict(json.loads(sys.argv[1]))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", task.ranks)
    # A program found in a cache would have no compile time.
    jax.config.update("jax_enable_compilation_cache", False)
    # So that the last line of an error is its message.
    jax.config.update("jax_traceback_filtering", "off")
    step, arguments, compile_seconds = compile_task(task)
    forget_resident_peak()
    _say(describe(step, arguments, compile_seconds))
    for line in sys.stdin:
        assert line == "step\n", line
        _say(take_step(step, arguments))


def _say(answer: Compiled | Step) -> None:
    print(json.dumps(dataclasses.asdict(answer)), flush=True)


if __name__ == "__main__":
    main()
