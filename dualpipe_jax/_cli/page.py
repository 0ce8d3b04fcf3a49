"""Timed actions of a replay, and measured ones -> the timetables of an HTML page."""

from collections.abc import Sequence

from dualpipe_jax._plot import WORDS, Box, Timetable
from dualpipe_jax._predict import TimedAction
from dualpipe_jax._predict.waits import EARLY, MERGED, NEXT, RECEIVER, TRANSFER, Wait
from dualpipe_jax._profile import Measured
from dualpipe_jax._schedule.actions import EFFECTS, Opcode, letter_of

_MORE_WORDS = {
    Opcode.INPUT_GRAD_DEFERRING: "input grad, whose weight grad is deferred",
    Opcode.WEIGHT_GRAD_DEFERRED: "weight grad, deferred",
    Opcode.BACKWARD_UPPER: "full backward, the last layers of the stage",
    Opcode.BACKWARD_LOWER: "full backward, the first layers of the stage",
    Opcode.BACKWARD: "full backward",
    Opcode.WEIGHT_GRAD_DONE: "weight grad, which the full backward has run",
}
_MILLI = 1e3
_SEND = "send, and the wait for the other rank"
_REST = "in transfers with its neighbours"
_REST_MEASURED = "in transfers, in waits for other ranks, and between actions"


def predicted(
    name: str, actions: Sequence[TimedAction], *, num_ranks: int, unit: float = 1.0
) -> Timetable:
    """Makes the timetable of a replay.

    Args:
      name: Its name.
      actions: The actions, rank by rank in order of time.
      num_ranks: The ranks.
      unit: How many units of the page are in a unit of their times.
    """
    at = {(action.rank, action.tick): action for action in actions}
    boxes = []
    for action in actions:
        kind = letter_of(action.opcode)
        waits: dict[str, float] = {}
        for wait in action.waits:
            text = _explain(wait, at)
            waits[text] = waits.get(text, 0.0) + wait.time * unit
        boxes.append(
            Box(
                rank=action.rank,
                kind=kind,
                action=_MORE_WORDS.get(action.opcode, WORDS[kind]),
                stage=action.stage,
                microbatch=action.microbatch,
                direction=action.direction,
                tick=action.tick,
                start=action.start * unit,
                end=action.end * unit,
                source=action.source,
                value=None if action.source is None else EFFECTS[action.opcode].takes,
                waits=[(time, text) for text, time in waits.items()],
            )
        )
    makespan = max(action.end for action in actions)
    acts = [0.0] * num_ranks
    for action in actions:
        acts[action.rank] += action.end - action.start
    # Where a rank never idles, sums in different orders differ in their last bit.
    idle_shares = [max(0.0, 1 - time / makespan) for time in acts]
    return Timetable(name=name, boxes=boxes, idle_shares=idle_shares, rest=_REST)


def _explain(wait: Wait, at: dict[tuple[int, int], TimedAction]) -> str:
    """Says for which rank and value a rank waits."""
    if wait.read_in is None:
        return {
            RECEIVER: f"for rank {wait.other}, to receive the value sent to it",
            TRANSFER: f"for a transfer with rank {wait.other}",
            MERGED: f"for rank {wait.other}, whose transfers were merged with others",
        }[wait.reason]
    reader = at[wait.rank, wait.read_in]
    value = f"the {EFFECTS[reader.opcode].takes} of microbatch {reader.microbatch}"
    return {
        NEXT: f"for rank {wait.other}, to make {value}",
        EARLY: f"for rank {wait.other}, to make {value}, which tick {wait.read_in} reads",
        TRANSFER: f"while {value} travels from rank {wait.other}",
    }[wait.reason]


def measured(name: str, found: Measured, actions: Sequence[TimedAction]) -> Timetable:
    """Makes the measured timetable, in milliseconds.

    Args:
      name: Its name.
      found: The measured actions.
      actions: The actions of its replay, which read the same values.
    """
    # The places of the first and of the last box of each action.
    first: dict[tuple[int, int], int] = {}
    last: dict[tuple[int, int], int] = {}
    for place, each in enumerate(found.joined):
        if each.tick is not None:
            first.setdefault((each.rank, each.tick), place)
            last[each.rank, each.tick] = place
    boxes = [
        Box(
            rank=each.rank,
            kind=each.kind,
            action=_SEND if each.kind == "send" else each.part.replace("_", " "),
            stage=each.stage,
            microbatch=each.microbatch,
            direction=each.direction,
            tick=each.tick,
            start=each.start * _MILLI,
            end=each.end * _MILLI,
            source=None,
            value=None,
            waits=[],
        )
        for each in found.joined
    ]
    for action in actions:
        maker = None if action.source is None else actions[action.source]
        place = first.get((action.rank, action.tick))
        source = None if maker is None else last.get((maker.rank, maker.tick))
        if place is None or source is None:  # a stage without layers
            continue
        value = EFFECTS[action.opcode].takes
        boxes[place] = boxes[place]._replace(source=source, value=value)
    free = [0.0] * len(found.ranks)  # when the action before ends
    for place, box in enumerate(boxes):
        if box.kind == "send":
            continue
        if box.source is not None:
            maker = boxes[box.source]
            wait = min(maker.end, box.start) - free[box.rank]
            if wait > 0:
                value = f"the {box.value} of microbatch {box.microbatch}"
                waits = [(wait, f"for rank {maker.rank}, to make {value}")]
                boxes[place] = box._replace(waits=waits)
        free[box.rank] = box.end
    return Timetable(
        name=name,
        boxes=boxes,
        idle_shares=[times.idle / found.makespan for times in found.ranks],
        rest=_REST_MEASURED,
    )
