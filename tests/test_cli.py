"""The command line: each format, where it goes, and the messages of mistakes."""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dualpipe_jax import __version__, _cli, schedules
from tests.commands import in_terminal

SIZES = ["--schedule", "dualpipe", "--ranks", "4", "--microbatches", "10"]
MADE = schedules.make("dualpipe", num_ranks=4, num_microbatches=10)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(_cli.main, ["timeline", *arguments], catch_exceptions=False)


def cells_of(text: str, num_ranks: int) -> list[str]:
    """Puts each rank's line together from the blocks of the text form."""
    rows = [""] * num_ranks
    for rank, cells in re.findall(r"^rank (\d+) (.*)$", text, flags=re.MULTILINE):
        rows[int(rank)] += " " + cells
    return [" ".join(re.sub(r"[|+]", " ", row).split()) for row in rows]


def test_text_in_one_direction() -> None:
    result = run("--schedule", "1f1b", "--ranks", "2", "--microbatches", "2")
    assert result.output.splitlines() == [
        "tick    0  1  2  3  4  5  6  7",
        "rank 0  F0 F1 .  I0 W0 .  I1 W1",
        "rank 1  .  F0 I0 W0 F1 I1 W1 .",
        "",
        "F forward   I input grad   W weight grad   . idle",
        (
            "1f1b: 2 ranks, 2 microbatches, 8 ticks, 25.0% idle; "
            "slots: 2 received, 2 residual, 2 weight_residual, 1 stash"
        ),
    ]


def test_text_tells_directions_and_pairs_without_color() -> None:
    output = run("--schedule", "dualpipe", "--ranks", "2", "--microbatches", "6").output
    assert "\x1b" not in output
    assert "rank 0  F0 f3 F1 i3 w3 f4|I0+W0 F2|i4+w4 f5|I1+W1 i5 w5 I2 W2\n" in output
    assert "lower case: direction 1, enters at rank 1" in output
    assert "F|I+W a pair: F beside I and W" in output


def test_text_has_every_action_of_the_timeline() -> None:
    actions = MADE.timeline().actions
    expected = []
    for row in zip(*actions, strict=True):
        cells = [re.fullmatch(r"\d+([FIW])(\d+)", action) if action else None for action in row]
        expected.append(
            " ".join(
                "."
                if cell is None
                else (cell[1] if int(cell[2]) < 5 else cell[1].lower()) + cell[2]
                for cell in cells
            )
        )
    assert cells_of(run(*SIZES).output, 4) == expected


def test_terminal_gets_color_and_blocks_of_its_width() -> None:
    colored, code = in_terminal(*SIZES, columns=60)
    assert code == 0
    assert "\x1b[" in colored
    plain = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    timetable = [line for line in plain.splitlines() if line.startswith(("tick", "rank"))]
    assert max(len(line) for line in timetable) <= 60
    assert len(timetable) > 5  # more than one block
    assert cells_of(plain, 4) == cells_of(run(*SIZES).output, 4)


def test_layers_adds_their_order_inside_a_tick_and_a_beat() -> None:
    timetable, order = run(*SIZES, "--overlap", "yes", "--layers", "2").output.split("\nOrder of ")
    assert timetable == run(*SIZES, "--overlap", "yes").output
    assert order.splitlines() == [
        "2 unrolled layers of a stage:",
        "  tick of F            F0 F1",
        "  tick of I            I1 I0",
        "  tick of W            W1 W0",
        "  full backward        I1 W1 I0 W0",
        "  beat, TPUs and GPUs  I1 F0 W1 I0 F1 send W0@send receive",
        "  beat, CPUs           F0 F1 I1 W1 I0 W0 send receive",
    ]
    assert "beat" not in run(*SIZES, "--layers", "2").output.split("\nOrder of ")[1]


def test_csv_is_the_schedules() -> None:
    assert run(*SIZES, "--format", "csv").output == MADE.to_csv()


