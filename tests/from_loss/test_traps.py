"""Layers that differ in state on the host alone, which looks the same to a comparison.

Four layers, each with another factor that is hidden from `==`, from a dataclass's fields, or from a
pytree's structure. Merged into one block they would be another model, without a word: either the
loss is refused, by the layers and the line, or loss and gradient are those of the loss itself.
"""

import collections
import contextvars
import enum
import functools
import itertools
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call
from jax.experimental import pallas as pl
from jax.experimental.hijax import VJPHiPrimitive
from jax.extend import core as jcore
from jax.interpreters import ad, mlir

import dualpipe_jax as dpj
from dualpipe_jax._from_loss import equality

Layer = Callable[[Any], Any]
OfFactor = Callable[[float], Any]
FACTORS = (0.5, 0.75, 1.25, 1.5)
KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {f"w{i}": jax.random.normal(KEYS[i], (3, 3)) for i in range(4)}
BATCH = jax.random.normal(KEYS[4], (2, 3))
SHAPE = jax.ShapeDtypeStruct((2, 3), "float64")

# --- where a callback stands ---------------------------------------------------------------------


def on_host(callback: Any, x: Any, *more: Any) -> Any:
    return jax.pure_callback(callback, SHAPE, lax.stop_gradient(x), *more)


def forward(callback: Any) -> Layer:
    return lambda x: x * on_host(callback, x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_backward(callback: Any, x: Any) -> Any:
    return x


with_backward.defvjp(
    lambda callback, x: (x, None), lambda callback, _, ct: (ct * on_host(callback, ct),)
)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def with_tangent(callback: Any, x: Any) -> Any:
    return x


@with_tangent.defjvp
def _(callback: Any, x: Any, dx: Any) -> Any:
    return x[0], dx[0] * on_host(callback, x[0])


def in_scan(callback: Any) -> Layer:
    return lambda x: lax.scan(lambda c, _: (forward(callback)(c), None), x, None, length=2)[0]


WAYS: dict[str, Callable[[Any], Layer]] = {
    "forward": forward,
    "backward": lambda callback: partial(with_backward, callback),
    "tangent": lambda callback: partial(with_tangent, callback),
    "checkpoint": lambda callback: jax.checkpoint(forward(callback)),
    "scan": in_scan,
}

# --- callbacks -----------------------------------------------------------------------------------


def scale(factor: float, a: Any) -> Any:
    return np.full_like(a, factor)


def scale_by(a: Any, *, factor: float) -> Any:
    return scale(factor, a)


def mark(value: Any, factor: float) -> Any:
    object.__setattr__(value, "factor", factor)
    return value


class Scale:
    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, a: Any) -> Any:
        return scale(self.factor, a)


class EqualScale(Scale):
    answer: Any = True

    def __eq__(self, other: object) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if self.answer is not True and not caller.startswith("dualpipe_jax"):
            return self is other  # JAX's own caches compare, too
        if self.answer is None:
            raise RuntimeError("not to be compared")
        return self.answer

    def __hash__(self) -> int:
        return 0


class RaisingScale(EqualScale):
    answer = None


class ArrayScale(EqualScale):
    answer = np.array([True, True])


class SlotsScale:
    __slots__ = ("factor",)
    __init__, __call__ = Scale.__init__, Scale.__call__

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class EqualTypes(type):
    """The type of types that are equal, and callbacks."""

    factor: float

    def __eq__(cls, other: object) -> bool:
        return True

    def __hash__(cls) -> int:
        return 0

    def __call__(cls, a: Any) -> Any:
        return scale(cls.factor, a)


REGISTRY: dict[int, Any] = {}


def kept(value: Any) -> Any:
    REGISTRY[id(value)] = value
    return value


def registered(factor: float) -> Any:
    value = Plain()
    REGISTRY[id(value)] = value, factor
    return value


def in_module(factor: float) -> Any:
    names: dict[str, Any] = {"scale": scale, "FACTOR": factor}
    exec("def f(a):\n    return scale(FACTOR, a)", names)
    return names["f"]


