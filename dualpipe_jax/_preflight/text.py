"""The collectives of a trip -> rows of text, those in branches of which the same is said in one."""

import re
from collections.abc import Iterable, Sequence

from dualpipe_jax._predict.waits import EARLY, MERGED, NEXT, RECEIVER, TRANSFER, Tick, Wait, Waits
from dualpipe_jax._preflight.timing import Collective


def show_bytes(number: int | None) -> str:
    """Writes bytes in KiB, MiB, ..."""
    return "-" if number is None else _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def show_flops(number: float) -> str:
    """Writes FLOPs in kFLOP, MFLOP, ..."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
    return _scaled(number, 1000, units) if number else "-"


def show_time(seconds: float | None) -> str:
    """Writes seconds in us, ms, ..."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0"
    return f"{seconds:.3g} s" if seconds >= 1 else _scaled(seconds * 1e9, 1000, ("ns", "us", "ms"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    index = 0
    while number >= base and index + 1 < len(units):
        number, index = number / base, index + 1
    return f"{number:,.0f} {units[index]}" if number >= 100 else f"{number:.3g} {units[index]}"


def show_number(number: float | None) -> str:
    """Writes a number with its thousands apart."""
    return "-" if number is None else f"{number:,.0f}"


HEAD = ("collective", "axes", "", "bytes", "link", "cycles", "matmuls", "compute", "")


def branch_lines(collectives: Sequence[Collective]) -> list[str]:
    """Says of collectives in branches that a trip takes one branch."""
    in_branches = [each for each in collectives if each.branch is not None]
    if not in_branches:
        return []
    number = f"{len(in_branches)} of them stand in the branches of a conditional: a trip takes one"
    if any(each.num_runs is None for each in in_branches):
        return [number, "branch; counted as exposed is the most expensive"]
    return [number, "branch; counted as exposed is the mean over the step's trips"]


def collective_rows(collectives: Sequence[Collective]) -> list[Sequence[str]]:
    """Makes a row for each collective, one for all in branches of which the same is said."""
    alike: dict[tuple[str, ...], list[Collective]] = {}
    for each in collectives:
        cells = (
            each.kind if each.count == 1 else f"{each.kind} x{each.count}",
            ", ".join(each.axes) or "-",
            "async" if each.is_async else "sync",
            show_bytes(each.num_bytes),
            show_time(each.link_seconds),
            show_number(each.cycles),
            show_flops(each.flops),
            show_time(each.compute_seconds),
            _verdict(each),
        )
        # Outside of branches each has a row of its own.
        alike.setdefault((*cells, each.conditional or each.name), []).append(each)
    return [(kind + _branches(group), *cells) for (kind, *cells, _), group in alike.items()]


def _branches(alike: Sequence[Collective]) -> str:
    """Writes in how many branches such collectives stand, and how many trips take those."""
    if alike[0].branch is None:
        return ""
    branches = {each.branch: each.num_runs for each in alike}
    runs = [number for number in branches.values() if number is not None]
    trips = f", {sum(runs)} trips" if len(runs) == len(branches) else ""
    of = f"branch {alike[0].branch}" if len(branches) == 1 else f"{len(branches)} branches"
    return f" ({len(alike)} in {of}{trips})"


def _verdict(each: Collective) -> str:
    """Says whether a collective is hidden, or for how long it is exposed."""
    if each.is_hidden and each.most_exposed_seconds:
        return "hidden where ranks act"
    if each.is_beside_another:
        return "beside another"
    if each.is_hidden:
        return "hidden"
    if each.exposed_seconds is None:
        return "exposed" if not each.is_async else "not known"
    return f"exposed {show_time(each.exposed_seconds)}"


_WORDS = {NEXT: "next", EARLY: "early", RECEIVER: "receiver", MERGED: "merged"}
_MEANS = {
    NEXT: "its next action reads the value sent to it",
    EARLY: "a later action reads it",
    RECEIVER: "it sends, and the other rank is not there yet",
    MERGED: "nobody stores the value",
    TRANSFER: "both are there, and the value travels",
}
LEGEND = (
    "waits in us, below 0.05 left out; 1I0 <0 next 12 +21: after 1I0 the rank waits 12 us for",
    "rank 0, whose value it reads next, and 21 us for the transfer; early@9: it is read in tick 9",
)
_LEAST = 0.05
# The most rows that are looked for again.
_LONGEST = 24
_Rows = list[list[str]]


def ticks_table(waits: Waits) -> tuple[Sequence[str], _Rows]:
    """Makes a head, and a row for each tick after which a rank waits.

    Rows that come again in the same order, but for the microbatches, are written once.
    """
    num_ranks = len(waits.finished)
    rows: _Rows = []
    for tick in waits.ticks:
        cells = [_cell(tick, rank) for rank in range(num_ranks)]
        if any("<" in cell for cell in cells):
            rows.append([str(tick.number), _permutes(tick), *cells])
    rows = [["tick", "permutes", *(f"rank {rank}" for rank in range(num_ranks))], *_once(rows)]
    # A report's tables have their columns to the right, but these cells begin alike.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rows = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return head, rows


def _once(rows: _Rows) -> _Rows:
    """Puts a line in the place of rows that are those before them again, twice or more."""
    keys = [[re.sub(r"(\d[FIW]|@)\d+", r"\1", cell) for cell in row[1:]] for row in rows]
    out: _Rows = []
    at = 0
    while at < len(rows):
        period, times = max(
            ((period, _times(keys, at, period)) for period in range(1, _LONGEST + 1)),
            key=lambda each: (each[0] * (each[1] - 1) if each[1] > 2 else 0, -each[0]),
        )
        block = rows[at : at + (period if times > 2 else 1)]
        out += block
        at += len(block)
        if times > 2:
            at += period * (times - 1)
            title = f"{times - 1} times more, up to tick {rows[at - 1][0]}"
            out.append(["...", title, *[""] * (len(rows[0]) - 2)])
    return out


def _times(keys: Sequence[Sequence[str]], at: int, period: int) -> int:
    """Counts how often in a row the keys from `at` on come, so many at a time."""
    block, times = keys[at : at + period], 1
    while len(block) == period and keys[at + times * period :][:period] == block:
        times += 1
    return times


def quiet_ticks(waits: Waits) -> str:
    """Names the ticks that the table leaves out.

    >>> waits = Waits(
    ...     ticks=tuple(
    ...         Tick(number=number, actions=(), exchange=((), ()), waits=())
    ...         for number in (0, 1, 2, 5)
    ...     ),
    ...     in_run=(),
    ...     finished=(),
    ... )
    >>> quiet_ticks(waits)
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for tick in waits.ticks:
        if not any(wait.time >= _LEAST for wait in tick.waits):
            if runs and runs[-1][-1] == tick.number - 1:
                runs[-1].append(tick.number)
            else:
                runs.append([tick.number])
    return ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def sums_table(waits: Waits, seconds: float) -> tuple[Sequence[str], _Rows]:
    """Makes a head, and a row for each reason: of all ranks, and its share of their time.

    Args:
      waits: The waits, in microseconds.
      seconds: From the first action's start to the last one's end.
    """
    num_ranks = len(waits.finished)
    whole = num_ranks * seconds * 1e6
    idle = {
        **{f"waits, {why}: {_MEANS[why]}": time for why, time in waits.by_reason().items()},
        "has nothing left to do": sum(waits.finished),
    }
    sums = {"acts": whole - sum(idle.values()), **idle}
    rows: _Rows = [
        [name, f"{time / num_ranks:,.1f}", f"{time / whole:.1%}"] for name, time in sums.items()
    ]
    return ("a rank", "us, the mean", "share"), rows


def _permutes(tick: Tick) -> str:
    """Writes the pairs, `0>1` to the right and `0<1` to the left."""
    right, left = tick.exchange
    pairs = [f"{source}>{target}" for source, target in right]
    return " ".join(pairs + [f"{target}<{source}" for source, target in left])


def _cell(tick: Tick, rank: int) -> str:
    """Writes an action, and the waits after it."""
    mine = [wait for wait in tick.waits if wait.rank == rank and wait.time >= _LEAST]
    return " ".join([tick.actions[rank] or ".", *_texts(mine)])


def _texts(waits: Iterable[Wait]) -> Iterable[str]:
    last = None
    for wait in waits:
        time = f"{wait.time:.3g}" if wait.time < 100 else f"{wait.time:.0f}"
        if wait.reason == TRANSFER:
            yield f"+{time}" if wait.other == last else f"<{wait.other} +{time}"
        else:
            where = f"@{wait.read_in}" if wait.reason == EARLY else ""
            yield f"<{wait.other} {_WORDS[wait.reason]}{where} {time}"
        last = wait.other
