"""The README's example, run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.M | re.S)
    return code


def test_example_stands_near_the_top() -> None:
    lines = README.read_text().splitlines()
    assert lines.index("```python") < 40
    assert example().count("\n") <= 30


@pytest.mark.slow
def test_example_runs_and_its_loss_falls() -> None:
    # As for a user: the example makes its own four devices, and computes in float32.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
