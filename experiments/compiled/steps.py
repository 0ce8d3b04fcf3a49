"""A case -> its step: a function, its arguments as shapes alone, and the mesh. Nothing runs."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from experiments.compiled import models

# By these names preflight knows the parts of embedding and head, in any program.
EMBED, HEAD = "dualpipe.embed", "dualpipe.head"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step, `fn(*args)`, over a mesh of no devices in particular.

    Attributes:
      fn: The step.
      args: Shapes, dtypes and shardings of its arguments.
      mesh: The mesh.
      options: The compiler's; None for `dpj.compiler_options`.
      memory: The library's own account of the step's memory (`grad_fn.memory`), if asked.
    """

    fn: Callable[..., Any]
    args: Any
    mesh: Mesh | AbstractMesh
    options: Any = None
    memory: Any = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describes one step.

    Attributes:
      topology: As `dpj.preflight` takes it.
      ranks: The size of the pipeline axis.
      beside: The size of the other axis: `"expert"` if the block has experts, else `"data"`.
      family: One of `models.FAMILIES`.
      width: The size of the residual stream.
      layers: A stage.
      shorter: How many layers fewer the last stage has.
      tokens: A microbatch has, on one device.
      schedule: One of `dpj.schedules.names()`.
      overlap: As `dpj.Execution` takes it.
      remat: `"none"`, `"block"`, or `"policy"`: one that offloads the values that
        the block names.
      slots_on_device: As `dpj.Execution` takes it.
      split_backward: As `dpj.Execution` takes it.
      has_pipeline: Whether the step has a pipeline; else it is gradient accumulation over one
        stage's layers, on every device the same.
      has_options: Whether it is compiled with `dpj.compiler_options`; else with none.
    """

    topology: str
    ranks: int
    beside: int = 1
    family: str = "mlp"
    width: int = 1024
    layers: int = 2
    shorter: int = 0
    tokens: int = 4096
    schedule: str = "dualpipe"
    overlap: bool | None = True
    remat: str = "none"
    slots_on_device: int | None = None
    split_backward: bool | None = None
    has_pipeline: bool = True
    has_options: bool = True

    @property
    def num_microbatches(self) -> int:
        """Enough for a steady state: four a rank."""
        return 4 * self.ranks

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """The layers of each stage of the schedule."""
        schedule = dpj.schedules.make(
            self.schedule, num_ranks=self.ranks, num_microbatches=self.num_microbatches
        )
        return (self.layers,) * (schedule.num_stages - 1) + (self.layers - self.shorter,)

    def make(self) -> Step:
        """Makes the step."""
        step = _pipelined(self) if self.has_pipeline else _unpipelined(self)
        return step if self.has_options else dataclasses.replace(step, options={})


def lay(avals: Any, specs: Any, mesh: AbstractMesh) -> Any:
    """Gives avals their shardings; `specs` is a prefix tree of theirs."""

    def laid(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    return jax.tree.map(laid, specs, avals, is_leaf=lambda s: isinstance(s, PartitionSpec))


def _pipelined(case: Case) -> Step:
    family = models.FAMILIES[case.family]
    other = "expert" if family.spread else "data"
    sizes = (case.ranks,) if case.beside == 1 else (case.ranks, case.beside)
    axes = ("pipe", other)[: len(sizes)]
    mesh = AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes))
    more: dict[str, Any] = {"batch_axes": other} if case.beside > 1 else {}
    if family.spread:
        more |= {"manual_axes": other, "param_specs": family.specs()}
    grad_fn = dpj.value_and_grad(
        family.model,
        mesh=mesh,
        num_microbatches=case.num_microbatches,
        schedule=case.schedule,
        layers_per_stage=case.layers_per_stage,
        remat=_policy() if case.remat == "policy" else case.remat,
        execution=dpj.Execution(
            overlap=case.overlap,
            split_backward=case.split_backward,
            slots_on_device=case.slots_on_device,
        ),
        **more,
    )
    params = family.avals(case.width, sum(case.layers_per_stage))
    # JAX has no uneven shards.
    stacked = ("pipe",) if sum(case.layers_per_stage) % case.ranks == 0 else ()
    tokens = case.num_microbatches * case.beside * case.tokens
    shape = (tokens,) if family.window is None else (tokens // family.window, family.window)
    batch_spec = PartitionSpec(other) if case.beside > 1 else PartitionSpec()
    avals = params, jax.ShapeDtypeStruct(shape, jnp.int32)
    args = lay(avals, (family.specs(*stacked), batch_spec), mesh)
    return Step(fn=jax.jit(grad_fn), args=args, mesh=mesh, memory=grad_fn.memory(*args))


def _policy() -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[models.OFFLOADED],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _unpipelined(case: Case) -> Step:
    """The same block, rematerialisation and dtype of the accumulators; layers unrolled."""
    family = models.FAMILIES[case.family]
    assert not family.spread, "its all-to-alls need more than one device"
    mesh = AbstractMesh((case.ranks * case.beside,), ("same",), axis_types=(AxisType.Auto,))

    def loss_of(ends: Any, layers: Any, tokens: jax.Array) -> jax.Array:
        ctx = dpj.Context(microbatch=tokens)
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

    batch = jax.ShapeDtypeStruct((case.num_microbatches * case.tokens,), jnp.int32)
    avals = family.avals(case.width, case.layers), batch
    return Step(fn=jax.jit(step), args=lay(avals, PartitionSpec(), mesh), mesh=mesh)
