"""Holds the ranked schedules that `choose` returns, and prints them as a table."""

from dualpipe_jax._model.types import Remat
from dualpipe_jax._predict import Choice, Costs
from dualpipe_jax._predict.memory import format_bytes
from dualpipe_jax._schedule.execution import Execution


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
        heading = ("", "schedule", "remat", "step", "", "idle", "memory", "execution", "why")
        rows = [
            (
                str(rank) if choice.fits else "tight" if choice.is_tight else "-",
                choice.schedule,
                _show_remat(choice.remat),
                f"{choice.simulation.makespan:.4g}",
                f"{choice.simulation.makespan / best - 1:+.1%}",
                f"{choice.simulation.idle_share:.1%}",
                format_bytes(choice.num_bytes),
                str(choice.execution),
                choice.why,
            )
            for rank, choice in enumerate(self, start=1)
        ]
        widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if index in (0, 1, 2, 7, 8) else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (heading, *rows)
        ]
        return [*lines, *(f"left out: {name}: {why}" for name, why in self.left_out.items())]

    def _first(self) -> list[str]:
        """Writes the memory of the first choice, and the call that makes it."""
        width = max(len(term.name) for term in self[0].terms)
        terms = [
            f"  {term.name:{width}}  {format_bytes(term.num_bytes):>8}  {term.why}".rstrip()
            for term in self[0].terms
        ]
        arguments = (
            f"{name}={'dpj.' * isinstance(value, Execution | Costs)}{value!r}"
            for name, value in self[0].arguments.items()
        )
        number = self[0].simulation.num_microbatches
        call = ", ".join(("model", "mesh=mesh", f"num_microbatches={number}", *arguments))
        return ["memory of the first:", *terms, "", f"dpj.value_and_grad({call})"]


def _show_remat(remat: Remat) -> str:
    return remat if isinstance(remat, str) else getattr(remat, "__name__", "policy")
