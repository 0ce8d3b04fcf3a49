"""A module, or the part of one, as a function of its parameters.

In: a module. Out: `Part`, which puts it together again inside a step, with the step's parameters
and keys, and calls a function of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dualpipe_jax import _stacks
from dualpipe_jax._refusals import raise_all
from dualpipe_jax._types import Context, PyTree

Path = tuple[Any, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """What a module is beside its parameters.

    Attributes:
      name: How messages call it.
      graphdef: Its static structure.
      params: The structure of its `nnx.Param` state.
      rngs: The structure of its random state, and the variables' types.
      rng_types: The type of every leaf of that.
      constants: Its other variables and arrays; of a stack of layers with a leading dim.
    """

    name: str
    graphdef: Any
    params: Any
    rngs: Any
    rng_types: tuple[type, ...]
    constants: PyTree

    @classmethod
    def of(cls, name: str, module: nnx.Module) -> "Part":
        """Takes a module apart."""
        graphdef, params, rngs, constants = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return cls(
            name=name,
            graphdef=graphdef,
            params=jax.tree.structure(params),
            rngs=jax.tree.structure(rngs),
            rng_types=tuple(type(variable) for _, variable in nnx.to_flat_state(rngs)),
            constants=_stacks.as_constants(constants),
        )

    def run(
        self,
        function: Callable[..., Any],
        params: PyTree,
        *inputs: PyTree,
        ctx: Context,
        place: jax.Array | None = None,
    ) -> Any:
        """Calls `function(module, *inputs, ctx)`.

        Args:
          function: A function of the module.
          params: Its parameters, in the order of its own.
          *inputs: What flows through the model.
          ctx: The context, whose key the module's random streams get: stream i `fold_in(key, i)`.
          place: Which entry of the constants is the layer's; None if they have no leading dim.

        Raises:
          ValueError: If the call changes the module, or needs a key that it is not given.
        """
        constants = self.constants
        if place is not None:
            constants = jax.tree.map(lambda leaf: jnp.asarray(leaf)[place], constants)
        rngs = jax.tree.unflatten(self.rngs, self._random_state(ctx.rng))
        own = jax.tree.unflatten(self.params, jax.tree.leaves(params))
        module = nnx.merge(self.graphdef, own, rngs, constants)
        before = _values(module)
        out = function(module, *inputs, ctx)
        self._require_unchanged(before, _values(module), has_key=ctx.rng is not None)
        return out

    def _random_state(self, key: jax.Array | None) -> list[jax.Array]:
        """Gives every random stream a key, from which nothing has been drawn yet."""
        if key is None:
            key = jax.random.key(0)  # stands in: what draws from it is refused
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        leaves, num_streams = [], 0
        for kind in self.rng_types:
            if issubclass(kind, nnx.RngKey):
                leaves.append(jax.random.fold_in(key, num_streams))
                num_streams += 1
            else:
                leaves.append(jnp.zeros((), jnp.uint32))
        return leaves

    def _require_unchanged(
        self, before: dict[Path, Any], after: dict[Path, Any], *, has_key: bool
    ) -> None:
        changed = {
            path: kind
            for path, (kind, value) in after.items()
            if path not in before or before[path][1] is not value
        }
        drawn = [path for path, kind in changed.items() if issubclass(kind, nnx.RngState)]
        if drawn and not has_key:
            raise ValueError(
                f"{self.name}: draws from the random streams {_names(drawn)}, but has no key; call "
                "with rng=key, or make it deterministic first (module.eval())"
            )
        raise_all(
            f"{self.name}: changes its variables in a call, but a microbatch may leave nothing "
            "behind but its gradient: microbatches run in another order, and on several devices; "
            "use layers without running statistics (LayerNorm, GroupNorm), or module.eval()",
            (
                f"{kind.__name__} {'.'.join(map(str, path))}"
                for path, kind in changed.items()
                if not issubclass(kind, nnx.RngState | nnx.Intermediate)
            ),
        )


def _values(module: nnx.Module) -> dict[Path, tuple[type, Any]]:
    """Lists the type and the value of everything that a call may change."""
    return {
        path: (type(leaf), leaf.get_value())
        if isinstance(leaf, nnx.Variable)
        else (jax.Array, leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }


def _names(paths: list[Path]) -> list[str]:
    return [".".join(map(str, path)) for path in paths]
