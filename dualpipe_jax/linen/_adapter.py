"""Flax Linen modules as a pipelined model.

In: modules for the embedding, a layer and the head. Out: a `dualpipe_jax.Model`, with `init` for
its parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from dualpipe_jax._errors import raise_all, require_name, require_names, show
from dualpipe_jax._model import call_checks, semantics
from dualpipe_jax._model.kinds import layout_of
from dualpipe_jax._model.types import Batch, Model, Params, PyTree, Weight
from dualpipe_jax.linen import _overwriting
from dualpipe_jax.linen._functions import ModelFunctions, check_constants
from dualpipe_jax.linen._part import Part, part_of


def model(
    *,
    embed: Any,
    block: Any,
    head: Any,
    loss: Callable[[Any, PyTree], Any] | None = None,
    weight: Weight | None = None,
    has_aux: bool = False,
    block_has_aux: bool = False,
    layout: Sequence[str] | None = None,
    embed_kwargs: Mapping[str, Any] | None = None,
    block_kwargs: Mapping[str, Any] | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
    constants: Mapping[str, PyTree] | None = None,
    axis: str = "pipe",
) -> "LinenModel":
    """Makes a pipelined model from three Linen modules.

    Each of `embed`, `block` and `head` is one of

    - a Module: called as `embed(microbatch)`, `block(x)`, and `head(x)` if there is a `loss`, else
      `head(x, microbatch)`;
    - a method of a Module, `ends.head`: called with the same arguments;
    - a pair of a Module and a function, called as the functions of `dualpipe_jax.Model`, but with
      the module, bound to its parameters, in place of the parameters: `(gpt, lambda gpt, ctx: ...)`
      for embed, `(layer, lambda layer, x, ctx: ...)` for block,
      `(gpt, lambda gpt, x, ctx: ...)` for head.

    Embed and head share their parameters if they are the same Module object (tied embeddings):
    `params["ends"]` is then that module's parameters, otherwise `{"embed": ..., "head": ...}`.

    Args:
      embed: The module that computes x, any pytree of arrays, from a microbatch.
      block: The module of one layer, which returns x with the structure, shapes and dtypes of the
        given one. Layers of different kinds need a dict of such modules, by the names of the kinds.
      head: The module that computes logits (with `loss`), or the loss, from x.
      loss: `(outputs of head, microbatch) -> loss`, a floating-point scalar.
      weight: As `Model.weight`.
      has_aux: Whether loss (or head, without loss) returns `(loss, metrics)`, as in `Model`.
      block_has_aux: Whether block returns `(x, aux_loss)`, as in `Model`.
      layout: As `Model.layout`.
      embed_kwargs: Further arguments of every call of embed, such as `{"deterministic": False}`.
      block_kwargs: Further arguments of every call of block.
      head_kwargs: Further arguments of every call of head.
      rngs: The names of the streams of random keys. Stream i gets `fold_in(ctx.rng, i)`: a key for
        each microbatch and layer, the same in every schedule; no keys without `rng=key` at the
        call.
      constants: Variables that are no parameters, as for `LinenModel.with_constants`.
      axis: The name of the layers' dim in metadata (see `LinenModel.init`).

    Returns:
      A LinenModel: a `dualpipe_jax.Model` for `value_and_grad`, `evaluate` and `sequential`, with
      `init` for the parameters.

    Raises:
      TypeError: If an argument has a wrong type.
      ValueError: If parts do not fit each other; at a call, if a module writes to a collection of
        variables (as BatchNorm does in training), or needs a key that it is not given.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, dualpipe_jax as dpj
    >>> def loss_of(logits, tokens):
    ...     return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()
    >>> model = dpj.linen.model(
    ...     embed=nn.Embed(7, 4),
    ...     block=nn.Sequential([nn.Dense(4), nn.tanh]),
    ...     head=nn.Dense(7),
    ...     loss=loss_of,
    ... )
    >>> tokens = jnp.arange(8).reshape(4, 2) % 7
    >>> params = model.init(jax.random.key(0), tokens, num_layers=3)
    >>> jax.tree.map(jnp.shape, params["blocks"])
    {'layers_0': {'bias': (3, 4), 'kernel': (3, 4, 4)}}
    >>> bool(jnp.isfinite(dpj.sequential(model, num_microbatches=2)(params, tokens)))
    True
    """
    streams, layout = require_names("rngs", rngs), layout_of(layout)
    given_kwargs = {"embed": embed_kwargs, "block": block_kwargs, "head": head_kwargs}
    raise_all(
        "embed_kwargs, block_kwargs, head_kwargs: must be dicts of arguments by name, or None",
        (
            f"{part}_kwargs is {show(kwargs)}"
            for part, kwargs in given_kwargs.items()
            if not (kwargs is None or isinstance(kwargs, Mapping))
            or not all(isinstance(key, str) for key in kwargs or ())
        ),
        error=TypeError,
    )
    if loss is not None and not callable(loss):
        raise TypeError(f"loss={show(loss)}: must be a function (logits, microbatch) -> scalar")

    def part(argument: str, value: Any, kwargs: Mapping[str, Any] | None, microbatch: bool) -> Part:
        options = {"kwargs": dict(kwargs or {}), "rngs": streams, "takes_microbatch": microbatch}
        return part_of(argument, value, **options)

    blocks = block if isinstance(block, Mapping) else {None: block}
    functions = ModelFunctions(
        embed=part("embed", embed, embed_kwargs, True),
        blocks={
            kind: part("block" if kind is None else f"block[{kind!r}]", value, block_kwargs, False)
            for kind, value in blocks.items()
        },
        head=part("head", head, head_kwargs, loss is None),
        loss=loss,
        layout=layout,
        constants=check_constants({} if constants is None else constants),
        axis=require_name("axis", axis),
    )
    return LinenModel(
        embed=functions.run_embed,
        block=functions.block,
        head=functions.run_head,
        weight=weight,
        has_aux=has_aux,
        block_has_aux=block_has_aux,
        layout=layout,
        functions=functions,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LinenModel(Model):
    """Describes a `Model` of Linen modules; `model` makes it."""

    functions: ModelFunctions

    def init(self, key: jax.Array, batch: Batch, *, num_layers: int | None = None) -> Params:
        """Initialises the parameters; under `jax.jit` too.

        With `keys = jax.random.split(key, num_layers + 2)`, layer l is initialised with `keys[l]`,
        embed with `keys[num_layers]` and head with `keys[num_layers + 1]`, as by the modules' own
        `init`. (One module for embed and head is initialised with `keys[num_layers]`, in a call of
        both.) Every layer is called with the output of embed.

        Args:
          key: One key.
          batch: A batch, of any number of rows; arrays or `jax.ShapeDtypeStruct`s.
          num_layers: The number of layers; may be left out with a layout.

        Returns:
          `{"ends": ..., "blocks": ...}`, plain dicts of Flax's "params" collections: leaves of
          blocks are `[num_layers, ...]`. Boxes of `nn.with_partitioning` stay, and those of blocks
          have `axis` as the name of their first dim, so that `nn.get_partition_spec` shards the
          layers over the pipeline. Variables that gradients overwrite (the scales of
          `flax.linen.fp8_ops`) are among them, in ends and in the blocks of each kind, under
          `"_overwrite_with_gradient"`, where `value_and_grad` finds them (see `to_variables`).

        Raises:
          ValueError: If num_layers does not fit the layout, or if the modules have variables that
            are no parameters (see `init_variables`).
          TypeError: If num_layers is no integer.
        """
        collections = self.init_variables(key, batch, num_layers=num_layers)
        others = sorted(set(collections) - {"params", *self.functions.constants})
        if others:
            raise ValueError(
                f"init: the modules have variables that are no parameters, {others}. Constants, "
                "which calls only read: make them with model.init_variables, and give all but "
                '"params" to model.with_constants. Variables that calls change, such as the '
                "running statistics of BatchNorm, cannot be kept in a pipeline: use layers without "
                "them (LayerNorm, GroupNorm). Sown values are not collected: return them as an aux "
                "loss (block_has_aux)"
            )
        return collections["params"]

    def init_variables(
        self, key: jax.Array, batch: Batch, *, num_layers: int | None = None
    ) -> dict[str, PyTree]:
        """Initialises all collections: `{"params": {"ends": ..., "blocks": ...}, ...}`.

        Arguments and parameters are as for `init`; variables that gradients overwrite are among the
        parameters.

        Raises:
          ValueError: If num_layers does not fit the layout.
          TypeError: If num_layers is no integer, key no key, or a leaf of batch no array.
        """
        call_checks.key(key, argument="key", is_optional=False)
        kinds = self.functions.kinds(num_layers)
        call_checks.arrays(semantics.pytree("batch", batch), "batch")
        batch = jax.tree.map(
            lambda leaf: (
                jnp.zeros(leaf.shape, leaf.dtype)
                if isinstance(leaf, jax.ShapeDtypeStruct)
                else jnp.asarray(leaf)
            ),
            batch,
        )
        collections = self.functions.init(key, batch, kinds)
        of_params = {
            collection: collections.pop(collection)
            for collection in ("params", OVERWRITE_WITH_GRADIENT)
            if collection in collections
        }
        return {"params": self.to_params(of_params), **collections}

    def to_variables(self, params: Params) -> dict[str, PyTree]:
        """Separates variables that gradients overwrite from the parameters, as Flax does.

        `flax.training.train_state.TrainState` takes this form: its optimizer sees the parameters
        alone, and the other variables are replaced by their gradients.

        Args:
          params: The parameters, as `init` returns them, or gradients of them.

        Returns:
          `{"params": ..., "_overwrite_with_gradient": ...}`, each `{"ends": ..., "blocks": ...}`;
          without the second if no gradient overwrites anything.

        Raises:
          ValueError: If the parameters are not of that form.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, dualpipe_jax as dpj
        >>> layer = nn.Dense(4, dot_general_cls=nn.fp8_ops.Fp8DirectDotGeneralOp)
        >>> model = dpj.linen.model(
        ...     embed=nn.Dense(4), block=layer, head=nn.Dense(1), loss=lambda y, _: (y**2).mean()
        ... )
        >>> params = model.init(jax.random.key(0), jnp.ones((2, 3)), num_layers=5)
        >>> sorted(params["blocks"])
        ['_overwrite_with_gradient', 'bias', 'kernel']
        >>> variables = model.to_variables(params)
        >>> jax.tree.map(jnp.shape, variables["params"]["blocks"])
        {'bias': (5, 4), 'kernel': (5, 4, 4)}
        >>> scales = variables["_overwrite_with_gradient"]["blocks"]["Fp8DirectDotGeneralOp_0"]
        >>> scales["kernel_scale"].shape
        (5, 1)
        >>> jax.tree.all(jax.tree.map(jnp.array_equal, model.to_params(variables), params))
        True
        """
        return _overwriting.to_variables(params, kinds=self.functions.blocks)

    def to_params(self, variables: Mapping[str, PyTree]) -> Params:
        """Joins variables that gradients overwrite to the parameters, as a pipeline takes them.

        The inverse of `to_variables`.

        Args:
          variables: The result of `to_variables`, or that of `to_canonical` for all variables of a
            Flax model: `{"params": ..., "_overwrite_with_gradient": ...}`.

        Returns:
          `{"ends": ..., "blocks": ...}`, as `init` returns it.

        Raises:
          ValueError: If the variables are not of that form, or if there are other collections.
        """
        return _overwriting.to_params(variables, kinds=self.functions.blocks)

    def with_constants(self, constants: Mapping[str, PyTree]) -> "LinenModel":
        """Makes the same model with variables that its calls read and never change.

        Args:
          constants: Collections by name, each `{"ends": ..., "blocks": ...}` as `init_variables`
            returns them. Each device holds the constants of all layers, and they have no gradient.

        Returns:
          The model; its other attributes are the same.

        Raises:
          ValueError: If parameters are among them, or if they are not of that form.
          TypeError: If it is no dict.
        """
        functions = replace(self.functions, constants=check_constants(constants))
        return replace(
            self,
            embed=functions.run_embed,
            block=functions.block,
            head=functions.run_head,
            functions=functions,
        )
