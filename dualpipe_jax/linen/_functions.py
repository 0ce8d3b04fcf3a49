"""The functions of a `Model`, made of Linen modules, and the initialisation of their variables.

In: the parts of a model. Out: `ModelFunctions`: embed, a block for each kind and head, as functions
of canonical parameters, `{"ends": ..., "blocks": ...}`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._model.checks import positive_int
from dualpipe_jax._model.kinds import Kind, as_constants, index_in_stack, take_layer, unwrap_kinds
from dualpipe_jax._model.types import Batch, Block, Context, PyTree
from dualpipe_jax._model.users_call import call
from dualpipe_jax.linen._metadata import add_name
from dualpipe_jax.linen._overwriting import collections_of
from dualpipe_jax.linen._part import Part

_MOST_LAYERS = 10**6


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelFunctions:
    """Runs and initialises the modules of a model on canonical parameters.

    Attributes:
      embed: The module of embed.
      blocks: The module of each kind of layer.
      head: The module of head; that of embed if they share their parameters.
      loss: `(outputs of head, microbatch) -> loss`; None if head returns the loss.
      layout: The kind of every layer, or None.
      constants: Collections of variables that calls only read, by name, each
        `{"ends": ..., "blocks": ...}`.
      axis: The name of the layers' dim in metadata.
    """

    embed: Part
    blocks: dict[Kind, Part]
    head: Part
    loss: Callable[[Any, PyTree], Any] | None
    layout: tuple[str, ...] | None
    constants: dict[str, PyTree]
    axis: str

    def __post_init__(self) -> None:
        named = (self.embed.function or self.embed.method, self.head.function or self.head.method)
        if self.is_tied and None in named:
            raise ValueError(
                "embed, head: are one Module, so that they share parameters; at least one of them "
                "must be a method of it (ends.embed), or a pair of it and a function"
            )

    @property
    def is_tied(self) -> bool:
        """Whether embed and head share their parameters."""
        return self.embed.module is self.head.module

    def run_embed(self, ends: PyTree, ctx: Context) -> PyTree:
        """As `Model.embed`."""
        return self.embed.apply(self._variables_of_ends("embed", ends), ctx=ctx)

    def run_head(self, ends: PyTree, x: PyTree, ctx: Context) -> Any:
        """As `Model.head`."""
        out = self.head.apply(self._variables_of_ends("head", ends), x, ctx=ctx)
        if self.loss is None:
            return out
        return call("loss", "(logits, microbatch) -> scalar", self.loss, out, ctx.microbatch)

    @property
    def block(self) -> Block | dict[str, Block]:
        """As `Model.block`."""
        functions: Any = unwrap_kinds({kind: self._block_of(kind) for kind in self.blocks})
        return functions

    def _block_of(self, kind: Kind) -> Block:
        def run_block(params: PyTree, x: PyTree, ctx: Context) -> Any:
            assert ctx.layer is not None
            variables = collections_of(params)
            for name, tree in self.constants.items():
                stack = tree["blocks"] if kind is None else tree["blocks"].get(kind, {})
                index = ctx.layer
                if self.layout is not None:
                    index = index_in_stack(self.layout, index)
                variables[name] = take_layer(jax.tree.map(jnp.asarray, stack), index)
            return self.blocks[kind].apply(variables, x, ctx=ctx)

        return run_block

    def _variables_of_ends(self, name: str, params: PyTree) -> dict[str, PyTree]:
        """Picks the variables of embed, or of head."""
        constants = {c: tree["ends"] for c, tree in self.constants.items()}
        trees = {**collections_of(params), **constants}
        return trees if self.is_tied else {c: tree.get(name, {}) for c, tree in trees.items()}

    def kinds(self, num_layers: int | None) -> tuple[Kind, ...]:
        """Gives the kind of every layer.

        Raises:
          ValueError: If num_layers does not fit the layout.
          TypeError: If num_layers is no integer.
        """
        if self.layout is not None:
            if num_layers not in (None, len(self.layout)):
                raise ValueError(
                    f"num_layers={num_layers}: must be {len(self.layout)}, the length of layout; "
                    "leave it out"
                )
            return self.layout
        number = positive_int("num_layers", num_layers)
        if number > _MOST_LAYERS:
            raise ValueError(
                f"num_layers={brief(num_layers)}: must be at most {_MOST_LAYERS:,}, as each layer "
                "is initialised with a key of its own; make a model of fewer layers"
            )
        return (None,) * number

    def init(self, key: jax.Array, batch: Batch, kinds: tuple[Kind, ...]) -> dict[str, PyTree]:
        """Initialises all variables: collections of `{"ends": ..., "blocks": ...}`.

        Args:
          key: One key.
          batch: A batch of arrays.
          kinds: The kind of every layer.
        """
        keys = jax.random.split(key, len(kinds) + 2)
        x, ends = self._init_ends(batch, embed_key=keys[len(kinds)], head_key=keys[len(kinds) + 1])
        ctx = Context(microbatch=batch, rng=keys[len(kinds)], layer=jnp.int32(0))
        stacks = {}
        for kind, part in self.blocks.items():
            chosen = keys[np.asarray([i for i, k in enumerate(kinds) if k == kind], np.int32)]
            # One after the other: under vmap some random generators give other numbers.
            stack = jax.lax.map(lambda k, part=part: part.init(k, x, ctx=ctx)[1], chosen)
            stacks[kind] = add_name(stack, 0, self.axis)
        collections = dict.fromkeys(["params", *ends, *(n for s in stacks.values() for n in s)])
        return {
            name: {
                "ends": ends.get(name, {}),
                "blocks": unwrap_kinds({kind: s.get(name, {}) for kind, s in stacks.items()}),
            }
            for name in collections
        }

    def _init_ends(
        self, batch: Batch, *, embed_key: jax.Array, head_key: jax.Array
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """Initialises embed and head; returns x, and the collections of their variables."""
        ctx = Context(microbatch=batch, rng=embed_key)
        if self.is_tied:

            def both(module: nn.Module, ctx: Context) -> PyTree:
                x = self.embed.run(module, ctx=ctx)
                self.head.run(module, x, ctx=ctx)
                return x

            return self.embed.init(embed_key, ctx=ctx, run=both)
        x, of_embed = self.embed.init(embed_key, ctx=ctx)
        _, of_head = self.head.init(head_key, x, ctx=ctx)
        return x, {
            name: {
                part: variables[name]
                for part, variables in {"embed": of_embed, "head": of_head}.items()
                if name in variables
            }
            for name in {**of_embed, **of_head}
        }


def check_constants(collections: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Requires collections of `{"ends": ..., "blocks": ...}`; returns them as host arrays.

    Raises:
      ValueError: If parameters are among them, or if they are not of that form.
      TypeError: If it is no dict.
    """
    if not isinstance(collections, Mapping):
        raise TypeError(
            "constants: must be a dict of collections of variables by name, as "
            f"model.init_variables returns them; got {show(collections)}"
        )
    if "params" in collections:
        raise ValueError(
            'constants: must not hold "params"; give these to the pipeline as its params'
        )
    if OVERWRITE_WITH_GRADIENT in collections:
        raise ValueError(
            f"constants: must not hold {OVERWRITE_WITH_GRADIENT!r}, whose gradients are its next "
            "values; give it to the pipeline with its params (model.to_params)"
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
    return as_constants(dict(collections))
