"""Steps compiled for TPUs, with the compiler that makes programs for real ones."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from dualpipe_jax import _scopes, schedules
from dualpipe_jax._preflight.report import Report
from dualpipe_jax._preflight.topologies import find_topology
from experiments.train_lm.model import LanguageModel
from tests.preflight.steps import make_args, make_mesh, make_step


@pytest.fixture(autouse=True)
def _as_users_compute() -> Iterator[None]:
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def report() -> Report:
    with jax.enable_x64(False):
        mesh = make_mesh(4)
        args = make_args(mesh, width=1024, num_layers=8, rows=16 * 4, length=128)
        return dpj.preflight(make_step(mesh, num_microbatches=16), args, "tpu:v5e:2x2")


@pytest.mark.slow
def test_transfers_of_the_steady_loop_are_hidden(report: Report) -> None:
    loop = report.loop
    assert loop is not None
    assert (loop.kind, loop.num_trips) == ("steady", 5)
    assert len(loop.collectives) == 4
    for each in loop.collectives:
        assert (each.kind, each.axes) == ("collective-permute", ("pipe",))
        assert each.is_async
        # float32[4, 128, 1024] over one link at 50 GB/s
        assert each.num_bytes == 4 * 128 * 1024 * 4
        assert each.link_seconds == pytest.approx(each.num_bytes / 50e9)
        assert each.flops > 0
        assert each.is_hidden
    assert loop.exposed_seconds == 0
    assert report.apart == ()


@pytest.mark.slow
def test_actions_have_their_matmuls_and_cycles(report: Report) -> None:
    assert report.loop is not None
    actions = {action.name: action for action in report.loop.actions}
    matmul = 2 * 4 * 128 * 1024 * 4096
    for name in ("forward", "input_grad", "weight_grad"):
        # Two beats of two layers of two matmuls, which take a cycle for 131,072 FLOPs or more.
        assert actions[name].flops == 2 * 2 * 2 * matmul
        assert (actions[name].cycles or 0) > actions[name].flops / 131072
    assert report.loop.cycles == sum(action.cycles or 0 for action in actions.values())


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [8, 24])  # a stage has two in a row, and six in a loop
def test_steps_in_ticks_are_predicted(num_layers: int) -> None:
    mesh = make_mesh(4)
    args = make_args(mesh, width=256, num_layers=num_layers, rows=16 * 4, length=128)
    step = make_step(mesh, schedule="zb-h1", timetable="shortest", num_microbatches=16)
    report = dpj.preflight(step, args, "tpu:v5e:2x2")
    assert report.loop is not None
    assert report.loop.kind == "ramp"
    flops = {action.name: action.flops for action in report.loop.actions}
    matmuls = num_layers // 4 * 2 * (2 * 4 * 128 * 256 * 1024)
    assert flops["forward"] == matmuls
    # A full backward, and beside it the input grad of a weight grad that is put off, and that.
    assert flops["input_grad"] == flops["weight_grad"] == 2 * matmuls
    made = report.prediction
    assert (made.schedule, made.reason) == ("zb-h1", "")
    # F, I and W of 16 microbatches at the published peak; and less than all actions and a transfer
    # in every tick.
    least = 16 * 3 * matmuls / 197e12
    num_ticks = (
        schedules.make("zb-h1", num_ranks=4, num_microbatches=16).compiled().tables.num_ticks
    )
    transfer = max(each.link_seconds or 0 for each in report.loop.collectives)
    assert report.loop.compute_seconds is not None
    assert made.loop_seconds is not None
    assert least < made.loop_seconds < num_ticks * (report.loop.compute_seconds + transfer)
    assert 0 < (made.idle_share or 0) < 0.5
    # The permutes stand in the branches of a conditional, of which each tick takes the one that the
    # tables say; and all idle time has its reasons.
    waits = report.waits
    assert waits is not None
    assert len(waits.ticks) == report.loop.num_trips
    runs = {each.branch: each.num_runs for each in report.loop.collectives}
    sends = [tick for tick in waits.ticks if tick.exchange != ((), ())]
    assert sum(number or 0 for number in runs.values()) == len(sends)
    idle = sum(waits.by_reason().values()) + sum(waits.finished)
    assert idle == pytest.approx(4 * made.loop_seconds * (made.idle_share or 0) * 1e6)
    assert report.program is not None
    assert report.program.global_permutes == {}


@pytest.mark.slow
def test_no_permute_makes_every_core_wait() -> None:
    """In the schedule with most sets of pairs: 74, before they are merged."""
    mesh = make_mesh(8)
    args = make_args(mesh, width=128, num_layers=32, rows=64, length=128)
    step = make_step(mesh, schedule="dualpipev", timetable="shortest", num_microbatches=32)
    program = dpj.preflight(step, args, "tpu:v5e:2x4").program
    assert program is not None
    assert program.global_permutes == {}


@pytest.mark.slow
def test_beats_copy_no_slot_buffer() -> None:
    """Of straight-line code; each layer's buffers are `[slot, rows, length, ...]`."""
    made = schedules.dualpipe(num_ranks=4, num_microbatches=16)
    counts = made.compiled(timetable="aligned").tables.num_slots
    topology = find_topology("tpu:v5e:2x2")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("pipe",))
    args = make_args(mesh, width=1024, num_layers=8, rows=16 * 4, length=128)
    step = jax.jit(make_step(mesh, num_microbatches=16))
    text = str(step.lower(*args).compile().as_text())
    is_steady = rf" collective-permute-start\(.*{_scopes.STEADY}"
    (beats,) = [each for each in re.split(r"\n(?=[^\s}])", text) if re.search(is_steady, each)]
    # What F keeps for I and W; what I leaves to W needs no slot in a beat.
    shape = rf"= \(?\w+\[{counts['residual']},4,128,\d+\]"
    mine = [line for line in beats.splitlines() if re.search(shape, line)]
    assert any("dynamic-update-slice" in line for line in mine)
    assert not [line for line in mine if re.search(r" copy(-start)?\(", line)]


