"""A model of `from_loss` in every function that takes a model, with each of their options.

One small loss with everything in it: dropout, a shared scale, losses and metrics of layers, an
integer parameter. Trees in and out are the user's own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualpipe_jax as dpj

WIDTH, LAYERS, ROWS, MICROBATCHES = 4, 4, 2, 4
KEY = jax.random.key(3)


def layer_params(i: int) -> dict[str, Any]:
    generator = np.random.default_rng(i)
    return {
        "w": jnp.asarray(generator.standard_normal((WIDTH, WIDTH))),
        "number": jnp.int32(i),
    }


PARAMS: dict[str, Any] = {
    "scale": jnp.linspace(0.5, 1.5, WIDTH),
    "head": jnp.linspace(-1, 1, WIDTH),
    "layers": [layer_params(i) for i in range(LAYERS)],
}
BATCH = jnp.asarray(np.random.default_rng(9).standard_normal((ROWS * MICROBATCHES, WIDTH)))


def loss_fn(params: Any, x: Any, rng: Any) -> Any:
    means, total = [], 0.0
    for i, layer in enumerate(params["layers"]):
        keep = jax.random.bernoulli(jax.random.fold_in(rng, i), 0.7, x.shape)
        y = jnp.where(params["scale"] > 1, x, x * params["scale"])
        x = x + keep * jnp.tanh(y @ layer["w"]) * (1 + layer["number"])
        means.append(x.mean(0))
        total = total + jnp.square(x).mean()
    loss = jnp.square(x * params["head"]).sum() + 0.1 * total
    return loss, {"means": jnp.stack(means), "last": x.sum()}


def reference(params: Any, batch: Any, *, num_microbatches: int, keys: Any = None) -> Any:
    """The mean over microbatches of loss_fn, and the sum of its metrics."""
    if keys is None:
        keys = [jax.random.fold_in(KEY, m) for m in range(num_microbatches)]

    def mean(params: Any) -> Any:
        parts = jnp.split(batch, num_microbatches)
        outs = [loss_fn(params, part, key) for part, key in zip(parts, keys, strict=True)]
        metrics = jax.tree.map(lambda *a: sum(a), *(metrics for _, metrics in outs))
        return sum(loss for loss, _ in outs) / num_microbatches, metrics

    return jax.value_and_grad(mean, has_aux=True, allow_int=True)(params)


def make_model(**options: Any) -> dpj.LossModel:
    given: dict[str, Any] = {"layers": "layers/{}", "rng": KEY, "has_aux": True, **options}
    return dpj.from_loss(loss_fn, PARAMS, BATCH[:ROWS], **given)


MODEL = make_model()
MESH = jax.make_mesh((2, 2), ("pipe", "data"), devices=jax.devices()[:4])
ONLY_PIPE: dict[str, Any] = {
    "mesh": jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2]),
    "num_microbatches": MICROBATCHES,
}


def assert_equal(found: Any, wanted: Any) -> None:
    """Float64 to its last digits: sums are in another order."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.shape(a) == np.shape(b)
        if a.dtype == jax.dtypes.float0 or b.dtype == jax.dtypes.float0:
            assert a.dtype == b.dtype
        else:
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_gradients_and_metrics_have_the_users_structure(schedule: str) -> None:
    grad_fn = jax.jit(dpj.value_and_grad(MODEL, **ONLY_PIPE, schedule=schedule))
    wanted = reference(PARAMS, BATCH, num_microbatches=MICROBATCHES)
    assert_equal(grad_fn(PARAMS, BATCH, rng=KEY, loss_scale=8.0), wanted)


def test_evaluate_sequential_and_apply() -> None:
    (wanted, _) = reference(PARAMS, BATCH, num_microbatches=MICROBATCHES)
    assert_equal(dpj.evaluate(MODEL, **ONLY_PIPE)(PARAMS, BATCH, rng=KEY), wanted)
    run = dpj.sequential(MODEL, num_microbatches=MICROBATCHES)
    assert_equal(jax.jit(run)(PARAMS, BATCH, rng=KEY), wanted)
    (x,) = dpj.apply(MODEL, **ONLY_PIPE)(PARAMS, BATCH, rng=KEY)
    np.testing.assert_allclose(x.sum(), wanted[1]["last"], rtol=1e-11)


def test_shards_of_the_batch_have_keys_of_their_own() -> None:
    """As for any model: the key of a microbatch has the index of the shard folded in last."""
    grad_fn = dpj.value_and_grad(MODEL, mesh=MESH, num_microbatches=2, batch_axes="data")
    keys = [
        jax.random.fold_in(jax.random.fold_in(KEY, m), shard)
        for shard in range(2)
        for m in range(2)
    ]
    wanted = reference(PARAMS, BATCH, num_microbatches=4, keys=keys)
    specs = {"head": jax.P("data"), "layers": [{"w": jax.P(None, "data"), "number": None}] * LAYERS}
    sharded = dpj.value_and_grad(
        MODEL,
        mesh=MESH,
        num_microbatches=2,
        batch_axes="data",
        param_specs={"scale": None, **specs},
        grad_specs={"scale": jax.P("data"), **specs},
    )
    assert_equal(jax.jit(grad_fn)(PARAMS, BATCH, rng=KEY), wanted)
    assert_equal(jax.jit(sharded)(PARAMS, BATCH, rng=KEY), wanted)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_named_leaves_are_sharded_over_the_pipeline(axis_type: str) -> None:
    types = (getattr(jax.sharding.AxisType, axis_type),)
    mesh = jax.make_mesh((2,), ("pipe",), types, devices=jax.devices()[:2])
    shardings = dpj.shardings(MODEL, mesh=mesh)
    assert shardings["layers"][1]["w"].spec == jax.P("pipe")
    assert shardings["scale"].spec == shardings["layers"][0]["number"].spec == jax.P()
    params = jax.device_put(PARAMS, shardings)
    grad_fn = jax.jit(dpj.value_and_grad(MODEL, mesh=mesh, num_microbatches=MICROBATCHES))
    wanted = reference(PARAMS, BATCH, num_microbatches=MICROBATCHES)
    assert_equal(grad_fn(params, BATCH, rng=KEY), wanted)


