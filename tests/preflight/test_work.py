"""FLOPs and cycles of instructions, and how often loops run."""

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax._preflight.hlo import Module, parse
from dualpipe_jax._preflight.work import CompiledWork, WorkCounter, trip_count
from tests.preflight.snippets import FUSED, LOOP, WHILE, A, program, work


def total(module: Module, *, at_least: bool = False) -> CompiledWork:
    return WorkCounter(module, at_least=at_least).of_computation(module.entry)


def test_dot() -> None:
    module = program(
        """  %x = f32[2,8,4]{2,1,0} parameter(0)
  %y = f32[2,4,16]{2,1,0} parameter(1)
  ROOT %dot = f32[2,8,16]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"""  # noqa: E501
    )
    assert total(module).flops == 2 * (2 * 8 * 16) * 4


def test_matmul_written_as_a_convolution() -> None:
    module = program(
        """  %x = bf16[8,4]{1,0} parameter(0)
  %y = bf16[16,4]{1,0} parameter(1)
  ROOT %c = bf16[8,16]{1,0} convolution(%x, %y), dim_labels=bf_oi->bf"""
    )
    assert total(module).flops == 2 * 8 * 16 * 4


def test_batched_matmul_written_as_a_dilated_convolution() -> None:
    # Three matmuls [8, 4] x [4, 16]: one of the kernel's three entries meets data at each output.
    module = program(
        """  %x = bf16[3,8,4]{2,1,0} parameter(0)
  %y = bf16[3,4,16]{2,1,0} parameter(1)
  ROOT %c = bf16[3,8,16]{2,1,0} convolution(%x, %y), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf"""  # noqa: E501
    )
    assert total(module).flops == 3 * 2 * 8 * 16 * 4


def test_padding_of_a_convolution_costs_nothing() -> None:
    module = program(
        """  %x = f32[1,5,2]{2,1,0} parameter(0)
  %y = f32[3,2,7]{2,1,0} parameter(1)
  ROOT %c = f32[1,5,7]{2,1,0} convolution(%x, %y), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"""  # noqa: E501
    )
    # Three entries of the kernel at each of five outputs, less one at either end.
    assert total(module).flops == 2 * (3 * 5 - 2) * 2 * 7


def test_matmul_handed_to_cublas() -> None:
    module = program(
        """  %x = bf16[8,4]{1,0} parameter(0)
  %y = bf16[4,16]{1,0} parameter(1)
  ROOT %g = (bf16[8,16]{1,0}, s8[1024]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}"""  # noqa: E501
    )
    assert total(module).flops == 2 * 8 * 16 * 4


@pytest.mark.parametrize("shapes", [((8, 4), (4, 16)), ((3, 8, 4), (3, 4, 16))])
def test_kernels_that_the_compiler_writes_are_counted(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, y = (jnp.ones(shape, jnp.float32) for shape in shapes)
    text = jax.jit(jnp.matmul).lower(x, y).compile().as_text()
    assert text
    assert total(parse(text)).flops == 2 * x.size * 16


def looped(*, start: int = 0, limit: str = "constant(7)", more: str = "") -> Module:
    return program(
        A + "\n" + WHILE.format(start=start, more=more),
        FUSED,
        LOOP.format(inside=work("x", 10), limit=limit),
    )


def test_trips_are_read_off_the_condition() -> None:
    for start, trips in ((0, 7), (2, 5), (9, 0)):
        module = looped(start=start)
        assert trip_count(module, module.entry.root, module.entry) == trips
        assert total(module).cycles == 10 * trips


def test_trips_that_the_compiler_states_come_first() -> None:
    module = looped(more=', backend_config={"known_trip_count":{"n":"3"}}')
    assert total(module).cycles == 30


def test_trips_are_read_off_a_fused_condition() -> None:
    text = """%compare (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %lt.1 = pred[] compare(%p, %q), direction=LT
}"""
    condition = LOOP.format(inside=work("x", 10), limit="constant(7)").replace(
        "compare(%i.1, %limit), direction=LT",
        "fusion(%i.1, %limit), kind=kLoop, calls=%compare",
    )
    entry = WHILE.format(start=0, more="")
    module = program(A + "\n" + entry, FUSED, text, condition)
    assert total(module).cycles == 70


def test_a_loop_of_unknown_length_runs_once_at_most_and_never_at_least() -> None:
    module = looped(limit="get-tuple-element(%s.1), index=0")
    assert trip_count(module, module.entry.root, module.entry) is None
    assert total(module).cycles == 10
    assert total(module, at_least=True).cycles == 0


def test_branches_of_a_conditional() -> None:
    branch = """%{name} (a: f32[4]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0)
{line}
}}"""
    module = program(
        A + "\n  ROOT %c = f32[4]{0} conditional(%a, %a, %a), branch_computations={%one, %two}",
        FUSED,
        branch.format(name="one", line=work("x", 10)),
        branch.format(name="two", line=work("y", 4)),
    )
    assert total(module).cycles == 10
    assert total(module, at_least=True).cycles == 4


def test_an_estimate_stands_for_all_that_is_fused() -> None:
    inner = (
        """%outer (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
"""
        + work("inner", 1000, "p").replace("  %inner", "  ROOT %inner")
        + "\n}"
    )
    line = work("x", 5).replace("calls=%fused", "calls=%outer")
    assert total(program(A + "\n" + line, FUSED, inner)).cycles == 5
