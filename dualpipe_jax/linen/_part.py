"""Makes one of a model's modules a function of its variables, its inputs and a context.

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

from dualpipe_jax._errors import show
from dualpipe_jax._model.types import Context, PyTree
from dualpipe_jax._model.users_call import call
from dualpipe_jax.linen._metadata import unboxed


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """Calls and initialises a module.

    Attributes:
      name: The user's argument that gave the module, in messages.
      module: The module.
      function: A function of the bound module, x (not for embed) and the context; None calls the
        module itself, or its `method`.
      method: A method of the module, or None.
      kwargs: Further arguments of every call.
      rngs: The names of the streams of random keys.
      takes_microbatch: Whether the module, or its method, is given the microbatch, after x.
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
        """Calls the module with its variables, boxed or not.

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
                "a call, but a microbatch must change nothing: microbatches run in another order, "
                "and on several devices; use a layer without running "
                "statistics (LayerNorm, GroupNorm), or one that only reads them "
                f"(use_running_average=True). Flax says: {error}"
            ) from error
        except errors.ScopeCollectionNotFound as error:
            raise ValueError(
                f"{self.name}: {type(self.module).__name__} reads variables that it is not given; "
                "variables that gradients overwrite (scales of float8) must be among the params, "
                "as model.init and model.to_params make them, and constants must be given to "
                "model.with_constants. "
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
        """Initialises the module by a call; returns the outputs of the call, and the variables."""
        method = run or self.run
        out, variables = self.module.init_with_output(key, *inputs, ctx=ctx, method=method)
        return out, {**unfreeze(variables)}

    def keys(self, rng: jax.Array | None) -> dict[str, jax.Array] | None:
        """Derives a key for each named stream, `fold_in(rng, index in rngs)`; None without rng."""
        if rng is None:
            return None
        return {name: jax.random.fold_in(rng, i) for i, name in enumerate(self.rngs)}


def part_of(name: str, value: Any, **options: Any) -> Part:
    """Makes a part from the user's argument `name`.

    Raises:
      TypeError: If the argument is neither a module, nor a method of one, nor a pair.
    """
    module, function, method = value, None, None
    if isinstance(value, tuple) and len(value) == 2:
        module, function = value
    elif inspect.ismethod(value):
        module, method = value.__self__, value
    if not isinstance(module, nn.Module) or not (function is None or callable(function)):
        raise TypeError(
            f"{name}={_show(value)}: must be a flax.linen Module, a method of one (ends.head), or "
            "a pair of a Module and a function of it (gpt, lambda gpt, ctx: ...)"
        )
    return Part(name=name, module=module, function=function, method=method, **options)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))})"
    return f"a {type(value).__name__}" if isinstance(value, nn.Module) else show(value)
