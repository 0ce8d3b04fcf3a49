"""A model -> its functions as one device runs them, traced once, with their derivatives.

In: the model, and avals of the functions' arguments on one device. Out: `Functions`; each takes
this device's part of its arguments, and may be called in any loop of the step. All uses of a
parameter outside of blocks leave the same sums over mesh axes to the end of the step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from dualpipe_jax._errors import raise_all
from dualpipe_jax._leaves.gradient import Axes, GradIndex, make_gradients, sum_results
from dualpipe_jax._leaves.leaf import Leaf
from dualpipe_jax._leaves.pick import pick, put_leaves
from dualpipe_jax._leaves.rules import Rule
from dualpipe_jax._model import returns, semantics, varying
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.returns import Outputs
from dualpipe_jax._model.types import Aux, Context, Model, PyTree
from dualpipe_jax._split_vjp import SplitVjp, capture, is_look_up, split_vjp, traced_once


@dataclass(frozen=True, eq=False, kw_only=True)
class Arguments:
    """Holds avals of the arguments of the model's functions on one device.

    Attributes:
      outside: `{"ends": ...}`, and `"shared"` where there is one: parameters outside of blocks.
      layers: The parameters of one layer of each kind.
      microbatch: One microbatch.
      rng: The step's key, or None.
      shard: The index of the shard of the batch, or None.
      leaves: The `Leaf`s of the parameters, those of blocks by kind.
      loss_axes: The manual axes over which microbatches, and so losses, differ.
    """

    outside: dict[str, PyTree]
    layers: dict[Kind, PyTree]
    microbatch: PyTree
    rng: Any
    shard: Any
    leaves: PyTree
    loss_axes: tuple[str, ...]

    @property
    def leaves_outside(self) -> list[Leaf]:
        """The `Leaf`s of `outside`."""
        return jax.tree.leaves({part: self.leaves[part] for part in self.outside})

    def leaves_of(self, kind: Kind) -> list[Leaf]:
        """Lists the `Leaf`s of a kind's block: a layer's, then the shared ones."""
        return jax.tree.leaves((self.leaves["blocks"][kind], self.leaves.get("shared")))


@dataclass(frozen=True, eq=False, kw_only=True)
class Functions:
    """Holds the traced functions: head and block, or the derivatives of all of them.

    Attributes:
      leaves: The `Leaf`s of the parameters, those of blocks by kind.
      outputs: Avals of x, the loss, metrics and aux loss.
      embed: `(outside, ctx) -> x`.
      embeds_by_look_up: Whether embed is so little work that every rank may as well run it.
      head: `(outside, x, ctx) -> (loss, metrics)`.
      output: `(outside, x, ctx) -> outputs`, in the place of head.
      block: For each kind of layer `((layer, shared), x, ctx) -> (y, Aux)`.
      gradients: The derivatives; None in forward-only programs.
    """

    leaves: PyTree
    outputs: Outputs
    embed: Callable[..., PyTree]
    embeds_by_look_up: bool = False
    head: Callable[..., tuple[jax.Array, PyTree]] | None = None
    output: Callable[..., PyTree] | None = None
    block: dict[Kind, Callable[..., tuple[PyTree, Aux]]] = field(default_factory=dict)
    gradients: "Gradients | None" = None

    @property
    def size_of_x(self) -> int:
        """Bytes of the largest leaf of x."""
        leaves = jax.tree.leaves(self.outputs.x)
        return max((leaf.size * leaf.dtype.itemsize for leaf in leaves), default=0)

    def casts(self, kind: Kind, tree: PyTree, *, after: PyTree = ()) -> list[jax.Array]:
        """Casts parameters as a kind's block would; among the block's, they come `after` others."""
        if self.gradients is None:
            return []
        leaves, first = jax.tree.leaves(tree), len(jax.tree.leaves(after))
        return self.gradients.block[kind].cast(leaves, range(first, first + len(leaves)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradients:
    """Holds the derivatives of a model's functions.

    Attributes:
      leaves: The `LeafGradient`s of the parameters, those of blocks by kind.
      embed: `(outside, ctx, dx) -> (None, doutside)`; dx has the leaves of x that have a cotangent,
        doutside those of outside that are wanted.
      head: `(outside, x, ctx, loss_cotangent) -> ((loss, metrics, dx), doutside)`.
      embed_rules: The rule of each gradient in embed's doutside; None for one that is left out.
      head_rules: The same for head.
      block: For each kind of layer its block's forward, input grad and weight grad; its gradients
        are those of the wanted leaves of the layer, then of shared.
      index: For `"I"`, `"W"` and both, `"IW"`, and each kind the sums to which they add gradients.
    """

    leaves: PyTree
    embed: Callable[..., tuple[None, list[jax.Array]]]
    head: Callable[..., tuple[Any, list[jax.Array]]]
    embed_rules: list[Rule | None]
    head_rules: list[Rule | None]
    block: dict[Kind, SplitVjp]
    index: dict[str, dict[Kind, GradIndex]]


def trace(
    model: Model,
    blocks: dict[Kind, Callable[..., tuple[PyTree, Aux]]],
    args: Arguments,
    *,
    forward_only: bool,
    output: Callable[..., PyTree] | None = None,
    recomputes: bool,
    hidden_axes: Iterable[str],
) -> Functions:
    """Traces the model's functions; to be called where JAX keeps the types of varying values.

    Args:
      model: The model.
      blocks: For each kind of layer `(layer, x, ctx) -> (y, Aux)`, rematerialised as asked.
      args: The functions' arguments.
      forward_only: Whether there are no gradients.
      output: `(ends, x, ctx) -> outputs`, in the place of head, in a forward-only program.
      recomputes: Whether deferred weight gradients are to recompute their operands.
      hidden_axes: Mesh axes that no function may name.

    Raises:
      ValueError: If the functions do not fit each other or the mesh.
      TypeError: If one returns a value of the wrong type.
    """
    outs = returns.check(
        model,
        args.outside,
        args.layers,
        args.microbatch,
        args.rng,
        args.shard,
        output=output,
        hidden_axes=hidden_axes,
    )
    layer_ctx, ends_ctx = outs.ctx, replace(outs.ctx, layer=None)
    calls = _calls(model, blocks, output)
    params = {kind: (layer, args.outside.get("shared")) for kind, layer in args.layers.items()}

    def blocks_of(x: PyTree) -> tuple[list[PyTree], dict[Kind, Aux]]:
        avals = {
            kind: varying.eval_shape(block, params[kind], x, layer_ctx)
            for kind, block in calls.block.items()
        }
        return [y for y, _ in avals.values()], {kind: aux for kind, (_, aux) in avals.items()}

    x, aux = varying.close_over(blocks_of, outs.x)
    outs = replace(outs, x=x, aux=aux)
    # The axes over which the loss varies are known only after those of x.
    if output is None:
        loss, metrics = varying.eval_shape(calls.head, args.outside, x, ends_ctx)
        outs = replace(outs, loss=loss, metrics=metrics)
    else:
        applied = varying.eval_shape(calls.output, args.outside, x, ends_ctx)
        outs = replace(outs, applied=applied)
    returns.require_reduced(outs, args.loss_axes)
    calls = _typed(calls, x, args.loss_axes)

    embed = _captured(calls.embed, args.outside, ends_ctx)
    if forward_only:
        return Functions(
            leaves=args.leaves,
            outputs=outs,
            embed=embed,
            head=None if output else _captured(calls.head, args.outside, x, ends_ctx),
            output=_captured(calls.output, args.outside, x, ends_ctx) if output else None,
            block={
                kind: _captured(block, params[kind], x, layer_ctx)
                for kind, block in calls.block.items()
            },
        )
    head_grad, embed_grad = _gradients_outside(calls, [leaf.wanted for leaf in args.leaves_outside])
    loss_cotangent = varying.aval(outs.loss, args.loss_axes)
    by_head = capture(head_grad, args.outside, x, ends_ctx, loss_cotangent)
    by_embed = capture(embed_grad, args.outside, ends_ctx, pick(x))
    by_block = {
        kind: split_vjp(
            block,
            params[kind],
            x,
            layer_ctx,
            wanted=[leaf.wanted for leaf in args.leaves_of(kind)],
            recomputes=recomputes,
        )
        for kind, block in calls.block.items()
    }
    _require_one_use(by_head[1], by_embed[1], by_block, args)
    return Functions(
        leaves=args.leaves,
        outputs=outs,
        embed=embed,
        embeds_by_look_up=is_look_up(calls.embed, args.outside, ends_ctx),
        gradients=_gradients(by_head, by_embed, by_block, args),
    )


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """Holds the model's functions in the forms that `Functions` lists."""

    embed: Callable[..., PyTree]
    head: Callable[..., tuple[jax.Array, PyTree]]
    output: Callable[..., PyTree]
    block: dict[Kind, Callable[..., tuple[PyTree, Aux]]]


