import pytest

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators.list_schedule import list_schedule
from dualpipe_jax._schedule.ir import Action, Pair, Program


@pytest.mark.parametrize("num_stages_per_rank", [1, 2, 3])
@pytest.mark.parametrize("folded", [False, True])
def test_orders_more_stages_than_ranks(num_stages_per_rank, folded):
    # Round and round as interleaved schedules go, or up and down as DualPipeV does.
    P, N = 4, 10
    route = [
        P - 1 - rank if folded and turn % 2 else rank
        for turn in range(num_stages_per_rank)
        for rank in range(P)
    ]
    S = len(route)
    rows = list_schedule(
        num_ranks=P,
        routes=[route],
        microbatches=[range(N)],
        limits=[range(S, 0, -1)],
        max_deferred=P,
    )
    compiled = compile_program(Program("routes", P, S, N, rows))
    assert compiled.program.routes == (tuple(route),)
    assert compiled.tables.wraps == (num_stages_per_rank > 1 and not folded)
    # Never worse than waiting for one microbatch to come down and back.
    assert compiled.timeline.num_ticks <= 3 * N * num_stages_per_rank + 2 * S


def test_limits_bound_the_live_activations():
    P, N = 4, 16
    for limit in (1, 2, 4):
        rows = list_schedule(
            num_ranks=P,
            routes=[range(P)],
            microbatches=[range(N)],
            limits=[[limit] * P],
            max_deferred=1,
        )
        num_slots = compile_program(Program("limited", P, P, N, rows)).tables.num_slots
        assert num_slots["residual"] <= limit
        assert num_slots["stash"] == 1


def test_joins_opposite_directions_to_pairs_only():
    rows = list_schedule(
        num_ranks=2, routes=[(0, 1)], microbatches=[range(6)], limits=[(2, 1)], max_deferred=1
    )
    assert not any(isinstance(cell, Pair) for row in rows for cell in row)
    assert Action("B", 1, 3) in rows[1]
