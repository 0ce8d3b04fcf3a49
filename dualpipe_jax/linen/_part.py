"""One of a model's three modules, as a function: of its variables, what it is given, and a context.

In: an `nn.Module`, a method of one, or a pair of one and a function. Out: `Part`, which initialises
and calls it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import errors
from flax import linen as nn
from flax.core import unfreeze

from dualpipe_jax._errors import call, show
from dualpipe_jax._model.types import Context, PyTree
from dualpipe_jax.linen._metadata import unboxed


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """A module, and how it is called.

    `function` takes the bound module, `num_inputs` values that flow through the model (x, or
    nothing) and the context; None for a call of the module itself, or of its `method`, which takes
    those values, and the microbatch where `takes_microbatch`.
    """

    name: str
    module: nn.Module
    function: Callable[..., Any] | None
    method: Callable[..., Any] | None
    kwargs: Mapping[str, Any]
    rngs: tuple[str, ...]
    takes_microbatch: bool

    def run(self, module: nn.Module, *inputs: PyTree, ctx: Context) -> Any:
        """Calls the bound module."""
        x = {"x": inputs[0]} if inputs else {}
        if self.function is not None:
            return self._call(self.function, {"module": module, **x, "ctx": ctx})
        function: Any = module
        if self.method is not None:
            function = getattr(module, self.method.__name__)
        microbatch = {"microbatch": ctx.microbatch} if self.takes_microbatch else {}
        return self._call(function, {**x, **microbatch})

    def _call(self, function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        must = f"of ({', '.join(given)})"
        if self.kwargs:
            must += f", and of {self.name.partition('[')[0]}_kwargs={dict(self.kwargs)}"
        return call(self.name, must, function, *given.values(), **self.kwargs)

    def apply(self, variables: Mapping[str, PyTree], *inputs: PyTree, ctx: Context) -> Any:
        """Calls the module with variables, which may be boxed.

        Raises:
          ValueError: If the module writes to a collection, or needs a key or variables that it is
            not given.
        """
        try:
            return self.module.apply(
                unboxed(dict(variables)),
                *inputs,
                ctx=ctx,
                method=self.run,
                rngs=self.keys(ctx.rng),
                mutable=False,
            )
        except errors.ModifyScopeVariableError as error:
            raise ValueError(
                f"{self.name}: {type(self.module).__name__} writes to a collection of variables in "
                "a call, but a microbatch may leave nothing behind but its gradient: microbatches "
                "run in another order, and on several devices; use a layer without running "
                "statistics (LayerNorm, GroupNorm), or have it read them only "
                f"(use_running_average=True). Flax says: {error}"
            ) from error
        except errors.ScopeCollectionNotFound as error:
            raise ValueError(
                f"{self.name}: {type(self.module).__name__} reads variables that it is not given; "
                "what gradients overwrite (scales of float8) is among the params that model.init "
                "and model.to_params make, and what is only read goes to model.with_constants. "
                f"Flax says: {error}"
            ) from error
        except errors.InvalidRngError as error:
            fix = (
                "call with rng=key, or make the model with deterministic modules"
                if ctx.rng is None
                else f"name it in rngs=, which is {self.rngs}"
            )
            raise ValueError(
                f"{self.name}: {type(self.module).__name__} needs a key that it is not given; "
                f"{fix}. Flax says: {error}"
            ) from error

    def init(
        self, key: jax.Array, *inputs: PyTree, ctx: Context, run: Callable[..., Any] | None = None
    ) -> tuple[Any, dict[str, PyTree]]:
        """Initialises the module, by a call; returns what that returned, and the variables."""
        method = run or self.run
        out, variables = self.module.init_with_output(key, *inputs, ctx=ctx, method=method)
        return out, {**unfreeze(variables)}

    def keys(self, rng: jax.Array | None) -> dict[str, jax.Array] | None:
        """Derives a key for each named stream: `fold_in(ctx.rng, its place in rngs)`."""
        if rng is None:
            return None
        return {name: jax.random.fold_in(rng, i) for i, name in enumerate(self.rngs)}


def part_of(name: str, value: Any, **options: Any) -> Part:
    """Makes a part of what the user gave for the argument `name`.

    Raises:
      TypeError: If it is nothing of the kind.
    """
    module, function, method = value, None, None
    if isinstance(value, tuple) and len(value) == 2:
        module, function = value
    elif inspect.ismethod(value):
        module, method = value.__self__, value
    if not isinstance(module, nn.Module) or not (function is None or callable(function)):
        raise TypeError(
            f"{name}={_told(value)}: must be a flax.linen Module, a method of one (ends.head), or "
            "a pair of a Module and a function of it (gpt, lambda gpt, ctx: ...)"
        )
    return Part(name=name, module=module, function=function, method=method, **options)


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_told, value))})"
    return f"a {type(value).__name__}" if isinstance(value, nn.Module) else show(value)
