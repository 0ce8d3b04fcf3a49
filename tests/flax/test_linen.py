"""Linen modules under a pipeline: loss and gradients are those of the modules' own forward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import dualpipe_jax as dpj
from tests.flax.linen_models import (
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Float,
    Layer,
    Model,
    Normalised,
    loss_of,
    mesh_of,
    three_modules,
    tokens_of,
)
from tests.models import assert_close


class Scanned(nn.Module):
    """The same, with the layers stacked by `nn.scan` in a module of their own."""

    dim: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": self.dim},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = nn.Embed(VOCABULARY, WIDTH, name="embed", **Float)(tokens)
        x, _ = scan(Layer(names=(None, "model"), name="layers"), x, None)
        return nn.Dense(VOCABULARY, name="head", **Float)(x)


def of_model(flax_model: Model) -> Any:
    """Takes a model as it is: its own methods around its own layer."""
    return dpj.linen.model(
        embed=flax_model.embed,
        block=Layer(names=flax_model.names),
        head=flax_model.head,
        loss=loss_of,
    )


def test_a_model_with_layers_by_name_is_taken_as_it_is() -> None:
    flax_model, tokens = Model(), tokens_of(8)
    params = flax_model.init(jax.random.key(0), tokens)["params"]
    want = jax.jit(
        jax.value_and_grad(
            lambda params: loss_of(flax_model.apply({"params": params}, tokens), tokens)
        )
    )(params)
    grad_fn = dpj.value_and_grad(of_model(flax_model), mesh=mesh_of(), num_microbatches=4)
    canonical = dpj.linen.to_canonical(params, "layers_{}")
    loss, grads = jax.jit(grad_fn)(canonical, tokens)
    assert_close((loss, dpj.linen.to_flax(grads, "layers_{}")), want)


def test_layers_stacked_by_scan_are_taken_as_they_are() -> None:
    """The stack's dim is the second one; its names and those of its boxes come back."""
    flax_model, tokens = Scanned(dim=1), tokens_of(4)
    params = flax_model.init(jax.random.key(0), tokens)["params"]

    def loss_fn(params: Any) -> jax.Array:
        return loss_of(flax_model.apply({"params": params}, tokens), tokens)

    want = jax.jit(jax.value_and_grad(loss_fn))(params)
    canonical = dpj.linen.to_canonical(params, "layers", dim=1)
    kernel = canonical["blocks"]["Dense_0"]["kernel"]
    assert kernel.names == ("pipe", None, "model")
    assert kernel.value.shape == (LAYERS, WIDTH, 6)
    model = three_modules(block=Layer(names=(None, "model")))
    grad_fn = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=2)
    loss, grads = jax.jit(grad_fn)(canonical, tokens)
    assert_close((loss, dpj.linen.to_flax(grads, "layers", dim=1)), want)
    back = dpj.linen.to_flax(canonical, "layers", dim=1)
    assert_close(back, params, tolerance=0)


def test_init_is_that_of_each_module_with_a_key_of_its_own() -> None:
    model, tokens = three_modules(), tokens_of(2)
    params = jax.jit(model.init, static_argnames="num_layers")(
        jax.random.key(5), tokens, num_layers=3
    )
    keys = jax.random.split(jax.random.key(5), 5)
    embed, head = nn.Embed(VOCABULARY, WIDTH, **Float), nn.Dense(VOCABULARY, **Float)
    x, of_embed = embed.init_with_output(keys[3], tokens)
    layers: list[Any] = [Layer().init(keys[i], x)["params"] for i in range(3)]
    assert not np.array_equal(layers[0]["Dense_0"]["kernel"], layers[1]["Dense_0"]["kernel"])
    want = {
        "ends": {"embed": of_embed["params"], "head": head.init(keys[4], x)["params"]},
        "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
    }
    assert_close(params, want, tolerance=0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tokens)
    again = model.init(jax.random.key(5), shapes, num_layers=3)
    # An embedding looks up other rows, but no initializer here looks at them.
    assert_close(again, want, tolerance=0)


def test_init_of_tied_ends_has_the_parameters_of_both_once() -> None:
    model = of_model(Model())
    params = model.init(jax.random.key(0), tokens_of(2), num_layers=LAYERS)
    whole = Model().init(jax.random.key(0), tokens_of(2))["params"]
    canonical = dpj.linen.to_canonical(whole, "layers_{}")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, canonical)


