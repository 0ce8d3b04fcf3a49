"""The types of the public interface: `Model`, its functions, their context and their outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import jax

PyTree: TypeAlias = Any
# {"ends": pytree, "blocks": pytree of leaves [num_layers, ...]}, and perhaps {"shared": pytree}.
Params: TypeAlias = PyTree
# A pytree whose leaves are [batch_size, ...].
Batch: TypeAlias = PyTree
Mesh: TypeAlias = jax.sharding.Mesh | jax.sharding.AbstractMesh
# A mesh axis, or several.
AxisNames: TypeAlias = str | tuple[str, ...]
# "none", "block", or a policy of `jax.checkpoint_policies`.
Remat: TypeAlias = str | Callable[..., Any]
# Bools whose leaves stand for branches of the parameters, or a function from parameters to these.
ParamsMask: TypeAlias = PyTree | Callable[[Params], PyTree]


def is_on_host(value: Any) -> bool:
    """Whether an array, or an aval of one, is in the host's memory: its type says so."""
    aval = jax.typeof(value) if isinstance(value, jax.Array) else value
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """Gives a model function its microbatch, its layer, its random key and shared parameters.

    Attributes:
      microbatch: This microbatch's slice of `batch`: the same pytree, leaves of shape
        `[batch_size / num_microbatches, ...]`.
      layer: The global layer index, an int32 scalar, in blocks; None in embed and head.
      rng: A key for this microbatch and layer, the same in every schedule; None without `rng=`.
        With `k = jax.random.fold_in(rng, m)`, block `l` gets `fold_in(k, l)`, embed
        `fold_in(k, num_layers)` and head `fold_in(k, num_layers + 1)`.
      microbatch_rng: The key of this microbatch, the same in embed, in all blocks and in head:
        `fold_in(rng, m)`, with the index of the shard of the batch folded in last if there are
        several; None without `rng=`. For functions that derive the keys of layers by themselves.
      shared: `params["shared"]`, parameters that all blocks (and embed and head) may use; None if
        params have no `"shared"`. Their gradient is the sum over all uses.
    """

    microbatch: Batch
    layer: jax.Array | None = None
    rng: jax.Array | None = None
    microbatch_rng: jax.Array | None = None
    shared: PyTree = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Aux:
    """Holds a block's own loss and metrics, which it returns beside x as `(x, Aux(...))`.

    Attributes:
      loss: A floating-point scalar, or None. Summed over layers, averaged over microbatches, never
        weighted, and added to the loss.
      metrics: Any pytree of arrays of numbers or bools, such as the number of tokens routed to each
        expert. They have no gradient. `Metrics.blocks` returns their sums over microbatches (and
        shards of the batch), stacked by layer. Over one of manual_axes that is not one of
        batch_axes, the metrics must be the same on all devices.

    >>> import jax, jax.numpy as jnp, dualpipe_jax as dpj
    >>> def block(params, x, ctx):
    ...     y = jax.nn.relu(x @ params)
    ...     return x + y, dpj.Aux(metrics={"dead": (y == 0).sum(0)})
    >>> model = dpj.Model(
    ...     embed=lambda ends, ctx: ctx.microbatch,
    ...     block=block,
    ...     head=lambda ends, x, ctx: jnp.square(x).mean(),
    ... )
    >>> params = {"ends": (), "blocks": jnp.ones((5, 3, 3)).at[2].set(-1)}
    >>> loss_fn = dpj.sequential(model, num_microbatches=2)
    >>> loss, metrics = loss_fn(params, jnp.ones((4, 3)))
    >>> print(metrics.blocks["dead"])
    [[0 0 0]
     [0 0 0]
     [4 4 4]
     [0 0 0]
     [0 0 0]]
    """

    loss: Any = None
    metrics: PyTree = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Holds a step's metrics, of the head and of the blocks, where blocks return metrics.

    All metrics are summed over microbatches, floats in float32 or wider, integers and bools in
    int32 or wider.

    Attributes:
      head: The metrics of head, or None without `Model.has_aux`.
      blocks: The metrics of the blocks, stacked by layer, `[num_layers, ...]`, in model order; with
        `Model.layout` a dict with such stacks for each kind whose block returns metrics.
    """

    head: PyTree = None
    blocks: PyTree = None


class Embed(Protocol):
    """Computes x, the input of the first block, from a microbatch: `(ends, ctx) -> x`."""

    def __call__(self, ends: PyTree, ctx: Context, /) -> PyTree:
        """Computes x on the first stage.

        Args:
          ends: `params["ends"]`, the same for embed and head.
          ctx: The context; `ctx.microbatch` has leaves `[batch_size / num_microbatches, ...]`.

        Returns:
          Any pytree of at least one array, such as activations `[rows, length, width]`.
        """


class Block(Protocol):
    """Computes one layer: `(params, x, ctx) -> x`."""

    def __call__(self, params: PyTree, x: PyTree, ctx: Context, /) -> PyTree:
        """Computes a layer.

        Args:
          params: The parameters of this layer: leaves of `params["blocks"]` without the layers'
            dim.
          x: The output of embed, or of the block before.
          ctx: The context; `ctx.layer` is the index of the layer, an int32 scalar.

        Returns:
          x, with the structure, shapes and dtypes of the given one; or `(x, Aux(...))`; or
          `(x, aux_loss)` with `Model.block_has_aux`.
        """


class Head(Protocol):
    """Computes the loss of a microbatch: `(ends, x, ctx) -> loss`."""

    def __call__(self, ends: PyTree, x: PyTree, ctx: Context, /) -> PyTree:
        """Computes the loss on the last stage.

        Args:
          ends: `params["ends"]`, the same for embed and head.
          x: The output of the last block.
          ctx: The context; `ctx.microbatch` has leaves `[batch_size / num_microbatches, ...]`.

        Returns:
          The loss, a floating-point scalar; or `(loss, metrics)` with `Model.has_aux`, metrics a
          pytree of arrays of numbers or bools.
        """


class Weight(Protocol):
    """Weighs the loss of a microbatch: `(microbatch) -> scalar`."""

    def __call__(self, microbatch: Batch, /) -> Any:
        """Computes the weight, such as the number of tokens that count.

        Args:
          microbatch: Rows of the batch, leaves `[batch_size / num_microbatches, ...]`.

        Returns:
          A scalar, floating-point or integer; it has no gradient.
        """


class Output(Protocol):
    """Computes the outputs of `apply` for a microbatch: `(ends, x, ctx) -> outputs`."""

    def __call__(self, ends: PyTree, x: PyTree, ctx: Context, /) -> PyTree:
        """Computes the outputs on the last stage.

        Args:
          ends: `params["ends"]`.
          x: The output of the last block.
          ctx: The context that head would be given.

        Returns:
          Any pytree of at least one array `[rows, ...]`, rows being those of the microbatch.
        """


@dataclass(frozen=True, kw_only=True)
class Model:
    """Describes a model by pure functions, from which every schedule builds its stages.

    Attributes:
      embed: `(ends, ctx) -> x`, the first function, on the first stage. `x` is any pytree of
        arrays.
      block: `(block_params, x, ctx) -> x`, one layer; its parameters have no layers' dim, and the
        returned `x` has the structure, shapes and dtypes of the given one. A block may return
        `(x, Aux(loss=..., metrics=...))`, a loss and metrics of its own. Layers of different kinds
        need a dict of such functions, by the names of the kinds.
      head: `(ends, x, ctx) -> loss`, the last function, on the last stage: a floating-point scalar.
      weight: `(microbatch) -> scalar`, or None. With it the loss is sum(head) / sum(weight) over
        the microbatches, and head returns a sum; without it the loss is the mean of head.
      has_aux: Whether head returns `(loss, metrics)`; metrics are summed over microbatches.
      block_has_aux: Whether block returns `(x, aux_loss)`, short for `(x, Aux(loss=aux_loss))`. It
        holds for all kinds.
      layout: The name of the kind of every layer, in model order, where block is a dict; else None.

    Layers of different kinds, such as dense layers before expert layers, need a block for each kind
    and a layout. `params["blocks"]` is then a dict with a stack for each kind, `[number of layers
    of the kind, ...]`, in model order: no kind's parameters are padded to another's. `ctx.layer`
    counts the layers of all kinds. (One block can also choose by `ctx.layer`, with `jax.lax.cond`,
    but then every layer holds the parameters of all kinds.)

    >>> import jax, jax.numpy as jnp, dualpipe_jax as dpj
    >>> def dense(params, x, ctx):
    ...     return x + jnp.tanh(x @ params["up"]) @ params["down"]
    >>> def experts(params, x, ctx):
    ...     weights = jax.nn.softmax(x @ params["router"])  # [rows, experts]
    ...     return x + jnp.einsum("re,rd,edf->rf", weights, x, params["experts"])
    >>> model = dpj.Model(
    ...     embed=lambda ends, ctx: ctx.microbatch @ ends["table"],
    ...     block={"dense": dense, "experts": experts},
    ...     layout=("dense", "experts", "experts"),
    ...     head=lambda ends, x, ctx: jnp.square(x).mean(),
    ... )
    >>> params = {
    ...     "ends": {"table": jnp.ones((3, 4))},
    ...     "blocks": {
    ...         "dense": {"up": jnp.ones((1, 4, 8)), "down": jnp.ones((1, 8, 4))},
    ...         "experts": {"router": jnp.ones((2, 4, 5)), "experts": jnp.ones((2, 5, 4, 4))},
    ...     },
    ... }
    >>> grad_fn = dpj.value_and_grad(
    ...     model,
    ...     mesh=jax.make_mesh((1,), ("pipe",), devices=jax.devices()[:1]),
    ...     num_microbatches=2,
    ... )
    >>> loss, grads = grad_fn(params, jnp.ones((4, 3)))
    >>> jax.tree.map(jnp.shape, grads["blocks"]) == jax.tree.map(jnp.shape, params["blocks"])
    True
    """

    embed: Embed
    block: Block | Mapping[str, Block]
    head: Head
    weight: Weight | None = None
    has_aux: bool = False
    block_has_aux: bool = False
    layout: Sequence[str] | None = None

    def __post_init__(self):
        # A layout of another type is left for the checks to refuse.
        if isinstance(self.layout, Sequence) and not isinstance(self.layout, str):
            object.__setattr__(self, "layout", tuple(self.layout))
        if isinstance(self.block, Mapping):
            object.__setattr__(self, "block", dict(self.block))

    def __hash__(self) -> int:
        values = (getattr(self, field.name) for field in fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in values))
