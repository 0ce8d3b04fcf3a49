"""The manual mesh axes over which a value varies from device to device, and JAX's types for them.

JAX differentiates collectives correctly only where the type of a value has the axes over which it
varies (`check_vma=True` of `jax.shard_map`): the sum of varying values does not vary, and its
transpose is a cast. So the model's functions and their derivatives are traced where JAX keeps these
types. The step itself runs without them: over the pipeline axis all values vary, and code that
does not know that axis would not pass the check.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.extend import core as jcore
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax._model.types import Mesh, PyTree

# Primitives that change the type alone.
_CASTS = frozenset({"pvary", "pcast"})


def inside(
    build: Callable[[], Any],
    *,
    mesh: Mesh | None,
    outer: Iterable[str],
    manual: tuple[str, ...],
) -> Any:
    """Returns `build()`, called in the context in which the model's functions are traced.

    Args:
      build: The function; its result may hold jaxprs, but no arrays made in the call.
      mesh: The mesh; None for that of the context.
      outer: The axes that are manual without types.
      manual: The axes that are manual with types.
    """
    built = []

    def here() -> tuple[()]:
        built.append(build())
        return ()

    def there() -> tuple[()]:
        if not manual:
            return here()
        return jax.shard_map(here, in_specs=(), out_specs=(), axis_names=set(manual))()

    run = jax.shard_map(
        there, mesh=mesh, in_specs=(), out_specs=(), axis_names=set(outer), check_vma=False
    )
    jax.eval_shape(run)
    return built[0]


def varies_over(value: Any) -> frozenset[str]:
    """Returns the axes over which an array, or an aval of `jax.eval_shape`, varies."""
    aval = jax.typeof(value) if isinstance(value, jax.Array) else value
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def cast(value: Any, axes: Iterable[str]) -> Any:
    """Changes the type of an array to one that varies over `axes` too."""
    missing = tuple(sorted(set(axes) - varies_over(value)))
    return lax.pcast(value, missing, to="varying") if missing else value


def aval(value: Any, axes: Iterable[str] = ()) -> jax.ShapeDtypeStruct:
    """Makes the aval of an array that varies over `axes`."""
    plain = jax.ShapeDtypeStruct(value.shape, value.dtype)
    axes = tuple(axes)
    return eval_shape(lambda array: cast(array, axes), plain) if axes else plain


def eval_shape(function: Callable[..., Any], *args: Any) -> Any:
    """As `jax.eval_shape`; the returned avals may be arguments of another call."""
    return with_mesh(jax.eval_shape(function, *args))


def with_mesh(avals: PyTree) -> PyTree:
    """Gives avals that vary the mesh of the context, which JAX requires of an argument.

    JAX leaves the mesh out of the avals that it returns if some axes are the partitioner's.
    """

    def add_mesh(leaf: Any) -> Any:
        if not varies_over(leaf) or leaf.sharding is not None:
            return leaf
        return leaf.update(
            sharding=NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
        )

    return jax.tree.map(add_mesh, avals)


def close_over(step: Callable[[PyTree], tuple[list[PyTree], Any]], x: PyTree) -> tuple[PyTree, Any]:
    """Finds the manual axes over which x varies if functions of x return the next x.

    Args:
      step: `x -> (ys, rest)`, on avals: the results that become the next x, and any others.
      x: Avals.

    Returns:
      Avals of x, which vary over the axes of all ys too, and the rest.
    """
    leaves, structure = jax.tree.flatten(x)
    axes = [varies_over(leaf) for leaf in leaves]
    # A fixpoint: a round that is not the last one adds an axis to a leaf, and no leaf loses one.
    for _ in range(1 + len(leaves) * len(jax.sharding.get_abstract_mesh().manual_axes)):
        x, before = jax.tree.unflatten(structure, map(aval, leaves, axes)), axes
        ys, rest = step(x)
        for y in ys:
            axes = [a | varies_over(b) for a, b in zip(axes, jax.tree.leaves(y), strict=True)]
        if axes == before:
            return x, rest
    raise AssertionError("x varied over more axes than there are")


def sum_over(values: PyTree, axes: Iterable[str]) -> PyTree:
    """Sums arrays over mesh axes, twice over an axis that is named twice.

    Axes of one device are left out: if all manual axes have one, XLA's partitioner refuses sums.
    """
    left = [name for name in axes if lax.axis_size(name) > 1]
    while left:
        once = tuple(dict.fromkeys(left))
        values = lax.psum(values, once)
        for name in once:
            left.remove(name)
    return values


def largest_over(values: PyTree, axes: Iterable[str]) -> PyTree:
    """Finds the largest entries over mesh axes."""
    several = tuple(dict.fromkeys(name for name in axes if lax.axis_size(name) > 1))
    return lax.pmax(values, several) if several else values


def named_axes(jaxpr: Any) -> set[str]:
    """Collects the mesh axes that the collectives of a jaxpr name."""
    names: set[str] = set()
    for eqn in jaxpr.eqns:
        names |= _axes_of(eqn)
        for inner in jcore.jaxprs_in_params(eqn.params):
            names |= named_axes(inner)
    return names


def without_types(closed: Any) -> Any:
    """Rewrites a jaxpr without types of varying values; it computes the same values.

    Raises:
      ValueError: If not all devices of an axis run a collective over it, which JAX does not refuse.
    """
    _require_all_run_collectives(closed.jaxpr)
    if not any(varies_over(var.aval) for var in _variables(closed.jaxpr)):
        return closed
    return jcore.ClosedJaxpr(_untyped(closed.jaxpr), closed.consts)


def _require_all_run_collectives(jaxpr: Any) -> None:
    """Requires all devices of an axis to run each collective over it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "shard_map":  # JAX checks the model's own
            continue
        inner = list(jcore.jaxprs_in_params(eqn.params))
        chosen_over: frozenset[str] = frozenset()
        if eqn.primitive.name == "cond":
            chosen_over = varies_over(eqn.invars[0].aval)
        elif eqn.primitive.name == "while":
            chosen_over = varies_over(eqn.params["cond_jaxpr"].jaxpr.outvars[0].aval)
        refused = set().union(*map(_communicates_over, inner)) & chosen_over
        if refused:
            raise ValueError(
                f"model: a jax.lax.{eqn.primitive.name} must not hold a collective over "
                f"{', '.join(map(repr, sorted(refused)))}, where devices of that axis choose "
                "differently: some would wait for ever; choose by a value that is the same on all "
                "of them, or move the collective out. The gradient of a value that is the same on "
                "all devices is a collective too: give the value to "
                "jax.lax.pcast(.., to='varying') before the choice"
            )
        for jaxpr_inside in inner:
            _require_all_run_collectives(jaxpr_inside)


