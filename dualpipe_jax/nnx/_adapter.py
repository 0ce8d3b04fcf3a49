"""Flax NNX modules as a pipelined model.

In: a module that holds a list, or a stack, of layers. Out: a `dualpipe_jax.Model`, and gradients as
`nnx.Optimizer.update` takes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx

from dualpipe_jax._api.value_and_grad import GradFunction
from dualpipe_jax._api.value_and_grad import value_and_grad as value_and_grad_of_params
from dualpipe_jax._errors import raise_all, require_name, require_names, show
from dualpipe_jax._executor import MemoryReport
from dualpipe_jax._model.kinds import index_in_stack, layout_of, unwrap_kinds
from dualpipe_jax._model.types import Batch, Block, Context, Model, Params, PyTree, Weight
from dualpipe_jax._model.users_call import call
from dualpipe_jax.nnx._layers import Layers
from dualpipe_jax.nnx._part import Part
from dualpipe_jax.nnx._take_apart import take_apart


def model(
    module: nnx.Module,
    *,
    blocks: str = "layers",
    embed: Callable[[Any, Context], PyTree],
    block: Callable[[Any, PyTree, Context], Any] | None = None,
    head: Callable[[Any, PyTree, Context], Any],
    loss: Callable[[Any, PyTree], Any] | None = None,
    weight: Weight | None = None,
    has_aux: bool = False,
    block_has_aux: bool = False,
    layout: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    axis: str = "pipe",
) -> "NNXModel":
    """Makes a pipelined model from an NNX module that holds its layers.

    The module is neither changed nor kept: only its structure, and its state other than
    `nnx.Param`, are read. In a call its random streams (`nnx.Rngs`, of Dropout) draw from the
    step's key: stream i of a layer starts at `fold_in(ctx.rng, i)`, so that every microbatch and
    layer has its own numbers, the same in every schedule; their state in the module does not
    change. Other variables are constants; each device holds the constants of all layers.

    Layers that differ in a static field, such as the size of a window, are of different kinds: each
    kind has its own stack, as with `Model.layout`.

    Args:
      module: The module.
      blocks: The path of the attribute that holds the layers (`"decoder.layers"`): a list of
        modules, or one module whose state `nnx.vmap` stacked on a leading dim.
      embed: `(rest, ctx) -> x`, the first function. `rest` is the module without its layers, x any
        pytree of arrays.
      block: `(layer, x, ctx) -> x`, one layer; None calls `layer(x)`.
      head: `(rest, x, ctx) -> logits`, or the loss if there is no `loss`.
      loss: `(outputs of head, microbatch) -> loss`, a floating-point scalar.
      weight: As `Model.weight`.
      has_aux: Whether loss (or head, without loss) returns `(loss, metrics)`, as in `Model`.
      block_has_aux: Whether block returns `(x, aux_loss)`, as in `Model`.
      layout: The name of the kind of every layer; None finds the kinds, and names them by classes.
      ignore: Names of attributes of layers, and of modules in them, that make no difference to a
        call (a layer's own number, say): all layers of a kind get the values of the first one.
      axis: The name of the layers' dim of blocks in sharding metadata.

    Returns:
      An NNXModel: a `dualpipe_jax.Model`, whose parameters `NNXModel.params` takes from the module.

    Raises:
      TypeError: If an argument has a wrong type.
      ValueError: If layers are not found, share parameters, or all differ; at a call, if the module
        changes its variables (as BatchNorm does in training), or draws without a key.

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
    optional = {"block": block, "loss": loss}
    given = {"embed": embed, "head": head}
    given |= {argument: f for argument, f in optional.items() if f is not None}
    raise_all(
        "model: embed, block, head and loss must be functions, as dualpipe_jax.nnx.model tells",
        (f"{argument} is {show(f)}" for argument, f in given.items() if not callable(f)),
        error=TypeError,
    )
    layers, rest, parts = take_apart(
        module,
        blocks,
        layout=layout_of(layout),
        ignore=require_names("ignore", ignore),
        axis=require_name("axis", axis),
    )
    call_embed = partial(call, "embed", "(rest, ctx) -> x", embed)
    call_head = partial(call, "head", "(rest, x, ctx) -> logits, or the loss", head)
    call_block = _call if block is None else partial(call, "block", "(layer, x, ctx) -> x", block)

    def run_embed(ends: PyTree, ctx: Context) -> PyTree:
        return rest.run(call_embed, ends, ctx=ctx)

    def run_head(ends: PyTree, x: PyTree, ctx: Context) -> Any:
        out = rest.run(call_head, ends, x, ctx=ctx)
        if loss is None:
            return out
        return call("loss", "(logits, microbatch) -> scalar", loss, out, ctx.microbatch)

    def block_of(part: Part) -> Block:
        def run_block(params: PyTree, x: PyTree, ctx: Context) -> Any:
            assert ctx.layer is not None
            index = index_in_stack(layers.kinds, ctx.layer)
            return part.run(call_block, params, x, ctx=ctx, index=index)

        return run_block

    run_blocks: Any = unwrap_kinds({kind: block_of(part) for kind, part in parts.items()})
    kinds: Any = None if None in parts else layers.kinds
    return NNXModel(
        embed=run_embed,
        block=run_blocks,
        head=run_head,
        weight=weight,
        has_aux=has_aux,
        block_has_aux=block_has_aux,
        layout=kinds,
        layers=layers,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NNXModel(Model):
    """Describes a `Model` of an NNX module; `model` makes it."""

    layers: Layers

    def params(self, module: nnx.Module) -> Params:
        """Takes the parameters from a module: `{"ends": nnx.State, "blocks": nnx.State}`.

        The variables keep their metadata; that of blocks has `axis` as the name of the layers' dim,
        so that `nnx.get_partition_spec` shards the layers over the pipeline. Layers in a list are
        stacked: a copy, in each step that calls this function. With a layout, blocks is a dict with
        a state for each kind.

        Args:
          module: The module from which the model was made, or one like it.

        Raises:
          ValueError: If its parameters are others.
          TypeError: If it is no module.
        """
        return self.layers.params(module)

    def state(self, tree: Params) -> nnx.State:
        """Converts parameters, or gradients, in the form of `params` to the module's state.

        Args:
          tree: `{"ends": ..., "blocks": ...}`.

        Returns:
          A state with the structure of `nnx.state(module, nnx.Param)`: gradients for
          `nnx.Optimizer.update(module, grads)`, parameters for `nnx.update(module, state)`.

        Raises:
          ValueError: If tree is not of that form.
        """
        return self.layers.state(tree)


def value_and_grad(model: NNXModel, **options: Any) -> "NNXGradFunction":
    """Makes the pipelined `nnx.value_and_grad` of a model's loss.

    Args:
      model: A model made by `dualpipe_jax.nnx.model`.
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
        raise TypeError(f"model: must be made by dualpipe_jax.nnx.model, got {show(model)}")
    return NNXGradFunction(model=model, of_params=value_and_grad_of_params(model, **options))


@dataclass(frozen=True, eq=False, kw_only=True)
class NNXGradFunction:
    """Computes loss and gradients of (module, batch), as `value_and_grad` describes it.

    Attributes:
      model: The model.
      of_params: The same function of parameters.
    """

    model: NNXModel
    of_params: GradFunction

    def __call__(
        self,
        module: nnx.Module,
        batch: Batch,
        *,
        rng: jax.Array | None = None,
        loss_scale: float | jax.Array | None = None,
    ) -> tuple[Any, nnx.State]:
        """Returns `(loss, grads)`, or with metrics `((loss, metrics), grads)`."""
        params = self.model.params(module)
        value, grads = self.of_params(params, batch, rng=rng, loss_scale=loss_scale)
        return value, self.model.state(grads)

    def memory(
        self, module: nnx.Module, batch: Batch, *, rng: jax.Array | None = None
    ) -> MemoryReport:
        """Adds up a step's memory on one device, as `grad_fn.memory` of `value_and_grad`.

        Args:
          module: As for a call; of arrays, or of shapes (`nnx.eval_shape`).
          batch: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          rng: As for a call.

        Returns:
          A MemoryReport, in bytes.
        """
        params = jax.eval_shape(self.model.params, module)
        return self.of_params.memory(params, batch, rng=rng)


def _call(layer: Any, x: PyTree, ctx: Context) -> Any:
    return layer(x)
