import numpy as np
import pytest

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators.interleaved_one_f_one_b import interleaved_one_f_one_b
from dualpipe_jax.schedules import Schedule
from tests import table_interpreter
from tests.schedules_under_test import WIDE_SIZES, compiled

# By hand from the paper's figure 4 (its warm-up, steady state and cool-down), two stages a rank.
PUBLISHED = {
    (2, 4, 0): """0F0 0F1 2F0 2F1 | 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 | 2B2 2B3 0B2 0B3""",
    (2, 4, 1): """1F0 1F1 | 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 | 1B2 1B3""",
    (4, 8, 0): """0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 |
        0F6 4B0 0F7 4B1 4F4 4B2 4F5 4B3 4F6 0B0 4F7 0B1 |
        0B2 0B3 4B4 4B5 4B6 4B7 0B4 0B5 0B6 0B7""",
    (4, 8, 3): """3F0 3F1 3F2 3F3 | 7F0 7B0 7F1 7B1 7F2 7B2 7F3 7B3 3F4 3B0 3F5 3B1 3F6 3B2 3F7 3B3
        7F4 7B4 7F5 7B5 7F6 7B6 7F7 7B7 | 3B4 3B5 3B6 3B7""",
}


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "rank"), PUBLISHED)
def test_published_order(num_ranks, num_microbatches, rank):
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    row = interleaved_one_f_one_b(**sizes).rows[rank]
    expected = PUBLISHED[num_ranks, num_microbatches, rank].replace("|", " ").split()
    assert [str(cell) for cell in row] == expected


def test_a_microbatch_goes_round_the_ring():
    program = interleaved_one_f_one_b(num_ranks=3, num_microbatches=4, num_stages_per_rank=3)
    assert program.routes == ((0, 1, 2, 0, 1, 2, 0, 1, 2),)
    assert program.stage_of.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_other_numbers_make_larger_groups():
    # Groups of 4 and 3 for three ranks: rank 2, the last, is ahead by one group.
    row = interleaved_one_f_one_b(num_ranks=3, num_microbatches=7).rows[2]
    assert [str(cell) for cell in row[:6]] == ["2F0", "2F1", "2F2", "2F3", "5F0", "5B0"]


@pytest.mark.parametrize("num_ranks", range(1, 10))
def test_idles_no_more_ticks_than_1f1b(num_ranks):
    for P, N in WIDE_SIZES:
        if num_ranks != P or N < P:
            continue
        # A tick is half as long as 1F1B's, so as many idle ticks are half the time.
        idle = compiled("interleaved-1f1b", P, N).timeline.num_ticks - 2 * 3 * N
        assert idle <= compiled("1f1b", P, N).timeline.num_ticks - 3 * N, N


@pytest.mark.parametrize("num_stages_per_rank", [1, 3, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_number_of_stages_a_rank(num_ranks, num_stages_per_rank):
    P, v = num_ranks, num_stages_per_rank
    for N in range(1, 2 * P + 4):
        sizes = {"num_ranks": P, "num_microbatches": N}
        program = interleaved_one_f_one_b(**sizes, num_stages_per_rank=v)
        tables = compile_program(program).tables
        model = table_interpreter.random_model(v * P, N)
        loss, grads = table_interpreter.run(tables, *model)
        expected_loss, expected_grads = table_interpreter.loss_and_grads(*model)
        # Only the order of summation differs.
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
        np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12)
        if N >= P:
            plain = compiled("1f1b", P, N).timeline
            assert tables.num_ticks - v * 3 * N <= plain.num_ticks - 3 * N, N
        if v == 1:
            assert program.rows == compiled("1f1b", P, N).program.rows
        assert Schedule.from_csv(program.to_csv(), name=program.name).program == program


@pytest.mark.parametrize("wrong", [0, -1, 2.0, "2", None, True])
def test_number_of_stages_is_a_positive_integer(wrong):
    with pytest.raises(ValueError, match=rf"^num_stages_per_rank={wrong!r}: must be an integer"):
        interleaved_one_f_one_b(num_ranks=2, num_microbatches=2, num_stages_per_rank=wrong)