def test_partitioning_metadata_has_the_pipe_axis_first() -> None:
    names = (None, "model")
    model, tokens = three_modules(block=Layer(names=names)), tokens_of(4)
    params = model.init(jax.random.key(0), tokens, num_layers=LAYERS)
    specs = nn.get_partition_spec(params)
    assert specs["blocks"]["Dense_0"]["kernel"] == jax.P("pipe", None, "model")
    mesh = jax.make_mesh((2, 2), ("pipe", "model"), devices=jax.devices()[:4])
    shardings = nn.get_sharding(params, mesh)
    kernel = shardings["blocks"]["Dense_0"]["kernel"]
    placed = jax.device_put(params, shardings)
    assert kernel.spec == placed["blocks"]["Dense_0"]["kernel"].value.sharding.spec
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2)
    with jax.set_mesh(mesh):  # under which Flax constrains values that it takes out of a box
        loss, grads = jax.jit(grad_fn)(placed, tokens)
    assert nn.get_partition_spec(grads) == specs
    loss_fn = dpj.sequential(model, num_microbatches=2)
    assert_close((loss, grads), jax.jit(jax.value_and_grad(loss_fn))(params, tokens))


def test_logical_names_go_through_the_rules() -> None:
    class Logical(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(), ("width", "hidden"))
            return x + nn.Dense(WIDTH, kernel_init=init, **Float)(x)

    model = three_modules(block=Logical(), axis="layers")
    params = model.init(jax.random.key(0), tokens_of(2), num_layers=2)
    specs = nn.logical_to_mesh(
        nn.get_partition_spec(params), rules=[("layers", "pipe"), ("hidden", "model")]
    )
    assert specs["blocks"]["Dense_0"]["kernel"] == jax.P("pipe", None, "model")


def test_dropout_is_keyed_by_microbatch_and_layer() -> None:
    """Also at the ends; a stream of another name has other numbers."""

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            shift = jax.random.normal(self.make_rng("noise"), x.shape, x.dtype)
            return Layer(rate=0.5)(x) + 0.1 * shift

    head = (nn.Dense(VOCABULARY, **Float), dropped_head)
    model = three_modules(block=Noisy(), head=head, rngs=("dropout", "noise"))
    tokens, key = tokens_of(8), jax.random.key(7)
    params = model.init(jax.random.key(0), tokens, num_layers=LAYERS)
    want = jax.jit(jax.value_and_grad(dpj.sequential(model, num_microbatches=4)))(
        params, tokens, rng=key
    )
    grad_fn = dpj.value_and_grad(
        model, mesh=mesh_of(), num_microbatches=4, layers_per_stage=(0, LAYERS)
    )
    assert_close(jax.jit(grad_fn)(params, tokens, rng=key), want)

    def own_forward() -> jax.Array:
        """Applies the modules one by one, with the keys that the docs name."""
        losses = []
        for m in range(4):
            rows, k = tokens[2 * m : 2 * m + 2], jax.random.fold_in(key, m)

            def rngs(position: int, k: Any = k) -> dict[str, Any]:
                own = jax.random.fold_in(k, position)
                names = ("dropout", "noise")
                return {name: jax.random.fold_in(own, i) for i, name in enumerate(names)}

            embed = nn.Embed(VOCABULARY, WIDTH, **Float)
            x = embed.apply({"params": params["ends"]["embed"]}, rows)
            for layer in range(LAYERS):
                own = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
                x = Noisy().apply({"params": own}, x, rngs=rngs(layer))
            logits = head[0].apply(
                {"params": params["ends"]["head"]},
                x,
                None,
                method=dropped_head,
                rngs=rngs(LAYERS + 1),
            )
            losses.append(loss_of(logits, rows))
        return jnp.stack(losses).mean()

    assert_close(own_forward(), want[0])
    with pytest.raises(ValueError, match=r"block: Noisy needs a key.*call with rng=key"):
        jax.eval_shape(grad_fn, params, tokens)


def dropped_head(head: nn.Module, x: jax.Array, ctx: Any) -> jax.Array:
    mask = jax.random.bernoulli(head.make_rng("dropout"), 0.5, x.shape)
    assert callable(head)
    return head(x * mask)


def test_arguments_for_every_call_switch_dropout_off() -> None:
    options: Any = {"block": Layer(rate=0.5), "block_kwargs": {"deterministic": True}}
    model, tokens = three_modules(**options), tokens_of(4)
    params = model.init(jax.random.key(0), tokens, num_layers=2)
    got = dpj.sequential(model, num_microbatches=2)(params, tokens)
    want = dpj.sequential(three_modules(), num_microbatches=2)(params, tokens)
    assert_close(got, want)


