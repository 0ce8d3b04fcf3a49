"""Preflight's reports -> rows of figures -> a CSV and tables in Markdown."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cells
from experiments.compiled.steps import Case, cycles_of_layers

# FLOPs a second as published, by the generation in a topology's name.
PEAK = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
_MICROBATCHES_A_TRIP = 2  # two beats, each a forward, an input grad and a weight grad


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one compiled step, of its steady loop first of all.

    Counts are of the collectives of a trip. Hidden are those that are asynchronous and cost no
    time; `least_cover` is the least, over the permutes, of the time that the matmuls between start
    and done take at the published peak, in transfer times. Cycles are the compiler's estimates for
    one layer and one microbatch, forward and backward, without embedding and head; those of the
    unpipelined step are the reference's. None: not asked, or nothing to tell.
    """

    question: str
    topology: str
    ranks: int
    beside: int
    family: str
    width: int
    layers: int
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
    exposed_us: float
    compute_us: float
    cycles: float | None
    reference_cycles: float | None
    instructions: int
    code_bytes: int
    compile_seconds: float

    @classmethod
    def of(cls, question: str, case: Case, report: Any, reference: Any = None) -> "Row":
        """Makes the row of one case."""
        loop = report.loop
        permutes = [each for each in loop.collectives if each.kind == "collective-permute"]
        exchanges = [each for each in loop.collectives if each.kind == "all-to-all"]
        peak = PEAK[case.topology.split(":")[1]]
        cycles, of_reference = None, None
        if loop.kind == "steady":
            cycles = cycles_of_layers(loop) / (_MICROBATCHES_A_TRIP * case.layers)
        if reference is not None:
            of_reference = cycles_of_layers(reference.loop) / case.layers
        return cls(
            question=question,
            **dataclasses.asdict(case),
            permutes=_count(permutes),
            permutes_async=_count(each for each in permutes if each.is_async),
            permutes_hidden=_count(each for each in permutes if each.is_hidden),
            exchanges=_count(exchanges),
            exchanges_async=_count(each for each in exchanges if each.is_async),
            exchanges_hidden=_count(each for each in exchanges if each.is_hidden),
            least_cover=min(
                (each.flops / peak / each.link_seconds for each in permutes), default=None
            ),
            exposed_us=loop.exposed_seconds * 1e6,
            compute_us=loop.compute_seconds * 1e6,
            cycles=cycles,
            reference_cycles=of_reference,
            instructions=report.program.num_instructions,
            code_bytes=report.program.code_bytes,
            compile_seconds=report.compile_seconds,
        )

    @property
    def case(self) -> Case:
        """What was compiled."""
        return Case(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Case)})

    @property
    def ratio(self) -> float | None:
        """Cycles of a layer over those of the unpipelined step."""
        if self.cycles is None or self.reference_cycles is None:
            return None
        return self.cycles / self.reference_cycles


def describe(row: Row) -> str:
    """Gives the row's first figures as a line."""
    ratio = "" if row.ratio is None else f"; {row.ratio:.3f} x the cycles of the unpipelined step"
    hidden, number = row.permutes_hidden + row.exchanges_hidden, row.permutes + row.exchanges
    return (
        f"{row.question:11}{_name(row)}, {row.layers} layers a stage, remat {row.remat}: {hidden} "
        f"of {number} collectives hidden, {row.exposed_us:.1f} us exposed beside "
        f"{row.compute_us:,.0f}{ratio}; compiled in {row.compile_seconds:.0f} s"
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Row))
        for row in rows:
            writer.writerow(cells.write(value, form=".6g") for value in dataclasses.astuple(row))


def read_csv(path: Path) -> list[Row]:
    def value(field: dataclasses.Field, text: str) -> Any:
        if not text and "None" in str(field.type):
            return None
        kind = str(field.type)
        if "bool" in kind:
            return cells.is_yes(text)
        return int(text) if "int" in kind else float(text) if "float" in kind else text

    with path.open() as file:
        return [
            Row(**{f.name: value(f, line[f.name]) for f in dataclasses.fields(Row)})
            for line in csv.DictReader(file)
        ]


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Writes the tables, one after the other: transfers, efficiency, program size."""
    transfers = [row for row in rows if row.question in ("permutes", "experts")]
    efficiency = [row for row in rows if row.ratio is not None]
    efficiency.sort(key=lambda row: (row.family, row.remat, row.width, row.layers))
    size = [row for row in rows if row.question == "size"]
    tables = [
        _table(
            "step | layers a stage | permutes async | hidden | least matmuls / transfer | "
            "all-to-alls async | hidden | compute, us | exposed, us",
            [
                (
                    _name(row),
                    row.layers,
                    f"{row.permutes_async} of {row.permutes}",
                    f"{row.permutes_hidden} of {row.permutes}",
                    "-" if row.least_cover is None else f"{row.least_cover:.1f}",
                    f"{row.exchanges_async} of {row.exchanges}" if row.exchanges else "-",
                    f"{row.exchanges_hidden} of {row.exchanges}" if row.exchanges else "-",
                    f"{row.compute_us:,.0f}",
                    f"{row.exposed_us:,.1f}",
                )
                for row in transfers
            ],
        ),
        _table(
            "block | remat | width | layers | pipelined, cycles | unpipelined, cycles | ratio",
            [
                (
                    row.family,
                    row.remat,
                    row.width,
                    row.layers,
                    f"{row.cycles:,.0f}",
                    f"{row.reference_cycles:,.0f}",
                    f"{row.ratio:.3f}",
                )
                for row in efficiency
            ],
        ),
        _table(
            "step | instructions | code, MiB | compiled in, s",
            [
                (
                    _name(row),
                    f"{row.instructions:,}",
                    f"{row.code_bytes / 2**20:.1f}",
                    f"{row.compile_seconds:.0f}",
                )
                for row in size
            ],
        ),
    ]
    path.write_text("\n".join(tables))


def _table(head: str, rows: Sequence[tuple[Any, ...]]) -> str:
    columns = head.count("|") + 1
    lines = [f"| {head} |", "| --- " + "| ---: " * (columns - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def _name(row: Row) -> str:
    beside = f" x {'expert' if row.family == 'experts' else 'data'} {row.beside}"
    mesh = f"pipe {row.ranks}{beside if row.beside > 1 else ''}"
    topology = row.topology.removeprefix("tpu:")
    return f"{row.schedule}, {row.family} of width {row.width}, {mesh}, {topology}"


def _count(collectives: Any) -> int:
    return sum(each.count for each in collectives)
