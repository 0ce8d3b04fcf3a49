"""Layers of different kinds in one model: each kind has its own block, stack and buffers.

That gradients are exact, with every schedule and option, is in test_exact.py.
"""

import re
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from dualpipe_jax._api import build
from dualpipe_jax._api import sequential as _sequential
from dualpipe_jax._executor import Step
from dualpipe_jax._model.kinds import blocks_of
from tests.cheap_keys import make_key
from tests.kinds import BLOCKS, HIDDEN, NUM_EXPERTS, dense, layout_of, make_kinds, make_params, moe
from tests.mappings import MAPPINGS
from tests.models import (
    LENGTH,
    ROWS,
    WIDTH,
    assert_close,
    make_batch,
    make_mesh,
    sequential_value_and_grad,
)


# Few runs of one kind, and more than the sequential model spells out.
@pytest.mark.parametrize("letters", ["DDM", "DMDMDMDSM"])
def test_sequential_is_the_plain_meaning(letters: str) -> None:
    """Against a Python loop over the layers."""
    model = make_kinds(letters, frozenset(["dropout", "block_has_aux"]))
    params, batch, rng = make_params(letters), make_batch(2), make_key(3)
    losses = []
    for m in range(2):
        microbatch = jax.tree.map(lambda leaf, m=m: leaf[ROWS * m : ROWS * (m + 1)], batch)
        k = jax.random.fold_in(rng, m)

        def ctx(i: int, layer: Any = None, k: Any = k, rows: Any = microbatch) -> Any:
            return dpj.Context(microbatch=rows, layer=layer, rng=jax.random.fold_in(k, i))

        x = model.embed(params["ends"], ctx(len(letters)))
        seen = dict.fromkeys(BLOCKS, 0)
        for i, kind in enumerate(layout_of(letters)):
            own = jax.tree.map(lambda leaf, j=seen[kind]: leaf[j], params["blocks"][kind])
            x, aux = BLOCKS[kind](own, x, ctx(i, jnp.int32(i)))
            seen[kind] += 1
            losses.append(aux.astype(jnp.float64))
        losses.append(model.head(params["ends"], x, ctx(len(letters) + 1)))
    loss = dpj.sequential(model, num_microbatches=2)(params, batch, rng=rng)
    np.testing.assert_allclose(loss, sum(losses) / 2, rtol=1e-13)


def test_both_ways_of_the_sequential_model_have_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, params, batch = make_kinds("DMM"), make_params("DMM"), make_batch(2)
    by_runs = sequential_value_and_grad(model, 2)(params, batch)
    monkeypatch.setattr(_sequential, "_MAX_RUNS", 0)
    by_switch = sequential_value_and_grad(model, 2)
    assert "case" in by_switch.lower(params, batch).as_text()
    assert_close(by_switch(params, batch), by_runs)


def test_evaluate_equals_sequential() -> None:
    letters = "DMMDM"
    model = make_kinds(letters, frozenset(["dropout", "weight", "block_has_aux", "has_aux"]))
    params, batch, rng = make_params(letters), make_batch(4), make_key(3)
    evaluate = dpj.evaluate(model, mesh=make_mesh(2), num_microbatches=4)
    want = jax.jit(dpj.sequential(model, num_microbatches=4))
    assert_close(jax.jit(evaluate)(params, batch, rng=rng), want(params, batch, rng=rng))


@pytest.mark.parametrize("types", ["Auto", "Explicit"])
def test_without_jit_and_with_any_dict(types: str) -> None:
    """Stacks as they are sharded after a step, in dicts that order their keys as they like."""
    mesh = jax.make_mesh(
        (2,),
        ("pipe",),
        axis_types=(getattr(jax.sharding.AxisType, types),),
        devices=jax.devices()[:2],
    )
    letters = "DDMMMM"
    model, params, batch = make_kinds(letters), make_params(letters), make_batch(2)
    _, want = sequential_value_and_grad(model, 2)(params, batch)
    over_pipe = jax.device_put(params["blocks"], jax.NamedSharding(mesh, jax.P("pipe")))
    backwards = OrderedDict((kind, over_pipe[kind]) for kind in ("moe", "dense"))
    blocks = backwards if types == "Auto" else flax.core.freeze(over_pipe)
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2)
    _, grads = grad_fn({**params, "blocks": blocks}, batch)
    assert jax.tree.structure(grads["blocks"]) == jax.tree.structure(blocks)
    for kind, stack in want["blocks"].items():
        assert_close(jax.tree.leaves(grads["blocks"][kind]), jax.tree.leaves(stack))
    assert grads["blocks"]["moe"]["router"].sharding.spec[0] == "pipe"


