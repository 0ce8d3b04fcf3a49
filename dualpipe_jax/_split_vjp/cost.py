"""How much a function computes, roughly: before any compiler is asked."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jcore


def contraction_flops(function: Callable[..., Any], *args: Any) -> int:
    """Counts the floating-point operations of a function's `dot_general`s; nothing runs.

    A loop's count times its trips, where they are known; of branches all are counted.

    >>> import jax.numpy as jnp
    >>> contraction_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    flops = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            flops += 2 * summed * eqn.outvars[0].aval.size
        else:
            inner = sum(map(_of_jaxpr, jcore.jaxprs_in_params(eqn.params)))
            flops += inner * eqn.params.get("length", 1)
    return flops
