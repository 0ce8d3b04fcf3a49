"""Errors for the user: each mistake names argument, value, requirement and fix, when traced.

Nothing here compiles: `jax.eval_shape` traces the step, as `jax.jit` would.
"""

import inspect
import re
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import dualpipe_jax as dpj
from dualpipe_jax._executor import offload
from tests.mappings import MAPPINGS

D = 4
MESH = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
WIDE_MESH = jax.make_mesh((2, 2), ("pipe", "model"), devices=jax.devices()[:4])
TPU_MESH = jax.sharding.AbstractMesh(
    (2,),
    ("pipe",),
    abstract_device=jax.sharding.AbstractDevice(
        device_kind="TPU v5 lite", num_cores=None, platform="tpu"
    ),
)
PARAMS = {
    "ends": {"table": jnp.ones((D, D)), "out": jnp.ones(D)},
    "blocks": {"w": jnp.ones((2, D, D)), "b": jnp.ones((2, D))},
}
BATCH = {"x": jnp.ones((4, D)), "y": jnp.ones(4)}
MODEL = dpj.Model(
    embed=lambda ends, ctx: ctx.microbatch["x"] @ ends["table"],
    block=lambda params, x, ctx: x + jnp.tanh(x @ params["w"] + params["b"]),
    head=lambda ends, x, ctx: jnp.mean(x @ ends["out"] - ctx.microbatch["y"]),
)


def trace(
    model: Any = MODEL, params: Any = PARAMS, batch: Any = BATCH, rng: Any = None, **options: Any
) -> Any:
    """Traces the step; arrays become avals, everything else is handed over as it is."""
    options = {"mesh": MESH, "num_microbatches": 2, **options}
    grad_fn = dpj.value_and_grad(model, **options)
    leaves, structure = jax.tree.flatten((params, batch))
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def run(arrays: list, rng: Any) -> Any:
        merged = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            merged[i] = array
        return grad_fn(*jax.tree.unflatten(structure, merged), rng=rng)

    return jax.eval_shape(run, [leaves[i] for i in traced], rng)


def model(**fields: Any) -> dpj.Model:
    return replace(MODEL, **fields)


def with_(part: str, **leaves: Any) -> Any:
    return {**PARAMS, part: {**PARAMS[part], **leaves}}


def constant(value: Any) -> Any:
    """Makes a model's function that returns `value`."""
    return lambda *args: value


def as_often_as_the_device_counts(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    """Sums over an axis in a loop that takes more trips on one of its devices."""

    def body(carry: Any) -> Any:
        trip, total = carry
        total = jax.lax.psum(total, "model")
        return trip + 1, jax.lax.pcast(total, "model", to="varying")

    start = 0, jax.lax.stop_gradient(x).sum()
    start = jax.lax.pcast(start, "model", to="varying")
    _, total = jax.lax.while_loop(lambda c: c[0] <= jax.lax.axis_index("model"), body, start)
    return x + jax.lax.psum(total, "model")


def test_the_model_itself_is_fine():
    loss, grads = trace()
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, PARAMS)


# The beginnings that a message may have.
NAMES = [
    *inspect.signature(dpj.value_and_grad).parameters,
    *("params", "batch", "rng", "schedule '.*'"),
    *(f"model.{field.name}" for field in fields(dpj.Model)),
]


