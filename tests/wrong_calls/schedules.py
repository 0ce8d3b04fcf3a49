"""Schedules: `make`, each factory, CSVs and timelines."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

import dualpipe_jax as dpj
from dualpipe_jax import schedules
from tests.wrong_calls.mistakes import (
    Mistake,
    always,
    amounts,
    but,
    counts,
    flags,
    left_out,
    memories,
    mistake,
    names,
    wrong_type,
)
from tests.wrong_calls.oracle import Target

_CSV = schedules.make("1f1b", num_ranks=2, num_microbatches=2).to_csv()
SCHEDULE = schedules.make("dualpipe", num_ranks=2, num_microbatches=4)
_SIZES: dict[str, Any] = {"num_ranks": 2, "num_microbatches": 4}
_BYTES = dpj.Costs(activation_bytes=100, stash_bytes=60)
PLACEMENTS = ("linear", "v", "interleaved", "bidirectional")
OVERLAPS = (True, False, "two-tick")


def _csv_mistakes() -> list[Mistake]:
    """Mistakes in the CSV of a schedule."""
    rows = _CSV.splitlines()
    cells = rows[0].split(",")

    def swapped(i: int, j: int) -> str:
        mixed = list(cells)
        mixed[i], mixed[j] = mixed[j], mixed[i]
        return "\n".join([",".join(mixed), rows[1]])

    in_message = ("schedule",)
    return [
        wrong_type(also=in_message),
        left_out(),
        mistake("empty", "", "\n\n", " , ,\n,", also=in_message),
        mistake(
            "malformed CSV",
            "0F0,0X0",
            "F0",
            "0F",
            "0F0;0B0",
            "(0F0;0B0)",
            "a,b\nc",
            "0F0.5",
            "-1F0",
            "0F-1",
            "(0F0;0W0)OVERLAP_F_B",
            "0F0" * 500,
            also=in_message,
        ),
        mistake("odd characters", st.text(min_size=1, max_size=30), also=in_message),
        mistake("bytes for text", _CSV.encode(), b"\xff\xfe0F0", also=in_message),
        mistake("path for text", Path("schedule.csv"), "schedule.csv", also=in_message),
        mistake("action left out", *(_CSV.replace(cell, "", 1) for cell in cells), also=in_message),
        mistake(
            "action twice",
            _CSV + "0F0\n",
            _CSV.replace("0F0", "0F0,0F0"),
            _CSV + _CSV,
            also=in_message,
        ),
        mistake(
            "actions in a circle",
            swapped(0, 2),
            swapped(1, 3),
            _CSV.replace("1F0", "1B0x"),
            also=in_message,
        ),
        mistake("rank left out", rows[1], also=in_message),
        mistake(
            "number far too large",
            "999999999999F0,0B0",
            "0F999999999999",
            "9" * 30 + "F0",
            "0F0," * 3 + "0F123456789",
            also=in_message,
        ),
        mistake("another form", _CSV + "\n\n", _CSV.replace(",", " ,, "), legal=always),
    ]


def _from_csv(**arguments: Any) -> Any:
    return schedules.Schedule.from_csv(**arguments).timeline()


def _factories() -> list[Target]:
    made = []
    for name in schedules.__all__:
        factory = getattr(schedules, name)
        if name in ("Schedule", "Timeline", "make", "names", "search"):
            continue
        mistakes = {"num_ranks": _sizes(), "num_microbatches": _sizes()}
        options = inspect.signature(factory).parameters
        if "num_stages_per_rank" in options:
            mistakes["num_stages_per_rank"] = but(_sizes(), "argument left out")
            if name == "interleaved_paired":
                mistakes["num_stages_per_rank"].append(mistake("number far too small", 1))
        if "num_deferred" in options:
            mistakes["num_deferred"] = _counts_of_ranks()
        made.append(Target(name=f"schedules.{name}", call=factory, valid=_SIZES, mistakes=mistakes))
    return made


def _sizes() -> list[Mistake]:
    return [*counts(most=10**8), left_out()]


def _counts_of_ranks() -> list[Mistake]:
    """Mistakes in a number for each of two ranks."""
    return [
        mistake("another form", "2r", [0, 1], (3, 0), range(2), np.arange(2), legal=always),
        wrong_type(),
        mistake("malformed text", "", "2", "r2", "-r", "2R", "1.5r", "9" * 20 + "r"),
        mistake("wrong length", [], [0], [0, 1, 2], range(10**9)),
        mistake("wrong type inside", ["0", "1"], [0, 1.0], [0, None], [False, True], [[0], [1]]),
        mistake("negative number", [0, -1], (-1, -1)),
        mistake("number far too large", [0, 10**30], "999999999r", legal=always),
    ]


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _search_mistakes() -> dict[str, list[Mistake]]:
    return {
        "num_ranks": _sizes(),
        "num_microbatches": _sizes(),
        "costs": [wrong_type(lambda value: value is None)],
        "transfer": amounts(),
        "placement": [*but(names(PLACEMENTS), "argument left out")],
        "num_stages_per_rank": [mistake("for another placement", 2, 3)],
        "layers_per_stage": [
            mistake("too few", [1], []),
            mistake("balanced without an order", "balanced"),
        ],
        "layout": [
            mistake("text for a sequence", "ab", b"ab"),
            mistake("fewer layers than stages", ("a",), ()),
            mistake("wrong type inside", ("a", 1), [None, None], [("a",), "b"]),
        ],
        "max_activations": [
            wrong_type(lambda value: value is None or isinstance(value, int | float | np.number)),
            mistake("too little", 0.5, -1.0, float("nan")),
        ],
        "memory": [
            *memories(),
            wrong_type(lambda v: v is None or isinstance(v, int | float | np.number)),
            mistake("too little", 0, "99B", 159.9),
            mistake("another form", "160", "1e3 MiB", float("inf"), np.float64(1e9), legal=always),
        ],
        "keep_beats": flags(),
        "waits": [wrong_type(), mistake("unknown name", "programs", "")],
        "moves": [wrong_type(_is_count), mistake("out of range", -1, 10**12)],
        "seed": [wrong_type(_is_count), mistake("out of range", -1)],
    }


def _with_schedule(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **arguments: function(SCHEDULE, **arguments)


def _also_schedule(mistakes: list[Mistake]) -> list[Mistake]:
    """Lets a message call the name of a schedule by the argument of the other functions."""
    return [replace(each, also=("schedule",)) for each in mistakes]


def targets() -> list[Target]:
    """Lists the callables that make schedules, and their methods."""
    return [
        Target(
            name="schedules.make",
            call=schedules.make,
            valid={"name": "dualpipe", **_SIZES},
            mistakes={
                "name": [*_also_schedule(names(schedules.names())), left_out()],
                "num_ranks": _sizes(),
                "num_microbatches": _sizes(),
            },
        ),
        Target(
            name="Schedule.from_csv",
            call=_from_csv,
            valid={"text": _CSV},
            mistakes={
                "text": _csv_mistakes(),
                "name": but(
                    names((), extra=lambda v: isinstance(v, str) and len(v) < 100),
                    *("unknown name", "odd characters"),
                ),
            },
            weight=4,
        ),
        Target(
            name="Schedule",
            call=lambda **given: schedules.Schedule(**given),
            valid={"program": SCHEDULE.program},
            mistakes={"program": [wrong_type(also=("Schedule",)), left_out()]},
        ),
        Target(
            name="Schedule.timeline",
            call=_with_schedule(schedules.Schedule.timeline),
            valid={},
            mistakes={
                "overlap": [
                    *flags(known=OVERLAPS),
                    mistake("unknown name", "twotick", "TWO-TICK", "x" * 50_000),
                ]
            },
        ),
        Target(
            name="Schedule.to_csv",
            call=_with_schedule(schedules.Schedule.to_csv),
            valid={},
            mistakes={},
        ),
        Target(
            name="schedules.search",
            call=schedules.search,
            valid={**_SIZES, "moves": 3, "costs": _BYTES},
            mistakes=_search_mistakes(),
        ),
        *_factories(),
    ]
