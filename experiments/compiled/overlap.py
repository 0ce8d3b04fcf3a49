"""Asks whether compute hides the communication of steps for absent TPUs and GPUs.

In: flags. Out, in a folder: overlap.csv, a table for each subject. See README.md beside it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from experiments import tables
from experiments.compiled import flags, models
from experiments.compiled.compiles import EXCHANGE, PERMUTE, Figures
from experiments.compiled.steps import Case
from experiments.train_lm.flags import script, several

QUESTIONS = {
    "permutes": "Are the steady loop's permutes hidden?",
    "experts": "Are a mixture of experts' all-to-alls?",
    "efficiency": "What does the steady loop cost beside an unpipelined step?",
    "unlike": "What does a last stage with fewer layers cost the steady loop?",
    "size": "Does the program grow with the pipeline?",
    "gpu": "Does each collective have a matmul beside it on eight H100s?",
}
# The compiler for GPUs is 5 GB, and unlike stages take minutes each: they are asked by name only.
DEFAULT_QUESTIONS = tuple(name for name in QUESTIONS if name not in ("gpu", "unlike"))
_MICROBATCHES_A_TRIP = 2  # two beats, each a forward, an input grad and a weight grad


def cases(question: str, *, widths: tuple[int, ...], layers: tuple[int, ...]) -> list[Case]:
    """Lists the steps that are compiled for a question."""
    few, many = layers[0], layers[-1]
    over_4 = Case(topology="tpu:v5e:2x2", ranks=4, width=widths[0], layers=few)
    over_8 = replace(over_4, topology="tpu:v5e:2x4", ranks=8)
    match question:
        case "permutes":
            counts = dict.fromkeys((few, many))
            ours = [
                replace(case, width=width, layers=count)
                for case, width, count in itertools.product((over_4, over_8), widths, counts)
            ]
            return [*ours, replace(over_4, schedule="1f1b", overlap=None)]
        case "experts":
            ours = replace(over_8, ranks=4, beside=2, family="experts")
            paired = replace(ours, schedule="interleaved-paired")
            return [ours, paired, replace(ours, schedule="1f1b", overlap=None)]
        case "efficiency":
            kinds = ("transformer", "block"), ("transformer", "none"), ("mlp", "block")
            return [
                replace(over_4, family=family, remat=remat, width=width)
                for family, remat in kinds
                for width in widths
            ]
        case "unlike":
            ours = replace(over_4, layers=many), replace(over_4, schedule="dualpipev")
            return [replace(case, shorter=1, width=width) for width in widths for case in ours]
        case "size":
            few_chips = replace(over_4, topology="tpu:v5p:2x2x1")
            return [few_chips, replace(few_chips, topology="tpu:v5p:4x4x4", ranks=16, beside=4)]
        case _:
            sizes = itertools.product(widths, dict.fromkeys(layers))
            dense = Case(topology="gpu:h100:8", ranks=8, family="dense", tokens=1024)
            experts = replace(dense, ranks=4, beside=2, family="mixture")
            return [replace(c, width=w, layers=n) for w, n in sizes for c in (dense, experts)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one compiled step, of its steady loop first of all.

    Counts are of the collectives of a trip. Hidden are those that are asynchronous and cost no
    time; covered those with a matmul between start and done. Cycles are the compiler's estimates
    for one layer of the largest stage and one microbatch, forward and backward, without embedding
    and head; the reference's are those of the unpipelined step, or of stages that are alike. None:
    not asked, or not known.
    """

    question: str
    topology: str
    ranks: int
    beside: int
    family: str
    width: int
    layers: int
    shorter: int
    tokens: int
    schedule: str
    overlap: bool | None
    remat: str
    permutes: int
    permutes_async: int
    permutes_hidden: int
    exchanges: int
    exchanges_async: int
    exchanges_hidden: int
    least_cover: float | None
    exposed_us: float | None
    compute_us: float | None
    cycles: float | None
    reference_cycles: float | None
    instructions: int
    code_bytes: int | None
    compile_seconds: float

    @classmethod
    def of(
        cls, question: str, case: Case, figures: Figures, reference: Figures | None = None
    ) -> "Row":
        """Makes the row of one case."""
        permutes, exchanges = figures.count(PERMUTE), figures.count(EXCHANGE)
        is_steady, is_gpu = figures.loop == "steady", question == "gpu"
        is_pipelined = reference is not None and reference.loop == "steady"
        in_reference = _MICROBATCHES_A_TRIP if is_pipelined else 1
        per_layer = figures.cycles_of_layers / (_MICROBATCHES_A_TRIP * case.layers)
        names = {field.name for field in fields(cls)}
        of_case: Any = {name: value for name, value in asdict(case).items() if name in names}
        return cls(
            question=question,
            **of_case,
            permutes=permutes.total,
            permutes_async=permutes.num_async,
            permutes_hidden=permutes.num_covered if is_gpu else permutes.num_hidden,
            exchanges=exchanges.total,
            exchanges_async=exchanges.num_async,
            exchanges_hidden=exchanges.num_covered if is_gpu else exchanges.num_hidden,
            least_cover=figures.least_cover,
            exposed_us=_microseconds(figures.exposed_seconds),
            compute_us=_microseconds(figures.compute_seconds),
            cycles=per_layer if is_steady and not is_gpu else None,
            reference_cycles=None
            if reference is None
            else reference.cycles_of_layers / (in_reference * case.layers),
            instructions=figures.instructions,
            code_bytes=figures.code_bytes,
            compile_seconds=figures.compile_seconds,
        )

    @property
    def case(self) -> Case:
        """The step that was compiled."""
        mine = vars(self)
        return Case(**{f.name: mine[f.name] for f in fields(Case) if f.name in mine})

    @property
    def ratio(self) -> float | None:
        """Cycles of a layer over those of the reference."""
        if self.cycles is None or self.reference_cycles is None:
            return None
        return self.cycles / self.reference_cycles

    @property
    def name(self) -> str:
        """Names the step."""
        beside = f" x {'expert' if models.FAMILIES[self.family].spread else 'data'} {self.beside}"
        mesh = f"pipe {self.ranks}{beside if self.beside > 1 else ''}"
        topology = self.topology.removeprefix("tpu:")
        return f"{self.schedule}, {self.family} of width {self.width}, {mesh}, {topology}"


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def describe(row: Row) -> str:
    """Gives the row's first figures as a line."""
    hidden, number = row.permutes_hidden + row.exchanges_hidden, row.permutes + row.exchanges
    of = "stages that are alike" if row.shorter else "the unpipelined step"
    ratio = "" if row.ratio is None else f"; {row.ratio:.3f} x the cycles of {of}"
    return (
        f"{row.question:11}{row.name}, {row.layers} layers a stage, remat {row.remat}: {hidden} of "
        f"{number} collectives hidden{ratio}; compiled in {row.compile_seconds:.0f} s"
    )


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" if whole else "-"


