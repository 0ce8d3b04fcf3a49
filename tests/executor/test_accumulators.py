"""Where gradients are added up, and those of two actions at once."""

import jax.numpy as jnp
import numpy as np

from dualpipe_jax._executor.accumulators import LayerGrads, Places, add, either, put, take
from dualpipe_jax._leaves.rules import LARGEST, SUM
from dualpipe_jax._model.kinds import Kind

EARLY: dict[Kind, Places] = {"a": Places(layer=(0, 2), shared=(1,), rules=(SUM, SUM))}
LATE: dict[Kind, Places] = {"a": Places(layer=(1, 2), shared=(0, 1), rules=(LARGEST, SUM))}


def test_places_of_either_are_those_of_both() -> None:
    assert either(EARLY, LATE) == {
        "a": Places(layer=(0, 1, 2), shared=(0, 1), rules=(SUM, LARGEST, SUM))
    }


def test_both_are_added_to_what_was_taken_once() -> None:
    """A leaf of which each has a part, and one of shared, get the sum of the two."""
    layers: LayerGrads = {"a": [[jnp.zeros(2), jnp.full(2, 10.0 * i)] for i in range(3)]}
    shared = [jnp.zeros(2), jnp.ones(2), jnp.full(2, 5.0)]
    both = either(EARLY, LATE)
    taken, of_shared = take(layers, shared, both)
    mine = taken["a"]
    for places, gradients in ((EARLY, [1.0, 2.0, 3.0]), (LATE, [4.0, 5.0, 6.0, 7.0])):
        values = [jnp.full(2, each) for each in gradients]
        mine, of_shared = add(mine, of_shared, values, places=places["a"], layer=1, taken=both["a"])
    layers, shared = put(layers, shared, both, ({"a": mine}, of_shared))
    assert [float(total[1][0]) for total in layers["a"]] == [1.0, 10.0, 20.0 + 2.0 + 5.0]
    assert all(not np.asarray(total[0]).any() for total in layers["a"])
    assert [float(each[0]) for each in shared] == [6.0, 1.0 + 3.0 + 7.0, 5.0]
