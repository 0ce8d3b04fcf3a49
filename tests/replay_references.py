"""Slow references of the replay: ranks that meet, or send lazily; actions that wait for values."""

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._schedule.tables import Tables


def wait_as_told(
    tables: Tables, work: np.ndarray, *, transfer: float, rendezvous: bool = True
) -> np.ndarray:
    """Runs each rank as a process that comes to permutes, after the description of `replay`.

    Values are looked at one by one: each is over a transfer after both of its ends have come, or
    without `rendezvous` after its sender has. Ranks take turns, in any order.

    Returns:
        float64[num_ticks, num_ranks], when each rank's action of each tick ends.
    """
    end = np.full(work.shape, np.nan)
    # When each rank has come to a permute, by whatever names the permute.
    came: dict[tuple[Any, int], float] = {}

    def over(permute: Any, source: int, target: int) -> float | None:
        """When a value has travelled; None while one of those that it waits for has not come."""
        ends = (source, target) if rendezvous else (source,)
        if any((permute, rank) not in came for rank in ends):
            return None
        travels = 0.0 if source == target else transfer
        return max(came[permute, rank] for rank in ends) + travels

    def process(rank: int) -> Iterator[None]:
        now, steady = 0.0, tables.steady
        in_run = range(0) if steady is None else range(steady.ticks.start, steady.ticks.stop)

        def through(
            permute: Any, pairs: Iterable[tuple[int, int]], now: float
        ) -> Generator[None, None, float]:
            """Waits for the values of a permute that concern this rank."""
            free = now
            for source, target in pairs:
                if rank == target or (rank == source and rendezvous):
                    while (instant := over(permute, source, target)) is None:
                        yield
                    free = max(free, instant)
            return free

        def begun(
            permute: Any, pairs: Iterable[tuple[int, int]], now: float
        ) -> Generator[None, None, float]:
            """Starts a permute that goes on beside later actions: a sender waits for its target."""
            came[permute, rank] = free = now
            for source, target in pairs:
                if rank == source and rendezvous:
                    while (permute, target) not in came:
                        yield
                    free = max(free, came[permute, target])
            return free

        under_way: dict[str, tuple[Any, Any]] = {}
        for tick in range(tables.num_ticks):
            took = float(work[tick, rank])
            if tick not in in_run:
                for permute, pairs in under_way.values():  # those of the last beat
                    now = yield from through(permute, pairs, now)
                under_way = {}
                now += took
                end[tick, rank] = now
                for part, number in enumerate(tables.exchange[tick].tolist()):
                    came[(tick, part), rank] = now
                    both = [p for side in tables.exchanges[part][number] for p in side]
                    now = yield from through((tick, part), both, now)
                continue
            assert steady is not None
            beat, phase = divmod(tick - steady.first_tick, 3)
            name = ("x", "cotangent", "")[phase]
            if name in under_way:  # the value of the beat before is read in this tick
                now = yield from through(*under_way[name], now)
            now += took
            end[tick, rank] = now
            if name:
                pairs = (steady.x_pairs if name == "x" else steady.cotangent_pairs)[beat % 2]
                under_way[name] = tick, pairs
                now = yield from begun(tick, pairs, now)

    alive = [process(rank) for rank in range(tables.num_ranks)]
    while alive:
        before = len(came), len(alive)
        alive = [each for each in alive if next(each, "done") != "done"]
        assert (len(came), len(alive)) != before, "ranks wait for each other"
    return end


def wait_lazily(tables: Tables, work: np.ndarray, transfer: float, *, meets: bool) -> float:
    """Runs ranks that send to both neighbours as a tick starts, and await both as it ends."""
    P = tables.num_ranks
    near = [
        [(r + step) % P for step in (-1, 1) if P > 1 and (tables.wraps or 0 <= r + step < P)]
        for r in range(P)
    ]
    free, end = [0.0] * P, [0.0] * P
    for took in work.tolist():
        start = [
            max([free[r], *(free[n] for n in near[r])]) if meets else free[r] for r in range(P)
        ]
        end = [start[r] + took[r] for r in range(P)]
        # As a rendezvous a transfer begins when both have come to it.
        begun = [[max(free[n], free[r]) if meets else free[n] for n in near[r]] for r in range(P)]
        free = [max([end[r], *(b + transfer for b in begun[r])]) for r in range(P)]
    return max(end)


def follow_dependencies(program: Program, cost: np.ndarray, transfer: float) -> float:
    """Runs each rank's actions as soon as their producers' values are there; knows no tables."""
    rank_of = program.rank_of
    rows = [[a for cell in row for a in cell.unit_actions()] for row in program.rows]
    end: dict[tuple[str, int, int], float] = {}
    position, free = [0] * program.num_ranks, [0.0] * program.num_ranks
    while any(p < len(row) for p, row in zip(position, rows, strict=True)):
        for rank, row in enumerate(rows):
            if position[rank] == len(row):
                continue
            kind, stage, microbatch = row[position[rank]]
            needs = {
                "F": [("F", stage - 1)] if stage else [],
                "I": [("I", stage + 1) if stage < program.num_stages - 1 else ("F", stage)],
                "W": [("I", stage)],
            }[kind]
            keys = [(k, s, microbatch) for k, s in needs]
            if any(key not in end for key in keys):
                continue
            came = [end[key] + transfer * (rank_of[key[1], microbatch] != rank) for key in keys]
            free[rank] = max([free[rank], *came]) + cost["FIW".index(kind) + 1, stage]
            end[kind, stage, microbatch] = free[rank]
            position[rank] += 1
    return max(free)
