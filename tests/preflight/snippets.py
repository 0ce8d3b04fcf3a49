"""Short programs in the compilers' form, and a device on which a cycle or a byte takes a second."""

from dualpipe_jax._devices import Device
from dualpipe_jax._preflight.hlo import Module, parse
from dualpipe_jax._preflight.links import Network

TOY = Device(
    name="toy", kind="toy", memory=1000, peak_flops=2.0, clock=1.0, link=1.0, host_link=1.0
)


def network(**axes: int) -> Network:
    return Network(axes=axes or {"pipe": 2}, device=TOY, host_link=512.0)


def program(body: str, *others: str) -> Module:
    """Makes a module of an entry's lines, and other computations."""
    return parse("\n\n".join([*others, f"ENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}"]))


def work(name: str, cycles: int, operand: str = "a", shape: str = "f32[4]{0}") -> str:
    """Writes a fusion that takes so many cycles."""
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"  %{name} = {shape} fusion(%{operand}), kind=kLoop, calls=%fused, {config}"


FUSED = """%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %neg = f32[4]{0} negate(%p)
}"""
A = "  %a = f32[4]{0} parameter(0)"
SWAP = "source_target_pairs={{0,1},{1,0}}"


LOOP = """%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %s = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %a = f32[4]{{0}} get-tuple-element(%s), index=1
{inside}
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%i, %x)
}}

%condition (s.1: (s32[], f32[4])) -> pred[] {{
  %s.1 = (s32[], f32[4]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] {limit}
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}}"""


WHILE = """  %zero = s32[] constant({start})
  %state = (s32[], f32[4]{{0}}) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[4]{{0}}) while(%state), condition=%condition, body=%body{more}"""
