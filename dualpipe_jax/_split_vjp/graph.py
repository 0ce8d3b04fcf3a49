"""A jaxpr as a flat graph of nodes, calls opened, each value marked by what it depends on.

In: a jaxpr in which a forward and its `jax.vjp` stand one after the other. Out: `Graph`, whose
nodes are small programs over numbered values, in an order in which they can run.
"""

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core as jcore
from jax.extend.core import primitives

# Reads and writes of arrays that change in place, which no value orders.
_OF_REFS = frozenset({"ReadEffect", "WriteEffect", "AccumEffect"})
# What JAX makes the zero gradient of an unused input of.
_KEEP_ZERO = frozenset({"broadcast_in_dim", "convert_element_type", "reshape", "transpose", "copy"})
# Parameters of equations that say which dims they are about.
_PARAMS = ("axes", "dimension_numbers", "permutation")


class When(enum.IntEnum):
    """When a value can be known: what it depends on decides."""

    ALWAYS = 0  # on parameters, constants and the context alone
    FORWARD = 1  # on x
    BACKWARD = 2  # on the cotangents, or recomputed for them under `jax.checkpoint`


# Values are numbered; a node reads numbers or, in place, constants.
@dataclass(frozen=True)
class Constant:
    """A value known at trace time."""

    value: Any


@dataclass(frozen=True)
class Scan:
    """A `lax.scan` equation: its body `jaxpr` takes and its `inputs` are consts, carries, xs.

    It returns carries and ys, `num_carry` and the rest.
    """

    jaxpr: Any
    inputs: tuple[int | Constant, ...]
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


@dataclass(frozen=True)
class Branches:
    """A `lax.cond` or `lax.switch` equation.

    Attributes:
      bodies: For each branch what appends its equations to a graph, given values for `inputs`, and
        returns its outputs.
      index: Which branch is taken, an int32 scalar.
      inputs: What every branch is given.
    """

    bodies: tuple[Callable[["Graph", Sequence[Any]], list[Any]], ...]
    index: int | Constant
    inputs: tuple[int | Constant, ...]


@dataclass(frozen=True)
class Mapped:
    """A `jax.shard_map` equation.

    Attributes:
      body: What appends its equations to a graph, given values for `inputs`, and returns its
        outputs.
      inputs: The operands, whole.
      avals: Of each operand, what a device sees.
      mesh, in_specs, out_specs, axis_names, check_vma: As of `jax.shard_map`.
    """

    body: Callable[["Graph", Sequence[Any]], list[Any]]
    inputs: tuple[int | Constant, ...]
    avals: tuple[Any, ...]
    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    axis_names: frozenset[str]
    check_vma: bool


