"""Records where each leaf's gradient is added up, and turns accumulators into gradients.

In: `Leaf`s, and the axes that the trace of each function reports. Out: a tree of `LeafGradient`s
like the parameters, each with the entry of its accumulator; and `GradIndex`, the entries to which
one action adds.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._leaves.leaf import Leaf
from dualpipe_jax._leaves.pick import pick
from dualpipe_jax._leaves.rules import Rule
from dualpipe_jax._model import varying
from dualpipe_jax._model.types import PyTree


@dataclass(frozen=True, eq=False, kw_only=True)
class LeafGradient:
    """Records where one leaf's gradient is added up, and over which axes it is summed at the end.

    Attributes:
      leaf: The leaf.
      entry: The entry of its accumulator: in those of ends, of shared, or of the layers of its
        kind. None if it has none, as it is not wanted or no layer uses it.
      reduce_axes: The manual axes over which the sum of all its uses is still to be summed.
      is_unused: Whether it is to be overwritten, and no function gives it a new value.
    """

    leaf: Leaf
    entry: int | None
    reduce_axes: tuple[str, ...] = ()
    is_unused: bool = False


# The mesh axes over which each of a list of gradients is still to be summed; None if it is zero.
Axes = Sequence[tuple[str, ...] | None]


def make_gradients(leaves: PyTree, uses: Iterable[tuple[Sequence[Leaf], Axes]]) -> PyTree:
    """Makes a tree like `leaves` with the `LeafGradient` of each.

    Args:
      leaves: The `Leaf`s of the parameters, those of blocks by kind.
      uses: For each function of the model the leaves of which it has gradients, and their axes.
    """
    axes_of: dict[Leaf, set[tuple[str, ...]]] = {leaf: set() for leaf in jax.tree.leaves(leaves)}
    for used, axes in uses:
        for leaf, of_use in zip(used, axes, strict=True):
            if of_use is not None:
                axes_of[leaf].add(of_use)

    def with_entries(part: PyTree) -> PyTree:
        entries = itertools.count()

        def make(leaf: Leaf) -> LeafGradient:
            found = axes_of[leaf]
            has_entry = leaf.wanted and (bool(found) or not leaf.is_layer)
            return LeafGradient(
                leaf=leaf,
                entry=next(entries) if has_entry else None,
                # Uses that differ are each summed at once.
                reduce_axes=next(iter(found)) if len(found) == 1 else (),
                is_unused=leaf.overwritten and not found,
            )

        return jax.tree.map(make, part)

    parts = {part: with_entries(tree) for part, tree in leaves.items() if part != "blocks"}
    blocks = {kind: with_entries(stack) for kind, stack in leaves["blocks"].items()}
    return {**parts, "blocks": blocks}


def sum_results(
    function: Callable[..., Any], axes: list[tuple[str, ...]], *, is_all: bool = False
) -> Callable[..., Any]:
    """Sums each of the gradients over its axes, if it has any.

    The gradients are the last result of `function`, or all of it.
    """
    if not any(axes):
        return function

    def run(*args: Any) -> Any:
        out = function(*args)
        *results, gradients = (out,) if is_all else out
        sums = [varying.sum_over(grad, of) for grad, of in zip(gradients, axes, strict=True)]
        return sums if is_all else (*results, sums)

    return run


def accumulated(gradients: PyTree) -> list[LeafGradient]:
    """Lists the leaves that have an accumulator, in the order of their entries."""
    return [gradient for gradient in jax.tree.leaves(gradients) if gradient.entry is not None]


def pick_accumulated(gradients: PyTree, values: PyTree) -> list[Any]:
    """Lists the values, one for each leaf, of the leaves that have an accumulator."""
    return pick(values, [gradient.entry is not None for gradient in jax.tree.leaves(gradients)])


def combine(gradients: Sequence[LeafGradient], totals: Sequence[jax.Array]) -> list[jax.Array]:
    """Combines each total over its leaf's axes; where a gradient is sharded a device gets its part.

    Sums over the same axes go into one collective.
    """
    scattered = [
        gradient.leaf.scatter(total, (*gradient.leaf.sum_axes, *gradient.reduce_axes))
        for gradient, total in zip(gradients, totals, strict=True)
    ]
    parts = [part for part, _ in scattered]
    for axes in dict.fromkeys(axes for _, axes in scattered):
        entries = [i for i, (_, rest) in enumerate(scattered) if rest == axes]
        sums = varying.sum_over([parts[i] for i in entries], axes)
        for i, total in zip(entries, sums, strict=True):
            parts[i] = total
    return parts


def gradients_of(
    gradients: PyTree, values: PyTree, totals: Sequence[jax.Array], *, num_layers: int = 1
) -> PyTree:
    """Makes a device's part of each leaf's gradient; None for a leaf that gets none.

    Args:
      gradients: A tree of `LeafGradient`s.
      values: The leaves on this device; of blocks, stacks of them.
      totals: The accumulators by entry, combined over devices.
      num_layers: For blocks, the layers of a gradient's part.
    """

    def one(gradient: LeafGradient, value: jax.Array) -> jax.Array | None:
        if not gradient.leaf.wanted:
            return None
        if gradient.entry is None:
            return gradient.leaf.zero_grad((num_layers, *value.shape[1:]), value.dtype)
        total = totals[gradient.entry]
        return jnp.zeros_like(total) if gradient.is_unused else total

    return jax.tree.map(one, gradients, values)


@dataclass(frozen=True, kw_only=True)
class GradIndex:
    """Lists the accumulators to which an action adds gradients: a layer's, then shared ones.

    Attributes:
      layer: Entries among the accumulators of a layer.
      shared: Entries among the accumulators of shared.
      rules: How each gradient of the layer is added up.
    """

    layer: tuple[int, ...]
    shared: tuple[int, ...]
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, gradients: Sequence[LeafGradient]) -> "GradIndex":
        """Finds the entries of a layer's gradients, and of shared ones."""
        entries = [
            (gradient.leaf, gradient.entry) for gradient in gradients if gradient.entry is not None
        ]
        assert len(entries) == len(gradients), "a gradient without an accumulator"
        return cls(
            layer=tuple(entry for leaf, entry in entries if leaf.is_layer),
            shared=tuple(entry for leaf, entry in entries if not leaf.is_layer),
            rules=tuple(leaf.rule for leaf, _ in entries if leaf.is_layer),
        )

    def join(self, other: "GradIndex") -> "GradIndex":
        """Joins the entries of two actions; some may be of both."""
        layer = (*self.layer, *other.layer)
        rule_of = dict(zip(layer, (*self.rules, *other.rules), strict=True))
        return GradIndex(
            layer=tuple(sorted(rule_of)),
            shared=tuple(sorted({*self.shared, *other.shared})),
            rules=tuple(rule_of[i] for i in sorted(rule_of)),
        )
