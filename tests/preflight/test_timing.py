"""Which collectives are hidden: short programs where a cycle, and a byte, takes a second."""

from typing import Any

import pytest

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.hlo import Module
from dualpipe_jax._preflight.timing import Collective, Replay, exposed_seconds, with_runs
from tests.preflight.snippets import FUSED, LOOP, SWAP, WHILE, A, network, program, work


def start(name: str, operand: str = "a") -> str:
    shape = "(f32[4]{0}, f32[4]{0}, u32[], u32[])"
    return f"  %{name} = {shape} collective-permute-start(%{operand}), {SWAP}"


def done(name: str, of: str) -> str:
    return f"  %{name} = f32[4]{{0}} collective-permute-done(%{of})"


def replay(module: Module, **axes: int) -> list[Collective]:
    return Replay(module, network(**axes)).run(module.entry)


def lines(*text: str, others: tuple[str, ...] = ()) -> Module:
    return program("\n".join([A, *text]), FUSED, *others)


def test_hidden_behind_enough_compute() -> None:
    (permute,) = replay(lines(start("s"), work("w", 16), done("d", "s")))
    assert (permute.kind, permute.name, permute.axes) == ("collective-permute", "s", ("pipe",))
    assert (permute.is_async, permute.num_bytes, permute.count) == (True, 16, 1)
    assert (permute.cycles, permute.compute_seconds, permute.link_seconds) == (16, 16, 16)
    assert permute.exposed_seconds == 0
    assert permute.is_hidden


def test_exposed_behind_too_little() -> None:
    (permute,) = replay(lines(start("s"), work("w", 15), done("d", "s")))
    assert permute.exposed_seconds == 1
    assert permute.is_hidden is False


def test_compute_outside_start_and_done_hides_nothing() -> None:
    module = lines(work("v", 100), start("s"), done("d", "s"), work("w", 100))
    (permute,) = replay(module)
    assert (permute.cycles, permute.exposed_seconds) == (0, 16)


def test_synchronous_is_exposed_whatever_is_around() -> None:
    (permute,) = replay(
        lines(work("v", 99), f"  %p = f32[4]{{0}} collective-permute(%v), {SWAP}", work("w", 99))
    )
    assert (permute.is_async, permute.is_hidden, permute.exposed_seconds) == (False, False, 16)


def test_two_at_once_share_the_links() -> None:
    module = lines(
        start("s"), start("t"), work("w", 20), done("d", "s"), done("e", "t"), work("x", 9)
    )
    first, second = replay(module)
    assert (first.exposed_seconds, second.exposed_seconds) == (0, 12)
    assert first.cycles == second.cycles == 20


def test_two_at_once_on_different_axes_do_not() -> None:
    other = start("t").replace(SWAP, "source_target_pairs={{0,2},{2,0}}")
    module = lines(start("s"), other, work("w", 20), done("d", "s"), done("e", "t"))
    first, second = replay(module, expert=2, pipe=2)
    assert (first.axes, second.axes) == (("pipe",), ("expert",))
    assert (first.exposed_seconds, second.exposed_seconds) == (0, 0)


# A buffer of two slots in the host's memory; a slot is padded to 128 columns, 512 bytes: a second.
SLOTS = "f32[2,1,96]{2,1,0:T(1,128)S(5)}"
HOST = f"  %slots = {SLOTS} parameter(1)"


def fetch(name: str) -> str:
    shape = f"(({SLOTS}, s32[]), f32[1,1,96]{{2,1,0}}, u32[])"
    return f"  %{name} = {shape} dynamic-slice-start(%slots, %i), dynamic_slice_sizes={{1,1,96}}"


def spill(name: str) -> str:
    shape = f"(({SLOTS}, f32[1,1,96]{{2,1,0}}, s32[]), {SLOTS}, u32[])"
    return f"  %{name} = {shape} dynamic-update-slice-start(%slots, %entry, %i)"


def test_copies_to_and_from_the_host_share_its_link_one_way() -> None:
    entry = "  %entry = f32[1,1,96]{2,1,0} parameter(2)\n  %i = s32[] parameter(3)"
    module = lines(
        *(HOST, entry, spill("s"), fetch("f"), fetch("g"), work("w", 1)),
        "  %h = f32[1,1,96]{2,1,0} dynamic-slice-done(%f)",
        f"  %t = {SLOTS} dynamic-update-slice-done(%s)",
        "  %k = f32[1,1,96]{2,1,0} dynamic-slice-done(%g)",
    )
    found = {copy.name: copy for copy in replay(module)}
    assert {copy.kind for copy in found.values()} == {"to host", "from host"}
    assert {copy.num_bytes for copy in found.values()} == {512}
    assert {copy.axes for copy in found.values()} == {()}
    assert all(copy.is_async and copy.is_host_copy for copy in found.values())
    # The second fetch waits for the first one, and not for the spill.
    assert {name: copy.exposed_seconds for name, copy in found.items()} == {"s": 0, "f": 0, "g": 1}


