"""Ends that are sharded over the pipeline axis: gathered once, scattered once."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.hlo import loop_lines
from tests.models import assert_close, make_mesh, sequential_value_and_grad

VOCABULARY, WIDTH, ROWS, LENGTH, LAYERS = 8, 4, 2, 3, 4
SPECS = {
    "ends": {"table": P("pipe"), "out": P(None, "pipe"), "gain": P()},
    "blocks": P(),
    "shared": P("pipe"),
}


def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return ends["table"][ctx.microbatch] * ends["gain"]


def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return x + jnp.tanh(x @ params + ctx.shared)


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    # A tied table and one of its own.
    logits = x @ ends["table"].T + x @ ends["out"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ctx.microbatch[..., None], -1).mean()


MODEL = dpj.Model(embed=embed, block=block, head=head)


def make_params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCABULARY, WIDTH), "out": (WIDTH, VOCABULARY), "gain": (WIDTH,)}
    return {
        "ends": {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()},
        "blocks": jnp.asarray(rng.normal(size=(LAYERS, WIDTH, WIDTH))),
        "shared": jnp.asarray(rng.normal(size=WIDTH)),
    }


def make_batch(num_microbatches: int) -> jax.Array:
    shape = ROWS * num_microbatches, LENGTH
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, size=shape))


def placed(params: Any, mesh: jax.sharding.Mesh, specs: Any = SPECS) -> Any:
    return jax.tree.map(
        lambda spec, branch: jax.device_put(branch, jax.NamedSharding(mesh, spec)),
        specs,
        params,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )


def over_pipe(tree: Any) -> dict[str, Any]:
    leaves = {**tree["ends"], "shared": tree["shared"]}
    return {name: tuple(leaf.sharding.spec) for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("kind", "says"),
    [(AxisType.Auto, "specs"), (AxisType.Explicit, "specs"), (AxisType.Explicit, "types")],
)
def test_gradients_lie_as_their_parameters(kind: AxisType, says: str) -> None:
    """On Auto axes only param_specs can say so, on Explicit ones types do; both to one effect."""
    mesh = jax.make_mesh((4,), ("pipe",), (kind,), devices=jax.devices()[:4])
    params, batch = make_params(), make_batch(4)
    want = sequential_value_and_grad(MODEL, 4)(params, batch)
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=4,
        schedule="1f1b" if says == "types" else "dualpipe",
        param_specs=SPECS if says == "specs" else None,
    )
    sharded = placed(params, mesh)
    program = jax.jit(grad_fn).lower(sharded, batch).compile()
    got = program(sharded, batch)
    assert_close(got, want)
    specs = over_pipe(got[1])
    assert specs["table"][0] == specs["out"][1] == specs["shared"][0] == "pipe"
    assert "pipe" not in specs["gain"]
    # Each is gathered once, before the loops, and its gradient scattered once, after them.
    text = str(program.as_text())
    assert len(re.findall(r" all-gather\(", text)) == 3
    assert len(re.findall(r" reduce-scatter\(", text)) == 3
    assert not [line for line in loop_lines(text) if " all-gather(" in line]
    assert not [line for line in loop_lines(text) if " reduce-scatter(" in line]
    if says == "specs":
        # Nothing is asked of where they come from.
        assert_close(jax.jit(grad_fn)(params, batch), want)


def test_forwards_alone() -> None:
    params, batch, mesh = make_params(), make_batch(2), make_mesh(2)
    options: dict[str, Any] = {"mesh": mesh, "num_microbatches": 2, "param_specs": SPECS}
    got = jax.jit(dpj.evaluate(MODEL, **options))(placed(params, mesh), batch)
    assert_close(got, dpj.sequential(MODEL, num_microbatches=2)(params, batch))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_within_the_parts_of_a_manual_axis(kind: AxisType) -> None:
    """A vocabulary over two axes: a device is given its part of the manual one, whole."""
    mesh = jax.make_mesh((2, 2, 2), ("pipe", "model", "data"), (kind,) * 3)

    def parallel_head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        assert ends["out"].shape == (WIDTH, VOCABULARY // 2)
        assert ends["table"].shape == (VOCABULARY, WIDTH)
        logits = lax.pcast(x, "model", to="varying") @ ends["out"]
        start = lax.axis_index("model") * (VOCABULARY // 2)
        scores = jnp.exp(logits)
        total = lax.psum(scores.sum(-1), "model")
        mine = jax.nn.one_hot(ctx.microbatch - start, VOCABULARY // 2)
        return (jnp.log(total) - lax.psum((logits * mine).sum(-1), "model")).mean()

    def plain_head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        logits = jax.nn.log_softmax(x @ ends["out"])
        return -jnp.take_along_axis(logits, ctx.microbatch[..., None], -1).mean()

    params, batch = make_params(), make_batch(4)
    specs = {**SPECS, "ends": {**SPECS["ends"], "out": P(None, ("model", "pipe"))}}
    grad_fn = dpj.value_and_grad(
        dpj.Model(embed=embed, block=block, head=parallel_head),
        mesh=mesh,
        num_microbatches=2,
        batch_axes="data",
        manual_axes="model",
        param_specs=specs,
    )
    plain = dpj.Model(embed=embed, block=block, head=plain_head)
    want = sequential_value_and_grad(plain, 4)(params, batch)
    params = placed(params, mesh, specs)
    got = jax.jit(grad_fn)(params, batch)
    assert_close(got, want)
    assert got[1]["ends"]["out"].sharding.spec == P(None, ("model", "pipe"))


def test_bytes_on_a_device() -> None:
    """By the compiler's account arguments and results are a rank's part; by ours the rest shows."""
    num_ranks, mesh = 8, make_mesh(8)
    model = dpj.Model(
        embed=lambda ends, ctx: ends["table"][ctx.microbatch],
        block=lambda params, x, ctx: x + jnp.tanh(x @ params),
        head=lambda ends, x, ctx: jax.nn.logsumexp(x @ ends["table"].T, -1).mean(),
    )
    vocabulary, width = 1024, 8
    table = vocabulary * width * 4
    params = {
        "ends": {"table": jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)},
        "blocks": jax.ShapeDtypeStruct((num_ranks, width, width), jnp.float32),
    }
    batch = jax.ShapeDtypeStruct((8, 2), jnp.int32)
    sizes, terms = {}, {}
    for name, spec in {"replicated": P(), "sharded": P("pipe")}.items():
        grad_fn = dpj.value_and_grad(
            model, mesh=mesh, num_microbatches=8, param_specs={"ends": spec, "blocks": P("pipe")}
        )
        lies = {"ends": {"table": spec}, "blocks": P("pipe")}
        given = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec)
            ),
            params,
            lies,
        )
        memory: Any = jax.jit(grad_fn).lower(given, batch).compile().memory_analysis()
        sizes[name] = memory.argument_size_in_bytes, memory.output_size_in_bytes
        terms[name] = {term.name: term.num_bytes for term in grad_fn.memory(given, batch).terms}
    saved = np.subtract(sizes["replicated"], sizes["sharded"])
    assert saved.tolist() == [table * 7 // 8] * 2
    gathered = "parameters gathered from other devices"
    assert gathered not in terms["replicated"]
    assert terms["sharded"].pop(gathered) == table
    assert terms["sharded"] == terms["replicated"]


BAD = {
    "does not divide": (
        {"table": P("pipe"), "out": P("pipe"), "gain": P("pipe")},
        ["params['ends']['gain'] of shape (3,)", "dim 0 is not divisible by 2 devices"],
    ),
    "twice": ({"table": P("pipe", "pipe"), "out": P(), "gain": P()}, ["'pipe' stands twice"]),
    "not last": (
        {"table": P(("pipe", "model")), "out": P(), "gain": P()},
        ["params['ends']['table']", "'pipe' must come last in its entry"],
    ),
}


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refusals(bad: str) -> None:
    specs, words = BAD[bad]
    params = make_params()
    params["ends"]["gain"] = jnp.ones(3)
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=make_mesh(2, model=2),
        num_microbatches=2,
        manual_axes="model",
        param_specs={"ends": specs, "blocks": P(), "shared": P()},
    )
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(grad_fn, params, make_batch(2))
    for word in ["param_specs", "outside of blocks axis='pipe'", *words]:
        assert word in str(caught.value)


def test_a_dim_of_a_block_may_not_lie_over_it() -> None:
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=make_mesh(2),
        num_microbatches=2,
        param_specs={**SPECS, "blocks": P(None, "pipe")},
    )
    with pytest.raises(ValueError, match=r"\['blocks'\].*'pipe' is none of them"):
        jax.eval_shape(grad_fn, make_params(), make_batch(2))
