"""The experiment on two slices: its cases, its steps without a pipeline, and the README's table."""

import jax
import pytest

from experiments import documents
from experiments.compiled import flags, slices
from experiments.compiled.compiles import ACROSS, Figures, compile_case
from experiments.compiled.steps import Case


def test_all_cases_have_the_same_layers_chips_and_tokens() -> None:
    for kind in slices.KINDS:
        for case in slices.cases(kind, width=128, tokens=64, schedules=slices.SCHEDULES):
            if isinstance(case, Case):
                assert sum(case.layers_per_stage) == slices.LAYERS
                assert case.ranks * case.beside == slices.CHIPS
                tokens = case.num_microbatches * case.beside * case.tokens
            else:
                tokens = case.num_microbatches * slices.CHIPS * case.tokens
            assert tokens == 4 * slices.CHIPS * 64


def test_the_readme_has_rows_of_the_cases() -> None:
    lines = documents.read_from(flags.README, name="slices").splitlines()
    names = [tuple(line.strip("| ").split(" | ")[:2]) for line in lines[2:]]
    assert names
    assert len(set(names)) == len(names)
    for kind, schedule in names:
        assert kind in slices.KINDS
        assert (schedule == "-") == (not kind.startswith("pipe"))
        assert schedule in ("-", *slices.SCHEDULES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data 8", "fsdp 8"])
def test_small_steps_without_a_pipeline(kind: str) -> None:
    [case] = slices.cases(kind, width=128, tokens=64, schedules=())
    with jax.enable_x64(False):
        figures: Figures = compile_case(case)
    across, outside = figures.count(ACROSS), figures.outside_exposed_seconds or 0
    if kind.startswith("fsdp"):
        # A layer is gathered and its gradient scattered, in every microbatch.
        assert across.total >= 2 * slices.LAYERS
        assert (figures.exposed_seconds or 0) > 0
    else:
        # float32 gradients: after the sum inside the slice each chip has a quarter, so that an
        # all-reduce over two slices sends all of them once from each host of four chips.
        assert across.total == 0
        assert outside > slices.LAYERS * 8 * 128**2 * 4 / 12.5e9
    assert (figures.predicted_seconds or 0) > 4 * (figures.compute_seconds or 0) + outside
