"""The records of a report -> lines and tables of plain text.

Numbers have three digits and a unit; a dash stands for one that is not known. Alike collectives in
several branches share a row. Waits are written tick by tick, and summed up by reason.
"""

import re
from collections.abc import Iterable, Sequence

from dualpipe_jax._costs import format_bytes
from dualpipe_jax._predict.waits import EARLY, MERGED, NEXT, RECEIVER, TRANSFER, Tick, Wait, Waits
from dualpipe_jax._preflight.copies import Copy
from dualpipe_jax._preflight.kernels import Kernel
from dualpipe_jax._preflight.predict import Prediction
from dualpipe_jax._preflight.timing import Collective, exposed_seconds

_WHERE = {
    "steady": "a trip of the steady loop",
    "tick": "a tick",
    "once": "a step, around the steady loop",
    "loop": "a trip of a loop",
}
_MOST_COPIES = 4  # lines
COLLECTIVES_HEAD = (
    "collective",
    "axes",
    "",
    "bytes",
    "link",
    "cycles",
    "matmuls",
    "compute",
    "",
)
_WORDS = {NEXT: "next", EARLY: "early", RECEIVER: "receiver", MERGED: "merged"}
_MEANS = {
    NEXT: "its next action reads the value sent to it",
    EARLY: "a later action reads it",
    RECEIVER: "it sends, and the other rank is not there yet",
    MERGED: "nobody stores the value",
    TRANSFER: "both are there, and the value travels",
}
WAITS_LEGEND = (
    "waits in us, below 0.05 left out; 1I0 <0 next 12 +21: after 1I0 the rank waits 12 us for",
    "rank 0, whose value it reads next, and 21 us for the transfer; early@9: it is read in tick 9",
)
_LEAST = 0.05
# The most rows that are searched for a repetition.
_LONGEST = 24
_Rows = list[list[str]]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Sets columns of plain text, the first to the left and the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [first.ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        ).rstrip()
        for first, *others in lines
    )


def show_bytes(number: float | None) -> str:
    """Writes bytes in KiB, MiB, ..."""
    return "-" if number is None else format_bytes(number)


def show_flops(number: float) -> str:
    """Writes FLOPs in kFLOP, MFLOP, ..."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
    return _scaled(number, units) if number else "-"


def show_time(seconds: float | None) -> str:
    """Writes seconds in us, ms, ..."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0"
    return f"{seconds:.3g} s" if seconds >= 1 else _scaled(seconds * 1e9, ("ns", "us", "ms"))


def _scaled(number: float, units: Sequence[str]) -> str:
    """Writes a number in the largest of units, each a thousand of the one before, below it."""
    index = 0
    while number >= 1000 and index + 1 < len(units):
        number, index = number / 1000, index + 1
    return f"{number:,.0f} {units[index]}" if number >= 100 else f"{number:.3g} {units[index]}"


def show_number(number: float | None) -> str:
    """Writes a number with its thousands apart."""
    return "-" if number is None else f"{number:,.0f}"


def branch_lines(collectives: Sequence[Collective]) -> list[str]:
    """Writes how collectives in branches count, if there are any."""
    in_branches = [collective for collective in collectives if collective.branch is not None]
    if not in_branches:
        return []
    number = f"{len(in_branches)} of them stand in the branches of a conditional: a trip takes one"
    if any(collective.num_runs is None for collective in in_branches):
        return [number, "branch; counted as exposed is the most expensive"]
    return [number, "branch; counted as exposed is the mean over the step's trips"]


def host_lines(copies: Sequence[Collective]) -> list[str]:
    """Writes how many copies to and from the host there are, and how long they are exposed."""
    if not copies:
        return []
    number = sum(copy.count for copy in copies)
    hidden = sum(copy.count for copy in copies if copy.is_hidden)
    each_way = (
        f"{show_bytes(sum(copy.num_bytes * copy.count for copy in way))} {words}"
        for words in ("to host", "from host")
        if (way := [copy for copy in copies if copy.kind == words])
    )
    exposed = show_time(exposed_seconds(copies))
    of = f"{hidden} of {number} copies to and from the host hidden"
    return [", ".join((of, *each_way, f"{exposed} exposed"))]


def collective_rows(collectives: Sequence[Collective]) -> list[Sequence[str]]:
    """Makes a row for each collective, and one for all alike ones in branches."""
    alike: dict[tuple[str, ...], list[Collective]] = {}
    for collective in collectives:
        cells = (
            collective.kind
            + " across slices" * collective.across_slices
            + (f" x{collective.count}" if collective.count > 1 else ""),
            ", ".join(collective.axes) or "-",
            "async" if collective.is_async else "sync",
            show_bytes(collective.num_bytes),
            show_time(collective.link_seconds),
            show_number(collective.cycles),
            show_flops(collective.flops),
            show_time(collective.compute_seconds),
            _verdict(collective),
        )
        # Outside of branches each has a row of its own.
        alike.setdefault((*cells, collective.conditional or collective.name), []).append(collective)
    return [(kind + _branches(group), *cells) for (kind, *cells, _), group in alike.items()]


