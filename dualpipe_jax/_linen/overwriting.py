"""Flax's collection of what gradients overwrite: among the parameters, or beside them as in Flax.

In: `{"ends": ..., "blocks": ...}` in which the collection stands under its own name among the
parameters, as a pipeline takes them; or Flax's `{"params": ..., "_overwrite_with_gradient": ...}`,
as a TrainState takes them. Out: the other of the two.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from dualpipe_jax._refusals import raise_all, show
from dualpipe_jax._types import PyTree


def collections_of(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Takes the parameters of one stack, or of the ends, apart into collections."""
    if OVERWRITE_WITH_GRADIENT not in params:
        return {"params": params}
    rest = {name: tree for name, tree in params.items() if name != OVERWRITE_WITH_GRADIENT}
    return {"params": rest, OVERWRITE_WITH_GRADIENT: params[OVERWRITE_WITH_GRADIENT]}


def to_variables(params: Mapping[str, PyTree], *, has_kinds: bool) -> dict[str, PyTree]:
    """As `LinenModel.to_variables`; `has_kinds` says whether blocks hold a stack for each kind."""
    _require_parts("params", {"params": params})
    found = _by_stack(lambda stack: stack.get(OVERWRITE_WITH_GRADIENT, {}), has_kinds, params)
    rest = _by_stack(lambda stack: collections_of(stack)["params"], has_kinds, params)
    variables = {"params": {**params, **rest}}
    stacks = [found["ends"], *(found["blocks"].values() if has_kinds else [found["blocks"]])]
    return {**variables, OVERWRITE_WITH_GRADIENT: found} if any(stacks) else variables


def to_params(variables: Mapping[str, PyTree], *, has_kinds: bool) -> dict[str, PyTree]:
    """As `LinenModel.to_params`; `has_kinds` says whether blocks hold a stack for each kind."""
    known = {"params", OVERWRITE_WITH_GRADIENT}
    if not isinstance(variables, Mapping) or not {"params"} <= set(variables) <= known:
        got = sorted(variables) if isinstance(variables, Mapping) else show(variables)
        raise ValueError(
            f'variables: must be {{"params": .., {OVERWRITE_WITH_GRADIENT!r}: ..}}, the second if '
            f"there is one, got {got}; what is only read goes to model.with_constants"
        )
    _require_parts("variables", variables)
    params = variables["params"]
    if OVERWRITE_WITH_GRADIENT not in variables:
        return {**params}

    def join(stack: Mapping[str, PyTree], found: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return {**stack, OVERWRITE_WITH_GRADIENT: found} if found else {**stack}

    return {**params, **_by_stack(join, has_kinds, params, variables[OVERWRITE_WITH_GRADIENT])}


def _by_stack(
    function: Callable[..., PyTree], has_kinds: bool, *trees: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """Applies a function to the ends of trees, and to their stacks of each kind."""
    ends, blocks = ([tree[part] for tree in trees] for part in ("ends", "blocks"))
    if not has_kinds:
        return {"ends": function(*ends), "blocks": function(*blocks)}
    stacks: dict[str, Any] = {
        kind: function(*(tree.get(kind, {}) for tree in blocks)) for kind in blocks[0]
    }
    return {"ends": function(*ends), "blocks": stacks}


def _require_parts(name: str, collections: Mapping[str, PyTree]) -> None:
    raise_all(
        f'{name}: must be {{"ends": .., "blocks": ..}} in each collection, as model.init and '
        "to_canonical make them; to_canonical leaves a collection that has nothing of the layers "
        'as it is: give {"ends": that, "blocks": {}}',
        (
            f"{key!r} is {sorted(tree) if isinstance(tree, Mapping) else show(tree)}"
            for key, tree in collections.items()
            if not isinstance(tree, Mapping) or not {"ends", "blocks"} <= set(tree)
        ),
    )
