"""The schedules by name: `dualpipe(num_ranks=8, num_microbatches=20)`, or `make("dualpipe", ...)`.

Every schedule takes any number of ranks and of microbatches, from 1.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.execution import timetable_of
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.generators import interleaved_one_f_one_b as _interleaved
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._schedule.ir import Timeline as Timeline
from dualpipe_jax._schedule.place import shortest_ticks
from dualpipe_jax._schedule.verify import verify_program

__all__ = [
    "Schedule",
    "Timeline",
    "chimera",
    "dualpipe",
    "dualpipev",
    "gpipe",
    "interleaved_one_f_one_b",
    "make",
    "names",
    "one_f_one_b",
    "zb_h1",
]


@dataclass(frozen=True)
class Schedule:
    """Says in which order each rank runs which part of which microbatch.

    >>> schedule = one_f_one_b(num_ranks=2, num_microbatches=2)
    >>> print(schedule.to_csv(), end="")
    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1
    >>> Schedule.from_csv(schedule.to_csv()).timeline().num_ticks
    8
    """

    program: Program

    def __post_init__(self) -> None:
        """Requires a program, which `make` and `from_csv` make."""
        if not isinstance(self.program, Program):
            raise TypeError(
                f"Schedule({self.program!r}): must be made by dualpipe_jax.schedules.make(name, "
                "num_ranks=, num_microbatches=), or by Schedule.from_csv"
            )

    @property
    def name(self) -> str:
        """The name under which `make` knows it, or that given to `from_csv`."""
        return self.program.name

    @cached_property
    def is_named(self) -> bool:
        """Whether its name tells which one it is: `make` makes the same of it."""
        sizes = {"num_ranks": self.num_ranks, "num_microbatches": self.num_microbatches}
        return self.name in names() and make(self.name, **sizes) == self

    @property
    def num_ranks(self) -> int:
        """The number of ranks, which the mesh axis must have."""
        return self.program.num_ranks

    @property
    def num_microbatches(self) -> int:
        """The number of microbatches of a step, over all directions."""
        return self.program.num_microbatches

    @property
    def num_stages(self) -> int:
        """The number of stages into which the model is cut."""
        return self.program.num_stages

    def to_csv(self) -> str:
        """Writes one line a rank in PyTorch's pipelining grammar, in program order."""
        return self.program.to_csv()

    @classmethod
    def from_csv(cls, text: str, name: str = "csv") -> "Schedule":
        """Reads what `to_csv` writes; stages and ranks are inferred.

        Raises:
            TypeError: if the text or the name is no str.
            ValueError: if a cell does not follow the grammar, or if the schedule cannot run:
                naming the action, the rank and the tick that break it, and showing the ticks
                around.
        """
        for argument, value in (("text", text), ("name", name)):
            if not isinstance(value, str):
                raise TypeError(
                    f"{argument}={repr(value)[:80]}: must be a str, got {type(value).__name__} "
                    "(of a file: path.read_text())"
                )
        program = parse_program(text, name=name)
        # These find a user's mistakes. Tables, which have a cell for each rank in each tick, are
        # made when they are asked for.
        verify_program(program)
        shortest_ticks(program)
        return cls(program)

    def timeline(self, *, overlap: bool | Literal["two-tick"] = False) -> Timeline:
        """Gives every action its tick, if forwards, input grads and weight grads take one each.

        >>> schedule = dualpipe(num_ranks=4, num_microbatches=16)
        >>> schedule.timeline().num_ticks
        49
        >>> aligned = schedule.timeline(overlap=True)
        >>> aligned.num_ticks, len(aligned.beats)
        (49, 10)

        Args:
            overlap: As of `Execution`. False, the shortest timetable: every action as soon as it
                can. True, the aligned one: up to the end of a run of beats, in which every rank
                runs a pair, a pair in three adjacent ticks and all pairs at the same tick modulo
                3; where there is no such run, and without pairs, the two are the same.
                `"two-tick"`, for GPUs: every action as soon as it can, but what another rank makes
                is read in the second tick after that or later.

        Raises:
            ValueError: if the schedule cannot run or be aligned, or there is no such timetable.
            TypeError: if overlap is of another type.
        """
        return self.compiled(overlap=overlap).timeline

    def compiled(self, *, overlap: bool | Literal["two-tick"] = False) -> Compiled:
        """Compiles it to the tables that the executor runs, once for each timetable.

        Raises:
            ValueError: if the schedule cannot run or be aligned, or there is no such timetable.
            TypeError: if overlap is of another type.
        """
        return compile_program(self.program, timetable=timetable_of(overlap))


def gpipe(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes GPipe (arXiv:1811.06965): all forwards, then all backwards.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    return make("gpipe", num_ranks=num_ranks, num_microbatches=num_microbatches)


def one_f_one_b(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes 1F1B (arXiv:2104.04473): a forward and a backward in turn.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    return make("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches)


def interleaved_one_f_one_b(
    *, num_ranks: int, num_microbatches: int, num_stages_per_rank: int = 2
) -> Schedule:
    """Makes interleaved 1F1B (arXiv:2104.04473): microbatches go round the ranks several times.

    1F1B's idle time divided by `num_stages_per_rank`, for as many times the transfers and for
    more live activations. `make("interleaved-1f1b", ...)` is the one with 2.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    return Schedule(_interleaved(**sizes, num_stages_per_rank=num_stages_per_rank))


def zb_h1(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes ZB-H1 (arXiv:2401.10241): 1F1B whose weight grads are put off to fill its bubbles.

    As many live activations as 1F1B, the same number on every rank.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    return make("zb-h1", num_ranks=num_ranks, num_microbatches=num_microbatches)


def chimera(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes Chimera (arXiv:2107.06925): two 1F1B pipelines in opposite directions.

    The published order where there is one, that is for an even `num_ranks` and a multiple of it of
    microbatches; elsewhere one made by simulation.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    return make("chimera", num_ranks=num_ranks, num_microbatches=num_microbatches)


def dualpipe(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes DualPipe (arXiv:2412.19437): microbatches enter at both ends.

    The published order where there is one, that is for even sizes and `num_microbatches` at least
    `2 * num_ranks`; elsewhere an order made by the same rules.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    return make("dualpipe", num_ranks=num_ranks, num_microbatches=num_microbatches)


def dualpipev(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes DualPipeV (github.com/deepseek-ai/DualPipe): down the ranks and up again.

    The published order from `2 * num_ranks` microbatches on; fewer are ordered by the same rules.

    Raises:
        ValueError: if a size is not an integer of at least 1.
    """
    return make("dualpipev", num_ranks=num_ranks, num_microbatches=num_microbatches)


def make(name: str, *, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes the schedule of a name, one of `names()`.

    Raises:
        ValueError: if there is none of that name, or a size is not an integer of at least 1.
    """
    if not isinstance(name, str) or name not in GENERATORS:
        known = ", ".join(map(repr, GENERATORS))
        meant = isinstance(name, str) and name.lower().replace("_", "-")
        hint = f"; did you mean {meant!r}?" if meant in GENERATORS else ""
        raise ValueError(
            f"schedule={name!r}: must be one of {known}, or a dualpipe_jax.Schedule{hint}"
        )
    return Schedule(GENERATORS[name](num_ranks=num_ranks, num_microbatches=num_microbatches))


def names() -> tuple[str, ...]:
    """Lists the names that `make` knows."""
    return tuple(GENERATORS)
