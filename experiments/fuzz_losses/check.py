"""Puts one program through `from_loss`, and compares its pipeline's gradients with JAX's own.

Imports JAX; `workers` sets its flags before.
"""

import os
import random
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import dualpipe_jax as dpj
from experiments.fuzz_losses.grammar import Program, write
from experiments.fuzz_losses.results import Result

ROWS, MICROBATCHES = 2, 2
TOLERANCE = {np.dtype("float32"): 1e-5}  # of a leaf's largest entry
SCHEDULES = {"1f1b": 0.85, "dualpipe": 0.05, "gpipe": 0.05, "zb-h1": 0.05}


@dataclass
class Clock:
    """Seconds by the part of a check that they went to."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times the lines inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start


def check(seed: int, *, is_first: bool = True) -> Result:
    """Checks the program of a seed.

    Args:
      seed: The seed.
      is_first: Whether to look again where values differ, in a process with XLA's default options
        and with the loss run equation by equation: XLA may compile one of the two wrongly.
    """
    program, clock = write(seed), Clock()
    try:
        return _check(program, clock, is_first=is_first)
    except Exception:  # noqa: BLE001
        # Whatever it is, the run goes on, and the program counts as wrong.
        return _result(program, "crashed", clock, traceback.format_exc())


def refusal_or_model(program: Program, functions: dict[str, Any]) -> "dpj.LossModel | Exception":
    """Makes the program's model; gives the error of a refusal."""
    try:
        return dpj.from_loss(
            functions["loss_fn"],
            functions["init"](program.seed),
            functions["make_batch"](program.seed, ROWS),
            layers=program.layers,
            shared=program.shared,
            rng=jax.random.key(program.seed) if program.has_key else None,
            has_aux=program.has_aux,
        )
    except (ValueError, TypeError) as error:
        return error


def _check(program: Program, clock: Clock, *, is_first: bool) -> Result:
    with clock.part("program"):
        functions = program.load()
        params = functions["init"](program.seed)
        batch = functions["make_batch"](program.seed, ROWS * MICROBATCHES)
    with clock.part("from_loss"):
        model = refusal_or_model(program, functions)
    if isinstance(model, Exception):
        arguments = (params, functions["make_batch"](program.seed, ROWS))
        keys = [jax.random.key(program.seed)] if program.has_key else []
        jax.eval_shape(functions["loss_fn"], *arguments, *keys)  # else its own error: crashed
        return _result(program, "refused", clock, str(model))
    wanted = _reference(program, functions["loss_fn"], params, batch, clock, is_first)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(wanted)):
        return _result(program, "invalid", clock, "the program's own values are not finite")
    schedule = random.Random(f"schedule {program.seed}").choices(
        list(SCHEDULES), list(SCHEDULES.values())
    )[0]
    mesh = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=MICROBATCHES, schedule=schedule)
    keys = {"rng": jax.random.key(program.seed)} if program.has_key else {}
    with clock.part("step: trace"):
        lowered = jax.jit(grad_fn).lower(params, batch, **keys)
    with clock.part("step: compile"):
        compiled = lowered.compile()
    with clock.part("step: run"):
        found = jax.device_get(compiled(params, batch, **keys))
    error, text = _difference(found, wanted)
    if error > 1:
        outcome = "miscompiled" if is_first and _is_right_without_options(program.seed) else "wrong"
        return _result(program, outcome, clock, f"{schedule}: {text}", error)
    return _result(program, "exact", clock, "", error)


def _result(
    program: Program, outcome: str, clock: Clock, message: str, error: float | None = None
) -> Result:
    seconds = {name: round(value, 3) for name, value in clock.seconds.items()}
    return Result(
        seed=program.seed,
        digest=program.digest,
        outcome=outcome,
        message=message,
        names_line=bool(re.search(rf"{re.escape(program.file)}:\d", message)),
        features=list(program.features),
        num_layers=program.num_layers,
        seconds=seconds,
        error=error,
    )


def _is_right_without_options(seed: int) -> bool:
    command = [sys.executable, "-m", "experiments.fuzz_losses.check", str(seed)]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, check=False)
    return done.returncode == 0


def _reference(
    program: Program, loss_fn: Any, params: Any, batch: Any, clock: Clock, is_compiled: bool
) -> Any:
    """Computes the mean over microbatches of loss and gradients, and the sum of metrics."""
    function = jax.value_and_grad(loss_fn, has_aux=program.has_aux)
    split = {name: np.split(a, MICROBATCHES) for name, a in batch.items()}
    parts = [(params, {name: a[m] for name, a in split.items()}) for m in range(MICROBATCHES)]
    if program.has_key:
        key = jax.random.key(program.seed)
        parts = [(*part, jax.random.fold_in(key, m)) for m, part in enumerate(parts)]
    if not is_compiled:
        outs = [jax.device_get(function(*part)) for part in parts]
        return _mean(program, outs)
    with clock.part("reference: trace"):
        lowered = jax.jit(function).lower(*parts[0])
    with clock.part("reference: compile"):
        compiled = lowered.compile()
    with clock.part("reference: run"):
        outs = [jax.device_get(compiled(*part)) for part in parts]
    return _mean(program, outs)


def _mean(program: Program, outs: list[Any]) -> Any:
    mean = jax.tree.map(lambda *a: np.mean(a, axis=0, dtype=np.float64), *outs)
    if not program.has_aux:
        return mean
    metrics = jax.tree.map(lambda *a: sum(np.asarray(b, np.float64) for b in a), *outs)
    return (mean[0][0], metrics[0][1]), mean[1]


def _difference(found: Any, wanted: Any) -> tuple[float, str]:
    """Gives the largest difference, as a multiple of the tolerance, and names its leaf."""
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        return np.inf, f"structure {jax.tree.structure(found)}, not {jax.tree.structure(wanted)}"
    worst, text = 0.0, ""
    wanted_leaves = jax.tree_util.tree_leaves_with_path(wanted)
    largest = max(np.abs(leaf).max(initial=0) for _, leaf in wanted_leaves)
    for a, (path, b) in zip(jax.tree.leaves(found), wanted_leaves, strict=True):
        name = jax.tree_util.keystr(path)
        if np.shape(a) != np.shape(b):
            return np.inf, f"{name}: shape {np.shape(a)}, not {np.shape(b)}"
        scale = np.abs(b).max(initial=0)
        tolerance = TOLERANCE.get(np.asarray(a).dtype, 1e-9)
        error = np.abs(np.asarray(a, np.float64) - b).max(initial=0)
        ratio = error / max(tolerance * scale, 1e-4 * tolerance * largest, 1e-300)
        if not ratio <= worst:
            worst = float(ratio) if np.isfinite(ratio) else np.inf
            text = f"{name} is off by {error:.2g}, {error / (scale + 1e-300):.2g} of its largest"
    return worst, text


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    sys.exit(check(int(sys.argv[1]), is_first=False).outcome != "exact")
