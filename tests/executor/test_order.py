"""Values that wait for others: equal bit for bit, and no compiler sees that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dualpipe_jax._executor import barriers

# float32 bits: zeros of both signs, infinities, NaNs with payloads, subnormals, and any.
BITS = np.concatenate(
    [
        np.array([0, 1, 2, 3, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFC12345], np.uint32),
        np.random.default_rng(0).integers(0, 1 << 32, 2000, np.uint32),
    ]
)


def test_values_stay_as_they_are_whatever_they_wait_for() -> None:
    values = {"x": jnp.asarray(BITS.view(np.float32)), "layer": jnp.arange(3)}
    waiting = jax.jit(jax.vmap(barriers.select_after, in_axes=(None, 0)))
    got = waiting(values, [jnp.asarray(BITS.view(np.float32))])
    assert (np.asarray(got["x"]).view(np.uint32) == BITS).all()
    assert (got["layer"] == jnp.arange(3)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64])
def test_the_compiler_keeps_values_that_are_waited_for(dtype: jnp.dtype) -> None:
    value = jax.ShapeDtypeStruct((4,), jnp.float32)
    other = jax.ShapeDtypeStruct((2, 2), dtype)
    # XLA drops parameters that nobody reads, if it finds out.
    compiled = jax.jit(barriers.select_after).lower(value, [other]).compile()
    assert "select" in str(compiled.as_text())
    assert "multiply" in str(compiled.as_text())


def test_values_that_cannot_be_waited_for_are_left_out() -> None:
    value = jnp.arange(4.0)
    others = [jnp.zeros((0, 3)), jnp.arange(2), jnp.ones(2, bool)]
    assert (barriers.select_after(value, others) == value).all()


def test_programs_for_gpus_have_it() -> None:
    value = jax.ShapeDtypeStruct((4,), jnp.float32)
    traced = jax.jit(barriers.wait_for).trace(value, [value])
    assert "select" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_programs_for_others_have_nothing_of_it() -> None:
    value = jax.ShapeDtypeStruct((4,), jnp.float32)
    text = str(jax.jit(barriers.wait_for).lower(value, [value]).compile().as_text())
    assert not [name for name in ("select", "multiply", "conditional") if f"{name}(" in text]


@pytest.mark.parametrize(
    ("shape", "minor_to_major"),
    [
        ((5, 4, 3), "2, 1, 0"),
        ((1, 4, 3), "2, 1, 0"),
        ((5, 4, 1), "1, 2, 0"),
        ((5, 1, 3), "2, 1, 0"),
    ],
)
def test_values_lie_row_by_row_and_dims_of_size_one_not_innermost(
    shape: tuple[int, ...], minor_to_major: str
) -> None:
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    text = jax.jit(barriers.row_major).trace([value]).lower(lowering_platforms=("tpu",)).as_text()
    (line,) = [line for line in text.splitlines() if "LayoutConstraint" in line]
    assert f"dense<[{minor_to_major}]>" in line


def test_values_lie_in_the_order_that_is_given_or_as_they_are() -> None:
    values = [jax.ShapeDtypeStruct((5, size, 3), jnp.float32) for size in (4, 2)]

    def run(values: list[jax.Array]) -> list[jax.Array]:
        return barriers.row_major(values, [None, (0, 2, 1)])

    text = jax.jit(run).trace(values).lower(lowering_platforms=("tpu",)).as_text()
    (line,) = [line for line in text.splitlines() if "LayoutConstraint" in line]
    assert "dense<[1, 2, 0]>" in line
    assert "tensor<5x2x3xf32>" in line


@pytest.mark.parametrize("is_sharded", [True, False])
def test_values_that_xla_shards_are_left_to_it(is_sharded: bool) -> None:
    mesh = jax.make_mesh(
        (2, 2 if is_sharded else 1), ("pipe", "model"), axis_types=(AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec("pipe")
    step = jax.shard_map(
        barriers.row_major, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"pipe"}
    )
    value = jax.ShapeDtypeStruct((2, 4, 3), jnp.float32)
    text = jax.jit(step).trace(value).lower(lowering_platforms=("tpu",)).as_text()
    assert ("LayoutConstraint" in text) != is_sharded
