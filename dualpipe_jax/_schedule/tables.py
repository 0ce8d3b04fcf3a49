"""The tables that an executor runs, and the only record that it sees of a schedule.

`emit` makes them, `exchanges` says in them between which ranks values travel; `verify` holds them
to their description, and `replay` says how long they take.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from dualpipe_jax._schedule.ir import TICKS_PER_BEAT

# The most distinct sets of (source, target) ranks that permutes to one side have: see `exchanges`.
MOST_SETS = 12
# (source, target) ranks of a permute.
Pairs = tuple[tuple[int, int], ...]
# Those of the permute to the right, then to the left.
Exchange = tuple[Pairs, Pairs]


@dataclass(frozen=True, eq=False)
class Steady:
    """A run of beats in which all ranks run the same straight-line code.

    Beat b of the run is ticks `first_tick + 3 b` to `first_tick + 3 b + 2`: every rank runs the
    forward of its chunk b % 2 and the backward of the other one, and sends between the same ranks
    as in beat b + 2. What is sent is read in the beat after, and so needs no slot in between; what
    the last beat leaves goes to the received slots `x_slot` and `cotangent_slot`.

    Attributes:
      first_tick: The first tick of the run.
      num_beats: How many beats it has, an even number.
      x_pairs: For even and odd beats, from and to which ranks what the forwards made travels; a
        rank may be its own neighbour.
      cotangent_pairs: The same of what the input grads made. (The cotangent that a head's gradient
        gives stays on its rank.)
      x_slot: int32[num_ranks], -1 for none.
      cotangent_slot: int32[num_ranks], -1 for none.
      idle: Those of `stash` and `deferred` of which no rank has a slot in use when the run begins
        or ends. The W's of the run follow their I's, so that they may do without.
    """

    first_tick: int
    num_beats: int
    x_pairs: tuple[Pairs, Pairs]
    cotangent_pairs: tuple[Pairs, Pairs]
    x_slot: np.ndarray
    cotangent_slot: np.ndarray
    idle: tuple[str, ...]

    @property
    def ticks(self) -> slice:
        """The ticks of the run."""
        return slice(self.first_tick, self.first_tick + TICKS_PER_BEAT * self.num_beats)


@dataclass(frozen=True, eq=False)
class Tables:
    """Tells an executor what each rank does in each tick.

    Arrays are int32[num_ticks, num_ranks], -1 for none. In each tick a rank
    (1) stores what its neighbours sent in the tick before into the received slots `from_left`
    (from rank - 1) and `from_right` (from rank + 1, both modulo the number of ranks),
    (2) runs its action, and
    (3) stores the output in the received slot `keep`, and takes part in the tick's exchange, part
    after part: to the ranks with which it is a pair there it sends the output or, if there is one,
    the value in the received slot `send`, which it has kept since an earlier tick.

    ====  =======================================  ============================================
    F     reads `read`, its x (stage 0: none)      writes `residual`, `weight_residual`
    I     reads `read`, its cotangent,             writes `stash`
          `residual` and `weight_residual`
    W     reads `weight_residual` and `stash`      adds to the gradient
    ====  =======================================  ============================================

    In tables that have `deferred`, an I whose W is deferred and that W name a slot in it, and none
    in `stash`: there I keeps what W needs, or if that recomputes the little that it cannot make
    again; no stash is in use on that rank in their ticks.

    An I and a W with a `half` are those of a full backward: I runs both for the stage's last
    layers, and keeps the cotangent of what these read; W reads it and `residual` too, runs both for
    the first layers, and makes the cotangent of the stage's x.

    The output of F is x, of the last stage's F the cotangent that the head's gradient gives, of I
    the cotangent of its x. A slot is free after the last read: of `read` its action, of `send` the
    tick, of `residual` the I (of a full backward the W), of `weight_residual`, `stash` and
    `deferred` the W. A forward-only program has neither residuals nor cotangents.

    The ticks of `steady` are run as it says, to the effect of the tables. They have no exchange.

    Tables that are lazy (`is_lazy`) have neither exchanges nor a `steady`: a value travels behind
    the whole action of the tick after the one that makes it. In each tick a rank
    (1) starts to send what it made in the tick before to both neighbours, wanted or not,
    (2) runs its action, and
    (3) stores the output in `keep`, and what its neighbours started to send in this tick in
    `from_left` and `from_right`.
    So the row of an arrival is that of other tables, the tick after the one in which the neighbour
    makes it; but it is stored at the end of that tick, and may be read from the next one on.
    """

    opcode: np.ndarray
    chunk: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    from_left: np.ndarray
    from_right: np.ndarray
    read: np.ndarray
    keep: np.ndarray
    send: np.ndarray
    residual: np.ndarray
    weight_residual: np.ndarray
    stash: np.ndarray
    deferred: np.ndarray
    half: np.ndarray  # LAST_LAYERS of an I, FIRST_LAYERS of a W, -1 of what is no half

    num_ranks: int
    num_stages: int
    num_microbatches: int
    num_chunks: int
    stage_of: np.ndarray  # int32[num_chunks, num_ranks]
    num_slots: dict[str, int]  # for each of BUFFERS, and DEFERRED if that is kept apart
    forward_only: bool
    wraps: bool  # whether anything travels between the last rank and rank 0 as ring neighbours
    is_lazy: bool = False
    steady: Steady | None = None
    # For each part of the line of ranks its exchanges, the first of them empty.
    exchanges: tuple[tuple[Exchange, ...], ...] = ()
    # int32[num_ticks, num_parts], indices in `exchanges`; -1 in the ticks of `steady`. Lazy tables
    # have no parts.
    exchange: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))

    @property
    def num_ticks(self) -> int:
        """The number of rows of every table."""
        return len(self.opcode)

    @cached_property
    def has_halves(self) -> bool:
        """Whether any I and W are the halves of a full backward."""
        return bool((self.half >= 0).any())

    @property
    def neighbours(self) -> Exchange:
        """All pairs of ranks that are neighbours: what lazy tables send between in every tick."""
        num_ranks = self.num_ranks
        sources = range(num_ranks if self.wraps else num_ranks - 1)
        right = tuple((source, (source + 1) % num_ranks) for source in sources)
        return right, tuple((target, source) for source, target in right)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Names the tables that have a row a tick and a column a rank."""
        return tuple(f.name for f in fields(cls))[:14]
