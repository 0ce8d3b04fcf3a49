"""Counts what a device holds of a training step, by how much of it lies over the data axis.

Run it with `make zero`. Steps are compiled for fake CPU devices, never run. The degrees are those
of ZeRO (arXiv:1910.02054); the last is also known as FSDP.
"""

import math
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

DOCS = Path(__file__).resolve().parents[2] / "docs" / "mesh_axes.md"
P = PartitionSpec
# How leaves lie when they are the same on all shards of the data, and when they are not.
WHOLE = {
    "ends": {"table": P(), "out": P()},
    "blocks": {"up": P("pipe"), "down": P("pipe")},
}
PARTS = {
    "ends": {"table": P("data"), "out": P(None, "data")},
    "blocks": {"up": P("pipe", None, "data"), "down": P("pipe", "data")},
}


@dataclass(frozen=True, kw_only=True)
class Degree:
    """What of a step lies over the data axis."""

    parameters: Any
    gradients: Any
    state: Any


DEGREES = {
    "nothing": Degree(parameters=WHOLE, gradients=WHOLE, state=WHOLE),
    "optimizer state": Degree(parameters=WHOLE, gradients=WHOLE, state=PARTS),
    "and gradients": Degree(parameters=WHOLE, gradients=PARTS, state=PARTS),
    "and parameters": Degree(parameters=PARTS, gradients=PARTS, state=PARTS),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model, its microbatches, and the mesh."""

    ranks: int = 2
    shards: int = 4
    microbatches: int = 8
    layers: int = 8
    width: int = 256
    vocabulary: int = 4096
    context: int = 16


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What a device holds.

    Attributes:
      parameters: Between steps.
      gradients: As the optimizer gets them.
      state: Adam's two moments, between steps.
      temporaries: What the step holds beside parameters and state, by the compiler's account.
    """

    parameters: int
    gradients: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        """All at once; the gradients are part of the temporaries."""
        return self.parameters + self.state + self.temporaries


def measure(sizes: Sizes, degree: Degree) -> Bytes:
    """Adds up what a device holds of a step of training."""
    compiled, params, state, grads = compile_step(sizes, degree)
    memory: Any = compiled.memory_analysis()
    return Bytes(
        parameters=_bytes(params),
        gradients=_bytes(grads),
        state=_bytes(state),
        temporaries=memory.temp_size_in_bytes,
    )


def compile_step(sizes: Sizes, degree: Degree) -> tuple[jax.stages.Compiled, Any, Any, Any]:
    """Compiles loss, gradients and Adam's update.

    Returns:
      The program, and avals of parameters, optimizer state and gradients as they lie.
    """
    devices = jax.devices()[: sizes.ranks * sizes.shards]
    mesh = jax.make_mesh(
        (sizes.ranks, sizes.shards),
        ("pipe", "data"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=devices,
    )

    def lie(specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)

    def laid(tree: Any, specs: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            lie(specs),
        )

    params = laid(_avals(sizes), degree.parameters)
    optimizer = optax.adam(1e-3)
    state: Any = jax.eval_shape(optimizer.init, params)
    moments = laid(_avals(sizes), degree.state)
    state = (state[0]._replace(mu=moments, nu=moments), *state[1:])
    grad_fn = dpj.value_and_grad(
        _model(),
        mesh=mesh,
        num_microbatches=sizes.microbatches,
        batch_axes="data",
        param_specs=degree.parameters,
        grad_specs=degree.gradients,
    )

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    out = jax.tree.map(lambda leaf: leaf.sharding, (params, state)), NamedSharding(mesh, P())
    batch = jax.ShapeDtypeStruct(
        (sizes.microbatches * sizes.shards, sizes.context + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, P("data")),
    )
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*out[0], out[1]))
    compiled = jitted.lower(params, state, batch).compile()
    return compiled, params, state, laid(params, degree.gradients)


def _model() -> dpj.Model:
    def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        labels = ctx.microbatch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(x @ ends["out"], labels).mean()

    return dpj.Model(
        embed=lambda ends, ctx: ends["table"][ctx.microbatch[:, :-1]],
        block=lambda params, x, ctx: x + jax.nn.gelu(x @ params["up"]) @ params["down"],
        head=head,
    )


def _avals(sizes: Sizes) -> Any:
    layers, width = sizes.layers, sizes.width

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {
        "ends": {"table": array(sizes.vocabulary, width), "out": array(width, sizes.vocabulary)},
        "blocks": {"up": array(layers, width, 4 * width), "down": array(layers, 4 * width, width)},
    }


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def _bytes(avals: Any) -> int:
    """Counts the bytes of one device's parts of arrays; what lies nowhere yet is a counter."""
    leaves = [leaf for leaf in jax.tree.leaves(avals) if leaf.sharding is not None]
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True)
    )


def table(rows: dict[str, Bytes]) -> str:
    """Writes what a device holds as Markdown."""
    lines = [
        "| over the data axis | parameters | gradients | Adam's state | temporaries | all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        sizes = row.parameters, row.gradients, row.state, row.temporaries, row.total
        lines.append(f"| {name} | " + " | ".join(f"{size / 2**20:.1f}" for size in sizes) + " |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--ranks", type=flags.POSITIVE, default=2, show_default=True)
@click.option("--shards", type=flags.POSITIVE, default=4, show_default=True)
@click.option("--microbatches", type=flags.POSITIVE, default=8, show_default=True)
@click.option("--layers", type=flags.POSITIVE, default=8, show_default=True)
@click.option("--width", type=flags.POSITIVE, default=256, show_default=True)
@click.option("--vocabulary", type=flags.POSITIVE, default=4096, show_default=True)
@click.option("--context", type=flags.POSITIVE, default=16, show_default=True)
@click.option("--write-docs", is_flag=True, help="Put the table into docs/mesh_axes.md.")
def command(write_docs: bool, **options: Any) -> None:
    """Count what a device holds, by how much of a step lies over the data axis; in MiB."""
    sizes = Sizes(**options)
    flags.require_multiples(
        ("--layers", sizes.layers, sizes.ranks),
        ("--width", sizes.width, sizes.shards),
        ("--vocabulary", sizes.vocabulary, sizes.shards),
        why="for every device to have as much",
    )
    jax.config.update("jax_num_cpu_devices", sizes.ranks * sizes.shards)  # before a backend starts
    text = table({name: measure(sizes, degree) for name, degree in DEGREES.items()})
    click.echo(text)
    if write_docs:
        documents.write_into(DOCS, text, name="zero")


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="zero")


if __name__ == "__main__":
    main()