def _calls(
    model: Model,
    blocks: dict[Kind, Callable[..., tuple[PyTree, Aux]]],
    output: Callable[..., PyTree] | None,
) -> _Calls:
    def embed(outside: PyTree, ctx: Context) -> PyTree:
        ctx = replace(ctx, shared=outside.get("shared"))
        return semantics.strong(model.embed(outside["ends"], ctx))

    @traced_once
    def head(outside: PyTree, x: PyTree, ctx: Context) -> tuple[jax.Array, PyTree]:
        outputs = model.head(outside["ends"], x, replace(ctx, shared=outside.get("shared")))
        return semantics.head_outputs(model, outputs)

    def output_of(outside: PyTree, x: PyTree, ctx: Context) -> PyTree:
        assert output is not None
        outputs = output(outside["ends"], x, replace(ctx, shared=outside.get("shared")))
        return semantics.strong(outputs)

    def with_shared(block: Callable[..., Any]) -> Callable[..., Any]:
        @traced_once
        def run(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Aux]:
            layer, shared = params
            y, aux = block(layer, x, replace(ctx, shared=shared))
            return y, aux if output is None else Aux()

        return run

    by_kind = {kind: with_shared(block) for kind, block in blocks.items()}
    return _Calls(embed=embed, head=head, output=output_of, block=by_kind)


