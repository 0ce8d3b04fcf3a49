"""Decides whether two equations, or two programs, are the same up to the names of variables.

Two layers become one block if their equations are the same, so a wrong "the same" is a wrong
gradient without a word, and a wrong "different" costs one more kind of layer. Whatever this module
does not know counts as different. Functions (callbacks, kernels' functions) are the same if they
are one object, policies of a checkpoint also if one line of code made them of equal values, custom
derivatives if they trace to the same program, arrays if their bytes are. Programs within equations
are compared equation by equation.
"""

import dataclasses
import enum
import functools
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jcore

from dualpipe_jax._from_loss.run import run_equation

# They name a program, or say how it is compiled alone: the values are the same.
_IGNORED = {
    "jit": {"name", "inline", "keep_unused", "donated_invars"},
    "custom_jvp_call": {"jvp_jaxpr_fun", "name"},
    "custom_vjp_call": {"fwd_jaxpr_thunk", "bwd", "out_trees", "name"},
}
_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype, enum.Enum, type)


class Equality:
    """Compares equations; remembers the programs of custom derivatives, which are traced once."""

    def __init__(self):
        self._rules: dict[int, tuple[jcore.JaxprEqn, jcore.ClosedJaxpr | None]] = {}

    def same_equation(
        self, a: jcore.JaxprEqn, b: jcore.JaxprEqn, *, with_rules: bool = True
    ) -> bool:
        """Whether two equations do the same to their operands, whatever these are.

        Args:
          a: An equation.
          b: Another one.
          with_rules: Whether custom derivatives count; they do not in a derivative.
        """
        if a is b:
            return True
        return (
            a.primitive is b.primitive
            and len(a.invars) == len(b.invars)
            and self._same_avals(a.outvars, b.outvars)
            and self._same_avals(a.invars, b.invars)
            and (
                not (a.effects or b.effects)
                or _effects(a.effects, a.invars) == _effects(b.effects, b.invars)
            )
            and _same_context(a.ctx, b.ctx)
            and self._same_params(a, b, with_rules=with_rules)
            and (not with_rules or self._same_rules(a, b))
        )

    def differing(self, a: jcore.JaxprEqn, b: jcore.JaxprEqn) -> list[str]:
        """Names the parameters in which two equations of one primitive differ."""
        if a.primitive is not b.primitive:
            return []
        names = a.params.keys() & b.params.keys() - _IGNORED.get(a.primitive.name, set())
        return sorted(
            name
            for name in names
            if not self._same(a.params[name], b.params[name], with_rules=True)
        )

    def same_program(
        self, a: jcore.ClosedJaxpr, b: jcore.ClosedJaxpr, *, with_rules: bool = True
    ) -> bool:
        """Whether two programs have the same equations in the same order, and the same values."""
        if a is b:
            return True
        left, right = a.jaxpr, b.jaxpr
        if not (
            len(left.eqns) == len(right.eqns)
            and len(a.consts) == len(b.consts)
            and all(map(same_array, a.consts, b.consts))
            and self._same_avals(left.constvars, right.constvars)
            and self._same_avals(left.invars, right.invars)
            and _effects(left.effects, (*left.constvars, *left.invars))
            == _effects(right.effects, (*right.constvars, *right.invars))
        ):
            return False
        names = dict(
            zip((*left.constvars, *left.invars), (*right.constvars, *right.invars), strict=True)
        )

        def same_atoms(left: Sequence[Any], right: Sequence[Any]) -> bool:
            return len(left) == len(right) and all(
                same_literal(x, y)
                if isinstance(x, jcore.Literal) or isinstance(y, jcore.Literal)
                else names[x] is y
                for x, y in zip(left, right, strict=True)
            )

        for one, other in zip(left.eqns, right.eqns, strict=True):
            if not same_atoms(one.invars, other.invars):
                return False
            if not self.same_equation(one, other, with_rules=with_rules):
                return False
            names.update(zip(one.outvars, other.outvars, strict=True))
        return same_atoms(left.outvars, right.outvars)

    def _same_avals(self, a: Sequence[Any], b: Sequence[Any]) -> bool:
        return len(a) == len(b) and all(
            same_aval(x.aval, y.aval) for x, y in zip(a, b, strict=True)
        )

    def _same_params(self, a: jcore.JaxprEqn, b: jcore.JaxprEqn, *, with_rules: bool) -> bool:
        ignored = _IGNORED.get(a.primitive.name, set())
        left, right = a.params, b.params
        if "sharding" in left and "sharding" in right:
            left, right = ({**p, "sharding": _sharding(p["sharding"])} for p in (left, right))
        names = left.keys() - ignored
        return names == right.keys() - ignored and all(
            self._same(left[name], right[name], with_rules=with_rules)
            or (name == "policy" and self._same_policy(left[name], right[name]))
            for name in names
        )

    def _same(self, a: Any, b: Any, *, with_rules: bool) -> bool:
        """Whether two parameters of equations are the same; False where nothing is known."""
        if a is b:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, jcore.ClosedJaxpr):
            return self.same_program(a, b, with_rules=with_rules)
        if isinstance(a, jcore.Jaxpr):
            a, b = (jcore.ClosedJaxpr(x, ()) if not x.constvars else None for x in (a, b))
            return a is not None and b is not None and self._same(a, b, with_rules=with_rules)
        if isinstance(a, np.ndarray | jax.Array):
            return same_array(a, b)
        if isinstance(a, Mapping):
            return list(a) == list(b) and all(
                self._same(a[key], b[key], with_rules=with_rules) for key in a
            )
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(
                self._same(x, y, with_rules=with_rules) for x, y in zip(a, b, strict=True)
            )
        if isinstance(a, _PLAIN):
            return _equal(a, b)
        if isinstance(a, set | frozenset):
            return all(isinstance(x, _PLAIN) for x in (*a, *b)) and a == b
        if dataclasses.is_dataclass(a):
            return all(
                self._same(
                    getattr(a, field.name, None),
                    getattr(b, field.name, None),
                    with_rules=with_rules,
                )
                for field in dataclasses.fields(a)
            )
        return _is_of_jax(a) and _equal(a, b)

    def _same_policy(self, a: Any, b: Any, above: frozenset[tuple[int, int]] = frozenset()) -> bool:
        """Whether two policies are the same, or functions of one line of code and equal values.

        Args:
          a: A policy, or a value that one holds.
          b: Another one.
          above: Those that hold them: a function may hold itself.
        """
        pair = id(a), id(b)
        if pair in above or self._same(a, b, with_rules=True):
            return True
        left, right = _held_by(a), _held_by(b)
        return (
            type(a) is type(b)
            and left is not None
            and right is not None
            and len(left) == len(right)
            and all(
                self._same_policy(x, y, above | {pair}) for x, y in zip(left, right, strict=True)
            )
        )

    def _same_rules(self, a: jcore.JaxprEqn, b: jcore.JaxprEqn) -> bool:
        if a.primitive.name not in _CUSTOM_RULES:
            return True
        left, right = self._rule(a), self._rule(b)
        if left is None or right is None:
            return False
        # A derivative is not derived again: of the functions in it only the values count.
        return self.same_program(left, right, with_rules=False)

    def _rule(self, eqn: jcore.JaxprEqn) -> jcore.ClosedJaxpr | None:
        """Traces the custom derivative of an equation; None if it cannot be traced."""
        if id(eqn) not in self._rules:
            self._rules[id(eqn)] = eqn, _trace_rule(eqn)  # kept, so that no id is used twice
        return self._rules[id(eqn)][1]


