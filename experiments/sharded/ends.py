"""Counts what embedding and head cost a pipeline: bytes on every rank, and idle time.

Run it with `make ends`. Steps are compiled for fake CPU devices, never run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from experiments import documents
from experiments.train_lm import flags

README = Path(__file__).with_name("ends.md")
AXIS = "pipe"
# How the ends lie over the ranks: embedding, head.
LAYOUTS = {
    "on every rank": (PartitionSpec(), PartitionSpec()),
    "over the ranks": (PartitionSpec(AXIS), PartitionSpec(None, AXIS)),
}
SCHEDULES = ("1f1b", "dualpipe", "dualpipev")
FEWER = (0, 1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model, its microbatches, and the pipeline."""

    ranks: int
    microbatches: int
    layers: int
    width: int
    vocabulary: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What a step of training holds on one device, by the compiler's account.

    Attributes:
      state: Parameters and Adam's state, which the step overwrites in place.
      temporaries: What it holds beside while it runs, the gradients among it.
    """

    state: int
    temporaries: int


def measure(sizes: Sizes, layout: str) -> Bytes:
    """Compiles loss, gradients and Adam's update."""
    embedding, head = LAYOUTS[layout]
    devices = jax.devices()[: sizes.ranks]
    mesh = jax.make_mesh((sizes.ranks,), (AXIS,), devices=devices)

    def array(spec: PartitionSpec, *shape: int) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    over_ranks, width = PartitionSpec(AXIS), sizes.width
    params = {
        "ends": {
            "table": array(embedding, sizes.vocabulary, width),
            "out": array(head, width, sizes.vocabulary),
        },
        "blocks": {
            "up": array(over_ranks, sizes.layers, width, 4 * width),
            "down": array(over_ranks, sizes.layers, 4 * width, width),
        },
    }
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(optimizer.init, params)
    state = (state[0]._replace(mu=params, nu=params), *state[1:])  # laid out as the parameters are
    grad_fn = dpj.value_and_grad(
        _model(),
        mesh=mesh,
        num_microbatches=sizes.microbatches,
        axis=AXIS,
        param_specs={"ends": {"table": embedding, "out": head}, "blocks": PartitionSpec()},
    )

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    batch = jax.ShapeDtypeStruct((sizes.microbatches, sizes.context + 1), jnp.int32)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    memory: Any = compiled.memory_analysis()
    return Bytes(state=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes)


def _model() -> dpj.Model:
    def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        labels = ctx.microbatch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(x @ ends["out"], labels).mean()

    return dpj.Model(
        embed=lambda ends, ctx: ends["table"][ctx.microbatch[:, :-1]],
        block=lambda params, x, ctx: x + jax.nn.gelu(x @ params["up"]) @ params["down"],
        head=head,
    )


def bytes_table(rows: dict[str, Bytes]) -> str:
    """Writes what a device holds as Markdown."""
    lines = [
        "| embedding and head lie | state, MiB | temporaries, MiB | both, MiB |",
        "|---|---:|---:|---:|",
    ]
    for name, row in rows.items():
        sums = (row.state, row.temporaries, row.state + row.temporaries)
        lines.append(f"| {name} | " + " | ".join(f"{size / 2**20:,.0f}" for size in sums) + " |")
    return "\n".join(lines)


def layers_per_stage(num_layers: int, num_stages: int, fewer: int) -> list[int]:
    """Takes layers from the last stage, and gives them to those after the first in turn.

    >>> layers_per_stage(16, 4, 2)
    [4, 5, 5, 2]
    """
    sizes = [num_layers // num_stages] * num_stages
    sizes[-1] -= fewer
    for i in range(fewer):
        sizes[1 + i % (num_stages - 2)] += 1
    return sizes


def idle_shares(sizes: Sizes, schedule: str, head_layers: float) -> list[float | None]:
    """Simulates the idle share for each of `FEWER`, None where the stages have too few layers.

    `head_layers` is what the head's forward costs, in forwards of a layer.
    """
    made = dpj.schedules.make(schedule, num_ranks=sizes.ranks, num_microbatches=sizes.microbatches)
    costs = dpj.Costs(head=head_layers * sizes.ranks / sizes.layers)
    shares = []
    for fewer in FEWER:
        spread = layers_per_stage(sizes.layers, made.num_stages, fewer)
        is_known = spread[-1] > 0
        shares.append(
            dpj.simulate(made, costs=costs, layers_per_stage=spread).idle_share
            if is_known
            else None
        )
    return shares


def idle_table(sizes: Sizes, heads: tuple[float, ...]) -> str:
    """Writes the idle shares as Markdown."""
    titles = " | ".join(f"{fewer} fewer" for fewer in FEWER)
    lines = [f"| schedule | head, in layers | {titles} |", "|---|---:|" + "---:|" * len(FEWER)]
    for schedule in SCHEDULES:
        for head in heads:
            shares = idle_shares(sizes, schedule, head)
            cells = ["-" if share is None else f"{share:.1%}" for share in shares]
            lines.append(f"| {schedule} | {head:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--ranks", type=click.IntRange(min=3), default=8, show_default=True)
@click.option("--microbatches", type=flags.POSITIVE, default=32, show_default=True)
@click.option("--layers", type=flags.POSITIVE, default=128, show_default=True)
@click.option("--width", type=flags.POSITIVE, default=512, show_default=True)
@click.option("--vocabulary", type=flags.POSITIVE, default=2**17, show_default=True)
@click.option("--context", type=flags.POSITIVE, default=64, show_default=True)
@click.option("--write-readme", is_flag=True, help="Put the tables into the README.")
def command(write_readme: bool, **options: Any) -> None:
    """Count what embedding and head cost: bytes on a device, and idle time."""
    sizes = Sizes(**options)
    flags.require_multiples(
        ("--layers", sizes.layers, 2 * sizes.ranks),
        ("--vocabulary", sizes.vocabulary, sizes.ranks),
        why="for every stage and rank to have as many",
    )
    jax.config.update("jax_num_cpu_devices", sizes.ranks)  # read when the backend starts
    tables = "\n\n".join(
        [
            bytes_table({layout: measure(sizes, layout) for layout in LAYOUTS}),
            idle_table(sizes, heads=(1, 2, 4)),
        ]
    )
    click.echo(tables)
    if write_readme:
        documents.write_into(README, tables)


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="ends")


if __name__ == "__main__":
    main()
