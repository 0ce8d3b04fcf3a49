"""The records that the passes hand to each other: Program -> Timeline -> Allocation.

A `Program` says in which order each rank acts, a `Timeline` in which tick, an `Allocation` in
which slots its values are. All three as integers, for an executor to run, are `tables.Tables`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dualpipe_jax._schedule.actions import (
    FORWARD,
    IDLE,
    INPUT_GRAD,
    WEIGHT_GRAD,
    letter_of,
    unit_of,
)

# When actions run: as soon as they can; with every rank's pairs at the same tick modulo 3; or as
# soon as they can if a value takes two ticks to another rank.
TIMETABLES = ("shortest", "aligned", "two-tick")
TICKS_PER_BEAT = 3
_UNIT_OF_KIND = {"F": FORWARD, "I": INPUT_GRAD, "W": WEIGHT_GRAD}


def lag_of(timetable: str) -> int:
    """Says how many ticks after a value is made another rank may read it."""
    return 2 if timetable == "two-tick" else 1


class Action(NamedTuple):
    """Names one F, I, W or B (an I, then its W) of one (stage, microbatch)."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def unit_actions(self) -> Iterator["Action"]:
        """Yields the actions of one tick each that this one stands for."""
        for kind in "IW" if self.kind == "B" else self.kind:
            yield Action(kind, self.stage, self.microbatch)


class Pair(NamedTuple):
    """Fuses an F with a B (or an I) of another microbatch: F, I, W in consecutive ticks."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"

    def unit_actions(self) -> Iterator[Action]:
        """Yields the actions of one tick each that this pair stands for."""
        yield self.forward
        yield from self.backward.unit_actions()


Cell = Action | Pair
Row = tuple[Cell, ...]
# An entry for each action, in the order of `Program.units`; and for each tick and rank.
OfActions = Int64[np.ndarray, "num_actions"]
Grid = Int64[np.ndarray, "num_ticks num_ranks"]


@dataclass(frozen=True, eq=False)
class UnitActions:
    """Lists all actions of one tick of a program, rank after rank, in program order.

    The actions of rank r are those from `row_start[r]` up to `row_start[r + 1]`. `pair` numbers the
    pairs; -1 is none.
    """

    opcode: OfActions
    stage: OfActions
    microbatch: OfActions
    rank: OfActions
    pair: OfActions
    row_start: Int64[np.ndarray, " num_ranks+1"]

    def __len__(self) -> int:
        return len(self.opcode)

    def name(self, index: int) -> str:
        """Writes one action as a cell of the CSV."""
        letter = letter_of(self.opcode[index])
        return f"{self.stage[index]}{letter}{self.microbatch[index]}"


@dataclass(frozen=True)
class Program:
    """Gives each rank its actions in order, as a generator makes it.

    Stages count along each direction's own model order. Which rank holds which stage is not
    stated: it follows from the rows that have the stage's actions.

    >>> program = Program(
    ...     "two",
    ...     2,
    ...     2,
    ...     1,
    ...     rows=((Action("F", 0, 0), Action("B", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0))),
    ... )
    >>> program.routes, program.stage_of.tolist()
    (((0, 1),), [[0, 1]])
    >>> print(program.to_csv(), end="")
    0F0,0B0
    1F0,1B0
    """

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    # Not hashed: hashing a hundred thousand actions takes longer than looking the program up.
    rows: tuple[Row, ...] = field(repr=False, hash=False)
    forward_only: bool = False
    # int64[num_actions], how each of `units` runs (`refine_opcodes`); None: as F, I and W, split.
    opcode: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_csv(self) -> str:
        """Writes one line a rank in PyTorch's pipelining grammar."""
        return "".join(",".join(map(str, row)) + "\n" for row in self.rows)

    @cached_property
    def units(self) -> UnitActions:
        """The rows, split into actions of one tick."""
        opcode, stage, microbatch, pair, row_start = [], [], [], [], [0]
        num_pairs = 0
        for row in self.rows:
            for cell in row:
                in_pair = isinstance(cell, Pair)
                for kind, s, m in cell.unit_actions():
                    opcode.append(_UNIT_OF_KIND[kind])
                    stage.append(s)
                    microbatch.append(m)
                    pair.append(num_pairs if in_pair else -1)
                num_pairs += in_pair
            row_start.append(len(opcode))
        rank = np.repeat(np.arange(self.num_ranks), np.diff(row_start))
        opcode = opcode if self.opcode is None else self.opcode
        arrays = (np.array(a, np.int64) for a in (opcode, stage, microbatch, rank, pair, row_start))
        return UnitActions(*arrays)

    @cached_property
    def rank_of(self) -> np.ndarray:
        """int64[num_stages, num_microbatches], the rank that runs each."""
        units = self.units
        rank_of = np.full((self.num_stages, self.num_microbatches), -1)
        rank_of[units.stage, units.microbatch] = units.rank
        return rank_of

    @cached_property
    def _routes(self) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
        index: dict[tuple[int, ...], int] = {}
        direction_of = [index.setdefault(tuple(r), len(index)) for r in self.rank_of.T.tolist()]
        return tuple(index), np.array(direction_of, np.int64)

    @property
    def routes(self) -> tuple[tuple[int, ...], ...]:
        """The ranks over the stages, for each direction."""
        return self._routes[0]

    @property
    def direction_of(self) -> np.ndarray:
        """int64[num_microbatches], the index in `routes` of each microbatch's way."""
        return self._routes[1]

    @cached_property
    def chunk_of(self) -> np.ndarray:
        """int64[num_directions, num_stages], the number of each stage's chunk on its rank.

        The chunks of a rank are its (direction, stage)s in order.
        """
        num_held = [0] * self.num_ranks
        chunk_of = np.empty((len(self.routes), self.num_stages), np.int64)
        for direction, route in enumerate(self.routes):
            for stage, rank in enumerate(route):
                chunk_of[direction, stage] = num_held[rank]
                num_held[rank] += 1
        return chunk_of

    @cached_property
    def stage_of(self) -> np.ndarray:
        """int32[num_chunks, num_ranks], -1 where a rank has fewer chunks."""
        stage_of = np.full((self.chunk_of.max() + 1, self.num_ranks), -1, np.int32)
        for direction, route in enumerate(self.routes):
            stage_of[self.chunk_of[direction], route] = range(self.num_stages)
        return stage_of