def test_json_has_the_timeline() -> None:
    timeline = MADE.timeline()
    assert json.loads(run(*SIZES, "--format", "json").output) == {
        "schedule": "dualpipe",
        "ranks": 4,
        "microbatches": 10,
        "overlap": False,
        "num_ticks": timeline.num_ticks,
        "num_slots": timeline.num_slots,
        "actions": [list(row) for row in timeline.actions],
    }


def test_stages_per_rank() -> None:
    sizes = ["--ranks", "2", "--microbatches", "3"]
    output = run("--schedule", "interleaved-zb", *sizes, "--stages-per-rank", "3").output
    name = output.splitlines()[-1].partition(":")[0]
    assert name == "interleaved-zb(num_stages_per_rank=3)"
    # The name that is shown makes the schedule again.
    assert run("--schedule", name, *sizes).output == output
    result = run("--schedule", "1f1b", *sizes, "--stages-per-rank", "3")
    assert result.exit_code == 2
    assert "num_stages_per_rank=3: must be an option of schedule '1f1b'" in result.output


def test_aligned_is_another_timetable_of_the_same_order() -> None:
    aligned = [*SIZES, "--overlap", "yes"]
    timeline = MADE.timeline(overlap=True)
    made = json.loads(run(*aligned, "--format", "json").output)
    assert (made["overlap"], made["num_ticks"]) == (True, 3 * 10 + 4 // 2 - 1)
    assert made["actions"] == [list(row) for row in timeline.actions]
    output = run(*aligned).output
    assert f"31 ticks, 3.2% idle, aligned: {len(timeline.beats)} beats; slots" in output
    few = ["--schedule", "interleaved-paired", "--ranks", "4", "--microbatches", "4"]
    assert "aligned: no steady phase; slots" in run(*few, "--overlap", "yes").output
    assert output != run(*SIZES).output
    assert run(*aligned, "--format", "csv").output == MADE.to_csv()


@pytest.mark.parametrize(("image_format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_pictures_go_to_a_pipe(image_format: str, start: bytes) -> None:
    result = run(*SIZES, "--format", image_format)
    assert result.exit_code == 0
    assert result.stdout_bytes.startswith(start)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.svg", "a.png", "a.html"])
def test_suffix_of_output_names_the_format(tmp_path: Path, name: str) -> None:
    image_format = {"a.txt": "text"}.get(name, name[2:])
    result = run(*SIZES, "--output", str(tmp_path / name))
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / name).read_bytes() == run(*SIZES, "--format", image_format).stdout_bytes


def test_format_is_stronger_than_the_suffix(tmp_path: Path) -> None:
    run(*SIZES, "--format", "csv", "--output", str(tmp_path / "a.txt"))
    assert (tmp_path / "a.txt").read_text() == MADE.to_csv()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schedule", "nope"], ["'nope'", *map(repr, schedules.names())]),
        (["--ranks", "0", "--microbatches", "-1"], ["num_ranks=0", "num_microbatches=-1"]),
        (["--ranks", "two"], ["--ranks", "'two'"]),
        (["--overlap", "maybe"], ["'maybe'", "'yes'", "'no'", "'two-tick'"]),
        (["--bogus"], ["--bogus"]),
        (["--layers", "4", "--format", "json"], ["--layers 4", "json"]),
        (["--x-bytes", "8MiB", "--format", "json"], ["--x-bytes", "html", "json"]),
        (["--layers", "4", "--format", "html"], ["--layers 4", "html"]),
        (["--output", "/nowhere/a.svg"], ["/nowhere/a.svg", "No such file or directory"]),
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


def test_png_is_refused_by_a_terminal() -> None:
    output, code = in_terminal(*SIZES, "--format", "png", columns=80)
    assert (output, code) == (
        "Error: a png is not for a terminal: name a file with --output\n",
        2,
    )


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(*SIZES, "--format", "svg")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "pip install matplotlib" in result.stderr


def test_version() -> None:
    assert __version__ in CliRunner().invoke(_cli.main, ["--version"]).output