SUBJECTS: dict[str, tables.Columns] = {
    "transfers": {
        "step": lambda row: row.name,
        "layers a stage": lambda row: row.layers,
        "permutes async": lambda row: _of(row.permutes_async, row.permutes),
        "permutes hidden": lambda row: _of(row.permutes_hidden, row.permutes),
        "least matmuls / transfer": lambda row: tables.number(row.least_cover, ".1f"),
        "all-to-alls async": lambda row: _of(row.exchanges_async, row.exchanges),
        "all-to-alls hidden": lambda row: _of(row.exchanges_hidden, row.exchanges),
        "compute, us": lambda row: tables.number(row.compute_us, ",.0f"),
        "exposed, us": lambda row: tables.number(row.exposed_us, ",.1f"),
    },
    "efficiency": {
        "block": lambda row: row.family,
        "remat": lambda row: row.remat,
        "width": lambda row: row.width,
        "layers": lambda row: row.layers,
        "pipelined, cycles": lambda row: f"{row.cycles:,.0f}",
        "unpipelined, cycles": lambda row: f"{row.reference_cycles:,.0f}",
        "ratio": lambda row: f"{row.ratio:.3f}",
    },
    "unlike": {
        "step": lambda row: row.name,
        "layers a stage": lambda row: row.layers,
        "of the last": lambda row: row.layers - row.shorter,
        "permutes hidden": lambda row: _of(row.permutes_hidden, row.permutes),
        "cycles": lambda row: f"{row.cycles:,.0f}",
        "alike, cycles": lambda row: f"{row.reference_cycles:,.0f}",
        "ratio": lambda row: f"{row.ratio:.3f}",
    },
    "size": {
        "step": lambda row: row.name,
        "instructions": lambda row: f"{row.instructions:,}",
        "code, MiB": lambda row: tables.number(row.code_bytes, ".1f", unit=2**20),
        "compiled in, s": lambda row: f"{row.compile_seconds:.0f}",
    },
    "gpu": {
        "block": lambda row: row.family,
        "layers a stage": lambda row: row.layers,
        "width": lambda row: row.width,
        "permutes": lambda row: _of(row.permutes_hidden, row.permutes),
        "all-to-alls": lambda row: _of(row.exchanges_hidden, row.exchanges),
    },
}


