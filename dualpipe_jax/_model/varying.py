"""Over which manual mesh axes a value differs from device to device, and JAX's types that say so.

JAX derives collectives correctly only where the type of a value says over which axes it varies
(`check_vma=True` of `jax.shard_map`): the sum of what varies does not, and its transpose is a cast.
So the model's functions are traced, with their derivatives, where JAX keeps these types. The step
itself runs without them: over the pipeline axis everything varies, and code that knows nothing of
that axis would not pass the check.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.extend import core as jcore
from jax.extend.core import primitives
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

PyTree = Any

# What only exists between types, and the collectives of which a type picks a kind of its own.
_CASTS = frozenset({"pvary", "pcast"})


def inside(
    build: Callable[[], Any],
    *,
    mesh: Mesh | AbstractMesh | None,
    outer: Iterable[str],
    manual: tuple[str, ...],
) -> Any:
    """Returns `build()`, called where the model's functions are traced for one device.

    There the axes `outer` are manual without types, and the axes `manual` with them. What is built
    may hold jaxprs, but no arrays that were made there.
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
    """Gives an array the type of one that varies over `axes` too."""
    missing = tuple(sorted(set(axes) - varies_over(value)))
    return lax.pcast(value, missing, to="varying") if missing else value


def aval(value: Any, axes: Iterable[str] = ()) -> jax.ShapeDtypeStruct:
    """Makes the aval of an array that varies over `axes`."""
    plain = jax.ShapeDtypeStruct(value.shape, value.dtype)
    axes = tuple(axes)
    return eval_shape(lambda array: cast(array, axes), plain) if axes else plain


def eval_shape(function: Callable[..., Any], *args: Any) -> Any:
    """As `jax.eval_shape`; what it returns may be an argument again."""
    return with_mesh(jax.eval_shape(function, *args))


def with_mesh(avals: PyTree) -> PyTree:
    """Gives avals that vary the mesh of the context, which JAX demands of an argument.

    It leaves the mesh out of what it returns if some axes are the partitioner's.
    """

    def place(leaf: Any) -> Any:
        if not varies_over(leaf) or leaf.sharding is not None:
            return leaf
        return leaf.update(
            sharding=NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
        )

    return jax.tree.map(place, avals)


def close_over(step: Callable[[PyTree], tuple[list[PyTree], Any]], x: PyTree) -> tuple[PyTree, Any]:
    """Finds over which manual axes x varies if the results of functions of x become x again.

    Args:
      step: `x -> (ys, rest)`, on avals: what becomes x again, and anything else.
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
    """Sums arrays over mesh axes; over one that stands twice, twice.

    Axes of one device are left out: where all manual axes are such, XLA's partitioner refuses sums.
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
    """Rewrites a jaxpr so that it runs where no types are kept, to the same values.

    Raises:
      ValueError: If devices part ways before a collective, which JAX does not refuse.
    """
    _require_company(closed.jaxpr)
    if not any(varies_over(var.aval) for var in _variables(closed.jaxpr)):
        return closed
    return jcore.ClosedJaxpr(_plain(closed.jaxpr), closed.consts)


def _require_company(jaxpr: Any) -> None:
    """Requires that all devices of an axis come to each collective over it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "shard_map":  # one of the model's own is JAX's to check
            continue
        inner = list(jcore.jaxprs_in_params(eqn.params))
        parted: frozenset[str] = frozenset()
        if eqn.primitive.name == "cond":
            parted = varies_over(eqn.invars[0].aval)
        elif eqn.primitive.name == "while":
            parted = varies_over(eqn.params["cond_jaxpr"].jaxpr.outvars[0].aval)
        met = set().union(*(_communicates_over(each) for each in inner)) & parted
        if met:
            raise ValueError(
                f"model: a jax.lax.{eqn.primitive.name} must not hold a collective over "
                f"{', '.join(map(repr, sorted(met)))}, where devices of it choose differently: "
                "some would wait for ever; choose by what is the same on all of them, or take the "
                "collective out. The gradient of what is the same on all is one: give it to "
                "jax.lax.pcast(.., to='varying') before the choice"
            )
        for each in inner:
            _require_company(each)


def _communicates_over(jaxpr: Any) -> set[str]:
    alone = {"axis_index", *_CASTS}
    return {
        name
        for eqn in jaxpr.eqns
        if eqn.primitive.name not in alone
        for name in _axes_of(eqn)
        | set().union(*map(_communicates_over, jcore.jaxprs_in_params(eqn.params)))
    }


def _axes_of(eqn: Any) -> set[str]:
    values = (eqn.params.get(key, ()) for key in ("axes", "axis_name"))
    entries = (value if isinstance(value, tuple | list) else (value,) for value in values)
    return {entry for each in entries for entry in each if isinstance(entry, str)}


def _variables(jaxpr: Any) -> Iterable[Any]:
    """Yields the variables of a jaxpr, and of those in it that are typed as it is."""
    yield from (*jaxpr.constvars, *jaxpr.invars)
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        if eqn.primitive.name != "shard_map":  # one of the model's own keeps types of its own
            for inner in jcore.jaxprs_in_params(eqn.params):
                yield from _variables(inner)


def _plain(jaxpr: Any) -> Any:
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
            # One that keeps types of its own would find those missing that were taken out here.
            params = {**params, "check_vma": False}
        eqns.append(
            eqn.replace(
                primitive=primitive,
                params={name: _plain_param(value) for name, value in params.items()},
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
    """Returns the primitive of the collective, whatever its result is for the types."""
    plain = {"psum_invariant": primitives.psum_p, "all_gather_invariant": primitives.all_gather_p}
    primitive = plain.get(eqn.primitive.name)
    if primitive is None:
        return eqn.primitive, eqn.params
    return primitive, {"axis_index_groups": None, **eqn.params}


def _plain_param(value: Any) -> Any:
    if isinstance(value, jcore.ClosedJaxpr):
        return jcore.ClosedJaxpr(_plain(value.jaxpr), value.consts)
    if isinstance(value, jcore.Jaxpr):
        return _plain(value)
    if isinstance(value, tuple | list):
        return type(value)(map(_plain_param, value)) if type(value) in (tuple, list) else value
    return value
