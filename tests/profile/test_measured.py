"""Measured timetables: of profiles with known times, and of a step that runs on fake devices."""

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner, Result

import dualpipe_jax as dpj
from dualpipe_jax import _cli
from dualpipe_jax._profile import find_steps, measure
from dualpipe_jax._schedule.actions import letter_of
from tests.pages import Box, page_of
from tests.profile.profiles import Run, plan_of, runs_of, write_devices, write_host

Write = Callable[[Path, str, list[list[Run]]], Path]
SCOPE, PLAN = plan_of("1f1b", num_ranks=2, num_microbatches=2)


def run(*arguments: object) -> Result:
    command = ["measured", *map(str, arguments)]
    return CliRunner().invoke(_cli.main, command, catch_exceptions=False)


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("write", [write_host, write_devices])
def test_each_action_is_found_with_its_times(write: Write, tmp_path: Path) -> None:
    """By run ids on hosts, by the program's entry on devices; twice, the second one by default."""
    runs = [runs_of(PLAN), runs_of(PLAN, start=1000)]
    write(tmp_path, SCOPE, runs)
    first, second = find_steps(tmp_path)
    assert first.is_whole
    assert second.is_whole
    made = measure(second)
    expected = []
    for rank in range(2):
        for tick, action in enumerate(row[rank] for row in PLAN.schedule.timeline().actions):
            if action is not None:
                stage, kind, microbatch = action
                expected.append((rank, tick, kind, int(stage), int(microbatch)))
    acts = [each for each in made.segments if each.kind != "send" and each.part != "head"]
    found = [(a.rank, a.tick, a.kind, a.stage, a.microbatch) for a in acts]
    assert sorted(found) == sorted(expected)
    for act in acts:
        assert act.tick is not None
        assert act.start == pytest.approx(10e-6 * act.tick)
        # A forward with the write after it.
        assert act.seconds == pytest.approx(5e-6 if act.kind == "F" else 4e-6)
    times = made.ranks[1]
    assert times.forward == pytest.approx(2 * 6e-6)  # with the head
    assert times.input_grad == pytest.approx(2 * 4e-6)
    assert times.weight_grad == pytest.approx(2 * 4e-6)
    assert made.makespan == pytest.approx(74e-6)
    assert times.idle == pytest.approx(made.makespan - 28e-6)
    assert made.costs.forward == pytest.approx(5e-6)
    assert made.predicted.idle_share < made.idle_share


def test_full_backwards_have_both_grads_in_both_ticks(tmp_path: Path) -> None:
    scope, plan = plan_of("1f1b", num_ranks=2, num_microbatches=2, split_backward=False)
    made = measure(find_steps(write_host(tmp_path, scope, [runs_of(plan)]))[0])
    halves = [s for s in made.segments if (s.rank, s.microbatch) == (1, 0) and s.kind in "IW"]
    first = halves[0].tick
    assert first is not None
    found = [(s.tick, s.kind, round(s.seconds * 1e6)) for s in halves]
    kinds = [("I", 3), ("W", 2)]
    assert found == [(first + half, *kind) for half in range(2) for kind in kinds]
    assert made.costs.input_grad == pytest.approx(6e-6)
    assert made.costs.weight_grad == pytest.approx(4e-6)


def test_pauses_and_transfers(tmp_path: Path) -> None:
    """A pause within an action is its own; a transfer counts where no action hides it."""
    runs = runs_of(PLAN)
    first = next(r for r in runs if r.instruction == "forward" and r.device == 0)
    split = [first._replace(duration=1), first._replace(start=first.start + 3, duration=1)]
    hidden = Run(0, "send", first.start - 1, 2)
    runs = [*(r for r in runs if r is not first), *split, hidden]
    made = measure(find_steps(write_host(tmp_path, SCOPE, [runs]))[0])
    of_rank = [each for each in made.segments if each.rank == 0]
    assert [each.kind for each in of_rank[:3]] == ["send", "F", "send"]
    assert of_rank[0].seconds == pytest.approx(1e-6)
    assert of_rank[1].seconds == pytest.approx(5e-6)