def test_copies_on_gpus_are_asynchronous_fusions() -> None:
    fused = f"""%copied (p: f32[2,1,96], i: s32[]) -> f32[1,1,96] {{
  %p = {SLOTS} parameter(0)
  %j = s32[] parameter(1)
  ROOT %entry = f32[1,1,96]{{2,1,0}} dynamic-slice(%p, %j, %j, %j), dynamic_slice_sizes={{1,1,96}}
}}"""
    module = lines(
        *(HOST, "  %i = s32[] parameter(3)"),
        f"  %s = (({SLOTS}, s32[]), f32[1,1,96]{{2,1,0}}) fusion-start(%slots, %i), calls=%copied",
        *(work("w", 1), "  %d = f32[1,1,96]{2,1,0} fusion-done(%s)"),
        others=(fused,),
    )
    (copy,) = replay(module)
    assert (copy.kind, copy.is_async, copy.exposed_seconds) == ("from host", True, 0)


def test_a_wait_for_one_gives_the_other_time() -> None:
    other = start("t").replace(SWAP, "source_target_pairs={{0,2},{2,0}}")
    module = lines(start("s"), other, done("d", "s"), done("e", "t"))
    assert [each.exposed_seconds for each in replay(module, expert=2, pipe=2)] == [16, 0]


def conditional(*cycles: int, scopes: tuple[str, ...] = ()) -> tuple[str, tuple[str, ...]]:
    """Writes a conditional whose branches take so many cycles, and the branches."""
    names = [f"%branch_{number}" for number in range(len(cycles))]
    branches = [
        f"{name} (b: f32[4]) -> f32[4] {{\n  %b = f32[4]{{0}} parameter(0)\n"
        + work(f"w{number}_{name[1:]}", each, "b").replace("  %", "  ROOT %")
        + (f', metadata={{op_name="{scopes[number]}"}}' if scopes else "")
        + "\n}"
        for number, (name, each) in enumerate(zip(names, cycles, strict=True))
    ]
    called = ", ".join(names)
    operands = ", ".join(["%a"] * (len(cycles) + 1))
    line = f"  %c = f32[4]{{0}} conditional({operands}), branch_computations={{{called}}}"
    return line, tuple(branches)


def places(*cycles: int, scopes: tuple[str, ...] = ()) -> tuple[str, tuple[str, ...]]:
    """Writes loops of which each rank decides itself whether to run them, and their bodies."""
    lines, computations = [], []
    for number, each in enumerate(cycles):
        name = f', metadata={{op_name="{scopes[number]}"}}' if scopes else ""
        computations.append(
            f"%run.{number} (r{number}: f32[4]) -> f32[4] {{\n"
            f"  %r{number} = f32[4]{{0}} parameter(0)\n"
            + work(f"v{number}", each, f"r{number}").replace("  %", "  ROOT %")
            + name
            + f"\n}}\n\n%is_on.{number} (q{number}: f32[4]) -> pred[] {{\n"
            f"  ROOT %q{number} = f32[4]{{0}} parameter(0)\n}}"
        )
        lines.append(
            f"  %p{number} = f32[4]{{0}} while(%a), condition=%is_on.{number}, body=%run.{number}"
        )
    return "\n".join(lines), tuple(computations)


RAMP, ENDS = f"{_scopes.RAMP}/", f"{_scopes.RAMP}/{_scopes.HEAD}/op"
ACTIONS = tuple(
    f"{RAMP}{name}/op" for name in (_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD)
)


@pytest.mark.parametrize("between", [places(30, 20, 99), conditional(30, 20, 99, 0)])
def test_a_rank_hides_a_transfer_behind_its_own_actions_only(
    between: tuple[str, tuple[str, ...]],
) -> None:
    (permute,) = replay(lines(start("s"), between[0], done("d", "s"), others=between[1]))
    # The one that acts and has least to do takes 20; who passes over all waits for the whole time.
    assert (permute.cycles, permute.compute_seconds, permute.exposed_seconds) == (20, 20, 0)
    assert permute.most_exposed_seconds == 16
    assert permute.is_hidden


def test_actions_before_the_start_hide_nothing() -> None:
    """One of two actions runs before the start: the rank that runs it has nothing left."""
    first, others = places(99, 98)
    before, after = first.splitlines()
    (permute,) = replay(lines(before, start("s"), after, done("d", "s"), others=others))
    assert (permute.cycles, permute.exposed_seconds, permute.most_exposed_seconds) == (0, 16, 16)