@pytest.mark.slow
def test_ticks_copy_no_slot_buffer_between_their_loops() -> None:
    """Of an attention, whose matmuls want what they read and write in several layouts."""
    width, length, heads = 256, 256, 2
    mesh = jax.sharding.Mesh(np.array(find_topology("tpu:v5e:2x2").devices), ("pipe",))

    def on_mesh(tree: Any, *spec: str) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)

    lm = LanguageModel(layers=8, width=width, heads=heads, vocabulary=64)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    params = {"ends": on_mesh(params["ends"]), "blocks": on_mesh(params["blocks"], "pipe")}
    batch = on_mesh(jax.ShapeDtypeStruct((16, length + 1), jnp.int32))
    step = dpj.value_and_grad(
        lm.for_pipeline(), mesh=mesh, num_microbatches=16, timetable="aligned", remat="block"
    )
    text = str(jax.jit(step).lower(params, batch).compile().as_text())
    # The body of the scan over ticks has a loop for each F, I and W, and one for the run of beats.
    (ticks,) = [part for part in re.split(r"\n(?=[^\s}])", text) if part.count(" while(") > 6]
    # A layer's slots of one sequence: what F keeps, and I for W.
    slots = rf"\w+\[\d+,1,{length},({width}|{heads},{width // heads})\]"
    mine = [line for line in ticks.splitlines() if re.search(slots, line)]
    assert any(" while(" in line for line in mine)
    copies = [line for line in mine if re.search(r" copy(-start)?\(", line)]
    assert not [line for line in copies if not _is_prefetch(line)]


def _is_prefetch(line: str) -> bool:
    """Whether a copy goes into fast memory, S(1), or out of it, and changes no layout."""
    found = re.search(r"= \((\S+?\{\S*?\}), (\S+?\{\S*?\}), .* copy-start\(", line)
    if found is None:
        return False
    to, of = found.groups()
    return to != of and to.replace("S(1)", "") == of.replace("S(1)", "")


@pytest.mark.slow
def test_memory_and_time(report: Report) -> None:
    assert report.memory.capacity == 16 * 2**30
    assert report.memory.fits
    made = report.prediction
    assert (made.reason, made.schedule) == ("", "dualpipe")
    assert made.loop_seconds is not None
    assert made.outside_seconds is not None
    assert made.seconds == made.loop_seconds + made.outside_seconds
    # No schedule is quicker than the work of its 16 microbatches: that of 8 trips of two beats.
    assert report.loop is not None
    ends = {"head", "embed", "embed_grad"}
    cycles = sum(a.cycles or 0 for a in report.loop.actions if a.name not in ends)
    assert made.loop_seconds > 8 * cycles / (197e12 / 131072)


@pytest.mark.slow
def test_step_too_large_does_not_fit() -> None:
    mesh = make_mesh(4)
    args = make_args(mesh, width=256, num_layers=8, rows=16 * 4, length=131072)
    report = dpj.preflight(make_step(mesh, num_microbatches=16), args, "tpu:v5e:2x2")
    assert report.memory.fits is False
    assert (report.memory.needed or 0) > 16 * 2**30
    assert "DOES NOT FIT" in str(report)
    assert report.prediction.seconds is None


@pytest.mark.slow
@pytest.mark.parametrize("has_options", [True, False])
def test_all_to_alls_are_asynchronous_by_the_options(has_options: bool) -> None:
    mesh = make_mesh(2, 4, names=("pipe", "expert"))

    def step(weight: jax.Array, x: jax.Array) -> jax.Array:
        def body(carry: Any, _: None) -> Any:
            x, y = carry
            sent = lax.all_to_all(x.reshape(4, -1, 256), "expert", 0, 0, tiled=True)
            for _layer in range(8):
                y = jnp.tanh(y @ weight)
            return (y, sent.reshape(x.shape)), None

        return lax.scan(body, (x, x), length=3)[0][0]

    replicated = PartitionSpec()
    # Over the mesh of the context: one of its own would be that of the fake devices.
    mapped = jax.shard_map(step, in_specs=replicated, out_specs=replicated, check_vma=False)
    args = tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, replicated))
        for shape in ((256, 256), (1024, 256))
    )
    options = None if has_options else {}
    report = dpj.preflight(mapped, args, "tpu:v5e:2x4", compiler_options=options)
    assert report.loop is not None
    exchanges = [each for each in report.loop.collectives if each.kind == "all-to-all"]
    assert exchanges
    for each in exchanges:
        assert each.axes == ("expert",)
        assert each.is_async is has_options
        assert (each.flops > 0) is has_options
        assert (each.exposed_seconds == 0) is has_options


def test_names_of_schedules_are_read_back() -> None:
    from dualpipe_jax import _scopes

    for name in schedules.names():
        scope = _scopes.of_schedule(name, num_ranks=4, num_microbatches=16)
        assert _scopes.read_schedule(f"jit(f)/{scope}/while") == (name, 4, 16)