def test_text_and_csv(tmp_path: Path) -> None:
    write_host(tmp_path, SCOPE, [runs_of(PLAN)])
    text = run(tmp_path).output
    assert "1f1b: 2 ranks, 2 microbatches, 0.074 ms, 63.5% idle, step 0 of 1" in text
    assert "--costs F=5,I=4,W=4" in text
    rows = list(csv.DictReader(io.StringIO(run(tmp_path, "--format", "csv").output)))
    assert sum(row["action"] == "F" and row["part"] == "forward" for row in rows) == 4
    assert rows[-1]["start_us"]


def test_perfetto_has_the_predicted_timetable_below(tmp_path: Path) -> None:
    write_host(tmp_path, SCOPE, [runs_of(PLAN)])
    output = tmp_path / "made.perfetto.json"
    assert run(tmp_path, "--output", output).exit_code == 0
    events = json.loads(output.read_text())["traceEvents"]
    of_process = [
        [e["name"] for e in events if e["ph"] == "X" and e["pid"] == pid and e["tid"] == 0]
        for pid in range(2)
    ]
    measured, predicted = ([n for n in names if n != "send"] for names in of_process)
    assert measured == predicted == ["F0", "F1", "I0", "W0", "I1", "W1"]


def test_a_page_has_both_timetables(tmp_path: Path) -> None:
    write_host(tmp_path, SCOPE, [runs_of(PLAN)])
    output = tmp_path / "made.html"
    assert run(tmp_path, "--output", output).exit_code == 0
    page = page_of(output.read_text())
    found, predicted = page.timetables
    made = measure(find_steps(tmp_path)[0])
    acts = [box for box in found if box.kind != "send"]

    def actions(boxes: list[Box]) -> list[tuple[object, ...]]:
        return [(b.rank, b.kind, b.stage, b.microbatch, b.tick) for b in boxes]

    assert actions(acts) == actions(predicted)
    head = next(box for box in acts if (box.rank, box.kind) == (1, "F"))
    assert (head.action, head.start) == ("forward, head", pytest.approx(0.01))
    assert head.end == pytest.approx(0.016)
    # Rank 0 made its x at 5 us: the rank waits until then, and a tick's rest.
    assert head.source is not None
    assert found[head.source][:2] == (0, "F")
    assert head.waits == [[pytest.approx(0.005), "for rank 0, to make the x of microbatch 0"]]
    shares = [times.idle / made.makespan for times in made.ranks]
    assert page.idle_shares[0] == pytest.approx(shares)
    assert "--x-bytes" in refusal(tmp_path, "--x-bytes", "8MiB")


def test_a_profile_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    runs = runs_of(PLAN)

    def refused(name: str, changed: list[Run]) -> str:
        return refusal(write_host(tmp_path / name, SCOPE, [changed]))

    dropped = [r for r in runs if r != next(r for r in runs if r.instruction == "look_up")]
    dropped.remove(next(r for r in dropped if r.instruction == "moved.1"))
    dropped.remove(next(r for r in dropped if r.instruction == "send"))
    assert "ran 7 ticks in this step, and the timetable has 8" in refused("dropped", dropped)
    act = next(r for r in runs if r.instruction == "input_grad")
    other = [r._replace(instruction="weight_grad") if r is act else r for r in runs]
    message = refused("other", other)
    assert f"rank {act.device} (device {act.device}) of '1f1b' ran W in tick" in message
    assert "where the timetable has I" in message
    mirrored = [r._replace(device=1 - r.device) for r in runs]
    write_host(tmp_path / "mirrored", SCOPE, [mirrored])
    assert "name them in that order" in refusal(tmp_path / "mirrored")
    assert run(tmp_path / "mirrored", "--devices", "1,0").exit_code == 0
    more = [*runs, *(r._replace(device=r.device + 2) for r in runs)]
    assert "devices 0, 1, 2, 3, and the schedule 2 ranks" in refused("more", more)
    assert run(tmp_path / "more", "--devices", "2,3").exit_code == 0


