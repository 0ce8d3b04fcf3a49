"""A run from its flags to its end: processes, devices, folder, compiled step, restore, loop."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import dualpipe_jax as dpj

from .. import flags
from ..flags import Refusal
from . import data, folder, processes, progress, state
from .checkpoints import Checkpoints, SaveError
from .clock import Clock
from .devices import find_devices
from .flags import Settings
from .job import Job as Job
from .job import Outcome as Outcome
from .job import Place as Place
from .log import Log, NoLog, Row
from .loop import Loop, TooManySkipsError
from .mesh import PIPE, batch_axes
from .profile import Profile
from .signals import Requests
from .state import Figures, PyTree, State

COLUMNS = (
    "step",
    "train_loss",
    "held_out_loss",
    "held_out_perplexity",
    "learning_rate",
    "grad_norm",
    "skipped",
    "tokens_per_second",
    "mfu",
    "seconds",
)


def find_place(settings: Settings, *, count: int | None, flag: str, fake: int) -> Place:
    """Joins the other processes, finds devices and text.

    Args:
      settings: The flags.
      count: How many devices; None for all accelerators.
      flag: The flags that the user may lower to have fewer.
      fake: How many fake ones without an accelerator, if `count` is None.

    Raises:
      Refusal: If there is no such place.
    """
    num_processes = processes.start(
        settings.coordinator,
        settings.num_processes,
        settings.process_id,
        heartbeat=settings.heartbeat,
    )
    devices, which = find_devices(count, flag=flag, fake=fake, num_processes=num_processes)
    with processes.together():
        try:
            text = data.read(settings.data_path, min_length=settings.context + 1)
        except (OSError, ValueError) as error:
            raise Refusal(str(error)) from error
    first = processes.first_of_all(text.fingerprint if processes.is_first() else "")
    with processes.together():
        if text.fingerprint != first:
            raise Refusal("--data: has other files, or other sizes of files, than on process 0")
    return Place(console=processes.console(), devices=devices, which=which, text=text)


def make_schedule(
    name: str, settings: Settings, *, ranks: int, layers: int, **options: int
) -> dpj.Schedule:
    """Makes the schedule, each stage with a layer; `options` are those of `dpj.schedules.make`.

    Raises:
      Refusal: If there are too few layers, if no table holds so many ranks and microbatches, or if
        the schedule has no such option.
    """
    given = {"ranks": ranks, "microbatches": settings.microbatches}
    given |= {option.removeprefix("num_"): value for option, value in options.items()}
    with flags.refusing(", ".join(f"--{n.replace('_', '-')} {v}" for n, v in given.items())):
        plan = dpj.schedules.make(
            name, num_ranks=ranks, num_microbatches=settings.microbatches, **options
        )
    of = f"of {plan.name}"
    flags.refuse(flags.too_few_layers(layers, stages=plan.num_stages, ranks=ranks, of=of))
    return plan


def open_folder(
    settings: Settings, config: folder.Config, place: Place, *, default: str
) -> folder.Folder:
    """Opens the folder of the run; see `folder.open_folder`.

    Raises:
      Refusal: If it cannot be opened, or the run would read its own files as text.
    """
    output, text = settings.output or Path(default), settings.data_path
    if text is not None and output.resolve().is_relative_to(text.resolve()):
        raise Refusal(
            f"--output {output}: lies in --data {text}, so that the logs of runs would be text to "
            "learn; give a folder outside of it"
        )
    return folder.open_folder(
        settings.output,
        default=Path(default),
        fresh=settings.fresh,
        config={**config, folder.TEXT: place.text.fingerprint},
    )


@contextlib.contextmanager
def ending(run: folder.Folder, console: Console) -> Iterator[Requests]:
    """Ends the process as a user expects, whatever ends the run inside the `with`.

    Yields:
      Requests to stop, which `train` heeds.
    """
    requests = Requests(console.print)
    with processes.leaving(), _explaining(run, console), requests.heeded():
        yield requests


@contextlib.contextmanager
def _explaining(run: folder.Folder, console: Console) -> Iterator[None]:
    try:
        yield
    except (click.ClickException, SystemExit):
        raise
    except (TooManySkipsError, SaveError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        console.print(f"stopped; logs and checkpoints until then are in {run.path}")
        if jax.process_count() > 1:
            processes.leave(130)
        sys.exit(130)
    except Exception as error:
        if jax.process_count() > 1:
            processes.fail(error, folder=run.path)
        if isinstance(error, OSError) and error.filename and error.strerror:
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error
        raise


def train(
    job: Job,
    settings: Settings,
    place: Place,
    run: folder.Folder,
    config: folder.Config,
    *,
    requests: Requests,
    at_stop: Callable[[list[Row]], None],
    if_ended: Callable[[PyTree], None] = lambda params: None,
) -> Outcome:
    """Trains until the last step.

    Args:
      job: What is trained.
      settings: The flags.
      place: The devices and the text.
      run: The folder; a run in it goes on.
      config: The flags by their names, kept beside the checkpoints.
      requests: Asks the run to stop.
      at_stop: Is given the rows however the run stops, to draw them.
      if_ended: Is given the parameters of a run that has ended before.

    Returns:
      The outcome. A run that is asked to stop, or that has ended before, ends the process.

    Raises:
      Refusal: If there is no checkpoint that is whole.
      TooManySkipsError: If updates were not finite too often in a row.
      SaveError: If a checkpoint cannot be saved.
    """
    console, clock = place.console, Clock()
    checkpoints = Checkpoints(run.checkpoints, keep=settings.keep, warn=console.print)
    config = {**config, folder.TEXT: place.text.fingerprint}
    _announce(run, checkpoints, config, console)
    if processes.is_first():
        processes.forget_failures(run.path)
    batches, held_out = _read(job, settings, place.text)
    plan = _plan(job, settings)
    with clock.phase("restoring"):
        restored = checkpoints.restore(plan.abstract)
    start = 0 if restored is None else restored.step
    if start >= settings.steps:
        checkpoints.close()
        console.print(
            f"ended     {run.path}: after {start} steps; a larger --steps goes on, --fresh starts "
            "anew"
        )
        assert restored is not None
        if_ended(restored.state.params)
        sys.exit(0)
    if processes.is_first():
        run.write_config(config)
    with clock.phase("compiling"), console.status("compiling"):
        first = plan.init() if restored is None else restored.state
    with jax.set_mesh(job.mesh):
        with clock.phase("compiling"), console.status("compiling"):
            compiled = plan.compile(held_out[0])
        console.print(
            f"model     {plan.num_params:,} parameters, {job.describe}\n"
            f"compiled  in {clock.seconds['compiling']:.0f} s"
        )
        if restored is not None:
            batches.move_to(restored.facts["data"])
            console.print(f"resumed   after step {start}, from {checkpoints.folder / str(start)}")
        last_row = start if restored else -1
        with contextlib.closing(_open_log(run, job, settings, last_row, console.print)) as log:
            loop = Loop(
                settings=settings,
                requests=requests,
                step=compiled.step,
                held_out_loss=functools.partial(_mean_loss, compiled.evaluate, held_out),
                batches=batches,
                to_row=job.to_row,
                facts={"config": config},
                checkpoints=checkpoints,
                log=log,
                clock=clock,
                console=console,
                speed=_speed(job, settings),
                profile=Profile(settings.profile, run.path),
                unit=place.text.unit,
            )
            with _drawing(log, at_stop, console):
                last, index, asked = loop.run(first, start=start)
        best = checkpoints.best_step
        checkpoints.close()
    console.print(f"goodput   {clock.goodput()}")
    if asked is not None:
        console.print(
            f"stopped   by {signal.Signals(asked).name} after step {index}, which is saved; "
            f"--output {run.path} goes on"
        )
        # A shell's code for Ctrl-C, or whichever the scheduler takes for a run to start again.
        sys.exit(130 if asked == signal.SIGINT else settings.stopped_code)
    if best is not None:
        console.print(f"best      step {best}: {checkpoints.folder / str(best)}")
    return Outcome(params=last.params, rows=log.rows)


def _read(job: Job, settings: Settings, text: data.Text) -> tuple[data.Batches, list[jax.Array]]:
    """Opens the batches to train on, and reads those held out, sharded over the mesh."""
    windows: Any = {
        "batch_size": settings.batch_size,
        "context": settings.context,
        "sharding": NamedSharding(job.mesh, PartitionSpec(batch_axes(job.mesh) or None)),
    }
    batches = data.Batches(text.train, seed=settings.seed, **windows)
    return batches, data.spread(text.held_out, num_batches=settings.eval_batches, **windows)


def _mean_loss(
    evaluate: Callable[[PyTree, jax.Array], jax.Array], batches: list[jax.Array], now: State
) -> float:
    return float(np.mean([float(evaluate(now.params, batch)) for batch in batches]))


@contextlib.contextmanager
def _drawing(log: Log, at_stop: Callable[[list[Row]], None], console: Console) -> Iterator[None]:
    """Draws the rows when the `with` ends, however it ends."""
    try:
        yield
    finally:
        if processes.is_first() and log.rows:
            # A picture that does not fit the disk must not hide why the run has ended.
            try:
                at_stop(log.rows)
            except OSError as error:
                console.print(f"not drawn: {error}")


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    """The programs of a run."""

    step: Callable[[State, jax.Array], tuple[State, Figures]]
    evaluate: Callable[[PyTree, jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A run's state without arrays, and how its programs are compiled."""

    abstract: State
    num_params: int
    init: Callable[[], State]
    compile: Callable[[jax.Array], _Compiled]


