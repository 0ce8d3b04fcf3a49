"""Linen modules with float8 matmuls: their scales and histories, which gradients overwrite."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT, Fp8DirectDotGeneralOp, Fp8Einsum
from flax.training.train_state import TrainState

import dualpipe_jax as dpj
from tests.flax.linen_models import (
    LAYERS,
    VOCABULARY,
    WIDTH,
    Float,
    Normalised,
    loss_of,
    mesh_of,
    three_modules,
    tokens_of,
)
from tests.models import assert_close

OP: Any = functools.partial(Fp8DirectDotGeneralOp, amax_history_length=3)
Float8: Any = {**Float, "dot_general_cls": OP}


class Layer(nn.Module):
    """A residual layer of two matmuls, the second an einsum."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.gelu(nn.Dense(6, **Float8)(nn.LayerNorm(**Float)(x)))
        kernel = self.param("down", nn.initializers.normal(0.5), (6, WIDTH), jnp.float64)
        return x + Fp8Einsum(amax_history_length=3)(
            "blh,hw->blw", h, kernel, preferred_element_type=h.dtype
        )


class Model(nn.Module):
    """A model as one writes it in Flax: layers by name, and a head in float8, too."""

    def setup(self) -> None:
        self.embedding = nn.Embed(VOCABULARY, WIDTH, **Float)
        self.layers = [Layer() for _ in range(LAYERS)]
        self.out = nn.Dense(VOCABULARY, **Float8)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding(tokens)

    def head(self, x: jax.Array) -> jax.Array:
        return self.out(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.slow
def test_a_train_state_steps_as_that_of_the_model_itself() -> None:
    """Three steps, of unlike batches: parameters, scales, histories, and the optimizer's state."""
    gpt, tx = Model(), optax.adamw(1e-2)
    batches = [(tokens_of(8) + i) % VOCABULARY for i in range(3)]
    variables = gpt.init(jax.random.key(0), batches[0])
    plain = TrainState.create(apply_fn=gpt.apply, params=variables, tx=tx)

    @jax.jit
    def plain_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(lambda v: loss_of(state.apply_fn(v, tokens), tokens))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    model = dpj.linen.model(embed=gpt.embed, block=Layer(), head=gpt.head, loss=loss_of)
    grad_fn = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=4)

    @jax.jit
    def step(state: Any, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, grads = grad_fn(model.to_params(state.params), tokens)
        return state.apply_gradients(grads=model.to_variables(grads)), loss

    state: Any = dpj.linen.to_canonical(plain, "layers_{}")
    for tokens in batches:
        plain, want = plain_step(plain, tokens)
        state, loss = step(state, tokens)
        assert_close(loss, want)
    assert state.params[OVERWRITE_WITH_GRADIENT]["ends"]["out"]
    back = dpj.linen.to_flax(state, "layers_{}")
    # Adam divides by the root of a value that may be tiny; both have nearly the same gradients.
    assert_close((back.params, back.opt_state), (plain.params, plain.opt_state), tolerance=1e-10)
    scales = state.params[OVERWRITE_WITH_GRADIENT]["blocks"]["Dense_0"]["Fp8DirectDotGeneralOp_0"]
    assert len(np.unique(scales["output_grad_scale"])) == LAYERS


def test_init_has_them_among_the_parameters_of_each_kind() -> None:
    """Layers of two kinds, one of which has no scales, and the head."""
    layout = ("float8", "plain", "plain", "float8")
    blocks = {"float8": nn.Dense(WIDTH, **Float8), "plain": nn.Dense(WIDTH, **Float)}
    head = nn.Dense(VOCABULARY, **Float8)
    model, tokens = three_modules(block=blocks, head=head, layout=layout), tokens_of(8)
    params = model.init(jax.random.key(0), tokens)
    assert set(params["blocks"]["plain"]) == {"kernel", "bias"}
    assert set(params["ends"]) == {"embed", "head", OVERWRITE_WITH_GRADIENT}
    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    last: Any = blocks["float8"].init(keys[3], jnp.ones((1, WIDTH)))
    stack = {**last["params"], OVERWRITE_WITH_GRADIENT: last[OVERWRITE_WITH_GRADIENT]}
    got = jax.tree.map(lambda leaf: leaf[1], params["blocks"]["float8"])
    assert_close(got, stack, tolerance=0)

    variables = model.to_variables(params)
    assert set(variables) == {"params", OVERWRITE_WITH_GRADIENT}
    assert OVERWRITE_WITH_GRADIENT not in str(jax.tree.structure(variables["params"]))
    assert_close(model.to_params(variables), params, tolerance=0)
    grad_fn = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=4)
    want = jax.jit(jax.value_and_grad(dpj.sequential(model, num_microbatches=4)))(params, tokens)
    assert_close(jax.jit(grad_fn)(params, tokens), want)


def test_without_any_the_forms_differ_by_a_key() -> None:
    model = three_modules()
    params = model.init(jax.random.key(0), tokens_of(2), num_layers=2)
    params["shared"] = jnp.ones(2)  # for a block that is a pair with a function of ctx
    variables = model.to_variables(params)
    assert set(variables) == {"params"}
    assert_close(variables["params"], params, tolerance=0)
    assert_close(model.to_params(variables), params, tolerance=0)


# --- mistakes --------------------------------------------------------------------------------


