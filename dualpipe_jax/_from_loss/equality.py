"""Names equations and programs by tokens: equal tokens, same function of the operands.

Two layers become one block if their equations have the same tokens, so a wrong "the same" is a
wrong gradient without a word, and a wrong "different" costs one more kind of layer. A token takes
apart only what JAX owns: programs, equation by equation, arrays by their bytes, containers, its own
classes; and what can never change: numbers, strings, tuples of them. Every other object (a
function, a callback, a user's settings) is itself alone, whatever its class says of `==`. Custom
derivatives are the programs to which they trace.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Hashable, Sequence
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
CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
# Values of exactly these types are no more than their text.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))


class Equality:
    """Gives tokens, integers that are equal for the same equation; remembers all that it named."""

    def __init__(self):
        self._tokens: dict[Hashable, int] = {}
        self._equations: dict[tuple[int, bool], tuple[jcore.JaxprEqn, int]] = {}
        self._programs: dict[tuple[int, bool], tuple[Any, int]] = {}
        self._contexts: dict[tuple[int, ...], tuple[list[Any], int]] = {}
        self._derivatives: dict[int, tuple[jcore.JaxprEqn, jcore.ClosedJaxpr | None]] = {}

    def equation(self, eqn: jcore.JaxprEqn, *, with_rules: bool = True) -> int:
        """Names an equation, whatever its operands are.

        Args:
          eqn: An equation.
          with_rules: Whether custom derivatives count; they do not in a derivative.
        """
        key = id(eqn), with_rules
        if key not in self._equations:
            token = (
                eqn.primitive,
                tuple(self._number(aval_token(v.aval)) for v in eqn.invars),
                tuple(self._number(aval_token(v.aval)) for v in eqn.outvars),
                _effects(eqn.effects, eqn.invars) if eqn.effects else (),
                self._context(eqn.ctx),
                # Numbers, so that no tokens hold others.
                *map(self._number, self.params(eqn, with_rules=with_rules).items()),
                self._rule(eqn) if with_rules and eqn.primitive.name in CUSTOM_RULES else None,
            )
            # The equation is kept, so that no id is used twice.
            self._equations[key] = eqn, self._number(token)
        return self._equations[key][1]

    def differing(self, a: jcore.JaxprEqn, b: jcore.JaxprEqn) -> list[str]:
        """Names the parameters in which two equations of one primitive differ."""
        if a.primitive is not b.primitive:
            return []
        left, right = self.params(a), self.params(b)
        names = sorted(name for name in left if left[name] != right.get(name))
        if not names and a.primitive.name in CUSTOM_RULES and self._rule(a) != self._rule(b):
            return ["the derivative"]
        return [f"{name}{_differing_values(a, b, name)}" for name in names]

    def program(self, program: Any, *, with_rules: bool = True) -> int:
        """Names a program: the same equations in the same order, and the same constants."""
        key = id(program), with_rules
        if key not in self._programs:
            token = self._program(program, with_rules=with_rules)
            self._programs[key] = program, self._number(token)
        return self._programs[key][1]

    def _program(self, program: Any, *, with_rules: bool) -> Hashable:
        jaxpr = getattr(program, "jaxpr", program)
        inputs = (*jaxpr.constvars, *jaxpr.invars)
        numbers = {v: number for number, v in enumerate(inputs)}
        count = itertools.count(len(inputs))

        def atom(a: Any) -> Hashable:
            return literal_token(a) if isinstance(a, jcore.Literal) else numbers[a]

        equations = []
        for eqn in jaxpr.eqns:
            operands = tuple(map(atom, eqn.invars))
            equations.append((self.equation(eqn, with_rules=with_rules), operands))
            numbers.update(zip(eqn.outvars, count, strict=False))
        return (
            "program",
            tuple(self._value(c) for c in getattr(program, "consts", ())),
            tuple(aval_token(v.aval) for v in inputs),
            _effects(jaxpr.effects, inputs),
            tuple(equations),
            tuple(map(atom, jaxpr.outvars)),
        )

    def params(self, eqn: jcore.JaxprEqn, *, with_rules: bool = True) -> dict[str, Hashable]:
        """Names the parameters of an equation."""
        ignored = _IGNORED.get(eqn.primitive.name, ())
        return {
            name: self._policy(value)
            if name == "policy"
            else self._value(_sharding(value) if name == "sharding" else value, with_rules)
            for name, value in sorted(eqn.params.items())
            if name not in ignored
        }

    def _value(self, value: Any, with_rules: bool = True) -> Hashable:
        """Names a parameter of an equation: the one place where values are taken apart."""
        of = functools.partial(self._value, with_rules=with_rules)
        kind = type(value)
        if isinstance(value, jcore.ClosedJaxpr | jcore.Jaxpr):
            return self.program(value, with_rules=with_rules)
        if isinstance(value, jax.Array) or kind is np.ndarray:
            layout = [repr(getattr(value, name, None)) for name in ("strides", "flags")]
            return array_token(value), *(layout if kind is np.ndarray else ())
        if kind in (tuple, list):
            return kind, tuple(map(of, value))
        if kind is frozenset:
            return kind, frozenset(map(of, value))
        if kind in (dict, types.MappingProxyType):
            return kind, tuple((of(key), of(entry)) for key, entry in value.items())
        if kind is jax.tree_util.PyTreeDef:
            return kind, self._structure(value)
        if _is_of_jax(kind):
            if isinstance(value, tuple):
                return kind, tuple(map(of, value))
            if hasattr(value, "__array__") and isinstance(getattr(value, "dtype", 0), np.dtype):
                return array_token(value)
            if kind.__name__ == "HashableArray":  # its == takes 0.0 for -0.0
                return kind, of(value.val)
            names = [f.name for f in dataclasses.fields(value)] if _is_record(value) else []
            if names and set(getattr(value, "__dict__", ())) <= set(names):
                return kind, tuple(of(getattr(value, name, None)) for name in names)
            return _ByItsClass(value)
        return self._of_user(value)

    def _of_user(self, value: Any) -> Hashable:
        """Names an object that a user may have made: only one that can never change is taken apart.

        Two lists of equal entries are two objects, as one of them may change before it is read.
        """
        kind = type(value)
        if kind in _PLAIN:
            return kind, repr(value)
        if isinstance(value, np.generic) and kind.__module__ in ("numpy", "ml_dtypes"):
            return self._of_user(value.dtype), array_token(value)
        if isinstance(value, np.dtype) and value.metadata is None and not value.hasobject:
            return "dtype", str(value)
        if kind is tuple or (
            isinstance(value, tuple) and hasattr(kind, "_fields") and not hasattr(value, "__dict__")
        ):
            return kind, tuple(map(self._of_user, value))
        if kind is functools.partial and not vars(value):
            held = (value.func, value.args, *value.keywords.items())
            return kind, tuple(map(self._of_user, held))
        return _Itself(value)

    def _structure(self, tree: Any) -> Hashable:
        """Names a structure of a pytree, whose nodes may hold a user's objects."""
        data = tree.node_data()
        if data is None:
            return tree.num_leaves
        kind, of_node = data
        names = tuple(of_node) if kind is dict else of_node
        return kind, self._of_user(names), tuple(map(self._structure, tree.children()))

    def _policy(self, policy: Any, above: tuple[int, ...] = ()) -> Hashable:
        """Names a checkpoint's policy, or a value that one holds, by its code and its values.

        A policy says which values are kept, and changes none: one that is made anew in each layer
        may be looked into.
        """
        if id(policy) in above:
            return "above", len(above) - above.index(id(policy))
        if type(policy) is set:
            return set, frozenset(map(self._of_user, policy))
        held = policy if type(policy) in (tuple, list) else _held_by(policy)
        if held is None:
            return self._value(policy)
        return type(policy), tuple(self._policy(value, (*above, id(policy))) for value in held)

    def _context(self, ctx: Any) -> Hashable:
        """Names the setting in which an equation runs: on a host, say, or with XLA's metadata."""
        names = ("compute_type", "threefry_partitionable", "cur_abstract_mesh", "xla_metadata")
        setting = [getattr(ctx, name, None) for name in names]
        key = tuple(map(id, setting))
        if key not in self._contexts:
            self._contexts[key] = setting, self._number(tuple(map(self._value, setting)))
        return self._contexts[key][1]

    def derivative(self, eqn: jcore.JaxprEqn) -> jcore.ClosedJaxpr | None:
        """Traces the custom derivative of an equation, once; None if it cannot be traced."""
        if id(eqn) not in self._derivatives:
            self._derivatives[id(eqn)] = eqn, _trace_derivative(eqn)
        return self._derivatives[id(eqn)][1]

    def _rule(self, eqn: jcore.JaxprEqn) -> Hashable:
        """Names a custom derivative by the program to which it traces."""
        derivative = self.derivative(eqn)
        # A derivative is not derived again: of the functions in it only the values count.
        return _Itself(eqn) if derivative is None else self.program(derivative, with_rules=False)

    def _number(self, token: Hashable) -> int:
        return self._tokens.setdefault(token, len(self._tokens))


