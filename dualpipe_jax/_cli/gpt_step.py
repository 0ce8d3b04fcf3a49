"""What `dualpipe-jax preflight` runs: a GPT's training step, made of shapes alone -> a report."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dualpipe_jax._api.value_and_grad import value_and_grad
from dualpipe_jax._cli.gpt import GPT
from dualpipe_jax._preflight import Report, preflight
from dualpipe_jax._schedule.execution import Execution

_AXIS = "pipe"


def rehearse(
    *,
    topology: str,
    ranks: int,
    schedule: str,
    overlap: Any,
    microbatch: int,
    microbatches: int,
    remat: str,
    dtype: str,
    compiler_options: dict[str, Any] | None = None,
    **sizes: int,
) -> Report:
    """Compiles loss, gradients and AdamW's update of a GPT for a topology.

    Args:
      topology: As `preflight` takes it.
      ranks: Devices of the pipeline.
      schedule: A name of `schedules.names()`.
      overlap: As of `Execution`.
      microbatch: Windows of text a microbatch.
      microbatches: Microbatches a step.
      remat: `"none"` or `"block"`.
      dtype: What layers compute in.
      compiler_options: As `preflight` takes them.
      **sizes: Those of `GPT`.

    Raises:
      ValueError: If sizes do not fit each other, or no such topology is known.
      ModuleNotFoundError: If the compiler for the topology is not installed.
    """
    gpt = GPT(dtype=jnp.dtype(dtype), **sizes)
    mesh = AbstractMesh((ranks,), (_AXIS,))
    grad_fn = value_and_grad(
        gpt.model(),
        mesh=mesh,
        num_microbatches=microbatches,
        schedule=schedule,
        execution=Execution(overlap=overlap),
        axis=_AXIS,
        remat=remat,
    )
    optimizer = optax.adamw(1e-3)

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_spread = any(getattr(key, "key", None) == "blocks" for key in path)
        spec = PartitionSpec(_AXIS) if is_spread and gpt.layers % ranks == 0 else PartitionSpec()
        return leaf.update(sharding=NamedSharding(mesh, spec))

    params = jax.eval_shape(gpt.init, jax.eval_shape(lambda: jax.random.key(0)))
    batch = jax.ShapeDtypeStruct((microbatch * microbatches, gpt.context + 1), jnp.int32)
    args = params, jax.eval_shape(optimizer.init, params), batch
    args = jax.tree_util.tree_map_with_path(place, args)
    return preflight(
        jax.jit(step, donate_argnums=(0, 1)), args, topology, compiler_options=compiler_options
    )
