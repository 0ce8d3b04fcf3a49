"""The trainer's parts: flags and files, logs, folders, digests, skipped updates, profiles."""

import contextlib
import json
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.train_lm.flags import Refusal
from experiments.train_lm.train_lm import main
from experiments.train_lm.trainer import folder, processes, progress, state
from experiments.train_lm.trainer.checkpoints import SaveError
from experiments.train_lm.trainer.clock import Clock
from experiments.train_lm.trainer.log import Log, read_rows
from experiments.train_lm.trainer.loop import Loop
from experiments.train_lm.trainer.profile import Profile, StepRange
from experiments.train_lm.trainer.run import COLUMNS
from experiments.train_lm.trainer.signals import Requests
from experiments.train_lm.trainer.state import digest
from tests.experiments.trainer_jobs import make_job, make_settings, rows_of, run_job

# --- flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("widht = 3", "--config CONFIG: no such flags: widht"),
        ("width = [3, 4]", "--config CONFIG: width: must be a single value; got [3, 4]"),
        ('width = "wide"', "Invalid value for '--width': 'wide' is not a valid integer"),
        ("width = ", "CONFIG: Invalid value"),
        ("steps = 1.5", "Invalid value for '--steps': '1.5' is not a valid integer"),
        ("learning-rate = true", "'True' is not a valid float"),
        ("data = 3", "Invalid value for '--data': Path '3' does not exist"),
        ("seed = 0\nheads = 5", "--width 96: must be divisible by --heads 5"),
        ('log = ["jsonl", "xml"]', "xml: must be among jsonl, tensorboard"),
        ('profile = "4"', "'4' is no range START:STOP"),
        ("num-processes = 2", "--coordinator, --num-processes, --process-id: give all or none"),
    ],
)
def test_a_bad_file_of_flags_is_refused(
    config: str, message: str, tmp_path: Path, refusal: Any
) -> None:
    path = tmp_path / "given.toml"
    path.write_text(config)
    line = refusal(main, ["--config", str(path)], name="train_lm")
    assert message.replace("CONFIG", str(path)) in line


def test_flags_come_before_the_file(tmp_path: Path, refusal: Any) -> None:
    path = tmp_path / "given.toml"
    path.write_text("heads = 5\nwidth = 12\nmicrobatches = 4\n")
    line = refusal(main, ["--config", str(path), "--width", "13"], name="train_lm")
    assert "--width 13: must be divisible by --heads 5" in line


def test_a_run_does_not_learn_its_own_logs(tmp_path: Path, refusal: Any) -> None:
    (tmp_path / "text.txt").write_text("text " * 1000)
    line = refusal(main, ["--data", str(tmp_path)], name="train_lm")
    assert f"--output {tmp_path / 'out'}: lies in --data {tmp_path}" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coordinator here:1 --num-processes 2", "give all or none"),
        ("--coordinator here:1 --num-processes 2 --process-id 2", "must be below --num-processes"),
        ("--coordinator here --num-processes 2 --process-id 1", "must be HOST:PORT"),
        ("--data-devices 3", "--batch-size 16: must be divisible by --microbatches x --data-"),
        ("--data-devices 2 --ranks 8", "--ranks x devices of data = 16: more than the devices"),
        ("--profile 5:2", "'5:2' is no range START:STOP"),
        ("--profile 10:12 --steps 9", "--profile 10:12: begins after the last step, 9"),
        ("--fresh --stopped-code 75", "--fresh: would begin anew at every restart"),
        ("--stopped-code 256", "Invalid value for '--stopped-code'"),
        ("--save-every 0", "Invalid value for '--save-every'"),
        ("--heartbeat 1", "Invalid value for '--heartbeat'"),
        ("--dropout 1", "Invalid value for '--dropout'"),
    ],
)
def test_bad_flags_of_a_run_are_refused(flags: str, message: str, refusal: Any) -> None:
    assert message in refusal(main, flags.split(), name="train_lm")


def test_a_range_of_steps() -> None:
    kind = StepRange()
    assert kind.convert("3:7", None, None) == "3:7"
    for wrong in ("3", "0:2", "a:b", "-1:2", "3:"):
        with pytest.raises(click.BadParameter):
            kind.convert(wrong, None, None)


# --- folders ---------------------------------------------------------------------------------


def open_in(path: Path | None, default: Path, config: dict[str, Any], **given: Any) -> Any:
    opened = folder.open_folder(path, default=default, config=config, **{"fresh": False, **given})
    opened.write_config(config)
    return opened


