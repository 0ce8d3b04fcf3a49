"""A model's functions as one device runs them, and their derivatives: records that `trace` makes.

Each takes this device's part of everything, and may be called in any loop of the step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from dualpipe_jax._executor.accumulators import Places
from dualpipe_jax._leaves.rules import Rule
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.returns import Outputs
from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp import SplitVjp

PyTree = Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Arguments:
    """Avals of what the model's functions are given on one device.

    Attributes:
      outside: `{"ends": ...}`, and `"shared"` where there is one: parameters outside the stack.
      layers: The parameters of one layer of each kind.
      microbatch: One microbatch.
      rng: The step's key, or None.
      shard: The index of the shard of the batch, or None.
      wanted: For every leaf of ends and shared whether it gets a gradient.
      wanted_of_layers: The same for the leaves of a layer of each kind.
      overwritten: For every leaf of ends and shared whether its gradient overwrites it.
      overwritten_of_layers: The same for the leaves of a layer of each kind.
      loss_axes: The manual axes over which microbatches, and so losses, differ.
    """

    outside: dict[str, PyTree]
    layers: dict[Kind, PyTree]
    microbatch: PyTree
    rng: Any
    shard: Any
    wanted: dict[str, list[bool]]
    wanted_of_layers: dict[Kind, list[bool]]
    overwritten: dict[str, list[bool]]
    overwritten_of_layers: dict[Kind, list[bool]]
    loss_axes: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Functions:
    """The traced functions: either head and block, or what they and their derivatives are made of.

    Attributes:
      outputs: Avals of x, the loss, metrics and aux loss.
      embed: `(outside, ctx) -> x`.
      embeds_by_look_up: Whether that is so little work that every rank may as well do it.
      head: `(outside, x, ctx) -> (loss, metrics)`.
      output: `(outside, x, ctx) -> outputs`, in the place of head.
      block: For each kind of layer `((layer, shared), x, ctx) -> (y, Aux)`.
      gradients: The derivatives; None in forward-only programs.
    """

    outputs: Outputs
    embed: Callable[..., PyTree]
    embeds_by_look_up: bool = False
    head: Callable[..., tuple[jax.Array, PyTree]] | None = None
    output: Callable[..., PyTree] | None = None
    block: dict[Kind, Callable[..., tuple[PyTree, Aux]]] = field(default_factory=dict)
    gradients: "Gradients | None" = None

    @property
    def size_of_x(self) -> int:
        """Bytes of the largest leaf of x."""
        leaves = jax.tree.leaves(self.outputs.x)
        return max((leaf.size * leaf.dtype.itemsize for leaf in leaves), default=0)

    def casts(self, kind: Kind, tree: PyTree, *, after: PyTree = ()) -> list[jax.Array]:
        """Casts parameters as a kind's block would; among its own, they stand `after` others."""
        if self.gradients is None:
            return []
        leaves, first = jax.tree.leaves(tree), len(jax.tree.leaves(after))
        return self.gradients.block[kind].cast(leaves, range(first, first + len(leaves)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradients:
    """The derivatives of a model's functions.

    Attributes:
      embed: `(outside, ctx, dx) -> (None, doutside)`; dx has the leaves of x that have a cotangent,
        doutside those of outside that are wanted.
      head: `(outside, x, ctx, seed) -> ((loss, metrics, dx), doutside)`.
      block: For each kind of layer its block's forward and the halves of its backward; its
        gradients are those of the wanted leaves of the layer, then of shared.
      early: For each kind where the gradients that come with the input gradient are added up.
      late: The same of those that come with the weight gradient.
      both: The same of those that come with either.
      reduce_axes: For each of doutside, the manual axes over which what all uses add up to is still
        to be summed.
      outside_rules: How each of doutside is added up.
      embed_rules: The same for what embed gives; None for what is left out.
      head_rules: The same for what head gives.
      layer_rules: For each kind how the gradients of a layer that it has are added up.
    """

    embed: Callable[..., tuple[None, list[jax.Array]]]
    head: Callable[..., tuple[Any, list[jax.Array]]]
    block: dict[Kind, SplitVjp]
    early: dict[Kind, Places]
    late: dict[Kind, Places]
    both: dict[Kind, Places]
    reduce_axes: list[tuple[str, ...]]
    outside_rules: list[Rule]
    embed_rules: list[Rule | None]
    head_rules: list[Rule | None]
    layer_rules: dict[Kind, tuple[Rule, ...]]