def _branches(alike: Sequence[Collective]) -> str:
    """Writes in how many branches alike collectives are, and how many trips take those."""
    if alike[0].branch is None:
        return ""
    branches = {collective.branch: collective.num_runs for collective in alike}
    runs = [number for number in branches.values() if number is not None]
    trips = f", {sum(runs)} trips" if len(runs) == len(branches) else ""
    of = f"branch {alike[0].branch}" if len(branches) == 1 else f"{len(branches)} branches"
    return f" ({len(alike)} in {of}{trips})"


def _verdict(collective: Collective) -> str:
    """Writes whether a collective is hidden, or for how long it is exposed."""
    if collective.is_hidden and collective.most_exposed_seconds:
        return "hidden where ranks act"
    if collective.is_beside_another:
        return "beside another"
    if collective.is_hidden:
        return "hidden"
    if collective.exposed_seconds is None:
        return "exposed" if not collective.is_async else "not known"
    return f"exposed {show_time(collective.exposed_seconds)}"


def kernel_line(kernel: Kernel) -> str:
    """Writes how the calls of a kernel count."""
    calls = "1 call" if kernel.count == 1 else f"{kernel.count} calls"
    if kernel.flops is None:
        return (
            f"{kernel.name}, {calls}: NOT IN THE TIMES, as its cost is not known; give it as "
            f"kernel_costs={{{kernel.name!r}: FLOPs}}"
        )
    return f"{kernel.name}, {calls} of {show_flops(kernel.flops)} at the peak ({kernel.source})"


def prediction_line(prediction: Prediction) -> str:
    """Writes the predicted time of a step, or why there is none."""
    if prediction.seconds is None:
        return f"not predicted: {prediction.reason}"
    loop, outside = show_time(prediction.loop_seconds), show_time(prediction.outside_seconds)
    if prediction.schedule is None:
        return (
            f"{show_time(prediction.seconds)} predicted: the loop {loop}; outside of it {outside}"
        )
    return (
        f"{show_time(prediction.seconds)} predicted: {prediction.schedule} {loop}, ranks idle "
        f"{prediction.idle_share or 0:.1%}; outside its loops {outside}"
    )


def copies_lines(copies: Sequence[Copy]) -> list[str]:
    """Writes the copies of most cycles, and how many more there are."""
    if not copies:
        return ["none of a whole slot buffer in a loop"]
    lines = [_copy_line(copy) for copy in copies[:_MOST_COPIES]]
    more = sum(copy.count for copy in copies[_MOST_COPIES:])
    return [*lines, *([f"{more} more of other shapes, or in other places"] if more else [])]


def _copy_line(copy: Copy) -> str:
    action = "" if copy.action == "other" else f", in {copy.action}"
    cycles = "" if copy.cycles is None else f", {copy.cycles:,.0f} cycles"
    over = " over the link to the host" if copy.is_over_host_link else ""
    return (
        f"{copy.count} of a whole slot buffer{over} {_WHERE[copy.where]}{action}: {copy.shape}, "
        f"{show_bytes(copy.num_bytes)}{cycles}"
    )


def ticks_table(waits: Waits) -> tuple[Sequence[str], _Rows]:
    """Makes a head, and a row for each tick after which a rank waits.

    Rows that repeat those before them, with other microbatches, are written once.
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
    """Replaces rows that repeat those before them twice or more by one line."""
    keys = [[re.sub(r"(\d[FIW]|@)\d+", r"\1", cell) for cell in row[1:]] for row in rows]
    out: _Rows = []
    at = 0
    while at < len(rows):
        period, times = max(
            ((period, _times(keys, at, period)) for period in range(1, _LONGEST + 1)),
            key=lambda found: (found[0] * (found[1] - 1) if found[1] > 2 else 0, -found[0]),
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
    """Counts how often in a row the `period` keys from `at` on repeat."""
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
    """Makes a head, and a row for each reason: its time over all ranks, and its share of theirs.

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
    waits = [wait for wait in tick.waits if wait.rank == rank and wait.time >= _LEAST]
    return " ".join([tick.actions[rank] or ".", *_texts(waits)])


def _texts(waits: Iterable[Wait]) -> Iterable[str]:
    """Writes waits of a rank; a transfer from the rank before it needs no name."""
    last = None
    for wait in waits:
        time = f"{wait.time:.3g}" if wait.time < 100 else f"{wait.time:.0f}"
        if wait.reason == TRANSFER:
            yield f"+{time}" if wait.other == last else f"<{wait.other} +{time}"
        else:
            where = f"@{wait.read_in}" if wait.reason == EARLY else ""
            yield f"<{wait.other} {_WORDS[wait.reason]}{where} {time}"
        last = wait.other
