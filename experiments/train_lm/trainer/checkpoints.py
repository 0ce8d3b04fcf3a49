"""Checkpoints of a run, by Orbax: asynchronous, sharded, verified when they are read.

A checkpoint holds the state, in the layout of the model and not of any schedule, and facts about
the run. Orbax writes it under another name first, so that one which was cut short is never taken
for a whole one. Orbax has no checksums of arrays; the digest of every leaf is among the facts, and
is computed again when the state is read.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ..flags import Refusal
from . import processes
from .state import State, digest

# Arrays are stored in parts, of at most and from so many bytes, as processes read whole parts.
_PART_BYTES, _SMALL_BYTES = 32 * 2**20, 2**20
# Seconds that a process waits for the others' part of a save.
_SAVE_TIMEOUT = 600
# Orbax logs a traceback in each of its threads; the error itself reaches us, and is one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
# And TensorStore reports reads and writes that end after the first one has failed to an event loop
# that Orbax has closed by then.
_report_unraisable = sys.unraisablehook


def _report_others(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _report_unraisable(unraisable)


sys.unraisablehook = _report_others
logging.getLogger("asyncio").addFilter(
    lambda record: "exception was never retrieved" not in record.getMessage()
)
Facts = dict[str, Any]


class SaveError(Exception):
    """A checkpoint could not be saved; the message names the path, the cause and the bytes."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint: the step after which it was saved, the state, the facts."""

    step: int
    state: State
    facts: Facts