def _plan(job: Job, settings: Settings) -> _Plan:
    """Finds the shapes and shardings of the state; compiles nothing yet."""
    optimizer, learning_rates = state.make_optimizer(
        learning_rate=settings.learning_rate, steps=settings.steps, is_decayed=job.is_decayed
    )
    optimizer = state.skipping(optimizer)
    make_state = state.make_init(job.init, optimizer)
    key = jax.random.key(settings.seed)
    shapes = jax.eval_shape(make_state, key)
    shardings = dpj.shardings(shapes, mesh=job.mesh, axis=PIPE, param_specs=job.param_specs)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
    step = state.make_step(job.grad_fn, optimizer, learning_rates, after_update=job.after_update)
    everywhere = NamedSharding(job.mesh, PartitionSpec())

    def compile_for(batch: jax.Array) -> _Compiled:
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
        evaluate = jax.jit(job.held_out_loss, out_shardings=everywhere)
        return _Compiled(
            step=functools.partial(
                jitted.lower(abstract, batch, **job.frozen).compile(), **job.frozen
            ),
            evaluate=functools.partial(
                evaluate.lower(abstract.params, batch, **job.frozen).compile(), **job.frozen
            ),
        )

    def init() -> State:
        jitted = jax.jit(make_state, out_shardings=shardings, donate_argnames="params")
        return jitted(key) if job.load is None else jitted(key, params=job.load(abstract.params))

    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    return _Plan(
        abstract=abstract,
        num_params=num_params,
        init=init,
        compile=compile_for,
    )