@dataclass(frozen=True)
class Node:
    """A piece of program: one equation, or one made of several.

    Attributes:
      name: The primitive's name.
      run: From the values of `inputs` to the values of `outputs`.
      inputs: Numbers of values, or constants.
      outputs: Numbers of values.
      when: The latest of its inputs, or later where a `jax.checkpoint` asks for recomputation.
      has_effect: Whether it must run even if nobody reads its outputs.
      inner: What is needed to open it, if it is a kind of equation that can be.
      reduces: The mesh axes over which it sums its input, if that is what it does.
      is_rough: Whether it is a contraction whose precision is left to the platform.
      params: Which dims it contracts, reduces or transposes, as the equation says it.
    """

    name: str
    run: Callable[..., Sequence[Any]]
    inputs: tuple[int | Constant, ...]
    outputs: tuple[int, ...]
    when: When
    has_effect: bool = False
    inner: Scan | Branches | Mapped | None = None
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

    `zeros` are the values known to be zero: the gradients of what the output does not depend on.
    """

    nodes: list[Node] = field(default_factory=list)
    avals: list[Any] = field(default_factory=list)
    when: list[When] = field(default_factory=list)
    zeros: set[int] = field(default_factory=set)

    def new_value(self, aval: Any, when: When) -> int:
        """Numbers a new value."""
        self.avals.append(aval)
        self.when.append(when)
        return len(self.avals) - 1

    def num_bytes(self, value: int) -> int:
        """Counts the bytes of a value."""
        aval = self.avals[value]
        return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)

    def is_zero(self, value: int | Constant) -> bool:
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

    def add(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        inputs: Sequence[Any],
        *,
        late: bool = False,
        scope: str = "",
    ) -> list[Any]:
        """Appends the equations of `jaxpr`, opening calls, and returns its outputs' values.

        Args:
          jaxpr: A `Jaxpr`.
          consts: Values of its constvars.
          inputs: A value's number or a Constant for each of its invars.
          late: Whether everything that depends on x belongs to the backward: so inside whatever
            the backward calls, where the recomputation of a `jax.checkpoint` must not be moved
            into the forward.
          scope: The names of the opened calls around it, for profiles and for reading programs.
        """
        env: dict[Any, int | Constant] = dict(
            zip(jaxpr.constvars, map(Constant, consts), strict=True)
        )
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int | Constant:
            return Constant(atom.val) if isinstance(atom, jcore.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            when = max((self.when[i] for i in ins if isinstance(i, int)), default=When.ALWAYS)
            inner = _called_jaxpr(eqn)
            if inner is not None:
                is_late = late or when is When.BACKWARD
                names = (scope, str(eqn.source_info.name_stack), str(eqn.params.get("name", "")))
                inside = "/".join(filter(None, names))
                outs = self.add(inner.jaxpr, inner.consts, ins, late=is_late, scope=inside)
            else:
                if late and when is When.FORWARD:
                    when = When.BACKWARD
                outs = [self.new_value(var.aval, when) for var in eqn.outvars]
                self.nodes.append(_node(jaxpr, eqn, env, outs, when, scope))
                if eqn.primitive.name in _KEEP_ZERO and self.is_zero(ins[0]):
                    self.zeros.update(outs)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def evaluate(nodes: Iterable[Node], env: dict[int, Any]) -> None:
    """Runs `nodes` whose values are not in `env`, reading values from it and writing to it."""
    for node in nodes:
        if node.outputs and all(v in env for v in node.outputs):
            continue
        outs = node.run(*(read(env, i) for i in node.inputs))
        env.update(zip(node.outputs, outs, strict=True))


def read(env: Mapping[int, Any], atom: int | Constant) -> Any:
    """Reads a value or a constant."""
    return atom.value if isinstance(atom, Constant) else env[atom]


def needed(nodes: Sequence[Node], wanted: Iterable[Any], known: Iterable[int] = ()) -> list[Node]:
    """Selects, in order, the nodes that `wanted` needs, taking the values of `known` as given."""
    known = set(known)
    live = {v for v in wanted if isinstance(v, int)} - known
    selected = []
    for node in reversed(nodes):
        if live.intersection(node.outputs):
            selected.append(node)
            live.update(v for v in node.reads if v not in known)
    return selected[::-1]


def _node(
    jaxpr: Any,
    eqn: Any,
    env: Mapping[Any, int | Constant],
    outs: list[int],
    when: When,
    scope: str,
) -> Node:
    effects = {type(effect).__name__ for effect in eqn.effects}
    if effects & _OF_REFS or eqn.primitive.name == "new_ref":
        raise TypeError(
            "model: embed, block and head must not read or write mutable arrays (jax.new_ref; here "
            f"by {eqn.primitive.name!r}), as their parts run at different times; pass on values"
        )
    if any("Host" in str(getattr(var.aval, "memory_space", "")) for var in eqn.outvars):
        raise ValueError(
            f"model: the block moves values of type {eqn.outvars[0].aval} to the host's memory (by "
            f"{eqn.primitive.name!r}), which slots cannot hold; in remat=, or in the block's own "
            "jax.checkpoint, take a policy that saves or recomputes "
            "(save_only_these_names), not one that offloads (save_and_offload_only_these_names, "
            "offload_dot_with_no_batch_dims)"
        )
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jcore.Literal)))
    # A jaxpr of this one equation: JAX itself knows how to run it in its context and name scope.
    alone = jaxpr.replace(
        constvars=[],
        invars=variables,
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )

    def run(*values: Any) -> list[Any]:
        with jax.named_scope(scope) if scope else nullcontext():
            return jax.core.eval_jaxpr(alone, (), *values)

    return Node(
        name=eqn.primitive.name,
        run=run,
        inputs=tuple(env[v] for v in variables),
        outputs=tuple(outs),
        when=when,
        # That it names a mesh axis counts as an effect with JAX, not here.
        has_effect=bool(effects - {"NamedAxisEffect"}),
        inner=_inner(eqn, env),
        reduces=_reduced_axes(eqn),
        is_rough=_is_rough(eqn),
        params={name: eqn.params[name] for name in _PARAMS if name in eqn.params},
    )


def _inner(eqn: Any, env: Mapping[Any, int | Constant]) -> Scan | Branches | Mapped | None:
    if eqn.primitive is primitives.scan_p:
        return _scan(eqn, env)
    if eqn.primitive is primitives.cond_p:
        index, *inputs = _inputs(eqn, env)
        return Branches(
            bodies=tuple(
                # Whatever a branch holds runs when the equation does: nothing is moved out of it.
                lambda graph, values, branch=branch: graph.add(branch.jaxpr, branch.consts, values)
                for branch in eqn.params["branches"]
            ),
            index=index,
            inputs=tuple(inputs),
        )
    if eqn.primitive.name == "shard_map":
        params, jaxpr = eqn.params, eqn.params["jaxpr"]
        return Mapped(
            body=lambda graph, values: graph.add(jaxpr, (), values),
            inputs=_inputs(eqn, env),
            avals=tuple(v.aval for v in jaxpr.invars),
            mesh=params["mesh"],
            in_specs=params["in_specs"],
            out_specs=params["out_specs"],
            axis_names=frozenset(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )
    return None


def _inputs(eqn: Any, env: Mapping[Any, int | Constant]) -> tuple[int | Constant, ...]:
    return tuple(Constant(v.val) if isinstance(v, jcore.Literal) else env[v] for v in eqn.invars)


def _reduced_axes(eqn: Any) -> tuple[str, ...]:
    if eqn.primitive is not primitives.psum_p or len(eqn.outvars) != 1:
        return ()
    axes = eqn.params["axes"]
    is_named = all(isinstance(axis, str) for axis in axes)
    return tuple(axes) if is_named and eqn.params["axis_index_groups"] is None else ()


def _is_rough(eqn: Any) -> bool:
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
        return False
    precision = eqn.params["precision"]
    of_each = precision if isinstance(precision, tuple) else (precision,)
    return all(each in (None, jax.lax.Precision.DEFAULT) for each in of_each)


def _scan(eqn: Any, env: Mapping[Any, int | Constant]) -> Scan:
    params, body = eqn.params, eqn.params["jaxpr"].jaxpr
    # How an equation says which inputs are which differs between releases of JAX; that xs and ys
    # have one dim more outside than inside does not.
    num_xs = _count_stacked(eqn.invars, body.invars)
    num_carry = len(eqn.outvars) - _count_stacked(eqn.outvars, body.outvars)
    return Scan(
        jaxpr=params["jaxpr"],
        inputs=_inputs(eqn, env),
        num_consts=len(eqn.invars) - num_xs - num_carry,
        num_carry=num_carry,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )


def _count_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True))


def _called_jaxpr(eqn: Any) -> Any:
    """Returns what `eqn` calls if the call can be opened without changing its meaning, or None."""
    primitive, params = eqn.primitive, eqn.params
    if primitive is primitives.jit_p:
        shardings = (*params["in_shardings"], *params["out_shardings"])
        is_plain = all("Unspecified" in type(s).__name__ for s in shardings)
        return params["jaxpr"] if is_plain else None
    if primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p):
        return params["call_jaxpr"]
    if primitive in (primitives.closed_call_p, primitives.call_p):
        return params["call_jaxpr"]
    if primitive is primitives.remat_p:
        jaxpr = params["jaxpr"]
        return jcore.ClosedJaxpr(jaxpr, ()) if not isinstance(jaxpr, jcore.ClosedJaxpr) else jaxpr
    return None