class Checkpoints:
    """The checkpoints in a folder: the last ones, and the one with the lowest held-out loss."""

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None]):
        """Opens the folder, or makes it.

        Args:
          folder: Holds a folder for each checkpoint, named by its step.
          keep: How many of the last ones are kept.
          warn: Shows a line to the user.
        """
        self.folder = folder.absolute()
        self._keep = keep
        self._warn = warn
        self._saving: int | None = None
        self._num_bytes = 0
        self._screened: list[int] = []
        self._screen()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        def held_out_loss(metrics: Any) -> float:
            return metrics["held_out_loss"]

        best = BestN(get_metric_fn=lambda metrics: -held_out_loss(metrics), n=1)
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(self._keep), best]),
                best_fn=held_out_loss,
                best_mode="min",
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(timeout_secs=_SAVE_TIMEOUT),
            ),
        )

    @property
    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss."""
        return self._manager.best_step()

    def save(self, step: int, state: State, facts: Facts, *, held_out_loss: float | None) -> None:
        """Starts to save, after the save before has ended; training may go on at once.

        Raises:
          SaveError: If this save cannot begin, or the one before failed.
        """
        self.wait()
        facts = _seal({**facts, "step": step, "digest": digest(state)})
        parts = jax.tree_util.tree_map_with_path(_parts_of, state)
        self._saving = step
        self._num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        is_known = held_out_loss is not None and math.isfinite(held_out_loss)
        error: Exception | None = None
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, save_args=parts),
                    facts=ocp.args.JsonSave(facts),
                ),
                metrics={"held_out_loss": held_out_loss if is_known else math.inf},
                force=True,
            )
        except Exception as caught:  # noqa: BLE001  Orbax's are of many types
            error = caught
        self._settle(error)

    def wait(self) -> None:
        """Waits until the save under way has ended.

        Raises:
          SaveError: If it failed, in any process.
        """
        if self._saving is None:
            return
        error: Exception | None = None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as caught:  # noqa: BLE001  Orbax's are of many types
            error = caught
        self._settle(error)
        self._saving = None

    def check(self) -> None:
        """Looks whether the save under way has ended, without waiting.

        Where there are several processes they look together, in `wait`.

        Raises:
          SaveError: If it failed.
        """
        is_alone = jax.process_count() == 1
        if self._saving is not None and is_alone and not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, abstract: State) -> Restored | None:
        """Reads the newest checkpoint that is whole, each process its own shards of the state.

        One that cannot be read, or whose digest differs, is moved aside, and the one before it is
        tried. None if there is no checkpoint.

        Args:
          abstract: The state's shapes, dtypes and shardings, those of this run.

        Raises:
          Refusal: If there are checkpoints, but none that is whole; or if there is no room for the
            state, or no permission to read it.
        """
        steps = sorted([*self.steps, *self._screened])
        for step in reversed(self.steps):
            restored, problem = self._read(step, abstract)
            if restored is not None:
                return restored
            self._set_aside(step, problem)
            self._manager.reload()
        if steps:
            raise Refusal(
                f"{self.folder}: none of the checkpoints {steps} is whole; --fresh starts anew"
            )
        return None

    def close(self) -> None:
        """Waits for the save under way, and closes Orbax's threads.

        Raises:
          SaveError: If the save failed.
        """
        self.wait()
        self._manager.close()

    def _screen(self) -> None:
        """Moves checkpoints aside whose metrics are broken: Orbax would not open the folder."""
        broken = ""
        if processes.is_first() and self.folder.exists():
            names = [path.name for path in self.folder.iterdir() if path.name.isdecimal()]
            broken = " ".join(name for name in names if not self._has_metrics(name))
        self._screened = [int(name) for name in processes.first_of_all(broken).split()]
        for step in self._screened:
            self._set_aside(step, "its metrics are not those that were saved")

    def _has_metrics(self, name: str) -> bool:
        try:
            metrics = json.loads((self.folder / name / "metrics" / "metrics").read_text())
            return isinstance(metrics["held_out_loss"], float)
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def _read(self, step: int, abstract: State) -> tuple[Restored | None, str]:
        problem, obstacle, restored = "", "", None
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
                ),
            )
            _require_seal(restored["facts"])
        except Exception as error:  # noqa: BLE001  whatever a broken file brings about
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            obstacle = problem if _is_obstacle(error) else ""
        if obstacle := processes.first_of_all(obstacle):
            raise Refusal(f"{self.folder / str(step)}: cannot be read here: {obstacle}")
        # The digest is computed by all processes together.
        problem = processes.first_of_all(problem)
        if problem:
            return None, problem
        assert restored is not None
        state, facts = restored["state"], restored["facts"]
        if digest(state) != facts["digest"]:
            return None, "its arrays are not those that were saved"
        return Restored(step=facts["step"], state=state, facts=facts), ""

    def _set_aside(self, step: int, problem: str) -> None:
        target = self.folder.parent / "broken-checkpoints" / str(step)
        self._warn(f"checkpoint {step} is broken ({problem}); moved to {target}")
        if processes.is_first():
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        processes.wait_for_all(f"moved {step}")

    def _settle(self, error: Exception | None) -> None:
        """Raises the error of a save on all processes, with Orbax ready for the next save."""
        text = processes.first_of_all("" if error is None else self._describe(error))
        if not text:
            return
        step, self._saving = self._saving, None
        # Its threads keep the error for ever.
        self._manager = self._open()
        raise SaveError(f"step {step} cannot be saved: {text}") from error

    def _describe(self, error: Exception) -> str:
        causes = _causes(error)
        found = [cause for cause in causes if isinstance(cause, OSError)]
        text = " ".join(str(causes[-1]).split())
        why = (found[0].strerror if found else None) or text[:400]
        if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's, after long paths
            why = os.strerror(int(code[1]))
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as lost:
            return f"{self.folder}: {lost.strerror}"
        return f"{self.folder}: {why} (the state has {self._num_bytes:,} bytes; {free:,} are free)"


def _causes(error: BaseException | None) -> list[BaseException]:
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _parts_of(path: Any, leaf: jax.Array) -> ocp.SaveArgs:
    """Stores layers apart, so that a process reads its own layers, whatever the ranks are."""
    has_layers = any(getattr(key, "key", None) == "blocks" for key in path)
    axes = (0,) if has_layers and leaf.nbytes > _SMALL_BYTES else ()
    return ocp.SaveArgs(chunk_byte_size=_PART_BYTES, shard_axes=axes)


def _is_obstacle(error: Exception) -> bool:
    """Whether a checkpoint may be whole although it could not be read."""
    if isinstance(error, MemoryError | PermissionError):
        return True
    words = "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "bad_alloc", "Cannot allocate memory"
    return any(word in str(error) for word in words)


def _seal(facts: Facts) -> Facts:
    return {**facts, "sha256": _hash(facts)}


def _require_seal(facts: Facts) -> None:
    rest = {name: value for name, value in facts.items() if name != "sha256"}
    if facts.get("sha256") != _hash(rest):
        raise ValueError("its facts are not those that were saved")


def _hash(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
