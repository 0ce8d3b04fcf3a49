"""Programs for GPUs: lines as XLA writes them, and whole steps where its compiler is installed.

The compiler is 4 GB and not part of the tests' extra: pip install 'jax[cuda13]'.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import dualpipe_jax as dpj
from dualpipe_jax import _scopes
from dualpipe_jax._devices import H100
from dualpipe_jax._grid import is_adjacent_along, num_adjacent
from dualpipe_jax._preflight.hlo import parse
from dualpipe_jax._preflight.links import Network
from dualpipe_jax._preflight.timing import Collective, Replay
from dualpipe_jax._preflight.topologies import find_topology, make_mesh
from experiments.compiled import compiles, overlap
from tests.preflight.snippets import program
from tests.preflight.steps import make_args, make_step

GEMM = """%gemm_fusion_dot.14_computation (p: bf16[1024,4096], q: bf16[4096,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,4096]{1,0} parameter(0)
  %q = bf16[4096,1024]{1,0} parameter(1)
  ROOT %dot.2 = bf16[1024,1024]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""  # noqa: E501
INPUTS = """  %x = bf16[2,512,1024]{2,1,0} parameter(0)
  %p = bf16[1024,4096]{1,0} parameter(1)
  %q = bf16[4096,1024]{1,0} parameter(2)"""
TRITON = """  %gemm_fusion_dot.14 = bf16[1024,1024]{1,0} fusion(%p, %q), kind=kCustom, calls=%gemm_fusion_dot.14_computation, backend_config={"operation_queue_id":"0","fusion_backend_config":{"kind":"__triton_gemm"}}"""  # noqa: E501
CUBLAS = """  %custom-call.3 = (bf16[1024,1024]{1,0}, s8[33554432]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}"""  # noqa: E501
PERMUTE = """  %collective-permute-start.2 = (bf16[2,512,1024]{2,1,0}, bf16[2,512,1024]{2,1,0}) collective-permute-start(%x), channel_id=1, source_target_pairs={{1,2},{2,1},{3,4},{4,3},{5,6},{6,5}}, metadata={op_name="jit(grad_fn)/dualpipe.steady/dualpipe.send/ppermute"}, backend_config={"operation_queue_id":"0","collective_backend_config":{"is_sync":IS_SYNC,"is_pipelined":false,"backend":"DEFAULT"}}"""  # noqa: E501
PERMUTED = "  %collective-permute-done.2 = bf16[2,512,1024]{2,1,0} collective-permute-done(%collective-permute-start.2)"  # noqa: E501
# Two operands each: two permutes between the same ranks, after the combiner.
COMBINED = PERMUTE.replace("start(%x)", "start(%x, %x)").replace(
    "(bf16[2,512,1024]{2,1,0}, bf16[2,512,1024]{2,1,0}) c",
    "((bf16[2,512,1024]{2,1,0}, bf16[2,512,1024]{2,1,0}), "
    "(bf16[2,512,1024]{2,1,0}, bf16[2,512,1024]{2,1,0})) c",
)
EXCHANGE = """  %all-to-all-start.16 = (bf16[2,512,1024]{2,1,0}, bf16[2,512,1024]{2,1,0}) all-to-all-start(%x), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, metadata={op_name="jit(grad_fn)/dualpipe.steady/dualpipe.forward/all_to_all"}, backend_config={"operation_queue_id":"0","collective_backend_config":{"is_sync":IS_SYNC,"is_pipelined":false,"backend":"DEFAULT"}}"""  # noqa: E501
EXCHANGED = "  %all-to-all-done.16 = bf16[2,512,1024]{2,1,0} all-to-all-done(%all-to-all-start.16)"
MATMUL = 2 * 1024 * 1024 * 4096
NUM_BYTES = 2 * 512 * 1024 * 2


def replay(*lines: str, axes: dict[str, int], is_sync: bool = False) -> Collective:
    text = "\n".join([INPUTS, *lines]).replace("IS_SYNC", str(is_sync).lower())
    module = program(text, GEMM)
    (found,) = Replay(module, Network(axes=axes, device=H100)).run(module.entry)
    return found


@pytest.mark.parametrize("matmul", [TRITON, CUBLAS])
def test_a_permute_over_a_matmul(matmul: str) -> None:
    found = replay(PERMUTE, matmul, PERMUTED, axes={"pipe": 8})
    assert (found.kind, found.axes, found.is_async) == ("collective-permute", ("pipe",), True)
    assert (found.flops, found.num_bytes) == (MATMUL, NUM_BYTES)
    assert found.link_seconds == pytest.approx(NUM_BYTES / 450e9)
    assert found.is_hidden


@pytest.mark.parametrize("matmul", [TRITON, CUBLAS])
def test_an_all_to_all_over_a_matmul(matmul: str) -> None:
    found = replay(EXCHANGE, matmul, EXCHANGED, axes={"pipe": 4, "expert": 2})
    assert (found.kind, found.axes, found.is_async) == ("all-to-all", ("expert",), True)
    assert (found.flops, found.num_bytes) == (MATMUL, NUM_BYTES)
    assert found.is_hidden


def test_two_permutes_combined_are_one_of_both_sizes() -> None:
    found = replay(COMBINED, TRITON, PERMUTED, axes={"pipe": 8})
    assert (found.flops, found.num_bytes) == (MATMUL, 2 * NUM_BYTES)


@pytest.mark.parametrize(
    ("start", "done", "axes"),
    [(PERMUTE, PERMUTED, {"pipe": 8}), (EXCHANGE, EXCHANGED, {"pipe": 4, "expert": 2})],
)
def test_a_start_marked_as_synchronous_hides_behind_nothing(
    start: str, done: str, axes: dict[str, int]
) -> None:
    found = replay(start, TRITON, done, axes=axes, is_sync=True)
    assert (found.is_async, found.is_hidden, found.flops) == (False, False, 0)
    assert found.exposed_seconds == found.link_seconds


@dataclass(frozen=True)
class Gpu:
    coords: tuple[int, int, int]
    platform: str = "gpu"


def test_gpus_have_coordinates_but_no_neighbours() -> None:
    gpus = np.array([Gpu((0, i, 0)) for i in (0, 4, 2, 6)])
    assert is_adjacent_along(gpus, 0) is None
    assert num_adjacent(gpus) == 0


@pytest.fixture
def _as_users_compute() -> Iterator[None]:
    pytest.importorskip("jax_plugins.xla_cuda13", reason="no compiler for GPUs: make test-gpu")
    with jax.enable_x64(False):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_as_users_compute")
def test_every_permute_of_a_dense_step_is_hidden() -> None:
    (case, _) = overlap.cases("gpu", widths=(1024,), layers=(2,))
    step = case.make()
    report = dpj.preflight(step.fn, step.args, case.topology, mesh=step.mesh)
    assert report.loop is not None
    permutes = compiles.count(report.loop.collectives)[compiles.PERMUTE]
    assert permutes.total
    assert permutes.num_covered == permutes.num_async == permutes.total
    assert report.loop.num_trips == 8
    # Two beats of F, I and W of two layers of two matmuls, and the head's three on the last stage.
    matmul = 2 * 2 * 512 * 1024 * 4096
    assert {action.name: action.flops for action in report.loop.actions} == {
        "forward": 2 * 2 * 2 * matmul,
        "input_grad": 2 * 2 * 2 * matmul,
        "weight_grad": 2 * 2 * 2 * matmul,
        "head": 3 * matmul / 4,
    }
    assert (report.memory.fits, report.apart) == (True, ())


@pytest.mark.slow
@pytest.mark.usefixtures("_as_users_compute")
def test_all_to_alls_of_a_mixture_of_experts_are_hidden() -> None:
    (_, case) = overlap.cases("gpu", widths=(1024,), layers=(2,))
    step = case.make()
    report = dpj.preflight(step.fn, step.args, case.topology, mesh=step.mesh)
    assert report.loop is not None
    counts = compiles.count(report.loop.collectives)
    permutes, exchanges = counts[compiles.PERMUTE], counts[compiles.EXCHANGE]
    assert permutes.total
    assert permutes.num_covered == permutes.num_async == permutes.total
    # Two in F and two in I, of two layers in two beats.
    assert exchanges.total == exchanges.num_async == 16
    assert exchanges.num_covered >= 0.9 * exchanges.total


@pytest.mark.slow
@pytest.mark.usefixtures("_as_users_compute")
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_both_transfers_of_a_two_tick_step_stand_around_the_whole_action(schedule: str) -> None:
    mesh = make_mesh(find_topology("gpu:h100:4"), {"pipe": 4}, (AxisType.Auto,))
    step = jax.jit(make_step(mesh, schedule=schedule, overlap="two-tick"))
    args = make_args(mesh, width=1024, num_layers=8, rows=16 * 4, length=128)
    lowered = step.trace(*args).lower(lowering_platforms=("cuda",))
    options: dict[str, Any] = dpj.compiler_options("gpu")
    compiled = lowered.compile(compiler_options=options)
    (body,) = [
        each
        for each in parse(compiled.as_text() or "").computations.values()
        if any("start" in i.opcode and _scopes.RAMP in i.op_name for i in each.instructions)
    ]
    at: dict[str, list[int]] = {}
    for place, instruction in enumerate(body.instructions):
        at.setdefault(instruction.opcode, []).append(place)
        assert '"is_sync":true' not in instruction.attributes
    starts, dones = (at[f"collective-permute-{end}"] for end in ("start", "done"))
    assert len(starts) == len(dones) == 2
    # F, the backward's halves, W and the ends are loops of a trip or none; embed is conditional.
    action = at["while"] + at["conditional"]
    assert len(action) >= 5
    assert max(starts) < min(action) <= max(action) < min(dones)