def test_head_may_return_the_loss_and_metrics() -> None:
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
            logits = nn.Dense(VOCABULARY, **Float)(x)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens).sum()
            return loss, {"hits": (logits.argmax(-1) == tokens).sum()}

    model = three_modules(
        head=Head(), loss=None, has_aux=True, weight=lambda tokens: jnp.float32(tokens.size)
    )
    tokens = tokens_of(4)
    params = model.init(jax.random.key(0), tokens, num_layers=2)
    loss, metrics = dpj.sequential(model, num_microbatches=2)(params, tokens)
    want, _ = dpj.sequential(model, num_microbatches=1)(params, tokens)
    assert_close(loss, want)
    assert 0 <= metrics["hits"] <= tokens.size


class Shifted(nn.Module):
    """Adds a constant that its initialisation draws, and another one to the embedding."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shift = self.variable(
            "fixed", "shift", lambda: jax.random.normal(self.make_rng("params"), (WIDTH,))
        )
        return Layer()(x) + shift.value


def test_constants_pass_and_have_no_gradient() -> None:
    class Embedding(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            table = self.variable("fixed", "table", jnp.ones, (LENGTH, WIDTH))
            return nn.Embed(VOCABULARY, WIDTH, **Float)(tokens) + table.value

    bare, tokens = three_modules(embed=Embedding(), block=Shifted()), tokens_of(4)
    with pytest.raises(ValueError, match=r"no parameters, \['fixed'\].*with_constants"):
        bare.init(jax.random.key(0), tokens, num_layers=LAYERS)
    variables = bare.init_variables(jax.random.key(0), tokens, num_layers=LAYERS)
    params = variables.pop("params")
    shifts = variables["fixed"]["blocks"]["shift"]
    assert shifts.shape == (LAYERS, WIDTH)
    assert len(np.unique(shifts)) == shifts.size
    model = bare.with_constants(variables)

    def loss_fn(params: Any) -> jax.Array:
        of_embed = {c: t["embed"] for c, t in [("params", params["ends"])]}
        x = Embedding().apply({**of_embed, "fixed": variables["fixed"]["ends"]["embed"]}, tokens)
        for i in range(LAYERS):
            own, fixed = jax.tree.map(lambda a, i=i: a[i], (params["blocks"], {"shift": shifts}))
            x = Shifted().apply({"params": own, "fixed": fixed}, x)
        head = {"params": params["ends"]["head"]}
        return loss_of(nn.Dense(VOCABULARY, **Float).apply(head, x), tokens)

    grad_fn = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=2)
    got = jax.jit(grad_fn)(params, tokens)
    assert_close(got, jax.jit(jax.value_and_grad(loss_fn))(params))
    again = model.init(jax.random.key(0), tokens, num_layers=LAYERS)
    assert_close(again, params, tolerance=0)


def test_layers_of_two_kinds() -> None:
    layout = ("wide", "narrow", "narrow", "wide")
    model = three_modules(block={"wide": Layer(hidden=9), "narrow": Layer()}, layout=layout)
    tokens = tokens_of(4)
    params = model.init(jax.random.key(0), tokens)
    assert params["blocks"]["wide"]["Dense_0"]["kernel"].shape == (2, WIDTH, 9)
    keys = jax.random.split(jax.random.key(0), 6)
    last = Layer(hidden=9).init(keys[3], jnp.ones((4, LENGTH, WIDTH)))["params"]
    own = dpj.linen.to_flax(params, "layers_{}", layout=layout)
    assert sorted(own) == ["embed", "head", *(f"layers_{i}" for i in range(4))]
    assert_close(own["layers_3"], last, tolerance=0)
    back = dpj.linen.to_canonical(own, "layers_{}", layout=layout)
    assert_close(back, params, tolerance=0)
    with pytest.raises(ValueError, match=r"'layers_0' has .* and 'layers_1' has .*layout="):
        dpj.linen.to_canonical(own, "layers_{}")
    losses = [dpj.sequential(model, num_microbatches=n)(params, tokens) for n in (1, 2)]
    assert_close(losses[0], losses[1])


def test_train_state_works_unchanged() -> None:
    """Three steps of a TrainState are those of the Flax model's own, converted or not."""
    flax_model, tokens = Model(), tokens_of(8)
    params = flax_model.init(jax.random.key(0), tokens)["params"]
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    plain = TrainState.create(apply_fn=flax_model.apply, params=params, tx=tx)
    grad_fn = dpj.value_and_grad(of_model(flax_model), mesh=mesh_of(), num_microbatches=4)

    @jax.jit
    def plain_step(state: TrainState) -> TrainState:
        grads = jax.grad(lambda p: loss_of(state.apply_fn({"params": p}, tokens), tokens))(
            state.params
        )
        return state.apply_gradients(grads=grads)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        loss, grads = grad_fn(state.params, tokens)
        return state.apply_gradients(grads=grads), loss

    # In the middle of training, with moments in the optimizer's state.
    plain = plain_step(plain)
    state: Any = dpj.linen.to_canonical(plain, "layers_{}")
    assert isinstance(state, TrainState)
    params: Any = state.params
    assert params["blocks"]["Dense_0"]["kernel"].shape == (LAYERS, WIDTH, 6)
    state, _ = step(step(state)[0])
    assert int(state.step) == 3
    # Adam divides by the root of a value that may be tiny; both have nearly the same gradients.
    back = dpj.linen.to_flax(state, "layers_{}")
    want = plain_step(plain_step(plain))
    assert_close(back.params, want.params, tolerance=1e-10)
    assert_close(back.opt_state, want.opt_state, tolerance=1e-10)


