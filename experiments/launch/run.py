"""Runs one process of a training script; its exit code says whether the run is complete.

    python -m experiments.launch.run FOLDER MODULE [FLAGS...]

FOLDER becomes `--output` of the script MODULE. The script ends with 0 when its run is complete, and
also when SIGTERM stopped it early and its state is saved. A scheduler has to tell these two apart:
only after the second is a batch job requeued, or a Kubernetes Job started again.
"""

import runpy
import sys
import tomllib
from pathlib import Path

import jax

from experiments.train_lm.trainer import processes

# EX_TEMPFAIL of sysexits.h: start it again.
STOPPED_EARLY = 75


def main(arguments: list[str]) -> int:
    """Runs the script.

    Args:
      arguments: The folder of the run, the script's module, the script's flags.

    Returns:
      0 if the run is complete. In process 0 of a run that has ended before its last step,
      `STOPPED_EARLY`, or 1 if it has saved nothing since: another start would get no further. The
      other processes give 0, because they may see a shared folder late.

    Raises:
      SystemExit: If the script ends with another exit code than 0.
    """
    problem = ""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        usage = "python -m experiments.launch.run FOLDER MODULE [FLAGS...]"
        problem = f"FOLDER and MODULE come before all flags: {usage}"
    elif "--fresh" in arguments:
        problem = "--fresh: would begin anew at every restart; name another folder"
    if problem:
        print(f"run: {problem}", file=sys.stderr)
        return 2
    name, module, *flags = arguments
    folder = Path(name)
    before = last_saved(folder)
    sys.argv = [module, *flags, "--output", name]
    processes.on_leaving(lambda code: code or exit_code(folder, before))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    return exit_code(folder, before)


def exit_code(folder: Path, before: int) -> int:
    """Chooses the exit code of a run that has ended without an error, by its checkpoints."""
    config = folder / "config.toml"
    if not config.exists() or jax.process_index() > 0:
        return 0
    steps = tomllib.loads(config.read_text(encoding="utf-8"))["steps"]
    if (after := last_saved(folder)) >= steps:
        return 0
    if after > before:
        return STOPPED_EARLY
    print(f"run: {folder}: no checkpoint after step {before}, of {steps}", file=sys.stderr)
    return 1


def last_saved(folder: Path) -> int:
    """Finds the step of the last checkpoint of a run, 0 if there is none."""
    # One that is being written has a longer name.
    names = [path.name for path in folder.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
