"""A case -> `dpj.preflight`'s reports on its pipelined step and on the same layers unpipelined.

Arguments are shapes alone: no array is made, and nothing runs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from experiments.compiled import models

# By these names preflight knows what belongs to embedding and head, in any program.
EMBED, HEAD = "dualpipe.embed", "dualpipe.head"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tells of one step.

    Attributes:
      topology: As `dpj.preflight` takes it.
      ranks: The size of the pipeline axis.
      beside: The size of the other axis: `"expert"` if the block has experts, else `"data"`.
      family: One of `models.FAMILIES`.
      width: Of the residual stream.
      layers: A stage.
      tokens: A microbatch has, on one device.
      schedule: One of `dpj.schedules.names()`.
      overlap: As `dpj.Execution` takes it.
      remat: `"none"` or `"block"`.
    """

    topology: str
    ranks: int
    beside: int = 1
    family: str = "mlp"
    width: int = 1024
    layers: int = 2
    tokens: int = 4096
    schedule: str = "dualpipe"
    overlap: bool | None = True
    remat: str = "none"

    @property
    def num_microbatches(self) -> int:
        """Enough for a steady state: four a rank."""
        return 4 * self.ranks


def pipelined(case: Case, *, split_backward: bool | None = None) -> Any:
    """Compiles the whole pipelined step, and gives preflight's report.

    Args:
      case: What to compile.
      split_backward: As `dpj.Execution` takes it.
    """
    family = models.FAMILIES[case.family]
    other = "expert" if family.has_experts else "data"
    sizes = (case.ranks,) if case.beside == 1 else (case.ranks, case.beside)
    axes = ("pipe", other)[: len(sizes)]
    mesh = AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes))
    more: dict[str, Any] = {}
    if case.beside > 1:
        more["batch_axes"] = other
    if family.has_experts:
        more |= {"manual_axes": other, "param_specs": family.param_specs}
    grad_fn = dpj.value_and_grad(
        family.model,
        mesh=mesh,
        num_microbatches=case.num_microbatches,
        schedule=case.schedule,
        remat=case.remat,
        execution=dpj.Execution(overlap=case.overlap, split_backward=split_backward),
        **more,
    )

    def blocks_spec(name: str) -> PartitionSpec:
        of_experts = family.has_experts and name in ("up", "down")
        return PartitionSpec("pipe", "expert") if of_experts else PartitionSpec("pipe")

    params = _avals(case, case.layers * case.ranks, mesh, blocks_spec)
    rows = case.num_microbatches * case.beside * case.tokens
    spec = PartitionSpec(other) if case.beside > 1 else PartitionSpec()
    batch = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=NamedSharding(mesh, spec))
    return dpj.preflight(jax.jit(grad_fn), (params, batch), case.topology, mesh=mesh)


def unpipelined(case: Case) -> Any:
    """Compiles gradient accumulation over one stage's layers, unrolled, and no parallelism.

    The same block, rematerialisation and dtype of the accumulators. Every device of the topology
    does the same as all others.
    """
    family = models.FAMILIES[case.family]
    assert not family.has_experts, "its all-to-alls need more than one device"
    mesh = AbstractMesh((case.ranks * case.beside,), ("same",), axis_types=(AxisType.Auto,))

    def loss_of(ends: Any, layers: Any, tokens: jax.Array) -> jax.Array:
        ctx = _Context(tokens)
        with jax.named_scope(EMBED):
            x = models.embed(ends, ctx)

        def block(layer: Any, x: jax.Array) -> jax.Array:
            return family.block(layer, x, ctx)

        for layer in layers:
            x = (jax.checkpoint(block) if case.remat == "block" else block)(layer, x)
        with jax.named_scope(HEAD):
            return models.head(ends, x, ctx)

    def step(params: Any, batch: jax.Array) -> Any:
        # Layers in arrays of their own, so that none is cut out of a stack in every microbatch.
        layers = [jax.tree.map(lambda a: a[i], params["blocks"]) for i in range(case.layers)]  # noqa: B023
        zeros = jax.tree.map(jnp.zeros_like, (params["ends"], layers))

        def microbatch(sums: Any, tokens: jax.Array) -> Any:
            total, of_ends, of_layers = sums
            loss, (ends, blocks) = jax.value_and_grad(loss_of, argnums=(0, 1))(
                params["ends"], layers, tokens
            )
            with jax.named_scope(HEAD):
                total, of_ends = jax.tree.map(jnp.add, (total, of_ends), (loss, ends))
            return (total, of_ends, jax.tree.map(jnp.add, of_layers, blocks)), None

        start = jnp.zeros(()), *zeros
        return lax.scan(microbatch, start, batch.reshape(case.num_microbatches, -1))[0]

    params = _avals(case, case.layers, mesh, lambda name: PartitionSpec())
    batch = jax.ShapeDtypeStruct(
        (case.num_microbatches * case.tokens,),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec()),
    )
    return dpj.preflight(jax.jit(step), (params, batch), case.topology, mesh=mesh)


def cycles_of_layers(loop: Any) -> float:
    """Sums the cycles of a trip without those of embedding and head."""
    ends = {"embed", "embed_grad", "head"}
    return sum(each.cycles for each in loop.actions if each.name not in ends)


@dataclass(frozen=True)
class _Context:
    microbatch: jax.Array


def _avals(case: Case, num_layers: int, mesh: Any, spec_of: Any) -> Any:
    def aval(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    ends = {"table": (models.VOCABULARY, case.width), "gain": (case.width,)}
    blocks = models.FAMILIES[case.family].shapes(case.width)
    return {
        "ends": {name: aval(shape, PartitionSpec()) for name, shape in ends.items()},
        "blocks": {
            name: aval((num_layers, *shape), spec_of(name)) for name, shape in blocks.items()
        },
    }
