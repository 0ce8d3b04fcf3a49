"""Where gradients are added up, and those of two actions at once."""

import jax.numpy as jnp
import numpy as np

from dualpipe_jax._executor.accumulators import Places, either
from dualpipe_jax._executor.state import add_gradients
from dualpipe_jax._leaves.rules import LARGEST, SUM
from dualpipe_jax._model.kinds import Kind

EARLY: dict[Kind, Places] = {"a": Places(layer=(0, 2), shared=(1,), rules=(SUM, SUM))}
LATE: dict[Kind, Places] = {"a": Places(layer=(1, 2), shared=(0, 1), rules=(LARGEST, SUM))}


def test_places_of_either_are_those_of_both() -> None:
    assert either(EARLY, LATE) == {
        "a": Places(layer=(0, 1, 2), shared=(0, 1), rules=(SUM, LARGEST, SUM))
    }


def test_each_adds_to_its_sums() -> None:
    """A leaf of which each has a part, and one of shared, get the sum of the two."""
    sums = {i: [jnp.zeros(2), jnp.full(2, 10.0 * i)] for i in range(3)}
    shared = {0: jnp.zeros(2), 1: jnp.ones(2)}
    for places, gradients in ((EARLY, [1.0, 2.0, 3.0]), (LATE, [4.0, 5.0, 6.0, 7.0])):
        values = [jnp.full(2, each) for each in gradients]
        sums, shared = add_gradients(sums, shared, values, places["a"], 1)
    assert [float(total[1][0]) for total in sums.values()] == [1.0, 10.0, 20.0 + 2.0 + 5.0]
    assert all(not np.asarray(total[0]).any() for total in sums.values())
    assert [float(each[0]) for each in shared.values()] == [6.0, 1.0 + 3.0 + 7.0]
