"""Runs the command line as a user does."""

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def in_terminal(*arguments: str, columns: int, command: str = "timeline") -> tuple[str, int]:
    """Runs the command with a terminal for its output; returns that and the exit code."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    line = [sys.executable, "-m", "dualpipe_jax", command, *arguments]
    process = subprocess.Popen(line, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    return output.decode().replace("\r\n", "\n"), process.wait(timeout=30)


def broken_words(narrow: str, whole: str) -> set[str]:
    """Lists the words of a terminal's table that the table of a pipe does not have."""
    note = "left out in so narrow a terminal:"
    return {word.rstrip(",") for word in narrow.replace(note, "").split()} - {
        word.rstrip(",") for word in whole.split()
    }


def modules_after(code: str) -> set[str]:
    """Names the top-level packages that a fresh interpreter has imported after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; sys.stderr.write(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stderr.split()}


def run_script(module: str, *flags: str, output: Path) -> str:
    """Runs a script of the experiments, with fake devices of its own; returns its output."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *flags, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
