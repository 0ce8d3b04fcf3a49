"""Steps compiled for TPUs, with the compiler that makes programs for real ones."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from dualpipe_jax import schedules
from dualpipe_jax._cli.gpt_step import GPT
from dualpipe_jax._executor import offload
from dualpipe_jax._preflight.report import Report
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
        args = make_args(mesh, width=1024, num_layers=8, rows=16 * 4, length=32)
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
        # float32[4, 32, 1024] over one link at 50 GB/s
        assert each.num_bytes == 4 * 32 * 1024 * 4
        assert each.link_seconds == pytest.approx(each.num_bytes / 50e9)
        assert each.flops > 0
        assert each.is_hidden
    assert loop.exposed_seconds == 0
    assert report.copies == ()
    assert report.apart == ()


@pytest.mark.slow
def test_actions_have_their_matmuls_and_cycles(report: Report) -> None:
    assert report.loop is not None
    actions = {action.name: action for action in report.loop.actions}
    matmul = 2 * 4 * 32 * 1024 * 4096
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
    step = make_step(mesh, schedule="zb-h1", overlap=False, num_microbatches=16)
    report = dpj.preflight(step, args, "tpu:v5e:2x2")
    assert report.loop is not None
    assert report.loop.kind == "ramp"
    flops = {action.name: action.flops for action in report.loop.actions}
    matmuls = num_layers // 4 * 2 * (2 * 4 * 128 * 256 * 1024)
    assert flops["forward"] == matmuls
    # A full backward, and beside it a deferred weight grad and its input grad.
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
    # The permutes are in the branches of a conditional, of which each tick takes the one that the
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
    step = make_step(mesh, schedule="dualpipev", overlap=False, num_microbatches=32)
    program = dpj.preflight(step, args, "tpu:v5e:2x4").program
    assert program is not None
    assert program.global_permutes == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "overlap", "is_fused", "layers", "unroll"),
    [
        ("dualpipe", False, False, 1, True),
        ("dualpipe", True, True, 2, False),  # layers in a loop
        ("dualpipe", True, False, 1, True),
    ],
)
def test_no_loop_copies_a_slot_buffer(
    schedule: str,
    overlap: bool | None,
    is_fused: bool,
    layers: int,
    unroll: bool,
) -> None:
    """Attentions, whose contractions want their operands and results in several layouts.

    Queries, keys and values are parts of one projection or three. All of these copied buffers of
    1 to 10 MiB before slots and their entries had one layout, as without `row_major`.
    """
    rows, length, width = 4, 128, 256  # of a microbatch
    sizes: dict[str, Any] = {"layers": 4 * layers, "width": width, "heads": width // 128}
    sizes |= {"vocabulary": 64, "dtype": jnp.bfloat16}
    fused = GPT(context=length, **sizes)
    separate = LanguageModel(**sizes)
    mesh = make_mesh(4)

    def on_mesh(tree: Any, *spec: str) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)

    params = jax.eval_shape((fused if is_fused else separate).init, jax.random.key(0))
    params = {"ends": on_mesh(params["ends"]), "blocks": on_mesh(params["blocks"], "pipe")}
    batch = on_mesh(jax.ShapeDtypeStruct((16 * rows, length + 1), jnp.int32))
    step = dpj.value_and_grad(
        fused.model() if is_fused else separate.for_pipeline(),
        mesh=mesh,
        num_microbatches=16,
        schedule=schedule,
        execution=dpj.Execution(overlap=overlap, unroll=unroll),
    )
    report = dpj.preflight(step, (params, batch), "tpu:v5e:2x2")
    found = [each for each in report.copies if each.where != "once"]
    assert not found
    # In beats slots have XLA's layout: where the steady phase begins and ends XLA may transpose a
    # buffer, once a step. At the last of these sizes it spent 2.0 million cycles on this before,
    # 0.15 since, and none with stacked queries, keys and values.
    assert report.loop is not None
    assert report.loop.cycles is not None
    assert sum(each.cycles or 0 for each in report.copies) < 0.1 * report.loop.cycles


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [8, 20])  # a stage has two in a row, and five in a loop
def test_slots_on_the_host_are_copied_beside_compute(
    num_layers: int, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    mesh = make_mesh(4)
    args = make_args(mesh, width=1024, num_layers=num_layers, rows=16 * 4, length=32)
    grad_fn = make_step(mesh, num_microbatches=16, slots_on_device=2)
    spilled = dpj.preflight(grad_fn, args, "tpu:v5e:2x2")
    assert (report.faults, spilled.faults) == ((), ())
    assert not [copy for copy in spilled.copies if copy.where != "once"]
    assert report.loop is not None
    assert spilled.loop is not None
    assert report.loop.host_copies == ()
    kinds = Counter(copy.kind for copy in spilled.loop.host_copies)
    # In a loop over layers W fetches again.
    assert kinds["from host"] >= kinds["to host"] > 0
    assert all(copy.is_async for copy in spilled.loop.host_copies)
    assert all(each.is_async for each in spilled.loop.collectives)
    account = grad_fn.memory(*args)
    assert spilled.memory.host_temporaries == account.host_bytes > 0
    if num_layers == 8:
        assert (spilled.memory.temporaries or 0) < (report.memory.temporaries or 0)
    assert "copies to and from the host hidden" in str(spilled)


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
@pytest.mark.parametrize(("schedule", "overlap"), [("dualpipe", True), ("1f1b", False)])
def test_a_pipeline_across_slices(schedule: str, overlap: bool) -> None:
    mesh = make_mesh(4, 2, names=("pipe", "data"))  # both halves of the data axis do the same
    args = make_args(mesh, width=128, num_layers=4, rows=16 * 4, length=128)
    step = make_step(mesh, schedule=schedule, overlap=overlap, num_microbatches=16)
    report = dpj.preflight(step, args, "tpu:v5e:2x2*2", dcn=1e9)
    assert report.apart == ()
    loop, made = report.loop, report.prediction
    assert loop is not None
    assert (loop.kind, made.schedule) == ("steady" if overlap else "ramp", schedule)
    across = [each for each in loop.collectives if each.across_slices]
    assert 0 < len(across) < len(loop.collectives)
    for each in loop.collectives:
        # Ranks 1 and 2 are in different slices; the two chips of a rank have one host.
        seconds = each.num_bytes * (2 / 1e9 if each.across_slices else 1 / 50e9)
        assert each.link_seconds == pytest.approx(seconds)
        assert (each.kind, each.axes) == ("collective-permute", ("pipe",))
        assert "dualpipe.send" in each.op_name
    assert made.loop_seconds is not None
    assert made.outside_seconds is not None
    if overlap:
        assert all(each.is_async for each in across)
        return
    # All permutes of a tick are found: its set of pairs is one of the tables'.
    assert report.waits is not None
    assert len(report.waits.ticks) == loop.num_trips
    assert all(each.num_runs is not None for each in loop.collectives)
    # The first microbatch crosses once with its activations, and once with its cotangent.
    assert made.loop_seconds > 2 * max(each.link_seconds or 0 for each in across)


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
