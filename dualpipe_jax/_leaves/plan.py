"""How each leaf of the parameters is treated: whether it gets a gradient, and how it lies.

Leaves stand in lists, as `jax.tree.leaves` gives them, those of blocks by kind of layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax._leaves import specs as _parameters
from dualpipe_jax._leaves.explicit_axes import explicit_axes, sharding_like
from dualpipe_jax._leaves.pick import pick, select
from dualpipe_jax._leaves.specs import Dims
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model import varying
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Model, PyTree

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
      overwritten: Whether its gradient is a new value, that overwrites it.
      specs: How each leaf lies over the manual axes.
      gathers: The dims of each leaf that lie over axes from which it is gathered, once.
      scatters: The dims of its gradient that are scattered over such axes, once: those, or more.
      leads: The axis over which the layers' dim of each kind's stack lies, or None.
    """

    mesh: Mesh | AbstractMesh
    axis: str
    batch_axes: tuple[str, ...]
    manual_axes: tuple[str, ...]
    wanted: Parts
    overwritten: Parts
    specs: Parts
    gathers: Parts
    scatters: Parts
    leads: dict[Kind, str | None]

    @property
    def loss_axes(self) -> tuple[str, ...]:
        """The manual axes over which microbatches, and so losses, differ."""
        return tuple(name for name in self.batch_axes if name in self.manual_axes)

    def over_mesh(self, dims: Parts) -> Parts:
        """As `specs`, over all the axes that the step names; `dims` are `gathers` or `scatters`."""

        def of(specs: list[PartitionSpec], over: list[Dims]) -> list[PartitionSpec]:
            return list(map(_parameters.along, specs, over))

        blocks = {
            kind: of(
                [PartitionSpec(self.leads[kind], *spec[1:]) for spec in specs],
                dims["blocks"][kind],
            )
            for kind, specs in self.specs["blocks"].items()
        }
        outside = {part: of(self.specs[part], dims[part]) for part in self.outside}
        return {**outside, "blocks": blocks}

    @property
    def outside(self) -> list[str]:
        """The parts outside of blocks."""
        return [part for part in self.specs if part != "blocks"]

    def gather(self, params: Parts) -> Parts:
        """Gathers the leaves that lie over axes over which nobody computes with their parts."""

        def of(tree: PyTree, gathers: list[Dims]) -> PyTree:
            leaves, structure = jax.tree.flatten(tree)
            whole = []
            for leaf, dims in zip(leaves, gathers, strict=True):
                for dim, axes in self.real(dims).items():
                    leaf = lax.all_gather(leaf, axes, axis=dim, tiled=True)
                whole.append(leaf)
            return jax.tree.unflatten(structure, whole)

        blocks = {
            kind: of(stack, self.gathers["blocks"][kind])
            for kind, stack in params["blocks"].items()
        }
        outside = {part: of(params[part], self.gathers[part]) for part in self.outside}
        return {**outside, "blocks": blocks}

    def gathered(self, params: Parts) -> list[Any]:
        """Lists the leaves of `params`, or of avals in their places, that are gathered."""

        def of(tree: PyTree, gathers: list[Dims]) -> list[Any]:
            return pick(tree, [bool(dims) for dims in gathers])

        stacks = params["blocks"].items()
        blocks = [
            leaf for kind, stack in stacks for leaf in of(stack, self.gathers["blocks"][kind])
        ]
        outside = [leaf for part in self.outside for leaf in of(params[part], self.gathers[part])]
        return [*outside, *blocks]

    def part_of(self, shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
        """Returns the shape of a device's part of an array of which `dims` lie over axes."""
        spec = _parameters.along(PartitionSpec(*(None,) * len(shape)), dims)
        return _parameters.local_shape(shape, spec, self.mesh)

    def real(self, dims: Dims) -> Dims:
        """Leaves out axes of one device."""
        several = {
            dim: tuple(name for name in axes if self.mesh.shape[name] > 1)
            for dim, axes in dims.items()
        }
        return {dim: axes for dim, axes in several.items() if axes}

    def of_wanted(self, values: Parts) -> Parts:
        """Selects from a value for each leaf those of the leaves that get a gradient."""
        return {
            part: {k: select(v, self.wanted["blocks"][k]) for k, v in values["blocks"].items()}
            if part == "blocks"
            else select(values[part], self.wanted[part])
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
            avals.append(varying.aval(plain, {*_parameters.axes_of(spec), *self.loss_axes}))
        return jax.tree.unflatten(structure, avals)

    def stack_shardings(self) -> dict[Kind, NamedSharding]:
        """Makes shardings over Explicit axes of what is stacked as the layers of each kind are."""
        explicit = explicit_axes(self.mesh)
        return {
            kind: NamedSharding(self.mesh, PartitionSpec(lead if lead in explicit else None))
            for kind, lead in self.leads.items()
        }

    def grad_shardings(self, params: Parts) -> Parts:
        """Makes shardings of the gradients over Explicit axes: as their parameters, or more."""

        def one(leaf: Any, spec: PartitionSpec, over: Dims) -> NamedSharding:
            mine = {self.axis, *self.batch_axes} - set(_parameters.axes_of(spec))
            after = _parameters.axes_of(spec)
            return sharding_like(leaf, mesh=self.mesh, without=tuple(mine), over=over, after=after)

        def of(tree: PyTree, specs: Iterable[PartitionSpec], over: Iterable[Dims]) -> list[Any]:
            return list(map(one, jax.tree.leaves(tree), specs, over))

        blocks = {}
        for kind, stack in params["blocks"].items():
            lead = self.leads[kind]
            lies: Dims = {} if lead is None else {0: (lead,)}
            over = [{**lies, **dims} for dims in self.scatters["blocks"][kind]]
            blocks[kind] = of(stack, self.specs["blocks"][kind], over)
        outside = {
            part: of(params[part], self.specs[part], self.scatters[part]) for part in self.outside
        }
        return self.of_wanted({**outside, "blocks": blocks})


def by_kind(model: Model, blocks: PyTree, values: list[Any]) -> dict[Kind, list[Any]]:
    """Divides values for the leaves of `blocks` by the kinds whose stacks these are in."""
    structure = jax.tree.structure(blocks)
    places = jax.tree.unflatten(structure, range(structure.num_leaves))
    stacks = _kinds.stacks_of(model, places)
    return {kind: [values[i] for i in jax.tree.leaves(stack)] for kind, stack in stacks.items()}
