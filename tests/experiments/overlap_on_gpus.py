"""What hides a beat's collectives on eight H100s: `make test-gpu`, as the compiler is large."""

import jax
import pytest

import dualpipe_jax as dpj
from experiments.overlap_gpu import gpu, steps


@pytest.mark.parametrize("layers", [2, 4])
def test_dense_permutes_have_matmuls_beside_them(layers: int) -> None:
    permutes, exchanges = _counts(steps.dense(layers_per_stage=layers, width=1024))
    assert permutes.total == permutes.num_async == permutes.num_hidden == 4
    assert exchanges.total == 0


@pytest.mark.parametrize("layers", [2, 4])
def test_nine_in_ten_all_to_alls_of_experts_do(layers: int) -> None:
    permutes, exchanges = _counts(steps.experts(layers_per_stage=layers, width=1024))
    assert permutes.total == permutes.num_async == permutes.num_hidden == 4
    assert exchanges.total == exchanges.num_async == 8 * layers
    assert exchanges.num_hidden >= 0.9 * exchanges.total


def _counts(step: steps.Step) -> list[gpu.Count]:
    with jax.enable_x64(False):
        options = dpj.compiler_options("gpu")
        report = dpj.preflight(
            step.fn, step.args, gpu.TOPOLOGY, compiler_options=options, mesh=step.mesh
        )
    return [gpu.count(report, kind) for kind in gpu.KINDS]