def test_runs_without_output_have_numbered_folders(tmp_path: Path) -> None:
    opened = [open_in(None, tmp_path / "runs", {"seed": 1}) for _ in range(3)]
    assert [o.path.name for o in opened] == ["0001", "0002", "0003"]
    assert all(o.earlier is None for o in opened)


def test_other_flags_are_refused_each_by_name(tmp_path: Path) -> None:
    config = {"seed": 1, "width": 96, "steps": 10, "schedule": "1f1b", "text": "a"}
    open_in(tmp_path / "run", tmp_path, config)
    free = {**config, "steps": 20, "schedule": "dualpipe"}
    earlier = open_in(tmp_path / "run", tmp_path, free).earlier
    assert earlier == config
    assert folder.changes(earlier, free) == ["--schedule: 1f1b -> dualpipe", "--steps: 10 -> 20"]
    with pytest.raises(Refusal) as refused:
        open_in(tmp_path / "run", tmp_path, {**free, "seed": 2, "width": 64, "text": "b"})
    for words in (
        "--seed: 1 -> 2",
        "--width: 96 -> 64",
        "text (digest of its files' names and sizes): a -> b",
        "--fresh",
    ):
        assert words in refused.value.message
    assert "--steps" not in refused.value.message
    # Nothing is lost: neither by the refusal, nor by --fresh.
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text()) == free
    fresh = open_in(tmp_path / "run", tmp_path, {"seed": 2}, fresh=True)
    assert fresh.earlier is None
    assert tomllib.loads((tmp_path / "run.1" / "config.toml").read_text()) == free