def test_too_short_an_action_exposes_the_remaining_time() -> None:
    between, others = places(10, 99)
    (permute,) = replay(
        lines(start("s"), work("all", 2), between, done("d", "s"), others=others),
    )
    assert (permute.cycles, permute.exposed_seconds, permute.most_exposed_seconds) == (12, 4, 14)


@pytest.mark.parametrize("make", [places, conditional])
def test_ends_of_a_step_hide_nothing(make: Any) -> None:
    between, others = make(99, 0, scopes=(ENDS, ENDS))
    (permute,) = replay(lines(start("s"), between, done("d", "s"), others=others))
    assert (permute.cycles, permute.exposed_seconds, permute.most_exposed_seconds) == (0, 16, 16)
    # Beside them, actions do.
    between, others = make(99, 18, 20, 22, scopes=(ENDS, *ACTIONS))
    (permute,) = replay(lines(start("s"), between, done("d", "s"), others=others))
    # All ranks run a conditional's cheapest branch; another branch replaces it.
    least = 18 if make is places else 20
    assert (permute.cycles, permute.exposed_seconds) == (least, 0)


def test_all_ranks_run_the_cheapest_branch() -> None:
    between, others = conditional(9, 7)
    (permute,) = replay(lines(start("s"), between, done("d", "s"), others=others))
    assert (permute.cycles, permute.exposed_seconds, permute.most_exposed_seconds) == (9, 7, 9)


def in_branches(*branches: str, called: str = "branch_computations={{{}}}") -> Module:
    """Makes a conditional whose branches have these lines, and a parameter of their number."""
    computations = [
        f"%branch_{number} (b{number}: f32[4]) -> f32[4] {{\n"
        f"  %b{number} = f32[4]{{0}} parameter(0)\n{text}\n"
        f"  ROOT %n{number} = f32[4]{{0}} negate(%b{number})\n}}"
        for number, text in enumerate(branches)
    ]
    names = ", ".join(f"%branch_{number}" for number in range(len(branches)))
    line = f"  ROOT %c = f32[4]{{0}} conditional(%a, %a, %a), {called.format(names)}"
    return lines(line, others=tuple(computations))


def pair(number: int, pairs: str) -> str:
    name = f"s{number}"
    return "\n".join([start(name, f"b{number}").replace(SWAP, pairs), done(f"d{number}", name)])


RIGHT, LEFT = "source_target_pairs={{0,1}}", "source_target_pairs={{1,0}}"


def test_a_trip_takes_one_branch() -> None:
    both = "\n".join(
        [
            start("s2", "b2").replace(SWAP, RIGHT),
            start("s3", "b2").replace(SWAP, RIGHT),
            done("d2", "s2"),
            done("d3", "s3"),
        ]
    )
    found = replay(in_branches("", pair(1, RIGHT), both))
    assert [(each.conditional, each.branch) for each in found] == [("c", 1), ("c", 2), ("c", 2)]
    assert [each.exposed_seconds for each in found] == [16, 16, 16]
    # One of them: of which nothing is known the most expensive, else as often as each is taken.
    assert exposed_seconds(found) == 32
    found = with_runs(found, {"c": (5, 3, 2)})
    assert [each.num_runs for each in found] == [3, 2, 2]
    assert exposed_seconds(found, num_trips=10) == pytest.approx(0.3 * 16 + 0.2 * 32)


def test_both_ways_are_under_way_together() -> None:
    module = lines(
        start("s").replace(SWAP, RIGHT),
        start("t").replace(SWAP, LEFT),
        done("d", "s"),
        done("e", "t"),
    )
    found = replay(module)
    assert [each.exposed_seconds for each in found] == [16, 0]
    assert [each.is_beside_another for each in found] == [False, True]


def test_branches_of_true_and_false_are_numbered() -> None:
    called = "true_computation=%branch_1, false_computation=%branch_0"
    (permute,) = replay(in_branches("", pair(1, RIGHT), called=called))
    assert (permute.conditional, permute.branch) == ("c", 1)


def test_a_loop_between_hides_with_all_its_trips() -> None:
    loop = LOOP.format(inside=work("x", 4), limit="constant(5)")
    loop_lines = WHILE.format(start=0, more="").replace("ROOT ", "")
    (permute,) = replay(lines(start("s"), loop_lines, done("d", "s"), others=(loop,)))
    assert (permute.cycles, permute.exposed_seconds) == (20, 0)


def test_collectives_of_a_loop_inside_count_as_often_as_it_runs() -> None:
    inside = f"  %x = f32[4]{{0}} collective-permute(%a), {SWAP}"
    loop = LOOP.format(inside=inside, limit="constant(5)")
    (permute,) = replay(lines(WHILE.format(start=0, more=""), others=(loop,)))
    assert (permute.count, permute.exposed_seconds) == (5, 16)


