"""Copies of whole slot buffers, in programs as the TPU compiler writes them."""

import pytest

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.copies import Copy, find_copies
from dualpipe_jax._preflight.loops import find_loop
from dualpipe_jax._preflight.text import copies_lines
from dualpipe_jax._preflight.work import WorkCounter
from tests.preflight.snippets import SWAP, program

ROWS, TURNED = "f32[9,64,512]{2,1,0:T(8,128)}", "f32[9,64,512]{1,2,0:T(8,128)}"
BYTES = 9 * 64 * 512 * 4
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"1000"}}'


def _in_place(root: str = "p") -> str:
    """A fusion that writes an entry, of its parameter or of a copy of that."""
    return f"""%written (p: f32[9,64,512], i: s32[]) -> f32[9,64,512] {{
  %p = {ROWS} parameter(0)
  %i = s32[] parameter(1)
  %turned = {TURNED} copy(%p)
  %entry = f32[1,64,512]{{2,1,0}} broadcast(%i), dimensions={{}}
  %zero = s32[] constant(0)
  ROOT %dus = {ROWS} dynamic-update-slice(%{root}, %entry, %i, %zero, %zero)
}}"""


def _body(name: str, *lines: str, result: str = "written") -> str:
    state = f"(s32[], {ROWS})"
    middle = "\n".join(f"  {line}" for line in lines)
    return f"""%{name} (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %slot = s32[] get-tuple-element(%s), index=0
  %slots = {ROWS} get-tuple-element(%s), index=1
{middle}
  ROOT %out = {state} tuple(%slot, %{result})
}}"""


def _while(name: str, body: str, *, trips: int | None = None, of: str = "s") -> str:
    count = "" if trips is None else f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    shape = f"(s32[], {ROWS})"
    return f"%{name} = {shape} while(%{of}), condition=%none, body=%{body}{count}"


WRITE = f"%written = {ROWS} fusion(%slots, %slot), kind=kLoop, calls=%written, {CYCLES}"
COPY = f"%turned = {TURNED} copy(%slots), {CYCLES}"
ENTRY = f"  %a = (s32[], {ROWS}) parameter(0)"


def _found(*lines: str, fused: str = "p") -> tuple[Copy, ...]:
    """Finds the copies in a loop of these lines and a write."""
    body = _body("body", *lines, WRITE)
    module = program(f"{ENTRY}\n  {_while('loop', 'body', of='a')}", _in_place(fused), body)
    return find_copies(module, WorkCounter(module), None)


def test_a_copy_of_all_slots_is_named() -> None:
    (found,) = _found(COPY, COPY.replace("%turned", "%again"))
    assert (found.where, found.action, found.shape) == ("loop", "other", "f32[9,64,512]")
    assert (found.num_bytes, found.count, found.cycles) == (BYTES, 2, 2000)


def test_writes_in_place_and_moves_between_memories_are_none() -> None:
    fast = ROWS.replace(")}", ")S(1)}")
    assert _found() == ()
    assert _found(f"%start = ({fast}, {ROWS}, u32[]) copy-start(%slots)") == ()
    (turned,) = _found(f"%start = ({TURNED}, {ROWS}, u32[]) copy-start(%slots)")
    assert (turned.count, turned.cycles) == (1, None)


def test_a_fusion_that_copies_before_it_writes_is_one() -> None:
    (found,) = _found(fused="turned")
    assert (found.count, found.cycles) == (1, 1000)


@pytest.mark.parametrize(
    "other",
    [
        "f32[8,64,512]{2,1,0}",  # no loop carries it
        "f32[64,512]{1,0}",  # an entry
    ],
)
def test_copies_of_other_arrays_are_none(other: str) -> None:
    assert _found(f"%other = {other} copy(%slots)") == ()


def test_copies_outside_loops_are_none() -> None:
    body = _body("body", WRITE)
    entry = f"{ENTRY}\n  {_while('loop', 'body', of='a')}\n  {COPY.replace('%slots', '%loop')}"
    module = program(entry, _in_place(), body)
    assert find_copies(module, WorkCounter(module), None) == ()


def test_places_are_told_apart() -> None:
    """In a tick's input grad, over three layers; around the steady loop; and in it."""

    def send(name: str, scope: str) -> str:
        return (
            f"%{name} = f32[4]{{0}} collective-permute(%slot), channel_id=1, {SWAP}, "
            f'metadata={{op_name="jit(f)/{scope}/ppermute"}}'
        )

    of_layer = f'%made = f32[4]{{0}} negate(%slot), metadata={{op_name="{_scopes.INPUT_GRAD}/neg"}}'
    module = program(
        f"{ENTRY}\n  {_while('ticks', 'tick', trips=7, of='a')}",
        _in_place(),
        _body("layer", of_layer, COPY, WRITE),
        _body("beats", send("swap", _scopes.STEADY), COPY, WRITE),
        _body("run", COPY, _while("steady", "beats", trips=5), f"%written = {ROWS} copy(%turned)"),
        _body(
            "tick",
            send("right", _scopes.RAMP),
            _while("layers", "layer", trips=3),
            _while("once", "run"),
            WRITE,
        ),
    )
    costs = WorkCounter(module)
    loop = find_loop(module, costs)
    assert loop is not None
    assert loop.instruction.name == "steady"
    found = find_copies(module, costs, loop)
    assert {(each.where, each.action): each.count for each in found} == {
        ("tick", "input_grad"): 3,
        ("once", "other"): 2,
        ("steady", "other"): 1,
    }
    assert copies_lines(found)[0] == (
        "3 of a whole slot buffer a tick, in input_grad: f32[9,64,512], 1.12 MiB, 3,000 cycles"
    )


def test_whole_buffers_over_the_link_to_the_host_are_faults() -> None:
    """Though their layouts are the same, as in moves into fast memory and back."""
    on_host = ROWS.replace(")}", ")S(5)}")
    start = f"%start = ({on_host}, {ROWS}, u32[]) copy-start(%slots)"
    (found,) = _found(start, f"%there = {on_host} copy(%slots)")
    assert (found.count, found.is_over_host_link) == (2, True)
    assert "2 of a whole slot buffer over the link to the host" in copies_lines([found])[0]
