"""The minimum cut: graphs whose best cut is known, and all small graphs against brute force."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from dualpipe_jax._split_vjp.cut import minimum_cut
from dualpipe_jax._split_vjp.graph import Constant, Node, When


def node(outputs, inputs, name="redo"):
    """Makes a node: "keep" in its name admits the first phase, "redo" the second."""
    return Node(
        name=name,
        run=lambda *_: (),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        when=When.FORWARD,
    )


def cut(nodes, wanted, sizes, *, free=(), prefer_late=False):
    return minimum_cut(
        nodes,
        wanted=wanted,
        can_keep=lambda n: "keep" in n.name,
        can_redo=lambda n: "redo" in n.name,
        size=lambda v: sizes[v],
        is_free=lambda v: v in free,
        prefer_late=prefer_late,
    )


BOTH = "keep redo"


def test_keeps_the_narrowest_value_of_a_chain():
    # 0 (100 bytes) -> 1 (100) -> 2 (10) -> 3 (50)
    chain = [node([1], [0], BOTH), node([2], [1], BOTH), node([3], [2], BOTH)]
    assert cut(chain, [3], [100, 100, 10, 50]) == {2}
    assert cut(chain, [3], [5, 100, 10, 50]) == {0}
    assert cut(chain, [3], [100, 100, 100, 50]) == {3}


def test_among_equal_cuts_prefers_as_asked():
    chain = [node([1], [0], BOTH), node([2], [1], BOTH)]
    assert cut(chain, [2], [8, 8, 8], prefer_late=False) == {0}
    assert cut(chain, [2], [8, 8, 8], prefer_late=True) == {2}


def test_nodes_that_cannot_run_late_are_kept_and_those_that_cannot_run_early_are_not():
    chain = [node([1], [0], "keep"), node([2], [1], "redo"), node([3], [2], BOTH)]
    assert cut(chain, [3], [1, 100, 1, 1]) == {1}


def test_a_value_after_a_late_node_cannot_be_kept():
    # 3 is small, but its producer reads 2, which only the second phase makes.
    chain = [node([1], [0], BOTH), node([2], [1], "redo"), node([3], [2], BOTH)]
    assert cut(chain, [3], [100, 90, 1, 1]) == {1}


def test_values_at_hand_cost_nothing():
    nodes = [node([2], [0, 1], BOTH), node([3], [2, 1], BOTH)]
    assert cut(nodes, [3], [50, 1000, 40, 60], free={1}) == {2}
    assert cut(nodes, [3], [50, 1000, 40, 60], free={0, 1}) == set()
    assert cut(nodes, [3, 1], [1, 1, 1, 1], free={3, 1}) == set()
    assert cut(nodes, [], [1, 1, 1, 1]) == set()


def test_a_node_without_inputs_can_be_made_anywhere():
    assert cut([node([0], [], BOTH), node([1], [0, Constant(3)], BOTH)], [1], [10, 10]) == set()


def test_a_shared_input_is_kept_once():
    # Both wanted values are made of 0; by itself each is cheaper than it, together they are not.
    nodes = [node([1], [0], BOTH), node([2], [0], BOTH)]
    assert cut(nodes, [1], [30, 20, 20]) == {1}
    assert cut(nodes, [1, 2], [30, 20, 20]) == {0}


def test_outputs_of_one_node_are_kept_one_by_one():
    nodes = [node([1, 2], [0], "keep"), node([3], [1, 2], BOTH)]
    assert cut(nodes, [3], [1, 20, 20, 100]) == {1, 2}
    assert cut(nodes, [3, 1], [1, 20, 20, 10]) == {1, 3}


def test_a_wanted_input_is_kept():
    assert cut([node([1], [0], BOTH)], [0, 1], [10, 1]) == {0}


@pytest.mark.parametrize("unit", [1, 10**3, 10**9])
def test_sizes_of_any_scale(unit):
    # An accelerator's activations sum up to more than an int32 holds.
    chain = [node([i + 1], [i], BOTH) for i in range(20)]
    sizes = [(100 - i) * unit for i in range(21)]
    assert cut(chain, [20], sizes) == {20}
    sizes[7] = 3 * unit
    assert cut(chain, [20], sizes) == {7}


def test_many_forced_values_do_not_overflow():
    nodes = [node([i], [], "keep") for i in range(3000)]
    assert cut(nodes, range(3000), [2**33] * 3000) == set(range(3000))


@st.composite
def graphs(draw):
    """Draws nodes over at most 9 values, sizes, wanted values, and values at hand."""
    num_inputs = draw(st.integers(1, 3))
    nodes, num_values = [], num_inputs
    for _ in range(draw(st.integers(1, 5))):
        inputs = draw(st.lists(st.integers(0, num_values - 1), max_size=3))
        num_outputs = draw(st.integers(1, 2)) if num_values < 8 else 1
        name = draw(st.sampled_from([BOTH, BOTH, "keep", "redo"]))
        nodes.append(node(range(num_values, num_values + num_outputs), inputs, name))
        num_values += num_outputs
    values = st.integers(0, num_values - 1)
    sizes = draw(st.lists(st.integers(1, 20), min_size=num_values, max_size=num_values))
    wanted = draw(st.sets(values, min_size=1, max_size=3))
    return nodes, wanted, sizes, draw(st.sets(values, max_size=2))


def is_enough(kept, nodes, wanted, free):
    """Whether the second phase can make `wanted` of the residuals and the values at hand."""
    made = set(kept) | set(free)
    for n in nodes:
        if "redo" in n.name and made.issuperset(n.reads):
            made.update(n.outputs)
    return made.issuperset(wanted)


def keepable(nodes, num_values, free):
    """Lists the values that the earlier phase can make: it has the inputs, and those at hand."""
    late = set()
    for n in nodes:
        if "keep" not in n.name or late.intersection(n.reads):
            late.update(n.outputs)
    return [v for v in range(num_values) if v not in late and v not in free]


@hypothesis.settings(deadline=None, max_examples=150, derandomize=True)
@hypothesis.given(graphs(), st.booleans())
def test_no_choice_is_cheaper(graph, prefer_late):
    nodes, wanted, sizes, free = graph
    choices = keepable(nodes, len(sizes), free)
    # The cost as documented: bytes, and one more for each value.
    costs = {
        kept: sum(sizes[v] + 1 for v in kept)
        for r in range(len(choices) + 1)
        for kept in itertools.combinations(choices, r)
        if is_enough(kept, nodes, wanted, free)
    }
    hypothesis.assume(costs)
    kept = cut(nodes, wanted, sizes, free=free, prefer_late=prefer_late)
    assert set(kept) <= set(choices)
    assert is_enough(kept, nodes, wanted, free)
    assert sum(sizes[v] + 1 for v in kept) == min(costs.values())
