"""A model's functions as one device runs them: traced once, with their derivatives.

In: a model, and what its functions are given, as avals. Out: `Functions`, which take this device's
part of everything, and may be called in any loop of the step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax

from dualpipe_jax import _microbatches, _validate, _varying
from dualpipe_jax._executor.leaves import pick, place
from dualpipe_jax._split_vjp import SplitVjp, capture, split_vjp
from dualpipe_jax._types import Context, Model

PyTree = Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Arguments:
    """Avals of what the model's functions are given on one device.

    Attributes:
      outside: `{"ends": ...}`, and `"shared"` where there is one: parameters outside the stack.
      layer: The parameters of one layer.
      microbatch: One microbatch.
      rng: The step's key, or None.
      shard: The index of the shard of the batch, or None.
      wanted: For every leaf of `"ends"`, `"shared"` and `"layer"` whether it gets a gradient.
      loss_axes: The manual axes over which microbatches, and so losses, differ.
    """

    outside: dict[str, PyTree]
    layer: PyTree
    microbatch: PyTree
    rng: Any
    shard: Any
    wanted: dict[str, list[bool]]
    loss_axes: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Functions:
    """The traced functions: either head and block, or what they and their derivatives are made of.

    Attributes:
      outputs: Avals of x, the loss, metrics and aux loss.
      embed: `(outside, ctx) -> x`.
      head: `(outside, x, ctx) -> (loss, metrics)`.
      block: `((layer, shared), x, ctx) -> (y, aux)`.
      gradients: The derivatives; None in forward-only programs.
    """

    outputs: _validate.Outputs
    embed: Callable[..., PyTree]
    head: Callable[..., tuple[jax.Array, PyTree]] | None = None
    block: Callable[..., tuple[PyTree, Any]] | None = None
    gradients: "Gradients | None" = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradients:
    """The derivatives of a model's functions.

    Attributes:
      embed: `(outside, ctx, dx) -> (None, doutside)`; dx has the leaves of x that have a cotangent,
        doutside those of outside that are wanted.
      head: `(outside, x, ctx, seed) -> ((loss, metrics, dx), doutside)`.
      block: The block's forward and the halves of its backward; its gradients are those of the
        wanted leaves of layer, then of shared.
      num_of_layer: How many of the gradients of block are of the layer; the rest are of shared.
      shared_places: For each of those the place in doutside.
      reduce_axes: For each of doutside, the manual axes over which what all uses add up to is still
        to be summed.
    """

    embed: Callable[..., tuple[None, list[jax.Array]]]
    head: Callable[..., tuple[Any, list[jax.Array]]]
    block: SplitVjp
    num_of_layer: int
    shared_places: list[int]
    reduce_axes: list[tuple[str, ...]]


def trace(
    model: Model,
    block: Callable[..., tuple[PyTree, Any]],
    args: Arguments,
    *,
    forward_only: bool,
    hidden_axes: Iterable[str],
) -> Functions:
    """Traces the model's functions; to be called where JAX keeps the types of varying values.

    Args:
      model: The model.
      block: `(layer, x, ctx) -> (y, aux)`, rematerialised as asked.
      args: What the functions are given.
      forward_only: Whether there are no gradients.
      hidden_axes: Mesh axes that no function may name.

    Raises:
      ValueError: If the functions do not fit each other or the mesh.
      TypeError: If one returns what it should not.
    """
    outs = _validate.outputs(
        model,
        args.outside,
        args.layer,
        args.microbatch,
        args.rng,
        args.shard,
        hidden_axes=hidden_axes,
    )
    shared = args.outside.get("shared")
    layer_ctx, ends_ctx = outs.ctx, replace(outs.ctx, layer=None)

    def plain_block(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Any]:
        layer, shared = params
        return block(layer, x, replace(ctx, shared=shared))

    params = args.layer, shared
    x = _varying_x(plain_block, params, outs.x, layer_ctx)
    loss_axes = args.loss_axes
    outs = replace(outs, x=x)
    _validate.reduced(outs, loss_axes)

    def as_x(values: PyTree) -> PyTree:
        return jax.tree.map(lambda a, like: _varying.cast(a, _varying.varies_over(like)), values, x)

    def typed_block(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Any]:
        y, aux = plain_block(params, x, ctx)
        return as_x(y), None if aux is None else _varying.cast(aux, loss_axes)

    def embed(outside: PyTree, ctx: Context) -> PyTree:
        ctx = replace(ctx, shared=outside.get("shared"))
        return as_x(_microbatches.strong(model.embed(outside["ends"], ctx)))

    def head(outside: PyTree, x: PyTree, ctx: Context) -> tuple[jax.Array, PyTree]:
        ctx = replace(ctx, shared=outside.get("shared"))
        outputs = model.head(outside["ends"], x, ctx)
        loss, metrics = _microbatches.head_outputs(model, outputs)
        return _varying.cast(loss, loss_axes), metrics

    wanted = [*args.wanted["ends"], *args.wanted["shared"]]

    def embed_grad(outside: PyTree, ctx: Context, dx: list[Any]) -> tuple[None, list[Any]]:
        def of(leaves: list[Any]) -> list[Any]:
            return pick(embed(place(outside, leaves, wanted), ctx))

        return None, jax.vjp(of, pick(outside, wanted))[1](dx)[0]

    def head_grad(outside: PyTree, x: PyTree, ctx: Context, seed: Any) -> tuple[Any, list[Any]]:
        def of(leaves: list[Any], x_leaves: list[Any]) -> tuple[jax.Array, PyTree]:
            return head(place(outside, leaves, wanted), place(x, x_leaves), ctx)

        loss, pull, metrics = jax.vjp(of, pick(outside, wanted), pick(x), has_aux=True)
        gradients, dx = pull(seed)
        return (loss, metrics, dx), gradients

    outside = args.outside
    run_embed = _captured(embed, outside, ends_ctx)
    if forward_only:
        return Functions(
            outputs=outs,
            embed=run_embed,
            head=_captured(head, outside, x, ends_ctx),
            block=_captured(typed_block, params, x, layer_ctx),
        )
    seed = _varying.aval(outs.loss, loss_axes)
    by_head = capture(head_grad, outside, x, ends_ctx, seed)
    by_embed = capture(embed_grad, outside, ends_ctx, pick(x))
    by_block = split_vjp(
        typed_block, params, x, layer_ctx, wanted=[*args.wanted["layer"], *args.wanted["shared"]]
    )
    return Functions(
        outputs=outs,
        embed=run_embed,
        gradients=_gradients(by_head, by_embed, by_block, args.wanted),
    )


def _captured(function: Callable[..., Any], *avals: Any) -> Callable[..., Any]:
    run, _ = capture(lambda *args: (function(*args), []), *avals)
    return lambda *args: run(*args)[0]


def _varying_x(block: Callable[..., Any], params: PyTree, x: PyTree, ctx: Context) -> PyTree:
    """Finds over which manual axes x varies: those of what embed returns, and what blocks add."""
    while True:
        y, _ = jax.eval_shape(block, params, x, ctx)
        before, after = ([_varying.varies_over(a) for a in jax.tree.leaves(t)] for t in (x, y))
        grown = [a | b for a, b in zip(before, after, strict=True)]
        leaves, structure = jax.tree.flatten(x)
        x = jax.tree.unflatten(structure, map(_varying.aval, leaves, grown))
        if grown == before:
            return x


def _gradients(
    by_head: tuple[Callable[..., Any], list],
    by_embed: tuple[Callable[..., Any], list],
    block: SplitVjp,
    wanted: dict[str, list[bool]],
) -> Gradients:
    """Has all uses of a parameter outside the stack leave the same reductions to the end."""
    (head, head_axes), (embed, embed_axes) = by_head, by_embed
    num_layer_leaves, num_ends = len(wanted["layer"]), sum(wanted["ends"])
    num_of_layer = sum(block.has_grad[:num_layer_leaves])
    used = [
        has
        for has, is_on in zip(block.has_grad[num_layer_leaves:], wanted["shared"], strict=True)
        if is_on
    ]
    shared_places = [num_ends + i for i, has in enumerate(used) if has]
    block_axes: list[Any] = [None] * len(head_axes)
    for index, axes in zip(shared_places, block.reduce_axes[num_of_layer:], strict=True):
        block_axes[index] = axes

    # None stands for a gradient that is zero, whatever it is summed over.
    uses = list(zip(head_axes, embed_axes, block_axes, strict=True))
    kinds = [{axes for axes in use if axes is not None} for use in uses]
    last = [kind.pop() if len(kind) == 1 else () for kind in kinds]

    def now(axes: list[Any], places: Sequence[int]) -> list[Any]:
        return [None if a == last[i] else a for i, a in zip(places, axes, strict=True)]

    everywhere = range(len(last))
    first = [()] * num_of_layer
    of_shared = now([block_axes[i] for i in shared_places], shared_places)
    return Gradients(
        head=_summed(head, now(head_axes, everywhere)),
        embed=_summed(embed, now(embed_axes, everywhere)),
        block=replace(
            block, weight_grad=_summed_gradients(block.weight_grad, [*first, *of_shared])
        ),
        num_of_layer=num_of_layer,
        shared_places=shared_places,
        reduce_axes=last,
    )


def _summed(function: Callable[..., Any], axes: list[Any]) -> Callable[..., Any]:
    """Sums each of the gradients that `function` returns second over its axes, if it has any."""
    if not any(axes):
        return function

    def run(*args: Any) -> Any:
        results, gradients = function(*args)
        return results, _sum(gradients, axes)

    return run


def _summed_gradients(function: Callable[..., Any], axes: list[Any]) -> Callable[..., Any]:
    return (lambda *args: _sum(function(*args), axes)) if any(axes) else function


def _sum(gradients: list[jax.Array], axes: list[Any]) -> list[jax.Array]:
    return [lax.psum(g, over) if over else g for g, over in zip(gradients, axes, strict=True)]
