"""Which devices a script runs on, and that it says so."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments.train_lm.flags import Refusal
from experiments.train_lm.train_lm import _most_ranks
from experiments.train_lm.trainer import devices
from experiments.train_lm.trainer.devices import find_devices

ROOT = Path(__file__).resolve().parents[2]


class Chip:
    platform = "gpu"
    device_kind = "toy"
    process_index = 0


def test_a_process_without_accelerators_says_so_and_nothing_else() -> None:
    """Not even where a TPU's compiler is installed, which looks for TPUs."""
    code = "from experiments.train_lm.trainer import devices as d; "
    code += "print(d.find_devices(None, flag='--n', fake=3))"
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.count("CpuDevice") == 3
    assert "3 fake ones of the CPU, as JAX finds no accelerator" in done.stdout
    assert not done.stderr


def test_accelerators_are_all_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [Chip() for _ in range(8)])
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    for count, found in ((None, 8), (3, 3)):
        chips, which = find_devices(count, flag="--ranks 3", fake=4)
        assert (len(chips), which) == (found, f"{found} of 8 x toy")
    with pytest.raises(Refusal, match="--ranks 9: more than the devices here"):
        find_devices(9, flag="--ranks 9", fake=4)


@pytest.mark.parametrize(
    ("file", "message"), [("nvidia0", "an NVIDIA GPU.*cuda13"), ("vfio/3", "a TPU.*tpu")]
)
def test_an_accelerator_that_jax_cannot_use_is_named(
    file: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exist(*patterns: Any) -> bool:
        return any(each.split("[")[0] in file for each in patterns)

    monkeypatch.setattr(devices, "_exist", exist)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    _, which = find_devices(2, flag="--ranks 2", fake=4)
    assert which.startswith("2 fake ones of the CPU, as there is ")
    assert re.search(message, which)


def test_ranks_are_as_many_as_have_a_layer() -> None:
    sizes = {"layers": 8, "microbatches": 8}
    for schedule, ranks in (("dualpipe", 8), ("dualpipev", 4), ("1f1b", 8)):
        assert _most_ranks(schedule, limit=16, **sizes) == ranks
        assert _most_ranks(schedule, limit=2, **sizes) == 2