class Float8AndStatistics(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(WIDTH, **Float8)(Normalised()(x))


def test_kinds_are_those_of_the_model() -> None:
    """Scales elsewhere would be lost, or be given to the optimizer."""
    kinds = {"a": nn.Dense(WIDTH, **Float8), "b": nn.Dense(WIDTH)}
    model = three_modules(block=kinds, layout=("a", "b"))
    params = model.init(jax.random.key(0), tokens_of(2))
    variables = model.to_variables(params)
    assert jax.tree.structure(model.to_params(freeze(variables))) == jax.tree.structure(params)
    found = variables[OVERWRITE_WITH_GRADIENT]
    assert set(found["blocks"]) == {"a", "b"}
    moved = {**found, "blocks": {"c": found["blocks"]["a"]}}
    with pytest.raises(ValueError, match=r"(?s)variables: .*each kind.*\['a', 'b'\].*has \['c'\]"):
        model.to_params({**variables, OVERWRITE_WITH_GRADIENT: moved})
    fewer = {**found, "blocks": {"a": found["blocks"]["a"]}}
    assert_close(
        model.to_params({**variables, OVERWRITE_WITH_GRADIENT: fewer}), params, tolerance=0
    )
    with pytest.raises(ValueError, match=r"(?s)params: .*each kind.*'params' has \['a'\]"):
        model.to_variables({**params, "blocks": {"a": params["blocks"]["a"]}})
    one = three_modules(block=nn.Dense(WIDTH, **Float8))
    with pytest.raises(
        ValueError, match=r"(?s)params: '_overwrite_with_gradient' must be a key of"
    ):
        one.to_variables(params)


def test_a_train_state_is_told_from_its_params() -> None:
    model = three_modules(block=nn.Dense(WIDTH, **Float8))
    params = model.init(jax.random.key(0), tokens_of(2), num_layers=2)
    state = TrainState.create(apply_fn=None, params=model.to_variables(params), tx=optax.adam(1e-2))
    with pytest.raises(ValueError, match=r"(?s)params: must be .*'params' is int 3"):
        model.to_variables(3)
    with pytest.raises(ValueError, match="from a TrainState give its params"):
        model.to_params(state)


def test_other_collections_that_a_call_writes_are_refused_as_ever() -> None:
    model, tokens = three_modules(block=Float8AndStatistics()), tokens_of(4)
    with pytest.raises(ValueError, match=r"no parameters, \['batch_stats'\].*LayerNorm"):
        model.init(jax.random.key(0), tokens, num_layers=2)
    variables = model.init_variables(jax.random.key(0), tokens, num_layers=2)
    params = variables.pop("params")
    assert OVERWRITE_WITH_GRADIENT in params["blocks"]
    with pytest.raises(ValueError, match=r"writes to a collection.*batch_stats"):
        dpj.sequential(model.with_constants(variables), num_microbatches=2)(params, tokens)


def test_where_they_belong_is_told() -> None:
    model, tokens = three_modules(block=nn.Dense(WIDTH, **Float8)), tokens_of(4)
    params = model.init(jax.random.key(0), tokens, num_layers=2)
    variables = model.to_variables(params)
    with pytest.raises(ValueError, match=r"block: Dense reads variables.*model.to_params make"):
        dpj.sequential(model, num_microbatches=2)(variables["params"], tokens)
    with pytest.raises(ValueError, match=r"constants: must not hold '_overwrite.*to_params"):
        model.with_constants({OVERWRITE_WITH_GRADIENT: variables[OVERWRITE_WITH_GRADIENT]})
    with pytest.raises(ValueError, match=r"variables: must be .*got \['blocks', 'ends'\]"):
        model.to_params(params)
    with pytest.raises(ValueError, match=r"got \['fixed', 'params'\]; give constants to"):
        model.to_params({"params": variables["params"], "fixed": {}})
    with pytest.raises(
        ValueError, match=r"(?s)variables: .*'_overwrite_with_gradient' is \['out'\]"
    ):
        model.to_params({"params": variables["params"], OVERWRITE_WITH_GRADIENT: {"out": {}}})
    with pytest.raises(ValueError, match=r"(?s)params: must be .*'params' is \['_overwrite"):
        model.to_variables(variables)


@pytest.mark.slow
def test_from_loss_takes_the_layers_variables_that_gradients_overwrite() -> None:
    """Loss and gradients are those of the model by its parts, variables by the layer's path."""
    gpt, tokens = Model(), tokens_of(8)
    variables = gpt.init(jax.random.key(0), tokens)

    def loss_fn(variables: Any, tokens: jax.Array) -> jax.Array:
        return loss_of(gpt.apply(variables, tokens), tokens)

    found = dpj.from_loss(loss_fn, variables, tokens[:2], layers="params/layers_{}")
    loss, grads = jax.jit(dpj.value_and_grad(found, mesh=mesh_of(), num_microbatches=4))(
        variables, tokens
    )
    model = dpj.linen.model(embed=gpt.embed, block=Layer(), head=gpt.head, loss=loss_of)
    canonical = model.to_params(dpj.linen.to_canonical(variables, "layers_{}"))
    grad_fn = jax.jit(dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=4))
    want_loss, want = grad_fn(canonical, tokens)
    assert_close(loss, want_loss)
    assert_close(grads, dpj.linen.to_flax(model.to_variables(want), "layers_{}"))
