"""CSV -> Program: reads PyTorch's pipelining grammar, in which `Program.to_csv` writes.

A line a rank, cells in program order: `<stage><F|I|W|B><microbatch>`, B a full backward, or a pair
`(<F>;<B or I>)OVERLAP_F_B`. Spaces and empty cells are ignored, and so are blank lines at the
start and the end. Whether the program can run is for the verifier to say.
"""

import re

from dualpipe_jax._schedule.ir import Action, Cell, Pair, Program

# Cells, and characters of one, in a message.
_MOST_NAMED, _LONGEST = 8, 100
# No number is so large that it does not fit an int64; the verifier says which are too large.
_ACTION = r"(\d{{1,12}})([{kinds}])(\d{{1,12}})"
_SINGLE = re.compile(_ACTION.format(kinds="FIWB"))
_PAIR = re.compile(rf"\({_ACTION.format(kinds='F')};{_ACTION.format(kinds='IB')}\)OVERLAP_F_B")


def parse_program(text: str, *, name: str) -> Program:
    """Parses the CSV of a schedule; without any I, W or B it is a forward-only one.

    >>> program = parse_program("0F0, 0B0; 1F0,, 1I0, 1W0".replace(";", chr(10)), name="mine")
    >>> print(*program.rows[1])
    1F0 1I0 1W0

    Raises:
        ValueError: if a cell does not follow the grammar, naming all such; if there is none.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    faults: list[str] = []
    rows = []
    for rank, line in enumerate(lines):
        row = []
        for column, cell in enumerate(line.split(",")):
            if compact := "".join(cell.split()):
                parsed = _parse_cell(compact)
                if parsed is None:
                    faults.append(f"\n  row {rank}, column {column}: {_short(cell.strip())}")
                else:
                    row.append(parsed)
        rows.append(tuple(row))
    if faults:
        raise ValueError(
            f"schedule {name!r} has cells that are neither <stage><F|I|W|B><microbatch> nor "
            f"(<F>;<B or I>)OVERLAP_F_B, numbers of at most 12 digits (rows and columns count from "
            f"0):{''.join(faults[:_MOST_NAMED])}{_and_more(len(faults) - _MOST_NAMED)}"
        )
    actions = [action for row in rows for cell in row for action in cell.unit_actions()]
    if not actions:
        raise ValueError(f"schedule {name!r} has no actions; got {_short(text)}")
    return Program(
        name,
        num_ranks=len(rows),
        num_stages=max(action.stage for action in actions) + 1,
        num_microbatches=max(action.microbatch for action in actions) + 1,
        rows=tuple(rows),
        forward_only=all(action.kind == "F" for action in actions),
    )


def _short(text: str) -> str:
    return f"{text[:_LONGEST]!r}{'...' * (len(text) > _LONGEST)}"


def _and_more(number: int) -> str:
    return f"\n  and {number} more" if number > 0 else ""


def _parse_cell(cell: str) -> Cell | None:
    if match := _SINGLE.fullmatch(cell):
        stage, kind, microbatch = match.groups()
        return Action(kind, int(stage), int(microbatch))
    if match := _PAIR.fullmatch(cell):
        stage, kind, microbatch, other_stage, other_kind, other_microbatch = match.groups()
        forward = Action(kind, int(stage), int(microbatch))
        return Pair(forward, Action(other_kind, int(other_stage), int(other_microbatch)))
    return None