def with_attribute(factor: float) -> Any:
    def f(a: Any) -> Any:
        return scale(vars(f)["factor"], a)

    return mark(f, factor)


def with_iterator(factor: float) -> Any:
    factors = itertools.repeat(factor)
    return lambda a: scale(next(factors), a)


CODE = in_module(1.0).__code__
CALLBACKS: dict[str, OfFactor] = {
    "closure": lambda factor: lambda a: scale(factor, a),
    "default": lambda factor: lambda a, factor=factor: scale(factor, a),
    "keyword's default": lambda factor: lambda a, *, factor=factor: scale(factor, a),
    "attribute of a function": with_attribute,
    "module": in_module,
    "one code, other globals": lambda factor: types.FunctionType(
        CODE, {"scale": scale, "FACTOR": factor}
    ),
    "partial": lambda factor: partial(scale, factor),
    "partial's keyword": lambda factor: partial(scale_by, factor=factor),
    "partial of a partial": lambda factor: partial(partial(partial(scale)), factor),
    "partial of a method": lambda factor: partial(EqualScale(factor).__call__),
    "partial of an equal object": lambda factor: partial(EqualScale.__call__, EqualScale(factor)),
    "jax's Partial": lambda factor: jax.tree_util.Partial(scale, factor),
    "method": lambda factor: EqualScale(factor).__call__,
    "callable": Scale,
    "callable, equal": EqualScale,
    "callable, slots": SlotsScale,
    "callable, == raises": RaisingScale,
    "callable, == of arrays": ArrayScale,
    "callable type": lambda factor: EqualTypes("Own", (), {"factor": factor}),
    "attribute of a class": lambda f: type("Own", (Scale,), {"factor": f})(f),
    "singledispatch": lambda factor: functools.singledispatch(partial(scale, factor)),
    "wraps": lambda factor: functools.wraps(scale)(lambda a: scale(factor, a)),
    "iterator": with_iterator,
}

# --- values that a callback holds: how they are read, and made -----------------------------------


def read_out(read: Callable[[Any], Any], state: Any, a: Any) -> Any:
    return scale(read(state), a)


@dataclass(frozen=True)
class Holder:
    """A callback of plain fields: equal where they are."""

    read: Callable[[Any], Any]
    state: Any

    def __call__(self, a: Any) -> Any:
        return read_out(self.read, self.state, a)


