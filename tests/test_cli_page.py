"""`timeline --format html`: one file, whose data are the replay."""

import re
from typing import Any

import pytest
from click.testing import CliRunner

from dualpipe_jax import _cli, schedules
from dualpipe_jax._plot import Timetable, make_page
from dualpipe_jax._predict import Costs, simulate
from dualpipe_jax._schedule.execution import Execution
from tests.pages import page_of

COSTS = Costs(forward=10, input_grad=12, weight_grad=8, head=2)
OPTIONS = ["--costs", "F=10,I=12,W=8", "--head", "2", "--transfer", "1"]


def run(*arguments: str) -> str:
    sizes = ["--ranks", "4", "--microbatches", "16", "--format", "html"]
    command = ["timeline", *sizes, *OPTIONS, *arguments]
    return CliRunner().invoke(_cli.main, command, catch_exceptions=False).output


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dualpipe", {"overlap": False}),
        ("dualpipe", {"overlap": True}),
        ("dualpipev", {"overlap": "two-tick"}),
        ("1f1b", {"overlap": False, "split_backward": False}),
        ("zb-h1", {"overlap": False, "rendezvous": False}),
    ],
)
def test_the_data_are_the_replay(name: str, options: dict[str, Any]) -> None:
    made = schedules.make(name, num_ranks=4, num_microbatches=16)
    overlap, split = options["overlap"], options.get("split_backward", True)
    rendezvous = options.get("rendezvous", True)
    arguments = ["--overlap", {True: "yes", False: "no"}.get(overlap, overlap)]
    arguments += [] if split else ["--no-split-backward"]
    arguments += [] if rendezvous else ["--no-rendezvous"]
    page = page_of(run("--schedule", name, *arguments))
    (boxes,), (idle_shares,) = page.timetables, page.idle_shares
    units = made.program.units
    expected = zip(units.rank, units.stage, units.microbatch, units.opcode, strict=True)
    assert sorted((b.rank, b.stage, b.microbatch, b.kind) for b in boxes) == sorted(
        (int(r), int(s), int(m), "FIW"[int(o) - 1]) for r, s, m, o in expected
    )
    simulation = simulate(
        made,
        costs=COSTS,
        transfer=1.0,
        execution=Execution(overlap=overlap, split_backward=split),
        rendezvous=rendezvous,
    )
    assert max(box.end for box in boxes) == pytest.approx(simulation.makespan)
    assert sum(idle_shares) / 4 == pytest.approx(simulation.idle_share)
    borders, ended = 0, [0.0] * 4
    for box in boxes:
        free, ended[box.rank] = ended[box.rank], box.end
        assert free <= box.start + 1e-6
        waited = sum(time for time, _ in box.waits)
        assert waited <= box.start - free + 1e-6
        if overlap is False:  # neither beats nor lazy transfers
            assert waited == pytest.approx(box.start - free, abs=1e-6)
        assert box.direction == made.program.direction_of[box.microbatch]
        if box.source is None:
            continue
        source = boxes[box.source]
        borders += 1
        assert source.rank != box.rank
        assert source.microbatch == box.microbatch
        assert box.stage is not None
        assert box.value in ("x", "cotangent")
        assert source.stage == box.stage + (-1 if box.value == "x" else 1)
        assert source.end + 1 <= box.start + 1e-6
    turns = made.num_stages // 4 - 1 if name == "dualpipev" else 0  # that stay on their rank
    assert borders == 2 * 16 * (made.num_stages - 1 - turns)


def test_waits_name_the_rank_and_the_value() -> None:
    (boxes,) = page_of(run("--schedule", "1f1b")).timetables
    (first,) = (box for box in boxes if (box.rank, box.kind, box.microbatch) == (1, "F", 0))
    assert (first.start, first.waits) == (
        11,
        [
            [10, "for rank 0, to make the x of microbatch 0"],
            [1, "while the x of microbatch 0 travels from rank 0"],
        ],
    )


def test_it_is_one_document_that_loads_nothing() -> None:
    text = run("--schedule", "dualpipe")
    assert text.startswith("<!DOCTYPE html>")
    assert text.count("</html>") == 1
    assert "<title>dualpipe: 4 ranks, 16 microbatches, makespan " in text
    assert not re.search(r"https?:|src=|href=|url\(|@import|import\(|fetch\(", text)
    assert "default-src 'none'" in text


def test_bytes_are_those_given() -> None:
    assert page_of(run()).more["x_bytes"] is None
    assert page_of(run("--x-bytes", "8MiB")).more["x_bytes"] == "8 MiB"


def test_texts_end_no_element() -> None:
    table = Timetable(name="</script><b>", boxes=[], idle_shares=[0.5], rest="")
    text = make_page(
        [table], title="a < b", notes="", unit="", starts=[0], has_ticks=False, x_bytes=None
    )
    assert "<h1>a &lt; b</h1>" in text
    assert "<b>" not in text
    assert page_of(text).idle_shares == [[0.5]]
