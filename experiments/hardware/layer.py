"""Measures a layer: F, I, W and B as the executor runs them, beside `jax.vjp` of the same block.

The executor's figures are differences between steps over one rank, so that embedding, head and
ticks, which both steps have, cancel: of all layers and of half of them, by the layers and
microbatches between. F is that of `dpj.evaluate`; I is that of a step whose layers are frozen, less
F; W is that of the whole step, less both; a full backward is that of a step with full backwards,
less F. F keeps no residuals for a backward in the first step and fewer in the second: the time to
write them is in W and B.

`jax.vjp`'s figures are those of a `lax.scan` over microbatches with one layer: the block alone, the
gradient of its input, all gradients (added up in float32), and their differences.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import dualpipe_jax as dpj
from experiments.compiled import models
from experiments.hardware import programs
from experiments.hardware.tasks import Figure, Sizes, Task
from experiments.hardware.timing import Samples, difference, share, side_by_side

TABLE = "layer"
OURS, VJP = "executor", "jax.vjp"
# The program of each figure, and the one that is subtracted from it.
_FROM: dict[str, dict[str, tuple[str, str]]] = {
    OURS: {
        "F": ("forward", ""),
        "I": ("frozen", "forward"),
        "W": ("split", "frozen"),
        "B": ("full", "forward"),
        "I + W": ("split", "forward"),
    },
    VJP: {
        "F": ("block", ""),
        "I": ("input grad", "block"),
        "W": ("gradients", "input grad"),
        "B": ("gradients", "block"),
    },
}
_FROZEN = {"ends": True, "blocks": False}


def measure(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a layer and a microbatch."""
    sizes = task.sizes
    half, whole = sizes.layers // 2, sizes.layers
    alone = _of_vjp(sizes)
    steps = {
        **_of_executor(sizes, half, programs.make_mesh(1)),
        **_of_executor(sizes, whole, programs.make_mesh(1)),
    }
    times = side_by_side({**alone, **steps}, rounds=sizes.rounds)
    for name, failure in times.failures.items():
        yield Figure(table=TABLE, row=name, column="F", note=failure, is_failure=True)
    yield from figures_of(times.samples, half=half, whole=whole, microbatches=sizes.microbatches)


def figures_of(samples: Samples, *, half: int, whole: int, microbatches: int) -> Iterator[Figure]:
    """Yields the figures of those programs that have run."""
    known = {name: share(samples[name], microbatches) for name in _VJP if name in samples}
    for name in _EXECUTOR:
        one, two = f"{name}, {half} layers", f"{name}, {whole} layers"
        if one in samples and two in samples:
            parts = (whole - half) * microbatches
            known[name] = share(difference(samples[two], samples[one]), parts)
    for row, columns in _FROM.items():
        for column, (program, less) in columns.items():
            if program in known and (not less or less in known):
                found = difference(known[program], known[less]) if less else known[program]
                yield Figure(table=TABLE, row=row, column=column, samples=found)


def _of_executor(sizes: Sizes, layers: int, mesh: Any) -> dict[str, Callable[[], programs.Step]]:
    """Makes the steps of so many layers over one rank, all layers unrolled."""
    args = programs.make_arrays(sizes, mesh, layers=layers, microbatches=sizes.microbatches)

    def step(*, split: bool, trainable: Any = True) -> Any:
        execution = dpj.Execution(unroll=True, split_backward=split)
        return programs.pipelined(
            sizes,
            mesh,
            microbatches=sizes.microbatches,
            execution=execution,
            trainable=trainable,
        )

    model = models.FAMILIES[sizes.family].model
    forward = dpj.evaluate(model, mesh=mesh, num_microbatches=sizes.microbatches)
    steps = dict(
        zip(
            _EXECUTOR,
            (forward, step(split=True, trainable=_FROZEN), step(split=True), step(split=False)),
            strict=True,
        )
    )
    options = programs.options_for_overlap()
    return {
        f"{name}, {layers} layers": programs.runner(function, args, options)
        for name, function in steps.items()
    }


_EXECUTOR = ("forward", "frozen", "split", "full")
_VJP = ("block", "input grad", "gradients")


def _of_vjp(sizes: Sizes) -> dict[str, Callable[[], programs.Step]]:
    """Makes loops over microbatches of one layer; the cotangent of its output is its input."""
    family = models.FAMILIES[sizes.family]
    params, _ = programs.make_arrays(
        sizes, programs.make_mesh(1), layers=1, microbatches=sizes.microbatches
    )
    layer: Mapping[str, jax.Array] = {n: leaf[0] for n, leaf in params["blocks"].items()}
    shape = (sizes.microbatches, sizes.tokens, sizes.width)
    inputs = jax.random.normal(jax.random.key(1), shape, models.DTYPE)

    def block(layer: Any, x: jax.Array) -> jax.Array:
        return family.block(layer, x, dpj.Context(microbatch=None))

    def of_input(layer: Any, x: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: block(layer, x), x)[1](x)[0]

    def of_all(layer: Any, x: jax.Array) -> Any:
        return jax.vjp(block, layer, x)[1](x)

    def last(function: Callable[..., Any]) -> Callable[..., Any]:
        def loop(layer: Any, inputs: jax.Array) -> Any:
            def step(_: jax.Array, x: jax.Array) -> Any:
                return function(layer, x), None

            return lax.scan(step, jnp.zeros_like(inputs[0]), inputs)[0]

        return loop

    def summed(layer: Any, inputs: jax.Array) -> Any:
        def step(carry: Any, x: jax.Array) -> Any:
            grads, dx = of_all(layer, x)
            return (jax.tree.map(jnp.add, carry[0], grads), dx), None

        zeros = jax.tree.map(jnp.zeros_like, layer), jnp.zeros_like(inputs[0])
        return lax.scan(step, zeros, inputs)[0]

    loops = dict(zip(_VJP, (last(block), last(of_input), summed), strict=True))
    return {name: programs.runner(loop, (layer, inputs)) for name, loop in loops.items()}