def _held_by(f: Any) -> tuple[Any, ...] | None:
    """Lists the code and the values that a function consists of; None if they are not known."""
    if isinstance(f, functools.partial):
        return (f.func, *f.args, tuple(f.keywords), *f.keywords.values())
    if isinstance(f, types.MethodType):
        return (f.__func__, f.__self__)
    if not isinstance(f, types.FunctionType):
        return None
    try:
        cells = [cell.cell_contents for cell in f.__closure__ or ()]
    except ValueError:  # a variable that has no value yet
        return None
    defaults, named = f.__defaults__ or (), f.__kwdefaults__ or {}
    names = (len(defaults), *named)
    return (f.__code__, id(f.__globals__), names, *cells, *defaults, *named.values())


def _trace_rule(eqn: jcore.JaxprEqn) -> jcore.ClosedJaxpr | None:
    if eqn.params.get("symbolic_zeros"):
        return None  # the rule may do otherwise for each choice of operands that have no tangent
    args = [shape_of(atom.aval) for atom in eqn.invars]
    moving = [i for i, arg in enumerate(args) if jnp.issubdtype(arg.dtype, jnp.inexact)]

    def derivative(args: list[Any], cotangents: list[Any]) -> Any:
        def f(some: list[Any]) -> list[Any]:
            full = list(args)
            for i, arg in zip(moving, some, strict=True):
                full[i] = arg
            outs = run_equation(eqn, full)
            return [out for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]

        out, vjp = jax.vjp(f, [args[i] for i in moving])
        return out, vjp(cotangents)

    outs = [shape_of(v.aval) for v in eqn.outvars]
    try:
        return jax.make_jaxpr(derivative)(
            args, [out for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]
        )
    except Exception:  # noqa: BLE001  a user's rule may raise anything: nothing is known of it
        return None


