"""A model -> its functions as one device runs them, traced once, with their derivatives.

In: the model, and avals of the functions' arguments on one device. Out: `Functions`. All uses of a
parameter outside the stack leave the same sums over mesh axes to the end of the step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import jax
from jax.tree_util import keystr

from dualpipe_jax._errors import raise_all
from dualpipe_jax._executor import accumulators
from dualpipe_jax._executor.accumulators import Places
from dualpipe_jax._executor.functions import Arguments, Functions, Gradients
from dualpipe_jax._executor.retrace import traced_once
from dualpipe_jax._leaves.pick import pick, put_leaves, select
from dualpipe_jax._leaves.rules import Rule, rules_of
from dualpipe_jax._model import returns as _outputs
from dualpipe_jax._model import semantics
from dualpipe_jax._model import varying as _varying
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Aux, Context, Model
from dualpipe_jax._split_vjp import SplitVjp, capture, is_look_up, split_vjp

PyTree = Any


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
      args: What the functions are given.
      forward_only: Whether there are no gradients.
      output: `(ends, x, ctx) -> outputs`, in the place of head, in a forward-only program.
      recomputes: Whether deferred weight gradients are to recompute what they need.
      hidden_axes: Mesh axes that no function may name.

    Raises:
      ValueError: If the functions do not fit each other or the mesh.
      TypeError: If one returns what it should not.
    """
    outs = _outputs.check(
        model,
        args.outside,
        args.layers,
        args.microbatch,
        args.rng,
        args.shard,
        output=output,
        hidden_axes=hidden_axes,
    )
    shared = args.outside.get("shared")
    layer_ctx = outs.ctx
    ends_ctx = replace(layer_ctx, layer=None)

    def with_shared(block: Callable[..., Any]) -> Callable[..., Any]:
        @traced_once
        def run(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Aux]:
            layer, shared = params
            y, aux = block(layer, x, replace(ctx, shared=shared))
            return y, aux if output is None else Aux()

        return run

    @traced_once
    def head_of(outside: PyTree, x: PyTree, ctx: Context) -> tuple[jax.Array, PyTree]:
        outputs = model.head(outside["ends"], x, replace(ctx, shared=outside.get("shared")))
        return semantics.head_outputs(model, outputs)

    def output_of(outside: PyTree, x: PyTree, ctx: Context) -> PyTree:
        assert output is not None
        outputs = output(outside["ends"], x, replace(ctx, shared=outside.get("shared")))
        return semantics.strong(outputs)

    plain = {kind: with_shared(block) for kind, block in blocks.items()}
    params = {kind: (layer, shared) for kind, layer in args.layers.items()}
    x, aux = _varying_x(plain, params, outs.x, layer_ctx)
    loss_axes = args.loss_axes
    outs = replace(outs, x=x, aux=aux)
    # What varies was not known before it was known what x varies over.
    if output is None:
        loss, metrics = _varying.eval_shape(head_of, args.outside, x, ends_ctx)
        outs = replace(outs, loss=loss, metrics=metrics)
    else:
        applied = _varying.eval_shape(output_of, args.outside, x, ends_ctx)
        outs = replace(outs, applied=applied)
    _outputs.require_reduced(outs, loss_axes)

    def as_x(values: PyTree) -> PyTree:
        return jax.tree.map(lambda a, like: _varying.cast(a, _varying.varies_over(like)), values, x)

    def typed(block: Callable[..., Any]) -> Callable[..., Any]:
        def run(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Aux]:
            y, aux = block(params, x, ctx)
            loss = None if aux.loss is None else _varying.cast(aux.loss, loss_axes)
            return as_x(y), replace(aux, loss=loss)

        return run

    @traced_once
    def embed(outside: PyTree, ctx: Context) -> PyTree:
        ctx = replace(ctx, shared=outside.get("shared"))
        return as_x(semantics.strong(model.embed(outside["ends"], ctx)))

    def head(outside: PyTree, x: PyTree, ctx: Context) -> tuple[jax.Array, PyTree]:
        loss, metrics = head_of(outside, x, ctx)
        return _varying.cast(loss, loss_axes), metrics

    wanted = [*args.wanted["ends"], *args.wanted["shared"]]

    def embed_grad(outside: PyTree, ctx: Context, dx: list[Any]) -> tuple[None, list[Any]]:
        def of(leaves: list[Any]) -> list[Any]:
            return pick(embed(put_leaves(outside, leaves, wanted), ctx))

        return None, jax.vjp(of, pick(outside, wanted))[1](dx)[0]

    def head_grad(outside: PyTree, x: PyTree, ctx: Context, seed: Any) -> tuple[Any, list[Any]]:
        def of(leaves: list[Any], x_leaves: list[Any]) -> tuple[jax.Array, PyTree]:
            return head(put_leaves(outside, leaves, wanted), put_leaves(x, x_leaves), ctx)

        loss, pull, metrics = jax.vjp(of, pick(outside, wanted), pick(x), has_aux=True)
        gradients, dx = pull(seed)
        return (loss, metrics, dx), gradients

    outside = args.outside
    run_embed = _captured(embed, outside, ends_ctx)
    if forward_only:
        return Functions(
            outputs=outs,
            embed=run_embed,
            head=None if output else _captured(head, outside, x, ends_ctx),
            output=_captured(output_of, outside, x, ends_ctx) if output else None,
            block={
                kind: _captured(typed(block), params[kind], x, layer_ctx)
                for kind, block in plain.items()
            },
        )
    seed = _varying.aval(outs.loss, loss_axes)
    by_head = capture(head_grad, outside, x, ends_ctx, seed)
    by_embed = capture(embed_grad, outside, ends_ctx, pick(x))
    by_block = {
        kind: split_vjp(
            typed(block),
            params[kind],
            x,
            layer_ctx,
            wanted=[*args.wanted_of_layers[kind], *args.wanted["shared"]],
            recomputes=recomputes,
        )
        for kind, block in plain.items()
    }
    _require_one_use(by_head[1], by_embed[1], by_block, args)
    return Functions(
        outputs=outs,
        embed=run_embed,
        embeds_by_look_up=is_look_up(embed, outside, ends_ctx),
        gradients=_gradients(by_head, by_embed, by_block, args),
    )


