"""How each leaf of the parameters is treated: whether it gets a gradient, and how it lies.

Leaves stand in lists, as `jax.tree.leaves` gives them, those of blocks by kind of layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax import _kinds, _parameters, _varying
from dualpipe_jax._executor.explicit import explicit_axes, sharding_like
from dualpipe_jax._executor.leaves import pick
from dualpipe_jax._kinds import Kind
from dualpipe_jax._types import Model, PyTree

# Lists for the parts of params: {"ends": [...], "blocks": {kind: [...]}}, and "shared" or not.
Parts = dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What is to be done with each leaf.

    Attributes:
      mesh: The mesh.
      axis: The pipeline axis.
      batch_axes: The axes over which the batch is sharded.
      manual_axes: The axes of which the model's functions use collectives.
      wanted: Whether each leaf gets a gradient.
      specs: How each leaf lies over the manual axes.
      gather_dims: The dim of each leaf outside of blocks that lies over the pipeline axis, or -1:
        such a leaf is gathered once, and its gradient scattered.
      leads: The axis over which the layers' dim of each kind's stack lies, or None.
    """

    mesh: Mesh | AbstractMesh
    axis: str
    batch_axes: tuple[str, ...]
    manual_axes: tuple[str, ...]
    wanted: Parts
    specs: Parts
    gather_dims: dict[str, list[int]]
    leads: dict[Kind, str | None]

    @property
    def loss_axes(self) -> tuple[str, ...]:
        """The manual axes over which microbatches, and so losses, differ."""
        return tuple(name for name in self.batch_axes if name in self.manual_axes)

    @property
    def over_mesh(self) -> Parts:
        """As `specs`, over all the axes that the step names."""
        blocks = {
            kind: [PartitionSpec(self.leads[kind], *spec[1:]) for spec in specs]
            for kind, specs in self.specs["blocks"].items()
        }
        outside = {
            part: [
                _along(spec, self.axis, dim)
                for spec, dim in zip(self.specs[part], dims, strict=True)
            ]
            for part, dims in self.gather_dims.items()
        }
        return {**outside, "blocks": blocks}

    def gather(self, outside: dict[str, PyTree]) -> dict[str, PyTree]:
        """Gathers the leaves outside of blocks that lie over the pipeline axis."""

        def part_of(tree: PyTree, dims: list[int]) -> PyTree:
            leaves, structure = jax.tree.flatten(tree)
            whole = [
                lax.all_gather(leaf, self.axis, axis=dim, tiled=True)
                if dim >= 0 and self.mesh.shape[self.axis] > 1
                else leaf
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            return jax.tree.unflatten(structure, whole)

        return {part: part_of(tree, self.gather_dims[part]) for part, tree in outside.items()}

    def of_wanted(self, values: Parts) -> Parts:
        """Selects from a value for each leaf those of the leaves that get a gradient."""
        return {
            part: {k: pick(v, self.wanted["blocks"][k]) for k, v in values["blocks"].items()}
            if part == "blocks"
            else pick(values[part], self.wanted[part])
            for part in values
        }

    def summed_over(self, specs: list[PartitionSpec]) -> list[tuple[str, ...]]:
        """Lists for each leaf the batch axes over which its gradient is summed."""
        return [
            tuple(name for name in self.batch_axes if name not in _parameters.axes_of(spec))
            for spec in specs
        ]

    def local_avals(self, tree: PyTree, specs: list[PartitionSpec], *, skip: int = 0) -> PyTree:
        """Makes avals of a device's part of the leaves, without the first `skip` dims."""
        leaves, structure = jax.tree.flatten(tree)
        avals = []
        for leaf, spec in zip(leaves, specs, strict=True):
            shape = _parameters.local_shape(leaf.shape, spec, self.mesh)
            plain = jax.ShapeDtypeStruct(shape[skip:], leaf.dtype)
            # Where microbatches differ, so do a parameter's gradients: they are summed once, last.
            avals.append(_varying.aval(plain, {*_parameters.axes_of(spec), *self.loss_axes}))
        return jax.tree.unflatten(structure, avals)

    def stack_shardings(self) -> dict[Kind, NamedSharding]:
        """Makes shardings over Explicit axes of what is stacked as the layers of each kind are."""
        explicit = explicit_axes(self.mesh)
        return {
            kind: NamedSharding(self.mesh, PartitionSpec(lead if lead in explicit else None))
            for kind, lead in self.leads.items()
        }

    def grad_shardings(self, params: Parts) -> Parts:
        """Makes shardings of the gradients over Explicit axes: as their parameters lie."""

        def one(leaf: Any, spec: PartitionSpec, dim: int) -> NamedSharding:
            mine = {self.axis, *self.batch_axes} - set(_parameters.axes_of(spec))
            over = None if dim < 0 else (self.axis, dim)
            after = _parameters.axes_of(spec)
            return sharding_like(leaf, mesh=self.mesh, without=tuple(mine), over=over, after=after)

        def of(tree: PyTree, specs: Iterable[PartitionSpec], dims: Iterable[int]) -> list[Any]:
            each = zip(jax.tree.leaves(tree), specs, dims, strict=True)
            return [one(leaf, spec, dim) for leaf, spec, dim in each]

        blocks = {}
        for kind, stack in params["blocks"].items():
            specs = self.specs["blocks"][kind]
            blocks[kind] = of(stack, specs, [-1 if self.leads[kind] is None else 0] * len(specs))
        outside = {
            part: of(params[part], self.specs[part], dims)
            for part, dims in self.gather_dims.items()
        }
        return self.of_wanted({**outside, "blocks": blocks})


def _along(spec: PartitionSpec, axis: str, dim: int) -> PartitionSpec:
    """Has a dim, if it is not -1, lie over one more axis, within the parts that it has."""
    if dim < 0:
        return spec
    entry = spec[dim]
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return PartitionSpec(*spec[:dim], (*names, axis), *spec[dim + 1 :])


def by_kind(model: Model, blocks: PyTree, values: list[Any]) -> dict[Kind, list[Any]]:
    """Divides values for the leaves of `blocks` by the kinds whose stacks these are in."""
    structure = jax.tree.structure(blocks)
    places = jax.tree.unflatten(structure, range(structure.num_leaves))
    stacks = _kinds.stacks_of(model, places)
    return {kind: [values[i] for i in jax.tree.leaves(stack)] for kind, stack in stacks.items()}
