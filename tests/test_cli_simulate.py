"""`dualpipe-jax simulate`: both formats, the terminal, and the messages of mistakes."""

import json
import re

import pytest
from click.testing import CliRunner, Result

import dualpipe_jax as dpj
from dualpipe_jax import _cli, schedules
from dualpipe_jax._predict import Costs, simulate
from tests.commands import broken_words, in_terminal, modules_after
from tests.schedules_under_test import PAIRED


def run(*arguments: str) -> Result:
    return CliRunner().invoke(_cli.main, ["simulate", *arguments], catch_exceptions=False)


def test_table_has_a_row_a_schedule() -> None:
    result = run("--schedule", "zb-h1", "--ranks", "2", "--microbatches", "3", "--costs", "F=3")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.output.splitlines()
    assert lines[0].split() == [
        *("schedule", "overlap", "makespan", "no", "false", "waits"),
        *("idle", "bubble", "paper", "peak", "live", "copies", "transfers"),
    ]
    assert lines[1].split() == [
        # By hand in tests/test_simulate.py; of 18 a rank acts for 3 * 3 + 3 + 3.
        *("zb-h1", "no", "18", "18", "16.7%", "3", "3", "2", "1x", "6"),
    ]
    assert len(set(map(len, lines[:2]))) == 1
    assert lines[2:4] == [
        "",
        (
            "ranks 2, microbatches 3; a rank's layers cost F=3, I=1, W=1; "
            "transfer 0, embed 0, head 0; senders wait for receivers"
        ),
    ]


def test_fastest_is_the_default_and_named() -> None:
    sizes = ["--microbatches", "64", "--transfer", "0.1", "--format", "json"]
    made = {m["schedule"]: m for m in json.loads(run(*sizes).output)}
    assert {name: m["execution"]["overlap"] for name, m in made.items()} == {
        **dict.fromkeys(schedules.names(), False),
        **dict.fromkeys(PAIRED, True),
    }
    for name, overlap in (("yes", True), ("no", False), ("two-tick", "two-tick")):
        for m in json.loads(run(*sizes, "--overlap", name).output):
            assert m["execution"]["overlap"] in (overlap, False)  # where there is a steady phase
            if name != "two-tick":  # it is taken on request only
                assert m["makespan"] >= made[m["schedule"]]["makespan"]


def test_stages_per_rank_of_all_schedules_that_have_them() -> None:
    made = json.loads(run("--ranks", "2", "--stages-per-rank", "3", "--format", "json").output)
    names = [
        f"{name}(num_stages_per_rank=3)" if name.startswith("interleaved") else name
        for name in schedules.names()
    ]
    assert [m["schedule"] for m in made] == names


def test_all_is_the_default_and_goes_over_every_schedule() -> None:
    lines = run().output.splitlines()
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == list(schedules.names())
    assert run("--schedule", "all").output == run().output


def test_json_has_the_simulations() -> None:
    objects = json.loads(run("--format", "json").output)
    assert [made["schedule"] for made in objects] == list(schedules.names())
    for made in objects:
        schedule = schedules.make(made["schedule"], num_ranks=8, num_microbatches=20)
        expected = simulate(schedule)
        assert (made["ranks"], made["microbatches"]) == (8, 20)
        for name in ("makespan", "idle_share", "peak_activations", "published_bubble"):
            assert made[name] == getattr(expected, name)
        assert made["work"] == list(expected.work)


def test_options_reach_the_simulation() -> None:
    sizes = ["--schedule", "dualpipe", "--ranks", "4", "--microbatches", "10"]
    sizes += ["--overlap", "yes"]
    options = ["--costs", "F=1.5,I=2,W=0.5", "--transfer", "0.25", "--layers", "6"]
    options += ["--embed", "0.5", "--head", "2", "--no-rendezvous"]
    (made,) = json.loads(run(*sizes, *options, "--format", "json").output)
    expected = simulate(
        schedules.make("dualpipe", num_ranks=4, num_microbatches=10),
        costs=Costs(forward=1.5, input_grad=2, weight_grad=0.5, embed=0.5, head=2),
        transfer=0.25,
        num_layers=6,
        execution=dpj.Execution(overlap=True, split_backward=True),
        rendezvous=False,
    )
    assert made["execution"]["overlap"] is True
    assert made["makespan"] == expected.makespan
    assert made["dependency_makespan"] == expected.dependency_makespan
    assert made["published_bubble"] is None
    table = run(*sizes, *options).output
    assert re.search(rf"^dualpipe +yes +{expected.makespan:g} ", table, flags=re.MULTILINE)


