"""`timeline --format perfetto`: the replay of a schedule as a trace."""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dualpipe_jax import _cli, schedules
from dualpipe_jax._predict import Costs, simulate
from dualpipe_jax._schedule.execution import Execution

COSTS = Costs(forward=10, input_grad=12, weight_grad=8, head=2)
OPTIONS = ["--costs", "F=10,I=12,W=8", "--head", "2", "--transfer", "1"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(_cli.main, ["timeline", *arguments], catch_exceptions=False)


def events_of(name: str, *arguments: str) -> list[dict[str, Any]]:
    sizes = ["--schedule", name, "--ranks", "4", "--microbatches", "16"]
    result = run(*sizes, "--format", "perfetto", *OPTIONS, *arguments)
    return json.loads(result.output)["traceEvents"]


@pytest.mark.parametrize(
    ("name", "execution", "arguments"),
    [
        ("dualpipe", Execution(overlap=True, split_backward=True), ["--overlap", "yes"]),
        ("1f1b", Execution(overlap=False, split_backward=False), ["--no-split-backward"]),
        ("zb-h1", Execution(overlap=False, split_backward=True), ["--no-rendezvous"]),
    ],
)
def test_a_trace_is_the_replay(name: str, execution: Execution, arguments: list[str]) -> None:
    made = schedules.make(name, num_ranks=4, num_microbatches=16)
    events = events_of(name, *arguments)
    acts = [event for event in events if event["ph"] == "X"]
    units = made.program.units
    expected = {
        (int(r), int(s), int(m), "FIW"[int(o) - 1])
        for r, s, m, o in zip(units.rank, units.stage, units.microbatch, units.opcode, strict=True)
    }
    found = [
        (e["tid"], e["args"]["stage"], e["args"]["microbatch"], e["name"][0].upper()) for e in acts
    ]
    assert set(found) == expected
    assert len(found) == len(expected)
    of_rank = defaultdict(list)
    for event in acts:
        of_rank[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        direction = event["args"]["direction"]
        assert event["name"][0].isupper() == (direction == 0)
        assert direction == made.program.direction_of[event["args"]["microbatch"]]
    for spans in of_rank.values():
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(sorted(spans)))
    simulation = simulate(
        made,
        costs=COSTS,
        transfer=1.0,
        execution=execution,
        rendezvous="--no-rendezvous" not in arguments,
    )
    end = max(end for spans in of_rank.values() for _, end in spans)
    assert end == pytest.approx(simulation.makespan)


def test_arrows_go_from_an_action_to_the_one_that_reads_its_value() -> None:
    events = events_of("1f1b")
    flows = [event for event in events if event["ph"] in "sf"]
    # Each microbatch crosses three borders of stages, forwards and backwards.
    assert len(flows) == 2 * 16 * 3 * 2
    acts = [event for event in events if event["ph"] == "X"]

    def at(flow: dict[str, Any]) -> dict[str, Any]:
        (found,) = (
            e
            for e in acts
            if e["tid"] == flow["tid"] and e["ts"] <= flow["ts"] < e["ts"] + e["dur"]
        )
        return found["args"]

    for start, end in zip(flows[::2], flows[1::2], strict=True):
        assert (start["ph"], end["ph"], start["id"]) == ("s", "f", end["id"])
        step = 1 if start["name"] == "x" else -1
        assert at(end)["stage"] == at(start)["stage"] + step
        assert at(end)["microbatch"] == at(start)["microbatch"]


def test_the_suffix_and_options_of_other_formats(tmp_path: Path) -> None:
    output = tmp_path / "made.perfetto.json"
    assert run("--ranks", "2", "--output", str(output)).exit_code == 0
    assert json.loads(output.read_text())["traceEvents"]
    result = run("--ranks", "2", *OPTIONS)
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: --costs, --transfer, --head: only for --format perfetto and html, not for text\n"
    )
