"""Moves Flax's collection of variables that gradients overwrite into the parameters, or out of it.

In: `{"ends": ..., "blocks": ...}` with the collection among the parameters, under its own name, as
a pipeline takes them; or Flax's `{"params": ..., "_overwrite_with_gradient": ...}`, as a TrainState
takes them. Out: the other of these two forms.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax.core import unfreeze
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import PyTree


def collections_of(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Splits the parameters of one stack, or of the ends, into collections."""
    if OVERWRITE_WITH_GRADIENT not in params:
        return {"params": params}
    rest = {name: tree for name, tree in params.items() if name != OVERWRITE_WITH_GRADIENT}
    return {"params": rest, OVERWRITE_WITH_GRADIENT: params[OVERWRITE_WITH_GRADIENT]}


def to_variables(params: Mapping[str, PyTree], *, kinds: Collection[Kind]) -> dict[str, PyTree]:
    """As `LinenModel.to_variables`; with the kind None, blocks are one stack."""
    _require_parts("params", {"params": params}, kinds)
    params = unfreeze({**params})
    found = _by_stack(lambda stack: stack.get(OVERWRITE_WITH_GRADIENT, {}), kinds, params)
    rest = _by_stack(lambda stack: collections_of(stack)["params"], kinds, params)
    variables = {"params": {**params, **rest}}
    raise_all(
        f"params: {OVERWRITE_WITH_GRADIENT!r} must be a key of the ends, and of the blocks of each "
        "kind of layer, as model.init and model.to_params put it",
        (
            f"params{jax.tree_util.keystr(path)}"
            for path, _ in jax.tree_util.tree_leaves_with_path(rest)
            if any(getattr(entry, "key", None) == OVERWRITE_WITH_GRADIENT for entry in path)
        ),
    )
    blocks = found["blocks"]
    stacks = [found["ends"], *([blocks] if None in kinds else blocks.values())]
    return {**variables, OVERWRITE_WITH_GRADIENT: found} if any(stacks) else variables


def to_params(variables: Mapping[str, PyTree], *, kinds: Collection[Kind]) -> dict[str, PyTree]:
    """As `LinenModel.to_params`; with the kind None, blocks are one stack."""
    known = {"params", OVERWRITE_WITH_GRADIENT}
    if not isinstance(variables, Mapping) or not {"params"} <= set(variables) <= known:
        if isinstance(variables, Mapping):
            got = f"{brief(sorted(map(str, variables)))}; give constants to model.with_constants"
        else:
            got = f"{show(variables)}; from a TrainState give its params"
        raise ValueError(
            f'variables: must be {{"params": .., {OVERWRITE_WITH_GRADIENT!r}: ..}}, or without the '
            f"second, got {got}"
        )
    variables = unfreeze({**variables})
    _require_parts("variables", variables, kinds)
    params = variables["params"]
    if OVERWRITE_WITH_GRADIENT not in variables:
        return {**params}

    def join(stack: Mapping[str, PyTree], found: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return {**stack, OVERWRITE_WITH_GRADIENT: found} if found else {**stack}

    return {**params, **_by_stack(join, kinds, params, variables[OVERWRITE_WITH_GRADIENT])}


def _by_stack(
    function: Callable[..., PyTree], kinds: Collection[Kind], *trees: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """Applies a function to the ends of trees, and to their stacks of each kind."""
    ends, blocks = ([tree[part] for tree in trees] for part in ("ends", "blocks"))
    if None in kinds:
        return {"ends": function(*ends), "blocks": function(*blocks)}
    stacks: dict[Any, PyTree] = {
        kind: function(*(tree.get(kind, {}) for tree in blocks)) for kind in kinds
    }
    return {"ends": function(*ends), "blocks": stacks}


def _show_keys(tree: Any) -> str:
    return brief(sorted(map(str, tree))) if isinstance(tree, Mapping) else show(tree)


def _require_parts(name: str, collections: Mapping[str, PyTree], kinds: Collection[Kind]) -> None:
    raise_all(
        f'{name}: must be {{"ends": .., "blocks": ..}} in each collection, as model.init and '
        "to_canonical make them; to_canonical leaves a collection without layers unchanged: give "
        'that as {"ends": collection, "blocks": {}}',
        (
            f"{key!r} is {_show_keys(tree)}"
            for key, tree in collections.items()
            if not isinstance(tree, Mapping) or not {"ends", "blocks"} <= set(tree)
        ),
    )
    raise_all(
        f"{name}: ends and blocks must be dicts of variables by name",
        (
            f"{key!r}[{part!r}] is {show(tree[part])}"
            for key, tree in collections.items()
            for part in ("ends", "blocks")
            if not isinstance(tree[part], Mapping)
        ),
    )
    if None in kinds:
        return
    raise_all(
        f"{name}: blocks must have a stack for each kind of layer, {sorted(map(str, kinds))}; in "
        f"{OVERWRITE_WITH_GRADIENT!r} empty stacks may be left out",
        (
            f"{key!r} has {sorted(map(str, tree['blocks']))}"
            for key, tree in collections.items()
            if set(tree["blocks"]) - set(kinds)
            or (key == "params" and set(tree["blocks"]) != set(kinds))
        ),
    )
