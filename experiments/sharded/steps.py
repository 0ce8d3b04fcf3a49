"""A layout -> a training step, compiled for fake CPU devices -> the bytes of a device.

A step is loss, gradients and Adam's update. Nothing runs.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from experiments.train_lm.flags import POSITIVE

P = PartitionSpec


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model, its microbatches, and the mesh."""

    ranks: int
    shards: int = 1
    microbatches: int
    layers: int
    width: int
    vocabulary: int
    context: int

    @classmethod
    def flags(cls, **defaults: int) -> Callable[..., Any]:
        """Adds a flag for each size that has a default here."""

        def add(command: Any) -> Any:
            for name, default in reversed(defaults.items()):
                flag = f"--{name.replace('_', '-')}"
                command = click.option(flag, type=POSITIVE, default=default)(command)
            return command

        return add


def specs(*, table: P, out: P, up: P, down: P) -> Any:
    """Says how the model's leaves are sharded: embedding, head, and the kernels of a layer."""
    return {"ends": {"table": table, "out": out}, "blocks": {"up": up, "down": down}}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How parameters, gradients and optimizer state are sharded, each a tree of `specs`."""

    parameters: Any
    gradients: Any
    state: Any


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """The bytes of a device.

    Attributes:
      parameters: Between steps.
      gradients: As the optimizer gets them.
      state: Adam's two moments, between steps.
      temporaries: Memory of the step beside parameters and state, by the compiler's account;
        gradients are part of it.
    """

    parameters: int
    gradients: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        """All at once."""
        return self.parameters + self.state + self.temporaries


def measure(sizes: Sizes, layout: Layout) -> Bytes:
    """Adds up the bytes of a training step on one device."""
    compiled, params, state, grads = compile_step(sizes, layout)
    memory: Any = compiled.memory_analysis()
    counted = _bytes(params), _bytes(grads), _bytes(state), memory.temp_size_in_bytes
    names = (field.name for field in dataclasses.fields(Bytes))
    return Bytes(**dict(zip(names, counted, strict=True)))


def make_mesh(sizes: Sizes) -> Mesh:
    """Makes the mesh, with an axis of data where there are several shards."""
    axes = {"pipe": sizes.ranks} | ({"data": sizes.shards} if sizes.shards > 1 else {})
    devices = jax.devices()[: math.prod(axes.values())]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def compile_step(sizes: Sizes, layout: Layout) -> tuple[jax.stages.Compiled, Any, Any, Any]:
    """Compiles loss, gradients and Adam's update.

    Returns:
      The program, and avals of parameters, optimizer state and gradients with their shardings.
    """
    mesh = make_mesh(sizes)

    def laid(specs: Any) -> Any:
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
            ),
            _avals(sizes),
            specs,
        )

    params, moments = laid(layout.parameters), laid(layout.state)
    optimizer = optax.adam(1e-3)
    state: Any = jax.eval_shape(optimizer.init, params)
    state = (state[0]._replace(mu=moments, nu=moments), *state[1:])
    is_data_parallel = sizes.shards > 1
    grad_fn = dpj.value_and_grad(
        _model(),
        mesh=mesh,
        num_microbatches=sizes.microbatches,
        batch_axes="data" if is_data_parallel else (),
        param_specs=layout.parameters,
        grad_specs=layout.gradients,
    )

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rows = sizes.microbatches * sizes.shards
    spec = P("data") if is_data_parallel else P()
    sharding = NamedSharding(mesh, spec)
    batch = jax.ShapeDtypeStruct((rows, sizes.context + 1), jnp.int32, sharding=sharding)
    out = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*out, NamedSharding(mesh, P())))
    compiled = jitted.lower(params, state, batch).compile()
    return compiled, params, state, laid(layout.gradients)


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
    layers, width, vocabulary = sizes.layers, sizes.width, sizes.vocabulary
    shapes = {
        "ends": {"table": (vocabulary, width), "out": (width, vocabulary)},
        "blocks": {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def _bytes(avals: Any) -> int:
    """Counts the bytes of one device's parts of arrays; a leaf without a sharding is a counter."""
    leaves = [leaf for leaf in jax.tree.leaves(avals) if leaf.sharding is not None]
    parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    return sum(part * leaf.dtype.itemsize for part, leaf in zip(parts, leaves, strict=True))
