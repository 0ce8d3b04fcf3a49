"""Makes a module, or a part of one, a function of its parameters.

In: a module. Out: `Part`, which rebuilds the module inside a step, with the step's parameters and
keys, and calls a function of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core as jcore
from jax.extend.core import primitives

from dualpipe_jax._errors import raise_all
from dualpipe_jax._model.kinds import as_constants, take_layer
from dualpipe_jax._model.types import Context, PyTree

Path = tuple[Any, ...]
# Primitives that pass their operands to a jaxpr one by one.
_CALLS = (primitives.jit_p, primitives.remat_p, primitives.closed_call_p)


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """Holds all of a module but its parameters, and runs it with given ones.

    Attributes:
      name: Its name in messages.
      graphdef: Its static structure.
      params: The structure of its `nnx.Param` state.
      rngs: The structure of its random state.
      rng_types: The variable type of every leaf of its random state.
      constants: Its other variables and arrays; with a leading dim for a stack of layers.
    """

    name: str
    graphdef: Any
    params: Any
    rngs: Any
    rng_types: tuple[type, ...]
    constants: PyTree

    @classmethod
    def of(cls, name: str, module: nnx.Module) -> "Part":
        """Splits a module."""
        graphdef, params, rngs, constants = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return cls(
            name=name,
            graphdef=graphdef,
            params=jax.tree.structure(params),
            rngs=jax.tree.structure(rngs),
            rng_types=tuple(type(variable) for _, variable in nnx.to_flat_state(rngs)),
            constants=as_constants(constants),
        )

    def run(
        self,
        function: Callable[..., Any],
        params: PyTree,
        *inputs: PyTree,
        ctx: Context,
        index: jax.Array | None = None,
    ) -> Any:
        """Calls `function(module, *inputs, ctx)`.

        Args:
          function: A function of the module.
          params: Its parameters, in the order of the module's own.
          *inputs: x; nothing for embed.
          ctx: The context; stream i of the module's random streams gets `fold_in(ctx.rng, i)`.
          index: The index of the layer in the constants; None if they have no leading dim.

        Raises:
          ValueError: If the call changes the module, or needs a key that it is not given.
        """
        constants = self.constants
        if index is not None:
            constants = take_layer(jax.tree.map(jnp.asarray, constants), index)
        rngs = jax.tree.unflatten(self.rngs, self._random_state(ctx.rng))
        own = jax.tree.unflatten(self.params, jax.tree.leaves(params))

        def call(own: PyTree, rngs: PyTree, constants: PyTree) -> tuple[Any, _State, _State]:
            module = nnx.merge(self.graphdef, own, rngs, constants)
            before = _values(module)
            out = function(module, *inputs, ctx)
            return out, before, _values(module)

        out, before, after = call(own, rngs, constants)
        has_key = ctx.rng is not None
        if _refused(_changed(before, after), has_key=has_key):
            # nnx.remat and nnx.jit write all variables back: did these change?
            changed = _find_changed(lambda *state: call(*state)[1:], own, rngs, constants)
            self._require_unchanged(_refused(changed, has_key=has_key))
        return out

    def _random_state(self, key: jax.Array | None) -> list[jax.Array]:
        """Gives every random stream a key, with a count of no draws."""
        if key is None:
            key = jax.random.key(0)  # a module that draws from it is refused
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

    def _require_unchanged(self, changed: dict[Path, type]) -> None:
        drawn = [path for path, kind in changed.items() if issubclass(kind, nnx.RngState)]
        if drawn:
            raise ValueError(
                f"{self.name}: draws from the random streams {_names(drawn)}, but is given no key; "
                "call with rng=key, or make it deterministic first (module.eval())"
            )
        raise_all(
            f"{self.name}: changes its variables in a call, but a microbatch must change nothing: "
            "microbatches run in another order, and on several devices; use layers without running "
            "statistics (LayerNorm, GroupNorm), or module.eval()",
            (f"{kind.__name__} {'.'.join(map(str, path))}" for path, kind in changed.items()),
        )


# The type and the value of every variable.
_State = dict[Path, tuple[type, Any]]


def _changed(before: _State, after: _State) -> dict[Path, type]:
    """Finds the variables whose values are other objects, and their types."""
    return {
        path: kind
        for path, (kind, value) in after.items()
        if path not in before or before[path][1] is not value
    }


def _refused(changed: dict[Path, type], *, has_key: bool) -> dict[Path, type]:
    """Leaves out the variables that a call may change: sown values, and with a key random state."""
    may_change = nnx.RngState | nnx.Intermediate if has_key else nnx.Intermediate
    return {path: kind for path, kind in changed.items() if not issubclass(kind, may_change)}


def _find_changed(call: Callable[..., tuple[_State, _State]], *state: PyTree) -> dict[Path, type]:
    """Finds the variables that a call changes, looking through functions called under `jax.jit`."""
    kinds: dict[str, dict[Path, type]] = {}

    def values(*state: PyTree) -> tuple[dict[Path, Any], dict[Path, Any]]:
        before, after = call(*state)
        kinds.update(after={path: kind for path, (kind, _) in after.items()})
        old, new = ({path: value for path, (_, value) in s.items()} for s in (before, after))
        return old, new

    closed, shapes = jax.make_jaxpr(values, return_shape=True)(*state)
    before, after = jax.tree.unflatten(jax.tree.structure(shapes), _sources(closed.jaxpr))
    return _changed(
        {path: (object, source) for path, source in before.items()},
        {path: (kinds["after"][path], source) for path, source in after.items()},
    )


def _sources(jaxpr: Any) -> list[Any]:
    """Finds the variable that calls in the jaxpr pass through to each output, if they do."""
    passed_through: dict[Any, Any] = {}

    def source(atom: Any) -> Any:
        return passed_through.get(atom, atom) if isinstance(atom, jcore.Var) else atom

    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive in _CALLS and inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            outside = dict(zip(inner.invars, map(source, eqn.invars), strict=True))
            for out, of in zip(eqn.outvars, _sources(inner), strict=True):
                if isinstance(of, jcore.Var) and of in outside:
                    passed_through[out] = outside[of]
    return [source(atom) for atom in jaxpr.outvars]


def _values(module: nnx.Module) -> _State:
    """Lists the types and the values of all variables and arrays of a module."""
    return {
        path: (type(leaf), leaf.get_value())
        if isinstance(leaf, nnx.Variable)
        else (jax.Array, leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }


def _names(paths: list[Path]) -> list[str]:
    return [".".join(map(str, path)) for path in paths]
