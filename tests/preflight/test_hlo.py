"""The parser, on lines as the compilers write them."""

import pytest

from dualpipe_jax._preflight.hlo import Shape, parse

TEXT = r"""HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

FileNames
1 "/somewhere/beat.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=55 end_line=55 column=10 end_column=10}

%fused_computation.1 (param_0: bf16[8,4]) -> bf16[8,4] {
  %param_0 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %tanh.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} tanh(%param_0), metadata={op_name="jit(f)/tanh" stack_frame_id=1}
}

ENTRY %main.4_spmd (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}, metadata={op_name="x[\'a\']"}
  %start = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, bf16[8,4]{1,0}, u32[]{:S(2)}, /*index=3*/u32[]{:S(2)}) collective-permute-start(%p), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,4]{1,0} collective-permute-done(%start)
  ROOT %fusion.2 = bf16[8,4]{1,0} fusion(%done), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(f)/dualpipe.steady/tanh"}, backend_config={"flag_configs":[],"window_config":{"kernel_window_bounds":[],"estimated_cycles":"13362","iteration_bounds":["1"]}}
}
"""  # noqa: E501


def test_reads_computations_in_the_order_of_the_schedule() -> None:
    module = parse(TEXT)
    assert list(module.computations) == ["fused_computation.1", "main.4_spmd"]
    entry = module.entry
    assert [each.name for each in entry.instructions] == ["p", "start", "done", "fusion.2"]
    assert entry.root.name == "fusion.2"
    assert [each.name for each in entry.operands_of(entry.root)] == ["done"]
    assert [each.name for each in module.callees(entry.root)] == ["fused_computation.1"]


def test_reads_an_instruction() -> None:
    entry = parse(TEXT).entry
    p, start, _, fusion = entry.instructions
    assert (fusion.opcode, fusion.cycles) == ("fusion", 13362)
    assert fusion.op_name == "jit(f)/dualpipe.steady/tanh"
    assert fusion.shapes == (Shape("bf16", (8, 4)),)
    # A tuple's arrays one after the other, layouts and comments left out.
    assert [shape.num_bytes for shape in start.shapes] == [64, 64, 4, 4]
    assert p.op_name == r"x[\'a\']"
    assert start.cycles is None


def test_within_enters_computations_that_are_called_once() -> None:
    module = parse(TEXT)
    names = [each.name for each in module.within(module.entry)]
    assert sorted(names) == ["done", "fusion.2", "p", "param_0", "start", "tanh.1"]


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [("pred", 3), ("s4", 2), ("f8e4m3fn", 3), ("bf16", 6), ("f64", 24), ("c64", 24), ("token", 0)],
)
def test_bytes_of_a_dtype(dtype: str, num_bytes: int) -> None:
    assert Shape(dtype, (3,)).num_bytes == num_bytes


def test_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="has no ENTRY computation"):
        parse("not a program")


# As the compiler writes a kernel of splash attention: over several lines, with braces in strings.
KERNEL = r"""  %kernel.1 = f32[2]{0} custom-call(%p), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 128}}"
}}, metadata={op_name="jit(f)/splash_mha_fwd/pallas_call"}"""


@pytest.mark.parametrize("attributes", ['frontend_attributes={a={\n"x":"{}"\n}}', 'a="}}"'])
def test_attributes_take_several_lines(attributes: str) -> None:
    for module_attributes in ("", ", " + attributes):
        module = parse(
            f"HloModule m{module_attributes}\n\nENTRY %main (p: f32[2]) -> f32[2] {{\n"
            f"  %p = f32[2]{{0}} parameter(0), {attributes}\n{KERNEL}\n"
            "  ROOT %n = f32[2]{0} negate(%kernel.1)\n}\n"
        )
        assert [each.name for each in module.entry.instructions] == ["p", "kernel.1", "n"]
        assert module.entry.root.opcode == "negate"
        assert module.entry.by_name["kernel.1"].op_name == "jit(f)/splash_mha_fwd/pallas_call"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("  %q = f32[2]{0} negate(%p), a={", "opens a brace that it does not close"),
        ("  %q = f32[2]{0} negate(%p)}", "'%q = f32.*' closes a brace that it does not open"),
        ("  %q = f32[2]{0} ", "'q = f32.*' is no instruction: a shape, an opcode and its operands"),
        ("  %q = f32[2]{0} negate(%p", "'q = f32.*' is no instruction"),
        ("  %q = f32[2]", "'q = f32.*' is no instruction"),
        ("  not an instruction", "'not an instruction' is no instruction of computation main"),
        ("}\n  %q = f32[2]{0} negate(%p)", "'%q = .*' is outside of a computation"),
        ("}\n}", "'}' is outside of a computation"),
        ("}\n%other (p: f32[2]) -> f32[2] {", "computation other has no end"),
    ],
)
def test_text_that_is_not_understood_is_refused(lines: str, message: str) -> None:
    text = f"ENTRY %main (p: f32[2]) -> f32[2] {{\n  %p = f32[2]{{0}} parameter(0)\n{lines}\n"
    with pytest.raises(ValueError, match=message):
        parse(text if message.endswith(("no end", "not close")) else text + "}\n")