def _typed(calls: _Calls, x: PyTree, loss_axes: tuple[str, ...]) -> _Calls:
    """Makes every returned x vary over the axes of `x`, and every loss over `loss_axes`."""

    def as_x(values: PyTree) -> PyTree:
        return jax.tree.map(lambda a, like: varying.cast(a, varying.varies_over(like)), values, x)

    @traced_once
    def embed(outside: PyTree, ctx: Context) -> PyTree:
        return as_x(calls.embed(outside, ctx))

    def head(outside: PyTree, x: PyTree, ctx: Context) -> tuple[jax.Array, PyTree]:
        loss, metrics = calls.head(outside, x, ctx)
        return varying.cast(loss, loss_axes), metrics

    def typed(block: Callable[..., Any]) -> Callable[..., Any]:
        def run(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Aux]:
            y, aux = block(params, x, ctx)
            loss = None if aux.loss is None else varying.cast(aux.loss, loss_axes)
            return as_x(y), replace(aux, loss=loss)

        return run

    by_kind = {kind: typed(block) for kind, block in calls.block.items()}
    return replace(calls, embed=embed, head=head, block=by_kind)


def _gradients_outside(
    calls: _Calls, wanted: list[bool]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Makes `Gradients.head` and `Gradients.embed`, for the wanted leaves outside of blocks."""

    def embed_grad(outside: PyTree, ctx: Context, dx: list[Any]) -> tuple[None, list[Any]]:
        def of(leaves: list[Any]) -> list[Any]:
            return pick(calls.embed(put_leaves(outside, leaves, wanted), ctx))

        return None, jax.vjp(of, pick(outside, wanted))[1](dx)[0]

    def head_grad(
        outside: PyTree, x: PyTree, ctx: Context, loss_cotangent: Any
    ) -> tuple[Any, list[Any]]:
        def of(leaves: list[Any], x_leaves: list[Any]) -> tuple[jax.Array, PyTree]:
            return calls.head(put_leaves(outside, leaves, wanted), put_leaves(x, x_leaves), ctx)

        loss, pull, metrics = jax.vjp(of, pick(outside, wanted), pick(x), has_aux=True)
        gradients, dx = pull(loss_cotangent)
        return (loss, metrics, dx), gradients

    return head_grad, embed_grad


def _captured(function: Callable[..., Any], *avals: Any) -> Callable[..., Any]:
    def without_gradients(*args: Any) -> tuple[Any, list[Any]]:
        return function(*args), []

    without_gradients.__name__ = function.__name__
    run, _ = capture(without_gradients, *avals)
    return lambda *args: run(*args)[0]


def _gradients(
    by_head: tuple[Callable[..., Any], Axes],
    by_embed: tuple[Callable[..., Any], Axes],
    blocks: dict[Kind, SplitVjp],
    args: Arguments,
) -> Gradients:
    """Joins all derivatives; every use of a parameter leaves the same reductions to the end."""
    (head, head_axes), (embed, embed_axes) = by_head, by_embed
    outside = [leaf for leaf in args.leaves_outside if leaf.wanted]
    uses = [(outside, head_axes), (outside, embed_axes)]
    for kind, block in blocks.items():
        flags = zip(block.has_grad, block.reduce_axes, strict=True)
        uses.append((args.leaves_of(kind), [axes if has else None for has, axes in flags]))
    gradients = make_gradients(args.leaves, uses)
    of_leaf = {gradient.leaf: gradient for gradient in jax.tree.leaves(gradients)}

    def now(leaves: Iterable[Leaf], axes: Axes) -> list[tuple[str, ...]]:
        """Lists the axes over which the gradients of one use are summed at once."""
        pairs = zip(leaves, axes, strict=True)
        return [() if of is None or of == of_leaf[leaf].reduce_axes else of for leaf, of in pairs]

    def summed(kind: Kind, block: SplitVjp) -> SplitVjp:
        axes = now(args.leaves_of(kind), [*block.reduce_axes])
        with_input_grad, with_weight_grad = (
            [of for of, flag in zip(axes, flags, strict=True) if flag]
            for flags in (block.made_with_input_grad, block.made_with_weight_grad)
        )
        return replace(
            block,
            input_grad=sum_results(block.input_grad, with_input_grad),
            weight_grad=sum_results(block.weight_grad, with_weight_grad, is_all=True),
            deferred_weight_grad=sum_results(
                block.deferred_weight_grad, with_weight_grad, is_all=True
            ),
        )

    def index(kind: Kind, flags: Sequence[bool]) -> GradIndex:
        return GradIndex.of([of_leaf[leaf] for leaf in pick(args.leaves_of(kind), flags)])

    index_of = {
        "I": {kind: index(kind, block.made_with_input_grad) for kind, block in blocks.items()},
        "W": {kind: index(kind, block.made_with_weight_grad) for kind, block in blocks.items()},
    }
    index_of["IW"] = {kind: of.join(index_of["W"][kind]) for kind, of in index_of["I"].items()}
    return Gradients(
        leaves=gradients,
        head=sum_results(head, now(outside, head_axes)),
        embed=sum_results(embed, now(outside, embed_axes)),
        head_rules=_rules(outside, head_axes),
        embed_rules=_rules(outside, embed_axes),
        block={kind: summed(kind, block) for kind, block in blocks.items()},
        index=index_of,
    )


def _rules(leaves: list[Leaf], axes: Axes) -> list[Rule | None]:
    """Gives each gradient of a use its rule; None to a zero that would count as a value."""
    pairs = zip(leaves, axes, strict=True)
    return [None if leaf.overwritten and of is None else leaf.rule for leaf, of in pairs]


def _require_one_use(
    head_axes: Axes, embed_axes: Axes, blocks: dict[Kind, SplitVjp], args: Arguments
) -> None:
    """Requires one use of a leaf that its gradient overwrites: two would be added up."""
    outside = [leaf for leaf in args.leaves_outside if leaf.wanted]
    found = [
        leaf
        for leaf, *axes in zip(outside, head_axes, embed_axes, strict=True)
        if leaf.overwritten and None not in axes
    ]
    for kind, block in blocks.items():
        both = zip(args.leaves_of(kind), block.is_sum, strict=True)
        found += [leaf for leaf, is_sum in both if leaf.overwritten and is_sum]
    raise_all(
        "overwrite: a leaf that its gradient overwrites must be used once in each microbatch and "
        "layer, as its new values would be added up; give each use a leaf of its own",
        (f"{leaf.name} is used more than once" for leaf in found),
    )
