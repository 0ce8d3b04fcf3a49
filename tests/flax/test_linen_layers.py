"""The functions each way between a Flax model's parameters and canonical ones.

That gradients and a TrainState go through them is in test_linen.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import dualpipe_jax as dpj
from tests.flax.linen_models import Model, tokens_of
from tests.models import assert_close


def test_an_optimizer_that_masks_parameters_is_converted() -> None:
    params = Model().init(jax.random.key(0), tokens_of(2))["params"]

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "frozen" if "layers" in str(path) or "blocks" in str(path) else "free",
            params,
        )

    tx = optax.multi_transform({"free": optax.adam(0.1), "frozen": optax.sgd(0.1, 0.9)}, labels)
    canonical = dpj.linen.to_canonical(params, "layers_{}")
    pair = dpj.linen.to_canonical((params, tx.init(params)), "layers_{}")
    want = canonical, tx.init(canonical)
    assert jax.tree.structure(pair) == jax.tree.structure(want)
    assert jax.tree.map(jnp.shape, pair) == jax.tree.map(jnp.shape, want)
    assert_close(dpj.linen.to_flax(pair, "layers_{}"), (params, tx.init(params)), tolerance=0)
    whole = optax.masked(optax.adam(0.1), {"ends": False, "blocks": True})
    with pytest.raises(ValueError, match=r"got MaskedNode.*a mask with the structure of params"):
        dpj.linen.to_flax(whole.init(canonical), "layers_{}")
    no_blocks = optax.masked(optax.adam(0.1), {"ends": True, "blocks": False}).init(canonical)
    with pytest.raises(ValueError, match=r"in all leaves of blocks; got \[\]"):
        dpj.linen.to_flax(no_blocks, "layers_{}")


@pytest.mark.parametrize(
    ("tree", "layers", "message"),
    [
        ({"h_0": {}, "norm": 1.0}, "layers_{}", r"found none under \['h_0', 'norm'\]"),
        ({"h_0": {}, "h_2": {}}, "h_{}", "of 2 layers these are missing: h_1"),
        ({"h_0": {"w": 1.0}, "h_1": {"v": 1.0}}, "h_{}", "must have the same parameters"),
        ({}, "h_{}_{}", "layers='h_{}_{}': must be the name"),
        ({}, "h_{}/mlp", "layers='h_{}/mlp': must be the name"),
    ],
)
def test_layers_that_are_not_there_are_named(tree: Any, layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpj.linen.to_canonical(tree, layers)


def test_entries_of_ends_under_names_of_layers_are_not_lost() -> None:
    tree = {"ends": {"h_1": 1.0, "norm": 2.0}, "blocks": {"w": jnp.ones((3, 2))}}
    with pytest.raises(
        ValueError, match='"ends" has entries under the names of layers, h_1, which'
    ):
        dpj.linen.to_flax(tree, "h_{}")
    assert set(dpj.linen.to_flax(tree, "layer_{}")) == {
        "h_1",
        "norm",
        "layer_0",
        "layer_1",
        "layer_2",
    }


def test_arguments_of_the_functions_each_way_must_fit() -> None:
    tree = {"h_0": {"w": jnp.ones(2)}, "h_1": {"w": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"has 1 names for the 2 layers 'h_{}'"):
        dpj.linen.to_canonical(tree, "h_{}", layout=("a",))
    with pytest.raises(ValueError, match="cannot be in one stack, 'h'"):
        dpj.linen.to_canonical(tree, "h", layout=("a",))
    with pytest.raises(ValueError, match="dim=1: must be 0 for separate layers"):
        dpj.linen.to_canonical(tree, "h_{}", dim=1)
    with pytest.raises(ValueError, match="must hold a result of to_canonical"):
        dpj.linen.to_flax(tree, "h_{}")
    both: tuple[Any, Any] = dpj.linen.to_canonical, dpj.linen.to_flax
    for convert, at in zip(both, ({"h": tree}, {"ends": {}, "blocks": tree}), strict=True):
        for dim in (9, -2):
            with pytest.raises(ValueError, match=rf"(?s)dim={dim}: must be .* of shape \(2,\)"):
                convert(at, "h", dim=dim)
        for options, message in (
            ({"dim": "0"}, "dim='0': must be an integer, got str '0'"),
            ({"axis": 3}, "axis=3: must be a name, got int 3"),
            ({"layout": "ab"}, "layout='ab': must be a sequence of strings"),
        ):
            with pytest.raises(TypeError, match=message):
                convert(at, "h_{}", **options)


def test_a_layout_that_does_not_fit_loses_no_layers() -> None:
    tree = {"ends": {}, "blocks": {"a": {"w": jnp.ones((2, 3))}}}
    with pytest.raises(ValueError, match=r"must name the kinds .* are \['a'\]"):
        dpj.linen.to_flax(tree, "h_{}", layout=("a", "b"))
    for layout in (("a",), ("a", "a", "a")):
        message = rf"(?s)blocks\['a'\]\['w'\] is of shape \(2, 3\), and .* names 'a' {len(layout)}"
        with pytest.raises(ValueError, match=message):
            dpj.linen.to_flax(tree, "h_{}", layout=layout)
    with pytest.raises(ValueError, match="dim=1: must be 0 for separate layers"):
        dpj.linen.to_flax(tree, "h_{}", dim=1, layout=("a", "a"))
