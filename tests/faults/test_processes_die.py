"""A process of four dies, or is silent: the others end; started again, the run goes on in full."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.runs import (
    ENDLESS,
    ROOT_TEXT,
    TINY,
    command,
    complete_steps,
    has_rows,
    last_step,
    printed,
    require_every_step_once,
    resumed_after,
    wait_until,
)
from tests.processes import started

FOUR = f"{TINY} --ranks 2 --data-devices 2 --schedule 1f1b --steps {ENDLESS} --save-every 5"
HEARTBEAT = 10
# Seconds until all others have ended: the heartbeat's, and as many again for a busy machine.
BOUND = {signal.SIGKILL: 45, signal.SIGSTOP: 45 + HEARTBEAT}


def survivors_end(
    processes: list[subprocess.Popen[str]], victim: int, *, within: float, folder: Path
) -> float:
    """Requires all processes but one to end with an error in time; gives the seconds."""
    begin = time.monotonic()
    for index, process in enumerate(processes):
        if index != victim:
            left = begin + within - time.monotonic()
            assert process.wait(timeout=max(left, 0.1)) != 0, printed(folder)
    return time.monotonic() - begin


def test_one_of_four_dies(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """By SIGKILL, one and then process 0; by SIGSTOP. The run in between goes on each time."""
    output = tmp_path / "run"
    for number, (victim, kind) in enumerate(
        [(2, signal.SIGKILL), (0, signal.SIGKILL), (3, signal.SIGSTOP)]
    ):
        folder = tmp_path / f"round-{number}"
        folder.mkdir()
        newest, last = max(complete_steps(output), default=0), max(last_step(output), 4)
        flags = f"{FOUR} --heartbeat {HEARTBEAT}"
        with started(command(flags, output), count=4, folder=folder) as processes:
            # More rows than the round before has left.
            wait_until(has_rows(output, last + 4), processes, folder=folder)
            os.kill(processes[victim].pid, kind)
            seconds = survivors_end(processes, victim, within=BOUND[kind], folder=folder)
        said = printed(folder)
        assert resumed_after(said) == newest, said
        # By the trainer where a collective failed, or by JAX where a heartbeat did.
        for index in {0, 1, 2, 3} - {victim}:
            text = (folder / f"process-{index}.txt").read_text(errors="replace")
            assert "Start all of them again with the same command" in text or (
                "Terminating process because the JAX distributed service detected fatal errors"
                in text
            ), text
        if kind == signal.SIGSTOP:
            assert "unhealthy (stopped sending heartbeats)" in said, said
        figure(
            f"{kind.name} of process {victim} of 4: the others ended after {seconds:.1f} s, "
            f"{last_step(output) - max(complete_steps(output), default=0)} steps lost"
        )
    pre_empted(output, tmp_path / "end", figure)


def pre_empted(output: Path, folder: Path, figure: Callable[[str], None]) -> None:
    """Ends the run by SIGTERM to one process."""
    folder.mkdir()
    newest, before = max(complete_steps(output)), last_step(output)
    with started(command(FOUR, output), count=4, folder=folder) as processes:
        wait_until(has_rows(output, before + 4), processes, folder=folder)
        begin = time.monotonic()
        processes[3].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=60) for process in processes]
        seconds = time.monotonic() - begin
    assert codes == [0] * 4, printed(folder)
    last = last_step(output)
    assert f"stopped   by SIGTERM after step {last}, which is saved" in printed(folder)
    assert resumed_after(printed(folder)) == newest
    assert max(complete_steps(output)) == last
    figure(f"SIGTERM to one process of 4: all saved the same step and ended after {seconds:.1f} s")
    require_every_step_once(output, last=last)


def test_an_error_on_another_process_is_seen_on_process_0(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """A file of process 1 becomes shorter as it is read."""
    texts = []
    for index in range(2):
        texts.append(tmp_path / f"text-{index}")
        texts[-1].mkdir()
        for number in range(6):
            shutil.copy(ROOT_TEXT, texts[-1] / f"{number}.txt")
    flags = f"{TINY} --ranks 1 --data-devices 2 --schedule 1f1b --steps {ENDLESS} --heartbeat 10"
    output = tmp_path / "run"
    first = command(f"{flags} --data {texts[0]}", output)
    # The second --data comes from the process's number.
    choose = (
        "import runpy, sys\n"
        "if sys.argv[-1] == '1': sys.argv = [a.replace('text-0', 'text-1') for a in sys.argv]\n"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    with started(["-c", choose, *first[1:]], count=2, folder=tmp_path) as processes:
        wait_until(has_rows(output, 5), processes, folder=tmp_path)
        for path in texts[1].iterdir():
            path.write_bytes(b"")
        begin = time.monotonic()
        codes = [process.wait(timeout=60) for process in processes]
        seconds = time.monotonic() - begin
    assert 0 not in codes
    text = (tmp_path / "process-0.txt").read_text()
    assert "process 1 of 2: ValueError" in text
    assert "has become shorter since the run began" in text
    figure(f"An error on process 1 of 2: process 0 printed it; both ended after {seconds:.1f} s")
