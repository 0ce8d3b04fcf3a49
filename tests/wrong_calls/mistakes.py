"""Classes of mistakes: for each a name, and a strategy of the values that a user may give instead.

A class says whether its values are legal after all. Most are not, and a call with one must be
refused; a call with a legal one must succeed.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

Strategy = st.SearchStrategy[Any]
Accepts = Callable[[Any], bool]


class UsersError(Exception):
    """Stands for any error that a user's own function raises."""


class Missing:
    """Stands for an argument that is left out."""

    def __repr__(self) -> str:
        return "<left out>"


MISSING = Missing()


def never(value: Any) -> bool:
    """Says that no value is legal."""
    return False


def always(value: Any) -> bool:
    """Says that every value is legal."""
    return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Mistake:
    """Holds a class of mistakes in one argument.

    Attributes:
      name: The name of the class.
      values: The values.
      legal: Whether a value is one that the argument may have.
      also: Names by which a message may call the argument, beside its own.
      raises: The type of an error that must come through: that of the user's own function.
    """

    name: str
    values: Strategy
    legal: Accepts = never
    also: tuple[str, ...] = ()
    raises: type[Exception] | None = None


def one_of(values: Iterable[Any]) -> Strategy:
    """Draws one of a few objects, which Hypothesis need not compare or show."""
    made = list(values)
    return st.integers(0, len(made) - 1).map(lambda index: made[index])


def mistake(name: str, *values: Any, **more: Any) -> Mistake:
    """Makes a class of a few values, or of a strategy."""
    is_strategy = len(values) == 1 and isinstance(values[0], st.SearchStrategy)
    return Mistake(name=name, values=values[0] if is_strategy else one_of(values), **more)


class Hostile:
    """An object of no use."""


@dataclass(frozen=True)
class _Pool:
    values: tuple[Any, ...] = field(
        default_factory=lambda: (
            *(None, True, 3, 2.5, 1j, "text", "", b"bytes", (), [], {}, {1}, frozenset(), ...),
            *(object(), Hostile, Hostile(), len, print, range(3), slice(2), math, NotImplemented),
            *(np.ones(2), np.float32(1.5), np.arange(6).reshape(2, 3), np.array("text")),
            *(np.array([None]), jnp.ones(2), jnp.ones((2, 2), bool), np.dtype("float32")),
            *({"a": 1}, [1, "two"], ("x", None), ValueError("no"), "x" * 100_000, {1: 2, "a": 3}),
            *([0] * 50_000, dict.fromkeys(range(20_000)), np.zeros(30_000)),
        )
    )


_POOL = _Pool().values
# Texts with quotes, newlines, control characters, halves of surrogate pairs, other scripts.
_TEXTS = st.text(max_size=12)
_NUMBERS_AS_TEXT = ("4", " 4", "four", "1e3", "4\n", "\u0664", "")


def wrong_type(accepts: Accepts = never, **more: Any) -> Mistake:
    """Objects of every kind but those that the argument takes."""
    return mistake("wrong type", *(v for v in _POOL if not accepts(v)), **more)


def left_out() -> Mistake:
    """No argument where one is required."""
    return mistake("argument left out", MISSING)


def counts(*, least: int = 1, most: int = 10**9, optional: bool = False) -> list[Mistake]:
    """Mistakes in a number of things, from `least` to fewer than `most`."""
    numbers = int | np.integer
    return [
        wrong_type(lambda v: isinstance(v, numbers) or (v is None and optional)),
        mistake("bool for a number", True, False, np.True_),
        mistake("float for an integer", 4.0, 2.5, math.nan, math.inf, -1.0, np.float64(2)),
        mistake("text for a number", *_NUMBERS_AS_TEXT),
        mistake("zero", 0, -0, np.int64(0), legal=lambda v: v >= least),
        mistake("negative number", st.integers(max_value=-1)),
        mistake("number far too large", st.integers(most, 10**30)),
        mistake("number beyond all floats", 10**400, -(10**400), 10**5000, 2**63, 2**64),
        mistake("array for a number", np.array([4, 4]), np.ones((2, 2)), jnp.ones(3)),
    ]


