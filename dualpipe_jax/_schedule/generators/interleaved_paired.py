"""Interleaved 1F1B in pairs: F of one chunk runs beside B of another, which hides all-to-alls.

Megatron-LM (combined 1F1B) and Kimi K2's report (arXiv:2507.20534) pair them with one more warm-up
microbatch than interleaved 1F1B, and one copy of the parameters. Here the steady phase is straight-
line code too: beats in which all ranks run a pair. A beat moves a value by one stage at most, from
its F to the next rank's F in the next beat. So a rank that runs a pair in each beat holds about 2P
activations on a line of stages, (1 + 1/v) P, in shares of a rank's layers, where microbatches go
round v times as here, and P where they go down the ranks and up again (DualPipeV).
"""

from dualpipe_jax._errors import brief
from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.ir import Action, Cell, Pair, Program, Row


def interleaved_paired(
    *, num_ranks: int, num_microbatches: int, num_stages_per_rank: int = 2
) -> Program:
    """Makes interleaved 1F1B in pairs, F beside B of another microbatch, with a steady phase.

    Rank r holds the stages r, P + r, 2P + r and so on. The steady phase is about half of all beats
    with four times as many microbatches as ranks; few microbatches have none. Rank 0 holds
    (v + 1) P + (v - 1) w activations of its v stages, and w = (1 - P) mod v: with two stages and an
    even P that is 3P + 1, where interleaved 1F1B holds 3P - 1. With more stages a multiple of v
    suits P best, where w is 1.

    >>> for row in interleaved_paired(num_ranks=2, num_microbatches=2).to_csv().splitlines():
    ...     print(*row.split(","))
    0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
    1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1

    Raises:
        ValueError: if a size is not a positive integer, or if a rank has a single stage.
    """
    num_ranks, num_microbatches, num_stages_per_rank = check_sizes(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_stages_per_rank=num_stages_per_rank,
    )
    if num_stages_per_rank == 1:
        raise ValueError(
            f"num_stages_per_rank={brief(num_stages_per_rank)}: must be at least 2, as a pair has "
            "a forward of one stage and a backward of another; for one stage a rank take '1f1b' "
            "or 'zb-h1'"
        )
    rows = tuple(
        _row(rank, num_ranks, num_microbatches, num_stages_per_rank) for rank in range(num_ranks)
    )
    num_stages = num_ranks * num_stages_per_rank
    return Program("interleaved-paired", num_ranks, num_stages, num_microbatches, rows)


# In which beat which chunk: code that is the same on all ranks needs chunks that alternate beat by
# beat. (Groups of P microbatches, as interleaved 1F1B has them, change chunks on one rank after
# the other: then each beat would have to choose its weights.) So rank r runs F of chunk
# (t - r) mod v in beat t, a microbatch enters every v beats, and it goes on by a rank in each. From
# the last rank to the first one it waits w = (1 - P) mod v beats more, until the next chunk has its
# turn: one beat if v divides P. B's go the same way back, the first one a beat after the last
# stage's F. If v is odd, F and B are of one chunk in one beat of v.
def _row(rank: int, num_ranks: int, num_microbatches: int, num_stages_per_rank: int) -> Row:
    # A round of a microbatch, from a rank back to it, and the beat of its first B.
    num_beats = num_ranks + (1 - num_ranks) % num_stages_per_rank
    turn = (num_stages_per_rank - 1) * num_beats + num_ranks
    forwards, backwards = {}, {}
    for chunk in range(num_stages_per_rank):
        stage, rounds_back = chunk * num_ranks + rank, num_stages_per_rank - 1 - chunk
        for microbatch in range(num_microbatches):
            enters = num_stages_per_rank * microbatch
            there = enters + chunk * num_beats + rank
            back = enters + turn + rounds_back * num_beats + num_ranks - 1 - rank
            forwards[there] = Action("F", stage, microbatch)
            backwards[back] = Action("B", stage, microbatch)
    return tuple(
        _cell(forwards.get(beat), backwards.get(beat)) for beat in sorted(forwards | backwards)
    )


def _cell(forward: Action | None, backward: Action | None) -> Cell:
    if forward and backward:
        return Pair(forward, backward)
    cell = forward or backward
    assert cell is not None
    return cell