def test_one_block_may_choose_by_layer() -> None:
    """The other way to have two kinds: every layer holds the parameters of both."""
    letters = "DMM"
    model, params, batch = make_kinds(letters), make_params(letters), make_batch(2)

    def either(params: Any, x: Any, ctx: dpj.Context) -> Any:
        assert ctx.layer is not None
        return jax.lax.cond(
            ctx.layer < 1,
            lambda: dense(params["dense"], x, ctx)[0],
            lambda: moe(params["moe"], x, ctx)[0],
        )

    grad_fn = dpj.value_and_grad(
        replace(model, block=either, layout=None), mesh=make_mesh(2), num_microbatches=2
    )
    pads = {"dense": (0, 2), "moe": (1, 0)}
    blocks = {
        kind: jax.tree.map(
            lambda a, kind=kind: jnp.pad(a, [pads[kind]] + [(0, 0)] * (a.ndim - 1)), stack
        )
        for kind, stack in params["blocks"].items()
    }
    loss, grads = jax.jit(grad_fn)({**params, "blocks": blocks}, batch)
    want, want_grads = sequential_value_and_grad(model, 2)(params, batch)
    assert_close(loss, want)
    got = {"dense": grads["blocks"]["dense"]["up"][:1], "moe": grads["blocks"]["moe"]["router"][1:]}
    mine = want_grads["blocks"]
    assert_close(got, {"dense": mine["dense"]["up"], "moe": mine["moe"]["router"]})


def lowered(letters: str, num_ranks: int, schedule: str = "dualpipe") -> Any:
    model, params, batch = make_kinds(letters), make_params(letters), make_batch(4)
    mesh = make_mesh(num_ranks)
    sharding = jax.NamedSharding(mesh, jax.P("pipe"))
    params = {**params, "blocks": jax.device_put(params["blocks"], sharding)}
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=4, schedule=schedule)
    return jax.jit(grad_fn).lower(params, batch)


@pytest.mark.slow
def test_stacks_stay_where_they_are_and_buffers_in_place() -> None:
    """Nothing is gathered, no kind is padded to another, no buffer is copied in a loop."""
    text = lowered("DDMMMMMM", 2).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    # The stage that holds both has two of each; the fullest has two of one and four of the other.
    assert f"f64[2,{WIDTH},{HIDDEN}]" in text
    assert f"f64[4,{NUM_EXPERTS},{WIDTH},{WIDTH}]" in text
    assert f"f64[4,{WIDTH},{HIDDEN}]" not in text
    in_loops = text[: text.index("\nENTRY")].splitlines()
    weights = rf"f64\[2,{WIDTH},{HIDDEN}\]", rf"f64\[4,{NUM_EXPERTS},{WIDTH},{WIDTH}\]"
    for shape in (*weights, rf"f64\[\d,2,{ROWS},{LENGTH},", rf"f64\[\d,4,{ROWS},{LENGTH},"):
        mine = [line for line in in_loops if re.search(f"= {shape}", line)]
        assert mine
        assert not [line for line in mine if " copy(" in line]


@pytest.mark.parametrize(
    ("few", "many"),
    [("DD" + "M" * 8, "DD" + "M" * 18), ("DM" * 6, "DM" * 10)],
    ids=["one after the other", "by turns"],
)
def test_program_size_does_not_grow_with_layers(few: str, many: str) -> None:
    assert lowered(few, 2).as_text().count("\n") == lowered(many, 2).as_text().count("\n")


@pytest.mark.slow
def test_dead_values_are_never_read() -> None:
    letters, num_microbatches = "DDMMDMM", 5
    model = make_kinds(letters, frozenset(["block_has_aux"]))
    schedule = dpj.schedules.make("dualpipe", num_ranks=2, num_microbatches=num_microbatches)
    step = Step(
        model=model,
        tables=schedule.compiled().tables,
        mesh=make_mesh(2),
        axis="pipe",
        batch_axes=(),
        block=build.block_of(model, "none"),
        num_layers=len(letters),
        execution=dpj.Execution(split_backward=True, deferred="recompute"),
        poison=True,
    )
    params, batch = make_params(letters), make_batch(num_microbatches)
    loss, grads = jax.jit(step)(params, batch, None)
    want, want_grads = sequential_value_and_grad(model, num_microbatches)(params, batch)
    assert_close(loss, want)
    assert_close(grads["blocks"], want_grads["blocks"])