class Unhashable(Holder):
    """One whose state has no hash: JAX requires one of a callback."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def holder(read: Callable[[Any], Any], state: Any) -> Holder:
    try:
        hash(state)
    except TypeError:
        return Unhashable(read, state)
    return Holder(read, state)


@dataclass(frozen=True)
class Plain:
    """Has a field; the factor stands beside it."""

    size: int = 3


@dataclass(frozen=True)
class Unseen:
    factor: float = field(compare=False)


@dataclass(frozen=True)
class Around:
    array: Any


class Pair(NamedTuple):
    a: int = 1


class MyArray(np.ndarray):
    pass


class Equal(enum.Enum):
    """Members that are equal."""

    A, B, C, D = FACTORS

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def own(base: type, *args: Any) -> OfFactor:
    """Makes values of one subclass, which have an attribute."""
    made = type("Own", (base,), {})
    return lambda factor: mark(made(*args), factor)


def zero(factor: float) -> float:
    return -0.0 if factor < 1 else 0.0


def sign(value: Any) -> Any:
    return 1 + np.copysign(0.25, np.real(value))


def is_true(values: Any) -> Any:
    return 1 + isinstance(min(values), bool)


def ordered(order: Any) -> Any:
    return np.array([[1.0, 2.0], [3.0, 4.0]], order=order)


def flagged(factor: float) -> Any:
    array = np.ones(2)
    array.flags.writeable = factor > 1
    return array


MINUTE, SECONDS = (1, "m"), (60, "s")
ATTRIBUTES: dict[str, OfFactor] = {
    **{base.__name__: own(base, 1) for base in (int, float, complex, np.float64, Plain, Pair)},
    **{base.__name__: own(base, "a") for base in (str, tuple, list, set, frozenset)},
    **{
        base.__name__: own(base, {"a": 1})
        for base in (dict, collections.OrderedDict, collections.UserDict)
    },
    "bytes": own(bytes, b"a"),
    "array": lambda factor: mark(np.ones(2).view(MyArray), factor),
    "partial": lambda factor: mark(partial(scale), factor),
    "beside the fields": lambda factor: mark(Plain(), factor),
    "compare=False": Unseen,
    "module": lambda factor: mark(types.ModuleType("m"), factor),
    "namespace": lambda factor: types.SimpleNamespace(factor=factor),
    "equal types": lambda factor: EqualTypes("Own", (), {"factor": factor}),
    "equal objects": EqualScale,
}
VALUES: dict[str, tuple[Callable[[Any], Any], OfFactor]] = {
    "zeros": (sign, zero),
    "zeros of float32": (sign, lambda f: np.float32(zero(f))),
    "zeros of complex64": (sign, lambda f: np.complex64(zero(f))),
    "zeros in a structure": (
        lambda v: sign(v["a"]),
        lambda f: np.array(zero(f), [("a", "f8")])[()],
    ),
    "zeros in an array": (sign, lambda f: np.array(zero(f))),
    "zeros in a set": (lambda s: sign(min(s)), lambda f: {zero(f)}),
    "zeros as keys": (lambda d: sign(min(d)), lambda f: {zero(f): 1}),
    "NaNs": (sign, lambda f: np.copysign(np.nan, f - 1)),
    "NaNs in an array": (sign, lambda f: np.array(np.copysign(np.nan, f - 1))),
    "type of keys": (is_true, lambda f: {f > 1 or 1: 1}),
    "type in a set": (is_true, lambda f: {f > 1 or 1}),
    "order of a set": (
        lambda s: 1 + next(iter(s)),
        lambda f: frozenset([0, 8] if f > 1 else [8, 0]),
    ),
    "order of keys": (lambda d: 1 + next(iter(d)), lambda f: {int(f): 0, 1 - int(f): 0}),
    "unit": (lambda t: t.astype(int), lambda f: np.timedelta64(*(MINUTE if f > 1 else SECONDS))),
    "dtype's metadata": (lambda d: d.metadata["a"], lambda f: np.dtype("f8", metadata={"a": f})),
    "array's dtype's metadata": (
        lambda a: a.dtype.metadata["a"],
        lambda f: np.ones(2, np.dtype("f8", metadata={"a": f})),
    ),
    "array's layout": (lambda a: a.ravel("K")[1], lambda f: ordered("F" if f > 1 else "C")),
    "array's flags": (lambda a: 1 + a.flags.writeable, flagged),
    "array's dtype": (lambda a: a.dtype.itemsize, lambda f: np.zeros(2, "f4" if f > 1 else "f8")),
    "mask": (lambda a: a.sum(), lambda f: np.ma.array([1.0, 2.0], mask=[f > 1, False])),
    "objects": (lambda a: a[0].factor, lambda f: np.array([EqualScale(f)], object)),
    "factory": (lambda d: d.default_factory(), lambda f: collections.defaultdict(lambda: f)),
    "maps": (lambda c: c.maps[1]["a"], lambda f: collections.ChainMap({"a": 1}, {"a": f})),
    "members": (lambda member: member.value, Equal),
    "range": (lambda r: r.step, lambda f: range(0, 1, int(4 * f))),
    "deque": (lambda d: d.maxlen, lambda f: collections.deque(maxlen=int(4 * f))),
    "frozen, around an array": (lambda a: a.array[0], lambda f: Around(np.array([f]))),
    "by its id": (lambda v: REGISTRY[id(v)][1], registered),
    "iterator": (next, itertools.repeat),
    "cache": (lambda cached: cached(), lambda f: functools.cache(lambda: f)),
    "generator": (next, lambda f: (f for _ in itertools.count())),
    "weakref": (lambda ref: ref().factor, lambda f: weakref.ref(kept(EqualScale(f)))),
    "variable": (lambda v: v.get(), lambda f: contextvars.ContextVar("factor", default=f)),
    **{f"attribute, {name}": (attrgetter("factor"), make) for name, make in ATTRIBUTES.items()},
}
LATER: list[Callable[[], Any]] = []  # run once the model is made


def later(value: Any, change: Callable[[Any, float], Any]) -> OfFactor:
    """Makes equal values that change when the model is made."""

    def make(factor: float) -> Any:
        own = value.copy()
        LATER.append(lambda: change(own, factor))
        return own

    return make


def assign(value: Any, factor: float) -> None:
    value[0] = factor


VALUES |= {
    "list, later": (itemgetter(0), later([1.0], assign)),
    "dict, later": (itemgetter(0), later({0: 1.0}, assign)),
    "array, later": (itemgetter(0), later(np.ones(1), assign)),
    "set, later": (max, later({0.0}, set.add)),
    "counter": (lambda calls: calls.append(0) or len(calls), lambda _: []),
}

# --- layers --------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Boxed:
    """A pytree with state in its structure."""

    def __init__(self, leaf: Any, state: Any):
        self.leaf, self.state = leaf, state

    def tree_flatten(self) -> Any:
        return (self.leaf,), self.state

    @classmethod
    def tree_unflatten(cls, state: Any, leaves: Any) -> "Boxed":
        return cls(leaves[0], state)


@partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["state"])
@dataclass
class Fields:
    leaf: Any
    state: Any


def as_partial(leaf: Any, state: Any) -> Any:
    return jax.tree_util.Partial(state, leaf)


def of_structure(a: Any, tree: Any) -> Any:
    state: Any = tree.func if isinstance(tree, partial) else tree.state
    return scale(sign(state) if type(state) is float else state.factor, a)


def structured(make: Callable[..., Any], state: OfFactor) -> OfFactor:
    return lambda f: lambda x: x * on_host(of_structure, x, make(jnp.ones(()), state(f)))


def custom(factor: float, *, symbolic_zeros: bool) -> Layer:
    f = jax.custom_vjp(lambda x: x)
    f.defvjp(
        lambda x: (x.value if symbolic_zeros else x, None),
        lambda _, ct: (ct * factor,),
        symbolic_zeros=symbolic_zeros,
    )
    return f


def custom_tangent(factor: float) -> Layer:
    f = jax.custom_jvp(lambda x: x)
    f.defjvp(lambda x, dx: (x[0], dx[0] * factor), symbolic_zeros=True)
    return f


def kernel(factor: float) -> Layer:
    def run(x: Any, out: Any) -> None:
        out[...] = x[...] * factor

    return lambda x: x * pl.pallas_call(run, SHAPE, interpret=True)(lax.stop_gradient(x))


def static(factor: float) -> Layer:
    f = jax.jit(lambda x, state: x * on_host(state.__call__, x), static_argnums=1)
    return lambda x: f(x, Scale(factor))


def batched(factor: float) -> Layer:
    f = custom_vmap(lambda x: x * 1)
    f.def_vmap(lambda size, is_batched, x: (x * factor, True))
    return jax.vmap(f)


def solved(factor: float) -> Layer:
    return lambda x: lax.custom_linear_solve(
        lambda y: y, x, lambda _, b: b, lambda _, b: b * factor
    )


@dataclass(eq=False)
class High(VJPHiPrimitive):
    def __init__(self, x: Any, factor: float):
        self.in_avals, self.out_aval, self.params = (jax.typeof(x),), jax.typeof(x), {}
        self.factor = factor
        super().__init__()

    def expand(self, *args: Any) -> Any:
        return args[0] * self.factor

    def vjp_fwd(self, nzs_in: Any, /, *args: Any) -> Any:
        return self(*args), None

    def vjp_bwd_retval(self, res: Any, outgrad: Any, /) -> Any:
        return (outgrad * self.factor,)


@dataclass(eq=False)
class Beside:
    size: int = 3


hidden_p = jcore.Primitive("hidden")
hidden_p.def_impl(lambda x, state: x * state.factor)
hidden_p.def_abstract_eval(lambda x, state: x)
ad.deflinear2(hidden_p, lambda ct, x, state: [hidden_p.bind(ct, state=state)])
lowering: Any = mlir.lower_fun(lambda x, state: x * state.factor, multiple_results=False)
mlir.register_lowering(hidden_p, lowering)


def policy(state: Any) -> Layer:
    saves = lambda state, *_, **__: state.factor > 1  # noqa: E731
    return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)), policy=partial(saves, state))


TRACES = itertools.cycle(FACTORS)  # one round for each trace
LAYERS: dict[str, Callable[[float], Layer]] = {
    "structure": structured(Boxed, EqualScale),
    "structure, == raises": structured(Boxed, RaisingScale),
    "structure, == of arrays": structured(Boxed, ArrayScale),
    "structure, a subclass": structured(Boxed, ATTRIBUTES["int"]),
    "structure, zeros": structured(Boxed, zero),
    "meta_fields": structured(Fields, EqualScale),
    "meta_fields, zeros": structured(Fields, zero),
    "meta_fields, beside the fields": structured(Fields, ATTRIBUTES["beside the fields"]),
    "jax's Partial": structured(as_partial, EqualScale),
    "custom_vjp": partial(custom, symbolic_zeros=False),
    "custom_vjp, symbolic_zeros": partial(custom, symbolic_zeros=True),
    "custom_jvp, symbolic_zeros": custom_tangent,
    "kernel": kernel,
    "static argument": static,
    "custom_vmap": batched,
    "linear_call": lambda f: lambda x: linear_call(lambda _, x: x, lambda _, ct: ct * f, (), x),
    "custom_linear_solve": solved,
    "hijax": lambda f: lambda x: High(x, f)(x),
    "primitive": lambda f: partial(hidden_p.bind, state=mark(Beside(), f)),
    "reduce_precision": lambda f: lambda x: lax.reduce_precision(x, 11, int(8 * f)),
    "policy, equal": lambda f: policy(EqualScale(f)),
    "policy, beside the fields": lambda f: policy(mark(Plain(), f)),
    "literal by trace": lambda f: lambda x: x * next(TRACES),
    "callback by trace": lambda f: lambda x: x * on_host(Holder(float, next(TRACES)), x),
}
HOLDERS = {"dataclass": holder, "partial": partial(partial, read_out)}


def traps() -> Iterator[tuple[str, OfFactor]]:
    ways = itertools.cycle(WAYS)
    yield from LAYERS.items()
    for name, make in CALLBACKS.items():
        way = next(ways)
        yield f"{name}, {way}", lambda f, make=make, way=way: WAYS[way](make(f))
    for (name, (read, make)), (held, hold) in itertools.product(VALUES.items(), HOLDERS.items()):
        way = WAYS[next(ways)] if held == "dataclass" else forward
        yield (
            f"{name} in a {held}",
            lambda f, read=read, make=make, hold=hold, way=way: way(hold(read, make(f))),
        )


TRAPS: dict[str, OfFactor] = dict(traps())
WITH_KINDS = set(list(TRAPS)[::11])  # these may be of four kinds, each exact; others are refused


def loss_of(make: Callable[[float], Layer]) -> Callable[..., Any]:
    layers = [make(factor) for factor in FACTORS]

    def loss_fn(params: Any, x: Any) -> Any:
        for i, layer in enumerate(layers):
            x = layer(jnp.tanh(x @ params[f"w{i}"]))
        return jnp.square(x).sum()

    return loss_fn


@pytest.mark.parametrize("name", TRAPS)
def test_layers_of_other_state_are_never_one(name: str) -> None:
    max_kinds = 4 if name in WITH_KINDS else 1
    LATER.clear()
    refusal = found = None
    try:
        model = dpj.from_loss(
            loss_of(TRAPS[name]), PARAMS, SHAPE, layers="w{}", max_kinds=max_kinds
        )
        run = jax.jit(jax.value_and_grad(dpj.sequential(model, num_microbatches=1)))
        for change in LATER:
            change()
        found = run(PARAMS, BATCH)
    except (ValueError, TypeError) as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(r"layers? [0-9]", refusal)
        assert "test_traps.py:" in refusal
        return
    LATER.clear()
    loss_fn = loss_of(TRAPS[name])
    for change in LATER:
        change()
    # Without a jit JAX itself takes a callback for an equal one, whose program it has compiled.
    wanted = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, BATCH)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


# --- layers that are the same --------------------------------------------------------------------


def unchanged(a: Any, *_: Any) -> Any:
    return a


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_rule(f: Layer, x: Any) -> Any:
    return f(x)


with_rule.defvjp(lambda f, x: (f(x), None), lambda f, _, ct: (f(ct),))


def saves(ndim: int, prim: Any, *avals: Any, **params: Any) -> bool:
    return avals[0].ndim == ndim


def with_shardings(x: Any) -> Any:
    device = jax.devices()[0]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("a",), axis_types=auto, devices=[device])
    x = lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P("a")))
    single = jax.sharding.SingleDeviceSharding(device)
    return x * jax.pure_callback(
        unchanged, jax.ShapeDtypeStruct((2, 3), "float64"), lax.stop_gradient(x), sharding=single
    )


def with_parameters(x: Any) -> Any:
    dims = lax.GatherDimensionNumbers((0,), (1,), (1,))
    x = lax.gather(x, jnp.array([[2], [1], [0]]), dims, (2, 1), mode="clip")
    precision = (lax.Precision("highest"), lax.Precision("default"))
    x = lax.dot_general(x, jnp.ones((3, 3)), (((1,), (0,)), ((), ())), precision)
    numbers = lax.ConvDimensionNumbers((0, 2, 1), (2, 1, 0), (0, 2, 1))
    x = lax.conv_general_dilated(x[None], jnp.ones((1, 3, 3)), (1,), "SAME", None, None, numbers)
    return lax.reduce_precision(x[0], 11, 40)


def half(x: Any) -> Any:
    return x * 0.5


SHARED, SIZE = EqualScale(0.5), attrgetter("size")
SAME: dict[str, Callable[[float], Layer]] = {
    "one object": lambda _: forward(SHARED),
    "one object in a structure": structured(Boxed, lambda _: SHARED),
    "equal structures": lambda _: lambda x: x * on_host(unchanged, x, Boxed(1.0, ("a", 1))),
    "partial arguments of a rule": lambda _: partial(with_rule, partial(jnp.multiply, 0.5)),
    "equal static arguments": lambda _: partial(
        jax.jit(lambda state, x: x * state.size, static_argnums=0), Plain(2)
    ),
    "partial policies": lambda _: jax.checkpoint(half, policy=partial(saves, 2)),
    "policies of JAX": lambda _: jax.checkpoint(
        half, policy=jax.checkpoint_policies.save_only_these_names("a")
    ),
    "shardings": lambda _: lambda x: with_shardings(x),
    "parameters of JAX": lambda _: lambda x: with_parameters(x),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_layers_are_one(name: str) -> None:
    assert dpj.from_loss(loss_of(SAME[name]), PARAMS, SHAPE, layers="w{}").layout is None


# One of each kind of state: in a callback, in its arguments, in derivatives, in a kernel.
BLIND = (
    *("closure, forward", "partial's keyword, tangent", "custom_vjp", "kernel"),
    *("attribute, compare=False in a dataclass", "structure"),
)


@pytest.mark.parametrize("name", BLIND)
def test_the_check_does_not_share_the_finders_judgement(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equality._Itself, "__hash__", lambda self: 0)
    monkeypatch.setattr(equality._Itself, "__eq__", lambda self, other: True)
    monkeypatch.setattr(equality.Equality, "_rule", lambda self, eqn: 0)
    loss_fn = loss_of(TRAPS[name])
    with pytest.raises(ValueError, match=r"layers? [0-9].*test_traps\.py:"):
        dpj.from_loss(loss_fn, PARAMS, SHAPE, layers="w{}")
