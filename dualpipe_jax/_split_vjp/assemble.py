"""Makes functions of the nodes that a divided block and vjp run.

In: a `BlockTrace` and its `Programs`. Out: forward, input_grad, weight_grad and
deferred_weight_grad, each of which evaluates its nodes.
"""

from collections.abc import Sequence
from typing import Protocol

import jax

from dualpipe_jax._model.types import Aux, PyTree
from dualpipe_jax._split_vjp.divide import Programs
from dualpipe_jax._split_vjp.for_compilers import Casts
from dualpipe_jax._split_vjp.graph import Environment, Node, evaluate, read
from dualpipe_jax._split_vjp.trace import BlockTrace

Arrays = tuple[jax.Array, ...]


class Forward(Protocol):
    """The forward, which stores residuals."""

    def __call__(
        self, params: PyTree, x: PyTree, ctx: PyTree, /
    ) -> tuple[PyTree, Aux, Arrays, Arrays]:
        """Runs the block.

        Args:
          params: The block's parameters, or `(params, casts)` with `casts` from `SplitVjp.cast`.
          x: The activation.
          ctx: The context.

        Returns:
          y; the block's Aux; `residual`, which only the input grad reads; and `weight_residual`,
          which the weight grad reads too.
        """
        ...


class InputGrad(Protocol):
    """The input grad, which stores the stash of the weight grad."""

    def __call__(
        self,
        params: PyTree,
        ctx: PyTree,
        residual: Arrays,
        weight_residual: Arrays,
        dy: list[jax.Array],
        daux: jax.Array | None,
        /,
    ) -> tuple[list[jax.Array], Arrays, Arrays, list[jax.Array]]:
        """Makes dx.

        Args:
          params: As in `Forward`.
          ctx: The context.
          residual: From the forward.
          weight_residual: From the forward.
          dy: An array for every floating-point leaf of y.
          daux: The aux loss's cotangent, or None.

        Returns:
          dx, an array for every floating-point leaf of x; `stash`, the part of this work that the
          weight grad needs; `deferred`, the part that a deferred one needs, which may recompute;
          and the gradients that are made with dx, for the leaves of params in which
          `made_with_input_grad` is True.
        """
        ...


class WeightGrad(Protocol):
    """The weight grad, directly after its input grad or deferred."""

    def __call__(
        self, params: PyTree, ctx: PyTree, weight_residual: Arrays, stash: Arrays, /
    ) -> list[jax.Array]:
        """Makes the gradients for the leaves of params in which `made_with_weight_grad` is True.

        Args:
          params: As in `Forward`.
          ctx: The context.
          weight_residual: From the forward.
          stash: From the input grad: its `stash`, or its `deferred` for a deferred weight grad.
        """
        ...


def make_functions(
    trace: BlockTrace, programs: Programs, casts: Casts
) -> tuple[Forward, InputGrad, WeightGrad, WeightGrad]:
    """Makes forward, input_grad, weight_grad and deferred_weight_grad.

    Args:
      trace: The block and its vjp.
      programs: Their nodes, divided.
      casts: The casts of parameters, of which the functions may be given the results.
    """
    with_input_grad, with_weight_grad = (
        [v for v in values if v is not None]
        for values in (programs.made_with_input_grad, programs.made_with_weight_grad)
    )

    def environment(
        params: PyTree, ctx: PyTree, *groups: tuple[Sequence[int], Sequence[jax.Array]]
    ) -> Environment:
        """Gives values to the leaves of params, or of (params, casts), of ctx and to `groups`."""
        leaves, num_params = jax.tree.leaves(params), len(trace.params)
        env: Environment = dict(zip(trace.params, leaves[:num_params], strict=True))
        if given := leaves[num_params:]:
            for values, array in zip(casts.values(), given, strict=True):
                env.update(dict.fromkeys(values, array))
        for values, arrays in ((trace.ctx, jax.tree.leaves(ctx)), *groups):
            env.update(zip(values, arrays, strict=True))
        return env

    def forward(params: PyTree, x: PyTree, ctx: PyTree) -> tuple[PyTree, Aux, Arrays, Arrays]:
        env = environment(params, ctx, (trace.x, jax.tree.leaves(x)))
        evaluate(programs.forward, env)
        y = jax.tree.unflatten(trace.y_structure, [read(env, v) for v in trace.y])
        metrics = [read(env, v) for v in trace.metrics]
        aux = Aux(
            loss=read(env, trace.aux[0]) if trace.aux else None,
            metrics=jax.tree.unflatten(trace.metrics_structure, metrics),
        )
        return y, aux, _arrays(env, programs.residual), _arrays(env, programs.weight_residual)

    def input_grad(
        params: PyTree,
        ctx: PyTree,
        residual: Arrays,
        weight_residual: Arrays,
        dy: list[jax.Array],
        daux: jax.Array | None,
    ) -> tuple[list[jax.Array], Arrays, Arrays, list[jax.Array]]:
        env = environment(
            params,
            ctx,
            (programs.residual, residual),
            (programs.weight_residual, weight_residual),
            (trace.dy, dy),
            (trace.daux, [] if daux is None else [daux]),
        )
        evaluate(programs.input_grad, env)
        dx = [read(env, v) for v in trace.dx]
        stash, deferred = _arrays(env, programs.stash), _arrays(env, programs.deferred)
        return dx, stash, deferred, [env[v] for v in with_input_grad]

    def weight_grad_from(values: tuple[int, ...], nodes: list[Node]) -> WeightGrad:
        def weight_grad(
            params: PyTree, ctx: PyTree, weight_residual: Arrays, stash: Arrays
        ) -> list[jax.Array]:
            env = environment(
                params, ctx, (programs.weight_residual, weight_residual), (values, stash)
            )
            evaluate(nodes, env)
            return [env[v] for v in with_weight_grad]

        return jax.jit(weight_grad)

    # Under jit each is traced once however many layers and branches call it.
    return (
        jax.jit(forward),
        jax.jit(input_grad),
        weight_grad_from(programs.stash, programs.weight_grad),
        weight_grad_from(programs.deferred, programs.deferred_weight_grad),
    )


def _arrays(env: Environment, values: Sequence[int]) -> Arrays:
    return tuple(env[v] for v in values)