def _captured(function: Callable[..., Any], *avals: Any) -> Callable[..., Any]:
    def without_gradients(*args: Any) -> tuple[Any, list[Any]]:
        return function(*args), []

    without_gradients.__name__ = function.__name__
    run, _ = capture(without_gradients, *avals)
    return lambda *args: run(*args)[0]


def _varying_x(
    blocks: dict[Kind, Callable[..., Any]], params: dict[Kind, PyTree], x: PyTree, ctx: Context
) -> tuple[PyTree, dict[Kind, Aux]]:
    """Finds over which manual axes x varies: those of what embed returns, and what blocks add.

    Returns:
      Avals of x, and of the Aux of each kind of block.
    """
    leaves, structure = jax.tree.flatten(x)
    grown = [_varying.varies_over(a) for a in leaves]
    while True:
        before, aux = grown, {}
        x = jax.tree.unflatten(structure, map(_varying.aval, leaves, before))
        for kind, block in blocks.items():
            y, aux[kind] = _varying.eval_shape(block, params[kind], x, ctx)
            after = map(_varying.varies_over, jax.tree.leaves(y))
            grown = [a | b for a, b in zip(grown, after, strict=True)]
        if grown == before:
            return x, aux


def _gradients(
    by_head: tuple[Callable[..., Any], list],
    by_embed: tuple[Callable[..., Any], list],
    blocks: dict[Kind, SplitVjp],
    args: Arguments,
) -> Gradients:
    """Has all uses of a parameter outside the stack leave the same reductions to the end."""
    (head, head_axes), (embed, embed_axes) = by_head, by_embed
    num_ends = sum(args.wanted["ends"])
    # None stands for a gradient that is zero, whatever it is summed over.
    uses: list[set[Any]] = [set(use) for use in zip(head_axes, embed_axes, strict=True)]
    for kind, block in blocks.items():
        skip = len(args.wanted_of_layers[kind])
        shared = zip(block.has_grad[skip:], block.reduce_axes[skip:], strict=True)
        mine = [axes if has else None for has, axes in shared]
        for i, axes in enumerate(select(mine, args.wanted["shared"])):
            uses[num_ends + i].add(axes)
    overwritten = [
        flag
        for part in ("ends", "shared")
        for flag in select(args.overwritten[part], args.wanted[part])
    ]
    kinds = [use - {None} for use in uses]
    last = [use.pop() if len(use) == 1 else () for use in kinds]

    def now(axes: Sequence[Any], last: Sequence[Any]) -> list[Any]:
        return [None if each == final else each for each, final in zip(axes, last, strict=True)]

    def block_of(kind: Kind) -> SplitVjp:
        block, skip = blocks[kind], len(args.wanted_of_layers[kind])
        rest = iter(last[num_ends:])
        at_last = [next(rest) if on else () for on in args.wanted["shared"]]
        axes = [*[None] * skip, *now(block.reduce_axes[skip:], at_last)]
        early, late = select(axes, block.is_early), select(axes, block.is_late)
        return replace(
            block,
            input_grad=_summed(block.input_grad, early),
            weight_grad=_summed(block.weight_grad, late, is_all=True),
            deferred_weight_grad=_summed(block.deferred_weight_grad, late, is_all=True),
        )

    of_early, of_late = (
        {kind: _places(block, kind, flags(block), args) for kind, block in blocks.items()}
        for flags in (attrgetter("is_early"), attrgetter("is_late"))
    )
    return Gradients(
        head=_summed(head, now(head_axes, last)),
        embed=_summed(embed, now(embed_axes, last)),
        block={kind: block_of(kind) for kind in blocks},
        early=of_early,
        late=of_late,
        both=accumulators.either(of_early, of_late),
        reduce_axes=last,
        outside_rules=rules_of(overwritten),
        embed_rules=_rules_of_use(overwritten, embed_axes),
        head_rules=_rules_of_use(overwritten, head_axes),
        layer_rules={kind: _layer_rules(block, kind, args) for kind, block in blocks.items()},
    )


