"""The memory of steps compiled for a TPU, beside their own account."""

import jax
import pytest

from experiments.compiled import memory
from experiments.compiled.compiles import compile_case


@pytest.mark.slow
@pytest.mark.parametrize("split_backward", [True, False])
def test_a_step_of_the_library_has_an_account_beside_its_peak(split_backward: bool) -> None:
    case = memory.Case(
        topology="tpu:v5e:2x2",
        ranks=4,
        layers=4,
        width=128,
        heads=1,
        sequence=128,
        vocabulary=128,
        microbatch_size=1,
        split_backward=split_backward,
        schedule="1f1b",
        remat="block",
    )
    with jax.enable_x64(False):
        row = memory.Row(case=case, figures=compile_case(case))
    terms, account = row.figures.terms, row.figures.account
    assert terms is not None
    assert row.peak > 0
    assert f"{terms / 2**20:,.1f} MiB" in account.splitlines()[-1]
    assert ("stash of a full backward" in account) != split_backward
