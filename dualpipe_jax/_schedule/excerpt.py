"""Shows the ticks around a fault, for the messages of `ScheduleError`."""

from collections.abc import Callable
from typing import NoReturn

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import IDLE, Opcode, letter_of
from dualpipe_jax._schedule.dependencies import NEVER
from dualpipe_jax._schedule.ir import Program, Timeline
from dualpipe_jax._schedule.tables import Tables

# How many ticks are drawn before and after the one at fault.
_MARGIN = 4


def show_ticks(
    cell: Callable[[int, int], str | None], *, tick: int, rank: int, num_ticks: int, num_ranks: int
) -> str:
    """Draws the ticks around one cell, of its rank and of its neighbours.

    >>> rows = ["0F0", None, "0I0"], [None, "1F0", None], ["", "", "2F0"]
    >>> print(show_ticks(lambda t, r: rows[r][t], tick=1, rank=1, num_ticks=3, num_ranks=3))
    <BLANKLINE>
      tick     0    1    2
      rank 0  0F0   .   0I0
      rank 1   .  [1F0]  .
      rank 2   .    .   2F0
    """
    ticks = range(max(0, tick - _MARGIN), min(num_ticks, tick + _MARGIN + 1))
    ranks = sorted({(rank + step) % num_ranks for step in (-1, 0, 1)})
    texts = [[cell(t, r) or "." for t in ticks] for r in ranks]
    texts[ranks.index(rank)] = [
        f"[{text}]" if t == tick else text
        for t, text in zip(ticks, texts[ranks.index(rank)], strict=True)
    ]
    lines = [("tick", [str(t) for t in ticks])]
    lines += [(f"rank {r}", row) for r, row in zip(ranks, texts, strict=True)]
    width = max(len(text) for _, row in lines for text in row)
    heading = max(len(head) for head, _ in lines)
    return "".join(
        "\n  " + f"{head:{heading}} {''.join(f'{text:^{width}}' for text in row)}".rstrip()
        for head, row in lines
    )


def show_timeline(timeline: Timeline, *, tick: int, rank: int) -> str:
    """Draws the ticks of a timeline around one cell."""
    name, index = timeline.program.units.name, timeline.index
    return show_ticks(
        lambda t, r: name(index[t, r]) if index[t, r] >= 0 else None,
        tick=tick,
        rank=rank,
        num_ticks=timeline.num_ticks,
        num_ranks=timeline.num_ranks,
    )


def show_action(program: Program, tick_of: np.ndarray, action: int) -> tuple[str, str]:
    """Says where an action of a program is, which may get stuck, and draws the ticks around it.

    An action that its rank never reaches is shown where the rank gets stuck.

    Args:
        program: any program, legal or not.
        tick_of: int64[num_actions], the tick of each action; `NEVER` if it is not run.
        action: index into `program.units`.
    """
    units = program.units
    rank = int(units.rank[action])
    start, stop = units.row_start[rank : rank + 2]
    row = tick_of[start:stop]
    num_run = int((row != NEVER).sum())
    if tick_of[action] != NEVER:
        tick, shown = int(tick_of[action]), action
        where = f"{units.name(action)} on rank {rank} in tick {tick}"
    else:
        tick, shown = int(row[num_run - 1]) + 1 if num_run else 0, int(start) + num_run
        where = f"{units.name(shown)} on rank {rank} in tick {tick}"
        if shown != action:
            where = f"{units.name(action)}, to which rank {rank} does not come past {where}"
    near = np.flatnonzero(np.abs(tick_of - tick) <= _MARGIN)
    cells = {(int(tick_of[i]), int(units.rank[i])): units.name(i) for i in near.tolist()}
    cells[tick, rank] = units.name(shown)
    num_ticks = max(tick, int(tick_of[tick_of != NEVER].max(initial=0))) + 1
    excerpt = show_ticks(
        lambda t, r: cells.get((t, r)),
        tick=tick,
        rank=rank,
        num_ticks=num_ticks,
        num_ranks=program.num_ranks,
    )
    return where, excerpt


def fail_at(tables: Tables, tick: int, rank: int, fault: str) -> NoReturn:
    """Raises `ScheduleError` for one cell of the tables, drawing the ticks around it."""

    def cell(t: int, r: int) -> str | None:
        opcode = tables.opcode[t, r]
        if opcode == IDLE:
            return None
        letter = letter_of(opcode) if 0 <= opcode < len(Opcode) else "?"
        return f"{tables.stage[t, r]}{letter}{tables.microbatch[t, r]}"

    excerpt = show_ticks(
        cell, tick=tick, rank=rank, num_ticks=tables.num_ticks, num_ranks=tables.num_ranks
    )
    action = cell(tick, rank) or "an idle tick"
    raise ScheduleError(f"tables: {action} on rank {rank} in tick {tick}: {fault}{excerpt}")
