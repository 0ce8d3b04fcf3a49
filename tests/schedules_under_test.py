"""The one list of schedules and sizes over which every contract test runs."""

from functools import cache
from typing import Any

from dualpipe_jax import schedules
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.generators import GENERATORS, forward_only

NAMES = schedules.names()
# Schedules of pairs, which have a steady phase.
PAIRED = ("interleaved-paired", "dualpipe", "dualpipev")

# Odd and even, fewer microbatches than ranks, as many, twice as many, more.
WIDE_SIZES = tuple((P, N) for P in range(1, 10) for N in range(1, 3 * P + 3))
LARGER_SIZES = ((12, 5), (12, 31), (13, 26), (16, 33), (16, 40), (24, 49))

# (name, num_ranks, num_microbatches) of everything the compiler can be asked for by name.
WIDE_GRID = tuple((name, P, N) for name in NAMES for P, N in WIDE_SIZES + LARGER_SIZES)
# The program of evaluation is not public: it has no gradients.
FORWARD_ONLY_GRID = tuple(("forward-only", P, N) for P, N in WIDE_SIZES)
# Sizes that have a steady phase: few beats and many, odd sizes, one rank, a neighbour to
# itself, nothing to send in even beats.
RUN_SIZES = [
    ("dualpipe", 2, 8),
    ("dualpipe", 3, 12),
    ("dualpipe", 4, 8),
    ("dualpipe", 4, 16),
    ("dualpipe", 8, 20),
    ("dualpipev", 1, 5),
    ("dualpipev", 2, 5),
    ("dualpipev", 3, 9),
    ("dualpipev", 4, 10),
    # Values wait where the number of ranks is even.
    ("interleaved-paired", 1, 5),
    ("interleaved-paired", 2, 7),
    ("interleaved-paired", 3, 9),
    ("interleaved-paired", 4, 16),
]


@cache
def compiled(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    timetable: str = "shortest",
    *,
    stash_deferred: bool = True,
    full_backward: bool = False,
) -> Compiled:
    """Compiles one of them, once for all tests."""
    generate = forward_only if name == "forward-only" else GENERATORS[name]
    program = generate(num_ranks=num_ranks, num_microbatches=num_microbatches)
    return compile_program(
        program,
        timetable=timetable,
        stash_deferred=stash_deferred,
        full_backward=full_backward,
    )


def has_steady(name: str, num_ranks: int, num_microbatches: int, overlap: Any) -> bool:
    """Whether a step has a steady phase: all cases that are to cover these must."""
    if not overlap:
        return False
    return compiled(name, num_ranks, num_microbatches, "aligned").tables.steady is not None
