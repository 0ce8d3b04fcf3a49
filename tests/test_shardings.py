"""Shardings of parameters and optimizers' states: as steps return them, if sizes allow it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import dualpipe_jax as dpj

P = PartitionSpec


def mesh_of(*shape: int, names: tuple[str, ...] = ("pipe",)) -> jax.sharding.Mesh:
    kinds = (AxisType.Auto,) * len(shape)
    size = int(np.prod(shape))
    return jax.make_mesh(shape, names, axis_types=kinds, devices=jax.devices()[:size])


def params_of(num_layers: int = 4) -> Any:
    blocks = {"up": jnp.ones((num_layers, 6, 8)), "bias": jnp.ones((num_layers, 5))}
    return {"ends": {"table": jnp.ones((8, 6))}, "blocks": blocks, "shared": jnp.ones(4)}


def specs_of(tree: Any, **options: Any) -> Any:
    made = dpj.shardings(tree, **options)
    assert all(isinstance(each, NamedSharding) for each in jax.tree.leaves(made))
    return jax.tree.map(lambda sharding: sharding.spec, made)


def test_a_train_state_lies_as_its_parameters() -> None:
    params, mesh = params_of(), mesh_of(2)
    transform = optax.chain(
        optax.masked(optax.adamw(1e-3), {"ends": True, "blocks": True, "shared": False}),
        optax.scale_by_schedule(lambda count: 1.0),
    )
    state = TrainState.create(apply_fn=None, params=params, tx=transform)
    of_params = {
        "ends": {"table": P()},
        "blocks": {"up": P("pipe"), "bias": P("pipe")},
        "shared": P(),
    }
    specs = specs_of(state, mesh=mesh)
    assert specs.params == of_params
    adam = specs.opt_state[0].inner_state[0]
    for moment in (adam.mu, adam.nu):
        assert moment == {**of_params, "shared": optax.MaskedNode()}
    assert specs.step == adam.count == specs.opt_state[1].count == P()
    # It is a tree that jax takes, of shapes too, and over a mesh without devices.
    laid = jax.device_put(state, dpj.shardings(state, mesh=mesh))
    assert laid.params["blocks"]["up"].sharding.spec == P("pipe")
    shapes = jax.eval_shape(lambda: state)
    assert specs_of(shapes, mesh=AbstractMesh((2,), ("pipe",))) == specs


def test_layers_that_do_not_divide_are_on_all_devices() -> None:
    specs = specs_of(params_of(3), mesh=mesh_of(2))
    assert specs["blocks"] == {"up": P(), "bias": P()}


def test_a_tuple_of_stacks_is_no_list_of_layers() -> None:
    params = {"ends": (), "blocks": (jnp.ones((4, 6)), jnp.ones(4))}
    state = optax.adam(1e-3).init(params)
    assert specs_of(state, mesh=mesh_of(2))[0].mu["blocks"] == (P("pipe"), P("pipe"))


def test_specs_of_parameters_count_where_they_fit() -> None:
    mesh = mesh_of(2, 4, names=("pipe", "model"))
    params = params_of()
    specs = {
        "ends": P("model"),
        "blocks": {"up": P(None, None, ("model",)), "bias": P(None, "model")},
        "shared": None,
    }
    state = params, optax.adam(1e-3).init(params), optax.adafactor(1e-3).init(params)
    of_params, (adam, _), adafactor = specs_of(state, mesh=mesh, param_specs=specs)
    assert of_params == {
        "ends": {"table": P("model")},
        "blocks": {"up": P("pipe", None, ("model",)), "bias": P("pipe")},  # 5 by 4 does not go
        "shared": P(),
    }
    assert adam.mu == adam.nu == of_params
    # Factored moments have other shapes: no spec that a dim does not divide by.
    jax.device_put(state[2], dpj.shardings(state[2], mesh=mesh, param_specs=specs))
    assert jax.tree.leaves(adafactor)


def test_modules_lie_by_the_name_of_their_layers() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, *, is_stack: bool):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))
            listed = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
            self.layers = make(rngs) if is_stack else listed

    for is_stack in (True, False):
        net = Net(nnx.Rngs(0), is_stack=is_stack)
        state = net, nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
        made = dpj.shardings(state, mesh=mesh_of(2), blocks="layers")
        laid, optimizer = jax.device_put(state, made)
        layer = laid.layers if is_stack else laid.layers[0]
        assert layer.kernel[...].sharding.spec == (P("pipe") if is_stack else P())
        assert laid.first.kernel[...].sharding.spec == P()
        spread = [each for each in jax.tree.leaves(nnx.state(optimizer)) if each.sharding.spec]
        assert len(spread) == 4 * is_stack  # kernel and bias, two moments each


def test_stacks_in_a_tuple_and_by_number_are_stacks() -> None:
    stacks = (jnp.ones((4, 3, 3)), jnp.ones((4, 3)))
    for blocks in (stacks, list(stacks), dict(enumerate(stacks))):
        params = {"ends": (), "blocks": blocks}
        state = params, optax.adam(1e-3).init(params)
        specs = jax.tree.leaves(
            specs_of(state, mesh=mesh_of(2)), is_leaf=lambda leaf: isinstance(leaf, P)
        )
        assert sorted(map(str, specs)) == sorted(map(str, [P("pipe")] * 6 + [P()]))


def test_labels_of_groups_are_no_parts_of_parameters() -> None:
    mesh, params = mesh_of(2, 2, names=("pipe", "data")), params_of()
    param_specs = {"ends": P(None, "data"), "blocks": {"up": P(None, None, "data")}}
    of_params = specs_of(params, mesh=mesh, param_specs=param_specs)
    assert of_params["blocks"]["up"] == P("pipe", None, "data")
    for labels in (("ends", "blocks", "shared"), ("blocks", "ends", "ends"), ("blocks", "a", "a")):
        groups = dict(zip(params, labels, strict=True))
        groups = {label: optax.adam(1e-3) for label in dict.fromkeys(groups.values())}, groups
        state = optax.multi_transform(*groups).init(params)  # pyrefly: ignore
        specs = specs_of(state, mesh=mesh, param_specs=param_specs)
        for part, label in groups[1].items():
            moment = specs.inner_states[label].inner_state[0].mu
            assert moment[part] == of_params[part], (part, label)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis": "stage"}, ValueError, "axis='stage'"),
        ({"param_specs": {"ends": P("data")}}, ValueError, "must name axes of .*'pipe'.*'data'"),
        (
            {"param_specs": {"ends": {"table": 3}}},
            TypeError,
            r"param_specs: must hold .*\['ends'\]\['table'\] is int 3",
        ),
        ({"param_specs": "pipe"}, TypeError, "param_specs: must be a dict with the keys"),
        (
            {"param_specs": {"block": P("pipe")}},
            ValueError,
            "must have keys among 'ends', .*'block'",
        ),
        ({"param_specs": {"ends": "pipe"}}, TypeError, "must hold PartitionSpecs.*'ends'"),
        ({"param_specs": {"ends": P("pipe", "pipe")}}, ValueError, "each once.*'pipe' twice"),
        ({"param_specs": {"ends": P(P.UNCONSTRAINED)}}, TypeError, "must hold PartitionSpecs"),
        ({"blocks": 3}, TypeError, "blocks=3: must be a name"),
    ],
)
def test_mistakes_are_explained(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        dpj.shardings(params_of(), mesh=mesh_of(2), **options)
