"""Mesh axes beside the pipeline's: data, expert and tensor parallel blocks, exact in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.cheap_keys import make_key
from tests.hlo import loop_lines
from tests.models import assert_close, make_model, sequential_value_and_grad
from tests.models import make_batch as make_model_batch
from tests.models import make_params as make_model_params
from tests.schedules_under_test import has_steady

WIDTH, HIDDEN, ROWS, LENGTH, EXPERTS, LAYERS = 4, 6, 2, 4, 4, 4


def make_mesh(kind: AxisType = AxisType.Explicit, **axes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(kind,) * len(axes),
        devices=jax.devices()[: int(np.prod(list(axes.values())))],
    )


def make_params(**shapes: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.5)

    return {
        "ends": {"table": normal(5, WIDTH), "gain": 1 + normal(WIDTH)},
        "blocks": {name: normal(LAYERS, *shape) for name, shape in shapes.items()},
    }


def put(params: Any, mesh: jax.sharding.Mesh, **specs: P) -> Any:
    """Lays leaves of blocks over the mesh."""
    blocks = {
        name: jax.device_put(leaf, jax.NamedSharding(mesh, specs.get(name, P())))
        for name, leaf in params["blocks"].items()
    }
    return {**params, "blocks": blocks}


def make_batch(num_microbatches: int) -> jax.Array:
    shape = ROWS * num_microbatches, LENGTH
    return jnp.asarray(np.random.default_rng(4).integers(0, 5, size=shape))


def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return ends["table"][ctx.microbatch] * ends["gain"]


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    logits = jnp.tanh(x) @ ends["table"].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ctx.microbatch[..., None], -1).mean()


def model_of(
    block: Callable[..., Any], *, head: Callable[..., Any] = head, **more: Any
) -> dpj.Model:
    return dpj.Model(embed=embed, block=block, head=head, **more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_data_parallel(kind: AxisType) -> None:
    params = make_params(up=(WIDTH, HIDDEN), down=(HIDDEN, WIDTH), scale=(WIDTH,), gain=())
    batch, model = make_batch(8), model_of(tensor_sequential)
    mesh = make_mesh(kind, pipe=4, data=2)
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=4, batch_axes="data")
    want = sequential_value_and_grad(model, 8)(params, batch)
    blocks = jax.device_put(params["blocks"], jax.NamedSharding(mesh, P("pipe")))
    batch = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
    params = {**params, "blocks": blocks}
    program = jax.jit(grad_fn).lower(params, batch).compile()
    assert_close(program(params, batch), want)
    text = str(program.as_text())
    assert " all-reduce(" in text
    assert not [line for line in loop_lines(text) if " all-reduce(" in line]
    assert "all-gather" not in text


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(AxisType.Explicit,), (AxisType.Explicit, AxisType.Auto)])
def test_loss_may_be_left_unread(kinds: tuple[AxisType, ...]) -> None:
    """By a jitted step over arrays that are on no mesh yet: only the step names devices."""
    axes = ("pipe", "data")[: len(kinds)]
    mesh = jax.make_mesh(
        (2,) * len(axes), axes, axis_types=kinds, devices=jax.devices()[: 2 ** len(axes)]
    )
    params, batch, model = make_params(scale=(WIDTH,)), make_batch(2), model_of(scaled)
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2, schedule="gpipe")
    want = jax.grad(dpj.sequential(model, num_microbatches=2))(params, batch)
    assert_close(jax.jit(lambda *args: grad_fn(*args)[1])(params, batch), want)


def scaled(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return x + jnp.tanh(x * params["scale"])


# --- experts: token t of a row goes to expert t, and comes back ------------------------------


def expert_parallel(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, jax.Array]:
    """A device holds one expert, and its own rows: `[rows, token, width]`."""
    gates = jax.nn.softmax(x @ params["router"])  # [rows, token, expert]
    sent = lax.all_to_all(x, "expert", split_axis=1, concat_axis=0, tiled=True)
    assert params["up"].shape == (1, WIDTH, HIDDEN)
    out = jnp.tanh(sent @ params["up"][0]) @ params["down"][0]
    out = lax.all_to_all(out, "expert", split_axis=0, concat_axis=1, tiled=True)
    chosen = jnp.diagonal(gates, axis1=1, axis2=2)[..., None]
    return x + params["scale"] * out * chosen, jnp.square(gates).mean()


def expert_sequential(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, jax.Array]:
    gates = jax.nn.softmax(x @ params["router"])
    out = jnp.einsum(
        "rth,thw->rtw", jnp.tanh(jnp.einsum("rtw,twh->rth", x, params["up"])), params["down"]
    )
    chosen = jnp.diagonal(gates, axis1=1, axis2=2)[..., None]
    return x + params["scale"] * out * chosen, jnp.square(gates).mean()


EXPERT_SHAPES = {
    "router": (WIDTH, EXPERTS),
    "scale": (WIDTH,),
    "up": (EXPERTS, WIDTH, HIDDEN),
    "down": (EXPERTS, HIDDEN, WIDTH),
}
EXPERT_SPECS = {
    "ends": P(),
    "blocks": {"router": P(), "scale": None, "up": P("pipe", "expert"), "down": P(None, "expert")},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "remat", "kind", "num_microbatches", "overlap"),
    [
        ({"pipe": 2, "expert": 4}, "none", AxisType.Explicit, 4, None),
        ({"pipe": 2, "expert": 4}, "block", AxisType.Auto, 4, None),
        ({"pipe": 2, "expert": 4}, "none", AxisType.Explicit, 6, True),
    ],
)
def test_expert_parallel(
    axes: Any, remat: str, kind: AxisType, num_microbatches: int, overlap: Any
) -> None:
    """Two all-to-alls in the block; rows and experts are sharded over the same axis."""
    assert has_steady("dualpipe", 2, num_microbatches, overlap) == (overlap is True)
    params, batch = make_params(**EXPERT_SHAPES), make_batch(num_microbatches * EXPERTS)
    mesh = make_mesh(kind, **axes)
    grad_fn = dpj.value_and_grad(
        model_of(expert_parallel, block_has_aux=True),
        mesh=mesh,
        num_microbatches=num_microbatches,
        execution=dpj.Execution(overlap=overlap),
        remat=remat,
        batch_axes="expert",
        manual_axes="expert",
        param_specs=EXPERT_SPECS,
    )
    plain = model_of(expert_sequential, block_has_aux=True)
    want = sequential_value_and_grad(plain, num_microbatches * EXPERTS)(params, batch)
    params = put(params, mesh, up=P("pipe", "expert"), down=P("pipe", "expert"))
    program = jax.jit(grad_fn).lower(params, batch).compile()
    got = program(params, batch)
    assert_close(got, want)
    assert "expert" in str(got[1]["blocks"]["up"].sharding.spec)
    text = str(program.as_text())
    assert "all-to-all" in text
    # Gradients are reduced once, after the loop, and nothing is gathered.
    lines = loop_lines(text)
    assert any("all-to-all" in line for line in lines)
    assert not [line for line in lines if "all-reduce" in line]
    assert "all-gather" not in text
    evaluate = dpj.evaluate(
        model_of(expert_parallel, block_has_aux=True),
        mesh=mesh,
        num_microbatches=num_microbatches,
        batch_axes="expert",
        manual_axes="expert",
        param_specs=EXPERT_SPECS,
    )
    assert_close(jax.jit(evaluate)(params, batch), want[0])


# --- tensors: each device holds a part of the hidden dim -------------------------------------


def tensor_parallel(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    """Megatron's: columns, then rows, then a sum; the scale is used where all devices agree."""
    inner = jnp.tanh((x * params["scale"]) @ params["up"])  # [rows, token, hidden / devices]
    # The gain is the same on all devices, and the value that it scales is not.
    inner = inner * params["gain"]
    return x + lax.psum(inner @ params["down"], "model")


