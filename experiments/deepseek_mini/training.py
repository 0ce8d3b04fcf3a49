"""Parameters over ranks and experts, the step as one jitted program, and its loop.

A step is loss, gradients and AdamW's update, and the update of the routers' biases by the loads.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import Progress

import dualpipe_jax as dpj
from experiments.deepseek_mini import dispatch, model
from experiments.deepseek_mini.model import DeepSeekMini
from experiments.deepseek_mini.report import Row
from experiments.train_lm.log import Log

PIPE, EXPERT = "pipe", "expert"
# Parameters, then the optimizer's state.
State = tuple[Any, optax.OptState]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the model runs: on which devices, in how many microbatches a device of the experts."""

    mesh: Mesh
    num_microbatches: int

    def grad_fn(self, sizes: DeepSeekMini, params: Any, schedule: Any) -> Callable[..., Any]:
        """Makes `dpj.value_and_grad` of the model."""
        return dpj.value_and_grad(
            self._model(sizes),
            schedule=schedule,
            trainable=model.is_trained,
            **self._options(sizes, params),
        )

    def evaluate(self, sizes: DeepSeekMini, params: Any) -> Callable[..., Any]:
        """Makes `dpj.evaluate` of the model."""
        return dpj.evaluate(self._model(sizes), **self._options(sizes, params))

    @property
    def num_parts(self) -> int:
        """Microbatches on all devices of the experts."""
        return self.num_microbatches * self.mesh.shape[EXPERT]

    def place(self, sizes: DeepSeekMini, params: Any) -> Any:
        """Spreads layers over the ranks where they divide, and experts over their axis."""
        specs = sizes.param_specs(params, EXPERT)
        shardings = dpj.shardings(params, mesh=self.mesh, axis=PIPE, param_specs=specs)
        # Copies, as a step overwrites its arguments.
        return jax.device_put(params, shardings, may_alias=False)

    def place_batch(self, batch: np.ndarray) -> jax.Array:
        """Spreads the rows over the devices of the experts."""
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(EXPERT)))

    def _model(self, sizes: DeepSeekMini) -> dpj.Model:
        platform = self.mesh.devices.flat[0].platform
        return sizes.for_pipeline(EXPERT, is_ragged=dispatch.has_ragged(platform))

    def _options(self, sizes: DeepSeekMini, params: Any) -> dict[str, Any]:
        return {
            "mesh": self.mesh,
            "num_microbatches": self.num_microbatches,
            "axis": PIPE,
            "batch_axes": EXPERT,
            "manual_axes": EXPERT,
            "param_specs": sizes.param_specs(params, EXPERT),
        }


def compile_step(
    pipeline: Pipeline,
    sizes: DeepSeekMini,
    schedule: Any,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: Any,
) -> jax.stages.Compiled:
    """Compiles a step to one program, `(state, batch, rate) -> (state, figures)`.

    `rate` is by how much a bias moves (`routing.balanced`). Figures are the losses `main` and
    `mtp`, `load`, int32[expert layers, experts], and `dropped`, the choices that found no room.
    """
    grad_fn = pipeline.grad_fn(sizes, state[0], schedule)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: jax.Array, rate: jax.Array) -> tuple[State, dict[str, Any]]:
        params, opt_state = state
        (_, metrics), grads = grad_fn(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        of_layers = metrics.blocks["experts"]
        params = model.balance(params, of_layers["load"], rate=rate)
        losses = {name: value / pipeline.num_parts for name, value in metrics.head.items()}
        dropped = of_layers["dropped"].sum()
        return (params, opt_state), {**losses, "load": of_layers["load"], "dropped": dropped}

    return step.lower(state, batch, jnp.zeros(())).compile()


def compile_held_out(
    pipeline: Pipeline, sizes: DeepSeekMini, params: Any, batches: list[jax.Array]
) -> Callable[[Any], float]:
    """Compiles the mean loss of the next token over the batches, forward alone."""
    evaluate = jax.jit(pipeline.evaluate(sizes, params)).lower(params, batches[0]).compile()

    def held_out(params: Any) -> float:
        sums = [evaluate(params, batch)[1].head["main"] for batch in batches]
        return float(np.mean([float(value) for value in sums])) / pipeline.num_parts

    return held_out


def fit(
    state: State,
    *,
    rate: float,
    steps: int,
    step: Callable[..., Any],
    batches: Iterator[jax.Array],
    held_out: Callable[[Any], float],
    eval_every: int,
    log: Log,
    progress: Progress,
) -> None:
    """Takes the steps, and logs their figures.

    Raises:
      FloatingPointError: If the loss is no longer finite.
    """
    start = time.perf_counter()

    def evaluate(index: int) -> float:
        loss = held_out(state[0])
        progress.console.print(
            f"bias rate {rate:g}, step {index:>{len(str(steps))}}: held-out loss {loss:.3f} nats a "
            f"byte, {time.perf_counter() - start:.0f} s"
        )
        return loss

    label = f"bias rate {rate:g}"
    task = progress.add_task("", total=steps, label=label)
    log.add(Row(rate=rate, step=0, held_out=evaluate(0), seconds=0.0))
    for index in range(1, steps + 1):
        state, figures = step(state, next(batches), np.float32(rate))
        main, mtp = float(figures["main"]), float(figures["mtp"])  # waits for the step
        is_last = index == steps
        row = Row(
            rate=rate,
            step=index,
            main=main,
            mtp=mtp,
            held_out=evaluate(index) if is_last or index % eval_every == 0 else None,
            load=np.asarray(figures["load"]),
            dropped=int(figures["dropped"]),
            seconds=time.perf_counter() - start,
        )
        log.add(row)
        progress.update(task, advance=1, label=f"{label}, loss {main:.3f}")
        if not np.isfinite(main + mtp):
            raise FloatingPointError(
                f"the losses are {main} and {mtp} at step {index}; lower the learning rate"
            )
