"""Layers that qwix quantises for training, through the split backward.

It does so by a custom_vjp around each matmul, which it puts in place of JAX's own functions while a
layer is traced: here, while the pipeline traces it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import qwix
from flax import linen as nn
from flax import nnx

import dualpipe_jax as dpj
from tests.flax.linen_models import (
    LAYERS,
    VOCABULARY,
    WIDTH,
    Float,
    Layer,
    loss_of,
    mesh_of,
    three_modules,
    tokens_of,
)
from tests.models import assert_close

# Warnings about functions that the package itself calls, in JAX and in Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# By itself it scales the largest value to 127.5 steps of int8, and if that is a negative one,
# rounds it to -127 or -128 by the last bit of the quotient: two programs of one function then
# differ by a step.
METHODS: dict[str, Any] = dict.fromkeys(
    ["weight_calibration_method", "act_calibration_method", "bwd_calibration_method"], "absmax,1.01"
)
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
RULES: dict[str, dict[str, Any]] = {
    "int8 forward": INT8,
    "int8": {**INT8, "bwd_qtype": "int8"},
    "int8, stochastic": {**INT8, "bwd_qtype": "int8", "bwd_stochastic_rounding": "uniform"},
    "float8": {
        "weight_qtype": "float8_e4m3fn",
        "act_qtype": "float8_e4m3fn",
        "bwd_qtype": "float8_e5m2",
    },
}


def provider_of(**rule: Any) -> qwix.QtProvider:
    return qwix.QtProvider([qwix.QtRule(module_path=".*", **METHODS, **rule)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("int8, stochastic", "zb-h1"),
        ("float8", "dualpipe"),
    ],
)
def test_linen_layers(name: str, schedule: str) -> None:
    """Also the head; against the modules' own forward, a microbatch at a time."""
    provider, tokens, key = provider_of(**RULES[name]), tokens_of(8), jax.random.key(1)
    embed = nn.Embed(VOCABULARY, WIDTH, **Float)
    layer = qwix.quantize_model(Layer(), provider)
    head = qwix.quantize_model(nn.Dense(VOCABULARY, **Float), provider)
    stream = "stochastic_rounding"
    model = three_modules(embed=embed, block=layer, head=head, rngs=(stream,))
    params = model.init(jax.random.key(0), tokens, num_layers=LAYERS)

    def own_loss(params: Any) -> jax.Array:
        losses = []
        for m, rows in enumerate(tokens.reshape(4, 2, -1)):

            def rngs(place: int, m: int = m) -> dict[str, jax.Array]:
                own = jax.random.fold_in(jax.random.fold_in(key, m), place)
                return {stream: jax.random.fold_in(own, 0)}

            x = embed.apply({"params": params["ends"]["embed"]}, rows)
            for i in range(LAYERS):
                own = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
                x = layer.apply({"params": own}, x, rngs=rngs(i))
            logits = head.apply({"params": params["ends"]["head"]}, x, rngs=rngs(LAYERS + 1))
            losses.append(loss_of(logits, rows))
        return jnp.stack(losses).mean()

    want = jax.jit(jax.value_and_grad(own_loss))(params)
    grad_fn = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=4, schedule=schedule)
    assert_close(jax.jit(grad_fn)(params, tokens, rng=key), want)
    plain = dpj.sequential(three_modules(embed=embed), num_microbatches=4)(params, tokens)
    assert abs(float(want[0] - plain)) > 1e-4  # it is quantised


def test_linen_scales_that_were_collected_before() -> None:
    """As constants: a call that does not collect them only reads them."""
    layer = qwix.quantize_model(Layer(), provider_of(**INT8, act_static_scale=True))
    bare, tokens = three_modules(block=layer), tokens_of(8)
    with pytest.raises(ValueError, match=r"no parameters, \['quant_stats'\].*with_constants"):
        bare.init(jax.random.key(0), tokens, num_layers=2)
    variables = bare.init_variables(jax.random.key(0), tokens, num_layers=2)
    params = variables.pop("params")
    # As after one batch, with largest activations of 2 in the first layer and 3 in the second.
    for of_dense in variables["quant_stats"]["blocks"].values():
        (stat,) = of_dense.values()
        total = stat["sum_of_absmax"]
        stat["count"] = jnp.ones_like(stat["count"])
        stat["sum_of_absmax"] = jnp.stack([jnp.full_like(total[0], 2), jnp.full_like(total[1], 3)])
    model = bare.with_constants(variables)
    grad_fn = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=4)
    got = jax.jit(grad_fn)(params, tokens)
    want = jax.jit(jax.value_and_grad(dpj.sequential(model, num_microbatches=4)))(params, tokens)
    assert_close(got, want)
    dynamic = three_modules(block=qwix.quantize_model(Layer(), provider_of(**INT8)))
    other = dpj.sequential(dynamic, num_microbatches=4)(params, tokens)
    assert abs(float(got[0] - other)) > 1e-6  # they are read


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs, **Float)
        self.up = nnx.Linear(WIDTH, 6, rngs=rngs, **Float)
        self.down = nnx.Linear(6, WIDTH, rngs=rngs, **Float)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **Float)
        self.layers: Any = nnx.List([NnxLayer(rngs) for _ in range(LAYERS)])


@pytest.mark.slow
def test_nnx_layers() -> None:
    """Quantised where the block calls them, as each would be of a class of its own otherwise."""
    provider, tokens, net = provider_of(**RULES["int8"]), tokens_of(8), NnxModel(nnx.Rngs(0))

    def run(layer: Any, x: jax.Array) -> jax.Array:
        return qwix.quantize_model(layer, provider, x, skip_nnx_init=True)(x)

    model = dpj.nnx.model(
        net,
        blocks="layers",
        embed=lambda net, ctx: net.table(ctx.microbatch),
        block=lambda layer, x, ctx: run(layer, x),
        head=lambda net, x, ctx: net.table.attend(x),
        loss=loss_of,
    )
    assert model.layout is None  # all layers are of one kind

    def own_loss(net: Any, is_quantised: bool = True) -> jax.Array:
        losses = []
        for rows in tokens.reshape(4, 2, -1):
            x = net.table(rows)
            for layer in net.layers:
                x = run(layer, x) if is_quantised else layer(x)
            losses.append(loss_of(net.table.attend(x), rows))
        return jnp.stack(losses).mean()

    grad_fn = dpj.nnx.value_and_grad(model, mesh=mesh_of(), num_microbatches=4)
    want = nnx.jit(nnx.value_and_grad(own_loss))(net)
    assert_close(nnx.jit(grad_fn)(net, tokens), want)
    assert abs(float(want[0] - own_loss(net, is_quantised=False))) > 1e-4


def test_nnx_layers_quantised_before_are_refused() -> None:
    net, x = NnxModel(nnx.Rngs(0)), jnp.ones((2, 3, WIDTH))
    layers = [qwix.quantize_model(layer, provider_of(**INT8), x) for layer in net.layers]
    net.layers = nnx.List(layers)
    with pytest.raises(ValueError, match="all 4 layers differ from one another"):
        dpj.nnx.model(
            net,
            blocks="layers",
            embed=lambda net, ctx: net.table(ctx.microbatch),
            head=lambda net, x, ctx: net.table.attend(x),
            loss=loss_of,
        )
