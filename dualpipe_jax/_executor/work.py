"""Counts the work of a step's actions on one device, before any compiler is asked.

In: the traced functions, and the kind of every layer. Out: `Work`, in FLOPs that take as long, and
the bytes that the layers keep between actions.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax

from dualpipe_jax._executor.buffers import bytes_of
from dualpipe_jax._executor.trace import Arguments, Functions
from dualpipe_jax._leaves.pick import pick
from dualpipe_jax._model import varying
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._split_vjp import SplitVjp, time_in_flops


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """Holds the work of one layer for one microbatch, in FLOPs that take as long, and its bytes.

    Attributes:
      forward: F.
      input_grad: I; 0 for forwards alone, as the next two.
      weight_grad: W.
      deferred: W where it recomputes.
      activation_bytes: The bytes that F keeps for I and for W on the device: without those that a
        policy offloads.
      stash_bytes: The bytes that I keeps for a deferred W.
    """

    forward: int
    input_grad: int = 0
    weight_grad: int = 0
    deferred: int = 0
    activation_bytes: int = 0
    stash_bytes: int = 0

    def __add__(self, other: "LayerWork") -> "LayerWork":
        return LayerWork(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def __mul__(self, times: int) -> "LayerWork":
        return LayerWork(**{name: value * times for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Work:
    """Holds the work of one microbatch on one device, in FLOPs that take as long.

    Attributes:
      layer: The work of a layer of each kind.
      num_layers: The layers of each kind.
      embed: The embedding and its gradient.
      head: The head and its gradient.
    """

    layer: dict[Kind, LayerWork]
    num_layers: dict[Kind, int]
    embed: int
    head: int

    @property
    def all_layers(self) -> LayerWork:
        """The work of all layers of the model, and their bytes."""
        each = (work * self.num_layers[kind] for kind, work in self.layer.items())
        return sum(each, start=LayerWork(forward=0))


def count_work(functions: Functions, arguments: Arguments, kinds: Iterable[Kind]) -> Work:
    """Counts the work of contractions and look-ups; a loop of unknown length counts as one trip.

    Args:
      functions: The functions.
      arguments: Avals of their arguments.
      kinds: The kind of every layer.
    """
    gradients, outs = functions.gradients, functions.outputs
    outside, x = arguments.outside, outs.x
    ctx = replace(outs.ctx, layer=None)
    embed, head = _time(functions.embed, outside, ctx), 0
    if gradients is not None:
        layer = {
            kind: _of_block(block, kind, functions, arguments)
            for kind, block in gradients.block.items()
        }
        embed += _time(gradients.embed, outside, ctx, pick(x))
        head = _time(gradients.head, outside, x, ctx, outs.loss)
    else:
        layer = {
            kind: LayerWork(
                forward=_time(block, (arguments.layers[kind], outside.get("shared")), x, outs.ctx)
            )
            for kind, block in functions.block.items()
        }
        end = functions.head or functions.output
        assert end is not None
        head = _time(end, outside, x, ctx)
    return Work(layer=layer, num_layers=dict(Counter(kinds)), embed=embed, head=head)


def _of_block(block: SplitVjp, kind: Kind, functions: Functions, arguments: Arguments) -> LayerWork:
    """Counts the work of a layer and of its gradients."""
    outs, ctx = functions.outputs, functions.outputs.ctx
    params = (arguments.layers[kind], arguments.outside.get("shared"))
    given = params, _casts_of(block, params)
    residual, weight_residual = block.residual, block.weight_residual
    dy, daux = pick(outs.x), outs.aux[kind].loss
    return LayerWork(
        forward=_time(block.forward, given, outs.x, ctx),
        input_grad=_time(block.input_grad, given, ctx, residual, weight_residual, dy, daux),
        weight_grad=_time(block.weight_grad, given, ctx, weight_residual, block.stash),
        deferred=_time(block.deferred_weight_grad, given, ctx, weight_residual, block.deferred),
        activation_bytes=bytes_of(
            (
                pick(residual, [not there for there in block.residual_offloaded]),
                pick(weight_residual, [not there for there in block.weight_residual_offloaded]),
            )
        ),
        stash_bytes=bytes_of(block.deferred),
    )


def _casts_of(block: SplitVjp, params: Any) -> list[Any]:
    leaves = jax.tree.leaves(_untyped(params))
    return jax.eval_shape(lambda leaves: block.cast(leaves, range(len(leaves))), leaves)


def _time(function: Callable[..., Any], *args: Any) -> int:
    """Counts the work of a function as the step runs it: without types of varying values."""
    return time_in_flops(function, *_untyped(args))


def _untyped(avals: Any) -> Any:
    return jax.tree.map(varying.aval, avals)
