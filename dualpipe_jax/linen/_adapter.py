"""Flax Linen modules as a pipelined model, opt-in: `import dualpipe_jax` alone imports no Flax.

In: modules for the embedding, a layer and the head; or the parameters of a model with layers of its
own. Out: a `dualpipe_jax.Model`, with `init` for its parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from dualpipe_jax import _errors
from dualpipe_jax._errors import call, raise_all, show
from dualpipe_jax._model import checks
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model import stacks as _stacks
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Context, Model, PyTree
from dualpipe_jax.linen import _metadata as metadata
from dualpipe_jax.linen import _overwriting as overwriting
from dualpipe_jax.linen._layers import to_canonical as to_canonical
from dualpipe_jax.linen._layers import to_flax as to_flax
from dualpipe_jax.linen._part import Part, part_of

__all__ = ["LinenModel", "model", "to_canonical", "to_flax"]


def model(
    *,
    embed: Any,
    block: Any,
    head: Any,
    loss: Callable[[Any, PyTree], Any] | None = None,
    weight: Callable[[PyTree], Any] | None = None,
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
    """Makes a pipelined model of three Linen modules.

    Each of `embed`, `block` and `head` is one of

    - a Module: called as `embed(microbatch)`, `block(x)`, and `head(x)` if there is a `loss`, else
      `head(x, microbatch)`;
    - a method of a Module, `ends.head`: called with the same arguments;
    - a pair of a Module and a function of it, called as those of `dualpipe_jax.Model`, the module,
      bound to its parameters, in place of the parameters: `(gpt, lambda gpt, ctx: ...)` for
      embed, `(layer, lambda layer, x, ctx: ...)` for block, and so for head.

    Embed and head share their parameters if they are of the very same Module (tied embeddings):
    `params["ends"]` is then that module's parameters, otherwise `{"embed": ..., "head": ...}`.

    Args:
      embed: The first thing: what makes x, any pytree of arrays, of a microbatch.
      block: One layer, which returns x with the structure, shapes and dtypes with which it came. A
        dict of such, by name, for layers of different kinds.
      head: The last thing: what makes logits (with `loss`), or the loss, of x.
      loss: `(what head returns, microbatch) -> loss`, a floating-point scalar.
      weight: As `Model.weight`.
      has_aux: Whether loss (or head, without loss) returns `(loss, metrics)`, as in `Model`.
      block_has_aux: Whether block returns `(x, aux_loss)`, as in `Model`.
      layout: As `Model.layout`.
      embed_kwargs: More arguments for every call of embed, such as `{"deterministic": False}`.
      block_kwargs: More arguments for every call of block.
      head_kwargs: More arguments for every call of head.
      rngs: The names of the streams of random keys. Stream i gets `fold_in(ctx.rng, i)`: a key for
        each microbatch and layer, the same in every schedule. None without `rng=key` at the call.
      constants: Variables that are no parameters, as `LinenModel.with_constants` takes them.
      axis: The name that metadata gets for the layers' dim (see `LinenModel.init`).

    Returns:
      A LinenModel: a `dualpipe_jax.Model` for `value_and_grad`, `evaluate` and `sequential`, with
      `init` for the parameters.

    Raises:
      TypeError: If a part is none of what it may be.
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
    streams, layout = _errors.names("rngs", rngs), _kinds.layout_of(layout)
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

    def part(name: str, value: Any, kwargs: Mapping[str, Any] | None, microbatch: bool) -> Part:
        options = {"kwargs": dict(kwargs or {}), "rngs": streams, "takes_microbatch": microbatch}
        return part_of(name, value, **options)

    given = block if isinstance(block, Mapping) else {None: block}
    blocks = {
        kind: part("block" if kind is None else f"block[{kind!r}]", value, block_kwargs, False)
        for kind, value in given.items()
    }
    parts = _Parts(
        embed=part("embed", embed, embed_kwargs, True),
        blocks=blocks,
        head=part("head", head, head_kwargs, loss is None),
        loss=loss,
        layout=layout,
        constants=_constants({} if constants is None else constants),
        axis=_errors.name("axis", axis),
    )
    functions = {kind: parts.block_of(kind) for kind in blocks}
    return LinenModel(
        embed=parts.run_embed,
        block=functions.get(None, functions),
        head=parts.run_head,
        weight=weight,
        has_aux=has_aux,
        block_has_aux=block_has_aux,
        layout=layout,
        parts=parts,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LinenModel(Model):
    """A `Model` of Linen modules; `model` makes it."""

    parts: "_Parts"

    def init(self, key: jax.Array, batch: PyTree, *, num_layers: int | None = None) -> PyTree:
        """Initialises the parameters; under `jax.jit` too.

        With `keys = jax.random.split(key, num_layers + 2)`, layer l is initialised with `keys[l]`,
        embed with `keys[num_layers]` and head with `keys[num_layers + 1]`: as the modules' own
        `init` does, one after the other. (If embed and head are of one module: with
        `keys[num_layers]`, in a call of both.) Every layer is called with what embed returns.

        Args:
          key: One key.
          batch: A batch, of any number of rows; arrays or `jax.ShapeDtypeStruct`s.
          num_layers: How many layers; may be left out with a layout.

        Returns:
          `{"ends": ..., "blocks": ...}`, plain dicts of what Flax calls "params": leaves of blocks
          are `[num_layers, ...]`. Boxes of `nn.with_partitioning` stay, and those of blocks have
          `axis` as the name of their first dim, so that `nn.get_partition_spec` lays the layers
          over the pipeline. What gradients overwrite (the scales of `flax.linen.fp8_ops`) stands
          among them, in ends and in the blocks of each kind, under `"_overwrite_with_gradient"`,
          where `value_and_grad` finds it (see `to_variables`).

        Raises:
          ValueError: If num_layers does not fit the layout, or if the modules have variables that
            are no parameters (see `init_variables`).
          TypeError: If num_layers is no integer.
        """
        collections = self.init_variables(key, batch, num_layers=num_layers)
        others = sorted(set(collections) - {"params", *self.parts.constants})
        if others:
            raise ValueError(
                f"init: the modules have variables that are no parameters, {others}. Constants, "
                "which a call only reads: make them with model.init_variables, and give all but "
                '"params" to model.with_constants. What a call changes, such as the running '
                "statistics of BatchNorm, cannot be kept in a pipeline: use layers without "
                "(LayerNorm, GroupNorm). What modules sow is not collected: return it as an aux "
                "loss (block_has_aux)"
            )
        return collections["params"]

    def init_variables(
        self, key: jax.Array, batch: PyTree, *, num_layers: int | None = None
    ) -> dict[str, PyTree]:
        """As `init`, with all collections: `{"params": {"ends": ..., "blocks": ...}, ...}`.

        What gradients overwrite is among the parameters, as `init` has it.

        Raises:
          ValueError: As `init`; variables that are no parameters are returned with the others.
        """
        kinds = self.parts.kinds(num_layers)
        batch = jax.tree.map(
            lambda leaf: (
                jnp.zeros(leaf.shape, leaf.dtype)
                if isinstance(leaf, jax.ShapeDtypeStruct)
                else jnp.asarray(leaf)
            ),
            batch,
        )
        collections = self.parts.init(key, batch, kinds)
        found = {
            name: collections.pop(name)
            for name in ("params", OVERWRITE_WITH_GRADIENT)
            if name in collections
        }
        return {"params": self.to_params(found), **collections}

    def to_variables(self, params: PyTree) -> dict[str, PyTree]:
        """Puts what gradients overwrite beside the parameters, as Flax has its collections.

        The form that `flax.training.train_state.TrainState` takes: its optimizer sees the
        parameters alone, and what is overwritten takes the place of what was.

        Args:
          params: The parameters, as `init` returns them, or gradients of them.

        Returns:
          `{"params": ..., "_overwrite_with_gradient": ...}`, each `{"ends": ..., "blocks": ...}`;
          without the second if there is nothing of it.

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
        return overwriting.to_variables(params, kinds=self.parts.blocks)

    def to_params(self, variables: Mapping[str, PyTree]) -> PyTree:
        """Puts what gradients overwrite among the parameters, where a pipeline takes it.

        The inverse of `to_variables`.

        Args:
          variables: What `to_variables` returns, or what `to_canonical` makes of all variables of
            a Flax model: `{"params": ..., "_overwrite_with_gradient": ...}`.

        Returns:
          `{"ends": ..., "blocks": ...}`, as `init` returns it.

        Raises:
          ValueError: If the variables are not of that form, or if there are other collections.
        """
        return overwriting.to_params(variables, kinds=self.parts.blocks)

    def with_constants(self, constants: Mapping[str, PyTree]) -> "LinenModel":
        """Makes the same model with variables that its calls read and never change.

        Args:
          constants: Collections by name, each `{"ends": ..., "blocks": ...}` as `init_variables`
            returns them. All devices hold those of all layers, and none has a gradient.

        Raises:
          ValueError: If parameters are among them, or if they are not of that form.
          TypeError: If it is no dict.
        """
        parts = replace(self.parts, constants=_constants(constants))
        block = {kind: parts.block_of(kind) for kind in parts.blocks}
        return replace(
            self,
            embed=parts.run_embed,
            block=block.get(None, block),
            head=parts.run_head,
            parts=parts,
        )


def _constants(collections: Mapping[str, PyTree]) -> dict[str, PyTree]:
    if not isinstance(collections, Mapping):
        raise TypeError(
            "constants: must be a dict of collections of variables by name, as "
            f"model.init_variables returns them; got {show(collections)}"
        )
    if "params" in collections:
        raise ValueError(
            'constants: must be without "params", which go to the pipeline as its params'
        )
    if OVERWRITE_WITH_GRADIENT in collections:
        raise ValueError(
            f"constants: must be without {OVERWRITE_WITH_GRADIENT!r}, whose gradients are its next "
            "values; it goes to the pipeline with its params (model.to_params)"
        )
    raise_all(
        'constants: every collection must be {"ends": .., "blocks": ..}, as model.init_variables '
        "returns it",
        (
            f"{name!r} is {show(tree)}"
            for name, tree in collections.items()
            if not isinstance(tree, Mapping) or set(tree) != {"ends", "blocks"}
        ),
    )
    return _stacks.as_constants(dict(collections))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Parts:
    """The modules of a model, as functions of canonical parameters."""

    embed: Part
    blocks: dict[Kind, Part]
    head: Part
    loss: Callable[[Any, PyTree], Any] | None
    layout: tuple[str, ...] | None
    constants: dict[str, PyTree]
    axis: str

    def __post_init__(self):
        whole = (self.embed.function or self.embed.method, self.head.function or self.head.method)
        if self.is_tied and None in whole:
            raise ValueError(
                "embed, head: are one Module, so that they share parameters; one of them at least "
                "must be a method of it (ends.embed), or a pair of it and a function"
            )

    @property
    def is_tied(self) -> bool:
        """Whether embed and head share their parameters."""
        return self.embed.module is self.head.module

    @cached_property
    def places(self) -> np.ndarray | None:
        """The place of every layer among those of its kind; None if that is its index."""
        if self.layout is None:
            return None
        return np.asarray(_kinds.places_of(self.layout), np.int32)

    def run_embed(self, ends: PyTree, ctx: Context) -> PyTree:
        """As `Model.embed`."""
        return self.embed.apply(self.variables_of_ends("embed", ends), ctx=ctx)

    def run_head(self, ends: PyTree, x: PyTree, ctx: Context) -> Any:
        """As `Model.head`."""
        out = self.head.apply(self.variables_of_ends("head", ends), x, ctx=ctx)
        if self.loss is None:
            return out
        return call("loss", "(logits, microbatch) -> scalar", self.loss, out, ctx.microbatch)

    def block_of(self, kind: Kind) -> Callable[[PyTree, PyTree, Context], Any]:
        """Gives a kind's block, as in `Model.block`."""

        def run_block(params: PyTree, x: PyTree, ctx: Context) -> Any:
            variables = overwriting.collections_of(params)
            for name, tree in self.constants.items():
                stack = tree["blocks"] if kind is None else tree["blocks"].get(kind, {})
                place = ctx.layer if self.places is None else jnp.asarray(self.places)[ctx.layer]
                variables[name] = jax.tree.map(lambda leaf, i=place: jnp.asarray(leaf)[i], stack)
            return self.blocks[kind].apply(variables, x, ctx=ctx)

        return run_block

    def variables_of_ends(self, name: str, params: PyTree) -> dict[str, PyTree]:
        """Picks the variables of embed, or of head."""
        constants = {c: tree["ends"] for c, tree in self.constants.items()}
        trees = {**overwriting.collections_of(params), **constants}
        return trees if self.is_tied else {c: tree.get(name, {}) for c, tree in trees.items()}

    def kinds(self, num_layers: int | None) -> tuple[Kind, ...]:
        """Gives the kind of every layer."""
        if self.layout is not None:
            if num_layers not in (None, len(self.layout)):
                raise ValueError(
                    f"num_layers={num_layers}: must be {len(self.layout)}, the length of layout; "
                    "leave it out"
                )
            return self.layout
        return (None,) * checks.positive_int("num_layers", num_layers)

    def init(self, key: jax.Array, batch: PyTree, kinds: tuple[Kind, ...]) -> dict[str, PyTree]:
        """Initialises all variables: collections of `{"ends": ..., "blocks": ...}`."""
        num_layers = len(kinds)
        keys = jax.random.split(key, num_layers + 2)
        embed_key, head_key = keys[num_layers], keys[num_layers + 1]
        ctx = Context(microbatch=batch, rng=embed_key)
        layer_ctx = replace(ctx, layer=jnp.int32(0))
        ends: dict[str, PyTree]
        if self.is_tied:

            def both(module: nn.Module, ctx: Context) -> PyTree:
                x = self.embed.run(module, ctx=ctx)
                self.head.run(module, x, ctx=ctx)
                return x

            x, ends = self.embed.init(embed_key, ctx=ctx, run=both)
        else:
            x, of_embed = self.embed.init(embed_key, ctx=ctx)
            _, of_head = self.head.init(head_key, x, ctx=ctx)
            ends = {
                name: {
                    part: variables[name]
                    for part, variables in {"embed": of_embed, "head": of_head}.items()
                    if name in variables
                }
                for name in {**of_embed, **of_head}
            }
        stacks = {}
        for kind, part in self.blocks.items():
            chosen = keys[np.asarray([i for i, k in enumerate(kinds) if k == kind], np.int32)]
            # One after the other, and not by vmap: some random generators give other numbers there.
            stack = jax.lax.map(lambda k, part=part: part.init(k, x, ctx=layer_ctx)[1], chosen)
            stacks[kind] = metadata.add_name(stack, 0, self.axis)
        collections = dict.fromkeys(["params", *ends, *(n for s in stacks.values() for n in s)])
        return {
            name: {
                "ends": ends.get(name, {}),
                "blocks": stacks[None].get(name, {})
                if None in stacks
                else {kind: stack.get(name, {}) for kind, stack in stacks.items()},
            }
            for name in collections
        }
