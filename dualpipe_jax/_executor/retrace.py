"""Functions of the user's that are traced once, however often the library looks at them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a function for the first arguments of each type, and then runs what was traced.

    So a user's Python runs once for all that is asked of it (shapes, types, derivatives), which
    deep Flax modules pay for in seconds. It must be called within one trace.
    """
    traces: dict[Any, Any] = {}

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        types = structure, tuple(map(jax.typeof, leaves))
        if types not in traces:
            traces[types] = jax.make_jaxpr(function, return_shape=True)(*args)
        jaxpr, out = traces[types]
        return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(jaxpr)(*leaves))

    return run
