"""Bits flipped and files cut in the newest checkpoint: it is named, and the one before is used."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train_lm.flags import Refusal
from experiments.train_lm.trainer.checkpoints import Checkpoints
from experiments.train_lm.trainer.state import State
from tests.faults.runs import TINY, command, printed, require_every_step_once
from tests.processes import run

FLIPS = 12  # in each file
# Orbax leaves the other reads of a broken checkpoint behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(value: int) -> State:
    key = jax.random.key(value)
    kernel = jax.random.normal(key, (4, 16, 16), jnp.float32)
    params = {"blocks": {"kernel": kernel}, "ends": jnp.arange(7.0, dtype=jnp.float32)}
    return State(
        step=jnp.int32(value),
        params=params,
        opt_state={"count": jnp.int32(value), "is_finite": jnp.bool_(True)},
        rng=jax.random.key_data(key),
    )


def place(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves two small states."""
    folder = tmp_path_factory.mktemp("broken") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3, warn=print)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"data": step}, held_out_loss=None)
    checkpoints.close()
    return folder


def restored_from(folder: Path) -> tuple[int, list[str]]:
    """Restores, requires the state that was saved, and gives its step and the warnings."""
    warnings: list[str] = []
    checkpoints = Checkpoints(folder, keep=3, warn=warnings.append)
    restored = checkpoints.restore(jax.tree.map(place, make_state(0)))
    assert restored is not None
    want = make_state(restored.step)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), restored.state, want)
    assert jax.tree.all(same), folder
    assert restored.facts["data"] == restored.step
    checkpoints.close()
    return restored.step, warnings


def damage(path: Path, at: float | None) -> None:
    """Flips a bit at a share of the file's length, or cuts the file in half."""
    content = bytearray(path.read_bytes())
    if at is None:
        content = content[: len(content) // 2]
    else:
        byte = min(int(at * len(content)), len(content) - 1)
        content[byte] ^= 1 << (byte % 8)
    path.write_bytes(content)


def test_no_flipped_bit_passes(saved: Path, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Whatever is damaged, the state is that which was saved: of this step or the one before."""
    files = [path for path in sorted((saved / "2").rglob("*")) if path.is_file()]
    files = [path for path in files if path.stat().st_size > 0]
    assert len(files) > 5
    places = [*np.linspace(0, 1, FLIPS), None]
    fell_back = 0
    for number, (path, at) in enumerate((path, at) for path in files for at in places):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(saved, folder)
        damage(folder / path.relative_to(saved), at)
        step, warnings = restored_from(folder)
        fell_back += step == 1
        if step == 1:
            assert "checkpoint 2 is broken" in warnings[0]
            assert (folder.parent / "broken-checkpoints" / "2").exists()
            assert not (folder / "2").exists()
        else:
            assert not warnings
        shutil.rmtree(folder.parent)
    total = len(files) * len(places)
    # Descriptions that no restore reads may be damaged without harm.
    assert fell_back > total / 3
    figure(
        f"Damaged checkpoints: {total} ({FLIPS} flipped bits and a cut in each of {len(files)} "
        f"files): {fell_back} found, and the one before used; {total - fell_back} did no harm; "
        "none gave another state"
    )


def test_no_whole_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    """A run does not begin anew by itself, and nothing is removed."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for path in folder.rglob("metadata"):
        damage(path, None)
    checkpoints = Checkpoints(folder, keep=3, warn=print)
    with pytest.raises(Refusal, match=r"none of the checkpoints \[1, 2\] is whole; --fresh"):
        checkpoints.restore(jax.tree.map(place, make_state(0)))
    assert sorted(p.name for p in (tmp_path / "broken-checkpoints").iterdir()) == ["1", "2"]


def test_processes_agree_on_a_broken_checkpoint(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """Parameters over two processes; the damage is in the largest file."""
    flags = f"{TINY} --ranks 1 --fsdp-devices 2 --schedule 1f1b --save-every 4"
    output = tmp_path / "run"
    run(command(f"{flags} --steps 8", output), count=2, folder=tmp_path / "first")
    files = (output / "checkpoints" / "8" / "state").rglob("*")
    largest = max((p for p in files if p.is_file()), key=lambda path: path.stat().st_size)
    damage(largest, 0.5)
    texts = run(command(f"{flags} --steps 10", output), count=2, folder=tmp_path / "second")
    assert "checkpoint 8 is broken" in texts[0], printed(tmp_path / "second")
    assert "resumed   after step 4" in texts[0]
    require_every_step_once(output, last=10)
    figure("A damaged checkpoint of two processes: both used the one before")
