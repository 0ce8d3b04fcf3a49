"""Slots in the host's memory: the values that wait there, and the calls that are refused.

Exact gradients with such slots are for test_exact.py, dead ones for test_program.py, and compiled
copies for preflight/test_tpu.py and experiments.
"""

from typing import Any

import chex
import jax
import optax
import pytest

import dualpipe_jax as dpj
from dualpipe_jax._executor import offload, program
from dualpipe_jax._executor.host import HostSlots
from tests.models import make_batch, make_mesh, make_model, make_params, offload_policy

NUM_MICROBATCHES = 16
HOST = jax.memory.Space.Host
ARGS = make_params(8), make_batch(NUM_MICROBATCHES)


@pytest.fixture
def all_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)


def make(slots_on_device: int | str | None = None, **options: Any) -> Any:
    """Makes a step of five slots, two layers a stage."""
    how = {name: options.pop(name) for name in ("unroll", "overlap") if name in options}
    return dpj.value_and_grad(
        make_model(),
        mesh=make_mesh(4),
        num_microbatches=NUM_MICROBATCHES,
        execution=dpj.Execution(slots_on_device=slots_on_device, **how),
        **options,
    )


def slots_at_start(monkeypatch: pytest.MonkeyPatch, grad_fn: Any) -> dict[str, Any]:
    """Finds the types of a step's slots: by buffer, with unrolled layers a tuple for each layer.

    Those of a value in the host's memory are `HostSlots`.
    """
    found = []
    start = program.start

    def spy(*args: Any) -> Any:
        rank, state, weight = start(*args)
        for name, of_kinds in state.slots.items():
            (buffer,) = of_kinds.values()
            found.append((name, jax.tree.map(jax.typeof, buffer.arrays)))
        return rank, state, weight

    monkeypatch.setattr(program, "start", spy)
    jax.eval_shape(grad_fn, *ARGS)
    return dict(found)


def on_host(slots: Any) -> list[HostSlots]:
    """Lists the slots in the host's memory."""
    is_there = lambda leaf: isinstance(leaf, HostSlots)  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(slots, is_leaf=is_there) if is_there(leaf)]


def slot_bytes(grad_fn: Any) -> tuple[int, int]:
    """Adds up the bytes of residuals, on the device and on the host."""
    terms = [term for term in grad_fn.memory(*ARGS).terms if "residuals" in term.name]
    here, there = (
        sum(term.num_bytes for term in terms if term.where == where) for where in ("device", "host")
    )
    return here, there


@pytest.mark.usefixtures("all_may_leave")
def test_no_more_stay_on_the_device_than_asked_for() -> None:
    all_here, none_there = slot_bytes(make())
    assert none_there == 0
    by_number = [slot_bytes(make(number)) for number in range(1, 6)]
    for number, (here, there) in enumerate(by_number, start=1):
        assert here <= number * all_here / 5
        assert (there > 0) == (number < 5)
    assert [here for here, _ in by_number] == sorted(here for here, _ in by_number)
    assert by_number[-1] == (all_here, 0)
    # Bytes of two slots.
    assert slot_bytes(make(f"{2 * all_here // 5}B")) == by_number[1]
    report = make(2).memory(*ARGS)
    assert report.host_bytes == by_number[1][1]
    assert str(report).splitlines()[-1].startswith("total in the host's memory")
    assert "2 slots on the device" in str(report)


@pytest.mark.usefixtures("all_may_leave")
def test_without_beats_chunks_share_an_array() -> None:
    """A tick runs one action: nothing is read while another chunk is written."""
    with_beats, without = (
        make(1, schedule="dualpipe", overlap=overlap).memory(*ARGS).host_bytes
        for overlap in (True, False)
    )
    assert with_beats == 2 * without