def _require_one_use(
    head_axes: list[Any], embed_axes: list[Any], blocks: dict[Kind, SplitVjp], args: Arguments
) -> None:
    """Requires one use of a leaf that its gradient overwrites: two would be added up."""

    def names(tree: PyTree, twice: Sequence[bool], name: str) -> list[str]:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        return [f"{name}{keystr(path)}" for path in select(paths, twice)]

    in_both = iter(
        head is not None and embed is not None
        for head, embed in zip(head_axes, embed_axes, strict=True)
    )
    of_ends = [next(in_both) if on else False for on in args.wanted["ends"]]
    twice = [a and b for a, b in zip(of_ends, args.overwritten["ends"], strict=True)]
    found = names(args.outside["ends"], twice, "params['ends']")
    for kind, block in blocks.items():
        flags = args.overwritten_of_layers[kind]
        sums = zip(flags, block.is_sum[: len(flags)], strict=True)
        stack = "params['blocks']" if kind is None else f"params['blocks'][{kind!r}]"
        found += names(args.layers[kind], [a and b for a, b in sums], stack)
    raise_all(
        "overwrite: a leaf that its gradient overwrites must be used once in each microbatch and "
        "layer, as its new values would be added up; give each use a leaf of its own",
        (f"{name} is used more than once" for name in found),
    )


def _rules_of_use(overwritten: list[bool], axes: list[Any]) -> list[Rule | None]:
    """Gives rules to what a use adds: none to a zero that would count as a value."""
    return [
        None if flag and each is None else rule
        for flag, each, rule in zip(overwritten, axes, rules_of(overwritten), strict=True)
    ]


def _layer_rules(block: SplitVjp, kind: Kind, args: Arguments) -> tuple[Rule, ...]:
    flags = args.overwritten_of_layers[kind]
    return tuple(rules_of(select(flags, block.has_grad[: len(flags)])))


def _places(block: SplitVjp, kind: Kind, flags: Sequence[bool], args: Arguments) -> Places:
    """Finds the places of the gradients of the flagged leaves of a layer and of shared."""
    skip = len(flags) - len(args.wanted["shared"])
    of_layer = select(flags[:skip], block.has_grad[:skip])
    of_shared = select(flags[skip:], args.wanted["shared"])
    layer, shared = (tuple(i for i, on in enumerate(f) if on) for f in (of_layer, of_shared))
    rules = _layer_rules(block, kind, args)
    return Places(layer=layer, shared=shared, rules=tuple(rules[i] for i in layer))


def _summed(
    function: Callable[..., Any], axes: list[Any], *, is_all: bool = False
) -> Callable[..., Any]:
    """Sums each of the gradients over its axes, if it has any.

    They are the last of what `function` returns, or all of it.
    """
    if not any(axes):
        return function

    def run(*args: Any) -> Any:
        out = function(*args)
        *results, gradients = (out,) if is_all else out
        summed = [_varying.sum_over(g, over or ()) for g, over in zip(gradients, axes, strict=True)]
        return summed if is_all else (*results, summed)

    return run
