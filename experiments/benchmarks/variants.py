"""The ways to compute the same loss and gradients: this library's, and those beside it.

A variant is a name; `make` turns it into a function of (params, batch) and the mesh that it runs
on. All call the same functions of the same `dpj.Model`, layer by layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

import dualpipe_jax as dpj

AXIS = "pipe"
REMATS = ("none", "block")
_SCHEDULES: dict[str, dict[str, Any]] = {
    "dualpipe": {"schedule": "dualpipe"},
    "dualpipe-overlap": {"schedule": "dualpipe", "overlap": True},
    "dualpipev": {"schedule": "dualpipev", "overlap": True},
    "1f1b": {"schedule": "1f1b"},
    "zb-h1": {"schedule": "zb-h1"},
}


def _ours(*, schedule: str, overlap: bool = False, **execution: Any) -> dict[str, Any]:
    """Makes the options of a step with full backwards, which are the least work on CPUs."""
    made = dpj.Execution(overlap=overlap, split_backward=False, **execution)
    return {"schedule": schedule, "execution": made}


# Layers unrolled however many a stage has, as in the fastest of the limits; and where it has many,
# looped too, as is the library's default then.
LOOPED = {f"{name}-looped": _ours(**options, unroll=False) for name, options in _SCHEDULES.items()}
OURS = {
    **{name: _ours(**options, unroll=True) for name, options in _SCHEDULES.items()},
    "zb-h1-stash": _ours(schedule="zb-h1", unroll=True, deferred="store"),
    **LOOPED,
}
CONCURRENT_LIMIT = "limit-unrolled-concurrent"
LIMITS = ("limit-unrolled", CONCURRENT_LIMIT, "limit-grouped", "limit-scanned")
RECIPE, UNROLLED_RECIPE = RECIPES = ("gpipe-recipe", "gpipe-recipe-unrolled")
NAMES = (*LIMITS, *RECIPES, *OURS)

# As the library does: layers stand one after the other up to this number a stage. The baselines
# get the same, or it would be the unrolling that is compared; where stages have more, `OURS` has
# both, and so have the limits and the recipes.
MAX_UNROLLED = 4

GradFn = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
Block = Callable[[Any, jax.Array], jax.Array]


def different(*, remat: str, num_layers: int, num_ranks: int) -> tuple[str, ...]:
    """Names the variants that are programs of their own."""
    same = set()
    if remat == "none":
        same.add("zb-h1-stash")  # there is nothing that zb-h1 recomputes
    if num_layers // num_ranks <= MAX_UNROLLED:
        same |= {UNROLLED_RECIPE, *LOOPED}
    return tuple(name for name in NAMES if name not in same)


def compiler_options(name: str) -> dict[str, str | bool]:
    """Returns the options of XLA with which a variant is compiled.

    XLA's default for CPUs is an order of operations in which many can run at once, and so much is
    alive at once. Here devices run at once already, and those of accelerators run operations in
    turn: all are compiled for the order that takes the least memory, and one of the limits for the
    default as well.
    """
    order = "CONCURRENCY" if name == CONCURRENT_LIMIT else "MEMORY"
    return {"xla_cpu_scheduler_type": f"CPU_SCHEDULER_TYPE_{order}_OPTIMIZED"}


def make(
    name: str,
    *,
    model: dpj.Model,
    num_layers: int,
    num_ranks: int,
    num_microbatches: int,
    remat: str,
) -> tuple[GradFn, Mesh]:
    """Makes a variant's `(params, batch) -> (loss, grads)`, and the mesh that it runs on.

    The mean of the loss over microbatches is that of `dpj.sequential`.
    """
    mesh_ranks = 1 if name in LIMITS else num_ranks
    # Auto axes: outside the pipeline XLA places everything by itself, for all variants alike.
    mesh = jax.make_mesh(
        (mesh_ranks,),
        (AXIS,),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:mesh_ranks],
    )
    if name in OURS:
        grad_fn = dpj.value_and_grad(
            model,
            mesh=mesh,
            num_microbatches=num_microbatches,
            axis=AXIS,
            remat=remat,
            **OURS[name],
        )
        return grad_fn, mesh
    per_stage = num_layers // num_ranks
    if name in RECIPES:
        is_unrolled = per_stage <= MAX_UNROLLED or name == UNROLLED_RECIPE
        unrolled = per_stage if is_unrolled else 1
        loss = recipe_loss(
            model, mesh=mesh, num_microbatches=num_microbatches, remat=remat, unrolled=unrolled
        )
        return jax.value_and_grad(loss), mesh
    most = {
        "limit-unrolled": num_layers,
        CONCURRENT_LIMIT: num_layers,
        "limit-grouped": min(MAX_UNROLLED, per_stage),
        "limit-scanned": 1,
    }[name]
    unrolled = max(size for size in range(1, most + 1) if num_layers % size == 0)
    return limit(model, num_microbatches=num_microbatches, remat=remat, unrolled=unrolled), mesh


def limit(model: dpj.Model, *, num_microbatches: int, remat: str, unrolled: int) -> GradFn:
    """Adds up `jax.value_and_grad` of one microbatch after the other: no pipeline, one device.

    The work that no schedule can avoid: every rank's share of it together. How many layers stand
    in a row matters much to XLA: a loop copies its residuals to stacks and back.
    """
    block = _block(model, remat)

    def loss_of(params: Any, microbatch: jax.Array) -> jax.Array:
        ctx = dpj.Context(microbatch=microbatch)
        x = model.embed(params["ends"], ctx)
        x = run_layers(block, params["blocks"], x)
        return model.head(params["ends"], x, ctx) / num_microbatches

    def grad_fn(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        # Cut up and put together once a step, not once a microbatch.
        params = {**params, "blocks": cut(params["blocks"], unrolled)}

        def add(sums: Any, microbatch: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(
                jnp.add, sums, jax.value_and_grad(loss_of)(params, microbatch)
            ), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        (loss, grads), _ = lax.scan(add, zeros, split(batch, num_microbatches))
        return loss, {**grads, "blocks": join(grads["blocks"])}

    return grad_fn


def recipe_loss(
    model: dpj.Model, *, mesh: Mesh | AbstractMesh, num_microbatches: int, remat: str, unrolled: int
) -> Callable[[Any, jax.Array], jax.Array]:
    """Makes the loss of GPipe as it is usually written in JAX, for `jax.grad` to go through.

    N + P - 1 ticks; in each, every rank runs its layers on the value from its left neighbour:
      tick     0    1    2    3
      rank 0  0F0  0F1  0F2   -        "-" runs as well, on values that nobody uses
      rank 1   -   1F0  1F1  1F2
    """
    num_ranks = mesh.shape[AXIS]
    block = _block(model, remat)
    right = [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]

    def on_rank(params: Any, batch: jax.Array) -> jax.Array:
        rank = lax.axis_index(AXIS)
        # Marked as differing between ranks, so that the gradient of ends is summed over them here
        # and not within the branch that only the last rank takes, where it would wait for ever.
        ends = lax.pcast(params["ends"], AXIS, to="varying")
        layers = cut(params["blocks"], unrolled)
        microbatches = split(batch, num_microbatches)
        first = lax.map(lambda m: model.embed(ends, dpj.Context(microbatch=m)), microbatches)
        nothing = jnp.zeros_like(first[: num_ranks - 1])

        def tick(arrived: jax.Array, embedded: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = run_layers(block, layers, jnp.where(rank == 0, embedded, arrived))
            return lax.ppermute(x, AXIS, right), x

        _, outputs = lax.scan(tick, jnp.zeros_like(first[0]), jnp.concatenate([first, nothing]))

        def heads(outputs: jax.Array) -> jax.Array:
            def head(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
                x, microbatch = pair
                return model.head(ends, x, dpj.Context(microbatch=microbatch))

            return lax.map(head, (outputs, microbatches)).mean()

        def nowhere(outputs: jax.Array) -> jax.Array:
            return lax.pcast(jnp.zeros((), outputs.dtype), AXIS, to="varying")

        loss = lax.cond(rank == num_ranks - 1, heads, nowhere, outputs[num_ranks - 1 :])
        return lax.psum(loss, AXIS)

    replicated = PartitionSpec()
    return jax.shard_map(
        on_rank,
        mesh=mesh,
        in_specs=({"ends": replicated, "blocks": PartitionSpec(AXIS)}, replicated),
        out_specs=replicated,
    )


def _block(model: dpj.Model, remat: str) -> Block:
    assert callable(model.block)
    whole = model.block

    def block(params: Any, x: jax.Array) -> jax.Array:
        # The model's blocks look at their input only.
        return whole(params, x, dpj.Context(microbatch=None))

    return jax.checkpoint(block) if remat == "block" else block


def split(batch: jax.Array, num_microbatches: int) -> jax.Array:
    """Cuts `[rows, ...]` into `[num_microbatches, rows of one, ...]`."""
    return batch.reshape(num_microbatches, -1, *batch.shape[1:])


def cut(blocks: Any, unrolled: int) -> list[Any]:
    """Cuts `[layers, ...]` into `unrolled` trees of `[layers / unrolled, ...]`, one a turn.

    Of six layers and two turns: the first gets layers 0, 2, 4, the second 1, 3, 5.
    """

    def turn(first: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[first::unrolled], blocks)

    return [turn(first) for first in range(unrolled)]


def join(turns: list[Any]) -> Any:
    """Undoes `cut`."""

    def one(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(one, *turns)


def run_layers(block: Block, turns: list[Any], x: jax.Array) -> jax.Array:
    """Runs layers in model order: as many in a row as there are turns, in a loop over the rest."""

    def row(x: jax.Array, layers: list[Any]) -> tuple[jax.Array, None]:
        for layer in layers:
            x = block(layer, x)
        return x, None

    if jax.tree.leaves(turns)[0].shape[0] == 1:
        return row(x, jax.tree.map(lambda leaf: leaf[0], turns))[0]
    return lax.scan(row, x, turns)[0]