@pytest.mark.usefixtures("all_may_leave")
def test_the_first_layers_leave_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_at_start(monkeypatch, make(2))
    first, second = (
        [isinstance(aval, HostSlots) for name in offload.RESIDUALS for aval in slots[name][layer]]
        for layer in (0, 1)
    )
    assert all(first)
    assert 0 < sum(second) < len(second)
    for name in offload.RESIDUALS:
        for aval in (
            aval for layer in slots[name] for aval in layer if isinstance(aval, HostSlots)
        ):
            spaces = [each.memory_space for each in jax.tree.leaves(aval)]
            assert spaces == [HOST, HOST]  # of two chunks
    assert not on_host(slots["stash"])


@pytest.mark.usefixtures("all_may_leave")
def test_looped_layers_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_at_start(monkeypatch, make(3, unroll=False))
    there = [
        aval for name in offload.RESIDUALS for aval in slots[name] if isinstance(aval, HostSlots)
    ]
    assert there
    assert all(aval.shape[0] == 5 * 2 for aval in jax.tree.leaves(there))  # [slot * layer, ...]


def test_a_policy_moves_its_values_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_at_start(monkeypatch, make(remat=offload_policy()))
    for layer in slots["weight_residual"]:
        (there,) = on_host(layer)
        # The value of width 5, in rows of 2 and a length of 3, for each of two chunks.
        assert [aval.shape for aval in there.of_chunks] == [(5, 2, 3, 5)] * 2


def test_small_values_stay_and_are_the_least() -> None:
    all_here, _ = slot_bytes(make())
    least = rf"must be at least 5, or '{all_here}B': .*1 MiB"
    with pytest.raises(ValueError, match=f"slots_on_device=2: {least}"):
        make(2).memory(*ARGS)
    with pytest.raises(ValueError, match=f"slots_on_device='1KiB': {least}"):
        jax.eval_shape(make("1KiB"), *ARGS)
    for enough in 5, f"{all_here}B":
        assert slot_bytes(make(enough)) == (all_here, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("all_may_leave")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"schedule": "zb-h1"}, {"remat": offload_policy()}])
def test_programs_for_accelerators_have_them(platform: str, options: dict[str, Any]) -> None:
    """Where beats interleave, values wait for each other, and layouts are asked for."""
    options = {"schedule": "dualpipe", **options}
    traced = jax.jit(make(2, **options)).trace(*ARGS)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "pinned_host" in text


@pytest.mark.usefixtures("all_may_leave")
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "much", b"1GiB"])
def test_wrong_numbers_are_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"slots_on_device=.*must be a number of"):
        dpj.Execution(slots_on_device=value)


@pytest.mark.slow
def test_state_waits_on_the_host_as_the_docs_have_it() -> None:
    mesh = jax.make_mesh(
        (4,), ("pipe",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    keep = {"ends": ("table", "scale"), "blocks": ("up", "bias", "down")}
    whole, batch = ARGS
    params = {part: {name: whole[part][name] for name in names} for part, names in keep.items()}
    optimizer = optax.adamw(1e-2)
    grad_fn = dpj.value_and_grad(make_model(), mesh=mesh, num_microbatches=NUM_MICROBATCHES)

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def step_from_host(params: Any, state: Any, batch: Any) -> Any:
        params, state = jax.device_put((params, state), jax.memory.Space.Device)
        params, state, loss = step(params, state, batch)
        return *jax.device_put((params, state), jax.memory.Space.Host), loss

    trees = params, optimizer.init(params)
    shardings = dpj.shardings(trees, mesh=mesh)
    host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings)
    here, there = jax.device_put(trees, shardings), jax.device_put(trees, host)
    steps = jax.jit(step), jax.jit(step_from_host, donate_argnums=(0, 1))
    for _ in range(2):
        *here, loss = steps[0](*here, batch)
        *there, same = steps[1](*there, batch)
        assert loss == same
    chex.assert_trees_all_equal(tuple(here), tuple(jax.device_put(there, list(shardings))))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there)}
    assert kinds == {"pinned_host"}
    with pytest.raises(ValueError, match=r"must be on the devices.*Space.Device"):
        grad_fn(there[0], batch)
