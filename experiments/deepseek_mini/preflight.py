"""A larger model of the same shape -> `dpj.preflight`'s reports on its step, for absent TPUs.

Pipe 4 x expert 2, DualPipe, bfloat16 compute and float32 parameters. Arguments are shapes alone:
no array is made, and nothing runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from rich.console import Console

import dualpipe_jax as dpj
from experiments.compiled.compiles import Figures, compile_case
from experiments.compiled.steps import Step, lay
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
      label: The step in a few words.
      sizes: The model.
      rows: The rows of a microbatch on one device.
      context: Tokens of a row.
      num_microbatches: The microbatches of a step, on each device of the experts.
      tpu_options: XLA's, beside `dpj.compiler_options("tpu")`.
      topology: As `dpj.preflight` takes it.
      axes: The mesh.
    """

    label: str
    sizes: DeepSeekMini
    rows: int = 4
    context: int = 1024
    num_microbatches: int = 16
    tpu_options: Mapping[str, Any] = field(default_factory=dict)
    topology: str = "tpu:v5e:2x4"
    axes: Mapping[str, int] = field(default_factory=lambda: AXES)

    def make(self) -> Step:
        """Makes the step: loss and gradients."""
        names, lengths = tuple(self.axes), tuple(self.axes.values())
        mesh = AbstractMesh(lengths, names, axis_types=(AxisType.Auto,) * len(names))
        shapes = jax.eval_shape(self.sizes.init, jax.random.key(0))
        specs = self.sizes.param_specs(shapes, "expert")
        grad_fn = dpj.value_and_grad(
            self.sizes.for_pipeline("expert", is_ragged=self.sizes.capacity_factor is None),
            mesh=mesh,
            num_microbatches=self.num_microbatches,
            execution=dpj.Execution(overlap=True),
            remat="block",
            batch_axes="expert",
            manual_axes="expert",
            param_specs=specs,
            trainable=model.is_trained,
        )

        def over_ranks(path: Any, leaf: Any, spec: PartitionSpec) -> PartitionSpec:
            is_spread = path[0].key == "blocks" and leaf.shape[0] % self.axes["pipe"] == 0
            return PartitionSpec("pipe" if is_spread else None, *spec[1:])

        specs = jax.tree_util.tree_map_with_path(over_ranks, shapes, specs)
        num_rows = self.rows * self.num_microbatches * self.axes["expert"]
        batch = jax.ShapeDtypeStruct((num_rows, self.context + 1), jnp.int32)
        args = lay((shapes, batch), (specs, PartitionSpec("expert")), mesh)
        platform = self.topology.split(":")[0]
        options = dict(dpj.compiler_options(platform))
        if platform == "tpu":
            options |= self.tpu_options
        return Step(fn=jax.jit(grad_fn), args=args, mesh=mesh, options=options)


CASES = {
    "capacity": Case(label="expert layers alone, capacity 1.25", sizes=CAPACITY, tpu_options=COVER),
    "dropless": Case(
        label="expert layers alone, one a stage, dropless, ragged all-to-alls",
        sizes=replace(CAPACITY, expert_layers=4, capacity_factor=None),
        tpu_options=COVER,
    ),
    "dense-first": Case(
        label="a dense layer before seven of experts, capacity 1.25",
        sizes=replace(CAPACITY, dense_layers=1, expert_layers=7),
    ),
}


def describe(label: str, figures: Figures) -> str:
    """Counts the collectives of a trip: how many are asynchronous, and how many are hidden."""
    if figures.loop is None:
        return f"{label}: no loop to look at{'' if figures.fits else ', as it does not fit'}"
    counts = [
        f"{each.total} {kind} ({each.num_async} asynchronous, {each.num_hidden} hidden)"
        for kind, each in figures.counts.items()
    ]
    exposed, compute = (
        "?" if seconds is None else f"{seconds * 1e6:,.0f}"
        for seconds in (figures.exposed_seconds, figures.compute_seconds)
    )
    return f"{label}: {', '.join(counts)}; {exposed} us exposed beside {compute} of compute"


def run(topology: str, *, console: Console) -> None:
    """Compiles the cases and prints the report of each."""
    lines = []
    for name, case in CASES.items():
        with console.status(f"compiling: {case.label}"):
            figures = compile_case(replace(case, topology=topology))
        console.rule(case.label)
        console.print(figures.text, markup=False)
        lines.append(describe(f"{name:12}", figures))
    console.rule("a trip of the loop")
    for line in lines:
        console.print(line, markup=False)
