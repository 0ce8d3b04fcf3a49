"""Losses that have no pipeline: each is refused with its equation, its line, and the cure."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dualpipe_jax as dpj

WIDTH, LAYERS, ROWS = 3, 4, 2
MICROBATCH = jax.ShapeDtypeStruct((ROWS, WIDTH), "float64")
NAMED = {f"w{i}": jnp.ones((WIDTH, WIDTH)) for i in range(LAYERS)}
STACK = {"blocks": jnp.ones((LAYERS, WIDTH, WIDTH))}
MESH = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])


def in_order(order: Any) -> Callable[..., Any]:
    def loss_fn(params: Any, x: Any) -> Any:
        for i in order:
            x = jnp.tanh(x @ params[f"w{i}"])
        return x.sum()

    return loss_fn


def product_of_all(params: Any, x: Any) -> Any:
    product = params["w0"] * params["w1"] * params["w2"] * params["w3"]
    return in_order(range(LAYERS))(params, x) / jnp.square(product).sum()


def another_layers_parameter(params: Any, x: Any) -> Any:
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"w{i}"] + params["w0"][0])
    return x.sum()


def loop_again(params: Any, x: Any) -> Any:
    step = lambda i, x: jnp.tanh(x @ params["blocks"][i % LAYERS])  # noqa: E731
    return lax.fori_loop(0, LAYERS + 2, step, x).sum()


def backwards(params: Any, x: Any) -> Any:
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return lax.scan(step, x, params["blocks"], reverse=True)[0].sum()


def reversed_rows(params: Any, x: Any) -> Any:
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return lax.scan(step, x, params["blocks"][::-1])[0].sum()


def sorted_rows(params: Any, x: Any) -> Any:
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return lax.scan(step, x, jnp.sort(params["blocks"], 0))[0].sum()


def one_custom_vjp(params: Any, x: Any) -> Any:
    @jax.custom_vjp
    def run(params: Any, x: Any) -> Any:
        for i in range(LAYERS):
            x = jnp.tanh(x @ params[f"w{i}"])
        return x

    run.defvjp(lambda params, x: (run(params, x), (params, x)), lambda saved, ct: saved)
    return run(params, x).sum()


def one_shard_map(params: Any, x: Any) -> Any:
    run = jax.shard_map(in_order(range(LAYERS)), mesh=MESH, in_specs=jax.P(), out_specs=jax.P())
    return run(params, x)


def all_different(params: Any, x: Any) -> Any:
    for i, f in enumerate((jnp.tanh, jnp.sin, jnp.cos, jnp.exp)):
        x = f(x @ params[f"w{i}"])
    return x.sum()


def lengths_of_scans(params: Any, x: Any) -> Any:
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"w{i}"])
        x = lax.scan(lambda x, _: (x * 1.1, None), x, None, length=1 + i)[0]
    return x.sum()


def all_hidden_states(params: Any, x: Any) -> Any:
    hidden = []
    for w in params.values():
        x = jnp.tanh(x @ w)
        hidden.append(x)
    return jnp.square(jnp.sort(jnp.stack(hidden), 0)[:2]).sum()


def prints(params: Any, x: Any) -> Any:
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"w{i}"])
        jax.debug.print("{}", x.sum())
    return x.sum()


def collective(params: Any, x: Any) -> Any:
    return lax.psum(in_order(range(LAYERS))(params, x), "data")


def without_layers(params: Any, x: Any) -> Any:
    return jnp.square(x).sum()


Words = tuple[str, ...]
REFUSED: dict[str, tuple[Callable[..., Any], Any, dict[str, Any], Words]] = {
    "wrong path": (
        in_order(range(LAYERS)),
        {f"layers_{i}": {"w": NAMED[f"w{i}"]} for i in range(LAYERS)},
        {"layers": "layer_{}"},
        ("layers='layer_{}'", "'layers_{}' (4 layers, 36 parameters)"),
    ),
    "no numbered parts": (backwards, STACK, {"layers": "layers_{}"}, ("path of the stack",)),
    "gaps": (
        in_order((0, 1, 3)),
        {name: NAMED[name] for name in ("w0", "w1", "w3")},
        {},
        ("layers='w{}'", "missing: [2]"),
    ),
    "other leading dims": (
        backwards,
        {"blocks": {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 3))}},
        {"layers": "blocks"},
        ("blocks/b of shape (3, 3)",),
    ),
    "two patterns for one": (
        in_order(range(LAYERS)),
        NAMED,
        {"layers": ["w{}", "w{}"]},
        ("another pattern",),
    ),
    "unknown shared": (
        in_order(range(LAYERS)),
        NAMED,
        {"shared": "w9"},
        ("shared: must be paths", "'w9'"),
    ),
    "reversed": (
        in_order(reversed(range(LAYERS))),
        NAMED,
        {},
        ("layer 3 (or the head)", "dot_general at test_refusals.py", "order"),
    ),
    "run twice": (in_order((0, 1, 2, 3, 0)), NAMED, {}, ("parameters of layer 0", "each once")),
    "another layer's parameter": (
        another_layers_parameter,
        NAMED,
        {},
        ("reads parameters of layer 0", "test_refusals.py", "shared="),
    ),
    "no sum": (product_of_all, NAMED, {}, ("is no sum over layers", "compute it outside")),
    "a loop that runs layers again": (
        loop_again,
        STACK,
        {"layers": "blocks"},
        ("reads the layers' stack of 4 in 6 steps", "test_refusals.py"),
    ),
    "a scan backwards": (
        backwards,
        STACK,
        {"layers": "blocks"},
        ("layers must run in the order of their numbers", "test_refusals.py"),
    ),
    "a scan over rows from the last to the first": (
        reversed_rows,
        STACK,
        {"layers": "blocks"},
        ("layers must run in the order of their numbers", "test_refusals.py"),
    ),
    "rows mixed by a sort": (
        sorted_rows,
        STACK,
        {"layers": "blocks"},
        ("mixes the parameters of several layers", "test_refusals.py"),
    ),
    "custom_vjp": (one_custom_vjp, NAMED, {}, ("custom_vjp_call", "each layer by itself")),
    "shard_map": (one_shard_map, NAMED, {}, ("shard_map", "take it off")),
    "kinds": (
        all_different,
        NAMED,
        {},
        ("4 kinds", "layers 0 and 1", "tanh at test_refusals.py", "sin at", "max_kinds=4"),
    ),
    "lengths of scans": (
        lengths_of_scans,
        NAMED,
        {},
        ("scan at test_refusals.py", "they differ in length"),
    ),
    "hidden states": (
        all_hidden_states,
        {f"w{i}": jnp.ones((WIDTH, WIDTH)) for i in range(8)},
        {"max_kinds": 8},
        ("bytes cross between layers", "tanh at test_refusals.py", "max_x=4"),
    ),
    "prints": (prints, NAMED, {}, ("has an effect", "debug", "test_refusals.py")),
    "collective": (collective, NAMED, {}, ("names a mesh axis", "manual_axes")),
    "no layers": (without_layers, NAMED, {}, ("does not depend on the parameters of any layer",)),
    "no scalar": (lambda params, x: x @ params["w0"], NAMED, {}, ("floating-point scalar",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_without_a_pipeline_is_refused(name: str) -> None:
    loss_fn, params, options, words = REFUSED[name]
    given: dict[str, Any] = {"layers": "w{}", **options}
    with pytest.raises((ValueError, TypeError)) as error:
        dpj.from_loss(loss_fn, params, MICROBATCH, **given)
    for word in words:
        assert word in str(error.value)


def test_a_wide_x_can_be_allowed() -> None:
    params = {f"w{i}": jnp.eye(WIDTH) * (1 + i) / 4 for i in range(8)}
    batch = jnp.linspace(-1, 1, 2 * ROWS * WIDTH).reshape(2 * ROWS, WIDTH)
    options: dict[str, Any] = {"layers": "w{}", "max_kinds": 8, "max_x": 4}
    model = dpj.from_loss(all_hidden_states, params, MICROBATCH, **options)
    run = dpj.sequential(model, num_microbatches=2)
    found = jax.jit(jax.value_and_grad(run))(params, batch)
    plain = lambda params: sum(all_hidden_states(params, x) for x in jnp.split(batch, 2)) / 2  # noqa: E731
    wanted = jax.value_and_grad(plain)(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


MODEL = dpj.from_loss(in_order(range(LAYERS)), NAMED, MICROBATCH, layers="w{}")


def with_key(params: Any, x: Any, rng: Any) -> Any:
    return in_order(range(LAYERS))(params, x) * jax.random.uniform(rng)


def test_calls_are_refused_by_the_names_of_their_arguments() -> None:
    make = dpj.value_and_grad
    options: dict[str, Any] = {"mesh": MESH, "num_microbatches": 2}
    batch = jnp.ones((4, WIDTH))
    with pytest.raises(ValueError, match="must have the structure of the parameters"):
        make(MODEL, **options)({"w": 1.0}, batch)
    with pytest.raises(ValueError, match=r"w1 is float64\[2\]"):
        make(MODEL, **options)({**NAMED, "w1": jnp.ones(2)}, batch)
    with pytest.raises(ValueError, match="manual_axes"):
        make(MODEL, **options, manual_axes="data")
    with pytest.raises(ValueError, match="param_specs: must have the structure"):
        make(MODEL, **options, param_specs={"blocks": jax.P()})
    with pytest.raises(ValueError, match="trainable: layers of one kind"):
        make(MODEL, **options, trainable={**dict.fromkeys(NAMED, True), "w1": False})(NAMED, batch)
    keyed = dpj.from_loss(with_key, NAMED, MICROBATCH, layers="w{}", rng=jax.random.key(0))
    with pytest.raises(ValueError, match="rng=None: loss_fn takes a key"):
        make(keyed, **options)(NAMED, batch)
    with pytest.raises(ValueError, match="canonical: must be"):
        MODEL.tree(NAMED)


def test_a_pipeline_that_changes_with_the_rows_is_refused() -> None:
    def loss_fn(params: Any, x: Any) -> Any:
        for i in range(LAYERS):
            f = jnp.sin if x.shape[0] == 1 and i > 1 else jnp.tanh
            x = f(x @ params[f"w{i}"])
        return x.sum()

    model = dpj.from_loss(loss_fn, NAMED, MICROBATCH, layers="w{}")
    with pytest.raises(ValueError, match="another pipeline"):
        dpj.sequential(model, num_microbatches=4)(NAMED, jnp.ones((4, WIDTH)))