def test_fresh_moves_runs_alone_and_where_links_lead(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "disk" / "mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "mine")
    (tmp_path / "link" / "notes.txt").write_text("no run is here")
    open_in(tmp_path / "link", tmp_path, {"seed": 1}, fresh=True)
    assert (tmp_path / "disk" / "mine" / "notes.txt").exists()
    open_in(tmp_path / "link", tmp_path, {"seed": 2}, fresh=True)
    monkeypatch.chdir(tmp_path / "link")
    opened = open_in(Path(), tmp_path, {"seed": 3}, fresh=True)
    assert opened.earlier is None
    configs = {path.name: (path / "config.toml").read_text() for path in tmp_path.glob("disk/*")}
    assert configs == {"mine.1": "seed = 1\n", "mine.2": "seed = 2\n", "mine": "seed = 3\n"}
    assert (tmp_path / "link").samefile(opened.path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"--output .*file/run: Not a directory"):
        open_in(tmp_path / "file" / "run", tmp_path, {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_bytes(b"\xff")
    with pytest.raises(Refusal, match=r"config\.toml: 'utf-8' codec"):
        open_in(tmp_path / "run", tmp_path, {})


# --- logs ------------------------------------------------------------------------------------


def test_logs_go_on_where_a_run_resumes(tmp_path: Path) -> None:
    """Rows after the checkpoint leave all three files, and a line that was cut short does."""
    from tensorboardX.proto import event_pb2

    kinds = ("jsonl", "tensorboard")
    columns = ("step", "train_loss", "seconds")
    log = Log(tmp_path, columns, kinds=kinds)
    for step in range(5):
        log.add({"step": step, "train_loss": 5.0 - step if step else None, "seconds": 0.5 * step})
    log.close()
    for name in ("log.csv", "log.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"st' if "json" in name else "5,1.2")
    again = Log(tmp_path, columns, step=2, kinds=kinds)
    assert [row["step"] for row in again.rows] == [0, 1, 2]
    for step in (3, 4, 5):
        again.add({"step": step, "train_loss": 7.0, "seconds": 9.0})
    again.close()
    rows = read_rows(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["train_loss"] for row in rows] == [None, 4.0, 3.0, 7.0, 7.0, 7.0]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    assert [line.get("train_loss") for line in lines] == [row["train_loss"] for row in rows]
    # TensorBoard drops the rows of earlier files from the step of the event SessionLog.START on.
    events: Any = event_pb2
    starts = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = events.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                starts.append(event.step)
    assert starts == [0, 3]


def test_float32_is_logged_to_the_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    log = Log(tmp_path, ("step", "train_loss"))
    for step, value in enumerate(values):
        log.add({"step": step, "train_loss": float(value)})
    log.close()
    read = [row["train_loss"] for row in read_rows(tmp_path / "log.csv")]
    np.testing.assert_array_equal(np.array(read, np.float32), values)


def test_figures_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    log = Log(tmp_path, ("step", "train_loss", "grad_norm"), kinds=("jsonl",))
    log.add({"step": 1, "train_loss": float("inf"), "grad_norm": float("nan")})
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == (
        '{"step": 1, "train_loss": null, "grad_norm": null}\n'
    )
    assert np.isinf(read_rows(tmp_path / "log.csv")[0]["train_loss"])


# --- the state -------------------------------------------------------------------------------


def test_a_digest_sees_every_bit_and_no_sharding() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    rng = np.random.default_rng(1)
    leaves = [
        rng.normal(size=(8, 12)).astype(np.float32),
        rng.integers(0, 255, (4, 8), np.uint8),
        np.arange(8) % 2 == 0,
        jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        np.float64(rng.normal(size=(4, 4))),
        np.int32(7),
    ]
    want = digest(jax.tree.map(jnp.asarray, leaves))
    assert len(set(want)) == len(leaves)
    specs = [jax.P("a", "b"), jax.P("b"), jax.P("a"), jax.P(("a", "b")), jax.P(None, "a"), jax.P()]
    shardings = [jax.NamedSharding(mesh, spec) for spec in specs]
    assert digest([jax.device_put(*both) for both in zip(leaves, shardings, strict=True)]) == want
    for index, leaf in enumerate(leaves[:2]):
        for byte in range(0, leaf.nbytes, 7):
            flipped = leaf.copy()
            flipped.view(np.uint8).reshape(-1)[byte] ^= 1 << (byte % 8)
            assert digest([jnp.asarray(flipped)]) != want[index : index + 1]
    swapped: Any = leaves[0].copy()
    swapped[0, :2] = swapped[0, 1::-1]
    assert digest([jnp.asarray(swapped)]) != want[:1]


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_left_out(wrong: str) -> None:
    """Parameters, moments and the learning rate's count stay; the counters count."""

    def grad_fn(params: Any, batch: jax.Array, key: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.square(p["kernel"] - batch[0]).sum())(params)
        bad = batch[1] > 0
        if wrong == "loss":
            loss = jnp.where(bad, jnp.inf, loss)
        else:
            grads = jax.tree.map(lambda g: g.at[0].set(jnp.where(bad, jnp.nan, g[0])), grads)
        return (loss, {"extra": batch[0]}), grads

    optimizer, rates = state.make_optimizer(learning_rate=0.1, steps=10)
    optimizer = state.skipping(optimizer)
    init = state.make_init(lambda key: {"kernel": jnp.ones(3)}, optimizer)
    told: list[Any] = []
    step = jax.jit(
        state.make_step(
            grad_fn,
            optimizer,
            rates,
            after_update=lambda params, figures, ok: told.append(figures.keys()) or params,
        )
    )
    now = init(jax.random.key(0))
    rows = []
    for bad in (0, 1, 1, 0, 1):
        before = now
        now, figures = step(now, jnp.array([3.0, bad]))
        rows.append((int(figures["skipped"]), int(figures["skipped_in_a_row"])))
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()),
            (before.params, before.opt_state.inner_state),
            (now.params, now.opt_state.inner_state),
        )
        assert jax.tree.all(same) == bool(bad)
        assert np.isfinite(now.params["kernel"]).all()
    assert rows == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    # Two updates were made; the third has the learning rate of the third.
    assert float(figures["learning_rate"]) == pytest.approx(np.asarray(rates(2)).item())
    assert int(now.step) == 5
    assert told[0] == {"extra": None}.keys()


# --- the loop --------------------------------------------------------------------------------


@pytest.fixture
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets time pass by sleeping alone, at once."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


class Later:
    """A figure of a device, which has it at some time."""

    def __init__(self, value: float, at: float = 0.0):
        self._value, self._at = value, at

    def block_until_ready(self) -> "Later":
        time.sleep(max(0.0, self._at - time.perf_counter()))
        return self

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.block_until_ready()
        return np.asarray(self._value)


class Device:
    """Takes steps one after another, each of the same seconds."""

    def __init__(self, seconds: float):
        self._seconds, self._free = seconds, 0.0

    def step(self, state: Any, batch: Any) -> Any:
        self._free = max(time.perf_counter(), self._free) + self._seconds
        names = ("loss", "learning_rate", "grad_norm", "skipped", "skipped_in_a_row")
        now = SimpleNamespace(step=Later(0, self._free))
        return now, {name: Later(0, self._free) for name in names}


class Disk:
    """Fails to save these steps."""

    def __init__(self, *failing: int):
        self._failing, self._bad, self.saved = failing, 0, [0]

    def save(self, step: int, *_: Any, **__: Any) -> None:
        self.wait()
        self._bad, self.saved = step if step in self._failing else 0, [*self.saved, step]

    def wait(self) -> None:
        bad, self._bad = self._bad, 0
        if bad:
            self.saved.remove(bad)
            raise SaveError(f"step {bad} cannot be saved")

    check = wait


def run_loop(
    folder: Path, device: Device, disk: Disk, *, data_seconds: float, **settings: Any
) -> list[Any]:
    """Runs the loop without JAX; returns the rows of its log."""

    class Data:
        position = None

        def __next__(self) -> None:
            time.sleep(data_seconds)

    log = Log(folder, COLUMNS)
    parts: dict[str, Any] = {
        "settings": make_settings(folder, **settings),
        "requests": Requests(print),
        "step": device.step,
        "held_out_loss": lambda state: time.sleep(0.05) or 1.0,
        "batches": Data(),
        "to_row": lambda figures: {},
        "facts": {},
        "checkpoints": disk,
        "log": log,
        "clock": Clock(),
        "console": Console(quiet=True),
        "speed": progress.Speed(tokens=1, devices=jax.devices()[:1], flops=1.0, peak=None),
        "profile": Profile(None, folder),
    }
    first: Any = SimpleNamespace(opt_state=SimpleNamespace(notfinite_count=0))
    with contextlib.closing(log):
        Loop(**parts).run(first, start=0)
    return log.rows[1:]


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("eval_every", [1, 6])
def test_a_steps_time_is_that_of_the_devices(eval_every: int, tmp_path: Path) -> None:
    """Reading data meanwhile does not shorten it; evaluating afterwards does not lengthen it."""
    device = Device(0.1)
    rows = run_loop(tmp_path, device, Disk(), data_seconds=0.06, steps=6, eval_every=eval_every)
    seconds = [1 / row["tokens_per_second"] for row in rows]
    assert np.median(seconds) == pytest.approx(0.1)


def test_saves_may_fail_but_the_last(tmp_path: Path) -> None:
    given: Any = {"data_seconds": 0.0, "save_every": 1, "on_save_error": "continue", "steps": 3}
    disk = Disk(1, 2)
    run_loop(tmp_path, Device(0.0), disk, **given)
    assert disk.saved == [0, 3]
    with pytest.raises(SaveError, match="step 3"):
        run_loop(tmp_path, Device(0.0), Disk(3), **given)


# --- progress and profiles -------------------------------------------------------------------


def test_paths_and_samples_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "runs/[/a]/[bold]: x[a:b:c]"
    processes.console().print(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_the_goodput_adds_up() -> None:
    clock = Clock()
    with clock.phase("steps"):
        sum(range(10**5))
    with clock.phase("saving"):
        sum(range(10**5))
    line = clock.goodput()
    shares = [float(part.split(" %")[0].split()[-1]) for part in line.split(";")[1].split(",")]
    assert sum(shares) + float(line.split(" %")[0]) == pytest.approx(100, abs=0.3)


def test_the_speed_of_a_step() -> None:
    speed = progress.Speed(tokens=2000, devices=jax.devices()[:4], flops=8e12, peak=1e13)
    assert speed.describe(0.5) == "4,000 tokens/s (1,000 a device), 500 ms, MFU 40.0 %"
    unknown = progress.Speed(tokens=2000, devices=jax.devices()[:1], flops=8e12, peak=None)
    assert unknown.describe(0.5) == "4,000 tokens/s, 500 ms"


@pytest.mark.slow
def test_a_run_logs_profiles_and_ends(tmp_path: Path) -> None:
    """One small run: goodput, JSON lines, a profile of two steps, and that it has ended."""
    job = make_job("1f1b", {"pipe": 2}, microbatches=4)
    settings = make_settings(tmp_path / "run", log=("jsonl",), profile="2:3")
    printed = run_job(job, settings)
    assert "% of" in printed.partition("goodput")[2]
    assert "best      step 6" in printed
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(7))
    assert [row["skipped"] for row in rows_of(tmp_path / "run")[1:]] == [0] * 6
    (profile,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    found = jax.profiler.ProfileData.from_file(str(profile))
    names = {event.name for plane in found.planes for line in plane.lines for event in line.events}
    assert any("jit_step" in name or "PjRt" in name for name in names), sorted(names)[:20]
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(SystemExit) as ended:
        run_job(job, make_settings(tmp_path / "run", steps=5))
    assert ended.value.code == 0
    assert (tmp_path / "run" / "config.toml").read_text() == before
