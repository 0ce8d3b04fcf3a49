"""A transformer's block and head -> FLOPs of their forward, input grad and weight grad.

What is counted are the multiplications and additions of matmuls (`dot_general`) in the jaxprs, two
for each entry of a product; nothing is computed, and no array is made. A lookup has none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params

import dualpipe_jax as dpj


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a pre-norm decoder with an MLP four times as wide, and one sequence a microbatch."""

    layers: int
    width: int
    context: int
    heads: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one microbatch: of a layer's F, I and W, and of the head's forward and gradients."""

    forward: int
    input_grad: int
    weight_grad: int
    head_forward: int
    head_backward: int

    def costs(self, *, num_layers: int, num_ranks: int) -> dpj.Costs:
        """Gives them as costs of a rank's share of the layers, in those of a layer's forward."""
        share = num_layers / num_ranks / self.forward
        return dpj.Costs(
            forward=self.forward * share,
            input_grad=self.input_grad * share,
            weight_grad=self.weight_grad * share,
            head=self._head / self.forward,
        )

    @property
    def _head(self) -> float:
        # `Costs` adds a backward to a head's forward, in the proportion of a layer's.
        backward = (self.input_grad + self.weight_grad) / self.forward
        return (self.head_forward + self.head_backward) / (1 + backward)


def count(sizes: Sizes) -> Flops:
    """Traces a block and a head of these sizes, and counts."""
    x = _aval(1, sizes.context, sizes.width)
    block, params = _block(sizes)
    of_block = _count_parts(block, params, x)
    of_head = _count_parts(
        lambda params, x: x @ params["head"], {"head": _aval(sizes.width, sizes.vocabulary)}, x
    )
    return Flops(
        forward=of_block[0],
        input_grad=of_block[1],
        weight_grad=of_block[2],
        head_forward=of_head[0],
        head_backward=of_head[1] + of_head[2],
    )


def _aval(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _block(sizes: Sizes) -> tuple[Callable[..., jax.Array], dict[str, Any]]:
    width = sizes.width

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def block(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        heads = (*x.shape[:-1], sizes.heads, width // sizes.heads)
        normed = norm(x)
        q, k, v = ((normed @ params[name]).reshape(heads) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ params["o"]
        return x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]

    params = {name: _aval(width, width) for name in "qkvo"}
    return block, {**params, "up": _aval(width, 4 * width), "down": _aval(4 * width, width)}


def _count_parts(function: Callable[..., jax.Array], params: Any, x: Any) -> tuple[int, int, int]:
    """FLOPs of F, I and W: of y, of dx beside it, of dparams beside both."""

    def with_dx(params: Any, x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x: function(params, x), x)
        return y, pull(dy)

    def with_both(params: Any, x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(function, params, x)
        return y, pull(dy)

    dy = jax.eval_shape(function, params, x)
    forward = _matmul_flops(jax.make_jaxpr(function)(params, x).jaxpr)
    and_dx = _matmul_flops(jax.make_jaxpr(with_dx)(params, x, dy).jaxpr)
    and_both = _matmul_flops(jax.make_jaxpr(with_both)(params, x, dy).jaxpr)
    return forward, and_dx - forward, and_both - and_dx


def _matmul_flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            avals: list[Any] = [v.aval for v in (equation.invars[0], equation.outvars[0])]
            left, product = (aval.shape for aval in avals)
            total += 2 * prod(product) * prod(left[d] for d in contracted)
        assert equation.primitive.name not in ("scan", "while", "cond"), "no block here has them"
        total += sum(_matmul_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total