def _speed(job: Job, settings: Settings) -> progress.Speed:
    """Gives the figures of a step's speed."""
    tokens = settings.batch_size * settings.context
    return progress.Speed(
        tokens=tokens,
        devices=list(job.mesh.devices.flat),
        flops=job.flops_per_token * tokens,
        peak=progress.peak_of(job.mesh.devices.flat[0]),
    )


def _announce(
    run: folder.Folder, checkpoints: Checkpoints, config: folder.Config, console: Console
) -> None:
    """Says whether a run begins or goes on, and which flags have changed since."""
    steps = checkpoints.steps
    if run.earlier is None and steps:
        raise Refusal(
            f"--output {run.path}: has checkpoints, but no {folder.CONFIG}; put it back, or give "
            "--fresh to start anew"
        )
    found = ""
    if run.earlier is not None:
        found = ", goes on" if steps else ", begins again: it has no checkpoint"
        for line in folder.changes(run.earlier, config):
            note = " (the decay of the learning rate changes with it)" if "--steps:" in line else ""
            found += f"\nchanged   {line}{note}"
    console.print(f"run       {run.path}{found}")


def _open_log(
    run: folder.Folder, job: Job, settings: Settings, step: int, warn: Callable[[str], None]
) -> Log:
    """Opens the log on process 0; refused on all processes if it cannot be written."""
    log: Log = NoLog()
    with processes.together():
        if processes.is_first():
            try:
                columns = [*COLUMNS[:-1], *job.columns, COLUMNS[-1]]
                log = Log(run.path, columns, step=step, kinds=settings.log, warn=warn)
            except OSError as error:
                raise Refusal(f"{run.path}: {error.strerror}") from error
    return log
