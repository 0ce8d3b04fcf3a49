"""Results of examples of the README and of the docs, run as they stand there.

That all of them run, where only the wheel is installed, is for `make wheel`.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def examples(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)


def example(path: Path = README) -> str:
    (code,) = examples(path)
    return code


# Prints how often XLA has compiled the function `step`, at the end.
COUNTING = """
import atexit, logging
class Count(logging.Handler):
    number = 0
    def emit(self, record):
        Count.number += record.getMessage().startswith("Finished XLA compilation of jit(step)")
logging.getLogger("jax._src.dispatch").addHandler(Count())
logging.getLogger("jax._src.dispatch").setLevel(logging.DEBUG)
logging.getLogger("jax._src.dispatch").propagate = False
atexit.register(lambda: print(Count.number))
"""


def run_compiling_once(code: str) -> list[str]:
    """Runs a training loop whose step must be compiled once; returns its lines."""
    *lines, number = run(COUNTING + code).splitlines()
    assert number == "1"
    return lines


def run(code: str) -> str:
    """Runs it as for a user: it makes its own devices, and computes in float32."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_stands_near_the_top() -> None:
    lines = README.read_text().splitlines()
    assert lines.index("```python") < 40
    assert example().count("\n") <= 30


@pytest.mark.slow
def test_example_runs_and_its_loss_falls() -> None:
    losses = [float(line) for line in run_compiling_once(example())]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_examples_of_checkpoints_resume() -> None:
    """Another schedule on fewer ranks goes on where the first one was: the loss falls on."""
    for code in examples(ROOT / "docs" / "checkpoints.md"):
        lines = [line.split() for line in run(code).splitlines()]
        assert [line[:2] for line in lines] == [
            *(["dualpipe", str(step)] for step in (1, 2, 3)),
            *(["1f1b", str(step)] for step in (4, 5, 6)),
        ]
        losses = [float(line[2]) for line in lines]
        falls = [before - after for before, after in itertools.pairwise(losses)]
        assert min(falls) > 0.1


@pytest.mark.slow
def test_example_of_precision_finds_its_scale() -> None:
    """From one that float16 does not hold; a step that is skipped leaves the loss as it is."""
    code, _ = examples(ROOT / "docs" / "precision.md")
    lines = [line.split() for line in run_compiling_once(code)]
    losses, scales = ([line[i] for line in lines] for i in (1, 3))
    num_skipped = len(set(scales[: losses.index(next(x for x in losses if x != losses[0]))]))
    assert scales[0] == "2^23"
    assert 3 < num_skipped < 20
    assert float(losses[-1]) < float(losses[0]) / 10


# Whether gradients are those of the sequential model, but for the rounding of float32.
COMPARED = """
expected = jax.value_and_grad(dpj.sequential(model, num_microbatches=4))(params, batch)
is_close = lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-5)
print(jax.tree.all(jax.tree.map(is_close, (loss, grads), expected)))
"""


@pytest.mark.slow
def test_examples_of_models_run_and_have_the_costs_of_the_page() -> None:
    page = ROOT / "docs" / "models.md"
    skips, costs, translation = examples(page)
    (table,) = re.findall(r"^```text\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    assert run(f"{skips}\n{costs}\n{COMPARED}") == f"{table}True\n"
    assert run(f"{translation}\n{COMPARED}") == "True\n"


def test_example_of_the_search() -> None:
    assert run(example(ROOT / "docs" / "schedule_search.md")) == "search-v 8\n"
