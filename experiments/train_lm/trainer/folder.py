"""The folder of a run, and the flags that it was started with.

`config.toml` has every flag that has a value, under its name, and can be given to `--config`.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from ..flags import Refusal
from . import processes

CONFIG, CHECKPOINTS = "config.toml", "checkpoints"
# The config's key for the text, which is no flag.
TEXT = "text"
# The flags that tell one process or start from another; they are no part of the run.
_NOT_KEPT = {
    "stopped-code",
    "coordinator",
    "num-processes",
    "process-id",
    "output",
    "config",
    "fresh",
}
# The flags that may differ when a run goes on; all others change its results.
_FREE = {
    "steps",
    "ranks",
    "schedule",
    "stages-per-rank",
    "layers-per-stage",
    "microbatches",
    "data-devices",
    "fsdp-devices",
    "expert-devices",
    "heartbeat",
    "save-every",
    "keep",
    "on-save-error",
    "max-skips",
    "eval-every",
    "log",
    "profile",
    "data",  # its text is compared instead
    "prompt",
    "preflight",
}
Config = dict[str, Any]


class Folder:
    """The folder of a run.

    Attributes:
      path: The folder.
      earlier: The config of the run that is in it; None for a new run.
    """

    def __init__(self, path: Path, earlier: Config | None):
        self.path = path
        self.earlier = earlier

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def write_config(self, config: Config) -> None:
        """Writes the flags of this start."""
        part = self.path / f"{CONFIG}.part"
        part.write_text(tomli_w.dumps(config), encoding="utf-8")
        part.replace(self.path / CONFIG)


def open_folder(output: Path | None, *, default: Path, fresh: bool, config: Config) -> Folder:
    """Finds or makes the folder of the run, the same in all processes.

    Args:
      output: The folder that the user has named; a run in it goes on.
      default: Where a new numbered folder is made if the user has named none.
      fresh: Whether a run in the folder is moved away, to begin anew.
      config: The flags of this start.

    Raises:
      Refusal: If the folder cannot be written, or a run in it was started with other flags.
    """
    with processes.together():
        path = output
        if processes.is_first():
            path = _prepare(output, default, fresh=fresh)
    path = Path(processes.first_of_all(str(path) if processes.is_first() else ""))
    with processes.together():
        config_path = path / CONFIG
        earlier = read_config(config_path, flag="--output") if config_path.exists() else None
        if earlier is not None:
            _require_same(earlier, config, path)
    processes.wait_for_all("folder")
    return Folder(path, earlier)


def read_config(path: Path, *, flag: str) -> Config:
    """Reads a file of flags, which this flag names.

    Raises:
      Refusal: If it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{flag}: {path}: {' '.join(str(error).split())}") from error


def changes(earlier: Config, config: Config) -> list[str]:
    """Says which flags differ, as lines that name both values."""
    names = sorted(earlier.keys() | config.keys())
    return [
        f"{_name(name)}: {_show(earlier.get(name))} -> {_show(config.get(name))}"
        for name in names
        if earlier.get(name) != config.get(name)
    ]


def _prepare(output: Path | None, default: Path, *, fresh: bool) -> Path:
    try:
        if output is None:
            return _make_numbered(default)
        if fresh and any((output / name).exists() for name in (CONFIG, CHECKPOINTS)):
            # Where links lead: a link that is moved would leave the new run on another disk.
            output = output.resolve()
            output.rename(_free_name(output))
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{CONFIG}.part").touch()
    except OSError as error:
        raise Refusal(f"--output {output or default}: {error.strerror}") from error
    return output


def _make_numbered(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    number = max(numbers, default=0) + 1
    while True:  # ends at the first number that no other run takes meanwhile
        path = parent / f"{number:04d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _free_name(output: Path) -> Path:
    number = 1
    while (path := output.with_name(f"{output.name}.{number}")).exists():
        number += 1
    return path


def _require_same(earlier: Config, config: Config, path: Path) -> None:
    binding = ({k: v for k, v in c.items() if k not in _FREE} for c in (earlier, config))
    different = changes(*binding)
    if different:
        raise Refusal(
            f"--output {path}: the run there was started otherwise ({'; '.join(different)}); "
            "give the same flags to go on, another --output, or --fresh to start anew"
        )


def _name(name: str) -> str:
    return "text (digest of its files' names and sizes)" if name == TEXT else f"--{name}"


def _show(value: Any) -> str:
    return "not given" if value is None else str(value)


def to_config(flags: Mapping[str, Any]) -> Config:
    """Makes the config of a run's flags by their names: those that have a value, as TOML has it."""
    return {
        name: _plain(value)
        for name, value in flags.items()
        if name not in _NOT_KEPT and value is not None and value != ()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