def test_converted_parameters_are_taken_and_returned_as_such() -> None:
    canonical = MODEL.params(PARAMS)
    assert_equal(MODEL.tree(canonical), PARAMS)
    assert canonical["blocks"]["w"].shape == (LAYERS, WIDTH, WIDTH)
    assert set(canonical["shared"]) == {"scale"}
    sharded = jax.device_put(canonical, dpj.shardings(canonical, mesh=ONLY_PIPE["mesh"]))
    value, grads = jax.jit(dpj.value_and_grad(MODEL, **ONLY_PIPE))(sharded, BATCH, rng=KEY)
    assert grads["blocks"]["w"].sharding.spec[0] == "pipe"
    wanted = reference(PARAMS, BATCH, num_microbatches=MICROBATCHES)
    assert_equal((value, MODEL.tree(grads)), wanted)


def test_frozen_parameters_have_zeros_for_gradients() -> None:
    trainable = {"scale": True, "head": False, "layers": [{"w": True, "number": False}] * LAYERS}
    _, wanted = reference(PARAMS, BATCH, num_microbatches=MICROBATCHES)
    wanted = {**wanted, "head": jnp.zeros(WIDTH)}
    for mask in (trainable, lambda params: trainable):
        grad_fn = dpj.value_and_grad(MODEL, **ONLY_PIPE, trainable=mask)
        assert_equal(jax.jit(grad_fn)(PARAMS, BATCH, rng=KEY)[1], wanted)


def test_overwritten_parameters_are_found_by_flaxs_collection() -> None:
    """Their gradients are not summed over microbatches: the largest is taken."""
    name = "_overwrite_with_gradient"

    def loss(params: Any, x: Any) -> Any:
        for i in range(LAYERS):
            x = jnp.tanh(x @ params[f"w{i}"]["w"]) * params[f"w{i}"][name]
        return x.sum()

    params = {f"w{i}": {"w": layer_params(i)["w"], name: jnp.float64(1 + i)} for i in range(LAYERS)}
    model = dpj.from_loss(loss, params, BATCH[:ROWS], layers="w{}")
    _, grads = jax.jit(dpj.value_and_grad(model, **ONLY_PIPE))(params, BATCH)
    parts = [jax.grad(loss)(params, part) for part in jnp.split(BATCH, MICROBATCHES)]
    for layer in params:
        # The cotangent of each microbatch's loss is 1 / MICROBATCHES.
        largest = max(part[layer][name] for part in parts) / MICROBATCHES
        np.testing.assert_allclose(grads[layer][name], largest, rtol=1e-12)


def test_memory_and_choose_take_the_users_tree() -> None:
    shapes = jax.eval_shape(lambda: (PARAMS, BATCH))
    grad_fn = dpj.value_and_grad(MODEL, **ONLY_PIPE)
    assert grad_fn.memory(*shapes, rng=KEY).fullest
    choices = dpj.choose(
        MODEL,
        *shapes,
        **ONLY_PIPE,
        rng=KEY,
        schedules=["1f1b"],
        remat="none",
        optimizer=optax.sgd(0.1),
    )
    parameters = next(term for term in choices[0].terms if term.name == "parameters")
    # Half of the layers, and the rest, of which "scale" and "head" have WIDTH numbers each.
    layers = LAYERS * (8 * WIDTH * WIDTH + 4)
    assert parameters.num_bytes == layers / 2 + 2 * 8 * WIDTH


def test_the_report_names_values_with_their_lines() -> None:
    text = str(MODEL)
    for words in ("4 layers: 0 to 3", "float64[2,4], 64 bytes", "add at test_steps.py:", "scale"):
        assert words in text
    assert "losses of a layer" in text
    assert "metrics of a layer" in text


def test_no_device_holds_all_parameters_or_gradients() -> None:
    """Layers by name: in and out of the compiled step a device has its quarter of the bytes.

    Gradients are in bfloat16, half of the parameters' bytes.
    """
    width = 64
    layers: dict[str, Any] = {"static": None}  # as in a tree of Equinox
    layers |= {f"w{i}": jax.ShapeDtypeStruct((width, width), "float32") for i in range(8)}
    batch = jax.ShapeDtypeStruct((8, width), "float32")

    def loss_fn(params: Any, x: Any) -> Any:
        for i in range(8):
            x = jnp.tanh(x @ params[f"w{i}"])
        return jnp.square(x).sum()

    model = dpj.from_loss(
        loss_fn, layers, jax.ShapeDtypeStruct((1, width), "float32"), layers="w{}"
    )
    mesh = jax.make_mesh((4,), ("pipe",), devices=jax.devices()[:4])
    grad_fn = jax.jit(
        dpj.value_and_grad(model, mesh=mesh, num_microbatches=8, grad_dtype="bfloat16")
    )
    placed = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        layers,
        dpj.shardings(model, mesh=mesh),
    )
    memory: Any = grad_fn.lower(placed, batch).compile().memory_analysis()
    quarter = 8 * width * width * 4 // 4
    assert memory.argument_size_in_bytes <= quarter + 8 * width * 4
    assert quarter // 2 <= memory.output_size_in_bytes <= quarter // 2 + 200
