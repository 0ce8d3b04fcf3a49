"""A larger model of the same shape -> `dpj.preflight`'s reports on its step, for absent TPUs.

Pipe 4 x expert 2, DualPipe, bfloat16 compute and float32 parameters. Arguments are shapes alone:
no array is made, and nothing runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from rich.console import Console

import dualpipe_jax as dpj
from experiments.compiled.compiles import count
from experiments.deepseek_mini import model
from experiments.deepseek_mini.model import DeepSeekMini

AXES = {"pipe": 4, "expert": 2}
# Beside the library's own (README.md). The scheduler counts a matmul for a quarter, and so puts
# more of them beside an all-to-all.
COVER = {"xla_lhs_output_fusion_latency_multiplier": "0.25"}
CAPACITY = DeepSeekMini(
    dense_layers=0,
    expert_layers=8,
    width=1024,
    heads=8,
    head_size=128,
    rotary_size=64,
    latent_size=256,
    query_latent_size=384,
    hidden=4096,
    experts=8,
    chosen=2,
    expert_hidden=2048,
    capacity_factor=1.25,
    vocabulary=1024,
    dtype=jnp.bfloat16,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tells of one step.

    Attributes:
      what: In a few words.
      sizes: The model.
      rows: Of a microbatch on one device.
      context: Tokens of a row.
      num_microbatches: Of a step, on each device of the experts.
      tpu_options: XLA's, beside `dpj.compiler_options("tpu")`.
    """

    what: str
    sizes: DeepSeekMini
    rows: int = 4
    context: int = 1024
    num_microbatches: int = 16
    tpu_options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "capacity": Case(what="expert layers alone, capacity 1.25", sizes=CAPACITY, tpu_options=COVER),
    "dropless": Case(
        what="expert layers alone, one a stage, dropless, ragged all-to-alls",
        sizes=replace(CAPACITY, expert_layers=4, capacity_factor=None),
        tpu_options=COVER,
    ),
    "dense-first": Case(
        what="a dense layer before seven of experts, capacity 1.25",
        sizes=replace(CAPACITY, dense_layers=1, expert_layers=7),
    ),
}


def compile_case(case: Case, topology: str, *, axes: dict[str, int] | None = None) -> Any:
    """Compiles the loss and gradients of a case, and gives preflight's report."""
    axes = AXES if axes is None else axes
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    sizes = case.sizes
    shapes = jax.eval_shape(sizes.init, jax.random.key(0))
    specs = sizes.param_specs(shapes, "expert")
    grad_fn = dpj.value_and_grad(
        sizes.for_pipeline("expert", is_ragged=sizes.capacity_factor is None),
        mesh=mesh,
        num_microbatches=case.num_microbatches,
        execution=dpj.Execution(overlap=True),
        remat="block",
        batch_axes="expert",
        manual_axes="expert",
        param_specs=specs,
        trainable=model.is_trained,
    )

    def placed(path: Any, leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        is_spread = path[0].key == "blocks" and leaf.shape[0] % axes["pipe"] == 0
        spec = PartitionSpec("pipe" if is_spread else None, *spec[1:])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree_util.tree_map_with_path(placed, shapes, specs)
    num_rows = case.rows * case.num_microbatches * axes["expert"]
    batch = jax.ShapeDtypeStruct(
        (num_rows, case.context + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec("expert")),
    )
    platform = topology.split(":")[0]
    options = dict(dpj.compiler_options(platform))
    if platform == "tpu":
        options |= case.tpu_options
    return dpj.preflight(
        jax.jit(grad_fn), (params, batch), topology, compiler_options=options, mesh=mesh
    )


def describe(what: str, report: Any) -> str:
    """Counts the collectives of a trip: how many are asynchronous, and how many are hidden."""
    if report.loop is None:
        return f"{what}: no loop to look at; {report.failure or 'see above'}"
    counts = [
        f"{each.total} {kind} ({each.num_async} asynchronous, {each.num_hidden} hidden)"
        for kind, each in count(report.loop.collectives).items()
    ]
    loop = report.loop
    exposed = "?" if loop.exposed_seconds is None else f"{loop.exposed_seconds * 1e6:,.0f}"
    compute = "?" if loop.compute_seconds is None else f"{loop.compute_seconds * 1e6:,.0f}"
    return f"{what}: {', '.join(counts)}; {exposed} us exposed beside {compute} of compute"


def run(topology: str, *, names: Sequence[str] = (), console: Console) -> None:
    """Compiles the cases and prints what became of each."""
    lines = []
    for name in names or CASES:
        case = CASES[name]
        with console.status(f"compiling: {case.what}"):
            report = compile_case(case, topology)
        console.rule(case.what)
        console.print(str(report), markup=False)
        lines.append(describe(f"{name:12}", report))
    console.rule("a trip of the loop")
    for line in lines:
        console.print(line, markup=False)
