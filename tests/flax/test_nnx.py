"""NNX modules under a pipeline: loss and gradients are those of the module's own forward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dualpipe_jax as dpj
from tests.models import assert_close

WIDTH, VOCABULARY, LENGTH, LAYERS = 4, 7, 3, 4
Float: Any = {"param_dtype": jnp.float64, "dtype": jnp.float64}


class Layer(nnx.Module):
    """A residual layer with a constant of its own, and dropout."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        hidden: int = 6,
        rate: float = 0.0,
        number: int = 0,
        window: int = 0,
    ):
        self.number = number
        self.window = window
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs, **Float)
        # A new function for every layer, as a builder of models may make it.
        self.act = lambda h, scale=1.0: nnx.gelu(h) * scale
        self.up = nnx.Linear(WIDTH, hidden, rngs=rngs, **Float)
        self.down = nnx.Linear(hidden, WIDTH, rngs=rngs, **Float)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.shift = nnx.Variable(rngs.params.normal((WIDTH,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.act(self.up(self.norm(x)) + self.window)
        return x + self.down(self.dropout(h)) + self.shift[...]


class Net(nnx.Module):
    """A model as one writes it in NNX: a list of layers, the embedding used twice."""

    def __init__(self, rngs: nnx.Rngs, *, layers: Any = None, rate: float = 0.0):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **Float)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.layers = layers or nnx.List([Layer(rngs, rate=rate) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs, **Float)

    def first(self, tokens: jax.Array) -> jax.Array:
        return self.dropout(self.embed(tokens))

    def last(self, x: jax.Array) -> jax.Array:
        return self.embed.attend(self.norm(x))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.first(tokens)
        if isinstance(self.layers, nnx.List):
            for layer in self.layers:
                x = layer(x)
            return self.last(x)
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.last(run(x, self.layers))


def stacked(rngs: nnx.Rngs) -> Layer:
    """Makes all layers as one module, with a leading dim."""
    return nnx.split_rngs(splits=LAYERS)(nnx.vmap(Layer))(rngs)


def tokens_of(num_rows: int) -> jax.Array:
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, size=(num_rows, LENGTH))
    return jnp.asarray(tokens)


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def model_of(net: nnx.Module, **options: Any) -> Any:
    parts: Any = {
        "embed": lambda net, ctx: net.first(ctx.microbatch),
        "head": lambda net, x, ctx: net.last(x),
        "loss": loss_of,
    }
    return dpj.nnx.model(net, **{**parts, **options})


def mesh_of(num_ranks: int = 2) -> jax.sharding.Mesh:
    return jax.make_mesh((num_ranks,), ("pipe",), devices=jax.devices()[:num_ranks])


def own_value_and_grad(net: Any, tokens: jax.Array) -> Any:
    return nnx.jit(nnx.value_and_grad(lambda net: loss_of(net(tokens), tokens)))(net)


@pytest.mark.parametrize(("schedule", "is_stack"), [("dualpipe", False), ("1f1b", True)])
def test_an_optimizer_steps_as_with_the_gradients_of_the_module(
    schedule: str, is_stack: bool
) -> None:
    """Also with the layers spread over the pipeline, which a stack may be."""
    nets: Any = [
        Net(nnx.Rngs(0), layers=stacked(nnx.Rngs(1)) if is_stack else None) for _ in range(2)
    ]
    mesh = mesh_of()
    if is_stack:
        layers = nnx.state(nets[0].layers, nnx.Param)
        spread = jax.NamedSharding(mesh, jax.P("pipe"))
        nnx.update(nets[0].layers, jax.device_put(layers, spread))
    tokens = tokens_of(8)
    optimizers = [nnx.Optimizer(net, optax.adamw(1e-2), wrt=nnx.Param) for net in nets]
    grad_fn = dpj.nnx.value_and_grad(
        model_of(nets[0]), mesh=mesh, num_microbatches=4, schedule=schedule
    )

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer, tokens: jax.Array) -> Any:
        loss, grads = grad_fn(net, tokens)
        optimizer.update(net, grads)
        return loss, grads

    @nnx.jit
    def own_step(net: Net, optimizer: nnx.Optimizer, tokens: jax.Array) -> Any:
        loss, grads = nnx.value_and_grad(lambda net: loss_of(net(tokens), tokens))(net)
        optimizer.update(net, grads)
        return loss, grads

    for _ in range(2):
        got = step(nets[0], optimizers[0], tokens)
        want = own_step(nets[1], optimizers[1], tokens)
        # Adam divides by the root of a value that may be tiny; both have nearly equal gradients.
        assert_close(got, want, tolerance=1e-10)
    params = [nnx.state(net, nnx.Param) for net in nets]
    assert_close(params[0], params[1], tolerance=1e-10)
    if is_stack:
        assert nets[0].layers.up.kernel.get_value().sharding.spec[0] == "pipe"


def test_gradients_are_exact_and_the_module_stays_as_it_was() -> None:
    net, tokens = Net(nnx.Rngs(1)), tokens_of(4)
    not_keys = nnx.Not(nnx.RngKey)
    before = jax.tree.map(jnp.copy, nnx.state(net, not_keys))
    model = model_of(net)
    grad_fn = dpj.nnx.value_and_grad(model, mesh=mesh_of(), num_microbatches=2)
    got = nnx.jit(grad_fn)(net, tokens)
    assert_close(nnx.state(net, not_keys), before, tolerance=0)
    assert_close(got, own_value_and_grad(net, tokens))
    params = model.params(net)
    assert_close(model.state(params), nnx.state(net, nnx.Param), tolerance=0)
    # The canonical parameters are those of any other model: for evaluation, for checkpoints.
    evaluate = dpj.evaluate(model, mesh=mesh_of(), num_microbatches=2)
    assert_close(jax.jit(evaluate)(params, tokens), got[0])


def test_a_stack_of_layers_is_taken_as_it_is() -> None:
    """Deeper in the module, with a function of the user's for a layer."""

    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.decoder: Any = Net(rngs, layers=stacked(rngs))

    net, tokens = Outer(nnx.Rngs(0)), tokens_of(4)
    net.decoder.layers.shift[...] = jnp.arange(LAYERS * WIDTH).reshape(LAYERS, WIDTH) / 10
    model = model_of(
        net,
        blocks="decoder.layers",
        embed=lambda net, ctx: net.decoder.first(ctx.microbatch),
        block=lambda layer, x, ctx: layer(layer(x)) * (1 + ctx.layer),
        head=lambda net, x, ctx: net.decoder.last(x),
    )

    def loss_fn(net: Outer) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, layer: Layer, index: jax.Array) -> jax.Array:
            return layer(layer(x)) * (1 + index)

        x = run(net.decoder.first(tokens), net.decoder.layers, jnp.arange(LAYERS))
        return loss_of(net.decoder.last(x), tokens)

    want = nnx.jit(nnx.value_and_grad(loss_fn))(net)
    grad_fn = dpj.nnx.value_and_grad(model, mesh=mesh_of(), num_microbatches=2)
    assert_close(nnx.jit(grad_fn)(net, tokens), want)


