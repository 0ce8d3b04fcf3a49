"""`Execution`: its values, its words, and the same decision on every platform."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import dualpipe_jax as dpj
from tests.models import make_batch, make_mesh, make_model, make_params
from tests.schedules_under_test import NAMES


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"overlap": "aligned"}, ValueError, "overlap='aligned': must be True, False, 'two-tick'"),
        ({"overlap": 1}, TypeError, "overlap=1: must be True, False, 'two-tick', or None"),
        ({"split_backward": "yes"}, TypeError, "split_backward='yes': must be True, False, or"),
        ({"deferred": "keep"}, ValueError, "deferred='keep': must be 'recompute', 'store', or"),
        ({"deferred": True}, TypeError, "deferred=True: must be 'recompute', 'store', or None"),
        ({"unroll": 0}, ValueError, "unroll=0: must be True, False, a number of layers, or None"),
        ({"unroll": 2.0}, TypeError, "unroll=2.0: must be True, False, a number of layers"),
    ],
)
def test_other_values_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dpj.Execution(**options)


def test_it_is_written_as_it_is_made() -> None:
    made = dpj.Execution(overlap="two-tick", unroll=3, deferred="store")
    assert eval(repr(made), {"Execution": dpj.Execution}) == made
    assert str(made) == "two-tick, layers unrolled by 3, deferred weight grads store"
    assert dpj.Execution(unroll=1) == dpj.Execution(unroll=False) != dpj.Execution(unroll=True)
    assert str(dpj.Execution()) == "decided for you"


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(("num_layers", "remat"), [(8, "block"), (11, "none")])
def test_devices_change_nothing(schedule: str, num_layers: int, remat: str) -> None:
    """A test over fake CPU devices runs the program that a pod runs."""
    args = make_params(num_layers), make_batch(8)
    fake, absent = (
        dpj.value_and_grad(
            make_model(), mesh=mesh, num_microbatches=8, schedule=schedule, remat=remat
        ).memory(*args)
        for mesh in (make_mesh(4), AbstractMesh((4,), ("pipe",)))
    )
    assert fake == absent
    assert str(fake) == str(absent)
    decided = {**vars(fake.execution), "slots_on_device": 0}  # never decided for you
    assert None not in decided.values()
    assert str(fake).startswith(f"execution: {fake.execution}\n")


def test_a_users_functions_run_twice_a_trace_and_their_masks_once() -> None:
    """Once for their results' types, and once for all else; deep modules pay for it in seconds."""
    count: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            count[name] += 1
            return function(*args)

        return run

    model = dpj.Model(
        embed=counted("embed", lambda ends, ctx: ctx.microbatch @ ends),
        block=counted("block", lambda params, x, ctx: x + jnp.tanh(x @ params)),
        head=counted("head", lambda ends, x, ctx: jnp.square(x @ ends.T).mean()),
    )
    args = {"ends": jnp.ones((3, 4)), "blocks": jnp.ones((8, 4, 4))}, jnp.ones((8, 3))
    twice = {"embed": 2, "block": 2, "head": 2}
    for remat in ("none", "block"):
        grad_fn = dpj.value_and_grad(
            model,
            mesh=make_mesh(4),
            num_microbatches=8,
            remat=remat,
            trainable=counted("trainable", lambda params: True),
            overwrite=counted("overwrite", lambda params: False),
        )
        jax.jit(grad_fn).trace(*args)
        assert count == {**twice, "trainable": 1, "overwrite": 1}
        count.clear()
    jax.jit(dpj.evaluate(model, mesh=make_mesh(4), num_microbatches=8)).trace(*args)
    assert count == twice


def test_eager_calls_make_no_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    grad_fn = dpj.value_and_grad(make_model(), mesh=make_mesh(1), num_microbatches=1)
    args = make_params(1), make_batch(1)
    grad_fn(*args)
    monkeypatch.setattr(dpj.schedules, "make", None)
    grad_fn(*args)