def _communicates_over(jaxpr: Any) -> set[str]:
    """Collects the mesh axes over which a jaxpr sends values."""
    local = {"axis_index", *_CASTS}
    return {
        name
        for eqn in jaxpr.eqns
        if eqn.primitive.name not in local
        for name in _axes_of(eqn)
        | set().union(*map(_communicates_over, jcore.jaxprs_in_params(eqn.params)))
    }


def _axes_of(eqn: Any) -> set[str]:
    values = (eqn.params.get(key, ()) for key in ("axes", "axis_name"))
    entries = (value if isinstance(value, tuple | list) else (value,) for value in values)
    return {entry for names in entries for entry in names if isinstance(entry, str)}


def _variables(jaxpr: Any) -> Iterable[Any]:
    """Yields the variables of a jaxpr and of the jaxprs in it that share its types."""
    yield from (*jaxpr.constvars, *jaxpr.invars)
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        if eqn.primitive.name != "shard_map":  # the model's own has its own types
            for inner in jcore.jaxprs_in_params(eqn.params):
                yield from _variables(inner)


def _untyped(jaxpr: Any) -> Any:
    """Rewrites a jaxpr and those in it: variables vary over nothing, and casts are left out."""
    env: dict[Any, Any] = {}

    def new(var: Any) -> Any:
        known = var.aval
        if not varies_over(known):
            env[var] = var
        else:
            env[var] = jcore.Var(
                jax.core.ShapedArray(
                    known.shape,
                    known.dtype,
                    weak_type=known.weak_type,
                    sharding=known.sharding,
                    memory_space=known.memory_space,
                )
            )
        return env[var]

    def read(atom: Any) -> Any:
        return atom if isinstance(atom, jcore.Literal) else env[atom]

    constvars, invars = [[new(var) for var in group] for group in (jaxpr.constvars, jaxpr.invars)]
    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _CASTS:
            env.update(zip(eqn.outvars, map(read, eqn.invars), strict=True))
            continue
        primitive, params = _without_kind(eqn)
        if primitive.name == "shard_map":
            # With its check it would refuse values whose types were removed here.
            params = {**params, "check_vma": False}
        eqns.append(
            eqn.replace(
                primitive=primitive,
                params={name: _untyped_param(value) for name, value in params.items()},
                invars=[read(atom) for atom in eqn.invars],
                outvars=[new(var) for var in eqn.outvars],
            )
        )
    return jaxpr.replace(
        constvars=constvars,
        invars=invars,
        eqns=eqns,
        outvars=[read(atom) for atom in jaxpr.outvars],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def _without_kind(eqn: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the primitive and params of an equation, collectives without a type of result."""
    untyped = {"psum_invariant": primitives.psum_p, "all_gather_invariant": primitives.all_gather_p}
    primitive = untyped.get(eqn.primitive.name)
    if primitive is None:
        return eqn.primitive, eqn.params
    return primitive, {"axis_index_groups": None, **eqn.params}


def _untyped_param(value: Any) -> Any:
    if isinstance(value, jcore.ClosedJaxpr):
        return jcore.ClosedJaxpr(_untyped(value.jaxpr), value.consts)
    if isinstance(value, jcore.Jaxpr):
        return _untyped(value)
    if isinstance(value, tuple | list):
        return type(value)(map(_untyped_param, value)) if type(value) in (tuple, list) else value
    return value