def test_a_step_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    cut = [r for r in runs_of(PLAN, start=1000) if r.start < 1040]
    write_host(tmp_path, SCOPE, [runs_of(PLAN), cut])
    assert "step 0 of 2" in run(tmp_path).output
    assert "ran 4 ticks" in refusal(tmp_path, "--step", 1)
    assert "--step 2: must be 0 to 1" in refusal(tmp_path, "--step", 2)


def test_folders_and_files_without_a_profile_are_refused(tmp_path: Path) -> None:
    assert "has no profile" in refusal(tmp_path)
    assert "there is no such folder" in refusal(tmp_path / "none")
    (tmp_path / "other.xplane.pb").write_text("no profile")
    assert "is no profile of JAX" in refusal(tmp_path)
    write_host(tmp_path / "nameless", "jit(step)/while/body", [runs_of(PLAN)])
    assert "names a schedule" in refusal(tmp_path / "nameless")
    (tmp_path / "second.xplane.pb").write_text("another one")
    assert "of 2 processes" in refusal(tmp_path)


def test_a_step_that_ran(tmp_path: Path) -> None:
    """Both phases of a real step: every action of the timetable once, those of beats by layer."""
    num_ranks, num_microbatches, width = 2, 8, 32
    model = dpj.Model(
        embed=lambda ends, ctx: ends["table"][ctx.microbatch],
        block=lambda layer, x, ctx: x + jnp.tanh(x @ layer),
        head=lambda ends, x, ctx: jnp.square(x @ ends["head"]).mean(),
    )
    table = jnp.ones((4, width))
    params = {
        "ends": {"table": table, "head": table.T},
        "blocks": jnp.ones((num_ranks, width, width)),
    }
    mesh = jax.make_mesh((num_ranks,), ("pipe",), devices=jax.devices()[:num_ranks])
    step = jax.jit(
        dpj.value_and_grad(
            model,
            mesh=mesh,
            num_microbatches=num_microbatches,
            execution=dpj.Execution(overlap=True),
        )
    )
    batch = jnp.zeros((num_microbatches, 4), int)
    # Else a program out of the cache has the names with which some release compiled it.
    key = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, key)
    jax.config.update(key, True)
    try:
        jax.block_until_ready(step(params, batch))
    finally:
        jax.config.update(key, before)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(tmp_path, profiler_options=options)
    try:
        jax.block_until_ready(step(params, batch))
    finally:
        jax.profiler.stop_trace()
    (found,) = find_steps(tmp_path)
    made = measure(found)
    assert made.plan.placement.execution.overlap is True
    assert found.parts.beats is not None
    tables = made.plan.tables
    for rank in range(num_ranks):
        acts = {(s.kind, s.stage, s.microbatch) for s in made.segments if s.rank == rank}
        wanted = set(
            zip(
                map(letter_of, tables.opcode[:, rank].tolist()),
                tables.stage[:, rank].tolist(),
                tables.microbatch[:, rank].tolist(),
                strict=True,
            )
        )
        assert {act for act in acts if act[0] != "send"} == {a for a in wanted if a[0] != "."}
        of_rank = [s for s in made.segments if s.rank == rank]
        assert all(a.end <= b.start for a, b in itertools.pairwise(of_rank))
    # A step's values depend on one another: F of a microbatch in stage 1 after that in stage 0.
    for microbatch in range(num_microbatches):
        ends = {
            s.stage: s.end for s in made.segments if (s.kind, s.microbatch) == ("F", microbatch)
        }
        starts = [s for s in made.segments if (s.kind, s.microbatch) == ("F", microbatch)]
        assert ends[0] <= min(s.start for s in starts if s.part == "forward" and s.stage == 1)
    assert "dualpipe: 2 ranks, 8 microbatches" in run(tmp_path).output
    picture = tmp_path / "made.svg"
    assert run(tmp_path, "--output", picture).exit_code == 0
    assert picture.read_text().count("<path") > len(made.segments)