def make_tables(rows: Sequence[Row]) -> dict[str, str]:
    """Writes a table for each subject that the rows have."""
    efficiency = [row for row in rows if row.ratio is not None and not row.shorter]
    efficiency.sort(key=lambda row: (row.family, row.remat, row.width, row.layers))
    of_subject = {
        "transfers": [row for row in rows if row.question in ("permutes", "experts")],
        "efficiency": efficiency,
        "unlike": [row for row in rows if row.question == "unlike"],
        "size": [row for row in rows if row.question == "size"],
        "gpu": [row for row in rows if row.question == "gpu"],
    }
    return {
        name: tables.markdown(SUBJECTS[name], mine, words=("step", "block", "remat"))
        for name, mine in of_subject.items()
        if mine
    }


@script("overlap")
@several("--question", "questions", tuple(QUESTIONS), default=DEFAULT_QUESTIONS, text="To ask.")
@flags.widths
@flags.layers(default=(2, 4), fewest=1)
@click.option("--options/--no-options", default=True, help="dpj.compiler_options, or none.")
@click.option("--verbose", is_flag=True, help="Print preflight's whole reports too.")
@flags.output
@flags.write_readme
def main(
    *,
    questions: tuple[str, ...],
    widths: tuple[int, ...],
    layers: tuple[int, ...],
    options: bool,
    verbose: bool,
    output: Path,
    write_readme: bool,
) -> None:
    """Compile training steps for TPUs or GPUs, and read whether compute hides communication."""
    flags.require_whole_heads(widths)
    compiles, console = flags.open_compiles(output), Console(highlight=False, soft_wrap=True)
    rows: list[Row] = []
    for question in questions:
        for case in cases(question, widths=widths, layers=layers):
            case = replace(case, has_options=options)
            figures, reference = compiles(case), None
            if question in ("permutes", "efficiency") and case.ranks == 4 and case.overlap:
                # The same layers without a pipeline.
                reference = compiles(replace(case, has_pipeline=False))
            elif case.shorter:
                reference = compiles(replace(case, shorter=0))
            rows.append(Row.of(question, case, figures, reference))
            tables.write_csv(rows, output / "overlap.csv", form=".6g")
            if verbose:
                console.print(figures.text, markup=False)
            console.print(describe(rows[-1]))
    flags.publish(make_tables(rows), output, is_for_readme=write_readme)


if __name__ == "__main__":
    main()