def test_models_are_equal_and_hash_alike() -> None:
    model = make_kinds("DMM")
    assert isinstance(model.block, dict)
    again = replace(model, block={**model.block}, layout=["dense", "moe", "moe"])
    assert again == model
    assert hash(again) == hash(model)
    assert again.layout == ("dense", "moe", "moe")
    assert replace(model, layout=("moe", "dense", "moe")) != model


MODEL, PARAMS = make_kinds("DMM"), make_params("DMM")
EXTRA = {"norm": {"g": jnp.ones((3, 2))}}
# Each: fields of the model; blocks; the exception; texts that the message must hold.
MISTAKES: dict[str, tuple[dict[str, Any], Any, Any, list[str]]] = {
    "no layout": (
        {"layout": None},
        PARAMS["blocks"],
        ValueError,
        ["model.layout=None", "'dense', 'moe'", "one function for all layers"],
    ),
    "no dict of blocks": (
        {"block": dense},
        PARAMS["blocks"],
        ValueError,
        ["model.layout=('dense', 'moe', 'moe')", "function", "leave layout out"],
    ),
    "layout a string": (
        {"layout": "DMM"},
        PARAMS["blocks"],
        TypeError,
        ["model.layout='DMM'", "a sequence of strings"],
    ),
    "layout of numbers": (
        {"layout": (0, 1)},
        PARAMS["blocks"],
        TypeError,
        ["model.layout=(0, 1)", "a sequence of strings"],
    ),
    "no layers": (
        {"layout": ()},
        PARAMS["blocks"],
        ValueError,
        ["model.layout=()", "at least one"],
    ),
    "kinds that do not fit": (
        {"layout": ("norm", "moe", "nrom", "norm")},
        PARAMS["blocks"],
        ValueError,
        [
            "model.layout",
            "names 'norm' (layers 0, 3), but block has 'dense', 'moe'",
            "names 'nrom' (layers 2)",
            "block has 'dense', but no layer is of that kind",
        ],
    ),
    "one stack": (
        {},
        [jnp.ones((3, 2))],
        ValueError,
        ['params["blocks"]', "a dict with a stack for each kind", "got list", "'dense', 'moe'"],
    ),
    "stacks that do not fit": (
        {},
        {
            **EXTRA,
            "moe": {"a": jnp.ones((3, 2)), "b": jnp.ones(()), "c": jnp.ones((2, 5))},
        },
        ValueError,
        [
            'params["blocks"]',
            "nothing for 'dense', of which the layout has 1 layers",
            "['norm'] is of no kind in the layout, which has ['dense', 'moe']",
            "['moe']['a'] of shape (3, 2), but the layout has 2 layers of 'moe'",
            "['moe']['b'] of shape ()",
        ],
    ),
    "fewer layers than stages": (
        {"layout": ("dense",), "block": {"dense": blocks_of(MODEL)["dense"]}},
        {"dense": PARAMS["blocks"]["dense"]},
        ValueError,
        ["1 layers", "2 stages"],
    ),
    "a kind that changes x": (
        {"block": {**blocks_of(MODEL), "moe": lambda params, x, ctx: x[:1]}},
        PARAMS["blocks"],
        ValueError,
        ["model.block['moe']: changes the shape", "return x as it was given"],
    ),
}


@pytest.mark.parametrize("entry", ["value_and_grad", "evaluate", "sequential"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_explained(mistake: str, entry: str) -> None:
    fields, blocks, error, texts = MISTAKES[mistake]
    if mistake == "fewer layers than stages" and entry == "sequential":
        texts = []  # it has no stages
    options = {} if entry == "sequential" else {"mesh": make_mesh(2)}

    def run() -> Any:
        make = getattr(dpj, entry)
        function = make(replace(MODEL, **fields), num_microbatches=2, **options)
        return jax.eval_shape(
            lambda: function({"ends": PARAMS["ends"], "blocks": blocks}, make_batch(2))
        )

    if not texts:
        assert run().shape == ()
        return
    with pytest.raises(error) as raised:
        run()
    missing = [text for text in texts if text not in str(raised.value)]
    assert not missing, f"the message is:\n{raised.value}"


@pytest.mark.parametrize("make", MAPPINGS)
def test_gradients_have_the_structure_of_any_blocks(make: Any) -> None:
    params = make_params("DMS")
    params = {**params, "blocks": make(params["blocks"])}
    grad_fn = dpj.value_and_grad(make_kinds("DMS"), mesh=make_mesh(2), num_microbatches=2)
    _, grads = jax.eval_shape(grad_fn, params, make_batch(2))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