@pytest.mark.parametrize("is_stack", [False, True])
def test_dropout_is_keyed_by_microbatch_and_layer(is_stack: bool) -> None:
    """A mask shows in an input of ones: no two layers or microbatches have the same."""

    class Masks(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Dropout(0.5, rngs=rngs)
            self.gain = nnx.Param(jnp.ones(()))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.gain[...]

    class Holder(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(Masks))
            # All layers were made with one object of random streams.
            self.layers = make(rngs) if is_stack else nnx.List([Masks(rngs) for _ in range(3)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def block(layer: Any, x: dict[str, jax.Array], ctx: dpj.Context) -> Any:
        ones = jnp.ones(SIZE)
        drawn = jnp.stack([layer.first(ones), layer.second(ones), layer.first(ones)])
        return x | {"seen": x["seen"].at[ctx.layer].set(drawn > 0)}

    size = SIZE = 64
    holder = Holder(nnx.Rngs(0))
    model = dpj.nnx.model(
        holder,
        embed=lambda m, ctx: {
            "seen": jnp.zeros((3, 3, size), bool),
            "own": m.dropout(jnp.ones(size)) > 0,
        },
        block=block,
        head=lambda m, x, ctx: (0.0 * ctx.microbatch.sum(), {"seen": bits_of(x, ctx)}),
        has_aux=True,
    )

    def bits_of(x: dict[str, jax.Array], ctx: dpj.Context) -> jax.Array:
        rows = jnp.concatenate([x["seen"].reshape(9, size), x["own"][None]])
        return jnp.zeros((2, 10, size), int).at[ctx.microbatch[0].astype(int)].set(rows)

    batch = jnp.arange(2.0)
    params = model.params(holder)
    _, metrics = dpj.sequential(model, num_microbatches=2)(params, batch, rng=jax.random.key(3))
    masks = {row.tobytes() for row in np.asarray(metrics["seen"], np.uint8).reshape(20, size)}
    assert len(masks) == 20


def test_dropout_under_a_pipeline_is_that_of_the_sequential_model() -> None:
    net, tokens, key = Net(nnx.Rngs(0), rate=0.5), tokens_of(8), jax.random.key(3)
    model = model_of(net)
    grad_fn = dpj.nnx.value_and_grad(
        model, mesh=mesh_of(), num_microbatches=4, layers_per_stage=(LAYERS, 0)
    )
    loss_fn = dpj.sequential(model, num_microbatches=4)
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(model.params(net), tokens, rng=key)
    assert_close(nnx.jit(grad_fn)(net, tokens, rng=key), (loss, model.state(grads)))
    # Keys of the old kind are the same keys.
    legacy = loss_fn(model.params(net), tokens, rng=jax.random.key_data(key))
    assert_close(legacy, loss)
    with pytest.raises(ValueError, match=r"module: draws .*dropout\.rngs.*call with rng=key"):
        loss_fn(model.params(net), tokens)
    net.eval()
    assert_close(
        dpj.sequential(model_of(net), num_microbatches=4)(model.params(net), tokens),
        loss_of(net(tokens), tokens),
    )


def test_layers_that_differ_are_kinds_of_their_own() -> None:
    """Found by their static attributes; a number that makes no difference is ignored."""
    rngs, tokens = nnx.Rngs(0), tokens_of(4)
    windows = [0, 2, 0, 2]
    layers = [Layer(rngs, number=i, window=w) for i, w in enumerate(windows)]
    net = Net(rngs, layers=nnx.List(layers))
    with pytest.raises(
        ValueError,
        match=r"4 layers differ.*number is int 0 in layer 0 and int 1 in layer 1.*ignore=",
    ):
        model_of(net)
    model = model_of(net, ignore=("number",))
    assert model.layout == ("Layer_0", "Layer_1", "Layer_0", "Layer_1")
    params = model.params(net)
    assert params["blocks"]["Layer_1"]["up"]["kernel"].shape == (2, WIDTH, 6)
    grad_fn = dpj.nnx.value_and_grad(model, mesh=mesh_of(), num_microbatches=2)
    assert_close(nnx.jit(grad_fn)(net, tokens), own_value_and_grad(net, tokens))
    named = model_of(net, ignore="number", layout=("near", "far", "near", "far"))
    assert set(named.params(net)["blocks"]) == {"near", "far"}
    with pytest.raises(ValueError, match="'a' has layers 0 and 1: window is int 0 in layer 0"):
        model_of(net, ignore="number", layout=tuple("aaaa"))
    with pytest.raises(ValueError, match=r"has 3 names for the 4 layers"):
        model_of(net, layout=tuple("abc"))


def test_layers_of_other_shapes_are_of_other_kinds() -> None:
    rngs = nnx.Rngs(0)
    net = Net(rngs, layers=nnx.List([Layer(rngs, hidden=h) for h in (6, 6, 8)]))
    assert model_of(net).layout == ("Layer_0", "Layer_0", "Layer_1")


@pytest.mark.parametrize("name", ["list", None, "layers"])
def test_sharding_metadata_has_the_pipe_axis_first(name: str | None) -> None:
    """The layers are a list, a stack whose dim has no name, and one whose dim has another."""

    class Cut(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            init = nnx.with_partitioning(nnx.initializers.normal(), (None, "model"))
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, kernel_init=init, **Float)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + jnp.tanh(self.linear(x))

    def layers_of(rngs: nnx.Rngs) -> Any:
        if name == "list":
            return nnx.List([Cut(rngs) for _ in range(LAYERS)])
        metadata: Any = {} if name is None else {"transform_metadata": {nnx.PARTITION_NAME: name}}
        return nnx.split_rngs(splits=LAYERS)(nnx.vmap(Cut, **metadata))(rngs)

    mesh = jax.make_mesh(
        (2, 2),
        ("pipe", "model"),
        devices=jax.devices()[:4],
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    with nnx.use_eager_sharding(False):
        net = Net(nnx.Rngs(0), layers=layers_of(nnx.Rngs(1)))
    model, tokens = model_of(net), tokens_of(4)
    params = model.params(net)
    kernel = nnx.get_named_sharding(params["blocks"], mesh)["linear"]["kernel"].get_value()
    assert kernel.spec == jax.P("pipe", None, "model")
    shardings = nnx.get_named_sharding(params["blocks"], mesh)
    placed = {**params, "blocks": jax.device_put(params["blocks"], shardings)}
    # The module's own metadata is as it was.
    own = nnx.to_flat_state(nnx.state(net, nnx.Param))
    got = nnx.to_flat_state(model.state(params))
    assert [v.get_metadata() for _, v in got] == [v.get_metadata() for _, v in own]
    if name != "list":
        return
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2)
    with jax.set_mesh(mesh):
        loss, grads = jax.jit(grad_fn)(placed, tokens)
    assert nnx.get_partition_spec(grads) == nnx.get_partition_spec(params)
    assert_close((loss, model.state(grads)), own_value_and_grad(net, tokens))


# --- mistakes --------------------------------------------------------------------------------


def test_variables_that_a_call_changes_are_refused() -> None:
    class Normalised(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.BatchNorm(WIDTH, param_dtype=jnp.float64, rngs=rngs)
            # It makes its statistics float32 whatever it is told.
            self.norm.mean = nnx.BatchStat(jnp.zeros(WIDTH))
            self.norm.var = nnx.BatchStat(jnp.ones(WIDTH))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.norm(x)

    rngs, tokens = nnx.Rngs(0), tokens_of(4)
    net = Net(rngs, layers=nnx.List([Normalised(rngs) for _ in range(2)]))
    model = model_of(net)
    with pytest.raises(ValueError, match=r"module.layers\[0\]: changes.*\n.*BatchStat norm.mean"):
        dpj.sequential(model, num_microbatches=2)(model.params(net), tokens)
    net.eval()  # reads them only
    got = dpj.sequential(model_of(net), num_microbatches=2)(model.params(net), tokens)
    assert_close(got, loss_of(net(tokens), tokens))


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_transforms_that_write_variables_back_are_taken(transform: Any) -> None:
    class Transformed(Layer):
        def __call__(self, x: jax.Array) -> jax.Array:
            return transform(Layer.__call__)(self, x)

    class Counting(Layer):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.count = nnx.Variable(jnp.zeros(()))

        def add(self, x: jax.Array) -> jax.Array:
            self.count[...] += x.sum()
            return super().__call__(x)

        def __call__(self, x: jax.Array) -> jax.Array:
            return transform(Counting.add)(self, x)

    rngs, tokens = nnx.Rngs(0), tokens_of(4)
    net = Net(rngs, layers=nnx.List([Transformed(rngs) for _ in range(2)]))
    model = model_of(net)
    step = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=2)
    loss, grads = jax.jit(step)(model.params(net), tokens)
    assert_close((loss, model.state(grads)), own_value_and_grad(net, tokens))
    net = Net(rngs, layers=nnx.List([Counting(rngs) for _ in range(2)]))
    model = model_of(net)
    with pytest.raises(ValueError, match=r"module.layers\[0\]: changes.*\n  \* Variable count\n"):
        dpj.sequential(model, num_microbatches=2)(model.params(net), tokens)


def test_layers_that_share_parameters_are_refused() -> None:
    rngs = nnx.Rngs(0)
    layers = [Layer(rngs) for _ in range(3)]
    layers[2].down = layers[0].down
    with pytest.raises(ValueError, match=r"layers.0.down.kernel and layers.2.down.kernel are one"):
        model_of(Net(rngs, layers=nnx.List(layers)))
    net: Any = Net(rngs)
    net.extra = net.layers[0].up
    with pytest.raises(ValueError, match="share with the rest of the module"):
        model_of(net)


def test_a_module_that_was_changed_is_refused() -> None:
    net: Any = Net(nnx.Rngs(0))
    model = model_of(net)
    net.extra = nnx.Param(jnp.ones(2))
    del net.norm
    with pytest.raises(ValueError, match="extra is new") as caught:
        model.params(net)
    assert "norm.scale is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"blocks": "blocks"}, ValueError, "Net has no 'blocks'; its modules are .*'layers'"),
        ({"blocks": "dropout"}, ValueError, "blocks='dropout': must be a list of modules"),
        ({"blocks": 3}, TypeError, "blocks=3: must be the name of the attribute"),
        ({"head": None}, TypeError, "head is NoneType None"),
        ({"module": 3}, TypeError, "module: must be a flax.nnx.Module, got int 3"),
        ({"ignore": 3}, TypeError, "ignore=3: must be a name, or a sequence of names; got int 3"),
        ({"ignore": "nope"}, ValueError, "must name attributes of layers, .* no 'nope'; they have"),
        ({"axis": 3}, TypeError, "axis=3: must be a name, got int 3"),
        ({"layout": "aaaa"}, TypeError, "layout='aaaa': must be a sequence of strings"),
    ],
)
def test_bad_arguments_are_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        model_of(options.pop("module", Net(nnx.Rngs(0))), **options)


def test_bad_arguments_of_the_rest_are_refused() -> None:
    function: Any = len
    plain = dpj.Model(embed=function, block=function, head=function)
    with pytest.raises(TypeError, match=r"must be made by dualpipe_jax.nnx.model, got Model"):
        dpj.nnx.value_and_grad(plain, mesh=mesh_of(), num_microbatches=2)  # pyrefly: ignore
    net = Net(nnx.Rngs(0))
    model = model_of(net)
    with pytest.raises(TypeError, match=r"module: must be a .*Module, got int 3"):
        model.params(3)  # pyrefly: ignore
    params = model.params(net)
    for bad, message in (
        (3, "got int 3"),
        ({"blocks": 1}, "got dict"),
        ({"ends": {}, "blocks": params["blocks"]}, "an nnx.State in each.*ends is dict {}"),
        ({**params, "ends": nnx.State({})}, r"all parameters.*ends\.norm\.scale is missing"),
        ({**params, "blocks": nnx.State({})}, r"all parameters.*blocks\.\S* is missing"),
        (
            {**params, "blocks": jax.tree.map(lambda leaf: leaf[:2], params["blocks"])},
            r"blocks\.\S* is an array \S*\[2,\S* not of 4 layers",
        ),
    ):
        with pytest.raises(ValueError, match=rf"(?s)tree: must be {{.*{message}"):
            model.state(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": lambda net: 1}, r"embed: must be a function \(rest, ctx\) -> x, .* \(net\)"),
        ({"block": lambda layer, x: x}, r"block: must be a function \(layer, x, ctx\) -> x"),
        ({"head": lambda net, x: x}, r"head: must be a function \(rest, x, ctx\) -> logits"),
        ({"loss": lambda out: 1.0}, r"loss: must be a function \(logits, microbatch\) -> scalar"),
    ],
)
def test_functions_of_other_parameters_are_named(options: Any, message: str) -> None:
    net = Net(nnx.Rngs(0))
    model = model_of(net, **options)
    with pytest.raises(TypeError, match=message):
        dpj.sequential(model, num_microbatches=2)(model.params(net), tokens_of(2))


def test_steps_of_modules_take_a_loss_scale_and_know_their_memory() -> None:
    net, tokens = Net(nnx.Rngs(0)), tokens_of(4)
    step = dpj.nnx.value_and_grad(model_of(net), mesh=mesh_of(), num_microbatches=2)
    plain, scaled = (
        nnx.jit(lambda net, tokens, scale=scale: step(net, tokens, loss_scale=scale))(net, tokens)
        for scale in (None, 1024.0)
    )
    assert_close(scaled, plain)
    shapes = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    reports = [step.memory(each, tokens) for each in (net, shapes)]
    assert str(reports[0]) == str(reports[1])
    assert "received" in str(reports[0])
