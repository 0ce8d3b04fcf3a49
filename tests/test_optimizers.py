"""Optimizers over stacked layers step as over separate ones, in float64, each device by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.hlo import collectives
from tests.models import assert_close

NUM_STEPS, NUM_OF_KIND = 3, {"dense": 2, "moe": 3}
per_layer = dpj.optimizers.per_layer


def make_layers(seed: int) -> Any:
    """Makes parameters, or gradients of them, with a list of separate layers for each kind."""
    rng = np.random.default_rng(seed)

    def layer(width: int) -> Any:
        shapes = {"kernel": (6, width), "bias": (width,), "scale": ()}
        return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    return {
        "ends": {
            "table": jnp.asarray(rng.normal(size=(5, 6))),
            "tower": {"blocks": {"dense": layer(4)}},  # an encoder has blocks of its own
        },
        "blocks": {kind: [layer(4 + n) for _ in range(n)] for kind, n in NUM_OF_KIND.items()},
        "shared": jnp.asarray(rng.normal(size=4)),
    }


def stack(tree: Any) -> Any:
    """Stacks every list of layers in a tree: parameters, or the state of an optimizer."""

    def stack_list(node: Any) -> Any:
        return jax.tree.map(lambda *each: jnp.stack(each), *node) if is_list(node) else node

    def is_list(node: Any) -> bool:
        return isinstance(node, list)

    return jax.tree.map(stack_list, tree, is_leaf=is_list)


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def is_kernel(params: Any) -> Any:
    def by_name(path: Any, leaf: Any) -> bool:
        is_it = getattr(path[-1], "key", None) == "kernel"
        assert not is_it or leaf.ndim == 2  # of one layer
        return is_it

    return jax.tree_util.tree_map_with_path(by_name, params)


def labels_of(params: Any) -> Any:
    """Labels that are also names of parts."""
    return jax.tree.map(lambda leaf: "blocks" if leaf.ndim == 2 else "ends", params)


Wrap = Callable[[Any], Any]
OPTIMIZERS: dict[str, Callable[[Wrap], Any]] = {
    "mask by ndim": lambda wrap: wrap(optax.adamw(0.1, weight_decay=0.3, mask=is_matrix)),
    "mask by name": lambda wrap: wrap(optax.adamw(0.1, weight_decay=0.3, mask=is_kernel)),
    "LAMB, global norm outside": lambda wrap: optax.chain(
        optax.clip_by_global_norm(1.0), wrap(optax.lamb(0.1, weight_decay=0.3))
    ),
    "Adafactor": lambda wrap: wrap(optax.adafactor(0.1, min_dim_size_to_factor=4)),
    "Muon": lambda wrap: wrap(optax.contrib.muon(0.1, weight_decay=0.3)),
    "partition, schedule, MultiSteps": lambda wrap: wrap(
        optax.MultiSteps(
            optax.partition(
                {
                    "blocks": optax.inject_hyperparams(optax.lamb)(
                        optax.linear_schedule(0.1, 0.01, 2)
                    ),
                    "ends": optax.fromage(0.1),
                },
                labels_of,
            ),
            every_k_schedule=2,
        )
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_of_separate_layers(name: str) -> None:
    def train(tx: Any, params: Any, grads: Any) -> Any:
        @jax.jit
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, updates

        state, seen = jax.jit(tx.init)(params), []
        for each in grads:
            params, state, updates = step(params, state, each)
            seen.append((params, state, updates))
        return tuple(seen)

    params, *grads = map(make_layers, range(1 + NUM_STEPS))
    make = OPTIMIZERS[name]
    want = train(make(lambda tx: tx), params, grads)
    got = train(make(per_layer), stack(params), map(stack, grads))
    assert_close(got, stack(want))


def test_devices_update_their_own_layers_and_keep_the_state_as_it_lies() -> None:
    """For optimizers that take norms, whiten matrices, and hold placeholders for moments."""
    mesh = jax.make_mesh((2,), ("pipe",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tx = per_layer(
        optax.chain(optax.contrib.muon(0.1), optax.adafactor(0.1, min_dim_size_to_factor=4))
    )
    kernel, bias = np.ones((4, 6, 8)), np.ones((4, 8))
    params = {"ends": {"table": np.ones((5, 6))}, "blocks": {"kernel": kernel, "bias": bias}}

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    types = jax.eval_shape(lambda: (params, tx.init(params)))
    made = dpj.shardings(types, mesh=mesh)
    assert made[1][0].inner_states["muon"].inner_state[0].mu["blocks"]["kernel"].spec == jax.P(
        "pipe"
    )
    args = jax.tree.map(lambda leaf, lies: leaf.update(sharding=lies), types, made)
    compiled = jax.jit(step).lower(*args, args[0]).compile()
    assert collectives(str(compiled.as_text()), {"pipe": 2}) == []
    same = jax.tree.map(
        lambda got, want, leaf: got.is_equivalent_to(want, leaf.ndim),
        compiled.output_shardings,
        made,
        types,
    )
    assert all(jax.tree.leaves(same)), same


def test_extra_arguments_are_stacked_like_parameters_or_stay() -> None:
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        assert params is None
        scaled = jax.tree.map(
            lambda u, s: extra["value"] * u / jnp.linalg.norm(s), updates, extra["scales"]
        )
        return extra["function"](scaled), state

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    grads, scales = make_layers(0), make_layers(1)
    more = {"value": 2.0, "function": lambda tree: jax.tree.map(jnp.negative, tree)}
    want, got = (
        jax.jit(lambda grads, scales, tx=tx: tx.update(grads, (), scales=scales, **more)[0])(*trees)
        for tx, trees in ((tx, (grads, scales)), (per_layer(tx), (stack(grads), stack(scales))))
    )
    assert_close(got, stack(want))


def test_bfloat16_and_frozen_integers() -> None:
    """Integers have gradients of float0, as those of `value_and_grad`."""

    def is_float(params: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), params)

    def layer(value: float) -> Any:
        kernel = jnp.full((3, 4), value, jnp.bfloat16)
        return {"kernel": kernel, "index": jnp.arange(2)}

    def as_grads(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf, is_it: leaf if is_it else np.zeros(leaf.shape, jax.dtypes.float0),
            params,
            is_float(params),
        )

    params = {"ends": {"version": jnp.arange(3)}, "blocks": [layer(1), layer(2)]}
    stacked, tx = stack(params), optax.masked(optax.lamb(0.1), is_float)
    want, got = (
        jax.jit(lambda params, tx=tx: tx.update(as_grads(params), tx.init(params), params)[0])(each)
        for tx, each in ((tx, params), (per_layer(tx), stacked))
    )
    want["blocks"] = {
        "kernel": jnp.stack([each["kernel"] for each in want["blocks"]]),
        "index": np.zeros((2, 2), jax.dtypes.float0),
    }
    assert got["blocks"]["kernel"].dtype == jnp.bfloat16
    assert_close(got, want)


def test_modules_have_their_layers_under_another_name() -> None:
    """A stack as a list, for which there is nothing to do."""

    class Net(nnx.Module):
        def __init__(self, *, is_stack: bool):
            def make(rngs: nnx.Rngs) -> nnx.Linear:
                return nnx.Linear(3, 4, rngs=rngs)

            self.first = make(nnx.Rngs(0))
            layers = nnx.vmap(make)(nnx.Rngs(1).split(2))
            if not is_stack:
                graph, state = nnx.split(layers)
                parts = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(2)]
                layers = nnx.List([nnx.merge(graph, part) for part in parts])
            self.layers = layers

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer) -> None:
        optimizer.update(net, jax.tree.map(jnp.sin, nnx.state(net, nnx.Param)))

    nets: list[Any] = [Net(is_stack=is_stack) for is_stack in (True, False)]
    for net in nets:
        tx = per_layer(optax.lamb(0.1), blocks="layers")
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        for _ in range(2):
            step(net, optimizer)
    kernels = jnp.stack([layer.kernel[...] for layer in nets[1].layers])
    assert_close(nets[0].layers.kernel[...], kernels, tolerance=1e-6)  # they are in float32
    assert_close(nets[0].first.kernel[...], nets[1].first.kernel[...], tolerance=1e-6)


def only(kind: str, name: str) -> Any:
    """A mask, a tree for one layer: one leaf of one kind."""
    return {
        "ends": False,
        "blocks": {
            k: {n: (k, n) == (kind, name) for n in ("kernel", "bias", "scale")} for k in NUM_OF_KIND
        },
        "shared": False,
    }


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.masked(
            optax.clip_by_global_norm(1.0), {"ends": False, "blocks": True, "shared": False}
        ),
        optax.masked(optax.clip_by_global_norm(1.0), is_kernel),
        optax.apply_if_finite(optax.sgd(0.1), 3),
        optax.flatten(optax.sgd(0.1, momentum=0.9)),
    ],
    ids=["global norm", "of blocks", "of kernels", "all finite", "flat"],
)
def test_combining_parameters_is_refused(tx: Any) -> None:
    params = stack(make_layers(0))
    with pytest.raises(ValueError, match=r"tx: must .* optax.chain\(optax.clip_by_global_norm"):
        per_layer(tx).update(params, per_layer(tx).init(params), params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"layers": np.ones((2, 3))},
            r"(?s)blocks='blocks': must be the key .*params\['layers'\] is an array",
        ),
        ({"ends": (), "blocks": {"scale": np.ones(())}}, r"(?s)params: every .*\['scale'\] is an"),
    ],
)
def test_mistakes_are_explained(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_layer(optax.sgd(0.1)).init(params)


def test_a_part_without_blocks_is_no_mistake() -> None:
    params = stack(make_layers(0))
    tx: Any = optax.partition(
        {"ends": per_layer(optax.lamb(0.1)), "blocks": optax.sgd(0.1)},
        {"ends": "ends", "blocks": "blocks", "shared": "ends"},
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert_close(updates["blocks"], jax.tree.map(lambda leaf: -0.1 * leaf, params["blocks"]))
