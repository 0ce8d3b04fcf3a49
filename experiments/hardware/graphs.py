"""Asks an absent H100's compiler which loops and conditionals of a tick the host decides.

XLA's GPU runtime runs a list of *thunks*: kernels, copies, transfers, loops, conditionals. It
copies the predicate of a conditional, or of a loop of unknown length, to the host and waits for it,
unless the thunk is part of a command buffer (a CUDA graph): there the device decides.
XLA turns thunks into command buffers when it compiles; it dumps the list of thunks after that.

In: flags. Out, printed and in a folder: a table. Nothing runs. See README.md beside it.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import track

import dualpipe_jax as dpj
from experiments import documents, tables
from experiments.compiled.steps import Case
from experiments.hardware.programs import COMMANDS
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE

README = Path(__file__).with_name("README.md")
_LINE = re.compile(r"( *)(\d+): (k\w+)")
_METADATA = re.compile(r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)')
_COUNTED = re.compile(r'%(\S+) = [^\n]* while\([^\n]*"known_trip_count"')
_BUFFER, _LOOP, _CONDITIONAL, _PERMUTE = (
    "kCommandBuffer",
    "kWhile",
    "kConditional",
    "kCollectivePermute",
)
# Thunks that hold others and are not launched, and ends of transfers.
_NOT_LAUNCHED = {_LOOP, _CONDITIONAL, "kAsyncStart", "kAsyncDone", "kSequential"}
_DEFAULT = "XLA's default"
# Without any command buffer the host decides all.
SETS = {_DEFAULT: {}, **{name: options for name, options in COMMANDS.items() if name != "none"}}
# Schedule, ranks, overlap.
STEPS: tuple[tuple[str, int, bool | Literal["two-tick"]], ...] = (
    ("1f1b", 1, False),
    ("1f1b", 4, False),
    ("1f1b", 4, "two-tick"),
    ("zb-h1", 4, False),
    ("dualpipe", 4, True),
    ("dualpipev", 4, True),
)


@dataclass(frozen=True, kw_only=True)
class Thunks:
    """Counts the thunks in the loop over ticks, inside and outside of command buffers.

    Attributes:
      decided_by_host: Loops of unknown length and conditionals outside.
      decided_by_device: Those inside.
      transfers_outside: Permutes outside.
      transfers_inside: Permutes inside.
      buffers: The command buffers.
      launched: Kernels, copies and other thunks outside that run by themselves.
    """

    decided_by_host: int
    decided_by_device: int
    transfers_outside: int
    transfers_inside: int
    buffers: int
    launched: int


def count(sequence: str, *, counted: Collection[int] = ()) -> Thunks:
    """Counts the thunks of the outermost loop.

    >>> count(
    ...     '''
    ... 001: kWhile [source | sink]
    ... condition:
    ...     002: kCustomKernel [source | sink] compare
    ...   body:
    ...     000: kCommandBuffer [source | next=005 (1)]
    ...         003: kWhile [source | sink]
    ...           body:
    ...             004: kCustomKernel [source | sink] fusion
    ...     005: kConditional [prev=000 (1) | sink]
    ...       true_branch:
    ...         006: kCollectivePermute [source | sink] permute
    ... ''',
    ...     counted={1},
    ... )
    Thunks(decided_by_host=1, decided_by_device=1, transfers_outside=1, transfers_inside=0,
           buffers=1, launched=1)

    Args:
      sequence: XLA's text: a line for each thunk, those that it holds further to the right.
      counted: The loops whose number of trips is known, of whose predicate nobody is asked.
    """
    found: Counter[tuple[bool, str]] = Counter()
    above: list[tuple[int, str]] = []
    for line in sequence.splitlines():
        thunk = _LINE.match(line)
        if thunk is None:
            continue
        depth, number, kind = len(thunk[1]), int(thunk[2]), thunk[3]
        while above and above[-1][0] >= depth:
            above.pop()
        around = [name for _, name in above]
        above.append((depth, kind))
        if _LOOP in around and not (kind == _LOOP and number in counted):
            found[_BUFFER in around, kind] += 1
    inside, outside = (
        {kind: n for (is_inside, kind), n in found.items() if is_inside is wanted}
        for wanted in (True, False)
    )

    def decided(kinds: Mapping[str, int]) -> int:
        return kinds.get(_LOOP, 0) + kinds.get(_CONDITIONAL, 0)

    return Thunks(
        decided_by_host=decided(outside),
        decided_by_device=decided(inside),
        transfers_outside=outside.get(_PERMUTE, 0),
        transfers_inside=inside.get(_PERMUTE, 0),
        buffers=outside.get(_BUFFER, 0),
        launched=sum(
            n for kind, n in outside.items() if kind not in {_BUFFER, _PERMUTE, *_NOT_LAUNCHED}
        ),
    )


def loops_of_known_length(metadata: str, program: str) -> set[int]:
    r"""Finds the numbers of thunks that are loops with a known number of trips.

    >>> text = (
    ...     '%while.7 = (s32[]) while(%t), body=%b, backend_config={"known_trip_count":{"n":"5"}}'
    ... )
    >>> loops_of_known_length('profile_annotation: "while.7"\n    thunk_id: 47', text)
    {47}

    Args:
      metadata: XLA's list of the names of thunks.
      program: The optimised program.
    """
    known = set(_COUNTED.findall(program))
    return {int(number) for name, number in _METADATA.findall(metadata) if name in known}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A compiled step."""

    schedule: str
    ranks: int
    overlap: bool | Literal["two-tick"]
    commands: str
    thunks: Thunks


