"""The collectives that a beat hides on eight H100s: `make test-gpu`, as the compiler is large."""

from dataclasses import replace

import jax
import pytest

from experiments.compiled import overlap
from experiments.compiled.compiles import EXCHANGE, PERMUTE, Figures, compile_case

DENSE, MIXTURE = overlap.cases("gpu", widths=(1024,), layers=(2,))


@pytest.mark.parametrize("layers", [2, 4])
def test_dense_permutes_have_matmuls_beside_them(layers: int) -> None:
    figures = _figures(replace(DENSE, layers=layers))
    permutes = figures.count(PERMUTE)
    assert permutes.total == permutes.num_async == permutes.num_covered == 4
    assert figures.count(EXCHANGE).total == 0


# Six layers a stage are a loop.
@pytest.mark.parametrize(
    ("layers", "width"), [(2, 1024), (3, 1024), (4, 1024), (6, 1024), (2, 2048), (4, 2048)]
)
def test_so_do_the_all_to_alls_of_experts(layers: int, width: int) -> None:
    figures = _figures(replace(MIXTURE, layers=layers, width=width))
    permutes, exchanges = figures.count(PERMUTE), figures.count(EXCHANGE)
    assert permutes.total == permutes.num_async == permutes.num_covered == 4
    assert exchanges.total == exchanges.num_async == exchanges.num_covered == 8 * layers


def _figures(case: overlap.Case) -> Figures:
    with jax.enable_x64(False):
        return compile_case(case)
