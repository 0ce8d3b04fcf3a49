"""Small steps over fake devices, of shapes alone."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import dualpipe_jax as dpj


def make_mesh(*shape: int, names: tuple[str, ...] = ("pipe",), kind: Any = AxisType.Auto) -> Mesh:
    size = 1
    for each in shape:
        size *= each
    kinds = (kind,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=kinds, devices=jax.devices()[:size])


def make_step(
    mesh: Mesh | AbstractMesh,
    *,
    schedule: str = "dualpipe",
    overlap: bool | Literal["two-tick"] = True,
    num_microbatches: int = 8,
    slots_on_device: int | None = None,
) -> Any:
    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return x + jnp.tanh(x @ params["up"]) @ params["down"]

    model = dpj.Model(
        embed=lambda ends, ctx: ends["table"][ctx.microbatch],
        block=block,
        head=lambda ends, x, ctx: jnp.square(x @ ends["table"].T).mean(),
    )
    return dpj.value_and_grad(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        schedule=schedule,
        execution=dpj.Execution(overlap=overlap, slots_on_device=slots_on_device),
    )


def make_args(
    mesh: Mesh | None, *, width: int = 8, num_layers: int = 4, rows: int = 16, length: int = 4
) -> tuple[Any, Any]:
    def aval(shape: tuple[int, ...], dtype: Any, *spec: str) -> jax.ShapeDtypeStruct:
        plain = jax.ShapeDtypeStruct(shape, dtype)
        if mesh is None:
            return plain
        return plain.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    params = {
        "ends": {"table": aval((16, width), jnp.float32)},
        "blocks": {
            "up": aval((num_layers, width, 4 * width), jnp.float32, "pipe"),
            "down": aval((num_layers, 4 * width, width), jnp.float32, "pipe"),
        },
    }
    return params, aval((rows, length), jnp.int32)
