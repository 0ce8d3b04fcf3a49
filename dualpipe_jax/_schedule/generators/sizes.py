"""Checks and splits the sizes of a generator."""

import math
import operator
from collections.abc import Sequence

from dualpipe_jax._errors import brief

# Tables of more actions take many minutes, and tens of gigabytes.
_MOST_ACTIONS = 20_000_000
# So do tables of more cells, a row a tick and a column a rank: as many as these actions have if
# ranks idle two thirds of the time.
MOST_CELLS = 60_000_000


def check_sizes(**sizes: int) -> tuple[int, ...]:
    """Returns the sizes as ints.

    Raises:
        ValueError: if one is not a positive integer, naming all such, or if they are so large that
            no table can hold all actions.
    """
    wrong = []
    for name, size in sizes.items():
        try:
            if isinstance(size, bool) or operator.index(size) < 1:
                wrong.append(f"{name}={brief(size)}")
        except TypeError:
            wrong.append(f"{name}={brief(size)}")
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: must be an integer of at least 1")
    numbers = tuple(map(operator.index, sizes.values()))
    num_actions = 3 * math.prod(numbers)  # F, I and W
    if num_actions > _MOST_ACTIONS:
        given = ", ".join(
            f"{name}={brief(size)}" for name, size in zip(sizes, numbers, strict=True)
        )
        raise ValueError(
            f"{given}: must be at most {_MOST_ACTIONS:,} forwards, input grads and weight "
            "grads in all, beyond which no table holds them; take fewer microbatches or ranks"
        )
    # A microbatch takes a tick on each rank.
    if numbers[0] ** 2 > MOST_CELLS:
        raise ValueError(
            f"num_ranks={brief(numbers[0])}: must be at most {math.isqrt(MOST_CELLS):,}, beyond "
            "which no table holds the ticks of all ranks; take fewer ranks"
        )
    return numbers


def split_microbatches(num_microbatches: int) -> tuple[range, range]:
    """Gives direction 0 the first half of the microbatches, and the odd one; 1 the rest."""
    middle = -(-num_microbatches // 2)
    return range(middle), range(middle, num_microbatches)


def both_directions(
    num_ranks: int, num_microbatches: int
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Gives each direction's route over the ranks and its microbatches; one rank has one only."""
    if num_ranks == 1:  # both ends are one
        return [range(1)], [range(num_microbatches)]
    return [range(num_ranks), range(num_ranks)[::-1]], [*split_microbatches(num_microbatches)]
