"""The collectives of one trip of a loop, and for how long compute stands still for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Tells of a collective.

    FLOPs, cycles and times between its start and its done are those of a rank that acts (`timing`).

    Attributes:
      kind: `"collective-permute"`, `"all-to-all"`, ...
      name: The name of the instruction that starts it.
      op_name: The JAX functions and scopes that it stands for.
      axes: The mesh axes along which it moves data.
      count: How often it runs in a trip of the loop; of one in a branch, in a trip that takes it.
      conditional: The name of the conditional in one of whose branches it runs, of which a trip
        takes one; None outside of branches.
      branch: The branch's number.
      num_runs: How many of a step's trips take that branch, by the schedule's tables; None outside
        of branches, and where the tables are not known.
      is_async: Whether compute goes on between its start and its done.
      num_bytes: Bytes of a device's operands; of an all-gather, of its result; of a ragged
        all-to-all, of the smaller of its two buffers, which is the most that may move
        where no row goes to two devices.
      flops: FLOPs of the matmuls between its start and its done.
      cycles: Cycles of the instructions between, as the compiler estimates; None if it does not.
      compute_seconds: How long that takes; None where neither cycles nor a peak are known.
      link_seconds: How long its bytes need on its links, at the published bandwidth; None where
        none is published.
      exposed_seconds: For how long compute stands still for it; None where times are unknown.
      most_exposed_seconds: The same on a rank that passes over all that it may.
    """

    kind: str
    name: str
    op_name: str
    axes: tuple[str, ...]
    count: int
    conditional: str | None = None
    branch: int | None = None
    num_runs: int | None = None
    is_async: bool
    num_bytes: int
    flops: float
    cycles: float | None
    compute_seconds: float | None
    link_seconds: float | None
    exposed_seconds: float | None
    most_exposed_seconds: float | None

    @property
    def is_hidden(self) -> bool | None:
        """Whether it is asynchronous and costs no time; None where times are unknown."""
        if not self.is_async:
            return False
        return None if self.exposed_seconds is None else self.exposed_seconds == 0

    @property
    def is_beside_another(self) -> bool:
        """Whether it costs no time since another one is waited for, and not for enough compute."""
        return self.is_hidden is True and (self.compute_seconds or 0) < (self.link_seconds or 0)


def with_runs(
    collectives: Iterable[Collective], runs: Mapping[str, Sequence[int]]
) -> list[Collective]:
    """Says of each collective in a branch how often a step takes the branch.

    Args:
      collectives: Those of a trip.
      runs: For conditionals by name, how often each of the branches is taken.
    """
    return [
        each
        if each.branch is None or each.conditional not in runs
        else replace(each, num_runs=runs[each.conditional][each.branch])
        for each in collectives
    ]


def exposed_seconds(
    collectives: Sequence[Collective],
    *,
    num_trips: int | None = None,
    choose: Callable[[Iterable[float]], float] = max,
) -> float | None:
    """Sums up for how long compute stands still in a trip; None where times are unknown.

    A trip takes one branch of a conditional. The mean over a step's trips counts, where it is known
    how many take which, else the branch that costs most.

    Args:
      collectives: Those of a trip.
      num_trips: The trips of a step.
      choose: Which branch counts of those of which nothing is known.
    """
    if any(each.exposed_seconds is None for each in collectives):
        return None
    total = 0.0
    branches: dict[str, dict[int, float]] = {}
    for each in collectives:
        seconds = (each.exposed_seconds or 0.0) * each.count
        if each.conditional is None or each.branch is None:
            total += seconds
        elif each.num_runs is not None and num_trips:
            total += seconds * each.num_runs / num_trips
        else:
            of_branch = branches.setdefault(each.conditional, {})
            of_branch[each.branch] = of_branch.get(each.branch, 0.0) + seconds
    return total + sum(choose(of_branch.values()) for of_branch in branches.values())
