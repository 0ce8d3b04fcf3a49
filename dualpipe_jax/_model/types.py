"""What a user hands over (`Model`), what their functions are given, and what these return."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax

PyTree = Any
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
# A mesh axis, or several.
AxisNames = str | tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """What a model function may look at besides its parameters and its input.

    Attributes:
      microbatch: This microbatch's slice of `batch`: the same pytree, leaves of shape
        `[batch_size / num_microbatches, ...]`.
      layer: The global layer index, an int32 scalar, in blocks; None in embed and head.
      rng: A key for this microbatch and layer, the same in every schedule; None without `rng=`.
        With `k = jax.random.fold_in(rng, m)`, block `l` gets `fold_in(k, l)`, embed
        `fold_in(k, num_layers)` and head `fold_in(k, num_layers + 1)`.
      shared: `params["shared"]`, parameters that all blocks (and embed and head) may use; None
        without. Their gradient is the sum over all uses.
    """

    microbatch: PyTree
    layer: jax.Array | None = None
    rng: jax.Array | None = None
    shared: PyTree = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Aux:
    """What a block may return beside x, as `(x, Aux(...))`.

    Attributes:
      loss: A floating-point scalar, or None. Summed over layers, averaged over microbatches, never
        weighted, and added to the loss.
      metrics: Any pytree of arrays, such as the tokens that each expert got. They have no
        gradient, and come back summed over microbatches (and shards of the batch) and stacked by
        layer, in `Metrics.blocks`. Over one of manual_axes that is not one of batch_axes, all
        devices must come to the same metrics.

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
    """What comes back beside the loss where blocks give metrics.

    All is summed over microbatches, floats in float32 or wider, integers and bools in int32 or
    wider.

    Attributes:
      head: The metrics of head, or None without `Model.has_aux`.
      blocks: The metrics of the blocks, stacked by layer, `[num_layers, ...]`, in model order; with
        `Model.layout` a dict with such stacks for each kind whose block gives metrics.
    """

    head: PyTree = None
    blocks: PyTree = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as pure functions, from which every schedule builds its stages.

    Attributes:
      embed: `(ends, ctx) -> x`, the first thing, on the first stage. `x` is any pytree of arrays.
      block: `(block_params, x, ctx) -> x`, one layer; its parameters come without the layer dim,
        and `x` leaves with the structure, shapes and dtypes with which it came. It may return
        `(x, Aux(loss=..., metrics=...))`, a loss and metrics of its own. A dict of such functions,
        by name, for layers of different kinds.
      head: `(ends, x, ctx) -> loss`, the last thing, on the last stage: a floating-point scalar.
      weight: `(microbatch) -> scalar`, or None. With it the loss is sum(head) / sum(weight) over
        the microbatches, and head returns a sum; without it the loss is the mean of head.
      has_aux: Whether head returns `(loss, metrics)`; metrics are summed over microbatches.
      block_has_aux: Whether block returns `(x, aux_loss)`, short for `(x, Aux(loss=aux_loss))`. It
        holds for all kinds.
      layout: The name of the kind of every layer, in model order, where block is a dict; else None.

    Layers of different kinds, such as dense layers before expert layers, are a block for each kind
    and a layout. `params["blocks"]` is then a dict with a stack for each kind, `[number of layers
    of the kind, ...]`, in model order: no kind's parameters are padded to another's. `ctx.layer`
    counts the layers of all kinds. (One block can also choose by `ctx.layer`, with `jax.lax.cond`,
    but every layer then holds the parameters of all.)

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

    embed: Callable[..., PyTree]
    block: Callable[..., PyTree] | Mapping[str, Callable[..., PyTree]]
    head: Callable[..., PyTree]
    weight: Callable[[PyTree], Any] | None = None
    has_aux: bool = False
    block_has_aux: bool = False
    layout: Sequence[str] | None = None

    def __post_init__(self):
        # What is no sequence of names is left as it is, for the checks to name.
        if isinstance(self.layout, Sequence) and not isinstance(self.layout, str):
            object.__setattr__(self, "layout", tuple(self.layout))
        if isinstance(self.block, Mapping):
            object.__setattr__(self, "block", dict(self.block))

    def __hash__(self) -> int:
        values = (getattr(self, field.name) for field in fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in values))
