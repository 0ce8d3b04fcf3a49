"""What `grad_fn.memory` adds up is what the executor carries."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import dualpipe_jax as dpj
from dualpipe_jax._executor import program
from tests.models import make_batch, make_model, make_params
from tests.test_exact import make_mesh

NUM_MICROBATCHES = 10
ARRIVING = "what arrives while it leaves"


def bytes_of(avals: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(avals))


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
    return {term.name: term.num_bytes for term in report.terms}, started[-1]


@pytest.mark.parametrize(
    ("num_layers", "options", "is_full"),
    [
        (8, {"schedule": "1f1b", "remat": "block"}, True),
        (8, {"schedule": "1f1b"}, False),
        (8, {"schedule": "1f1b", "full_backward": False}, False),
        (4, {"schedule": "1f1b"}, False),  # one layer has no halves
        (
            8,
            {"schedule": "interleaved-1f1b", "remat": "block", "layers_per_stage": (1,) * 8},
            True,
        ),
        (16, {"schedule": "interleaved-1f1b", "remat": "block"}, True),
        (8, {"schedule": "chimera"}, False),
        (8, {"schedule": "dualpipe", "timetable": "aligned"}, False),
        (8, {"schedule": "dualpipe", "timetable": "aligned", "full_backward": True}, True),
        (8, {"schedule": "dualpipe", "timetable": "shortest", "remat": "block"}, True),
    ],
)
def test_full_backwards_by_default(num_layers: int, options: dict[str, Any], is_full: bool) -> None:
    """For accelerators where they are predicted to be faster; on CPUs, which stand in, always."""
    args = make_params(num_layers), make_batch(8)
    on_accelerators, on_cpus = (
        dpj.value_and_grad(
            make_model(frozenset(["pytree"])), mesh=mesh, num_microbatches=8, **options
        )
        for mesh in (AbstractMesh((4,), ("pipe",)), make_mesh(4))
    )
    terms = {term.name for term in on_accelerators.memory(*args).terms}
    assert ("stash of a full backward, without a slot" in terms) == is_full
    terms = {term.name for term in on_cpus.memory(*args).terms}
    assert ("stash of a full backward, without a slot" in terms) == options.get(
        "full_backward", True
    )


@pytest.mark.parametrize(
    ("num_layers", "options"),
    [
        (8, {"schedule": "dualpipe", "timetable": "aligned"}),
        (8, {"schedule": "dualpipe", "timetable": "aligned", "remat": "block"}),
        (11, {"schedule": "dualpipe", "timetable": "aligned"}),
        (8, {"schedule": "zb-h1", "remat": "block"}),
        (8, {"schedule": "zb-h1", "remat": "block", "stash_deferred": True}),
        (8, {"schedule": "interleaved-1f1b"}),
        (8, {"schedule": "1f1b", "timetable": "two-tick"}),
    ],
)
@pytest.mark.parametrize("full_backward", [False, True])
def test_terms_are_what_is_carried(
    monkeypatch: pytest.MonkeyPatch,
    num_layers: int,
    options: dict[str, Any],
    full_backward: bool,
) -> None:
    terms, state = look(monkeypatch, num_layers, full_backward=full_backward, **options)
    assert terms["received x and cotangents"] == bytes_of(state.received)
    for name, buffers in (
        ("residuals for I", state.residual),
        ("residuals for I and W", state.weight_residual),
        ("stashes for W", state.stash),
    ):
        assert terms.get(name, 0) == bytes_of(buffers), name
    recomputes = options.get("remat") == "block" and not options.get("stash_deferred", False)
    of_deferred = "what deferred W recompute from" if recomputes else "stashes for deferred W"
    assert terms.get(of_deferred, 0) == bytes_of(state.deferred)
    of_full_backward = terms.get("stash of a full backward, without a slot", 0)
    assert (of_full_backward > 0) == full_backward == (terms.get("stashes for W", 0) == 0)
    assert terms["between ranks"] == bytes_of(state.messages)
    assert terms["gradients added up, of layers"] == bytes_of(state.block_grads)
    assert terms["gradients added up, of the rest"] == bytes_of(state.ends_grads)


OF_FULL_BACKWARD = "stash of a full backward, without a slot"


@pytest.mark.parametrize(
    ("options", "in_beats", "in_ticks"),
    [
        ({}, ["stash of a beat, without a slot", ARRIVING], ["stashes for W"]),
        (
            {"remat": "block"},
            ["stash of a beat, without a slot", ARRIVING],
            ["stashes for W", "what deferred W recompute from"],
        ),
        # Looped layers stash in the run, too.
        (
            {"remat": "block", "unroll_layers": False},
            [ARRIVING],
            ["what deferred W recompute from"],
        ),
        ({"schedule": "zb-h1"}, [], []),  # no run
        (
            {"full_backward": True},
            ["stash of a beat, without a slot", ARRIVING],
            ["stashes for deferred W", OF_FULL_BACKWARD],
        ),
        (
            {"full_backward": True, "remat": "block", "unroll_layers": False},
            [ARRIVING],  # on CPUs, beats of looped layers have full backwards, too
            ["what deferred W recompute from"],
        ),
        ({"full_backward": True, "schedule": "zb-h1"}, [], []),
    ],
)
def test_what_is_there_at_times_only(
    options: dict[str, Any], in_beats: list[str], in_ticks: list[str]
) -> None:
    options = {"full_backward": False, **options}
    grad_fn = dpj.value_and_grad(
        make_model(), mesh=make_mesh(4), num_microbatches=16, timetable="aligned", **options
    )
    report = grad_fn.memory(make_params(8), make_batch(16))
    assert [term.name for term in report.terms if term.phase == "beats"] == in_beats
    assert [term.name for term in report.terms if term.phase == "ticks"] == in_ticks
    lines = str(report).splitlines()
    assert [line.endswith("  in beats") for line in lines].count(True) == len(in_beats)
    assert [line.endswith("  in other ticks") for line in lines].count(True) == len(in_ticks)
    assert lines[-1].endswith("  at the most") == bool(in_ticks)


def test_layers_that_take_no_turns_count_with_all_their_stashes() -> None:
    """Where XLA shards over an axis of its own, nothing orders the layers of a stage."""

    def stash(**more: int) -> int:
        grad_fn = dpj.value_and_grad(
            make_model(), mesh=make_mesh(2, **more), num_microbatches=4, schedule="1f1b"
        )
        report = grad_fn.memory(make_params(6), make_batch(4))
        return next(term.num_bytes for term in report.terms if term.name == OF_FULL_BACKWARD)

    assert stash(model=2) == 3 * stash() > 0


def test_memory_does_not_depend_on_microbatches_and_needs_no_arrays() -> None:
    def memory(num_microbatches: int) -> Any:
        grad_fn = dpj.value_and_grad(
            make_model(), mesh=make_mesh(4), num_microbatches=num_microbatches, timetable="aligned"
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


def test_weights_that_are_only_read_cast_count_as_what_they_are_cast_to() -> None:
    def copies(dtype: Any) -> int:
        model = dpj.Model(
            embed=lambda ends, ctx: ctx.microbatch.astype(dtype),
            block=lambda params, x, ctx: x + x @ params.astype(dtype),
            head=lambda ends, x, ctx: x.astype(np.float32).sum(),
        )
        grad_fn = dpj.value_and_grad(
            model, mesh=make_mesh(4), num_microbatches=16, timetable="aligned"
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
def test_weights_that_a_tpu_rounds_count_as_what_they_are_rounded_to(
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
        timetable="aligned",
    )
    blocks = [jax.ShapeDtypeStruct((4, *shape), np.float32) for shape in ((8, 8), (8,))]
    report = grad_fn.memory(
        {"ends": (), "blocks": blocks}, jax.ShapeDtypeStruct((16, 8), np.float32)
    )
    copies = next(t.num_bytes for t in report.terms if t.name == "copies of weights")
    # Of the forward nothing reads the bias but sums: both stages have a copy of it.
    assert copies == 2 * (8 * 8 * num_bytes + 8 * 4)


def test_bad_arguments_are_refused_as_by_a_call() -> None:
    grad_fn = dpj.value_and_grad(make_model(), mesh=make_mesh(4), num_microbatches=4)
    with pytest.raises(ValueError, match="batch"):
        grad_fn.memory(make_params(8), make_batch(3))
