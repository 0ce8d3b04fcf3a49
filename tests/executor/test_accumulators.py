"""Where gradients are added up, and those of two actions at once."""

import jax.numpy as jnp
import numpy as np

from dualpipe_jax._executor.state import add_gradients
from dualpipe_jax._leaves.gradient import GradIndex
from dualpipe_jax._leaves.rules import LARGEST, SUM

WITH_INPUT_GRAD = GradIndex(layer=(0, 2), shared=(1,), rules=(SUM, SUM))
WITH_WEIGHT_GRAD = GradIndex(layer=(1, 2), shared=(0, 1), rules=(LARGEST, SUM))


def test_entries_of_either_are_those_of_both() -> None:
    want = GradIndex(layer=(0, 1, 2), shared=(0, 1), rules=(SUM, LARGEST, SUM))
    assert WITH_INPUT_GRAD.join(WITH_WEIGHT_GRAD) == want


def test_each_adds_to_its_sums() -> None:
    """A leaf of which each has a part, and one of shared, get the sum of the two."""
    sums = {i: [jnp.zeros(2), jnp.full(2, 10.0 * i)] for i in range(3)}
    shared = {0: jnp.zeros(2), 1: jnp.ones(2)}
    for index, gradients in (
        (WITH_INPUT_GRAD, [1.0, 2.0, 3.0]),
        (WITH_WEIGHT_GRAD, [4.0, 5.0, 6.0, 7.0]),
    ):
        values = [jnp.full(2, each) for each in gradients]
        sums, shared = add_gradients(sums, shared, values, index, 1)
    assert [float(total[1][0]) for total in sums.values()] == [1.0, 10.0, 20.0 + 2.0 + 5.0]
    assert all(not np.asarray(total[0]).any() for total in sums.values())
    assert [float(each[0]) for each in shared.values()] == [6.0, 1.0 + 3.0 + 7.0]