def test_full_backwards_are_simulated_and_named() -> None:
    sizes = ["--schedule", "1f1b", "--ranks", "4", "--microbatches", "16"]
    split, full = (
        json.loads(run(*sizes, *more, "--format", "json").output)[0]["makespan"]
        for more in ((), ("--no-split-backward",))
    )
    assert full > split
    assert "full backwards" in run(*sizes, "--no-split-backward").output
    assert "full backwards" not in run(*sizes).output


def test_terminal_gets_the_same_table() -> None:
    colored, code = in_terminal(command="simulate", columns=120)
    assert code == 0
    assert "\x1b[" in colored
    plain = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    words = [line.split() for line in plain.splitlines()]
    for line in run().output.splitlines():
        assert line.split() in words


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [
        (80, "transfers"),
        (60, "transfers, copies, paper, no false waits"),
        (35, "transfers, copies, paper, no false waits, peak live, bubble, overlap"),
    ],
)
def test_narrow_terminal_gets_fewer_columns_and_no_broken_word(columns: int, left_out: str) -> None:
    colored, code = in_terminal(command="simulate", columns=columns)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert max(map(len, plain.splitlines())) <= columns
    assert not broken_words(plain, run().output)
    assert " ".join(plain.split()).endswith(f"left out in so narrow a terminal: {left_out}")
    rows = [line.split() for line in plain.splitlines()]
    for made in json.loads(run("--format", "json").output):
        (row,) = (row for row in rows if row and row[0] == made["schedule"])
        assert f"{made['makespan']:g}" in row
        assert f"{made['idle_share']:.1%}" in row


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schedule", "nope"], ["'nope'", *map(repr, schedules.names())]),
        (["--ranks", "0", "--microbatches", "-1"], ["num_ranks=0", "num_microbatches=-1"]),
        (["--ranks", "two"], ["--ranks", "'two'"]),
        (["--costs", "F=1,Q=2,F=3,I"], ["'Q=2'", "'F=3'", "'I'", "F=1,I=1,W=1"]),
        (["--costs", ""], ["--costs ''"]),
        (["--costs", "I=-1,W=nan"], ["input_grad=-1.0", "weight_grad=nan"]),
        (["--costs", "F=0"], ["forward=0.0"]),
        (["--transfer", "-1"], ["transfer=-1.0"]),
        (["--transfer", "1e308"], ["transfer=1e+308", "at most 1e+100"]),
        (["--costs", "F=1e308"], ["forward=1e+308", "at most 1e+100"]),
        (["--layers", "9" * 26], ["num_layers=999", "at most 1,000,000,000,000"]),
        (["--transfer", "fast"], ["--transfer", "'fast'"]),
        (["--head", "inf"], ["head=inf"]),
        (["--layers", "3"], ["num_layers=3", "at least the 8 stages"]),
        (["--overlap", "maybe"], ["'maybe'", "'yes'", "'no'", "'two-tick'"]),
        (["--format", "csv"], ["'csv'", "'table'", "'json'"]),
        (["--bogus"], ["--bogus"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_all_leaves_out_impossible_schedules_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    make = schedules.make

    def refuse_gpipe(name: str, **sizes: int) -> schedules.Schedule:
        if name == "gpipe":
            raise ValueError("not\n  today")
        return make(name, **sizes)

    monkeypatch.setattr(schedules, "make", refuse_gpipe)
    result = run("--format", "json")
    assert result.exit_code == 0
    names = [made["schedule"] for made in json.loads(result.stdout)]
    assert names == [name for name in schedules.names() if name != "gpipe"]
    assert result.stderr == "left out: gpipe: not today\n"


@pytest.mark.parametrize("output_format", ["table", "json"])
def test_imports_no_jax(output_format: str) -> None:
    arguments = ["simulate", "--ranks", "2", "--microbatches", "4", "--format", output_format]
    imported = modules_after(
        f"from dualpipe_jax.__main__ import main; main({arguments}, standalone_mode=False)"
    )
    assert not imported & {"jax", "jaxlib", "flax", "matplotlib", "rich"}