class _Itself:
    """An object of which nothing is known: it equals itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


class _ByItsClass:
    """An object of a class of JAX's, which defines `==`: a sharding, a dtype, a mesh."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _ByItsClass) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (self.value == other.value) is True


def _trace_derivative(eqn: jcore.JaxprEqn) -> jcore.ClosedJaxpr | None:
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


def shape_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Gives the shape and dtype of an abstract value."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def aval_token(aval: Any) -> Hashable:
    """Names an abstract value: shape, dtype, weak type, sharding.

    Inputs of a trace inside a `jax.shard_map` know no mesh, and results do: only the specs count.
    """
    if not isinstance(aval, jax.core.ShapedArray):
        return _ByItsClass(aval)
    names = ("shape", "dtype", "weak_type", "memory_space", "vma")
    return (type(aval), *(getattr(aval, name, None) for name in names), aval.sharding.spec)


def literal_token(literal: Any) -> Hashable:
    """Names a literal of a program by its type and value."""
    return "literal", aval_token(literal.aval), value_token(literal.val)


def value_token(value: Any) -> Hashable:
    """Names the value of a literal, bit by bit."""
    return array_token(value if isinstance(value, jax.core.Tracer) else np.asarray(value))


def array_token(array: Any) -> Hashable:
    """Names an array by its type and bytes; one whose bytes are not known by itself."""
    is_known = not isinstance(array, jax.core.Tracer) and array.dtype != object
    if not is_known or not getattr(array, "is_fully_addressable", True):
        return _Itself(array)
    head = ("array", str(array.dtype), array.shape, bool(getattr(array, "weak_type", False)))
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return (*head, np.asarray(array).tobytes())


