"""The main job, small: it learns, it repeats itself, it leaves its files, it refuses bad flags."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments.train_lm.train_lm import main
from experiments.train_lm.trainer import data
from experiments.train_lm.trainer.mesh import batch_axes

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--ranks 2 --layers 2 --width 16 --heads 2 --context 16 --batch-size 8 --microbatches 4 "
    "--steps 40 --eval-every 20 --eval-batches 2 --learning-rate 0.01"
)


# Whoever starts the tests in the background has SIGINT ignored in all their children.
HEED_CTRL_C = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def start(
    flags: str, *, module: str = "experiments.train_lm.train_lm", folder: Path = ROOT
) -> subprocess.Popen[str]:
    """Starts the script as `make train` does: its fake devices come before JAX's backends."""
    return subprocess.Popen(
        [sys.executable, "-c", HEED_CTRL_C, module, *TINY.split(), *flags.split()],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses_of(output: Path, column: str) -> np.ndarray:
    return np.array([float(row[column]) for row in rows_of(output) if row[column]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs the script, a copy of its folder without the repository around it, and in bfloat16.

    The second run finds the first one's compiled programs in conftest's cache.
    """
    folder = tmp_path_factory.mktemp("runs")
    elsewhere = folder / "elsewhere"
    shutil.copytree(ROOT / "experiments" / "train_lm", elsewhere / "my_lm")
    # The library of this checkout, but nothing else of it, whatever the environment has installed.
    (elsewhere / "dualpipe_jax").symlink_to(ROOT / "dualpipe_jax")
    (elsewhere / "experiments.py").write_text("raise ImportError('not in a copy')")
    copy: dict[str, Any] = {"module": "my_lm.train_lm", "folder": elsewhere}
    outputs = {}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "first": ("float32", {}),
        "copied": ("float32", copy),
        "half": ("bfloat16", {}),
    }
    for name, (dtype, where) in kinds.items():
        outputs[name] = folder / name
        process = start(f"--output {outputs[name]} --dtype {dtype}", **where)
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
        (outputs[name] / "printed.txt").write_text(printed, encoding="utf-8")
    return outputs


@pytest.mark.slow
def test_the_loss_falls_and_is_logged(runs: dict[str, Path]) -> None:
    rows = rows_of(runs["first"])
    assert list(rows[0]) == [
        "step",
        "train_loss",
        "held_out_loss",
        "held_out_perplexity",
        "learning_rate",
        "grad_norm",
        "skipped",
        "tokens_per_second",
        "mfu",
        "seconds",
    ]
    assert [int(row["step"]) for row in rows] == list(range(41))
    held_out = losses_of(runs["first"], "held_out_loss")
    assert len(held_out) == 3  # at steps 0, 20 and 40
    # An untrained model knows nothing: ln 256 = 5.545. 40 steps reach about 3.2.
    assert held_out[0] == pytest.approx(np.log(256), abs=0.2)
    assert held_out[-1] < 3.8
    # Six digits of each are in the file.
    perplexities = losses_of(runs["first"], "held_out_perplexity")
    np.testing.assert_allclose(perplexities, np.exp(held_out), rtol=1e-4)
    printed = (runs["first"] / "printed.txt").read_text(encoding="utf-8")
    assert f"perplexity {perplexities[0]:.2f} " in printed
    last = f"perplexity {perplexities[-1]:.3f} a byte ({held_out[-1]:.3f} nats), over 16 windows"
    assert last in printed
    assert losses_of(runs["first"], "train_loss")[-5:].mean() < 3.8
    rates = losses_of(runs["first"], "learning_rate")
    assert rates.max() == pytest.approx(0.01)
    assert rates.argmax() == 4  # after 40 / 10 steps of warm-up
    assert rates[-1] < 0.0011


@pytest.mark.slow
def test_the_pictures_and_the_sample_are_written(runs: dict[str, Path]) -> None:
    for name in ("loss.png", "timetable.png"):
        picture = matplotlib.image.imread(runs["first"] / name)
        assert picture[..., :3].std() > 0.05, name  # not blank
    sample = (runs["first"] / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("def ")
    assert len(sample.encode(errors="replace")) > 400


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_in_a_copy_of_the_folder(runs: dict[str, Path]) -> None:
    for column in ("train_loss", "held_out_loss"):
        copied = losses_of(runs["copied"], column)
        np.testing.assert_array_equal(losses_of(runs["first"], column), copied)
    samples = [(runs[name] / "sample.txt").read_bytes() for name in ("first", "copied")]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(runs: dict[str, Path]) -> None:
    for column in ("train_loss", "held_out_loss"):
        single, half = (losses_of(runs[name], column) for name in ("first", "half"))
        # Not the same numbers, but close: bfloat16 rounds to 1 in 256.
        assert 0 < np.abs(single - half).max() < 0.05
        assert half[-1] < half[0] - 0.5


@pytest.mark.slow
def test_ctrl_c_leaves_the_log_and_the_pictures(tmp_path: Path) -> None:
    process = start(f"--steps 100000 --schedule 1f1b --output {tmp_path}")
    deadline = time.monotonic() + 120
    log = tmp_path / "log.csv"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert "stopped" in printed
    assert len(rows_of(tmp_path)) >= 5
    assert {path.name for path in tmp_path.iterdir()} >= {"loss.png", "timetable.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--microbatches 3", "--batch-size 16: must be divisible by --microbatches 3"),
        ("--heads 5", "--width 96: must be divisible by --heads 5"),
        ("--schedule zigzag", "Invalid value for '--schedule': 'zigzag' is not one of"),
        ("--data /no/such/path", "Path '/no/such/path' does not exist"),
        ("--ranks 0", "Invalid value for '--ranks': 0 is not in the range x>=1"),
        ("--layers 3 --ranks 4", "--layers 3: fewer than the 4 stages of dualpipe over 4 ranks"),
        ("--ranks 99", "--ranks 99: more than the devices here (8 x cpu); lower it"),
        ("--learning-rate nan", "not a finite number"),
        ("--learning-rate 0", "Invalid value for '--learning-rate'"),
        ("--data SHORT", "too little text: 90 bytes to train on and 10 held out"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: str, message: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_bytes(b"0123456789" * 10)
    args = flags.replace("SHORT", str(short)).split()
    printed = refusal(main, args, name="train_lm")
    assert message in printed


def test_several_bad_flags_are_all_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--microbatches", "3", "--heads", "5"])
    printed = capsys.readouterr().err
    assert "--microbatches 3" in printed
    assert "--heads 5" in printed


def test_fewer_devices_than_ranks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    three = jax.devices()[:3]
    monkeypatch.setattr(jax, "devices", lambda: three)
    with pytest.raises(SystemExit):
        main(["--ranks", "4", "--output", str(tmp_path)])
    assert "--ranks 4: more than the devices here (3 x cpu)" in capsys.readouterr().err


def test_the_standard_library_is_split_by_whole_files() -> None:
    files = data.standard_library()
    train, held_out = data.split(files)
    assert sorted(train + held_out) == sorted(files)
    assert not {name for name, _ in train} & {name for name, _ in held_out}
    # A tenth; a hash of some hundred names stays well within a factor of two.
    assert 0.05 < len(held_out) / len(files) < 0.2
    skipped = {"site-packages", "test", "tests"}
    assert not any(skipped & set(Path(name).parts) for name, _ in files)
    text = data.read(None, min_length=1000)
    sizes = sum(path.stat().st_size for _, path in files)
    # Newlines between the files of a side.
    assert len(text.train) + len(text.held_out) == sizes + len(files) - 2


def test_a_files_side_depends_on_its_name_alone() -> None:
    files = [(f"{index}.py", Path(f"{index}.py")) for index in range(200)]
    _, held_out = data.split(files)
    _, of_fewer = data.split(files[50:][::-1])
    assert set(of_fewer) == set(held_out) & set(files[50:])


def test_a_folder_is_read_by_its_text_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data .*: has no text files"):
        data.read(tmp_path, min_length=10)
    no_utf8 = os.fsdecode(b"b/\xff.md")
    contents = {"a.txt": b"a" * 50, no_utf8: b"b" * 60, "x.bin": b"\0" * 9, ".hidden": b"h" * 9}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = data.read(tmp_path, min_length=10)
    whole = [side.windows(np.zeros(1, int), len(side) - 1) for side in (text.train, text.held_out)]
    assert {bytes(side.astype(np.uint8)) for side in whole} == {b"a" * 50, b"b" * 60}


def pieces(folder: Path, *lengths: int) -> data.Pieces:
    """Makes a text of files whose bytes count up."""
    files = []
    for index, length in enumerate(lengths):
        path = folder / f"{index}.txt"
        path.write_bytes(bytes((np.arange(length) % 200 + 20).astype(np.uint8)))
        files.append((path.name, path))
    return data.Pieces(files)


def test_a_text_is_read_over_the_ends_of_files(tmp_path: Path) -> None:
    text = pieces(tmp_path, 30, 0, 5, 40)
    whole = b"\n".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert len(text) == len(whole)
    for start in range(len(whole)):
        for length in (1, 7, len(whole) - start):
            part = bytes(text.read(start, min(length, len(whole) - start)))
            assert part == whole[start : start + length]
    (tmp_path / "3.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"3\.txt: has become shorter"):
        text.read(0, len(whole))


def test_batches_are_windows_and_repeat_with_the_seed(tmp_path: Path) -> None:
    text = pieces(tmp_path, 200)
    windows: Any = {"batch_size": 4, "context": 8}
    first, again, other = (
        [next(batches) for _ in range(12)]
        for batches in (data.iterate(text, seed=seed, **windows) for seed in (0, 0, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert (np.array(first) != other).any()
    assert first[0].shape == (4, 9)
    np.testing.assert_array_equal(first[0], first[0][:, :1] + np.arange(9))
    # An epoch of 24 windows, six batches, has each of them once; the next one in another order.
    for epoch in (first[:6], first[6:]):
        assert len({int(row[0] - 20) // 8 for batch in epoch for row in batch}) == 24
    assert [int(b[0, 0]) // 8 for b in first[:6]] != [int(b[0, 0]) // 8 for b in first[6:]]


def test_rows_are_the_same_on_any_mesh_and_positions_can_be_kept(tmp_path: Path) -> None:
    """A device holds its own rows of the same global batch."""
    text = pieces(tmp_path, 300)
    whole = data.iterate(text, batch_size=8, context=8, seed=5)
    wanted = [next(whole) for _ in range(5)]
    for sizes in ({"pipe": 2}, {"pipe": 2, "data": 4}, {"pipe": 2, "data": 2, "fsdp": 2}):
        count = int(np.prod(list(sizes.values())))
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])
        where = jax.NamedSharding(mesh, jax.P(batch_axes(mesh) or None))
        batches = data.Batches(text, batch_size=8, context=8, seed=5, sharding=where)
        np.testing.assert_array_equal([next(batches) for _ in range(3)], wanted[:3])
        position = batches.position
        next(batches)
        batches.move_to(position)
        last = [next(batches) for _ in range(2)]
        np.testing.assert_array_equal(last, wanted[3:])
        shards = last[0].addressable_shards
        assert {shard.data.shape for shard in shards} == {(8 // (count // 2), 9)}
    spread = data.spread(text, batch_size=4, context=8, num_batches=3, sharding=where)
    whole_text = text.read(0, len(text))
    np.testing.assert_array_equal(np.asarray(spread[0])[0], whole_text[:9])
    np.testing.assert_array_equal(np.asarray(spread[-1])[-1], whole_text[-9:])
