"""What hides a beat's collectives on eight H100s: `make test-gpu`, as the compiler is large."""

import jax
import pytest

import dualpipe_jax as dpj
from experiments.compiled import gpu
from experiments.compiled import gpu_steps as steps


@pytest.mark.parametrize("layers", [2, 4])
def test_dense_permutes_have_matmuls_beside_them(layers: int) -> None:
    permutes, exchanges = _counts(steps.dense(layers_per_stage=layers, width=1024))
    assert permutes.total == permutes.num_async == permutes.num_hidden == 4
    assert exchanges.total == 0


# Six layers a stage are a loop.
@pytest.mark.parametrize(
    ("layers", "width"), [(2, 1024), (3, 1024), (4, 1024), (6, 1024), (2, 2048), (4, 2048)]
)
def test_so_do_the_all_to_alls_of_experts(layers: int, width: int) -> None:
    permutes, exchanges = _counts(steps.experts(layers_per_stage=layers, width=width))
    assert permutes.total == permutes.num_async == permutes.num_hidden == 4
    assert exchanges.total == exchanges.num_async == exchanges.num_hidden == 8 * layers


def _counts(step: steps.Step) -> list[gpu.Count]:
    with jax.enable_x64(False):
        options = dpj.compiler_options("gpu")
        report = dpj.preflight(
            step.fn, step.args, gpu.TOPOLOGY, compiler_options=options, mesh=step.mesh
        )
    return [gpu.count(report, kind) for kind in gpu.KINDS]
