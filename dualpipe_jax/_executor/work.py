"""How much the actions of a step compute, before any compiler is asked.

In: the traced functions. Out: the FLOPs of their contractions on one device.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax

from dualpipe_jax._executor.functions import Arguments, Functions
from dualpipe_jax._executor.stages import Layout
from dualpipe_jax._leaves.pick import pick
from dualpipe_jax._split_vjp import SplitVjp, contraction_flops


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of one microbatch on one device.

    Attributes:
      forward: F of all layers of the model.
      input_grad: I of all layers.
      weight_grad: W of all layers.
      deferred: W of all layers where it recomputes.
      embed: The embedding and its gradient.
      head: The head and its gradient.
    """

    forward: int
    input_grad: int
    weight_grad: int
    deferred: int
    embed: int
    head: int


def count(traced: Functions, arguments: Arguments, layout: Layout) -> Work:
    """Counts what contractions compute; loops whose trips are not known count once."""
    gradients, outs = traced.gradients, traced.outputs
    assert gradients is not None
    outside, x, layer_ctx = arguments.outside, outs.x, outs.ctx
    ends_ctx = replace(layer_ctx, layer=None)
    sums = dict.fromkeys(("forward", "input_grad", "weight_grad", "deferred"), 0)
    for kind, block in gradients.block.items():
        params = (arguments.layers[kind], outside.get("shared"))
        given = params, _casts_of(block, params)
        dy, daux = pick(x), outs.aux[kind].loss
        kept, longer = block.residual, block.weight_residual
        for name, function, args in (
            ("forward", block.forward, (given, x, layer_ctx)),
            ("input_grad", block.input_grad, (given, layer_ctx, kept, longer, dy, daux)),
            ("weight_grad", block.weight_grad, (given, layer_ctx, longer, block.stash)),
            ("deferred", block.deferred_weight_grad, (given, layer_ctx, longer, block.deferred)),
        ):
            sums[name] += layout.kinds.count(kind) * contraction_flops(function, *args)
    embed = contraction_flops(traced.embed, outside, ends_ctx)
    embed += contraction_flops(gradients.embed, outside, ends_ctx, pick(x))
    head = contraction_flops(gradients.head, outside, x, ends_ctx, outs.loss)
    return Work(**sums, embed=embed, head=head)


def _casts_of(block: SplitVjp, params: Any) -> list[Any]:
    leaves = jax.tree.leaves(params)
    return jax.eval_shape(lambda leaves: block.cast(leaves, range(len(leaves))), leaves)
