"""Flax NNX modules as a pipelined model, opt-in: `import dualpipe_jax` alone imports no Flax.

In: a module that holds a list, or a stack, of layers. Out: a `dualpipe_jax.Model`, and gradients as
`nnx.Optimizer.update` takes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dualpipe_jax import _errors
from dualpipe_jax._api import value_and_grad as _api
from dualpipe_jax._errors import call, raise_all, show
from dualpipe_jax._executor import MemoryReport
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model.types import Context, Model, PyTree
from dualpipe_jax.nnx._layers import Layers, take_apart
from dualpipe_jax.nnx._part import Part

__all__ = ["NNXModel", "model", "value_and_grad"]


def model(
    module: nnx.Module,
    *,
    blocks: str = "layers",
    embed: Callable[[Any, Context], PyTree],
    block: Callable[[Any, PyTree, Context], Any] | None = None,
    head: Callable[[Any, PyTree, Context], Any],
    loss: Callable[[Any, PyTree], Any] | None = None,
    weight: Callable[[PyTree], Any] | None = None,
    has_aux: bool = False,
    block_has_aux: bool = False,
    layout: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    axis: str = "pipe",
) -> "NNXModel":
    """Makes a pipelined model of an NNX module that holds its layers.

    The module itself is not changed, and not kept: its structure is read, and what in it is no
    `nnx.Param`. Its random streams (`nnx.Rngs`, of Dropout) draw from the step's key in a call:
    stream i of a layer starts at `fold_in(ctx.rng, i)`, so that every microbatch and layer has
    numbers of its own, the same in every schedule; their state in the module stays as it is. Other
    variables are constants, of which each device holds those of all layers.

    Layers that differ in a static field, such as a window's size, are of different kinds: each kind
    has a stack of its own, as with `Model.layout`.

    Args:
      module: The module.
      blocks: The attribute that holds the layers, after the names of those above
        (`"decoder.layers"`): a list of modules, or one module whose state `nnx.vmap` stacked
        on a leading dim.
      embed: `(rest, ctx) -> x`, the first thing. `rest` is the module without its layers, x any
        pytree of arrays.
      block: `(layer, x, ctx) -> x`, one layer; None calls `layer(x)`.
      head: `(rest, x, ctx) -> logits`, or the loss where there is no `loss`.
      loss: `(what head returns, microbatch) -> loss`, a floating-point scalar.
      weight: As `Model.weight`.
      has_aux: Whether loss (or head, without loss) returns `(loss, metrics)`, as in `Model`.
      block_has_aux: Whether block returns `(x, aux_loss)`, as in `Model`.
      layout: The name of the kind of every layer; None finds them, and names them by their classes.
      ignore: Names of attributes of layers, and of modules in them, which make no difference to a
        call (a layer's own number, say): those of the first layer of a kind stand for all.
      axis: The name that sharding metadata gets for the layers' dim of blocks.

    Returns:
      An NNXModel: a `dualpipe_jax.Model`, of parameters that `NNXModel.params` makes of the module.

    Raises:
      TypeError: If an argument has a wrong type.
      ValueError: If layers are not found, share parameters, or fit into no kinds; at a call, if the
        module changes its variables (as BatchNorm does in training), or draws without a key.

    >>> import jax, jax.numpy as jnp, optax, dualpipe_jax as dpj
    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed = nnx.Embed(7, 4, rngs=rngs)
    ...         self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
    >>> net = Net(nnx.Rngs(0))
    >>> model = dpj.nnx.model(
    ...     net,
    ...     embed=lambda net, ctx: net.embed(ctx.microbatch),
    ...     head=lambda net, x, ctx: net.embed.attend(x),
    ...     loss=lambda logits, tokens: jnp.square(logits).mean(),
    ... )
    >>> mesh = jax.make_mesh((1,), ("pipe",), devices=jax.devices()[:1])
    >>> grad_fn = dpj.nnx.value_and_grad(model, mesh=mesh, num_microbatches=2)
    >>> optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    >>> loss, grads = grad_fn(net, jnp.ones((4, 2), int))
    >>> _ = optimizer.update(net, grads)
    """
    functions = {"embed": embed, "head": head}
    functions |= {name: f for name, f in {"block": block, "loss": loss}.items() if f is not None}
    raise_all(
        "model: embed, block, head and loss must be functions (the last of the module and of a "
        "context; see dualpipe_jax.nnx.model)",
        (f"{name} is {show(value)}" for name, value in functions.items() if not callable(value)),
        error=TypeError,
    )
    layers, rest, parts = take_apart(
        module,
        blocks,
        layout=_kinds.layout_of(layout),
        ignore=_errors.names("ignore", ignore),
        axis=_errors.name("axis", axis),
    )
    of_rest = partial(call, "embed", "(rest, ctx) -> x", embed)
    to_logits = partial(call, "head", "(rest, x, ctx) -> logits, or the loss", head)

    def run_embed(ends: PyTree, ctx: Context) -> PyTree:
        return rest.run(of_rest, ends, ctx=ctx)

    def run_head(ends: PyTree, x: PyTree, ctx: Context) -> Any:
        out = rest.run(to_logits, ends, x, ctx=ctx)
        if loss is None:
            return out
        return call("loss", "(logits, microbatch) -> scalar", loss, out, ctx.microbatch)

    places = np.asarray(_kinds.places_of(layers.kinds), np.int32)
    run_layer = _call if block is None else partial(call, "block", "(layer, x, ctx) -> x", block)

    def block_of(part: Part) -> Callable[[PyTree, PyTree, Context], Any]:
        def run_block(params: PyTree, x: PyTree, ctx: Context) -> Any:
            place = jnp.asarray(places)[ctx.layer]
            return part.run(run_layer, params, x, ctx=ctx, place=place)

        return run_block

    of_kind: dict[Any, Callable[..., Any]] = {kind: block_of(part) for kind, part in parts.items()}
    kinds: Any = None if None in of_kind else layers.kinds
    return NNXModel(
        embed=run_embed,
        block=of_kind.get(None, of_kind),
        head=run_head,
        weight=weight,
        has_aux=has_aux,
        block_has_aux=block_has_aux,
        layout=kinds,
        layers=layers,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NNXModel(Model):
    """A `Model` of an NNX module; `model` makes it."""

    layers: Layers

    def params(self, module: nnx.Module) -> PyTree:
        """Takes the parameters of the module apart: `{"ends": nnx.State, "blocks": nnx.State}`.

        The variables keep their metadata; that of blocks has `axis` as the name of the layers' dim,
        so that `nnx.get_partition_spec` lays the layers over the pipeline. Layers in a list are
        stacked: a copy, in every step of which it is part. With a layout, blocks is a dict with a
        state for each kind.

        Args:
          module: The module of which the model was made, or one like it.

        Raises:
          ValueError: If it is none of these.
          TypeError: If it is no module.
        """
        return self.layers.params(module)

    def state(self, tree: PyTree) -> nnx.State:
        """Makes the module's state of parameters, or gradients, as `params` returns them.

        Args:
          tree: `{"ends": ..., "blocks": ...}`.

        Returns:
          What `nnx.state(module, nnx.Param)` has for its structure: gradients for
          `nnx.Optimizer.update(module, grads)`, parameters for `nnx.update(module, state)`.

        Raises:
          ValueError: If tree is nothing of the kind.
        """
        return self.layers.state(tree)


def value_and_grad(model: NNXModel, **options: Any) -> "NNXGradFunction":
    """Makes the pipelined `nnx.value_and_grad` of a model's loss.

    Args:
      model: What `model` returns.
      **options: As for `dualpipe_jax.value_and_grad`.

    Returns:
      `grad_fn(module, batch, *, rng=None, loss_scale=None) -> (loss, grads)`, or
      `((loss, metrics), grads)`, for the user's own `nnx.jit`. grads is the `nnx.State` that
      `optimizer.update(module, grads)` takes, of an `nnx.Optimizer` made with `wrt=nnx.Param`.
      `grad_fn.memory(module, batch)` adds up a step's memory.

    Raises:
      TypeError: If model was not made by `dualpipe_jax.nnx.model`; else as
        `dualpipe_jax.value_and_grad`.
      ValueError: As `dualpipe_jax.value_and_grad`.
    """
    if not isinstance(model, NNXModel):
        raise TypeError(f"model: must be what dualpipe_jax.nnx.model returns, got {show(model)}")
    return NNXGradFunction(model=model, of_params=_api.value_and_grad(model, **options))


@dataclass(frozen=True, eq=False, kw_only=True)
class NNXGradFunction:
    """A function of (module, batch), as `value_and_grad` describes it."""

    model: NNXModel
    of_params: _api.GradFunction

    def __call__(
        self,
        module: nnx.Module,
        batch: PyTree,
        *,
        rng: jax.Array | None = None,
        loss_scale: Any = None,
    ) -> Any:
        """Returns `(loss, grads)`, or with metrics `((loss, metrics), grads)`."""
        params = self.model.params(module)
        value, grads = self.of_params(params, batch, rng=rng, loss_scale=loss_scale)
        return value, self.model.state(grads)

    def memory(
        self, module: nnx.Module, batch: PyTree, *, rng: jax.Array | None = None
    ) -> MemoryReport:
        """Adds up a step's memory on one device, as `memory` of `dualpipe_jax.value_and_grad`.

        Args:
          module: As for a call; of arrays, or of shapes (`nnx.eval_shape`).
          batch: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          rng: As for a call.
        """
        params = jax.eval_shape(self.model.params, module)
        return self.of_params.memory(params, batch, rng=rng)


def _call(layer: Any, x: PyTree, ctx: Context) -> Any:
    return layer(x)
