"""A process reads its own part of a checkpoint, and needs no memory for the whole of it."""

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.train_lm.trainer.checkpoints import Checkpoints
from experiments.train_lm.trainer.state import State
from tests.experiments.restore_worker import LIMIT, SHAPE
from tests.processes import run, started

WORKER = ["-m", "tests.experiments.restore_worker"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a state of 256 MiB from one device."""
    folder = tmp_path_factory.mktemp("restore") / "checkpoints"
    scalar = jnp.zeros((), jnp.int32)
    kernel = jax.random.normal(jax.random.key(0), SHAPE, jnp.float32)
    state = State(step=scalar, params={"blocks": kernel}, opt_state=scalar, rng=scalar)
    checkpoints = Checkpoints(folder, keep=1, warn=print)
    checkpoints.save(1, state, {}, held_out_loss=None)
    checkpoints.close()
    return folder


@pytest.fixture(autouse=True)
def no_cgroup_is_left() -> Iterator[None]:
    yield
    for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
        for group in Path(root).glob("dualpipe-test-*"):
            with contextlib.suppress(OSError):
                group.rmdir()


@pytest.mark.slow
def test_a_model_larger_than_the_memory_of_a_process_is_restored(
    saved: Path, tmp_path: Path
) -> None:
    size = 4 * math.prod(SHAPE)
    assert size > LIMIT
    printed = run([*WORKER, str(saved), "sharded"], count=4, folder=tmp_path)
    for figures in map(json.loads, printed):
        assert figures["state"] == size // 4
        assert figures["read"] < 0.3 * size
        if figures["limit"] == "none":  # nothing but the count of bytes shows it here
            assert figures["memory"] < LIMIT


@pytest.mark.slow
def test_the_limit_is_one(saved: Path, tmp_path: Path) -> None:
    """The same model whole, on one process, is too much for it."""
    with started([*WORKER, str(saved), "whole"], count=1, folder=tmp_path) as (process,):
        code = process.wait(timeout=120)
    printed = (tmp_path / "process-0.txt").read_text()
    if code == 0:
        figures = json.loads(printed)
        assert figures["limit"] == "none"
        assert figures["memory"] > LIMIT
    else:
        assert code == -signal.SIGKILL, printed