def changing(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    ref = jax.new_ref(jnp.zeros_like(x))
    ref[...] = x
    return x + ref[...]


# Each: keyword arguments of `trace`; the exception; texts that the message must hold.
MISTAKES: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    # the arguments of value_and_grad
    "unknown axis": (
        {"axis": "stage"},
        ValueError,
        ["axis='stage'", "not an axis of the mesh", "'pipe' (2 devices)", "name one of its axes"],
    ),
    "axis not a name": ({"axis": ["pipe"]}, TypeError, ["axis=['pipe']"]),
    "no mesh": ({"mesh": None}, TypeError, ["mesh: must be a jax.sharding.Mesh", "None"]),
    "devices for a mesh": (
        {"mesh": [1, 2]},
        TypeError,
        ["mesh: must be a jax.sharding.Mesh", "list [1, 2]"],
    ),
    "unknown batch axis": (
        {"batch_axes": ("data",)},
        ValueError,
        ["batch_axes=('data',)", "'data' is not an axis of the mesh", "'pipe' (2 devices)"],
    ),
    "batch axis is the pipeline axis": (
        {"batch_axes": "pipe"},
        ValueError,
        ["batch_axes='pipe'", "other than axis='pipe'"],
    ),
    "unknown manual axis": (
        {"manual_axes": "expert"},
        ValueError,
        ["manual_axes='expert'", "not an axis of the mesh", "'pipe' (2 devices)"],
    ),
    "manual axis is the pipeline axis": (
        {"manual_axes": ["pipe"]},
        ValueError,
        ["manual_axes=['pipe']", "other than axis='pipe'"],
    ),
    "manual axes not names": ({"manual_axes": {"a": 1}}, TypeError, ["manual_axes={'a': 1}"]),
    "specs of other parts": (
        {"param_specs": {"blocks": P()}},
        ValueError,
        ["param_specs: must have the keys of params, ['blocks', 'ends'], got ['blocks']"],
    ),
    "specs of other leaves": (
        {"param_specs": {"ends": {"table": P()}, "blocks": P()}},
        ValueError,
        ["param_specs: its tree must be that of params", "ends", "out"],
    ),
    "specs not specs": (
        {"param_specs": {"ends": P(), "blocks": {"w": "model", "b": 3}}},
        TypeError,
        ["param_specs['blocks']['w'] is str 'model'", "param_specs['blocks']['b'] is int 3"],
    ),
    "specs name other axes": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": "model",
            "param_specs": {
                "ends": {"table": P("data"), "out": P("model", None)},
                "blocks": {"w": P("model"), "b": P(None, ("model", "model"))},
            },
        },
        ValueError,
        [
            "manual_axes=('model',)",
            "params['ends']['table'] of shape (4, 4), spec P('data',): 'data' is none of them",
            "params['ends']['out'] of shape (4,), spec P('model', None): has 2 entries for 1 dims",
            "params['blocks']['w']",
            "the layers' dim may be sharded over 'pipe' alone",
            "params['blocks']['b']",
            "'model' stands twice",
        ],
    ),
    "specs with entries that are not for them": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": "model",
            "param_specs": {
                "ends": {"table": P(3, "model"), "out": P(None, unreduced={"model"})},
                "blocks": {"w": P(None, P.UNCONSTRAINED, "model"), "b": None},
            },
        },
        ValueError,
        [
            "params['ends']['table'] of shape (4, 4), spec P(3, 'model'): 3 is none of them",
            "params['ends']['out']",
            "unreduced= and reduced= are not for parameters",
            "params['blocks']['w']",
            "UNCONSTRAINED is none of them",
        ],
    ),
    "specs do not divide": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": ("model",),
            "params": with_("ends", table=jnp.ones((D, D)), odd=jnp.ones((3, 4))),
            "param_specs": {"ends": P("model"), "blocks": P()},
        },
        ValueError,
        ["params['ends']['odd'] of shape (3, 4)", "dim 0 is not divisible by 2 devices"],
    ),
    "loss differs over a manual axis": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": "model",
            "model": model(head=lambda ends, x, ctx: x.mean() * jax.lax.axis_index("model")),
        },
        ValueError,
        ["model.head: its loss varies over 'model'", "jax.lax.psum", "batch_axes"],
    ),
    "aux loss differs over a manual axis": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": "model",
            "model": model(
                block=lambda params, x, ctx: (x, x.mean() * jax.lax.axis_index("model")),
                block_has_aux=True,
            ),
        },
        ValueError,
        ["model.block: its aux loss varies over 'model'"],
    ),
    "everything differs because x does after a block": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": "model",
            "model": model(
                block=lambda params, x, ctx: (x * jax.lax.axis_index("model"), x.mean()),
                head=lambda ends, x, ctx: (x.mean(), {"sum": x.sum()}),
                weight=lambda microbatch: 1 + jax.lax.axis_index("model"),
                has_aux=True,
                block_has_aux=True,
            ),
        },
        ValueError,
        [
            "model.head: its loss varies over 'model'",
            "model.head: metrics['sum'] varies over 'model'",
            "model.block: its aux loss varies over 'model'",
            "model.weight varies over 'model'",
        ],
    ),
    "collective that some devices come to more often": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": "model",
            "model": model(block=as_often_as_the_device_counts),
        },
        ValueError,
        ["model: a jax.lax.while must not hold a collective over 'model'", "wait for ever"],
    ),
    "collective that some devices pass by": (
        {
            "mesh": WIDE_MESH,
            "manual_axes": "model",
            # The one of its derivative: w is the same on all devices.
            "model": model(
                block=lambda params, x, ctx: jax.lax.psum(
                    jax.lax.cond(
                        jax.lax.axis_index("model") == 0,
                        lambda x: x @ params["w"],
                        lambda x: x,
                        jax.lax.pcast(x, "model", to="varying"),
                    ),
                    "model",
                )
            ),
        },
        ValueError,
        ["model: a jax.lax.cond must not hold a collective over 'model'", "jax.lax.pcast"],
    ),
    "collective over an axis left to the partitioner": (
        {
            "mesh": WIDE_MESH,
            "model": model(block=lambda params, x, ctx: jax.lax.pmean(x, "model")),
        },
        ValueError,
        ["only if manual_axes has them", "unbound axis name: model", "add the axis there"],
    ),
    "collective over a batch axis": (
        {
            "mesh": WIDE_MESH,
            "batch_axes": "model",
            "model": model(block=lambda params, x, ctx: jax.lax.pmean(x, "model")),
        },
        ValueError,
        ["only if manual_axes has them", "but name ['model']", "add these there"],
    ),
    "collective over the pipeline axis": (
        {"model": model(block=lambda params, x, ctx: jax.lax.psum(x, "pipe"))},
        ValueError,
        ["name ['pipe']", "not the pipeline axis, which is the library's own"],
    ),
    "mask of other parts": (
        {"trainable": {"ends": True}},
        ValueError,
        ["trainable: must have the keys of params, ['blocks', 'ends'], got ['ends']"],
    ),
    "mask of other leaves": (
        {"trainable": {"ends": True, "blocks": {"w": True}}},
        ValueError,
        ["trainable: its tree must be that of params", "b"],
    ),
    "mask not of bools": (
        {"trainable": lambda params: {"ends": None, "blocks": {"w": 1, "b": True}}},
        TypeError,
        ["trainable['ends']['table'] is NoneType None", "trainable['blocks']['w'] is int 1"],
    ),
    "batch axes not names": ({"batch_axes": 3}, TypeError, ["batch_axes=3", "must be"]),
    "batch axes None": ({"batch_axes": None}, TypeError, ["batch_axes=None", "must be"]),
    "no microbatches": (
        {"num_microbatches": 0},
        ValueError,
        ["num_microbatches=0", "an integer of at least 1"],
    ),
    "negative microbatches": ({"num_microbatches": -2}, ValueError, ["num_microbatches=-2"]),
    "microbatches a float": (
        {"num_microbatches": 2.0},
        TypeError,
        ["num_microbatches=2.0", "integer", "float"],
    ),
    "microbatches a bool": ({"num_microbatches": True}, ValueError, ["num_microbatches=True"]),
    "microbatches None": ({"num_microbatches": None}, TypeError, ["num_microbatches=None"]),
    "unknown schedule": (
        {"schedule": "dualpip"},
        ValueError,
        ["schedule='dualpip'", *map(repr, dpj.schedules.names()), "dualpipe_jax.Schedule"],
    ),
    "schedule not a schedule": (
        {"schedule": 3},
        TypeError,
        ["schedule=3", *map(repr, dpj.schedules.names()), "a Schedule"],
    ),
    "schedule for more ranks": (
        {"schedule": dpj.schedules.gpipe(num_ranks=4, num_microbatches=2)},
        ValueError,
        ["schedule='gpipe'", "is for 4 ranks and 2", "the 2 devices", "pass its name"],
    ),
    "schedule for more microbatches": (
        {"schedule": dpj.schedules.one_f_one_b(num_ranks=2, num_microbatches=6)},
        ValueError,
        ["schedule='1f1b'", "2 ranks and 6 microbatches", "num_microbatches=2", "pass its name"],
    ),
    "unknown remat": (
        {"remat": "full"},
        ValueError,
        ["remat='full'", '"none", "block"', "jax.checkpoint_policies"],
    ),
    "costs not Costs": (
        {"costs": {"forward": 1}},
        TypeError,
        ["costs={'forward': 1}", "must be a dualpipe_jax.Costs, or None"],
    ),
    "execution not an Execution": (
        {"execution": "fast"},
        TypeError,
        ["execution='fast'", "must be a dualpipe_jax.Execution"],
    ),
    "two-tick on TPUs": (
        {"execution": dpj.Execution(overlap="two-tick"), "mesh": TPU_MESH},
        ValueError,
        [
            'Execution(overlap="two-tick"): must not be used on TPUs',
            "every rank would wait for its neighbours in every tick",
            "leave overlap out, or pass False",
        ],
    ),
    "remat a bool": ({"remat": True}, ValueError, ["remat=True", '"none", "block"']),
    "complex grad_dtype of real parameters": (
        {"grad_dtype": "complex64"},
        ValueError,
        ["grad_dtype=complex64: must be real for real", "params['blocks']['b'] is float64[2,4]"],
    ),
    "integer grad_dtype": (
        {"grad_dtype": jnp.int32},
        ValueError,
        ["grad_dtype=", "int32", "floating-point", "None"],
    ),
    "unknown grad_dtype": (
        {"grad_dtype": "float33"},
        (ValueError, TypeError),
        ["grad_dtype='float33'", "floating-point"],
    ),
    "model not a Model": (
        {"model": (MODEL.embed, MODEL.block, MODEL.head)},
        TypeError,
        ["model", "Model", "tuple"],
    ),
    "functions that are none": (
        {"model": model(embed=None, block={"a": 3}, weight=1, layout=["a", "a"])},
        TypeError,
        ["model.embed is NoneType None", "model.block['a'] is int 3", "model.weight is int 1"],
    ),
    # functions of other parameters
    "embed of one parameter": (
        {"model": model(embed=lambda ends: ends["table"])},
        TypeError,
        ["model.embed: must be a function (ends, ctx) -> x, but it takes (ends): too many"],
    ),
    "block of two parameters": (
        {"model": model(block=lambda params, x: x)},
        TypeError,
        ["model.block: must be a function (params, x, ctx) -> x, but it takes (params, x)"],
    ),
    "jitted block of a kind, of two parameters": (
        {
            "model": model(block={"a": jax.jit(lambda params, x: x)}, layout=("a", "a")),
            "params": {**PARAMS, "blocks": {"a": PARAMS["blocks"]}},
        },
        TypeError,
        ["model.block['a']: must be a function (params, x, ctx) -> x, but it takes (params, x)"],
    ),
    "head of four parameters": (
        {"model": model(head=lambda ends, x, ctx, labels: x.sum())},
        TypeError,
        ["model.head: must be a function (ends, x, ctx) -> loss", "'labels'"],
    ),
    "weight of no parameters": (
        {"model": model(weight=lambda: 1.0)},
        TypeError,
        ["model.weight: must be a function (microbatch) -> scalar, but it takes ()"],
    ),
    "mask of two parameters": (
        {"trainable": lambda path, leaf: True},
        TypeError,
        ["trainable: must be a function params -> tree, but it takes (path, leaf)"],
    ),
    "new values of two parameters": (
        {"overwrite": lambda path, leaf: True},
        TypeError,
        ["overwrite: must be a function params -> tree, but it takes (path, leaf)"],
    ),
    # rng
    "two keys": (
        {"rng": jax.random.split(jax.random.key(0))},
        TypeError,
        ["rng: must be one key", "key<fry>[2]"],
    ),
    "a key of another size": (
        {"rng": jnp.zeros(7, jnp.uint32)},
        TypeError,
        ["rng: must be one key", "None; got an array uint32[7]"],
    ),
    "random numbers without a key": (
        {"model": model(block=lambda p, x, ctx: x * jax.random.normal(ctx.rng, x.shape))},
        ValueError,
        ["rng=None: one of the model's functions uses ctx.rng", "call with rng=jax.random.key(0)"],
    ),
    # params
    "params not a dict": (
        {"params": [jnp.ones(3)]},
        ValueError,
        ["params", '"ends"', '"blocks"', "got list"],
    ),
    "params with a wrong key": (
        {"params": {"ends": PARAMS["ends"], "layers": PARAMS["blocks"]}},
        ValueError,
        ["params", '"ends"', '"blocks"', "['ends', 'layers']"],
    ),
    "params with a key too many": (
        {"params": {**PARAMS, "step": jnp.ones(())}},
        ValueError,
        ["'step'", '"ends"', '"blocks"'],
    ),
    "no blocks": (
        {"params": {**PARAMS, "blocks": {}}},
        ValueError,
        ['params["blocks"]', "must have leaves"],
    ),
    "too few layers": (
        {"params": {**PARAMS, "blocks": {"w": jnp.ones((1, D, D)), "b": jnp.ones((1, D))}}},
        ValueError,
        ['params["blocks"]', "1 layers", "2 stages", "fewer devices", "deeper model"],
    ),
    "leading dims differ": (
        {"params": with_("blocks", c=jnp.ones((3, 2)), d=jnp.ones(()), e={"f": jnp.ones((4,))})},
        ValueError,
        [
            'params["blocks"]',
            "2 in most leaves",
            "['c'] of shape (3, 2)",
            "['d'] of shape ()",
            "['e']['f'] of shape (4,)",
            "stack the parameters",
        ],
    ),
    "params not arrays": (
        {"params": with_("ends", name="abc", size=object())},
        TypeError,
        ["every leaf must be an array", "['ends']['name'] is str 'abc'", "['ends']['size'] is obj"],
    ),
    # batch
    "batch indivisible": (
        {"num_microbatches": 3},
        ValueError,
        ["batch", "4, is not divisible by num_microbatches=3", "pad or cut", "3 or 6 rows"],
    ),
    "batch smaller than its microbatches": (
        {"num_microbatches": 8},
        ValueError,
        ["batch", "4,", "num_microbatches=8", "to 8 rows"],
    ),
    "batch of no rows": (
        {"batch": {"x": jnp.ones((0, D)), "y": jnp.ones(0)}},
        ValueError,
        ["batch", "0,", "2 rows"],
    ),
    "batch sizes differ": (
        {"batch": {**BATCH, "z": jnp.ones((3, 1))}},
        ValueError,
        ["batch", "share their leading dim", "['z'] of shape (3, 1)", "['x'] of shape (4, 4)"],
    ),
    "batch with scalars": (
        {"batch": {**BATCH, "s": jnp.ones(()), "t": 3.0}},
        ValueError,
        ["batch", "leading dim", "['s'] is a scalar", "['t'] is a scalar"],
    ),
    "batch empty": (
        {"batch": {}},
        ValueError,
        ["batch: must hold at least one array", "at least one array"],
    ),
    "batch not arrays": (
        {"batch": {**BATCH, "n": "abc"}},
        TypeError,
        ["batch: every leaf must be an array", "['n'] is str 'abc'"],
    ),
    # block
    "block changes the structure": (
        {"model": model(block=lambda p, x, c: {"x": x})},
        ValueError,
        ["model.block", "structure of x", "PyTreeDef(*)", "{'x': *}", "return x as it was given"],
    ),
    "block returns nothing": (
        {"model": model(block=constant(None))},
        ValueError,
        ["model.block", "structure", "None"],
    ),
    "block changes shapes and dtypes": (
        {
            "model": dpj.Model(
                embed=lambda e, c: {"a": c.microbatch["x"], "b": c.microbatch["y"], "ok": 1.0},
                block=lambda p, x, c: {**x, "a": x["a"][:1], "b": x["b"].astype(jnp.bfloat16)},
                head=lambda e, x, c: x["ok"],
            )
        },
        ValueError,
        [
            "model.block",
            "x['a'] is given as float64[2,4] and returned as float64[1,4]",
            "x['b'] is given as float64[2] and returned as bfloat16[2]",
            "cast or reshape",
        ],
    ),
    "block returns no array": (
        {"model": model(block=constant("x"))},
        TypeError,
        ["model.block", "array", "'x'"],
    ),
    "aux loss without block_has_aux": (
        {"model": model(block=lambda p, x, c: (x, jnp.float64(0)))},
        (ValueError, TypeError),
        ["model.block", "block_has_aux=True"],
    ),
    "block_has_aux without aux loss": (
        {"model": model(block_has_aux=True)},
        TypeError,
        ["model.block", "block_has_aux=True", "(x, aux_loss)", "float64[2,4]"],
    ),
    "aux loss not a scalar": (
        {"model": model(block_has_aux=True, block=lambda p, x, c: (x, x))},
        ValueError,
        ["model.block", "aux loss", "scalar", "float64[2,4]", "reduce"],
    ),
    # head
    "loss a vector": (
        {"model": model(head=lambda e, x, c: x[:, 0])},
        ValueError,
        ["model.head", "floating-point scalar", "float64[2]", "mean"],
    ),
    "loss an integer": (
        {"model": model(head=constant(1))},
        ValueError,
        ["model.head", "floating-point scalar", "int64[]"],
    ),
    "no loss": ({"model": model(head=constant(None))}, TypeError, ["model.head", "scalar", "None"]),
    "loss in a dict": (
        {"model": model(head=lambda e, x, c: {"loss": x.sum()})},
        (ValueError, TypeError),
        ["model.head", "scalar", "dict"],
    ),
    "metrics without has_aux": (
        {"model": model(head=lambda e, x, c: (x.sum(), {"hits": x.sum()}))},
        TypeError,
        ["model.head", "scalar loss", "has_aux=True"],
    ),
    "empty metrics without has_aux": (
        {"model": model(head=lambda e, x, c: (x.sum(), {}))},
        TypeError,
        ["model.head", "scalar loss", "has_aux=True"],
    ),
    "has_aux without metrics": (
        {"model": model(has_aux=True)},
        TypeError,
        ["model.head", "has_aux=True", "(loss, metrics)", "float64[]"],
    ),
    "has_aux with three results": (
        {"model": model(has_aux=True, head=lambda e, x, c: (x.sum(), 1, 2))},
        TypeError,
        ["model.head", "has_aux=True", "(loss, metrics)"],
    ),
    "metrics no array": (
        {"model": model(has_aux=True, head=lambda e, x, c: (x.sum(), {"name": "abc"}))},
        TypeError,
        ["model.head", "metrics", "['name']", "'abc'"],
    ),
    # Arrays that change in place
    "block with a mutable array": (
        {"model": model(block=changing)},
        TypeError,
        ["model: ", "block", "jax.new_ref", "'new_ref'", "values"],
    ),
    # embed and weight
    "embed returns nothing": (
        {"model": model(embed=constant(()))},
        ValueError,
        ["model.embed", "array", "()"],
    ),
    "weight not a scalar": (
        {"model": model(weight=lambda m: m["y"])},
        ValueError,
        ["model.weight", "scalar", "float64[2]", "sum it"],
    ),
    "no weight": (
        {"model": model(weight=constant(None))},
        (ValueError, TypeError),
        ["model.weight", "scalar", "None"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_explained(mistake):
    arguments, error, texts = MISTAKES[mistake]
    with pytest.raises(error, match=re.escape(texts[0])) as raised:
        trace(**arguments)
    message = str(raised.value)
    missing = [text for text in texts if text not in message]
    assert not missing, f"the message is:\n{message}"
    # All in one form: the argument, its value where that is short, the requirement, the fix.
    assert re.match(rf"({'|'.join(NAMES)})(\[[^]]*\])*(=|: )", message), message
    assert re.search(r"\b(must|may|not|fewer|changes|closes)\b", message), message


def test_all_unknown_axes_are_named():
    with pytest.raises(ValueError, match=r"batch_axes=\('a', 'pipe', 'b'\): 'a', 'b' are not axes"):
        trace(batch_axes=("a", "pipe", "b"))


# The same checks stand before the two other entry points.
SHARED = [
    "batch indivisible",
    "batch sizes differ",
    "leading dims differ",
    "params with a wrong key",
    "params not arrays",
    "block changes the structure",
    "block_has_aux without aux loss",
    "loss a vector",
    "has_aux without metrics",
    "weight not a scalar",
    "block of two parameters",
    "random numbers without a key",
]


@pytest.mark.parametrize("mistake", SHARED)
@pytest.mark.parametrize("entry", ["evaluate", "sequential"])
def test_mistake_is_explained_by_every_entry_point(entry, mistake):
    arguments, error, texts = MISTAKES[mistake]
    num_microbatches = arguments.get("num_microbatches", 2)
    options = {"mesh": MESH} if entry == "evaluate" else {}
    make = getattr(dpj, entry)
    loss_fn = make(arguments.get("model", MODEL), num_microbatches=num_microbatches, **options)
    params, batch = arguments.get("params", PARAMS), arguments.get("batch", BATCH)
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda: loss_fn(params, batch))
    missing = [text for text in texts if text not in str(raised.value)]
    assert not missing, f"the message is:\n{raised.value}"


@pytest.mark.parametrize(
    "arguments",
    [{"num_microbatches": 0}, {"num_microbatches": 2.0}, {"num_microbatches": "4"}],
    ids=str,
)
def test_every_entry_point_checks_its_own_arguments(arguments):
    entries: list[tuple[Any, dict[str, Any]]] = [
        (dpj.evaluate, {"mesh": MESH}),
        (dpj.sequential, {}),
    ]
    for make, options in entries:
        with pytest.raises((ValueError, TypeError), match="num_microbatches="):
            make(MODEL, **options, **arguments)
    with pytest.raises(ValueError, match="axis='stage'"):
        dpj.evaluate(MODEL, mesh=MESH, num_microbatches=2, axis="stage")


def test_arguments_are_checked_before_anything_is_traced():
    def never(*args):
        raise AssertionError("called")

    model = dpj.Model(embed=never, block=never, head=never, weight=never)
    for arguments in ({"schedule": "none"}, {"axis": "x"}, {"remat": "full"}, {"grad_dtype": int}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            trace(model, **arguments)
    grad_fn = dpj.value_and_grad(model, mesh=MESH, num_microbatches=3)
    with pytest.raises(ValueError, match="divisible"):
        grad_fn(PARAMS, BATCH)


def test_indivisible_batch_over_shards():
    mesh = jax.make_mesh((2, 2), ("pipe", "data"), devices=jax.devices()[:4])
    # 6 rows would do for 2 microbatches or for 2 shards, not for both.
    batch = jax.tree.map(lambda a: jnp.ones((6, *a.shape[1:])), BATCH)
    with pytest.raises(ValueError, match=r"6.*num_microbatches=2 x 2 shards over 'data'") as raised:
        trace(batch=batch, mesh=mesh, batch_axes="data")
    assert "4 or 8 rows" in str(raised.value)


@pytest.mark.parametrize(
    "scalar", [2.0, 2, True, np.float32(2), np.int8(2)], ids=lambda s: type(s).__name__
)
def test_scalars_are_arrays(scalar):
    """`params` may hold Python and NumPy scalars, for every entry point."""
    scaled = model(head=lambda e, x, c: x.sum() * e["scale"])
    params = with_("ends", scale=scalar)
    _, grads = trace(scaled, params)
    is_float = isinstance(scalar, float | np.floating)
    assert (grads["ends"]["scale"].dtype == jax.dtypes.float0) == (not is_float)
    loss_fn = dpj.sequential(scaled, num_microbatches=2)
    assert jax.eval_shape(lambda: loss_fn(params, BATCH)).shape == ()


def test_types_near_the_required_ones_are_taken():
    trace(num_microbatches=np.int64(2))
    trace(batch_axes=[])
    for dtype in ("bfloat16", np.float32, jnp.dtype("float32"), float):
        grads = trace(grad_dtype=dtype)[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    trace(remat=jax.checkpoint_policies.dots_saveable)
    trace(remat=jax.checkpoint_policies.save_only_these_names("x"))
    for rng in (jax.random.key(0), jax.random.PRNGKey(0)):
        trace(rng=rng)


@pytest.mark.parametrize("mesh_types", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_errors_do_not_depend_on_the_mesh(mesh_types):
    mesh = jax.make_mesh((2,), ("pipe",), axis_types=(mesh_types,), devices=jax.devices()[:2])
    arguments, error, texts = MISTAKES["block changes shapes and dtypes"]
    with pytest.raises(error) as raised:
        trace(**arguments, mesh=mesh)
    assert all(text in str(raised.value) for text in texts)


def test_gradients_have_the_structure_of_any_params():
    """A dict of another type comes back as that type, as from `jax.grad`."""
    evaluate = dpj.evaluate(MODEL, mesh=MESH, num_microbatches=2)
    for make in MAPPINGS:
        params = make(PARAMS)
        assert jax.tree.structure(trace(params=params)[1]) == jax.tree.structure(params)
        assert jax.eval_shape(evaluate, params, BATCH).shape == ()


@pytest.mark.parametrize("mesh_types", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_rows_over_an_axis_that_is_not_named_are_refused(mesh_types):
    """Outside of jit, and inside where types say how rows are sharded."""
    names, devices = ("pipe", "data"), jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), names, axis_types=(mesh_types,) * 2, devices=devices)
    spec = jax.sharding.PartitionSpec("data")
    rows = jax.tree.map(lambda a: jnp.ones((8, *a.shape[1:]), a.dtype), BATCH)
    batch = jax.device_put(rows, jax.sharding.NamedSharding(mesh, spec))
    options = {"mesh": mesh, "num_microbatches": 2}
    is_explicit = mesh_types is jax.sharding.AxisType.Explicit
    for make in (dpj.value_and_grad, dpj.evaluate):
        forgets, names_it = make(MODEL, **options), make(MODEL, **options, batch_axes="data")
        message = r"batch: its rows are sharded .*\n.*over 'data': batch_axes=\('data',\)"
        with pytest.raises(ValueError, match=message):
            forgets(PARAMS, batch)
        with jax.set_mesh(mesh):
            if is_explicit:
                with pytest.raises(ValueError, match=message):
                    jax.eval_shape(forgets, PARAMS, batch)
            jax.eval_shape(names_it, PARAMS, batch)
    other = jax.make_mesh((2, 2), ("pipe", "model"), devices=devices)
    step = dpj.value_and_grad(MODEL, mesh=other, num_microbatches=2)
    with pytest.raises(ValueError, match=r"(?s)mesh, whose axes are \('pipe', 'model'\).*'data'"):
        step(PARAMS, batch)


def test_arrays_on_other_devices_are_refused():
    step = dpj.value_and_grad(MODEL, mesh=MESH, num_microbatches=2)
    params = jax.device_put(PARAMS, jax.devices()[1])
    with pytest.raises(ValueError, match=r"(?s)dualpipe_jax.shardings.*params\['blocks'\].* cpu:1"):
        step(params, BATCH)


@pytest.mark.parametrize("make", [dpj.value_and_grad, dpj.evaluate, dpj.apply])
def test_a_step_is_not_differentiated(make, monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)  # some of its slots are on the host
    on_host = {"execution": dpj.Execution(slots_on_device=1)}
    more = on_host if make is dpj.value_and_grad else {}
    step = make(MODEL, mesh=MESH, num_microbatches=2, **more)

    def closing_over(scale):  # without slots on the host, where JAX's own error comes first
        scaled = model(block=lambda params, x, ctx: x + scale * jnp.tanh(x @ params["w"]))
        return make(scaled, mesh=MESH, num_microbatches=2)(PARAMS, BATCH)

    arguments = PARAMS, BATCH
    cases = (step, arguments), (jax.jit(step), arguments), (jax.jit(closing_over), (1.0,))
    for function, arguments in cases:

        def loss(*arguments, function=function):
            return jnp.sum(jax.tree.leaves(function(*arguments))[0])

        with pytest.raises(
            TypeError, match=r"value_and_grad gives the gradient already.*sequential"
        ):
            jax.grad(loss)(*arguments)


def test_steps_have_names_and_need_jit():
    step = dpj.value_and_grad(MODEL, mesh=MESH, num_microbatches=2)
    assert repr(step) == "<dualpipe_jax.value_and_grad: dualpipe, 2 ranks, 2 microbatches>"
    assert "@jit_pipelined_value_and_grad " in jax.jit(step).lower(PARAMS, BATCH).as_text()
    with jax.disable_jit(), pytest.raises(RuntimeError, match=r"jax_disable_jit.*sequential"):
        step(PARAMS, BATCH)


def test_a_policy_that_offloads_in_a_loop_is_refused():
    policy = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")

    def block(layer, x, ctx):
        step = jax.checkpoint(lambda x, _: (jnp.tanh(x @ layer), None), policy=policy)
        return jax.lax.scan(step, x, length=2)[0]

    params = {"ends": jnp.ones(3), "blocks": jnp.ones((2, 3, 3))}
    parts = {"embed": lambda e, c: c.microbatch * e, "head": lambda e, x, c: (x * e).mean()}
    with pytest.raises(
        ValueError, match=r"'scan' has a value in the host's memory; .* name others"
    ):
        trace(dpj.Model(block=block, **parts), params, jnp.ones((4, 3)))


def test_a_block_that_computes_on_the_host_is_refused():
    def block(layer, x, ctx):
        there = jax.device_put(jax.lax.stop_gradient(x), jax.memory.Space.Host)
        return x + jax.device_put(there * 2, jax.memory.Space.Device)

    params = {"ends": jnp.ones(3), "blocks": jnp.ones((2, 3, 3))}
    parts = {"embed": lambda e, c: c.microbatch * e, "head": lambda e, x, c: (x * e).mean()}
    with pytest.raises(ValueError, match="has a value in the host's memory"):
        trace(dpj.Model(block=block, **parts), params, jnp.ones((4, 3)))
