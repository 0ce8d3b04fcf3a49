"""Flax models as they stand, through `from_loss`: Linen and NNX, remat, scans, stacks, dropout.

Gradients equal `jax.value_and_grad` of the mean over microbatches; float64 throughout.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dualpipe_jax as dpj

WIDTH, VOCABULARY, LENGTH, LAYERS, ROWS, MICROBATCHES = 8, 7, 5, 4, 2, 2
KEY = jax.random.key(3)
TOKENS = jnp.asarray(
    np.random.default_rng(0).integers(0, VOCABULARY, (ROWS * MICROBATCHES, LENGTH))
)
FLOAT = jnp.float64


class LinenBlock(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: Any, carried: Any = None) -> Any:
        dense = functools.partial(nn.Dense, param_dtype=FLOAT)
        h = nn.LayerNorm(param_dtype=FLOAT)(x)
        scores = dense(WIDTH)(h) @ dense(WIDTH)(h).swapaxes(1, 2)
        scores = jnp.where(nn.make_causal_mask(x[..., 0])[:, 0] > 0, scores, -1e9)
        x = x + nn.Dropout(self.rate, deterministic=not self.rate)(nn.softmax(scores) @ h)
        h = nn.gelu(dense(2 * WIDTH)(nn.LayerNorm(param_dtype=FLOAT)(x)))
        x = x + nn.Dropout(self.rate, deterministic=not self.rate)(dense(WIDTH)(h))
        return x, None


class LinenModel(nn.Module):
    form: str = "list"
    rate: float = 0.0

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(VOCABULARY, WIDTH, param_dtype=FLOAT)
        x = embed(tokens)
        block: Any = nn.remat(LinenBlock) if "remat" in self.form else LinenBlock
        if "scan" in self.form:
            axes: Any = {
                "variable_axes": {"params": 0},
                "split_rngs": {"params": True, "dropout": True},
            }
            x, _ = nn.scan(block, length=LAYERS, **axes)(self.rate, name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = block(self.rate, name=f"layers_{i}")(x)
        return embed.attend(nn.LayerNorm(param_dtype=FLOAT)(x))


class NNXBlock(nnx.Module):
    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, param_dtype=FLOAT, rngs=rngs)
        self.mix = nnx.Linear(LENGTH, LENGTH, param_dtype=FLOAT, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, param_dtype=FLOAT, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, param_dtype=FLOAT, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.mix(self.norm(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm(x)))))


class NNXModel(nnx.Module):
    def __init__(self, form: str, rate: float, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, param_dtype=FLOAT, rngs=rngs)
        self.form = form
        if "stack" in form:
            make = nnx.vmap(lambda rngs: NNXBlock(rate, rngs=rngs))
            self.layers = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        else:
            self.layers = nnx.List([NNXBlock(rate, rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        run: Any = (
            (lambda x, layer: layer(x))
            if "remat" not in self.form
            else nnx.remat(lambda x, layer: layer(x))
        )
        if "stack" in self.form:
            x = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            layers: Any = self.layers
            for layer in layers:
                x = run(x, layer)
        return self.embed.attend(x)


@dataclass(frozen=True)
class Case:
    make: Callable[[], tuple[Any, Callable[..., Any]]]
    layers: str


def cross_entropy(logits: Any, tokens: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()


def linen(form: str, rate: float = 0.0) -> tuple[Any, Callable[..., Any]]:
    model = LinenModel(form, rate)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = model.init(keys, TOKENS[:ROWS])

    def loss_fn(params: Any, tokens: Any, rng: Any) -> Any:
        return cross_entropy(model.apply(params, tokens, rngs={"dropout": rng}), tokens)

    return params, loss_fn


def of_nnx(form: str, rate: float = 0.0) -> tuple[Any, Callable[..., Any]]:
    model = NNXModel(form, rate, rngs=nnx.Rngs(params=0, dropout=1))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: Any, tokens: Any, rng: Any) -> Any:
        model = nnx.merge(graphdef, params, jax.tree.map(lambda a: a, rest))
        nnx.reseed(model, policy="match_shape", dropout=rng)
        return cross_entropy(model(tokens), tokens)

    return params, loss_fn


CASES = {
    "linen": Case(lambda: linen("list"), "params/layers_{}"),
    "linen, dropout in remat": Case(lambda: linen("remat", 0.3), "params/layers_{}"),
    "linen, dropout": Case(lambda: linen("list", 0.3), "params/layers_{}"),
    "linen, nn.scan of nn.remat, dropout": Case(
        lambda: linen("scan of remat", 0.3), "params/layers"
    ),
    "nnx": Case(lambda: of_nnx("list"), "layers/{}"),
    "nnx, remat, dropout": Case(lambda: of_nnx("remat", 0.3), "layers/{}"),
    "nnx, stack": Case(lambda: of_nnx("stack"), "layers"),
    "nnx, stack, remat, dropout": Case(lambda: of_nnx("stack remat", 0.3), "layers"),
}


def reference(loss_fn: Callable[..., Any], params: Any) -> Any:
    def mean(params: Any) -> Any:
        losses = [
            loss_fn(params, TOKENS[m * ROWS : (m + 1) * ROWS], jax.random.fold_in(KEY, m))
            for m in range(MICROBATCHES)
        ]
        return sum(losses) / MICROBATCHES

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_flax_models(name: str) -> None:
    params, loss_fn = CASES[name].make()
    model = dpj.from_loss(loss_fn, params, TOKENS[:ROWS], layers=CASES[name].layers, rng=KEY)
    assert len(model.cut.kinds) == 1
    run = dpj.sequential(model, num_microbatches=MICROBATCHES)
    loss, grads = jax.jit(jax.value_and_grad(lambda params: run(params, TOKENS, rng=KEY)))(params)
    wanted_loss, wanted = reference(loss_fn, params)
    assert abs(loss - wanted_loss) < 1e-13
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
