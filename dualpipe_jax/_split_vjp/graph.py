"""A program as a flat list of nodes over numbered values, each value marked by its dependencies.

`equations.py` makes a `Graph` of a jaxpr; every pass of this package reads or rewrites one. The
nodes of a graph always stand in an order in which they can run.
"""

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np


class When(enum.IntEnum):
    """When a value can be known, which its dependencies decide."""

    ALWAYS = 0  # depends on parameters, constants and the context alone
    FORWARD = 1  # depends on x
    BACKWARD = 2  # depends on the cotangents, or is recomputed for them under `jax.checkpoint`


@dataclass(frozen=True)
class Constant:
    """A value known at trace time."""

    value: Any


# An operand or a result: a value's number, or a constant in place.
Atom = int | Constant
# The arrays that values have, by number.
Environment = dict[int, Any]


class Inner(Protocol):
    """The programs inside of an equation (a scan, a conditional, a shard_map)."""

    def split(self, graph: "Graph", node: "Node", wanted: set[int]) -> list["Node"]:
        """Splits `node` into a node for its outputs in `wanted` and a node for the rest.

        Args:
          graph: The graph of `node`; values that pass from the first to the second are added to it.
          node: The node whose `inner` this is.
          wanted: Outputs of `node`.

        Returns:
          The two nodes, or `[node]` if the first would need every output, or it must stay whole.
        """
        ...


@dataclass(frozen=True)
class Node:
    """A piece of program: one equation, or one made of several.

    Attributes:
      name: The primitive's name.
      run: From the arrays of `inputs` to the arrays of `outputs`.
      inputs: The operands.
      outputs: Numbers of values.
      when: The latest of its inputs, or later where a `jax.checkpoint` asks for recomputation.
      has_effect: Whether it must run even if no node reads its outputs.
      inner: The programs inside of it, if it is a kind of equation that can be split.
      reduces: The mesh axes over which it sums its input, if it is such a sum.
      is_rough: Whether it is a contraction whose precision is left to the platform.
      params: The dims that it contracts, reduces or transposes, as the equation names them.
    """

    name: str
    run: Callable[..., Sequence[Any]]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    when: When
    has_effect: bool = False
    inner: Inner | None = None
    reduces: tuple[str, ...] = ()
    is_rough: bool = False
    params: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def reads(self) -> tuple[int, ...]:
        """The numbers among the inputs."""
        return tuple(i for i in self.inputs if isinstance(i, int))


@dataclass
class Graph:
    """Nodes in an order in which they can run, and the abstract value and time of each value.

    Attributes:
      nodes: The nodes.
      avals: The abstract value of each value.
      when: When each value is known.
      zeros: The values known to be zero: the gradients of inputs that no output depends on.
      offloaded: The values that are to wait in the host's memory, if they wait at all.
    """

    nodes: list[Node] = field(default_factory=list)
    avals: list[Any] = field(default_factory=list)
    when: list[When] = field(default_factory=list)
    zeros: set[int] = field(default_factory=set)
    offloaded: set[int] = field(default_factory=set)

    def new_value(self, aval: Any, when: When) -> int:
        """Numbers a new value."""
        self.avals.append(aval)
        self.when.append(when)
        return len(self.avals) - 1

    def num_bytes(self, value: int) -> int:
        """Counts the bytes of a value."""
        aval = self.avals[value]
        return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)

    def is_free(self, value: Atom) -> bool:
        """Whether a value depends on parameters, constants and the context alone."""
        return isinstance(value, Constant) or self.when[value] is When.ALWAYS

    def is_zero(self, value: Atom) -> bool:
        """Whether a value is known to be zero everywhere."""
        if isinstance(value, Constant):
            constant = value.value
            # Not all constants compare: cotangents of integers, float0, are zeros, and keys
            # are not.
            dtype = getattr(constant, "dtype", None)
            if dtype == jax.dtypes.float0:
                return True
            if np.ndim(constant) != 0 or isinstance(constant, jax.core.Tracer):
                return False
            is_key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
            return not is_key and bool(constant == 0)
        return value in self.zeros


def numbers(atoms: Iterable[Atom]) -> list[int]:
    """Lists the values that have a number, without the constants."""
    return [v for v in atoms if isinstance(v, int)]


def evaluate(nodes: Iterable[Node], env: Environment) -> None:
    """Runs `nodes` whose values are not in `env`, reading values from it and writing to it."""
    for node in nodes:
        if node.outputs and all(v in env for v in node.outputs):
            continue
        outs = node.run(*(read(env, i) for i in node.inputs))
        env.update(zip(node.outputs, outs, strict=True))


def read(env: Environment, atom: Atom) -> Any:
    """Reads a value or a constant."""
    return atom.value if isinstance(atom, Constant) else env[atom]


def needed(nodes: Sequence[Node], wanted: Iterable[Atom], known: Iterable[int] = ()) -> list[Node]:
    """Selects, in order, the nodes that `wanted` needs, taking the values of `known` as given."""
    known = set(known)
    live = set(numbers(wanted)) - known
    selected = []
    for node in reversed(nodes):
        if live.intersection(node.outputs):
            selected.append(node)
            live.update(v for v in node.reads if v not in known)
    return selected[::-1]


def with_effects(nodes: Sequence[Node], selected: Iterable[Node]) -> list[Node]:
    """Adds to the `selected` nodes those that have an effect (a debug print), with their operands.

    Effects of the backward are left alone.

    Args:
      nodes: All nodes, in order.
      selected: Some of them.
    """
    ids = {id(n) for n in selected}
    effects = [n for n in nodes if n.has_effect and n.when is not When.BACKWARD]
    ids |= {id(n) for n in (*effects, *needed(nodes, {v for n in effects for v in n.reads}))}
    return [n for n in nodes if id(n) in ids]


def show(nodes: Iterable[Node], names: Mapping[int, str] | None = None) -> None:
    """Prints nodes a line each, values by number, or by name where `names` has one.

    >>> show([Node("mul", len, (0, Constant(2.0)), (1,), When.FORWARD)], {0: "x"})
    v1 = mul x 2.0
    """
    known = names or {}

    def name(atom: Atom) -> str:
        return str(atom.value) if isinstance(atom, Constant) else known.get(atom, f"v{atom}")

    for node in nodes:
        print(*map(name, node.outputs), "=", node.name, *map(name, node.inputs))
