"""Compares ways to save the memory of activations, in programs for absent TPUs.

In: flags. Out, printed and in a folder: a table. See README.md beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.progress import track

from experiments import tables
from experiments.compiled import flags
from experiments.compiled.compiles import FROM_HOST, TO_HOST, Figures
from experiments.compiled.steps import Case
from experiments.train_lm.flags import POSITIVE, script, several

# The slots of a rank of eight, and numbers of them to keep on the device: about half.
SLOTS = {"dualpipe": (9, (5, 4)), "dualpipev": (17, (9, 8)), "1f1b": (8, (4,))}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step, its figures, and those of the same step with all slots on the device."""

    case: Case
    figures: Figures
    plain: Figures

    @property
    def name(self) -> str:
        """Names the way in which memory is saved."""
        remat, slots = self.case.remat, self.case.slots_on_device
        done = {"none": "nothing", "block": '`remat="block"`', "policy": "a policy"}[remat]
        if slots is None:
            return done
        kept = f"{slots} of {SLOTS[self.case.schedule][0]} slots on the device"
        return kept if remat == "none" else f"{done}, {kept}"

    @property
    def cycles(self) -> float | None:
        """A trip's cycles without embedding and head, in those of the plain step."""
        if "steady" not in (self.figures.loop, self.plain.loop):
            return None
        return self.figures.cycles_of_layers / self.plain.cycles_of_layers

    @property
    def hidden(self) -> str:
        """Counts the hidden copies of a trip."""
        both = [self.figures.count(kind) for kind in (TO_HOST, FROM_HOST)]
        number = sum(count.total for count in both)
        return f"{sum(count.num_hidden for count in both)} of {number}" if number else "-"


COLUMNS: tables.Columns = {
    "schedule": lambda row: row.case.schedule,
    "": lambda row: row.name,
    "slots by `memory`, MiB": lambda row: tables.number(row.figures.slots, ",.0f", unit=2**20),
    "temporaries, MiB": lambda row: tables.number(row.figures.temporaries, ",.0f", unit=2**20),
    "on the host, MiB": lambda row: tables.number(row.figures.host_temporaries, ",.0f", unit=2**20),
    "copies hidden": lambda row: row.hidden,
    "compute, us": lambda row: tables.number(row.figures.compute_seconds, ",.0f", unit=1e-6),
    "exposed, us": lambda row: tables.number(row.figures.exposed_seconds, ",.0f", unit=1e-6),
    "cycles": lambda row: tables.number(row.cycles, ".3f"),
    "step, ms": lambda row: tables.number(row.figures.predicted_seconds, ",.0f", unit=1e-3),
}


def cases(schedule: str, *, width: int, layers: int) -> Iterator[Case]:
    """Yields the steps of a schedule, the one with nothing done first."""
    plain = Case(
        topology="tpu:v5e:2x4",
        ranks=8,
        family="flash",
        width=width,
        layers=layers,
        schedule=schedule,
        overlap=None if schedule == "1f1b" else True,
    )
    yield plain
    for few in SLOTS[schedule][1]:
        yield replace(plain, slots_on_device=few)
    yield replace(plain, remat="policy")
    yield replace(plain, remat="block")
    yield replace(plain, remat="block", slots_on_device=1)


@script("offload")
@several("--schedule", "schedules", tuple(SLOTS), default=tuple(SLOTS), text="To compile.")
@click.option("--width", type=POSITIVE, default=1024)
@click.option("--layers", type=POSITIVE, default=2, help="A stage.")
@flags.output
@flags.write_readme
def main(
    *, schedules: tuple[str, ...], width: int, layers: int, output: Path, write_readme: bool
) -> None:
    """Compile steps whose activations stay, are made again, or wait in the host's memory."""
    flags.require_whole_heads((width,))
    compiles, rows = flags.open_compiles(output), []
    asked = [case for name in schedules for case in cases(name, width=width, layers=layers)]
    plain: dict[str, Figures] = {}
    for case in track(asked, "compiling", transient=True):
        figures = compiles(case)
        reference = plain.setdefault(case.schedule, figures)
        rows.append(Row(case=case, figures=figures, plain=reference))
    table = tables.markdown(COLUMNS, rows, words=("schedule", ""))
    flags.publish({"offload": table}, output, is_for_readme=write_readme)


if __name__ == "__main__":
    main()