def _sharding(sharding: Any) -> Any:
    """Gives the sharding of an equation's result, None for one over no axis.

    Inside a `jax.shard_map` an equation on inputs has None, and one on results a replicated one.
    """
    is_named = isinstance(sharding, jax.sharding.NamedSharding)
    is_plain = is_named and not any(sharding.spec) and sharding.memory_kind in (None, "device")
    return None if is_plain else sharding


def shape_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Gives the shape and dtype of an abstract value."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def same_literal(a: Any, b: Any) -> bool:
    """Whether two operands are literals of one type and one value."""
    both = isinstance(a, jcore.Literal) and isinstance(b, jcore.Literal)
    return both and same_aval(a.aval, b.aval) and same_value(a.val, b.val)


def same_aval(a: Any, b: Any) -> bool:
    """Whether two abstract values are the same: shape, dtype, weak type, sharding.

    Inputs of a trace inside a `jax.shard_map` know no mesh, and results do: only the specs count.
    """
    if type(a) is not type(b):
        return False
    if not isinstance(a, jax.core.ShapedArray):
        return a == b
    names = ("shape", "dtype", "weak_type", "memory_space", "vma")
    is_same = all(getattr(a, name, None) == getattr(b, name, None) for name in names)
    return is_same and a.sharding.spec == b.sharding.spec


def same_value(a: Any, b: Any) -> bool:
    """Whether two literals' values are the same, bit by bit."""
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    return same_array(np.asarray(a), np.asarray(b))


def same_array(a: Any, b: Any) -> bool:
    """Whether two arrays have the same type and the same bytes; tracers: are one object."""
    if a is b:
        return True
    if any(isinstance(x, jax.core.Tracer) for x in (a, b)):
        return False
    if not all(hasattr(x, "dtype") and hasattr(x, "shape") for x in (a, b)):
        return type(a) is type(b) and isinstance(a, _PLAIN) and _equal(a, b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if getattr(a, "weak_type", False) != getattr(b, "weak_type", False):
        return False
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if not all(getattr(x, "is_fully_addressable", True) for x in (a, b)):
        return False
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _same_context(a: Any, b: Any) -> bool:
    """Whether two equations run in the same setting: on a host, say, or with XLA's metadata."""
    names = ("compute_type", "threefry_partitionable", "cur_abstract_mesh", "xla_metadata")
    return all(_equal(getattr(a, name, None), getattr(b, name, None)) for name in names)


def _effects(effects: Iterable[Any], operands: Sequence[Any]) -> list[tuple[str, str]]:
    """Lists effects by their types, and those on an operand by its number."""

    def target(effect: Any) -> str:
        fields = list(getattr(effect, "__dict__", {}).values())
        numbers = [
            str(i) for i, operand in enumerate(operands) if any(operand is f for f in fields)
        ]
        return numbers[0] if numbers else repr(effect)

    return sorted((type(effect).__qualname__, target(effect)) for effect in effects)


def _is_of_jax(value: Any) -> bool:
    """Whether JAX defines the type of a value, and so defines its `==`; not of functions."""
    module = type(value).__module__.partition(".")[0]
    return module in ("jax", "jaxlib")


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    # 0.0 == -0.0, but they are not the same.
    if type(a) is not type(b) or (isinstance(a, float | complex) and repr(a) != repr(b)):
        return False
    result = a == b
    return isinstance(result, bool | np.bool_) and bool(result)
