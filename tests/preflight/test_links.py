"""How many bytes go over the most loaded link."""

import pytest

from dualpipe_jax._devices import H100
from dualpipe_jax._preflight.hlo import Instruction
from dualpipe_jax._preflight.links import Network, groups
from tests.preflight.snippets import TOY, A, network, program


def collective(attributes: str, opcode: str = "collective-permute") -> Instruction:
    return program(f"{A}\n  ROOT %c = f32[4]{{0}} {opcode}(%a), {attributes}").entry.root


def seconds(attributes: str, kind: str = "collective-permute", **axes: int) -> float | None:
    return network(**axes).seconds(kind, collective(attributes, kind), 16)


def test_swaps_of_neighbours_take_a_link_each_way() -> None:
    assert seconds("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", pipe=4) == 16


def test_a_shift_takes_each_link_once() -> None:
    assert seconds("source_target_pairs={{0,1},{1,2},{2,3}}", pipe=4) == 16


def test_a_mirror_crosses_the_middle_link_many_times() -> None:
    pairs = "source_target_pairs={{0,3},{3,0},{1,2},{2,1}}"
    assert seconds(pairs, pipe=4) == 2 * 16


def test_lines_beside_each_other_share_no_link() -> None:
    pairs = "source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}"
    assert seconds(pairs, pipe=2, expert=4) == 16
    assert network(pipe=2, expert=4).axes_of(collective(pairs)) == ("pipe",)


def test_nothing_moves_without_pairs() -> None:
    assert seconds("source_target_pairs={}", pipe=4) == 0
    assert seconds("source_target_pairs={{0,0},{1,1}}", pipe=4) == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 16 * 3 / 4),
        ("reduce-scatter", 16 * 3 / 4),
        ("all-reduce", 2 * 16 * 3 / 4),
        # Two chips send a quarter of their bytes to each of two beyond the middle link.
        ("all-to-all", 2 * 2 * 16 / 4),
    ],
)
def test_groups_on_a_line(kind: str, expected: float) -> None:
    assert seconds("replica_groups={{0,1,2,3},{4,5,6,7}}", kind, pipe=2, expert=4) == expected


def test_a_switch_has_no_middle() -> None:
    switched = Network(axes={"expert": 4}, device=H100)
    exchange = collective("replica_groups={{0,1,2,3}}", "all-to-all")
    assert switched.seconds("all-to-all", exchange, 450 * 10**9) == pytest.approx(3 / 4)
    mirror = collective("source_target_pairs={{0,3},{3,0},{1,2},{2,1}}")
    assert switched.seconds("collective-permute", mirror, 450 * 10**9) == pytest.approx(1)


def test_nothing_is_said_of_unknown_links() -> None:
    unknown = Network(axes={"pipe": 2}, device=None)
    assert unknown.seconds("all-reduce", collective("", "all-reduce"), 16) is None


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", ((0, 2, 1, 3),)),
        ("replica_groups=mesh['a'=1,'b'=4] {'a'}", ((0,), (1,), (2,), (3,))),
        (
            "replica_groups=mesh['_0'=1,'_1'=2,'_2'=2], device_ids=([2,2]T(1,0)) {'_1'}, dim={1}",
            ((0, 1), (2, 3)),
        ),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", ((3, 1), (2, 0))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_groups_are_read(attributes: str, expected: tuple[tuple[int, ...], ...]) -> None:
    assert groups(collective(attributes, "all-reduce"), 4) == expected


@pytest.mark.parametrize("text", ["mesh(a=2)", "[2,2]", "mesh['a'=4], {'a'}"])
def test_groups_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="whose groups of devices cannot be read"):
        groups(collective(f"replica_groups={text}", "all-reduce"), 4)


def test_axes_of_groups() -> None:
    both = Network(axes={"pipe": 2, "expert": 2}, device=TOY)
    axes = [
        both.axes_of(collective(f"replica_groups={text}", "all-reduce"))
        for text in ("{{0,1},{2,3}}", "{{0,2},{1,3}}", "{{0,1,2,3}}")
    ]
    assert axes == [("expert",), ("pipe",), ("pipe", "expert")]
