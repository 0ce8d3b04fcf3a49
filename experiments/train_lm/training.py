"""Parameters over the ranks, the optimizer, the step as one jitted program, and its loop."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .log import Log, Row, perplexity

# Parameters, then the optimizer's state.
State = tuple[Any, optax.OptState]


def make_optimizer(
    *, learning_rate: float, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes AdamW behind clipping by the global norm, and its learning rate over the steps."""
    learning_rates = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / 10,
        peak_value=learning_rate,
        warmup_steps=max(1, min(steps // 10, 100)),
        decay_steps=steps + 1,
        end_value=learning_rate / 10,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rates, b2=0.99, weight_decay=0.1, mask=_is_matrix),
    )
    return optimizer, learning_rates


def _is_matrix(params: Any) -> Any:
    # By name, not by ndim: the biases of the blocks are stacked, so they have two dims as well.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def compile_step(
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


def fit(
    state: State,
    *,
    step: Callable[[State, np.ndarray], tuple[State, jax.Array]],
    batches: Iterator[np.ndarray],
    held_out_loss: Callable[[Any], float],
    learning_rates: list[float],
    eval_every: int,
    log: Log,
    console: Console,
) -> Any:
    """Takes a step for each learning rate, and logs the losses.

    Returns:
      The trained parameters.

    Raises:
      FloatingPointError: If the loss is no longer finite.
    """
    num_steps = len(learning_rates)
    start = time.perf_counter()

    def seconds() -> float:
        return time.perf_counter() - start

    def evaluate(index: int) -> dict[str, float]:
        loss = held_out_loss(state[0])
        progress.console.print(
            f"step {index:>{len(str(num_steps))}}  held-out loss {loss:.3f} nats a byte"
            f"  perplexity {perplexity(loss):.2f}  {seconds():6.1f} s"
        )
        return {"held_out_loss": loss, "held_out_perplexity": perplexity(loss)}

    with _progress(console) as progress:
        task = progress.add_task("train", total=num_steps, loss="-", speed=0.0)
        log.add(Row(step=0, **evaluate(0), seconds=seconds()))
        tokens, train_seconds = 0, 0.0
        for index, learning_rate in enumerate(learning_rates, start=1):
            step_start = time.perf_counter()
            batch = next(batches)
            state, loss = step(state, batch)
            train_loss = float(loss)  # waits for the step
            step_seconds = time.perf_counter() - step_start
            step_tokens = batch.shape[0] * (batch.shape[1] - 1)
            tokens, train_seconds = tokens + step_tokens, train_seconds + step_seconds
            progress.update(task, advance=1, loss=f"{train_loss:.3f}", speed=tokens / train_seconds)
            is_last = index == num_steps
            held_out = evaluate(index) if is_last or index % eval_every == 0 else {}
            row = Row(
                step=index,
                train_loss=train_loss,
                **held_out,
                learning_rate=learning_rate,
                tokens_per_second=step_tokens / step_seconds,
                seconds=seconds(),
            )
            log.add(row)
            if not np.isfinite(train_loss):
                raise FloatingPointError(
                    f"the loss is {train_loss} at step {index}; lower the learning rate"
                )
    console.print(f"{tokens:,} bytes in {seconds():.0f} s, {tokens / train_seconds:,.0f} a second")
    return state[0]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
