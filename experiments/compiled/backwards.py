"""Compares full backwards with split ones, in programs for absent TPUs.

In: flags. Out, printed and in a folder: three tables. See README.md beside it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.progress import track

import dualpipe_jax as dpj
from experiments import tables
from experiments.compiled import flags
from experiments.compiled.compiles import Figures
from experiments.compiled.steps import Case
from experiments.train_lm.flags import POSITIVE, script

BLOCKS, REMATS = ("mlp", "transformer"), ("none", "block")
# Schedules in ticks, and how many ranks the times are of, with four microbatches each.
SCHEDULES, RANKS = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "chimera"), (4, 8, 16)
_TRANSFER = 0.1  # of a forward
_WORDS = ("block", "remat")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step with split backwards, and with full ones."""

    case: Case
    apart: Figures
    full: Figures

    @classmethod
    def of(cls, case: Case, compiles: Any) -> "Row":
        """Compiles a case twice."""
        apart, full = (compiles(replace(case, split_backward=split)) for split in (True, False))
        return cls(case=case, apart=apart, full=full)

    def cycles(self, action: str) -> float:
        """The cycles of a tick's action of a whole stage, as the compiler estimates them."""
        if action != "full_backward":
            return self.apart.cycles[action]
        halves = self.full.cycles["input_grad"] + self.full.cycles["weight_grad"]
        # Cycles without an action's name, such as a copy of a stash, are not part of F.
        return halves + self.full.cycles["other"] - self.apart.cycles["other"]

    @property
    def share(self) -> float:
        """Cycles of a full backward over those of a split one."""
        apart = self.cycles("input_grad") + self.cycles("weight_grad")
        return self.cycles("full_backward") / apart

    def change_of_time(self, schedule: str, *, ranks: int) -> float:
        """Simulates how much longer a schedule takes with full backwards, at these costs."""
        made = dpj.schedules.make(schedule, num_ranks=ranks, num_microbatches=4 * ranks)
        forward, input_grad = self.cycles("forward"), self.cycles("input_grad")
        costs = dpj.Costs(
            forward=forward,
            input_grad=input_grad,
            weight_grad=self.cycles("weight_grad"),
            full_backward=self.cycles("full_backward"),
            # A deferred W repeats all of I, its forward included.
            recompute=input_grad if self.case.remat == "block" else 0.0,
        )
        apart, full = (
            dpj.simulate(
                made,
                costs=costs,
                transfer=_TRANSFER * forward,
                execution=dpj.Execution(split_backward=is_split),
            ).makespan
            for is_split in (True, False)
        )
        return full / apart - 1


def cases(
    schedule: str, *, widths: Sequence[int], layers: Sequence[int], tokens: int
) -> list[Case]:
    """Lists the steps: all layers at the first width, the fewest at the others."""
    sizes = [(widths[0], count) for count in layers] + [(width, layers[0]) for width in widths[1:]]
    over_4 = Case(topology="tpu:v5e:2x2", ranks=4, tokens=tokens, schedule=schedule)
    return [
        replace(over_4, family=family, remat=remat, width=width, layers=count)
        for family, remat, (width, count) in itertools.product(BLOCKS, REMATS, sizes)
    ]


def _millions(action: str) -> Any:
    return lambda row: f"{row.cycles(action) / 1e6:.2f}"


def _changes(schedule: str) -> Any:
    return lambda row: ", ".join(
        f"{100 * row.change_of_time(schedule, ranks=ranks):+.0f}" for ranks in RANKS
    )


_STEP: tables.Columns = {
    "block": lambda row: row.case.family,
    "remat": lambda row: row.case.remat,
    "width": lambda row: row.case.width,
    "layers": lambda row: row.case.layers,
}
_MEMORY: tables.Columns = {
    "MiB": lambda row: tables.number(row.apart.temporaries, ",.0f", unit=2**20),
    "MiB, full": lambda row: tables.number(row.full.temporaries, ",.0f", unit=2**20),
}
TICKS: tables.Columns = {
    **_STEP,
    "F": _millions("forward"),
    "I": _millions("input_grad"),
    "W": _millions("weight_grad"),
    "full": _millions("full_backward"),
    "full / I + W": lambda row: f"{row.share:.2f}",
    **_MEMORY,
}
TIMES: tables.Columns = {**_STEP, **{f"`{name}`": _changes(name) for name in SCHEDULES}}
BEATS: tables.Columns = {
    **_STEP,
    # Two beats a trip.
    "a layer's cycles": lambda r: f"{r.apart.cycles_of_layers / (2 * r.case.layers):,.0f}",
    "full": lambda r: f"{r.full.cycles_of_layers / (2 * r.case.layers):,.0f}",
    **_MEMORY,
    "step, %": lambda r: f"{100 * (r.full.predicted_seconds / r.apart.predicted_seconds - 1):+.1f}",
}


def make_tables(ticks: Sequence[Row], beats: Sequence[Row]) -> dict[str, str]:
    """Writes the costs of ticks, the times of steps of such ticks, and DualPipe's step."""
    subjects = {"ticks": (TICKS, ticks), "times": (TIMES, ticks), "beats": (BEATS, beats)}
    return {name: tables.markdown(*table, words=_WORDS) for name, table in subjects.items()}


@script("backwards")
@flags.widths
@flags.layers(default=(2, 8), fewest=2)
@click.option("--tokens", type=POSITIVE, default=4096, help="A microbatch.")
@flags.output
@flags.write_readme
def main(
    *,
    widths: tuple[int, ...],
    layers: tuple[int, ...],
    tokens: int,
    output: Path,
    write_readme: bool,
) -> None:
    """Compare full backwards with split ones, in programs for TPUs."""
    flags.require_whole_heads(widths)
    compiles = flags.open_compiles(output)
    ticks = cases("1f1b", widths=widths, layers=layers, tokens=tokens)
    beats = cases("dualpipe", widths=widths, layers=layers[:1], tokens=tokens)
    made = make_tables(
        [Row.of(case, compiles) for case in track(ticks, "1f1b")],
        [Row.of(case, compiles) for case in track(beats, "dualpipe")],
    )
    flags.publish(made, output, is_for_readme=write_readme)


if __name__ == "__main__":
    main()