@dataclass(frozen=True, eq=False)
class Timeline:
    """Gives each action of a program its tick, as `place` makes it.

    `sent_in` is the tick at whose end an action's value goes to another rank, if it does: its own
    or a later one.
    `num_slots` counts, for each buffer, the values alive at once on the fullest rank.
    `timetable` is one of `TIMETABLES`.
    """

    program: Program
    tick_of: OfActions
    sent_in: OfActions
    num_slots: dict[str, int]
    timetable: str = "shortest"

    @property
    def num_ranks(self) -> int:
        """The number of ranks of the program."""
        return self.program.num_ranks

    @property
    def lag(self) -> int:
        """How many ticks after a value is made another rank may read it."""
        return lag_of(self.timetable)

    @property
    def overlap(self) -> bool | str:
        """The timetable as the `overlap` of an `Execution`."""
        return {"aligned": True, "shortest": False}.get(self.timetable, self.timetable)

    @cached_property
    def num_ticks(self) -> int:
        """The number of ticks up to the last action of any rank."""
        return int(self.tick_of.max()) + 1

    @cached_property
    def index(self) -> Grid:
        """The indices of actions in `program.units`, -1 where a rank idles."""
        index = np.full((self.num_ticks, self.num_ranks), -1)
        index[self.tick_of, self.program.units.rank] = np.arange(len(self.tick_of))
        return index

    def grid(self, of_action: OfActions, *, idle: int = -1) -> Grid:
        """Spreads an array over actions to ticks and ranks."""
        return np.where(self.index < 0, idle, of_action[self.index])

    @cached_property
    def opcode(self) -> Grid:
        """The actions: 0 idle, 1 F, 2 I, 3 W."""
        return self.grid(unit_of(self.program.units.opcode), idle=IDLE)

    @cached_property
    def stage(self) -> Grid:
        """The stages of the actions, -1 where a rank idles."""
        return self.grid(self.program.units.stage)

    @cached_property
    def microbatch(self) -> Grid:
        """The microbatches of the actions, -1 where a rank idles."""
        return self.grid(self.program.units.microbatch)

    @cached_property
    def direction(self) -> Grid:
        """The directions of the actions, -1 where a rank idles."""
        return self.grid(self.program.direction_of[self.program.units.microbatch])

    @cached_property
    def pair(self) -> Grid:
        """A number for each pair, -1 outside of pairs."""
        return self.grid(self.program.units.pair)

    @cached_property
    def beats(self) -> Int64[np.ndarray, " num_beats"]:
        """The first tick of each beat: F, I, W of a pair on every rank."""
        last = max(self.num_ticks - TICKS_PER_BEAT + 1, 0)
        is_beat = (self.pair[:last] >= 0).all(axis=1)
        for after, opcode in enumerate((FORWARD, INPUT_GRAD, WEIGHT_GRAD)):
            here = slice(after, last + after)
            is_beat &= (self.opcode[here] == opcode).all(axis=1)
            is_beat &= (self.pair[here] == self.pair[:last]).all(axis=1)
        return np.flatnonzero(is_beat)

    @cached_property
    def actions(self) -> tuple[tuple[str | None, ...], ...]:
        """`actions[tick][rank]`: the CSV cell of the action, `"0F7"`, or None."""
        name = self.program.units.name
        return tuple(tuple(None if i < 0 else name(i) for i in row) for row in self.index.tolist())


@dataclass(frozen=True, eq=False)
class LiveRanges:
    """Lists the values that pass through one buffer, each int64[num_values].

    A value is on `rank` from the start of tick `start` to the end of tick `end`; the action
    `producer` makes it and `consumer` is the last to use it.
    """

    rank: np.ndarray
    start: np.ndarray
    end: np.ndarray
    producer: np.ndarray
    consumer: np.ndarray


@dataclass(frozen=True, eq=False)
class Allocation:
    """Gives each value of a timeline its slot, for each buffer, as `allocate` makes it.

    `slot_of[buffer]` is int64[num_values], in the order of `live_ranges[buffer]`.
    """

    live_ranges: dict[str, LiveRanges]
    slot_of: dict[str, np.ndarray]
    num_slots: dict[str, int]