def measure(
    schedule: str, ranks: int, overlap: Any, commands: str, *, width: int, tokens: int
) -> Row:
    """Compiles a step of MLPs, two layers a stage, and counts its thunks."""
    topology = f"gpu:h100:{ranks}"
    step = Case(
        topology=topology,
        ranks=ranks,
        width=width,
        tokens=tokens,
        schedule=schedule,
        overlap=overlap,
    ).make()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **dpj.compiler_options("gpu"),
            **SETS[commands],
            "xla_dump_to": folder,
        }
        try:
            dpj.preflight(step.fn, step.args, topology, mesh=step.mesh, compiler_options=options)
        except ModuleNotFoundError as error:
            raise flags.Refusal(str(error)) from error
        texts = [
            _only(folder, f"*{end}")
            for end in ("thunk_sequence_after_thunk_passes.txt", "thunk_metadata.txt")
        ]
        program = _only(folder, "*gpu_after_optimizations.txt")
    thunks = count(texts[0], counted=loops_of_known_length(texts[1], program))
    return Row(schedule=schedule, ranks=ranks, overlap=overlap, commands=commands, thunks=thunks)


def _only(folder: str, pattern: str) -> str:
    """Reads the file of the step: other programs, which JAX runs by the way, are smaller."""
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_size)
    assert found, f"XLA wrote no {pattern}"
    return found[-1].read_text()


def _thunk(name: str) -> tables.Cell:
    return lambda row: getattr(row.thunks, name)


def _pair(name: str) -> tables.Cell:
    inside, outside = _thunk(f"{name}_inside"), _thunk(f"{name}_outside")
    return lambda row: f"{outside(row)}, {inside(row)}"


_WORDS_OF_OVERLAP = {True: "yes", False: "no", "two-tick": "two-tick"}
WORDS = ("schedule", "command buffers")
COLUMNS: tables.Columns = {
    "schedule": lambda row: row.schedule,
    "ranks": lambda row: row.ranks,
    "overlap": lambda row: _WORDS_OF_OVERLAP[row.overlap],
    "command buffers": lambda row: row.commands,
    "decided by host": _thunk("decided_by_host"),
    "by device": _thunk("decided_by_device"),
    "transfers outside, inside": _pair("transfers"),
    "buffers": _thunk("buffers"),
    "other launches": _thunk("launched"),
}


@flags.script("graphs")
@flags.several(
    "--commands", "sets", list(SETS), default=list(SETS), text="The set of command buffers."
)
@click.option("--width", type=POSITIVE, default=1024, help="Size of the residual stream.")
@click.option("--tokens", type=POSITIVE, default=4096, help="Tokens of a microbatch.")
@flags.output("runs/graphs", results="the table")
@click.option("--write-table", is_flag=True, help="Put the table into README.md beside the script.")
def main(
    *, sets: tuple[str, ...], width: int, tokens: int, output: Path, write_table: bool
) -> None:
    """Count the decisions that the host takes in a tick, in programs for absent H100s."""
    flags.make_folder(output)
    console = Console(highlight=False)
    asked = [(*step, commands) for step in STEPS for commands in dict.fromkeys(sets)]
    rows = [
        measure(*each, width=width, tokens=tokens)
        for each in track(asked, description="compile", console=console)
    ]
    text = tables.markdown(COLUMNS, rows, words=WORDS)
    (output / "table.md").write_text(text)
    console.print(tables.terminal(COLUMNS, rows, words=WORDS, title="thunks in a tick"))
    console.print(f"written   {output}: table.md", soft_wrap=True)
    if write_table:
        documents.write_into(README, text, name="graphs")


if __name__ == "__main__":
    main()
