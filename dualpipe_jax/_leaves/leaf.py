"""A record for every leaf of the parameters: all that is decided about it before the trace.

In: `params`, and the trees that a user gives beside them. Out: a tree of `Leaf`s like `params`,
made once. Everything after that is a map over this tree and the parameters:
`jax.tree.map(lambda leaf, value: ..., leaves, params)`. The trace adds a `gradient.LeafGradient`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from dualpipe_jax._leaves.explicit_axes import sharding_like
from dualpipe_jax._leaves.rules import LARGEST, SUM, Rule
from dualpipe_jax._leaves.specs import (
    Dims,
    StepAxes,
    axes_of,
    dims_over,
    extend,
    find_overwritten,
    find_wanted,
    spread_grad_specs,
    spread_param_specs,
    without,
)
from dualpipe_jax._model import varying
from dualpipe_jax._model.kinds import parts_of
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._split_vjp import is_differentiable


@dataclass(frozen=True, eq=False, kw_only=True)
class Leaf:
    """Describes one leaf of the parameters, and its gradient.

    Methods that take an array on one device are called inside of the step's `jax.shard_map`.

    Attributes:
      name: Its name in messages, such as `params['ends']['table']`.
      wanted: Whether it gets a gradient: it is trainable, and no integer.
      overwritten: Whether its gradient is a new value that overwrites it.
      is_layer: Whether it is in blocks, with the layers' dim first.
      axis: The pipeline axis.
      lead: The axis over which the layers' dim is sharded, or None.
      spec: How it is sharded over the manual axes; the model's functions see a device's part.
      gather_dims: Its dims that are sharded over other axes, over which it is gathered once.
      scatter_dims: The dims of its gradient that are scattered over such axes, once: the same, or
        more.
      sum_axes: The axes over which its gradient is summed whatever the model does: the batch's, and
        outside of blocks the pipeline's.
      varies_over: The manual axes over which it, or its gradient before the last sum, varies.
    """

    name: str
    wanted: bool
    overwritten: bool
    is_layer: bool
    axis: str
    lead: str | None
    spec: PartitionSpec
    gather_dims: Dims
    scatter_dims: Dims
    sum_axes: tuple[str, ...]
    varies_over: tuple[str, ...]

    @property
    def rule(self) -> Rule:
        """How values of its gradient become one."""
        return LARGEST if self.overwritten else SUM

    @property
    def in_spec(self) -> PartitionSpec:
        """How it is sharded over all axes that the step names."""
        return extend(self._spec_with_lead, self.gather_dims)

    @property
    def out_spec(self) -> PartitionSpec | None:
        """How its gradient is sharded over all axes that the step names; None without one."""
        return extend(self._spec_with_lead, self.scatter_dims) if self.wanted else None

    @property
    def _spec_with_lead(self) -> PartitionSpec:
        return PartitionSpec(self.lead, *self.spec[1:]) if self.is_layer else self.spec

    def local_aval(self, value: Any) -> jax.ShapeDtypeStruct:
        """Makes its aval on one device, as the model's functions get it; in blocks, of a layer."""
        shape = _part(value.shape, dims_over(self.spec))
        plain = jax.ShapeDtypeStruct(shape[1:] if self.is_layer else shape, value.dtype)
        # Where microbatches differ, so do a parameter's gradients: they are summed once, last.
        return varying.aval(plain, self.varies_over)

    def gather(self, value: jax.Array) -> jax.Array:
        """Gathers it from the devices' parts, over the axes that the model does not see."""
        for dim, axes in _of_several(self.gather_dims).items():
            value = lax.all_gather(value, axes, axis=dim, tiled=True)
        return value

    def scatter(self, total: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, tuple[str, ...]]:
        """Takes this device's part of its gradient, combined over the axes that shard it.

        Args:
          total: This device's sum.
          axes: The axes over which it is to be combined.

        Returns:
          The part, and the axes over which it is still to be summed.
        """
        dims, rule = _of_several(self.scatter_dims), self.rule
        done = {name for names in dims.values() for name in names}
        if rule is not SUM:
            (total,), done = rule.over([total], axes), set(axes)
        for dim, names in dims.items():
            if rule is SUM:
                total = lax.psum_scatter(total, names, scatter_dimension=dim, tiled=True)
            else:
                size = total.shape[dim] // lax.axis_size(names)
                first = lax.axis_index(names) * size
                total = lax.dynamic_slice_in_dim(total, first, size, dim)
        return total, tuple(name for name in axes if name not in done)

    def zero_grad(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Makes a device's part of a gradient that is zero, of `shape` before it is scattered."""
        return jnp.zeros(_part(shape, self.scatter_dims), dtype)

    def grad_sharding(self, value: Any, mesh: Mesh | AbstractMesh) -> NamedSharding | None:
        """Makes the sharding of its gradient over Explicit axes: as its own, or over more axes."""
        if not self.wanted:
            return None
        lead: Dims = {} if self.lead is None else {0: (self.lead,)}
        return sharding_like(
            value,
            mesh=mesh,
            without=(self.axis, *self.sum_axes),
            over={**lead, **self.scatter_dims},
            after=axes_of(self.spec),
        )

    def finish(
        self, value: jax.Array, grad: jax.Array | None, *, dtype: Any, loss_scale: jax.Array | None
    ) -> Any:
        """Makes its gradient as it leaves the step: zeros if frozen, float0 for integers.

        A frozen leaf that its gradient would overwrite is overwritten by its own value.

        Args:
          value: The leaf.
          grad: Its gradient, in accumulation dtype; None if it gets none.
          dtype: The dtype of gradients; None for the leaf's own.
          loss_scale: The factor of all cotangents, or None.
        """
        if not is_differentiable(value):
            return np.zeros(value.shape, jax.dtypes.float0)
        if not self.wanted:
            return value if self.overwritten else jnp.zeros_like(value, dtype=dtype)
        assert grad is not None
        if self.overwritten:
            return grad.astype(value.dtype)
        if loss_scale is not None:
            grad = grad / loss_scale.astype(grad.dtype)
        return grad.astype(dtype or value.dtype)


def make_leaves(
    params: PyTree,
    axes: StepAxes,
    *,
    trainable: PyTree,
    overwrite: PyTree,
    param_specs: PyTree,
    grad_specs: PyTree,
) -> PyTree:
    """Makes a dict of the parts of `params` with a `Leaf` in the place of each of their leaves.

    Args:
      params: The parameters.
      axes: The axes of the mesh.
      trainable: As `specs.find_wanted` takes it.
      overwrite: As `specs.find_overwritten` takes it.
      param_specs: As `specs.spread_param_specs` takes it.
      grad_specs: As `specs.spread_grad_specs` takes it.

    Raises:
      ValueError: If one of these trees does not fit the parameters or the mesh.
      TypeError: If it holds leaves of another type.
    """
    axis, batch_axes, manual_axes = axes.axis, axes.batch_axes, axes.manual_axes
    wanted, overwritten = find_wanted(params, trainable), find_overwritten(params, overwrite)
    specs = spread_param_specs(params, param_specs, axes)
    of_grads = spread_grad_specs(params, grad_specs, axes, like=specs, wanted=wanted)
    hidden = {axis, *batch_axes} - set(manual_axes)
    loss_axes = [name for name in batch_axes if name in manual_axes]

    def make(path: Any, value: Any, *decided: Any) -> Leaf:
        wanted, overwritten, spec, of_grad = decided
        seen = without(spec, hidden)
        is_layer = path[0].key == "blocks"
        summed = tuple(name for name in batch_axes if name not in axes_of(seen))
        return Leaf(
            name=f"params{keystr(path)}",
            wanted=wanted,
            overwritten=overwritten,
            is_layer=is_layer,
            axis=axis,
            # As `bring.Stack.is_sharded`: JAX has no uneven shards.
            lead=axis if is_layer and value.shape[0] % axes.mesh.shape[axis] == 0 else None,
            spec=seen,
            gather_dims=dims_over(spec, hidden),
            scatter_dims=dims_over(of_grad, hidden),
            sum_axes=summed if is_layer else (axis, *summed),
            varies_over=(*axes_of(seen), *loss_axes),
        )

    decided = wanted, overwritten, specs, of_grads
    return jax.tree_util.tree_map_with_path(make, parts_of(params), *decided)


def _of_several(dims: Dims) -> Dims:
    """Leaves out axes of one device."""
    several = {
        dim: tuple(name for name in axes if lax.axis_size(name) > 1) for dim, axes in dims.items()
    }
    return {dim: axes for dim, axes in several.items() if axes}


def _part(shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    """Returns the shape of a device's part of an array whose `dims` are sharded over axes."""
    return tuple(
        size // math.prod(lax.axis_size(name) for name in dims.get(dim, ()))
        for dim, size in enumerate(shape)
    )
