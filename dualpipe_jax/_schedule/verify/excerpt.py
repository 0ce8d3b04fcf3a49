"""Shows the ticks around a fault, for the messages of `ScheduleError`."""

from collections.abc import Callable
from typing import NoReturn

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.ir import IDLE, OPCODE_LETTERS, Tables, Timeline


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
    ticks = range(max(0, tick - 4), min(num_ticks, tick + 5))
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


def fail_at(tables: Tables, tick: int, rank: int, fault: str) -> NoReturn:
    """Raises `ScheduleError` for one cell of the tables, drawing the ticks around it."""

    def cell(t: int, r: int) -> str | None:
        opcode = tables.opcode[t, r]
        if opcode == IDLE:
            return None
        letter = OPCODE_LETTERS[opcode] if 0 <= opcode < len(OPCODE_LETTERS) else "?"
        return f"{tables.stage[t, r]}{letter}{tables.microbatch[t, r]}"

    excerpt = show_ticks(
        cell, tick=tick, rank=rank, num_ticks=tables.num_ticks, num_ranks=tables.num_ranks
    )
    action = cell(tick, rank) or "an idle tick"
    raise ScheduleError(f"tables: {action} on rank {rank} in tick {tick}: {fault}{excerpt}")
