"""The flags of a training run, from the command line or a file, and the settings made of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..flags import POSITIVE, Refusal, adding
from . import folder, processes
from .log import KINDS
from .profile import StepRange

_PATH = click.Path(path_type=Path)


class Kinds(click.ParamType):
    """Names from a list, separated by commas."""

    name = "names"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Shows the names as they are to be written."""
        return f"[{','.join(KINDS)}]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Reads the names, or refuses the flag."""
        if not isinstance(value, str):
            value = ",".join(map(str, value))
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        if unknown := [name for name in names if name not in KINDS]:
            self.fail(f"{', '.join(unknown)}: must be among {', '.join(KINDS)}", param, ctx)
        return names


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags that every training run has.

    Attributes: see the help text of each.
    """

    ranks: int | None
    data_devices: int
    fsdp_devices: int
    microbatches: int
    steps: int
    batch_size: int
    context: int
    learning_rate: float
    seed: int
    data_path: Path | None
    output: Path | None
    fresh: bool
    save_every: int
    keep: int
    on_save_error: str
    max_skips: int
    eval_every: int
    eval_batches: int
    log: tuple[str, ...]
    profile: str | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    heartbeat: int
    stopped_code: int

    @classmethod
    def take(cls, flags: dict[str, Any]) -> "Settings":
        """Takes them out of all flags of a command.

        Raises:
          Refusal: If they do not fit one another.
        """
        settings = cls(**{field.name: flags.pop(field.name) for field in dataclasses.fields(cls)})
        flags.pop("config")
        settings._require()
        return settings

    @property
    def batch_devices(self) -> int:
        """The devices over which the rows of a batch are spread, those of experts left out."""
        return self.data_devices * self.fsdp_devices

    def _require(self) -> None:
        given = [self.coordinator, self.num_processes, self.process_id]
        if any(value is not None for value in given):
            if any(value is None for value in given):
                raise Refusal("--coordinator, --num-processes, --process-id: give all or none")
            assert self.process_id is not None
            assert self.num_processes is not None
            assert self.coordinator is not None
            if self.process_id >= self.num_processes:
                raise Refusal(
                    f"--process-id {self.process_id}: must be below --num-processes "
                    f"{self.num_processes}"
                )
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise Refusal(f"--coordinator {self.coordinator}: must be HOST:PORT")
        if self.fresh and self.stopped_code:
            raise Refusal(
                f"--fresh: would begin anew at every restart, which --stopped-code "
                f"{self.stopped_code} asks for; leave one of them out"
            )
        if self.fresh and self.output is None:
            raise Refusal("--fresh: needs --output; without it every run has a new folder")
        if self.profile is not None and int(self.profile.partition(":")[0]) > self.steps:
            raise Refusal(f"--profile {self.profile}: begins after the last step, {self.steps}")


def training(*, default: str, results: str) -> Callable[..., Any]:
    """Adds the flags of a run: its folder, checkpoints, faults, logs, processes and devices.

    Args:
      default: The folder in which runs without `--output` have numbered folders.
      results: Files that the help text names.
    """
    return adding(
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=True,
            callback=_read_config,
            help="A TOML file of flags by their names; those on the command line override it.",
        ),
        click.option(
            "--output",
            type=click.Path(file_okay=False, path_type=Path),
            show_default=f"a new numbered folder in {default}",
            help=f"The folder of the run: {results}, checkpoints. A run that is there is resumed.",
        ),
        click.option(
            "--fresh",
            is_flag=True,
            help="Move a run in --output aside, and start anew; at each start, so do not give it "
            "again to resume.",
        ),
        click.option("--save-every", type=POSITIVE, default=50, help="Steps between checkpoints."),
        click.option(
            "--keep",
            type=POSITIVE,
            default=3,
            help="How many of the newest checkpoints are kept, beside the one with the lowest "
            "held-out loss.",
        ),
        click.option(
            "--on-save-error",
            type=click.Choice(["stop", "continue"]),
            default="stop",
            help="Whether a checkpoint that cannot be saved ends the run; the last always does.",
        ),
        click.option(
            "--max-skips",
            type=POSITIVE,
            default=10,
            help="How many updates in a row may be left out, because loss or gradients are not "
            "finite, before the run ends.",
        ),
        click.option(
            "--log",
            type=Kinds(),
            default=(),
            show_default="none",
            help="Logs beside log.csv, separated by commas.",
        ),
        click.option("--profile", type=StepRange(), help="First and last step of a profile."),
        click.option(
            "--data-devices",
            type=POSITIVE,
            default=1,
            help="Copies of the pipeline, over which the batch is spread.",
        ),
        click.option(
            "--fsdp-devices",
            type=POSITIVE,
            default=1,
            help="Copies of the pipeline, over which the batch is spread, and parameters and "
            "AdamW's moments too.",
        ),
        click.option(
            "--coordinator",
            metavar="HOST:PORT",
            help="Address of process 0, where JAX does not find the processes by itself.",
        ),
        click.option("--num-processes", type=POSITIVE, help="How many processes there are."),
        click.option("--process-id", type=click.IntRange(min=0), help="The number of this one."),
        click.option(
            "--heartbeat",
            type=click.IntRange(min=10),
            default=processes.HEARTBEAT_SECONDS,
            help="Seconds of silence after which a process counts as dead and all others end.",
        ),
        click.option(
            "--stopped-code",
            type=click.IntRange(0, 255),
            default=0,
            help="Exit code of a run that SIGTERM has stopped and that is saved: 75 has the "
            "launchers start it again.",
        ),
    )


def config_of(ctx: click.Context) -> folder.Config:
    """Makes the config of a command's flags."""
    values = {_flag(param): ctx.params.get(str(param.name)) for param in ctx.command.params}
    return folder.to_config(values)


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Makes the flags of a file the defaults of the others."""
    if path is None:
        return None
    names = {_flag(param): param for param in ctx.command.params}
    config = folder.read_config(path, flag="--config")
    config.pop(folder.TEXT, None)
    if unknown := sorted(config.keys() - names.keys()):
        raise Refusal(f"--config {path}: no such flags: {', '.join(unknown)}")
    for name, value in config.items():
        is_list = isinstance(value, list)
        if isinstance(value, dict) or (is_list and not _takes_lists(names[name])):
            raise Refusal(f"--config {path}: {name}: must be a single value; got {value!r}")
    # As text, as on the command line: click would cut 1.5 to an integer, and take true for 1.
    ctx.default_map = {
        str(names[name].name): value if isinstance(value, list) else str(value)
        for name, value in config.items()
    }
    return path


def _takes_lists(param: click.Parameter) -> bool:
    return param.multiple or isinstance(param.type, Kinds)


def _flag(param: click.Parameter) -> str:
    return max(param.opts, key=len).removeprefix("--")
