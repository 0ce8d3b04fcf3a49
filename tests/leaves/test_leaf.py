"""The record of a leaf: how users' trees decide it, and how a gradient leaves the step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from dualpipe_jax._leaves.gradient import GradIndex, accumulated, make_gradients, pick_accumulated
from dualpipe_jax._leaves.leaf import Leaf, make_leaves
from dualpipe_jax._leaves.pick import pick, put_leaves
from dualpipe_jax._leaves.rules import LARGEST, SUM
from dualpipe_jax._leaves.specs import StepAxes

PARAMS = {
    "ends": {"table": jnp.ones((8, 4)), "count": jnp.ones(3, jnp.int32)},
    "blocks": {"w": jnp.ones((4, 8, 8)), "scale": jnp.ones((4, 1))},
}


def leaves_of(num_layers: int = 4, **trees: Any) -> Any:
    mesh = jax.make_mesh((2, 2, 2), ("pipe", "data", "model"), devices=jax.devices()[:8])
    blocks = jax.tree.map(lambda leaf: jnp.ones((num_layers, *leaf.shape[1:])), PARAMS["blocks"])
    given = {"trainable": True, "overwrite": None, "param_specs": None, "grad_specs": None}
    return make_leaves(
        {**PARAMS, "blocks": blocks},
        StepAxes(mesh=mesh, axis="pipe", batch_axes=("data",), manual_axes=("model",)),
        **{**given, **trees},
    )


def test_axes_are_divided_among_those_who_use_them() -> None:
    """The model sees parts over model; the step gathers over data and pipe, or scatters more."""
    specs = {
        "ends": {"table": P("pipe"), "count": None},
        "blocks": {"w": P(None, ("model", "data")), "scale": None},
    }
    leaves = leaves_of(param_specs=specs, grad_specs={"ends": P(("pipe", "data")), "blocks": None})
    table, w = leaves["ends"]["table"], leaves["blocks"]["w"]
    assert (table.spec, table.gather_dims) == (P(None, None), {0: ("pipe",)})
    assert (table.in_spec, table.out_spec) == (P("pipe", None), P(("pipe", "data"), None))
    assert table.sum_axes == ("pipe", "data")
    assert (w.spec, w.gather_dims) == (P(None, "model", None), {1: ("data",)})
    assert w.in_spec == w.out_spec == P("pipe", ("model", "data"), None)
    assert w.sum_axes == ("data",)
    assert w.varies_over == ("model",)
    assert w.name == "params['blocks']['w']"


@pytest.mark.parametrize(("num_layers", "lead"), [(4, "pipe"), (3, None)])
def test_layers_are_sharded_if_they_divide(num_layers: int, lead: str | None) -> None:
    w = leaves_of(num_layers)["blocks"]["w"]
    assert w.in_spec == w.out_spec == P(lead, None, None)


def test_a_gradient_leaves_the_step_as_its_leaf_wants() -> None:
    trainable = {"ends": True, "blocks": {"w": True, "scale": False}}
    leaves = leaves_of(trainable=trainable, overwrite={"ends": True, "blocks": False})
    half = jnp.bfloat16
    table: Leaf = leaves["ends"]["table"]
    w: Leaf = leaves["blocks"]["w"]
    scale: Leaf = leaves["blocks"]["scale"]
    count: Leaf = leaves["ends"]["count"]
    options = {"dtype": jnp.float32, "loss_scale": jnp.float32(4)}
    value, grad = jnp.ones(2, half), jnp.full(2, 8.0)
    new = table.finish(value, grad, **options)
    assert (new.dtype, new.tolist()) == (half, [8, 8])  # it becomes the leaf
    assert w.finish(value, grad, **options).tolist() == [2, 2]
    frozen = scale.finish(value, None, **options)
    assert (frozen.dtype, frozen.tolist()) == (jnp.float32, [0, 0])
    assert count.finish(PARAMS["ends"]["count"], None, **options).dtype == jax.dtypes.float0
    assert [leaf.out_spec for leaf in (scale, count)] == [None, None]
    assert (table.rule, w.rule) == (LARGEST, SUM)


def test_entries_count_the_leaves_that_are_added_up() -> None:
    """Outside of blocks all that are wanted, of layers those that a block uses."""
    leaves = leaves_of()
    by_kind = {**leaves, "blocks": {None: leaves["blocks"]}}
    table, w = leaves["ends"]["table"], leaves["blocks"]["w"]
    scale = leaves["blocks"]["scale"]
    uses = [([table], [("model",)]), ([table], [None]), ([scale, w], [None, ("model",)])]
    gradients = make_gradients(by_kind, uses)
    assert [g.leaf for g in accumulated(gradients)] == [w, table]
    assert [g.entry for g in jax.tree.leaves(gradients)] == [None, 0, None, 0]
    assert [g.reduce_axes for g in accumulated(gradients)] == [("model",), ("model",)]
    assert pick_accumulated(gradients["ends"], PARAMS["ends"])[0] is PARAMS["ends"]["table"]
    of_layer = GradIndex.of(accumulated(gradients["blocks"]))
    assert of_layer == GradIndex(layer=(0,), shared=(), rules=(SUM,))
    # Uses that are summed over other axes cannot wait for one sum.
    gradients = make_gradients(by_kind, [([table], [("model",)]), ([table], [("data",)])])
    assert gradients["ends"]["table"].reduce_axes == ()


def test_picked_leaves_are_put_back() -> None:
    tree = {"a": np.ones(2), "b": np.ones(2, int), "c": np.zeros(3)}
    a, c = pick(tree)
    assert a is tree["a"]
    assert c is tree["c"]
    changed = put_leaves(tree, ["a", "c"])
    assert changed == {"a": "a", "b": tree["b"], "c": "c"}
    assert put_leaves(tree, ["b"], {"a": False, "b": True, "c": False})["b"] == "b"