def amounts(*, least: float = 0.0, is_open: bool = False, most: float = 1e100) -> list[Mistake]:
    """Mistakes in a real number from `least` to `most`."""
    numbers = int | float | np.number | np.bool_

    def legal(value: Any) -> bool:
        value = float(value)
        return (value > least if is_open else value >= least) and value <= most

    return [
        wrong_type(lambda v: isinstance(v, numbers)),
        mistake("bool for a number", True, False, np.True_),
        mistake("text for a number", *_NUMBERS_AS_TEXT, "nan"),
        mistake("NaN", math.nan, np.float32("nan")),
        mistake("infinite", math.inf, -math.inf, np.float32("inf"), legal=legal),
        mistake("zero", 0, 0.0, -0.0, legal=legal),
        mistake("negative number", st.floats(max_value=-1e-9, allow_infinity=False)),
        mistake("number far too large", st.floats(min_value=1e101, allow_infinity=False)),
        mistake("number beyond all floats", 10**400, -(10**400), 10**5000),
        mistake("complex for a real number", 1j, 1 + 0j, np.complex64(2)),
        mistake("array for a number", np.ones((2, 2)), jnp.ones(3), np.array([])),
    ]


def memories() -> list[Mistake]:
    """Mistakes in a number of bytes, or a text with a unit."""
    return [
        mistake("unknown unit", "80XB", "GiB", "80 80", "1e3e3GiB", "8,0GiB", "80GiBGiB"),
        mistake("NaN", math.nan, "nan", "nanGiB"),
        mistake("infinite", -math.inf, "inf", "-inf GiB", "1e400"),
        mistake("negative number", -1, "-80GiB", -0.5),
        mistake("number beyond all floats", "1" * 5000, "9" * 400 + "GiB", 10**400),
        mistake("odd characters", _TEXTS.filter(lambda text: not text.strip()[:1].isdigit())),
        mistake("bool for a number", True, False),
    ]


def too_small_on_host() -> Mistake:
    """Bytes of the host's memory that are too few for any value."""
    return mistake("number far too small", 1, 2**20 - 1, "0.5", "1023KiB", np.float32(0.25))


def names(
    known: Iterable[str], *, optional: bool = False, extra: Accepts = never, **more: Any
) -> list[Mistake]:
    """Mistakes in one of the known names."""
    made = tuple(known)
    near = [f(name) for name in made for f in (str.upper, str.title, lambda n: f" {n}", _cut)]
    return [
        wrong_type(lambda v: (v is None and optional) or extra(v), **more),
        mistake("unknown name", *({*near, "other", "default"} - {*made}), **more),
        mistake("odd characters", _TEXTS.filter(lambda text: text not in made), **more),
        mistake("very long text", "x" * 100_000, "dualpipe" * 1000, "\n" * 3000, **more),
        mistake("bytes for text", *(name.encode() for name in made), b"\xff\xfe", **more),
    ]


def but(mistakes: Iterable[Mistake], *left_out: str) -> list[Mistake]:
    """Leaves out classes that are no mistakes in some callable."""
    return [each for each in mistakes if each.name not in left_out]


def is_big(value: Any) -> bool:
    """Whether a value is an array or a collection, which `==` does not compare to a bool."""
    return isinstance(value, np.ndarray | jax.Array | list | dict | tuple)


def _cut(name: str) -> str:
    return name[:-1]


def flags(*, known: tuple[Any, ...] = (True, False), optional: bool = False) -> list[Mistake]:
    """Mistakes in one of a few values, such as True and False."""
    return [
        wrong_type(lambda v: any(v is k for k in known) or (v is None and optional)),
        mistake("number for a bool", 0, 1, 2, 0.0, 1.0, np.int64(1)),
        mistake("text for a bool", "True", "yes", "false", ""),
    ]


def functions(*, optional: bool = False, **more: Any) -> list[Mistake]:
    """Mistakes in a function: no function, or one that takes other arguments."""
    return [
        wrong_type(lambda v: callable(v) or (v is None and optional), **more),
        mistake(
            "function of other arguments",
            lambda: 0,
            lambda a, b, c, d, e, f: a,
            lambda *, key: key,
            **more,
        ),
    ]
