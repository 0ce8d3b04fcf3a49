"""A case -> its step, compiled ahead of time for absent hardware -> the figures of the program.

Compilers for absent hardware are no backends, so importing this has JAX start the CPU's alone.
Figures are kept in a file: the questions share their compiles, and an interrupted run goes on where
it stopped.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dualpipe_jax as dpj
from experiments.compiled.steps import Step
from experiments.train_lm.flags import Refusal

PERMUTE, EXCHANGE = "collective-permute", "all-to-all"
TO_HOST, FROM_HOST = "to host", "from host"
ACROSS = "across slices"
# FLOPs a second as published, by the generation in a topology's name.
PEAK = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
_ENDS = {"embed", "embed_grad", "head"}


class Case(Protocol):
    """A frozen dataclass that describes one step."""

    @property
    def topology(self) -> str: ...

    def make(self) -> Step: ...


@dataclass(frozen=True, kw_only=True)
class Count:
    """Counts collectives of a kind in a trip of the loop.

    Attributes:
      total: All of them.
      num_async: Those with compute between their start and their done.
      num_hidden: Those that cost no time, by the compiler's cycles and the links' bandwidth.
      num_covered: The asynchronous ones with a matmul between start and done.
    """

    total: int = 0
    num_async: int = 0
    num_hidden: int = 0
    num_covered: int = 0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a compiled step; None where the compiler or the library gives none.

    Attributes:
      loop: The kind of the loop that the next ones describe: `"steady"`, two beats a trip, or
        another of `preflight`'s.
      counts: Its collectives, and its copies to and from the host, by kind, and those across
        slices.
      cycles: The compiler's cycles of a trip, by action.
      least_cover: The least, over the permutes, of the time that the matmuls between start and done
        take at the published peak, in transfer times.
      exposed_seconds: For how long compute stands still in a trip.
      compute_seconds: How long its compute takes.
      arguments, temporaries, host_temporaries, peak, needed: As in preflight's `Memory`, bytes of a
        device.
      fits: Whether the compiler took the step.
      instructions: The number in the program.
      code_bytes: The size of the program.
      compile_seconds: How long the compiler took.
      predicted_seconds: A step, as preflight predicts.
      outside_seconds: The part of it outside of the loop.
      outside_exposed_seconds: The part of that for which compute waits for collectives.
      terms: The sum of the library's own account of the step's memory, in bytes.
      slots: The part of it that residuals take on the device.
      account: That account as text.
      text: Preflight's whole report.
    """

    loop: str | None
    counts: Mapping[str, Count]
    cycles: Mapping[str, float]
    least_cover: float | None
    exposed_seconds: float | None
    compute_seconds: float | None
    arguments: int | None
    temporaries: int | None
    host_temporaries: int | None
    peak: int | None
    needed: int | None
    fits: bool
    instructions: int
    code_bytes: int | None
    compile_seconds: float
    predicted_seconds: float | None
    outside_seconds: float | None
    outside_exposed_seconds: float | None
    terms: int | None
    slots: int | None
    account: str
    text: str = field(repr=False)

    def count(self, kind: str) -> Count:
        """Gives the collectives of a kind."""
        return self.counts.get(kind, Count())

    @property
    def cycles_of_layers(self) -> float:
        """The cycles of a trip without those of embedding and head."""
        return sum(cycles for name, cycles in self.cycles.items() if name not in _ENDS)

    @classmethod
    def of(cls, report: Any, account: Any = None) -> "Figures":
        """Reads preflight's report, beside the library's account of the step's memory."""
        loop, memory = report.loop, report.memory
        collectives = () if loop is None else (*loop.collectives, *loop.host_copies)
        return cls(
            loop=None if loop is None else loop.kind,
            counts=count(collectives),
            cycles={} if loop is None else {each.name: each.cycles for each in loop.actions},
            least_cover=_least_cover(collectives, report.topology),
            exposed_seconds=None if loop is None else loop.exposed_seconds,
            compute_seconds=None if loop is None else loop.compute_seconds,
            arguments=memory.arguments,
            temporaries=memory.temporaries,
            host_temporaries=memory.host_temporaries,
            peak=memory.peak,
            needed=memory.needed,
            fits=not report.failure,
            instructions=0 if report.program is None else report.program.num_instructions,
            code_bytes=None if report.program is None else report.program.code_bytes,
            compile_seconds=report.compile_seconds,
            predicted_seconds=report.prediction.seconds,
            outside_seconds=report.prediction.outside_seconds,
            outside_exposed_seconds=report.prediction.outside_exposed_seconds,
            terms=None if account is None else account.num_bytes,
            slots=None if account is None else _slots(account),
            account="" if account is None else str(account),
            text=str(report),
        )


def _slots(account: Any) -> int:
    """Adds up the residuals' slots on the device, by the library's account."""
    slots = (term for term in account.terms if term.name.startswith("residuals"))
    return sum(term.num_bytes for term in slots if term.where == "device")


def count(collectives: Any) -> dict[str, Count]:
    """Counts the collectives of a loop, by kind, and those across slices of any kind."""

    def of(mine: Any) -> Count:
        return Count(
            total=sum(each.count for each in mine),
            num_async=sum(each.count for each in mine if each.is_async),
            num_hidden=sum(each.count for each in mine if each.is_hidden),
            num_covered=sum(each.count for each in mine if each.is_async and each.flops > 0),
        )

    kinds = dict.fromkeys(each.kind for each in collectives)
    across = [each for each in collectives if each.across_slices]
    return {
        **{kind: of([each for each in collectives if each.kind == kind]) for kind in kinds},
        **({ACROSS: of(across)} if across else {}),
    }


def _least_cover(collectives: Any, topology: str) -> float | None:
    peak = PEAK.get(topology.split(":")[1])
    # A rank that sends to itself alone uses no link.
    permutes = [each for each in collectives if each.kind == PERMUTE and each.link_seconds]
    if peak is None or not permutes:
        return None
    return min(each.flops / peak / each.link_seconds for each in permutes)


class Compiles:
    """Asks the compilers, each case once: a case in the file is not compiled again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known: dict[str, Any] = dict(map(json.loads, lines))

    def __call__(self, case: Case) -> Figures:
        """Gives the figures of a case.

        Raises:
          Refusal: If the compiler is not installed; it says how to get it.
        """
        key = _key(case)
        if key not in self._known:
            figures = dataclasses.asdict(compile_case(case))
            self._known[key] = figures
            with self._path.open("a") as file:
                file.write(f"{json.dumps([key, figures])}\n")
        known = self._known[key]
        counts: Any = {kind: Count(**each) for kind, each in known["counts"].items()}
        return Figures(**{**known, "counts": counts})


def compile_case(case: Case) -> Figures:
    """Compiles a case, whatever is known of it."""
    step = case.make()
    try:
        report = dpj.preflight(
            step.fn, step.args, case.topology, mesh=step.mesh, compiler_options=step.options
        )
    except ModuleNotFoundError as error:
        raise Refusal(str(error)) from error
    return Figures.of(report, step.memory)


def _key(case: Any) -> str:
    """Names a case, the sources of library and experiments, and the compilers."""
    sources = hashlib.sha256()
    for folder in (Path(dpj.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            sources.update(path.read_bytes())
    fields = {"case": type(case).__name__, **dataclasses.asdict(case), **_compilers()}
    return json.dumps({**fields, "sources": sources.hexdigest()[:16]}, default=str)


@functools.cache
def _compilers() -> dict[str, str | None]:
    installed = {each.name: each.version for each in metadata.distributions()}
    return {name: installed.get(name) for name in ("jax", "jaxlib", "libtpu")}
