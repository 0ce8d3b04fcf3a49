"""Orders the actions of any routes by simulation, for sizes that have no published order.

In every tick each rank runs the best of the actions whose inputs have arrived. This greedy order is
for DualPipe as short as the published one: ranks idle until the middle ranks' first x arrives.
"""

from collections.abc import Sequence
from itertools import pairwise

from dualpipe_jax._schedule.ir import Action, Cell, Pair, Row


class _Lane:
    """Counts how far the microbatches of one stage of one direction have come."""

    def __init__(self, stage: int, microbatches: Sequence[int], limit: int):
        self.stage, self.microbatches, self.limit = stage, microbatches, limit
        # The lanes to which x and its cotangent travel.
        self.next: _Lane | None = None
        self.previous: _Lane | None = None
        # How many inputs have arrived, and how many actions have run.
        self.num_xs = self.num_forwards = self.num_cotangents = self.num_input_grads = 0

    def may_forward(self) -> bool:
        return self.num_forwards < min(self.num_xs, self.num_input_grads + self.limit)

    def may_input_grad(self) -> bool:
        return self.num_input_grads < self.num_cotangents

    def forwards_remain(self) -> bool:
        return self.num_forwards < len(self.microbatches)

    def forward(self) -> Action:
        """Runs the next F."""
        action = Action("F", self.stage, self.microbatches[self.num_forwards])
        self.num_forwards += 1
        if self.next:
            self.next.num_xs += 1
        else:
            self.num_cotangents += 1
        return action

    def input_grad(self) -> Action:
        """Runs the next I."""
        action = Action("I", self.stage, self.microbatches[self.num_input_grads])
        self.num_input_grads += 1
        if self.previous:
            self.previous.num_cotangents += 1
        return action


class _Rank:
    """Holds the lanes of one rank, and its row as it grows."""

    def __init__(self, max_deferred: int):
        self.lanes: list[_Lane] = []
        # From I to W a microbatch still holds W's operands, so the limits hold from F to W too.
        self.num_live = self.max_live = 0
        self.row: list[Action] = []
        self.max_deferred = max_deferred
        self.deferred: list[Action] = []

    def add(self, lane: _Lane) -> None:
        """Gives the rank a stage of a direction."""
        self.lanes.append(lane)
        self.max_live += lane.limit

    def choose(self) -> tuple[str, _Lane | None] | None:
        """Picks F first, then I, then W, with two exceptions.

        While forwards remain, a W follows its I before the next I does: that makes pairs. And
        when `max_deferred` wait, a W goes first. The lane that is behind is served first.
        """
        if len(self.deferred) >= self.max_deferred:
            return "W", None
        has_room = self.num_live < self.max_live
        if has_room and (lanes := [lane for lane in self.lanes if lane.may_forward()]):
            return "F", min(lanes, key=lambda lane: lane.num_forwards)
        if self._after_input_grad() and any(lane.forwards_remain() for lane in self.lanes):
            return "W", None
        if lanes := [lane for lane in self.lanes if lane.may_input_grad()]:
            return "I", min(lanes, key=lambda lane: lane.num_input_grads)
        return ("W", None) if self.deferred else None

    def run(self, kind: str, lane: _Lane | None) -> None:
        """Runs the chosen action; a W is that of the I that has just run, else the oldest."""
        if lane is None:
            action = self.deferred.pop(-1 if self._after_input_grad() else 0)
            self.num_live -= 1
        elif kind == "F":
            action = lane.forward()
            self.num_live += 1
        else:
            action = lane.input_grad()
            self.deferred.append(action._replace(kind="W"))
        self.row.append(action)

    def _after_input_grad(self) -> bool:
        return bool(self.row) and self.row[-1].kind == "I"


def list_schedule(
    *,
    num_ranks: int,
    routes: Sequence[Sequence[int]],
    microbatches: Sequence[Sequence[int]],
    limits: Sequence[Sequence[int]],
    max_deferred: int,
    pairs: bool = True,
) -> tuple[Row, ...]:
    """Orders F, I and W of every stage and microbatch, and joins them to pairs and Bs.

    >>> rows = list_schedule(
    ...     num_ranks=2,
    ...     routes=[(0, 1), (1, 0)],
    ...     microbatches=[(0, 1), (2,)],
    ...     limits=[(2, 1), (2, 1)],
    ...     max_deferred=1,
    ... )
    >>> for row in rows:
    ...     print(*row)
    0F0 1F2 0F1 0B0 1B2 0B1
    0F2 1F0 1B0 1F1 1B1 0B2

    Args:
        num_ranks: the number of rows.
        routes: for each direction, the ranks of its stages.
        microbatches: for each direction, its microbatches in the order in which they enter.
        limits: for each direction and stage, how many activations may live from F to I. One less
            a stage, from the number of stages down to 1, keeps every stage busy.
        max_deferred: how many weight grads a rank may hold back, at least 1.
        pairs: whether to join the F of one stage and the B of another (or of the other direction).
    """
    ranks = [_Rank(max_deferred) for _ in range(num_ranks)]
    for route, entering, limits_along in zip(routes, microbatches, limits, strict=True):
        lanes = [_Lane(stage, entering, limit) for stage, limit in enumerate(limits_along)]
        lanes[0].num_xs = len(entering)
        for lane, onward in pairwise(lanes):
            lane.next, onward.previous = onward, lane
        for rank, lane in zip(route, lanes, strict=True):
            ranks[rank].add(lane)

    num_left = 3 * sum(map(len, microbatches)) * len(routes[0])
    while num_left:
        # All choose before any runs: a rank's value reaches others in the next tick.
        chosen = [(rank, choice) for rank in ranks if (choice := rank.choose())]
        assert chosen, f"the limits {limits} let no rank act"
        for rank, (kind, lane) in chosen:
            rank.run(kind, lane)
        num_left -= len(chosen)
    direction_of = {m: d for d, entering in enumerate(microbatches) for m in entering}
    rows = tuple(join_backwards(rank.row) for rank in ranks)
    return tuple(_join_pairs(row, direction_of) for row in rows) if pairs else rows


def join_backwards(row: list[Action]) -> Row:
    """Joins an I and the W of it that follows to a B."""
    cells: list[Action] = []
    for action in row:
        if action.kind == "W" and cells and cells[-1] == action._replace(kind="I"):
            cells[-1] = action._replace(kind="B")
        else:
            cells.append(action)
    return tuple(cells)


def _join_pairs(row: Row, direction_of: dict[int, int]) -> Row:
    """Joins an F and the B that follows to a pair, if they are of different chunks."""
    cells: list[Cell] = []
    for cell in row:
        before = cells[-1] if cells else None
        if (
            isinstance(cell, Action)
            and cell.kind == "B"
            and isinstance(before, Action)
            and before.kind == "F"
            and (before.stage, direction_of[before.microbatch])
            != (cell.stage, direction_of[cell.microbatch])
        ):
            cells[-1] = Pair(before, cell)
        else:
            cells.append(cell)
    return tuple(cells)
