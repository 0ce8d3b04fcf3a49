"""Transfers between slices of TPUs: how they are read, and how long they take."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dualpipe_jax._preflight.collectives import find_collectives
from dualpipe_jax._preflight.hlo import Module
from dualpipe_jax._preflight.links import Network, groups, source_target_pairs
from dualpipe_jax._preflight.slices import Slices, join_slices
from dualpipe_jax._preflight.text import collective_rows
from dualpipe_jax._preflight.timing import Collective, Replay
from tests.preflight.snippets import FUSED, TOY, A, program, work

# Two slices of two hosts of two chips, not in the order of their ids: pipe goes across.
IDS = (100000, 100001, 100003, 100002, 200000, 200001, 200003, 200002)
SLICES = Slices(((0, 1, 2, 3), (4, 5, 6, 7)), {number: place for place, number in enumerate(IDS)})
NETWORK = Network(
    axes={"pipe": 4, "data": 2}, device=TOY, hosts=(0, 0, 1, 1, 2, 2, 3, 3), dcn=8.0, host_link=1.0
)
RIGHT = "{{100002->200001},{100003->200000}}"  # between ranks 1 and 2
LEFT = "{{200000->100003},{200001->100002}}"
ALL = '"{1,2}x{0:3}"'


def transfer(
    name: str, kind: str, target: str, *, operand: str = "a", size: int = 4, received: int = 4
) -> str:
    """Writes a send and a recv."""
    attributes = (
        "is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="
        f'"{name}_0",_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
    )
    return f"""  %token.{name} = token[] after-all()
  %send.{name} = (f32[{size}]{{0}}, u32[], token[]) send(%{operand}, %token.{name}), {attributes}
  %recv.{name} = (f32[{received}]{{0}}, u32[], token[]) recv(%token.{name}), {attributes}"""


def dones(name: str) -> str:
    return f"""  %sent.{name} = token[] send-done(%send.{name}), is_host_transfer=true
  %received.{name} = (f32[4]{{0}}, token[]) recv-done(%recv.{name}), is_host_transfer=true"""


def joined(*lines: str, others: tuple[str, ...] = (FUSED,)) -> Module:
    return join_slices(program("\n".join(lines), *others), SLICES)


def run(*lines: str, network: Network = NETWORK) -> dict[str, Collective]:
    module = joined(*lines)
    return {one.name: one for one in Replay(module, network).run(module.entry)}


def test_slices_are_read_off_the_devices_of_a_mesh() -> None:
    devices = [SimpleNamespace(id=number, slice_index=number // 100000 - 1) for number in IDS]
    assert Slices.of(devices) == SLICES
    inner = Slices.of([devices[place] for place in (0, 4, 1, 5)])
    assert inner.members == ((0, 2), (1, 3))
    module = program(f"{A}\n{work('x', 1)}", FUSED)
    assert join_slices(module, Slices.of([SimpleNamespace(id=0), SimpleNamespace(id=1)])) is module


def test_a_permute_starts_with_its_send_and_is_awaited_with_its_recv() -> None:
    permute = run(A, transfer("p", "ONE_TO_ONE", RIGHT), work("x", 3), dones("p"))["send.p"]
    assert (permute.kind, permute.axes) == ("collective-permute", ("pipe",))
    assert permute.across_slices
    assert permute.is_async
    assert permute.num_bytes == 16
    # One host sends for both of its chips: 2 x 16 bytes at 8 bytes a second.
    assert permute.link_seconds == 4
    assert permute.compute_seconds == 3
    assert permute.exposed_seconds == 1
    [row] = collective_rows([permute])
    assert row[0] == "collective-permute across slices"


@pytest.mark.parametrize(
    ("kind", "found", "received", "num_bytes", "seconds"),
    [
        # Each of a host's two chips sends and receives a share: 2 x share / 8 bytes a second.
        ("ALL_REDUCE", "all-reduce", 4, 16, 2 * 16 / 8),
        ("ALL_GATHER", "all-gather", 8, 32, 2 * 16 / 8),
        ("REDUCE_SCATTER", "reduce-scatter", 2, 16, 2 * 8 / 8),
        ("ALL_TO_ALL", "all-to-all", 4, 16, 2 * 8 / 8),
    ],
)
def test_a_collective_among_slices(
    kind: str, found: str, received: int, num_bytes: int, seconds: float
) -> None:
    one = run(A, transfer("c", kind, ALL, received=received), dones("c"))["send.c"]
    assert (one.kind, one.axes, one.num_bytes) == (found, ("pipe",), num_bytes)
    assert one.link_seconds == seconds
    assert one.exposed_seconds == seconds


def test_groups_of_devices_are_read() -> None:
    for target in (ALL, "{{100000,200000},{100001,200001},{100003,200003},{100002,200002}}"):
        module = joined(A, transfer("c", "ALL_REDUCE", target), dones("c"))
        [found] = find_collectives(module, module.entry)
        assert set(groups(found.collective, 8)) == {(0, 4), (1, 5), (2, 6), (3, 7)}


def test_transfers_out_of_one_host_queue_and_others_do_not() -> None:
    again, back = transfer("q", "ONE_TO_ONE", RIGHT), transfer("q", "ONE_TO_ONE", LEFT)
    first = transfer("p", "ONE_TO_ONE", RIGHT)
    queued = run(A, first, again, dones("p"), dones("q"))
    assert [one.exposed_seconds for one in queued.values()] == [4, 4]
    both_ways = run(A, first, back, dones("p"), dones("q"))
    assert [one.exposed_seconds for one in both_ways.values()] == [4, 0]


def test_nothing_is_known_of_a_network_that_is_not_published() -> None:
    lines = A, transfer("p", "ONE_TO_ONE", RIGHT), dones("p")
    one = run(*lines, network=replace(NETWORK, dcn=None))["send.p"]
    assert one.link_seconds is one.exposed_seconds is None
    assert run(*lines, network=replace(NETWORK, dcn=16.0))["send.p"].link_seconds == 2


def test_collectives_inside_slices_are_those_of_all_of_them() -> None:
    module = joined(A, "  ROOT %s = f32[4]{0} all-reduce(%a), replica_groups={{0,2},{1,3}}")
    assert groups(module.entry.root, 8) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert NETWORK.axes_of(module.entry.root) == ("pipe",)
    module = joined(A, "  ROOT %p = f32[4]{0} collective-permute(%a), source_target_pairs={{1,0}}")
    assert source_target_pairs(module.entry.root) == ((1, 0), (5, 4))


_STEADY = 'metadata={op_name="jit(f)/dualpipe.beat.0/dualpipe.steady/dualpipe.forward/dot"}'
_LOCALIZER = """%localizer{of} (l{of}: f32[4]) -> f32[4] {{
  %l{of} = f32[4]{{0}} parameter(0)
  ROOT %p{of} = f32[4]{{0}} collective-permute(%l{of}), source_target_pairs={{{pairs}}}
}}"""


def test_a_permute_that_differs_from_slice_to_slice_is_one_permute_of_the_mesh() -> None:
    localizers = tuple(
        _LOCALIZER.format(of=of, pairs=pairs) for of, pairs in (("", "{0,2},{1,3}"), (".1", ""))
    )
    by_slice = """  %slice = s32[] custom-call(), custom_call_target="SliceId"
  ROOT %c = f32[4]{0} conditional(%slice, %b, %b), branch_computations={%localizer, %localizer.1}"""
    made = f"  %b = f32[4]{{0}} negate(%a), {_STEADY}"
    module = joined(A, made, by_slice, others=localizers)
    [one] = Replay(module, NETWORK).run(module.entry)
    assert (one.kind, one.axes, one.conditional) == ("collective-permute", ("pipe",), None)
    assert not one.is_async
    assert not one.across_slices
    assert source_target_pairs(module.entry.root) == ((0, 2), (1, 3))
    # The compiler drops its name; it is a transfer between ranks in a beat.
    assert one.op_name.startswith("jit(f)/dualpipe.beat.0/dualpipe.steady/")
    assert one.op_name.endswith("/dualpipe.send/ppermute")


def test_other_collectives_belong_to_the_action_that_makes_or_uses_them() -> None:
    made = f"  %b = f32[4]{{0}} negate(%a), {_STEADY}"
    used = f"  ROOT %x = f32[4]{{0}} negate(%received.g), {_STEADY}"
    summed = run(A, made, transfer("s", "ALL_REDUCE", ALL, operand="b"), dones("s"))["send.s"]
    gathered = run(A, transfer("g", "ALL_GATHER", ALL, received=8), dones("g"), used)["send.g"]
    for one in (summed, gathered):
        assert one.op_name.endswith("dualpipe.forward/dot")


@pytest.mark.parametrize(("kind", "target"), [("MANY_TO_ONE", ALL), ("ALL_REDUCE", "{}")])
def test_transfers_that_cannot_be_read(kind: str, target: str) -> None:
    with pytest.raises(ValueError, match="transfers between slices cannot be read"):
        joined(A, transfer("c", kind, target))
