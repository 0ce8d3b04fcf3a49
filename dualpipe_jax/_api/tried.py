"""The arguments of `choose` that may have several values: checked, and made tuples."""

from collections.abc import Iterable, Sequence, Set
from numbers import Integral
from typing import Any, NamedTuple

from dualpipe_jax._api.build import check_remat
from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._model import checks
from dualpipe_jax._model.types import Remat
from dualpipe_jax._predict import Costs
from dualpipe_jax._schedule.named import read_name
from dualpipe_jax.schedules import Schedule, names


class Tried(NamedTuple):
    """Holds the values of which every combination is tried."""

    schedules: tuple[str | Schedule, ...]
    remats: tuple[Remat, ...]
    numbers: tuple[int, ...]


def values_to_try(
    schedules: str | Schedule | Iterable[str | Schedule] | None,
    remat: Remat | Sequence[Remat],
    num_microbatches: int | Sequence[int],
    *,
    costs: Costs | None,
) -> Tried:
    """Checks the arguments that may have several values."""
    remats = _as_tuple("remat", remat, 'of "none", "block" and policies')
    chosen = names() if schedules is None else schedules
    chosen = _as_tuple("schedules", chosen, "of names and Schedules, or None")
    raise_all(
        "schedules: must be names, or Schedules",
        (show(value) for value in chosen if not isinstance(value, str | Schedule)),
        error=TypeError,
    )
    raise_all(
        f"schedules: must be some of {', '.join(map(repr, names()))}, or Schedules",
        (show(value) for value in chosen if isinstance(value, str) and read_name(value) is None),
    )
    numbers: tuple[Any, ...] = (num_microbatches,)
    if not isinstance(num_microbatches, Integral):
        of = "of integers, or one"
        if isinstance(num_microbatches, Set):  # which has no first one
            raise TypeError(f"num_microbatches={brief(num_microbatches)}: must be a sequence {of}")
        numbers = _as_tuple("num_microbatches", num_microbatches, of)
    tried = {"schedules": chosen, "remat": remats, "num_microbatches": numbers}
    for argument, values in tried.items():
        if not values:
            raise ValueError(f"{argument}=(): must hold at least one")
    for number in numbers:
        checks.positive_int("num_microbatches", number)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"num_microbatches={brief(numbers)}: must name each number once")
    for one_remat in remats:
        check_remat(one_remat)
    if not isinstance(costs, Costs | None):
        raise TypeError(f"costs={brief(costs)}: must be a dualpipe_jax.Costs, or None")
    for argument, values in {"remat": remats, "num_microbatches": numbers}.items():
        if costs is not None and len(values) != 1:
            raise ValueError(
                f"costs: must come with the one {argument} that they hold for, not {brief(values)}"
            )
    return Tried(chosen, remats, numbers)


def _as_tuple(argument: str, value: Any, of: str) -> tuple[Any, ...]:
    """Makes a tuple of one value, or of several."""
    if isinstance(value, str | Schedule) or callable(value):
        return (value,)
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"{argument}={brief(value)}: must be a sequence {of}") from None
