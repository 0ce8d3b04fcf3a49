"""Placement, sizes, costs -> the lanes of a search; programs -> rows of tokens, and back."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dualpipe_jax._costs import Costs, StageLayers
from dualpipe_jax._schedule.generators.sizes import both_directions
from dualpipe_jax._schedule.ir import Action, Cell, Pair, Program, Row
from dualpipe_jax._search.loops import FORWARD, INPUT_GRAD, Lanes, Times

PLACEMENTS = ("linear", "v", "interleaved", "bidirectional")
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Holds the sizes, costs and limit for which an order is searched.

    Attributes:
      num_ranks: The ranks.
      routes: For each direction, the ranks of its stages.
      microbatches: For each direction, its microbatches in the order in which they enter.
      costs: How long actions take.
      transfer: How long a value travels to another rank.
      layers: The layers of the stages.
      max_activations: How much the slots of a rank may hold, in activations of a rank's layers.
      stash: The size of a stash, which is held between I and W, over that of an activation, which
        is held between F and W; 0 if stashes are free.
    """

    num_ranks: int
    routes: tuple[tuple[int, ...], ...]
    microbatches: tuple[Sequence[int], ...]
    costs: Costs
    transfer: float
    layers: StageLayers
    max_activations: float = np.inf
    stash: float = 0.0

    @property
    def num_stages(self) -> int:
        """The stages of a direction."""
        return len(self.routes[0])

    @property
    def num_microbatches(self) -> int:
        """The microbatches of a step, over all directions."""
        return sum(map(len, self.microbatches))

    @cached_property
    def depth(self) -> np.ndarray:
        """float64[num_lanes], the place of each lane's stage in the model, from 0 to below 1."""
        return np.tile(np.arange(self.num_stages) / self.num_stages, len(self.routes))

    @cached_property
    def lanes(self) -> Lanes:
        """The lanes, direction after direction, as the loops read them."""
        num_stages, num_directions = self.num_stages, len(self.routes)
        rank = np.array([rank for route in self.routes for rank in route], np.int64)
        number = np.arange(len(rank))
        stage = number % num_stages
        weights, sizes = np.array(self.layers.weights), np.array(self.layers.sizes)
        work_share, share = (each * (self.num_ranks / each.sum()) for each in (weights, sizes))
        cost = self.costs.of_stages(weights, num_ranks=self.num_ranks)[1:]
        count = np.repeat([len(entering) for entering in self.microbatches], num_stages)
        size = np.tile(share, num_directions)
        direction = number // num_stages
        is_deeper = (rank == rank[:, None]) & (
            num_directions * stage[:, None] + direction[:, None]
            < num_directions * stage + direction
        )
        of_rank = [number[rank == r].tolist() for r in range(self.num_ranks)]
        most = max(map(len, of_rank))
        cost = np.tile(cost, num_directions)
        work = count * cost.sum(axis=0)
        return Lanes(
            rank=rank,
            before=np.where(stage > 0, number - 1, -1),
            after=np.where(stage + 1 < num_stages, number + 1, -1),
            count=count.astype(np.int64),
            cost=np.ascontiguousarray(cost),
            recompute=np.tile(self.costs.recompute * work_share, num_directions),
            size=size,
            reserve=(is_deeper * size).sum(axis=1),
            stash=float(self.stash),
            least=np.array(
                [np.bincount(rank + self.num_ranks * direction, size).max(), size.max()]
            ),
            of_rank=np.array([each + [-1] * (most - len(each)) for each in of_rank], np.int64),
            length=np.bincount(rank, 3 * count, minlength=self.num_ranks).astype(np.int64),
            work=np.bincount(rank, work, minlength=self.num_ranks),
            transfer=float(self.transfer),
            limit=float(self.max_activations) + _ROUNDING,
        )

    def make_times(self) -> Times:
        """Makes room for a replay."""
        by_microbatch = (3, len(self.lanes.rank), int(self.lanes.count.max()))
        by_place = (self.num_ranks, int(self.lanes.length.max()))
        return Times(
            end=np.zeros(by_microbatch),
            place=np.zeros(by_microbatch, np.int64),
            start=np.zeros(by_place),
            microbatch=np.zeros(by_place, np.int64),
            awaited=np.zeros(by_place, np.bool_),
            end_of_rank=np.zeros(self.num_ranks),
        )

    def peak_of(self, rows: np.ndarray) -> float:
        """Finds the most that the slots of a rank hold, in activations of a rank's layers."""
        held, stashed = self.peaks_of(rows).max(axis=0).tolist()
        return held + self.stash * stashed

    def peaks_of(self, rows: np.ndarray) -> np.ndarray:
        """Finds the most that each rank holds between F and W, and between I and W.

        Returns:
          float64[num_ranks, 2], in shares of a rank's layers.
        """
        size, length = self.lanes.size, self.lanes.length.tolist()
        keeps = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
        held = (
            np.cumsum(keeps[:, row[:n] % 3] * size[row[:n] // 3], axis=1).max(axis=1)
            for row, n in zip(rows, length, strict=True)
        )
        return np.array(list(held))

    def rows_one_by_one(self) -> np.ndarray:
        """Runs each microbatch when the one before is done: nothing holds fewer activations."""
        rows = np.zeros((self.num_ranks, int(self.lanes.length.max())), np.int64)
        for rank, row in enumerate(rows):
            tokens = []
            for direction, entering in enumerate(self.microbatches):
                first = direction * self.num_stages
                lanes = [first + s for s, r in enumerate(self.routes[direction]) if r == rank]
                forwards = [3 * lane for lane in lanes]
                backwards = [3 * lane + kind for lane in lanes[::-1] for kind in (1, 2)]
                tokens += (forwards + backwards) * len(entering)
            row[: len(tokens)] = tokens
        return rows

    def rows_of(self, program: Program) -> np.ndarray:
        """Writes a program of the same routes as tokens; its microbatches may change places."""
        units = program.units
        rows = np.zeros((self.num_ranks, int(self.lanes.length.max())), np.int64)
        lane = program.direction_of[units.microbatch] * program.num_stages + units.stage
        place = np.arange(len(units)) - units.row_start[units.rank]
        rows[units.rank, place] = 3 * lane + units.opcode - 1
        return rows

    def program_of(self, rows: np.ndarray, *, name: str, pairs: Sequence[range] = ()) -> Program:
        """Writes tokens as a program.

        A W that follows an I of its lane is of the same microbatch; others are of the oldest.

        Args:
          rows: The tokens.
          name: The program's name.
          pairs: For each rank, the places in which an F, an I of another lane and its W become a
            pair.
        """
        kept = pairs or [range(0)] * self.num_ranks
        made = tuple(
            self._row(row[:length].tolist(), of_rank)
            for row, length, of_rank in zip(rows, self.lanes.length.tolist(), kept, strict=True)
        )
        return Program(name, self.num_ranks, self.num_stages, self.num_microbatches, made)

    def _row(self, tokens: list[int], pairs: range) -> Row:
        coming = [[iter(self.microbatches[d]) for _ in range(2)] for d, _ in self._lane_numbers]
        deferred: list[deque[int]] = [deque() for _ in coming]
        actions: list[Action] = []
        for place, token in enumerate(tokens):
            lane, kind = divmod(token, 3)
            stage = self._lane_numbers[lane][1]
            if kind in (FORWARD, INPUT_GRAD):
                microbatch = next(coming[lane][kind])
                if kind == INPUT_GRAD:
                    deferred[lane].append(microbatch)
            elif place and tokens[place - 1] == token - 1:
                microbatch = deferred[lane].pop()
            else:
                microbatch = deferred[lane].popleft()
            actions.append(Action("FIW"[kind], stage, microbatch))
        return _join(actions, pairs)

    @cached_property
    def _lane_numbers(self) -> list[tuple[int, int]]:
        return [(d, s) for d, route in enumerate(self.routes) for s in range(len(route))]


def routes_of(
    placement: str, *, num_ranks: int, num_microbatches: int, num_stages_per_rank: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[Sequence[int], ...]]:
    """Finds the routes of a placement, and the microbatches of each direction that has any.

    >>> routes_of("v", num_ranks=2, num_microbatches=3, num_stages_per_rank=2)
    (((0, 1, 1, 0),), (range(0, 3),))
    """
    down = tuple(range(num_ranks))
    if placement == "bidirectional":
        both = zip(*both_directions(num_ranks, num_microbatches), strict=True)
        routes, microbatches = zip(*((tuple(r), m) for r, m in both if len(m)), strict=True)
        return routes, microbatches
    one_way = {"linear": down, "v": down + down[::-1], "interleaved": down * num_stages_per_rank}
    return (one_way[placement],), (range(num_microbatches),)


def _join(actions: list[Action], pairs: range) -> Row:
    """Joins each I and the W of it that follows to a B, and that to a pair with the F before."""
    cells: list[Cell] = []
    place = 0
    while place < len(actions):
        action, after = actions[place], actions[place + 1 : place + 3]
        if place in pairs and _is_pair(action, after):
            cells.append(Pair(action, after[0]._replace(kind="B")))
            place += 3
        elif action.kind == "I" and after[:1] == [action._replace(kind="W")]:
            cells.append(action._replace(kind="B"))
            place += 2
        else:
            cells.append(action)
            place += 1
    return tuple(cells)


def _is_pair(forward: Action, after: list[Action]) -> bool:
    """Whether an F is followed by the I and W of another microbatch."""
    if forward.kind != "F" or [action.kind for action in after] != ["I", "W"]:
        return False
    return after[0][1:] == after[1][1:] and after[0].microbatch != forward.microbatch
