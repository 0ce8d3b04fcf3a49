"""The collectives of a trip -> rows of text, those in branches of which the same is said in one."""

from collections.abc import Sequence

from dualpipe_jax._preflight.exposure import Collective
from dualpipe_jax._preflight.units import show_bytes, show_flops, show_number, show_time

HEAD = ("collective", "axes", "", "bytes", "link", "cycles", "matmuls", "compute", "")


def branch_lines(collectives: Sequence[Collective]) -> list[str]:
    """Says of collectives in branches that a trip takes one branch."""
    in_branches = [each for each in collectives if each.branch is not None]
    if not in_branches:
        return []
    number = f"{len(in_branches)} of them stand in the branches of a conditional: a trip takes one"
    if any(each.num_runs is None for each in in_branches):
        return [number, "branch; counted as exposed is the most expensive"]
    return [number, "branch; counted as exposed is the mean over the step's trips"]


def collective_rows(collectives: Sequence[Collective]) -> list[Sequence[str]]:
    """Makes a row for each collective, one for all in branches of which the same is said."""
    alike: dict[tuple[str, ...], list[Collective]] = {}
    for each in collectives:
        cells = (
            each.kind if each.count == 1 else f"{each.kind} x{each.count}",
            ", ".join(each.axes) or "-",
            "async" if each.is_async else "sync",
            show_bytes(each.num_bytes),
            show_time(each.link_seconds),
            show_number(each.cycles),
            show_flops(each.flops),
            show_time(each.compute_seconds),
            _verdict(each),
        )
        # Outside of branches each has a row of its own.
        alike.setdefault((*cells, each.conditional or each.name), []).append(each)
    return [(kind + _branches(group), *cells) for (kind, *cells, _), group in alike.items()]


def _branches(alike: Sequence[Collective]) -> str:
    """Writes in how many branches such collectives stand, and how many trips take those."""
    if alike[0].branch is None:
        return ""
    branches = {each.branch: each.num_runs for each in alike}
    runs = [number for number in branches.values() if number is not None]
    trips = f", {sum(runs)} trips" if len(runs) == len(branches) else ""
    of = f"branch {alike[0].branch}" if len(branches) == 1 else f"{len(branches)} branches"
    return f" ({len(alike)} in {of}{trips})"


def _verdict(each: Collective) -> str:
    """Says whether a collective is hidden, or for how long it is exposed."""
    if each.is_hidden and each.most_exposed_seconds:
        return "hidden where ranks act"
    if each.is_beside_another:
        return "beside another"
    if each.is_hidden:
        return "hidden"
    if each.exposed_seconds is None:
        return "exposed" if not each.is_async else "not known"
    return f"exposed {show_time(each.exposed_seconds)}"