def test_generic_asynchronous_form() -> None:
    wrapped = """%wrapped (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-to-all(%q), replica_groups={{0,1}}, dimensions={0}
}"""
    module = lines(
        "  %s = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%a), calls=%wrapped",
        work("w", 8),
        "  %u = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%s)",
        "  %d = f32[4]{0} async-done(%u)",
        others=(wrapped,),
    )
    (exchange,) = replay(module)
    # Half of the 16 bytes goes to the other device.
    assert (exchange.kind, exchange.is_async, exchange.link_seconds) == ("all-to-all", True, 8)
    assert exchange.is_hidden


@pytest.mark.parametrize(("sent", "received"), [("f32[4]", "f32[8]"), ("f32[8]", "f32[4]")])
def test_ragged_all_to_alls_move_no_more_than_fits_in_both_buffers(
    sent: str, received: str
) -> None:
    module = lines(
        f"  %s = {sent}{{0}} constant(0)",
        f"  %t = {received}{{0}} constant(0)",
        "  %z = s32[2]{0} constant({0,0})",
        f"  %u = {received}{{0}} ragged-all-to-all(%s, %t, %z, %z, %z, %z), "
        "replica_groups={{0,1}}",
    )
    (exchange,) = replay(module)
    assert (exchange.kind, exchange.num_bytes) == ("ragged-all-to-all", 16)


# As the TPU compiler writes it: start, done and the compute between are fusions.
FUSION_START = """%gather_start (q: f32[4]) -> (f32[4], f32[8], u32[]) {
  %q = f32[4]{0} parameter(0)
  %all-gather.9 = f32[8]{0} all-gather(%q), replica_groups={{0,1}}, dimensions={0}
  ROOT %c = (f32[4]{0}, f32[8]{0}, u32[]) custom-call(%all-gather.9), custom_call_target="AsyncCollectiveStart"
}"""  # noqa: E501
FUSION_BETWEEN = """%async_collective_fusion.181 (q.1: f32[4]) -> (f32[4], f32[4]) {
  %q.1 = f32[4]{0} parameter(0)
  %all-gather.11 = f32[8]{0} all-gather(%q.1), replica_groups={{0,1}}, dimensions={0}
  %neg = f32[4]{0} negate(%q.1)
  ROOT %t.1 = (f32[4]{0}, f32[4]{0}) tuple(%neg, %q.1)
}"""
FUSION_DONE = """%gather_done (q.2: f32[4]) -> f32[8] {
  %q.2 = f32[4]{0} parameter(0)
  %all-gather.13 = f32[8]{0} all-gather(%q.2), replica_groups={{0,1}}, dimensions={0}
  ROOT %c.2 = f32[8]{0} custom-call(%q.2, %all-gather.13), custom_call_target="AsyncCollectiveDone"
}"""


@pytest.mark.parametrize(("cycles", "exposed"), [(20, 0), (10, 6)])
def test_asynchronous_fusions(cycles: int, exposed: int) -> None:
    between = work("fusion.181", cycles, "g", "(f32[4]{0}, f32[4]{0})")
    module = lines(
        "  %start = (f32[4]{0}, f32[8]{0}, u32[]) fusion(%a), kind=kCustom, calls=%gather_start",
        "  %g = f32[4]{0} get-tuple-element(%start), index=0",
        between.replace("calls=%fused", "calls=%async_collective_fusion.181"),
        "  %h = f32[4]{0} get-tuple-element(%fusion.181), index=1",
        "  %done = f32[8]{0} fusion(%h), kind=kCustom, calls=%gather_done",
        others=(FUSION_START, FUSION_BETWEEN, FUSION_DONE),
    )
    (gather,) = replay(module)
    assert (gather.kind, gather.name, gather.is_async) == ("all-gather", "start", True)
    # The 32 bytes of the result, of which a device has half.
    assert (gather.num_bytes, gather.link_seconds) == (32, 16)
    assert (gather.cycles, gather.exposed_seconds) == (cycles, exposed)


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter() -> None:
    fused = """%all-reduce-scatter.1 (q: f32[4]) -> f32[2] {
  %q = f32[4]{0} parameter(0)
  %all-reduce.1 = f32[4]{0} all-reduce(%q), replica_groups={{0,1}}, to_apply=%add
  ROOT %slice = f32[2]{0} slice(%all-reduce.1), slice={[0:2]}
}"""
    line = "  %f = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"
    (scatter,) = replay(lines(line, others=(fused,)))
    assert (scatter.kind, scatter.is_async, scatter.link_seconds) == ("reduce-scatter", False, 8)