# --- mistakes --------------------------------------------------------------------------------


def test_running_statistics_are_refused_unless_they_are_only_read() -> None:
    tokens = tokens_of(4)
    models = [three_modules(block=Normalised(frozen=frozen)) for frozen in (False, True)]
    with pytest.raises(ValueError, match=r"\['batch_stats'\].*LayerNorm"):
        models[0].init(jax.random.key(0), tokens, num_layers=2)
    variables = models[0].init_variables(jax.random.key(0), tokens, num_layers=2)
    params = variables.pop("params")
    model = models[0].with_constants(variables)
    with pytest.raises(ValueError, match=r"block: Normalised writes to a collection.*batch_stats"):
        dpj.sequential(model, num_microbatches=2)(params, tokens)
    frozen = models[1].with_constants(variables)
    assert jnp.isfinite(dpj.sequential(frozen, num_microbatches=2)(params, tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": lambda tokens: tokens}, "embed=.*must be a flax.linen Module, a method of one"),
        ({"block": {"a": nn.Dense}}, r"block\['a'\]=.*must be a flax.linen Module"),
        ({"head": (nn.Dense(3), 3)}, r"head=\(a Dense, int 3\): .*a pair of a Module"),
        ({"loss": 3}, r"loss=int 3: must be a function \(logits, microbatch\)"),
        (
            {"block_kwargs": "x"},
            r"dicts of arguments by name, or None; but:\n.*block_kwargs is str",
        ),
        ({"head_kwargs": {3: 4}}, r"must be dicts of .*\n.*head_kwargs is dict \{3: 4\}"),
        ({"rngs": 3}, "rngs=3: must be a name, or a sequence of names; got int 3"),
        ({"rngs": [3]}, r"rngs=\[3\]: must be a name"),
        ({"constants": 3}, "constants: must be a dict of collections .*; got int 3"),
        ({"axis": 3}, "axis=3: must be a name, got int 3"),
        ({"layout": "ab"}, "layout='ab': must be a sequence of strings"),
        ({"layout": 3}, "layout=3: must be a sequence of strings"),
    ],
)
def test_bad_types_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        three_modules(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": lambda out: 1.0}, r"loss: must be a function \(logits, microbatch\) -> scalar"),
        (
            {"block": (Layer(), lambda layer, x: layer(x))},
            r"block: must be a function of \(module, x, ctx\), but it takes \(layer, x\)",
        ),
        (
            {"block_kwargs": {"train": True}},
            r"block: must be a function of \(x\), and of block_kwargs=\{'train': True\}.*'train'",
        ),
    ],
)
def test_functions_with_other_arguments_are_named(options: Any, message: str) -> None:
    params = three_modules().init(jax.random.key(0), tokens_of(2), num_layers=2)
    with pytest.raises(TypeError, match=message):
        dpj.sequential(three_modules(**options), num_microbatches=2)(params, tokens_of(2))


def test_bad_values_are_refused() -> None:
    both, tokens = nn.Dense(3), tokens_of(2)
    with pytest.raises(ValueError, match="embed, head: are one Module"):
        three_modules(embed=both, head=both)
    with pytest.raises(TypeError, match="num_layers=None: must be an integer"):
        three_modules().init(jax.random.key(0), tokens)
    with pytest.raises(ValueError, match="num_layers=0: must be an integer of at least 1"):
        three_modules().init(jax.random.key(0), tokens, num_layers=0)
    kinds = three_modules(block={"a": Layer()}, layout=("a", "a"))
    with pytest.raises(ValueError, match="num_layers=3: must be 2, the length of layout"):
        kinds.init(jax.random.key(0), tokens, num_layers=3)
    with pytest.raises(ValueError, match='constants: must not hold "params"'):
        three_modules().with_constants({"params": {}})
    with pytest.raises(ValueError, match="constants: every collection must be"):
        three_modules().with_constants({"fixed": {"ends": {}}})
