"""Tables -> after each tick, which rank waits in a permute, for which rank, how long, and why.

The times of a rank's actions and its waits add up to the time at which it ends in the replay. A
permute holds a rank up for five reasons:

- `NEXT`: its next action reads the value that the other rank sends. No program can avoid it.
- `EARLY`: a later action reads it. A false wait: the rank could act before.
- `RECEIVER`: the rank sends, and the other one has not come to the permute yet: also a false wait.
- `MERGED`: nobody stores the value; the pair is there because sets of pairs were merged.
- `TRANSFER`: the other rank is there, and the value travels.

A rank that is in several pairs at once waits for the last of them. The time is charged to the
reasons in the order above: a false wait only with the time that it adds to a needed one.

Two ranks, three microbatches of zb-h1, forwards that cost three: the case of `replay`. The last
column is the tick in which the value is read.

>>> from dualpipe_jax import schedules
>>> tables = schedules.make("zb-h1", num_ranks=2, num_microbatches=3).compiled().tables
>>> work = np.array([0.0, 3, 1, 1])[tables.opcode]
>>> for tick in explain_waits(tables, work, transfer=0).ticks:
...     for wait in tick.waits:
...         print(tick.number, tick.actions, f"rank {wait.rank} for {wait.other}:", end=" ")
...         print(f"{wait.time:g},", wait.reason, wait.read_in)
0 ('0F0', None) rank 1 for 0: 3, reads it next 1
2 (None, '1I0') rank 0 for 1: 1, reads it next 3
4 ('0W0', '1I1') rank 0 for 1: 2, early 6
5 ('0F2', '1W1') rank 1 for 0: 2, reads it next 6
7 ('0W1', '1I2') rank 0 for 1: 2, reads it next 8
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dualpipe_jax._schedule.actions import IDLE, letter_of
from dualpipe_jax._schedule.replay import replay
from dualpipe_jax._schedule.tables import Exchange, Tables

NEXT, EARLY, RECEIVER, MERGED, TRANSFER = REASONS = (
    "reads it next",
    "early",
    "for its receiver",
    "merged",
    "transfer",
)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Tells how long a rank waits at the end of a tick, and why.

    Attributes:
      rank: The rank that waits.
      other: The rank for which it waits.
      reason: One of `REASONS`.
      time: How long.
      read_in: The tick in which the rank reads the value that it waits for; None for a sender, and
        for a value that is not stored.
    """

    rank: int
    other: int
    reason: str
    time: float
    read_in: int | None


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Tells which actions run in a tick, and which ranks wait at its end.

    Attributes:
      number: The tick's number.
      actions: The action of each rank, `"0F3"`; None for an idle one.
      exchange: The (source, target) ranks of its permutes, to the right and to the left.
      waits: Rank by rank.
    """

    number: int
    actions: tuple[str | None, ...]
    exchange: Exchange
    waits: tuple[Wait, ...]


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Divides up the time in which ranks do not act.

    Attributes:
      ticks: The ticks outside of the steady phase.
      in_run: For how long each rank waits in the steady phase and for its last transfers.
      finished: For how long each rank has nothing left to do while another one acts.
    """

    ticks: tuple[Tick, ...]
    in_run: tuple[float, ...]
    finished: tuple[float, ...]

    def by_reason(self) -> dict[str, float]:
        """Sums up the waits in ticks by their reason, over all ticks and ranks."""
        total = dict.fromkeys(REASONS, 0.0)
        for tick in self.ticks:
            for wait in tick.waits:
                total[wait.reason] += wait.time
        return total


def explain_waits(
    tables: Tables, work: np.ndarray, *, transfer: float, rendezvous: bool = True
) -> Waits:
    """Finds out for whom ranks wait, and why.

    The arguments are those of `replay`.
    """
    end = replay(tables, work, transfer=transfer, rendezvous=rendezvous)
    is_ramp, steady = np.ones(tables.num_ticks, bool), tables.steady
    in_run = np.zeros(tables.num_ranks)
    if steady is not None:
        is_ramp[steady.ticks] = False
        # All but the actions, from the start of the first tick to that of the one after the phase.
        first, after = steady.ticks.start, steady.ticks.stop
        begin = end[first] - work[first]
        in_run = end[after - 1] - begin - work[steady.ticks].sum(axis=0)
        if after < tables.num_ticks:
            in_run = end[after] - work[after] - begin - work[steady.ticks].sum(axis=0)
    ticks = []
    for tick in np.flatnonzero(is_ramp).tolist():
        parts = list(zip(tables.exchanges, tables.exchange[tick].tolist(), strict=True))
        exchanges = [of_part[number] for of_part, number in parts if number]
        ready, waits = end[tick].copy(), []
        for exchange in exchanges:
            waits_in_part = list(
                _waits(tables, tick, exchange, ready, transfer=transfer, rendezvous=rendezvous)
            )
            for wait in waits_in_part:
                ready[wait.rank] += wait.time
            waits += waits_in_part
        right, left = (tuple(p for sides in exchanges for p in sides[side]) for side in range(2))
        ticks.append(
            Tick(
                number=tick,
                actions=tuple(_name(tables, tick, rank) for rank in range(tables.num_ranks)),
                exchange=(right, left),
                waits=tuple(waits),
            )
        )
    return Waits(
        ticks=tuple(ticks),
        in_run=tuple(in_run.tolist()),
        finished=tuple((end[-1].max() - end[-1]).tolist()),
    )


def _waits(
    tables: Tables,
    tick: int,
    exchange: Exchange,
    end: np.ndarray,
    *,
    transfer: float,
    rendezvous: bool,
) -> Iterator[Wait]:
    """Yields the waits in an exchange to which ranks come at `end`, float64[num_ranks]."""
    # For each rank its pairs: the reason, the other rank, and the tick in which the value is read.
    held_up: list[list[tuple[str, int, int | None]]] = [[] for _ in range(tables.num_ranks)]
    right, left = exchange
    for pairs, column in ((right, tables.from_left), (left, tables.from_right)):
        for source, target in pairs:
            if source == target:
                continue
            slot = int(column[tick + 1, target]) if tick + 1 < tables.num_ticks else -1
            reason, read_in = _reader(tables, tick + 1, target, slot)
            held_up[target].append((reason, source, read_in))
            if rendezvous:
                reason = MERGED if reason == MERGED else RECEIVER
                held_up[source].append((reason, target, None))
    for rank, pairs in enumerate(held_up):
        waited = 0.0
        for reason, other, read_in in sorted(pairs, key=lambda pair: REASONS.index(pair[0])):
            lag = max(0.0, float(end[other] - end[rank])) if rendezvous else end[other] - end[rank]
            for why, until in ((reason, lag), (TRANSFER, lag + transfer)):
                if until > waited:
                    yield Wait(
                        rank=rank, other=other, reason=why, time=until - waited, read_in=read_in
                    )
                    waited = until


def _reader(tables: Tables, tick: int, rank: int, slot: int) -> tuple[str, int | None]:
    """Finds why a rank receives a value that it stores as a tick begins, and when it reads it.

    No other value is stored in the slot before it is read.
    """
    if slot < 0:
        return MERGED, None
    read_in = tick + int((tables.read[tick:, rank] == slot).argmax())
    acts = tables.opcode[tick:read_in, rank] != IDLE
    return (EARLY if acts.any() else NEXT), read_in


def _name(tables: Tables, tick: int, rank: int) -> str | None:
    opcode = tables.opcode[tick, rank]
    if opcode == IDLE:
        return None
    return f"{tables.stage[tick, rank]}{letter_of(opcode)}{tables.microbatch[tick, rank]}"
