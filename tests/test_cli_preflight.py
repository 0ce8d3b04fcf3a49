"""`dualpipe-jax preflight`: both formats, its options, and the messages of mistakes.

A step is compiled for each run. The cheapest schedule is taken where any will do, and the command
runs in this process, with JAX imported, where a process of its own shows no more.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from click.testing import CliRunner, Result

from dualpipe_jax import _cli
from tests.commands import in_terminal, modules_after

SIZES = ["--width", "16", "--heads", "2", "--context", "8", "--vocabulary", "32"]
SIZES += ["--microbatch", "1"]
ON_CPUS = [*SIZES, "--topology", "cpu:2", "--ranks", "2", "--microbatches", "8", "--layers", "2"]
ON_TPUS = [*SIZES, "--topology", "tpu:v5e:2x2", "--ranks", "4", "--layers", "4"]
CHEAP = ["--schedule", "1f1b", "--overlap", "no"]


def run(*arguments: str) -> Result:
    """Runs the command with conftest's devices, whose number it would otherwise note."""
    with jax.enable_x64(False):  # as users compute
        return CliRunner(env={"JAX_NUM_CPU_DEVICES": "8"}).invoke(
            _cli.main, ["preflight", *arguments], catch_exceptions=False
        )


def run_alone(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does: it brings up the devices that it needs."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    line = [sys.executable, "-W", "error", "-m", "dualpipe_jax", "preflight", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_table() -> None:
    done = run(*ON_CPUS, "--overlap", "yes")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "device   cpu:2, CPU; mesh pipe 2"
    assert any(line.startswith("loop     the steady state, 2 beats a trip") for line in lines)
    assert any(line.split()[:3] == ["collective-permute", "pipe", "sync"] for line in lines)


def report_of(*more: str) -> dict[str, Any]:
    done = run(*ON_CPUS, *CHEAP, "--dtype", "float32", "--format", "json", *more)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return report_of()


@pytest.mark.slow
def test_json_follows_the_sizes(plain: dict[str, Any]) -> None:
    # x is [windows, context, width] in the dtype that layers compute in.
    for made, num_bytes in ((plain, 8 * 16 * 4), (report_of("--context", "16"), 16 * 16 * 4)):
        assert (made["topology"], made["axes"]) == ("cpu:2", {"pipe": 2})
        assert {each["num_bytes"] for each in made["loop"]["collectives"]} == {num_bytes}
        # The parameters and AdamW's two moments are donated, and come back in their place.
        assert made["memory"]["aliased"] > 0.9 * made["memory"]["outputs"]


@pytest.mark.slow
def test_options_reach_the_step(plain: dict[str, Any]) -> None:
    assert plain["loop"]["kind"] == "ramp"  # `test_table` has the steady state
    rematerialised = report_of("--remat", "block")
    assert rematerialised["memory"]["temporaries"] < plain["memory"]["temporaries"]


@pytest.mark.slow
def test_tpu_prints_the_options_and_their_reasons() -> None:
    done = run(*ON_TPUS, "--microbatches", "16", "--overlap", "yes")
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(r"^step +[\d.]+ .s predicted: dualpipe ", done.stdout, flags=re.MULTILINE)
    assert "4 of 4 collectives hidden" in done.stdout
    assert "xla_tpu_enable_async_all_to_all=True\n  all-to-alls run while" in done.stdout


@pytest.mark.slow
def test_programs_in_the_cache_on_disk_are_compiled_again(tmp_path: Path) -> None:
    arguments = [*ON_TPUS, *CHEAP, "--microbatches", "4", "--format", "json"]
    reports = []
    for _ in range(2):
        done = run_alone(*arguments, cache=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        reports.append({**json.loads(done.stdout), "compile_seconds": None})
    assert any(tmp_path.iterdir())
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_terminal_gets_a_colored_table() -> None:
    text, code = in_terminal(*ON_CPUS, *CHEAP, columns=120, command="preflight")
    assert code == 0
    assert "\x1b[" in text
    assert "collective-permute" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "tpu:v9:2x4"], "topology='tpu:v9:2x4': must be one of tpu:v5e:2x4"),
        (["--width", "10", "--heads", "4"], "width=10: must be a multiple of heads=4"),
        (["--schedule", "bogus"], "schedule='bogus': must be one of 'gpipe'"),
        (["--stages-per-rank", "2"], "num_stages_per_rank=2: must be an option of schedule 'dual"),
        (["--layers", "0"], "Invalid value for '--layers'"),
    ],
)
def test_mistake_is_one_line(arguments: list[str], message: str) -> None:
    done = run(*ON_CPUS, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_line_imports_no_jax_before_it_is_invoked() -> None:
    code = "main(['preflight', '--help'], standalone_mode=False)"
    imported = modules_after(f"from dualpipe_jax.__main__ import main; {code}")
    assert not imported & {"jax", "jaxlib", "optax", "rich"}
