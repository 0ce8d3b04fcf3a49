"""`dpj.apply`: the model's outputs, row by row, equal those of a plain loop."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import dualpipe_jax as dpj
from dualpipe_jax._model.kinds import blocks_of
from tests.cheap_keys import make_key
from tests.models import assert_close, make_batch, make_mesh, make_model, make_params

# block_has_aux, weight and has_aux are of no use to it, and must do no harm.
FEATURES = frozenset(["dropout", "pytree", "block_has_aux", "weight", "has_aux"])
ROWS = 2


def plain_loop(
    model: dpj.Model, params: Any, batch: Any, num_microbatches: int, rng: Any, output: Any
) -> Any:
    """Runs the model microbatch by microbatch, and puts the rows together."""
    num_layers = len(params["blocks"]["up"])
    outputs = []
    for m in range(num_microbatches):
        rows = slice(ROWS * m, ROWS * (m + 1))
        microbatch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)

        def ctx(position: int, layer: Any = None, m: int = m, microbatch: Any = microbatch) -> Any:
            key = None
            if rng is not None:
                key = jax.random.fold_in(jax.random.fold_in(rng, m), position)
            return dpj.Context(microbatch=microbatch, layer=layer, rng=key)

        x = model.embed(params["ends"], ctx(num_layers))
        for layer in range(num_layers):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            out = blocks_of(model)[None](block, x, ctx(layer, jnp.int32(layer)))
            x = out[0] if model.block_has_aux else out
        outputs.append(x if output is None else output(params["ends"], x, ctx(num_layers + 1)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def logits(ends: Any, x: Any, ctx: dpj.Context) -> Any:
    """Gives leaves of different ranks and dtypes, some of them made from the context."""
    scores = x["hidden"] @ ends["table"].T
    if ctx.rng is not None:
        scores *= jax.random.bernoulli(ctx.rng, 0.9, scores.shape)
    assert ctx.layer is None
    return {"logits": scores, "hits": scores.argmax(-1) == ctx.microbatch["tokens"]}


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches"), [(1, 2), (2, 1), (2, 4), (3, 7), (3, 9), (4, 8), (8, 3)]
)
def test_equals_a_plain_loop(num_ranks: int, num_microbatches: int) -> None:
    """Outputs go to ranks on both ways round the ring, and to none for which there are too few."""
    model, output = make_model(FEATURES), None if num_microbatches == 9 else logits
    num_layers = num_ranks + 1
    params, batch = make_params(num_layers), make_batch(num_microbatches)
    rng = make_key(5)
    apply = dpj.apply(
        model, mesh=make_mesh(num_ranks), num_microbatches=num_microbatches, output=output
    )
    got = jax.jit(apply)(params, batch, rng=rng)
    want = jax.jit(plain_loop, static_argnums=(0, 3, 5))(
        model, params, batch, num_microbatches, rng, output
    )
    assert_close(got, want)
    if num_ranks > 1:
        lead = None if num_microbatches % num_ranks else "pipe"
        assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(got)} == {lead}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_axes(kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("pipe", "data"), (kind,) * 2, devices=jax.devices()[:4])
    model = make_model(frozenset(["pytree"]))
    params, batch = make_params(4), make_batch(8)
    apply = dpj.apply(model, mesh=mesh, num_microbatches=4, batch_axes="data", output=logits)
    got = jax.jit(apply)(params, batch)
    assert_close(got, plain_loop(model, params, batch, 8, None, logits))
    assert got["logits"].sharding.spec[0] == ("data", "pipe")
    if kind is AxisType.Explicit:
        chex.assert_trees_all_equal(apply(params, batch), got)


def test_no_device_holds_more_than_its_part_of_the_outputs() -> None:
    """Nor anything for a backward: by the compiler's own account."""
    num_ranks, num_microbatches, width = 4, 32, 512

    def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
        return ctx.microbatch @ ends

    model = dpj.Model(
        embed=embed, block=lambda p, x, ctx: x * jnp.tanh(x @ p), head=lambda ends, x, ctx: x.sum()
    )
    apply = dpj.apply(
        model,
        mesh=make_mesh(num_ranks),
        num_microbatches=num_microbatches,
        output=lambda ends, x, ctx: jnp.tile(x, width),
    )
    params = {"ends": jnp.ones((2, 4)), "blocks": jnp.ones((4, 4, 4))}
    batch = jnp.ones((ROWS * num_microbatches, 2))
    program = jax.jit(apply).lower(params, batch).compile()
    per_microbatch = ROWS * 4 * width * 8
    memory: Any = program.memory_analysis()
    share = num_microbatches // num_ranks * per_microbatch
    assert memory.output_size_in_bytes == share
    # Parcels of two directions, the one that is being made, and copies of them: 8 at the most.
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert share + 2 * per_microbatch <= held <= 2 * share + 8 * per_microbatch
    text = str(program.as_text())
    assert "all-gather" not in text
    assert "all-reduce" not in text


