"""The terms of `grad_fn.memory` add up to the buffers that the executor carries."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import dualpipe_jax as dpj
from dualpipe_jax._executor import program
from tests.models import make_batch, make_mesh, make_model, make_params

NUM_MICROBATCHES = 10
ARRIVING = "arriving while others leave"


def bytes_of(avals: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(avals))


OF_FULL_BACKWARD = "stash of a full backward, without a slot"
SPLIT, FULL = (dpj.Execution(split_backward=is_split) for is_split in (True, False))


def look(
    monkeypatch: pytest.MonkeyPatch, num_layers: int, **options: Any
) -> tuple[dict[str, int], Any]:
    """Returns the terms of a step, and the state that it starts with."""
    started = []
    start = program.start

    def spy(*args: Any) -> Any:
        rank, state, weight = start(*args)
        started.append(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state))
        return rank, state, weight

    monkeypatch.setattr(program, "start", spy)
    grad_fn = dpj.value_and_grad(
        make_model(frozenset(["pytree"])),
        mesh=make_mesh(4),
        num_microbatches=NUM_MICROBATCHES,
        **options,
    )
    args = make_params(num_layers), make_batch(NUM_MICROBATCHES)
    report = grad_fn.memory(*args)
    jax.eval_shape(grad_fn, *args)
    in_beats, in_ticks = (
        sum(term.num_bytes for term in report.terms if term.phase in ("", phase))
        for phase in ("beats", "ticks")
    )
    assert report.num_bytes == max(in_beats, in_ticks)
    # Terms of the beats alone are made when the steady phase begins.
    terms = {term.name: term.num_bytes for term in report.terms if term.phase != "beats"}
    return terms, started[-1]


@pytest.mark.parametrize(
    ("num_layers", "options", "is_full"),
    [
        (8, {"schedule": "1f1b", "remat": "block"}, True),
        (8, {"schedule": "1f1b"}, False),
        (8, {"schedule": "1f1b", "execution": SPLIT}, False),
        (4, {"schedule": "1f1b"}, False),  # one layer cannot be divided
        (
            8,
            {"schedule": "interleaved-1f1b", "remat": "block", "layers_per_stage": (1,) * 8},
            True,
        ),
        (16, {"schedule": "interleaved-1f1b", "remat": "block"}, True),
        (8, {"schedule": "chimera"}, False),
        (8, {"schedule": "dualpipe", "execution": dpj.Execution(overlap=True)}, False),
        (8, {"schedule": "dualpipe", "execution": replace(FULL, overlap=True)}, True),
        (
            8,
            {
                "schedule": "dualpipe",
                "execution": dpj.Execution(overlap=False),
                "remat": "block",
            },
            True,
        ),
    ],
)
def test_full_backwards_by_default(num_layers: int, options: dict[str, Any], is_full: bool) -> None:
    """Where they are predicted to be faster."""
    grad_fn = dpj.value_and_grad(
        make_model(frozenset(["pytree"])), mesh=make_mesh(4), num_microbatches=8, **options
    )
    report = grad_fn.memory(make_params(num_layers), make_batch(8))
    assert (OF_FULL_BACKWARD in {term.name for term in report.terms}) == is_full
    assert report.execution.split_backward == (not is_full)


@pytest.mark.parametrize(
    ("num_layers", "schedule", "remat", "execution"),
    [
        (8, "dualpipe", "none", dpj.Execution(overlap=True)),
        (8, "dualpipe", "block", dpj.Execution(overlap=True)),
        (11, "dualpipe", "none", dpj.Execution(overlap=True)),
        (8, "zb-h1", "block", dpj.Execution()),
        (8, "zb-h1", "block", dpj.Execution(deferred="store")),
        (8, "interleaved-1f1b", "none", dpj.Execution()),
        (8, "1f1b", "none", dpj.Execution(overlap="two-tick")),
    ],
)
@pytest.mark.parametrize("full_backward", [False, True])
def test_terms_add_up_to_the_carried_buffers(
    monkeypatch: pytest.MonkeyPatch,
    num_layers: int,
    schedule: str,
    remat: str,
    execution: dpj.Execution,
    full_backward: bool,
) -> None:
    execution = replace(execution, split_backward=not full_backward)
    terms, state = look(
        monkeypatch, num_layers, schedule=schedule, remat=remat, execution=execution
    )
    assert terms["received x and cotangents"] == bytes_of(state.received)
    for name, buffers in (
        ("residuals for I", state.slots["residual"]),
        ("residuals for I and W", state.slots["weight_residual"]),
        ("stashes for W", state.slots["stash"]),
    ):
        assert terms.get(name, 0) == bytes_of(buffers), name
    recomputes = remat == "block" and execution.deferred != "store"
    of_deferred = "inputs of deferred W that recompute" if recomputes else "stashes for deferred W"
    assert terms.get(of_deferred, 0) == bytes_of(state.slots["deferred"])
    assert (terms.get(OF_FULL_BACKWARD, 0) > 0) == full_backward
    assert full_backward == (terms.get("stashes for W", 0) == 0)
    assert terms["between ranks"] == bytes_of(state.messages)
    assert terms["gradients added up, of layers"] == bytes_of(state.block_grads)
    assert terms["gradients added up, of the rest"] == bytes_of(state.ends_grads)


@pytest.mark.parametrize(
    ("options", "in_beats", "in_ticks"),
    [
        ({}, ["stash of a beat, without a slot", ARRIVING], ["stashes for W"]),
        (
            {"remat": "block"},
            ["stash of a beat, without a slot", ARRIVING],
            ["stashes for W", "inputs of deferred W that recompute"],
        ),
        # Looped layers stash in beats, too.
        (
            {"remat": "block", "unroll": False},
            [ARRIVING],
            ["inputs of deferred W that recompute"],
        ),
        ({"schedule": "zb-h1"}, [], []),  # no run
        (
            {"split_backward": False},
            ["stash of a beat, without a slot", ARRIVING],
            ["stashes for deferred W", OF_FULL_BACKWARD],
        ),
        (
            {"split_backward": False, "remat": "block", "unroll": False},
            ["stashes for W", ARRIVING],
            ["inputs of deferred W that recompute", OF_FULL_BACKWARD],
        ),
        ({"split_backward": False, "schedule": "zb-h1"}, [], []),
    ],
)
def test_terms_of_beats_only_and_of_ticks_only(
    options: dict[str, Any], in_beats: list[str], in_ticks: list[str]
) -> None:
    options = dict(options)
    more = {name: options.pop(name) for name in ("schedule", "remat") if name in options}
    grad_fn = dpj.value_and_grad(
        make_model(),
        mesh=make_mesh(4),
        num_microbatches=16,
        execution=replace(SPLIT, overlap=True, **options),
        **more,
    )
    report = grad_fn.memory(make_params(8), make_batch(16))
    assert [term.name for term in report.terms if term.phase == "beats"] == in_beats
    assert [term.name for term in report.terms if term.phase == "ticks"] == in_ticks
    lines = str(report).splitlines()
    assert [line.endswith("  in beats") for line in lines].count(True) == len(in_beats)
    assert [line.endswith("  in other ticks") for line in lines].count(True) == len(in_ticks)
    assert lines[-1].endswith("  at the most") == bool(in_ticks)


def test_memory_does_not_depend_on_microbatches_and_needs_no_arrays() -> None:
    def memory(num_microbatches: int) -> Any:
        grad_fn = dpj.value_and_grad(
            make_model(),
            mesh=make_mesh(4),
            num_microbatches=num_microbatches,
            execution=dpj.Execution(overlap=True),
        )
        args = make_params(8), make_batch(num_microbatches)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
        assert grad_fn.memory(*shapes) == grad_fn.memory(*args)
        return grad_fn.memory(*shapes)

    few, many = memory(16), memory(64)
    assert few == many
    last = str(few).splitlines()[-1]
    assert last.startswith("total beside the arguments")
    assert f"{few.num_bytes / 2**20:,.1f} MiB" in last


def test_weights_that_are_only_read_cast_count_in_the_dtype_of_the_cast() -> None:
    def copies(dtype: Any) -> int:
        model = dpj.Model(
            embed=lambda ends, ctx: ctx.microbatch.astype(dtype),
            block=lambda params, x, ctx: x + x @ params.astype(dtype),
            head=lambda ends, x, ctx: x.astype(np.float32).sum(),
        )
        grad_fn = dpj.value_and_grad(
            model, mesh=make_mesh(4), num_microbatches=16, execution=dpj.Execution(overlap=True)
        )
        params = {"ends": (), "blocks": jax.ShapeDtypeStruct((4, 8, 8), np.float32)}
        report = grad_fn.memory(params, jax.ShapeDtypeStruct((16, 8), np.float32))
        return next(t.num_bytes for t in report.terms if t.name == "copies of weights")

    assert copies(np.float32) == 2 * 8 * 8 * 4
    assert copies(jax.numpy.bfloat16) == 2 * 8 * 8 * 2


@pytest.mark.parametrize(
    ("platform", "precision", "num_bytes"),
    [("tpu", None, 2), ("tpu", "default", 2), ("tpu", "highest", 4), ("cpu", None, 4)],
)
def test_weights_that_a_tpu_rounds_count_in_the_rounded_dtype(
    platform: str, precision: str | None, num_bytes: int
) -> None:
    """Those that only contractions read, be it turned; a bias counts as it is."""

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        matrix, bias = params
        return x + jnp.dot(x, matrix.T, precision=precision) + bias

    model = dpj.Model(
        embed=lambda ends, ctx: ctx.microbatch, block=block, head=lambda ends, x, ctx: x.sum()
    )
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    grad_fn = dpj.value_and_grad(
        model,
        mesh=AbstractMesh((4,), ("pipe",), abstract_device=device),
        num_microbatches=16,
        execution=dpj.Execution(overlap=True),
    )
    blocks = [jax.ShapeDtypeStruct((4, *shape), np.float32) for shape in ((8, 8), (8,))]
    report = grad_fn.memory(
        {"ends": (), "blocks": blocks}, jax.ShapeDtypeStruct((16, 8), np.float32)
    )
    copies = next(t.num_bytes for t in report.terms if t.name == "copies of weights")
    # In the forward only sums read the bias: both stages have a copy of it.
    assert copies == 2 * (8 * 8 * num_bytes + 8 * 4)


def test_bad_arguments_are_refused_as_by_a_call() -> None:
    grad_fn = dpj.value_and_grad(make_model(), mesh=make_mesh(4), num_microbatches=4)
    with pytest.raises(ValueError, match="batch"):
        grad_fn.memory(make_params(8), make_batch(3))