def tensor_sequential(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    inner = jnp.tanh((x * params["scale"]) @ params["up"]) * params["gain"]
    return x + inner @ params["down"]


def tensor_annotated(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    """The same, the partitioner told where to cut."""
    inner = jnp.tanh((x * params["scale"]) @ params["up"]) * params["gain"]
    inner = lax.with_sharding_constraint(inner, P(None, None, "model"))
    return x + inner @ params["down"]


def vocabulary_parallel_head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    """Each device has the logits of a part of the width, and they are summed."""
    size = WIDTH // lax.axis_size("model")
    start = lax.axis_index("model") * size
    mine = lax.dynamic_slice_in_dim(lax.pcast(jnp.tanh(x), "model", to="varying"), start, size, -1)
    logits = lax.psum(mine @ ends["part"].T, "model")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ctx.microbatch[..., None], -1).mean()


TENSOR_SHAPES = {
    "scale": (WIDTH,),
    "gain": (),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
TENSOR_SPECS = {
    "ends": {"table": P(), "gain": P(), "part": P(None, "model")},
    "blocks": {
        "scale": P(),
        "gain": P(),
        "up": P(None, None, "model"),
        "down": P(None, "model"),
    },
}
# With a data axis, gradients are sharded over it as well.
TENSOR_GRAD_SPECS = {
    "ends": {"table": P(None, ("pipe", "data")), "gain": None, "part": P(None, ("model", "data"))},
    "blocks": {
        "scale": P("pipe"),
        "gain": None,
        "up": P("pipe", "data", "model"),
        "down": P("pipe", "model", "data"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "schedule", "kind", "num_microbatches", "overlap"),
    [
        ({"pipe": 4, "model": 2}, "dualpipe", AxisType.Auto, 4, None),
        ({"pipe": 2, "data": 2, "model": 2}, "dualpipev", AxisType.Explicit, 4, None),
        ({"pipe": 2, "data": 2, "model": 2}, "dualpipev", AxisType.Auto, 5, True),
    ],
)
def test_tensor_parallel(
    axes: Any, schedule: str, kind: AxisType, num_microbatches: int, overlap: Any
) -> None:
    """Rows are the same on all devices of the axis; a sum in the block, and in the head."""
    assert has_steady(schedule, axes["pipe"], num_microbatches, overlap) == (overlap is True)
    params = make_params(**TENSOR_SHAPES)
    params["ends"]["part"] = params["ends"]["table"] + 0.1
    num_shards = axes.get("data", 1)
    batch = make_batch(num_microbatches * num_shards)
    mesh = make_mesh(kind, **axes)
    more: Any = {}
    if num_shards > 1:
        more = {"batch_axes": "data", "grad_specs": TENSOR_GRAD_SPECS}
    grad_fn = dpj.value_and_grad(
        model_of(tensor_parallel, head=vocabulary_parallel_head),
        mesh=mesh,
        num_microbatches=num_microbatches,
        schedule=schedule,
        execution=dpj.Execution(overlap=overlap),
        manual_axes=("model",),
        param_specs=TENSOR_SPECS,
        **more,
    )

    def plain_head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return head({**ends, "table": ends["part"]}, x, ctx)

    plain = model_of(tensor_sequential, head=plain_head)
    want = sequential_value_and_grad(plain, num_microbatches * num_shards)(params, batch)
    params = put(params, mesh, up=P("pipe", None, "model"), down=P("pipe", "model"))
    program = jax.jit(grad_fn).lower(params, batch).compile()
    got = program(params, batch)
    assert_close(got, want)
    if num_shards > 1:
        down, lies = got[1]["blocks"]["down"], jax.NamedSharding(mesh, P("pipe", "model", "data"))
        assert down.sharding.is_equivalent_to(lies, down.ndim)
    # Activations are summed in the loop, and their cotangents; no gradient of a parameter is.
    sums = [line for line in loop_lines(str(program.as_text())) if " all-reduce(" in line]
    activation = f"f64[{ROWS},{LENGTH},"
    assert sums
    assert all(activation in line for line in sums), sums


def test_work_is_the_same_whether_an_axis_is_manual() -> None:
    """Rows alone are sharded: `choose` counts the same, and balanced layers are found."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("pipe", "data"))
    model, params, batch = model_of(tensor_sequential), make_params(**TENSOR_SHAPES), make_batch(8)
    where: dict[str, Any] = {"mesh": mesh, "num_microbatches": 4, "batch_axes": "data"}
    found = [
        dpj.choose(model, params, batch, **where, manual_axes=axes, schedules="1f1b")
        for axes in ((), "data")
    ]
    assert [c.simulation for c in found[0]] == [c.simulation for c in found[1]]
    assert found[0][0].costs.head > 0


@pytest.mark.parametrize("axis", ["expert", "model"])
def test_layers_are_balanced_under_manual_axes(axis: str) -> None:
    """By costs of functions with collectives, on avals that vary over the axis."""
    options: dict[str, Any] = {"num_microbatches": 4, "manual_axes": axis}
    if axis == "expert":
        shapes, block, specs, size = EXPERT_SHAPES, expert_parallel, EXPERT_SPECS, EXPERTS
        options["batch_axes"] = axis
    else:
        shapes, block, specs, size = TENSOR_SHAPES, tensor_parallel, TENSOR_SPECS, 2
    mesh = jax.sharding.AbstractMesh((2, size), ("pipe", axis))
    options |= {"mesh": mesh, "param_specs": {**specs, "ends": P()}}
    model = model_of(block, block_has_aux=axis == "expert")
    params, batch = make_params(**shapes), make_batch(4 * EXPERTS)
    for remat in ("none", "block"):
        grad_fn = dpj.value_and_grad(model, **options, remat=remat, layers_per_stage="balanced")
        assert sum(grad_fn.memory(params, batch).layers_per_stage) == LAYERS


@pytest.mark.slow
def test_manual_axis_beside_one_left_to_the_partitioner() -> None:
    """The block sums over the first by name, and opens a shard_map over the second."""

    def mapped(params: Any, x: jax.Array) -> jax.Array:
        def fn(x: jax.Array, up: jax.Array) -> jax.Array:
            return x + lax.psum(jnp.tanh(x @ up).sum(-1, keepdims=True), "expert")

        return jax.shard_map(
            fn, in_specs=(P(), P(None, "expert")), out_specs=P(), axis_names={"expert"}
        )(x, params["mapped"])

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return mapped(params, tensor_parallel(params, x, ctx))

    def plain(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        x = tensor_sequential(params, x, ctx)
        return x + jnp.tanh(x @ params["mapped"]).sum(-1, keepdims=True)

    params = make_params(**TENSOR_SHAPES, mapped=(WIDTH, HIDDEN))
    batch = make_batch(4)
    grad_fn = dpj.value_and_grad(
        model_of(block),
        mesh=make_mesh(AxisType.Auto, pipe=2, model=2, expert=2),
        num_microbatches=4,
        remat="block",
        manual_axes=("model",),
        param_specs={"ends": P(), "blocks": {**TENSOR_SPECS["blocks"], "mapped": P()}},
    )
    want = sequential_value_and_grad(model_of(plain), 4)(params, batch)
    assert_close(jax.jit(grad_fn)(params, batch), want)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"pipe": 4, "model": 2}, {"pipe": 2, "data": 2, "model": 2}])
def test_tensor_parallel_by_annotations(axes: Any) -> None:
    params = make_params(**TENSOR_SHAPES)
    num_shards = axes.get("data", 1)
    batch, mesh = make_batch(4 * num_shards), make_mesh(**axes)
    want = sequential_value_and_grad(model_of(tensor_sequential), 4 * num_shards)(params, batch)
    params = put(params, mesh, up=P("pipe", None, "model"), down=P("pipe", "model"))
    more: Any = {"batch_axes": "data"} if num_shards > 1 else {}
    grad_fn = dpj.value_and_grad(model_of(tensor_annotated), mesh=mesh, num_microbatches=4, **more)
    program = jax.jit(grad_fn).lower(params, batch).compile()
    got = program(params, batch)
    assert_close(got, want)
    assert got[1]["blocks"]["up"].sharding.spec == P("pipe", None, "model")
    text = str(program.as_text())
    # A device holds half of the hidden dim, and the blocks are not gathered.
    assert f"f64[{ROWS},{LENGTH},{HIDDEN // 2}]" in text
    assert f"f64[{ROWS},{LENGTH},{HIDDEN}]" not in text
    assert f"f64[1,{WIDTH},{HIDDEN}]" not in text


@pytest.mark.slow
def test_a_batch_axis_may_be_manual_too() -> None:
    """Nothing changes for a model that does not use it: keys, weights, metrics, remat."""
    model = make_model(frozenset(["dropout", "weight", "block_has_aux", "has_aux", "pytree"]))
    params, batch = make_model_params(3), make_model_batch(4)
    results = []
    for manual_axes in ((), ("data",)):
        grad_fn = dpj.value_and_grad(
            model,
            mesh=make_mesh(pipe=2, data=2),
            num_microbatches=2,
            remat="block",
            batch_axes="data",
            manual_axes=manual_axes,
        )
        results.append(jax.jit(grad_fn)(params, batch, rng=make_key(1)))
    assert_close(results[1], results[0])


@pytest.mark.slow
def test_sums_in_the_model_over_an_axis_of_the_batch() -> None:
    """A parameter in a sum over shards counts for all of them; an axis is left to the partitioner.

    The reference is the model under JAX's `vmap` with named axes.
    """

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        both = jnp.tanh(x).mean() * params["gain"] + params["bias"]
        twice = lax.psum(lax.psum(params["bias"], "data"), "data")
        return x + params["gain"] * jnp.tanh(x) - lax.psum(both, "data") + twice

    model, num_microbatches = model_of(block), 2
    params, batch = make_params(gain=(), bias=()), make_batch(4)

    def plain(params: Any) -> jax.Array:
        def of_microbatch(tokens: jax.Array) -> jax.Array:
            ctx = dpj.Context(microbatch=tokens)
            x = embed(params["ends"], ctx)
            x, _ = lax.scan(lambda x, layer: (block(layer, x, ctx), None), x, params["blocks"])
            return head(params["ends"], x, ctx)

        shards = batch.reshape(2, num_microbatches, ROWS, LENGTH)
        return jax.vmap(jax.vmap(of_microbatch), axis_name="data")(shards).mean()

    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(pipe=2, data=2, other=2),
        num_microbatches=num_microbatches,
        batch_axes="data",
        manual_axes="data",
    )
    want = jax.jit(jax.value_and_grad(plain))(params)
    assert_close(jax.jit(grad_fn)(params, batch), want)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_value_may_vary_inside_a_jit_only(remat: str) -> None:
    @jax.jit
    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        rows = lax.pcast(x, "model", to="varying") @ params["w"]
        return x + lax.pmean(jnp.tanh(rows), "model")

    params, batch = make_params(w=(WIDTH, WIDTH)), make_batch(2)
    options: Any = {
        "mesh": make_mesh(pipe=2, model=2),
        "num_microbatches": 2,
        "manual_axes": "model",
    }
    model = model_of(block)
    _, grads = jax.eval_shape(dpj.value_and_grad(model, remat=remat, **options), params, batch)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    plain = model_of(lambda params, x, ctx: x + jnp.tanh(x @ params["w"]))
    want = dpj.sequential(plain, num_microbatches=2)(params, batch)
    assert_close(jax.jit(dpj.evaluate(model, **options))(params, batch), want)