def test_manual_axes() -> None:
    """Shards columns of the weights; the block's sum is the same on all devices: it may leave."""

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return x + lax.psum(jnp.tanh(x @ params["up"]) @ params["down"], "model")

    def plain(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return x + jnp.tanh(x @ params["up"]) @ params["down"]

    def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
        return ctx.microbatch @ ends

    rng = np.random.default_rng(0)
    shapes = {"up": (2, 3, 4), "down": (2, 4, 3)}
    blocks = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    params, batch = {"ends": jnp.eye(3), "blocks": blocks}, jnp.asarray(rng.normal(size=(4, 3)))
    options = {
        "mesh": make_mesh(2, model=2),
        "num_microbatches": 2,
        "manual_axes": "model",
        "param_specs": {
            "ends": jax.P(),
            "blocks": {"up": jax.P(None, None, "model"), "down": jax.P(None, "model")},
        },
    }
    model = dpj.Model(embed=embed, block=block, head=lambda ends, x, ctx: x.sum())
    want = plain_loop(
        dpj.Model(embed=embed, block=plain, head=model.head), params, batch, 2, None, None
    )
    assert_close(jax.jit(dpj.apply(model, **options))(params, batch), want)

    apply = dpj.apply(
        model, **options, output=lambda ends, x, ctx: x * (1 + lax.axis_index("model"))
    )
    with pytest.raises(ValueError, match=r"output varies over 'model'"):
        jax.eval_shape(apply, params, batch)


def test_blocks_aux_is_left_out() -> None:
    model, params, batch = make_model(), make_params(2), make_batch(2)
    plain = blocks_of(model)[None]

    def block(params: Any, x: Any, ctx: dpj.Context) -> Any:
        y = plain(params, x, ctx)
        return y, dpj.Aux(loss=y.sum(), metrics=y)

    more = dpj.Model(embed=model.embed, block=block, head=model.head)
    options = {"mesh": make_mesh(2), "num_microbatches": 2}
    got = jax.jit(dpj.apply(more, **options))(params, batch)
    chex.assert_trees_all_equal(got, jax.jit(dpj.apply(model, **options))(params, batch))


BAD: dict[str, Any] = {
    "not a function": ("logits", TypeError, ["output='logits'", "(ends, x, ctx)", "None"]),
    "nothing": (lambda e, x, c: {}, ValueError, ["output", "at least one array"]),
    "no arrays": (
        lambda e, x, c: {"a": "text", "x": x},
        TypeError,
        ["output", "its result['a'] is str 'text'"],
    ),
    "other parameters": (
        lambda ends, x: x,
        TypeError,
        ["output: must be a function (ends, x, ctx) -> outputs, but it takes (ends, x)"],
    ),
    "no rows": (
        lambda e, x, c: {"sum": x.sum(), "last": x[:1], "first": x.swapaxes(0, 2), "x": x},
        ValueError,
        [
            "output",
            "2 rows",
            "its result['sum'] is float64[]",
            "its result['last'] is float64[1,3,4]",
            "its result['first'] is float64[4,3,2]",
        ],
    ),
}


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refusals(bad: str) -> None:
    output, error, words = BAD[bad]

    def run() -> None:
        apply = dpj.apply(make_model(), mesh=make_mesh(2), num_microbatches=2, output=output)
        jax.eval_shape(apply, make_params(2), make_batch(2))

    with pytest.raises(error) as caught:
        run()
    for word in words:
        assert word in str(caught.value)
    assert "its result['x']" not in str(caught.value)


def test_x_without_rows_is_refused() -> None:
    model = dpj.Model(
        embed=lambda ends, ctx: ctx.microbatch["side"].T,
        block=lambda params, x, ctx: x,
        head=lambda ends, x, ctx: x.sum(),
    )
    apply = dpj.apply(model, mesh=make_mesh(2), num_microbatches=1)
    batch = {"side": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=r"4 rows of the microbatch.*output=None"):
        jax.eval_shape(apply, make_params(2), batch)
