"""Trees of the user's own form, for models that `from_loss` made; other models' stay as they are.

Such a model's functions take the user's tree and return it; they take `LossModel.params(tree)` as
well, and then return trees of that form.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax._errors import brief
from dualpipe_jax._from_loss import LossModel
from dualpipe_jax._model import call_checks, semantics
from dualpipe_jax._model.types import AxisNames, Model, Params, ParamsMask, PyTree


class Form(NamedTuple):
    """Knows the form in which a call was given its parameters.

    Attributes:
      model: The model, if `from_loss` made it.
      is_users: Whether the tree was the user's own.
    """

    model: LossModel | None
    is_users: bool

    def result(self, result: Any) -> Any:
        """Gives the metrics of a step the structure that the user's loss gave them."""
        if self.model is None or not self.model.has_aux:
            return result
        loss, metrics = result
        return loss, self.model.metrics(metrics)

    def tree(self, canonical: Params, shardings: PyTree) -> PyTree:
        """Gives gradients the form of the parameters.

        Args:
          canonical: The gradients.
          shardings: The shardings of gradients in the user's form: a leaf that is taken out of a
            stack would be whole on every device.
        """
        if self.model is None or not self.is_users:
            return canonical
        places = self.model.conversion.places
        leaves, structure = jax.tree.flatten(self.model.tree(canonical))
        rows = zip(places.leaves, leaves, jax.tree.leaves(shardings), strict=True)
        return structure.unflatten(
            [
                leaf if place.layer is None or place.num_stacked else _shard(leaf, sharding)
                for place, leaf, sharding in rows
            ]
        )


def _shard(leaf: Any, sharding: NamedSharding) -> Any:
    """Gives a gradient a sharding; integers' gradients are NumPy's, and have none."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if not sharding.mesh.explicit_axes:
        return jax.lax.with_sharding_constraint(leaf, sharding)
    explicit = {*sharding.mesh.explicit_axes}

    def kept(entry: Any) -> Any:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return entry if explicit.issuperset(names) else None

    spec = PartitionSpec(*map(kept, sharding.spec))
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, spec))


def as_canonical(model: Model, params: PyTree) -> tuple[Params, Form]:
    """Converts parameters, arrays or avals, if they are a user's own tree.

    Raises:
      ValueError: If they are neither of that form nor of that of `LossModel.params`.
      TypeError: If a leaf is no array.
    """
    if not isinstance(model, LossModel):
        return params, Form(None, is_users=False)
    if model.is_canonical(params):
        return params, Form(model, is_users=False)
    call_checks.arrays(semantics.pytree("params", params), "params")
    leaves = jax.tree.leaves(params)
    is_aval = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    convert = (lambda tree: jax.eval_shape(model.params, tree)) if is_aval else model.params
    return convert(params), Form(model, is_users=True)


def plain(model: Model) -> Model:
    """Gives a model whose functions take `{"ends": ..., "blocks": ...}` alone."""
    if not isinstance(model, LossModel):
        return model
    return Model(**{field.name: getattr(model, field.name) for field in fields(Model)})


class Options(NamedTuple):
    """Holds the options of a step that are trees like the parameters."""

    param_specs: PyTree = None
    grad_specs: PyTree = None
    trainable: ParamsMask = True
    overwrite: ParamsMask | None = None


def convert_options(model: Model, options: Options, *, manual_axes: AxisNames = ()) -> Options:
    """Converts options in the form of the user's tree.

    Raises:
      ValueError: If they do not fit the tree, or layers of one kind have different ones.
    """
    if not isinstance(model, LossModel):
        return options
    if manual_axes:
        raise ValueError(
            f"manual_axes={brief(manual_axes)}: must be empty for a model of from_loss, whose "
            "loss is traced without mesh axes; write the model as embed, block and head"
        )
    overwrite = options.overwrite
    return Options(
        param_specs=model.conversion.specs("param_specs", options.param_specs),
        grad_specs=model.conversion.specs("grad_specs", options.grad_specs),
        trainable=_mask(model, "trainable", options.trainable),
        overwrite=model.conversion.overwritten()
        if overwrite is None
        else _mask(model, "overwrite", overwrite),
    )


def _mask(model: LossModel, argument: str, mask: ParamsMask) -> Callable[[Params], PyTree]:
    def of_canonical(canonical: Params) -> PyTree:
        flags = mask(model.tree(canonical)) if callable(mask) else mask
        return model.conversion.flags(argument, flags)

    return of_canonical
