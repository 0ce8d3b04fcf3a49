"""Predictions and pictures: `Costs`, `Execution`, `simulate`, `plot_timeline`."""

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

import dualpipe_jax as dpj
from dualpipe_jax import schedules
from tests.wrong_calls.arguments import costs_of_kinds, of_type, sizes_mistakes
from tests.wrong_calls.mistakes import (
    Mistake,
    always,
    amounts,
    but,
    counts,
    flags,
    left_out,
    mistake,
    names,
    wrong_type,
)
from tests.wrong_calls.oracle import Target
from tests.wrong_calls.schedules import OVERLAPS, SCHEDULE


def _cost_fields(**more: list[Mistake]) -> dict[str, list[Mistake]]:
    open_at_zero = amounts(is_open=True)
    fields = ("input_grad", "weight_grad", "embed", "head", "recompute", "spill", "fill")
    return {"forward": open_at_zero, **{name: amounts() for name in fields}, **more}


def _execution_fields() -> dict[str, list[Mistake]]:
    return {
        "overlap": [
            *flags(known=OVERLAPS, optional=True),
            mistake("unknown name", "twotick", "TWO-TICK", "two-tick ", "x" * 50_000),
            mistake("another form", *OVERLAPS, None, legal=always),
        ],
        "unroll": [
            wrong_type(lambda v: v is None or (isinstance(v, int) and v > 0)),
            mistake("zero", 0),
            mistake("negative number", st.integers(max_value=-1)),
            mistake("float for an integer", 1.0, 2.5, float("nan"), float("inf")),
            mistake("text for a number", "1", "all", ""),
            mistake("another form", True, False, None, 3, 10**9, legal=always),
        ],
        "split_backward": flags(optional=True),
        "deferred": names(("recompute", "store"), optional=True),
        "slots_on_device": [
            wrong_type(lambda v: v is None or (isinstance(v, int) and v > 0)),
            mistake("zero", 0),
            mistake("negative number", st.integers(max_value=-1), "-1GiB"),
            mistake("bool for a number", True, False),
            mistake("float for an integer", 1.0, 2.5, float("nan"), float("inf")),
            mistake(
                "unknown unit", "80XB", "GiB", "80 80", "eighty", "80GiBGiB", "12", "x" * 50_000
            ),
            mistake("NaN", "nan", "nanGiB"),
            mistake("infinite", "inf", "1e400"),
            mistake("another form", 1, 10**9, "12GiB", " 1.5 GB ", None, legal=always),
        ],
    }


def _mistakes_of_kinds() -> list[Mistake]:
    """Mistakes in the cost of a layer of each kind."""
    return [
        wrong_type(lambda v: v is None or (isinstance(v, dict) and bool(v))),
        mistake("empty", {}),
        mistake("negative number", {"a": -1}, {"a": 1.0, "b": -1e-9}),
        mistake("NaN", {"a": float("nan")}),
        mistake("infinite", {"a": float("inf")}, {"a": 1, "b": float("-inf")}),
        mistake("number far too large", {"a": 1e101}, {"a": 10**400}),
        mistake("wrong type inside", {"a": "1"}, {"a": None}, {"a": True}, {"a": [1.0]}),
        mistake("another form", {"a": 1}, {None: 0.5, 3: np.float32(2)}, legal=always),
    ]


def _paths() -> list[Mistake]:
    """Mistakes in the file of a picture."""
    here = Path(__file__)
    return [
        wrong_type(lambda v: v is None or isinstance(v, str)),
        mistake(
            "unwritable path",
            here.parent,
            here / "x.svg",
            "/no/such/folder/x.svg",
            "/proc/x.png",
            "x" * 5000 + ".svg",
            "\0.svg",
            "",
        ),
        mistake("unknown suffix", "/tmp/x.no_such", "/tmp/x.docx", "/tmp/.svg.x"),
        mistake("number for a name", 3, -1, 1.5),
    ]


def _of_costs() -> list[Target]:
    costs = [*of_type(dpj.Costs(), None)]
    return [
        Target(
            name="Costs",
            call=dpj.Costs,
            valid={},
            mistakes=_cost_fields(
                full_backward=but(amounts(), "wrong type"),
                layer=_mistakes_of_kinds(),
                activation_bytes=but(amounts(least=1), "wrong type"),
                stash_bytes=amounts(),
            ),
            weight=2,
        ),
        Target(
            name="Execution", call=dpj.Execution, valid={}, mistakes=_execution_fields(), weight=2
        ),
        Target(
            name="simulate",
            call=dpj.simulate,
            valid={"schedule": SCHEDULE},
            mistakes={
                "schedule": [
                    wrong_type(),
                    left_out(),
                    mistake("name for a schedule", "dualpipe", "1f1b"),
                    mistake("program for a schedule", SCHEDULE.program),
                ],
                "costs": [*costs, costs_of_kinds()],
                "transfer": amounts(),
                "layout": [
                    wrong_type(lambda v: v is None or (isinstance(v, list | tuple) and len(v) > 1)),
                    mistake("text for a sequence", "ab", b"ab"),
                    mistake("fewer layers than stages", ("a",), ()),
                    mistake("wrong type inside", ("a", 1), [None, None], [("a",), "b"]),
                ],
                "num_layers": [
                    *but(counts(most=10**13, optional=True), "zero"),
                    mistake("zero", 0),
                    mistake("fewer layers than stages", 1),
                ],
                # No model says how many layers there are.
                "layers_per_stage": but(sizes_mistakes(), "wrong sum"),
                "execution": of_type(dpj.Execution(overlap=False)),
                "rendezvous": flags(),
                "placed_by": costs,
            },
            weight=3,
        ),
    ]


def targets() -> list[Target]:
    """Lists the callables that predict and show."""
    timeline = schedules.make("1f1b", num_ranks=2, num_microbatches=2).timeline()
    return [
        *_of_costs(),
        Target(
            name="plot_timeline",
            call=dpj.plot_timeline,
            valid={"timeline": timeline},
            mistakes={
                "timeline": [
                    wrong_type(),
                    left_out(),
                    mistake("schedule for a timeline", SCHEDULE, SCHEDULE.program),
                ],
                "title": [
                    wrong_type(lambda v: v is None or isinstance(v, str)),
                    mistake("another form", "a title", "", None, legal=always),
                ],
                "path": _paths(),
            },
            raises=(ValueError, TypeError, OSError),
            weight=1,
        ),
    ]