def same_array(a: Any, b: Any) -> bool:
    """Whether two arrays have the same type and the same bytes; tracers: are one object."""
    return a is b or array_token(a) == array_token(b)


def same_value(a: Any, b: Any) -> bool:
    """Whether two literals' values are the same, bit by bit."""
    return a is b or value_token(a) == value_token(b)


def _held_by(f: Any) -> tuple[Any, ...] | None:
    """Lists the code and the values that a function consists of; None if they are not known."""
    if type(f) is functools.partial:
        return (f.func, *f.args, *f.keywords, *f.keywords.values())
    if isinstance(f, types.MethodType):
        return (f.__func__, f.__self__)
    if not isinstance(f, types.FunctionType):
        return None
    try:
        cells = [cell.cell_contents for cell in f.__closure__ or ()]
    except ValueError:  # a variable that has no value yet
        return None
    defaults, named = f.__defaults__ or (), f.__kwdefaults__ or {}
    return (f.__code__, id(f.__globals__), *cells, *defaults, *named, *named.values())


def _sharding(sharding: Any) -> Any:
    """Gives the sharding of an equation's result, None for one over no axis.

    Inside a `jax.shard_map` an equation on inputs has None, and one on results a replicated one.
    """
    is_named = isinstance(sharding, jax.sharding.NamedSharding)
    is_plain = is_named and not any(sharding.spec) and sharding.memory_kind in (None, "device")
    return None if is_plain else sharding


def _effects(effects: Any, operands: Sequence[Any]) -> Hashable:
    """Lists effects by their types, and those on an operand by its number."""

    def target(effect: Any) -> str:
        fields = list(getattr(effect, "__dict__", {}).values())
        numbers = [
            str(i) for i, operand in enumerate(operands) if any(operand is f for f in fields)
        ]
        return numbers[0] if numbers else repr(effect)

    return tuple(sorted((type(effect).__qualname__, target(effect)) for effect in effects))


def _is_of_jax(kind: type) -> bool:
    """Whether JAX defines a class, and so knows all of its state; not for users' subclasses."""
    return kind.__module__.partition(".")[0] in ("jax", "jaxlib")


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _differing_values(a: jcore.JaxprEqn, b: jcore.JaxprEqn, name: str) -> str:
    """Shows the values of a parameter if they are short; programs are long."""
    texts = [repr(eqn.params.get(name)) for eqn in (a, b)]
    return f": {texts[0]} and {texts[1]}" if max(map(len, texts)) < 80 else ""
