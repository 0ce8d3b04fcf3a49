"""Holds the ranked schedules that `choose` returns, and prints them as a table."""

from dualpipe_jax._costs import format_bytes
from dualpipe_jax._model.types import Remat
from dualpipe_jax._predict import Choice, Costs
from dualpipe_jax._schedule.execution import Execution

_SEVERAL = "microbatches"  # a column where choices differ in it
_HOST = "host"  # a column where its memory is given
_HEAD = (
    *("", "schedule", "remat", _SEVERAL, "step", "against best", "idle", "memory", _HOST),
    *("execution", "why"),
)
_LEFT = ("", "schedule", "remat", "execution", "why")


class Choices(tuple[Choice, ...]):
    """Holds choices in order: those that fit, the fastest first; then tight ones; then all others.

    `print` shows them, with the memory of the first one and the call that makes it.

    Attributes:
      left_out: The schedules that cannot run, by name, and the reasons.
    """

    left_out: dict[str, str]

    def __str__(self) -> str:
        """Shows a row for each choice."""
        return "\n".join((*self._table(), "", *self._first()))

    def _table(self) -> list[str]:
        """Writes the heading, a row for each choice, and the schedules that cannot run."""
        best = self[0].simulation.makespan
        rows = [
            (
                str(rank) if choice.fits else "tight" if choice.is_tight else "-",
                choice.schedule,
                _show_remat(choice.remat),
                str(choice.simulation.num_microbatches),
                f"{choice.simulation.makespan:.4g}",
                f"{choice.simulation.makespan / best - 1:+.1%}",
                f"{choice.simulation.idle_share:.1%}",
                format_bytes(choice.num_bytes),
                format_bytes(choice.host_bytes),
                str(choice.execution),
                choice.why,
            )
            for rank, choice in enumerate(self, start=1)
        ]
        columns = []
        for title, *cells in zip(_HEAD, *rows, strict=True):
            if title == _SEVERAL and not self[0].is_one_of_several:
                continue
            if title == _HOST and not self[0].host_memory:
                continue
            side, width = "<" if title in _LEFT else ">", max(map(len, (title, *cells)))
            columns.append([f"{cell:{side}{width}}" for cell in (title, *cells)])
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        return [*lines, *(f"left out: {name}: {why}" for name, why in self.left_out.items())]

    def _first(self) -> list[str]:
        """Writes the memory of the first choice, and the call that makes it."""
        width = max(len(term.name) for term in self[0].terms)
        terms = [
            f"  {term.name:{width}}  {format_bytes(term.num_bytes):>8}  {term.why}".rstrip()
            for term in self[0].terms
        ]
        number = self[0].simulation.num_microbatches
        arguments = (
            f"{name}={'dpj.' * isinstance(value, Execution | Costs)}{value!r}"
            for name, value in {"num_microbatches": number, **self[0].arguments}.items()
        )
        call = ", ".join(("model", "mesh=mesh", *arguments))
        return ["memory of the first:", *terms, "", f"dpj.value_and_grad({call})"]


def _show_remat(remat: Remat) -> str:
    return remat if isinstance(remat, str) else getattr(remat, "__name__", "policy")
