"""The tables that an executor runs, and the only record that it sees of a schedule.

`emit` makes them, `exchanges` says in them between which ranks values travel; `verify` holds them
to their description, and `replay` says how long they take.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from jaxtyping import Int32

from dualpipe_jax._schedule.actions import DEFERRED
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT

# A table: a row for each tick, and -1 for none.
Column = Int32[np.ndarray, "num_ticks num_ranks"]
# The most distinct sets of (source, target) ranks that permutes to one side have: see `exchanges`.
MOST_SETS = 12
# (source, target) ranks of a permute.
Pairs = tuple[tuple[int, int], ...]
# Those of the permute to the right, then to the left.
Exchange = tuple[Pairs, Pairs]


@dataclass(frozen=True, eq=False)
class Steady:
    """Describes the steady phase: beats in which all ranks run the same straight-line code.

    Its beat b is ticks `first_tick + 3 b` to `first_tick + 3 b + 2`. Beats repeat after a period,
    the number of chunks v: every rank runs the forward of its chunk b % v and the backward of its
    chunk `backward[b % v]`, and sends between the same ranks as in beat b + v. A value that is sent
    is read in the beat after, or waits a number of beats more that is the same for all values that
    reach the rank; so it needs no slot in between. A head's cotangent never waits.

    At the phase's ends values are in received slots. In beat b a rank with b <= `x_wait` reads an x
    that the tables store before the phase, from the slot of the tables. Those that a rank reads
    next after the last beat, and in the ticks after that, go to `x_slot[0]`, `x_slot[1]`, up to the
    wait of the rank. Cotangents have the same.

    Attributes:
      first_tick: The first tick of the steady phase.
      num_beats: How many beats it has, a multiple of the period.
      backward: The chunk that each beat of a period runs backwards.
      x_pairs: For each beat of a period, the ranks between which the x's that forwards made travel;
        a rank may be its own neighbour.
      cotangent_pairs: The same for the cotangents that input grads made. (The cotangent that a
        head's gradient gives stays on its rank.)
      x_wait: How many beats x's wait on each rank after the beat in which they could be read.
      cotangent_wait: The same.
      x_slot: int32[1 + most wait, num_ranks], the slots for x's that are read after the last beat,
        in the order in which they are read; -1 for none.
      cotangent_slot: The same.
      idle: Those of `stash` and `deferred` in which no rank has a slot in use when the phase begins
        or ends. Its W's follow their I's, so that they may do without.
    """

    first_tick: int
    num_beats: int
    backward: tuple[int, ...]
    x_pairs: tuple[Pairs, ...]
    cotangent_pairs: tuple[Pairs, ...]
    x_wait: Int32[np.ndarray, " num_ranks"]
    cotangent_wait: Int32[np.ndarray, " num_ranks"]
    x_slot: Int32[np.ndarray, "num_upcoming num_ranks"]
    cotangent_slot: Int32[np.ndarray, "num_upcoming num_ranks"]
    idle: tuple[str, ...]

    @property
    def period(self) -> int:
        """After how many beats they repeat."""
        return len(self.backward)

    @property
    def num_waiting(self) -> int:
        """How many values a rank has room for that wait for a later beat than the next one."""
        return int(self.x_wait.max() + self.cotangent_wait.max())

    @property
    def ticks(self) -> slice:
        """The ticks of the steady phase."""
        return slice(self.first_tick, self.first_tick + TICKS_PER_BEAT * self.num_beats)


@dataclass(frozen=True, eq=False)
class Tables:
    """Tells an executor which action each rank runs in each tick, and on which slots.

    Arrays are int32[num_ticks, num_ranks], -1 for none. In each tick a rank
    (1) stores the values that its neighbours sent in the tick before into the received slots
    `from_left` (from rank - 1) and `from_right` (from rank + 1, both modulo the number of ranks),
    (2) runs its action, and
    (3) stores the output in the received slot `keep`, and takes part in the tick's exchange, part
    after part: to the ranks with which it is a pair there it sends the output or, if there is one,
    the value in the received slot `send`, which it has kept since an earlier tick.

    F, I and W of a stage and a microbatch run as their opcodes say, and name a slot in each buffer
    with which `actions.EFFECTS` has them read, write or free a value: mostly

    ====  =======================================  ============================================
    F     reads `read`, its x (stage 0: none)      writes `residual`, `weight_residual`
    I     reads `read`, its cotangent,             writes `stash`
          `residual` and `weight_residual`
    W     reads `weight_residual` and `stash`      adds to the gradient
    ====  =======================================  ============================================

    A deferred W, in tables that have `deferred`, and its I have a slot there in place of `stash`:
    there I keeps all operands of W or, if that recomputes, those that it cannot make again. No
    stash is in use on that rank in their ticks.

    A full backward has no stash. Its upper half, in I's tick, runs I and W of the stage's last
    layers and keeps the cotangent of their input in the received slot `keep`; the lower half, in
    W's tick, reads it and `residual` too, and makes the cotangent of the stage's x. A full backward
    without halves runs in I's tick; a slot of `weight_residual` is still taken until W's.

    The output of F is x, of the last stage's F the cotangent that the head's gradient gives, of I
    and of a lower half the cotangent of the stage's x. A slot of `read` is free after its action,
    one of `send` after the tick. A forward-only program has neither residuals nor cotangents.

    The ticks of `steady` are run as it says, to the effect of the tables. They have no exchange.

    Tables that are lazy (`is_lazy`) have neither exchanges nor a `steady`: a value travels behind
    the whole action of the tick after the one that makes it. In each tick a rank
    (1) starts to send its output of the tick before to both neighbours, wanted or not,
    (2) runs its action, and
    (3) stores the output in `keep`, and the values that its neighbours started to send in this tick
    in `from_left` and `from_right`.
    So the row of an arrival is that of other tables, the tick after the one in which the neighbour
    makes it; but it is stored at the end of that tick, and may be read from the next one on.
    """

    opcode: Column
    chunk: Column
    stage: Column
    microbatch: Column
    from_left: Column
    from_right: Column
    read: Column
    keep: Column
    send: Column
    residual: Column
    weight_residual: Column
    stash: Column
    deferred: Column

    num_ranks: int
    num_stages: int
    num_microbatches: int
    num_chunks: int
    stage_of: Int32[np.ndarray, "num_chunks num_ranks"]
    num_slots: dict[str, int]  # for each of BUFFERS, and DEFERRED if it has slots of its own
    forward_only: bool
    wraps: bool  # whether anything travels between the last rank and rank 0 as ring neighbours
    is_lazy: bool = False
    steady: Steady | None = None
    # For each part of the line of ranks its exchanges, the first of them empty.
    exchanges: tuple[tuple[Exchange, ...], ...] = ()
    # Indices in `exchanges`; -1 in the ticks of `steady`. Lazy tables
    # have no parts.
    exchange: Int32[np.ndarray, "num_ticks num_parts"] = field(
        default_factory=lambda: np.empty((0, 0), np.int32)
    )

    @property
    def num_ticks(self) -> int:
        """The number of rows of every table."""
        return len(self.opcode)

    @cached_property
    def opcodes(self) -> frozenset[int]:
        """The opcodes that occur."""
        return frozenset(np.unique(self.opcode).tolist())

    def executed_slots(self, *, full_backward: bool) -> dict[str, int]:
        """Counts the slots that an executor has, for each buffer.

        Args:
          full_backward: Whether it runs full backwards. Then the steady phase alone stashes, in a
            buffer of its own.
        """
        slots = dict(self.num_slots)
        slots["received"] += 1  # one that nobody reads, for values that nobody wants
        if full_backward:
            slots["stash"] = 0
        elif DEFERRED in slots:
            # I's of both kinds are one program, which writes a stash.
            slots["stash"] = max(slots["stash"], 1)
        return slots

    @property
    def neighbours(self) -> Exchange:
        """All pairs of ranks that are neighbours, between which lazy tables send in every tick."""
        num_ranks = self.num_ranks
        sources = range(num_ranks if self.wraps else num_ranks - 1)
        right = tuple((source, (source + 1) % num_ranks) for source in sources)
        return right, tuple((target, source) for source, target in right)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Names the tables that have a row a tick and a column a rank."""
        return tuple(f.name for f in fields(cls) if f.type is Column)
