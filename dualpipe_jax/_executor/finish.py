"""Gradients as they leave a step: in the place, the dtype and the scale of each parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax._split_vjp import is_differentiable

PyTree = Any


def as_parameters(
    params: PyTree,
    wanted: dict[str, list[bool]],
    overwritten: dict[str, list[bool]],
    grads: dict[str, list[jax.Array]],
    dtype: Any,
    loss_scale: jax.Array | None,
) -> PyTree:
    """Gives the gradients the structure of `params`: zeros to frozen leaves, float0 to integers.

    What is frozen and would be overwritten by its gradient is overwritten by what it is.

    Args:
      params: The parameters.
      wanted: By part, whether each leaf has a gradient.
      overwritten: By part, whether its gradient is a new value.
      grads: By part, the gradients of the wanted leaves, in accumulation dtype.
      dtype: That of gradients; None for the parameter's.
      loss_scale: The factor of all cotangents, or None.
    """
    found = {part: iter(leaves) for part, leaves in grads.items()}
    flags = {part: zip(wanted[part], overwritten[part], strict=True) for part in wanted}

    def one(path: Any, leaf: Any) -> Any:
        part = path[0].key
        is_wanted, is_new_value = next(flags[part])
        if is_wanted:
            grad = next(found[part])
            if is_new_value:
                return grad.astype(leaf.dtype)
            if loss_scale is not None:
                grad = grad / loss_scale.astype(grad.dtype)
            return grad.astype(dtype or leaf.dtype)
        if not is_differentiable(leaf):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        return leaf if is_new_value else jnp.zeros_like(leaf, dtype=dtype)

    return jax.tree_util.tree_map_with_path(one, params)
