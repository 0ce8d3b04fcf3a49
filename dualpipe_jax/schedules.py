"""The schedules by name: `dualpipe(num_ranks=8, num_microbatches=20)`, or `make("dualpipe", ...)`.

Every schedule takes any number of ranks and of microbatches, from 1. Some have options beside: a
schedule that was made with others than the defaults has them in its name, which `make` reads.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, Literal, Protocol

from dualpipe_jax._costs import Costs
from dualpipe_jax._errors import brief
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.execution import timetable_of
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._schedule.ir import Timeline as Timeline
from dualpipe_jax._schedule.named import generate, read_name, require_options
from dualpipe_jax._schedule.place import shortest_ticks
from dualpipe_jax._schedule.verify import verify_program

_LONGEST_NAME = 200


@dataclass(frozen=True)
class Schedule:
    """Says in which order each rank runs which part of which microbatch.

    >>> schedule = make("1f1b", num_ranks=2, num_microbatches=2)
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
                f"Schedule({brief(self.program)}): must be made by "
                "dualpipe_jax.schedules.make(name, num_ranks=, num_microbatches=), or by "
                "Schedule.from_csv"
            )

    @property
    def name(self) -> str:
        """The name from which `make` makes it, options included, or that given to `from_csv`."""
        return self.program.name

    @cached_property
    def is_named(self) -> bool:
        """Whether its name tells which one it is: `make` makes the same of it."""
        if read_name(self.name) is None:
            return False
        sizes = {"num_ranks": self.num_ranks, "num_microbatches": self.num_microbatches}
        with suppress(ValueError):  # of options that it does not have
            return make(self.name, **sizes) == self
        return False

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
        """Reads the text of `to_csv`; stages and ranks are inferred.

        Raises:
            TypeError: if the text or the name is no str.
            ValueError: if the name has more than 200 characters, if a cell does not follow the
                grammar, or if the schedule cannot run:
                naming the action, the rank and the tick that break it, and showing the ticks
                around.
        """
        for argument, value in (("text", text), ("name", name)):
            if not isinstance(value, str):
                raise TypeError(
                    f"{argument}={brief(value)}: must be a str, got {type(value).__name__} "
                    "(of a file: path.read_text())"
                )
        if len(name) > _LONGEST_NAME:
            raise ValueError(
                f"name={brief(name)}: must have at most {_LONGEST_NAME} characters, as every "
                "message names the schedule; shorten it"
            )
        program = parse_program(text, name=name)
        # These find a user's mistakes. Tables, which have a cell for each rank in each tick, are
        # made when they are asked for.
        verify_program(program)
        shortest_ticks(program)
        return cls(program)

    def timeline(self, *, overlap: bool | Literal["two-tick"] = False) -> Timeline:
        """Gives every action its tick, if forwards, input grads and weight grads take one each.

        >>> schedule = make("dualpipe", num_ranks=4, num_microbatches=16)
        >>> schedule.timeline().num_ticks
        49
        >>> aligned = schedule.timeline(overlap=True)
        >>> aligned.num_ticks, len(aligned.beats)
        (49, 10)

        Args:
            overlap: As in `Execution`. False, the shortest timetable: every action as soon as it
                can. True, the aligned one: up to the end of the steady phase, in which every rank
                runs pairs, a pair takes three adjacent ticks and all pairs start at the same tick
                modulo 3; a schedule without pairs, or without such a phase, has the shortest one.
                `"two-tick"`, for GPUs: every action as soon as it can, but another rank's value is
                read in the second tick after it was made, or later.

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


def make(name: str, *, num_ranks: int, num_microbatches: int, **options: Any) -> Schedule:
    """Makes the schedule of a name, one of `names()`.

    >>> make("interleaved-1f1b", num_ranks=2, num_microbatches=4, num_stages_per_rank=3).name
    'interleaved-1f1b(num_stages_per_rank=3)'
    >>> make(_, num_ranks=4, num_microbatches=8).num_stages
    12

    Args:
        name: The name. It may have options in brackets, as names and messages write them.
        num_ranks: The number of ranks.
        num_microbatches: The number of microbatches of a step.
        **options: As the schedule's function takes them, such as `num_stages_per_rank` of
            `interleaved_one_f_one_b`.

    Raises:
        ValueError: if there is none of that name, if it does not have such an option, or if a size
            is not an integer of at least 1.
    """
    found = read_name(name)
    if found is None:
        known = ", ".join(map(repr, GENERATORS))
        meant = isinstance(name, str) and name.lower().replace("_", "-")
        hint = f"; did you mean {meant!r}?" if meant in GENERATORS else ""
        raise ValueError(
            f"schedule={brief(name)}: must be one of {known}, or a dualpipe_jax.Schedule{hint}"
        )
    base, given = found
    for option, value in given.items():
        if options.get(option, value) != value:
            raise ValueError(
                f"{option}={brief(options[option])}: must be that of schedule={name!r}, or left out"
            )
    options = {**given, **options}
    require_options(base, options)
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    return Schedule(generate(base, **sizes, **options))


def names() -> tuple[str, ...]:
    """Lists the names that `make` knows."""
    return tuple(GENERATORS)


def search(
    *,
    num_ranks: int,
    num_microbatches: int,
    costs: Costs | None = None,
    transfer: float = 0.0,
    placement: Literal["linear", "v", "interleaved", "bidirectional"] = "linear",
    num_stages_per_rank: int | None = None,
    layers_per_stage: Sequence[int] | None = None,
    layout: Sequence[str] | None = None,
    max_activations: float | None = None,
    memory: float | str | None = None,
    keep_beats: bool = True,
    waits: Literal["program", "values"] = "program",
    moves: int = 100_000,
    seed: int = 0,
) -> Schedule:
    """Searches for an order of actions that is fast at these costs, within a limit of memory.

    It begins with the named schedules of the placement that fit, and with list schedules by random
    scores; it anneals the best three: an action moves along its rank's row, mostly one of the
    critical path. Each order is timed as if ranks waited for nothing but the values that they read
    (`Simulation.dependency_makespan`). A search ends when no order can be faster. The same
    arguments give the same schedule. (docs/schedule_search.md)

    >>> made = search(num_ranks=2, num_microbatches=4, placement="v", max_activations=1.5, moves=99)
    >>> made.name, made.num_stages
    ('search-v', 4)

    With Numba (`pip install dualpipe-jax[search]`) it tries some 20,000 moves a second over 8
    ranks with 32 microbatches, and without it a hundredth of that.

    Args:
        num_ranks: The number of ranks.
        num_microbatches: The number of microbatches of a step.
        costs: How long actions take; by default 1 each. Weight grads that do not follow their input
            grads take `Costs.recompute` in addition.
        transfer: How long a value travels to another rank.
        placement: The ranks of the stages. `"linear"`: down the ranks, as in 1F1B. `"v"`: down and
            up again, as in DualPipeV. `"interleaved"`: round and round. `"bidirectional"`: half of
            the microbatches down and half up, as in DualPipe.
        num_stages_per_rank: The stages of each rank, for `"interleaved"` only; by default 2.
        layers_per_stage: The layers of each stage, in model order, as for `value_and_grad`; by
            default all stages are equal.
        layout: The kind of every layer, as `Model.layout`, where `costs.layer` has a cost for each.
        max_activations: The most activations that a rank holds between F and W, in shares of a
            rank's layers: 1 is that of one microbatch in `num_layers / num_ranks` layers. By
            default as many as the fastest named schedule of the placement holds.
        memory: The same limit in bytes, or a text such as `"12GiB"`, by `costs.activation_bytes`
            and `costs.stash_bytes`: the most that a rank has in slots, which F fills for I and W,
            and I for W. Every rank has as many slots of either as the fullest one needs.
        keep_beats: Whether beats are kept: if a named schedule with a steady phase has the
            placement and fits (the fastest of several), each rank's actions of that phase stay as
            they are, paired, and only those before and after it move. Placed by these costs, the
            order then has at least four fifths of the phase's beats: those at its edges may be
            lost. Without such a named schedule, and with False, all actions may move, and those of
            found orders are not paired.
        waits: The time by which the best of the found orders and the named ones are compared in the
            end. `"program"`: each rank waits as the compiled program does, for the ranks with which
            it exchanges values in a tick too; so no named schedule that fits is faster, and the
            best is annealed on, a few moves and a compilation at a time. `"values"`: a rank waits
            only for values that it reads.
        moves: How many moves are tried; with `waits="program"` some more.
        seed: Of the random numbers, 0 or more.

    Raises:
        ValueError: if a size is not a positive integer, placement or waits are none of these,
            layers_per_stage does not fit, max_activations or memory is less than one microbatch
            needs, both are given, or memory without the bytes of an activation.
        TypeError: if an argument has a wrong type.
    """
    from dualpipe_jax._search import arguments
    from dualpipe_jax._search.search import search as run

    problem = arguments.make_problem(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        costs=costs,
        transfer=transfer,
        placement=placement,
        num_stages_per_rank=num_stages_per_rank,
        layers_per_stage=layers_per_stage,
        layout=layout,
        max_activations=max_activations,
        memory=memory,
    )
    arguments.require_flag("keep_beats", keep_beats)
    arguments.require_one_of("waits", waits, arguments.WAITS)
    program = run(
        problem,
        name=f"search-{placement}",
        keep_beats=keep_beats,
        waits=waits,
        moves=arguments.as_count("moves", moves),
        seed=arguments.as_count("seed", seed),
    )
    return Schedule(program)


class _Factory(Protocol):
    """Makes a schedule of some size, as `make` does."""

    def __call__(self, *, num_ranks: int, num_microbatches: int, **options: Any) -> Schedule:
        """Makes the schedule; `interleaved_one_f_one_b` takes `num_stages_per_rank` too."""
        ...


def _factory(name: str, generator: Callable[..., Program]) -> _Factory:
    @wraps(generator)
    def factory(**arguments: Any) -> Schedule:
        return Schedule(generate(name, **arguments))

    factory.__module__ = __name__
    signature = inspect.signature(generator).replace(return_annotation=Schedule)
    factory.__signature__ = signature  # pyrefly: ignore[missing-attribute]
    return factory


# A function for each generator, under the same name.
_FACTORIES = {
    generator.__name__: _factory(name, generator) for name, generator in GENERATORS.items()
}
globals().update(_FACTORIES)

__all__ = ["Schedule", "Timeline", "make", "names", "search", *_FACTORIES]


def __getattr__(name: str) -> _Factory:
    """Raises; its type is that of the functions above, for type checkers."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
