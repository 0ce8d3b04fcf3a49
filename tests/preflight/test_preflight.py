"""The whole way on CPU devices: a step of the library, a user's own, and refusals."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from tests.preflight.steps import make_args, make_mesh, make_step


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_steady_loop_is_found_and_its_matmuls_counted(kind: AxisType) -> None:
    mesh = make_mesh(2, kind=kind)
    report = dpj.preflight(make_step(mesh), make_args(mesh), "cpu:2")
    assert (report.topology, report.axes, report.failure) == ("cpu:2", {"pipe": 2}, "")
    loop = report.loop
    assert loop is not None
    assert (loop.kind, loop.num_trips) == ("steady", 2)
    # Rows of a microbatch, tokens of a row, width; two matmuls a layer in F, I and W.
    matmul = 2 * 2 * 4 * 8 * 32
    flops = {action.name: action.flops for action in loop.actions}
    layers, beats = 2, 2
    for action in ("forward", "input_grad", "weight_grad"):
        assert flops[action] == beats * layers * 2 * matmul
    assert sum(flops.values()) == loop.flops
    # An x and a cotangent a beat; between two ranks every second beat's goes to the same rank.
    assert {each.kind for each in loop.collectives} == {"collective-permute"}
    assert {each.num_bytes for each in loop.collectives} == {2 * 4 * 8 * 4}
    assert not any(each.is_async for each in loop.collectives)
    assert report.prediction.reason == "the compiler gives no cycles on this platform"


def test_memory_is_the_compilers() -> None:
    mesh = make_mesh(2)
    args = make_args(mesh)
    memory = dpj.preflight(make_step(mesh), args, "cpu:2").memory
    params, batch = args
    assert memory.arguments is not None
    sharded = sum(leaf.size * 4 for leaf in jax.tree.leaves(params["blocks"])) // 2
    replicated = params["ends"]["table"].size * 4
    assert memory.arguments == sharded + replicated + batch.size * 4
    assert memory.outputs is not None
    assert memory.outputs >= sharded + replicated + 4
    assert memory.needed == memory.arguments + memory.outputs + (memory.temporaries or 0)
    assert memory.fits is None


def test_donated_arguments_are_not_needed_twice() -> None:
    mesh = make_mesh(2)
    step, args = make_step(mesh), make_args(mesh)

    def update(params: Any, batch: Any) -> Any:
        return jax.tree.map(lambda p, g: p - g, params, step(params, batch)[1])

    plain = dpj.preflight(update, args, "cpu:2").memory
    donated = dpj.preflight(jax.jit(update, donate_argnums=0), args, "cpu:2").memory
    blocks, ends = (args[0][part] for part in ("blocks", "ends"))
    on_a_device = sum(leaf.size * 4 for leaf in jax.tree.leaves(blocks)) // 2
    on_a_device += ends["table"].size * 4
    assert (plain.aliased, donated.aliased) == (0, on_a_device)


def test_schedule_without_beats_has_the_scan_over_ticks() -> None:
    mesh = make_mesh(2)
    step = make_step(mesh, schedule="1f1b", overlap=False)
    report = dpj.preflight(step, make_args(mesh), "cpu:2")
    assert report.loop is not None
    assert report.loop.kind == "ramp"
    assert "there is no steady state" in str(report)


def test_a_step_of_the_users_own() -> None:
    mesh = make_mesh(4)

    def step(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.psum(x @ x, "pipe"), None

        return jax.lax.scan(body, x, length=5)[0]

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    report = dpj.preflight(mapped, (jnp.ones((8, 8), jnp.float32),), "cpu:4")
    loop = report.loop
    assert loop is not None
    assert (loop.kind, loop.num_trips, loop.flops) == ("other", 5, 2 * 8**3)
    (psum,) = loop.collectives
    assert (psum.kind, psum.axes, psum.num_bytes) == ("all-reduce", ("pipe",), 8 * 8 * 4)


def test_mesh_comes_from_the_step_where_no_argument_lies_on_one() -> None:
    for kind in (AxisType.Auto, AxisType.Explicit):
        step, args = make_step(make_mesh(2, kind=kind)), make_args(None)
        assert dpj.preflight(step, args, "cpu:2").axes == {"pipe": 2}
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), args)
    assert dpj.preflight(step, arrays, "cpu:2").axes == {"pipe": 2}


def test_step_over_an_abstract_mesh() -> None:
    mesh = AbstractMesh((2,), ("pipe",))
    report = dpj.preflight(make_step(mesh), make_args(None), "cpu:2", mesh=mesh)
    assert report.loop is not None
    assert report.loop.kind == "steady"


def test_rng_keys_and_scalars_are_arguments_too() -> None:
    mesh = make_mesh(2)
    step = make_step(mesh)

    def scaled(params: Any, batch: Any, key: Any, scale: Any) -> Any:
        return step(params, batch, rng=key)[0] * scale

    report = dpj.preflight(scaled, (*make_args(mesh), jax.random.key(0), 2.0), "cpu:2")
    assert report.loop is not None


def test_compiler_options_are_the_users_if_given() -> None:
    mesh = make_mesh(2)
    options: dict[str, bool | int | str] = {"xla_cpu_enable_fast_math": True}
    report = dpj.preflight(make_step(mesh), make_args(mesh), "cpu:2", compiler_options=options)
    assert report.compiler_options == options
    for wrong, error, message in (
        ({"xla_no_such_option": True}, ValueError, "compiler_options={.*for 'cpu:2', .*No such"),
        ({"xla_cpu_enable_fast_math": "maybe"}, ValueError, "value that it takes.*'maybe'"),
        ({"xla_cpu_enable_fast_math": [1]}, TypeError, "'xla_cpu_enable_fast_math' is list"),
        (3, TypeError, "compiler_options=3: must be a dict of XLA's options"),
    ):
        with pytest.raises(error, match=f"(?s){message}"):
            dpj.preflight(
                make_step(mesh),
                make_args(mesh),
                "cpu:2",
                compiler_options=wrong,  # pyrefly: ignore
            )


def test_report_is_text() -> None:
    mesh = make_mesh(2)
    lines = str(dpj.preflight(make_step(mesh), make_args(mesh), "cpu:2")).splitlines()
    assert lines[0] == "device   cpu:2, CPU; mesh pipe 2"
    assert re.fullmatch(r"memory   .* KiB a device: capacity not known", lines[3])
    assert "loop     the steady state, 2 beats a trip; 2 trips" in lines
    assert any(line.split()[:3] == ["collective-permute", "pipe", "sync"] for line in lines)


def test_temporaries_must_fit_into_the_hosts_memory_where_it_is_given() -> None:
    mesh = make_mesh(2)
    report = dpj.preflight(make_step(mesh), make_args(mesh), "cpu:2", host_memory="64MiB")
    assert (report.memory.host_capacity, report.memory.host_temporaries) == (64 * 2**20, 0)
    assert (report.memory.fits_host, report.faults) == (True, ())
    for host_temporaries, number in ((64 * 2**20, 0), (65 * 2**20, 1)):
        memory = replace(report.memory, host_temporaries=host_temporaries)
        judged = replace(report, memory=memory)
        assert len(judged.faults) == number
        line = f"host's memory {host_temporaries // 2**20} MiB of 64 MiB: "
        assert line + ("DOES NOT FIT" if number else "fits") in str(judged)
        assert ("FAULT" in str(judged)) == bool(number)


def test_wrong_arguments_are_named() -> None:
    mesh = make_mesh(2)
    step, args = make_step(mesh), make_args(mesh)
    with pytest.raises(ValueError, match=r"'cpu:4': has 4 devices, but the step's mesh \(pipe 2\)"):
        dpj.preflight(step, args, "cpu:4")
    with pytest.raises(TypeError, match="step_fn=3: must be a function, jitted or not"):
        dpj.preflight(3, args, "cpu:2")  # pyrefly: ignore
    with pytest.raises(TypeError, match="args=ShapeDtypeStruct: must be a tuple"):
        dpj.preflight(step, args[1], "cpu:2")  # pyrefly: ignore
    with pytest.raises(TypeError, match="mesh='pipe': must be a jax"):
        dpj.preflight(step, args, "cpu:2", mesh="pipe")
    with pytest.raises(ValueError, match="mesh=None: the arguments lie on no mesh"):
        dpj.preflight(lambda x: x + 1, (jnp.ones(3),), "cpu:2")
    other = NamedSharding(make_mesh(2, names=("data",)), PartitionSpec())
    elsewhere = args[1].update(sharding=other)
    with pytest.raises(ValueError, match="args: must all lie on one mesh"):
        dpj.preflight(step, (args[0], elsewhere), "cpu:2")


def test_step_without_collectives_has_the_loop_of_most_work() -> None:
    mesh = make_mesh(2)

    def step(weight: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, _: None) -> Any:
            with jax.named_scope("dualpipe.head"):
                x = jnp.tanh(x @ weight)
            return x @ weight @ weight, None

        x, _ = jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=9)
        return jax.lax.scan(layer, x, length=5)[0]

    shapes = (8, 8), (4, 8)
    args = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    report = dpj.preflight(step, args, "cpu:2", mesh=mesh)
    loop = report.loop
    assert loop is not None
    assert (loop.kind, loop.num_trips, loop.collectives) == ("plain", 5, ())
    matmul = 2 * 4 * 8 * 8
    assert {action.name: action.flops for action in loop.actions} == {
        "head": matmul,
        "other": 2 * matmul,
    }
    assert "no loop has collectives" in str(report)


def test_size_of_the_program() -> None:
    mesh = make_mesh(2)
    sizes = [
        dpj.preflight(make_step(mesh, num_microbatches=number), make_args(mesh), "cpu:2").program
        for number in (4, 8, 16)
    ]
    counts = [size.num_instructions for size in sizes if size is not None]
    assert len(counts) == 3
    # A longer steady phase is more trips of the same loop; XLA may add or drop a constant.
    assert counts[2] == pytest.approx(counts[1], rel=0.01)
    assert counts[1] > 100
