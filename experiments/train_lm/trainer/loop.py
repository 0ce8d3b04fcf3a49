"""The loop of a run: batch, step, figures, held-out loss, checkpoint, until it ends or is asked to.

The next step is dispatched before the figures of the last one are read, so that devices do not wait
for the host.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from . import progress
from .checkpoints import Checkpoints, SaveError
from .clock import STEPS, Clock
from .data import Batches
from .flags import Settings
from .log import Log, Row, perplexity
from .profile import Profile
from .signals import Requests
from .state import Figures, State


class TooManySkipsError(Exception):
    """Updates were not finite too often in a row; the message names the step."""


@dataclass(kw_only=True)
class Loop:
    """Takes the steps of a run.

    Attributes:
      settings: The flags.
      requests: Asks the run to stop.
      step: The compiled step.
      held_out_loss: Of the state.
      batches: Where the run goes on.
      to_row: Makes an experiment's own columns of its figures.
      facts: Of the run, for its checkpoints; the position in the data is added.
      unit: The name of an entry of a window.
    """

    settings: Settings
    requests: Requests
    step: Callable[[State, jax.Array], tuple[State, Figures]]
    held_out_loss: Callable[[State], float]
    batches: Batches
    to_row: Callable[[Figures], Row]
    facts: dict[str, Any]
    checkpoints: Checkpoints
    log: Log
    clock: Clock
    console: Console
    speed: progress.Speed
    profile: Profile
    unit: str = "byte"
    _pending: tuple[int, Figures, float] | None = None  # with the time when it was dispatched
    _skipped_in_a_row: int = 0  # as far as figures have been read
    _done: float = 0.0  # when the last step was done
    _start: float = field(default_factory=time.perf_counter)

    def run(self, state: State, *, start: int) -> tuple[State, int, Any]:
        """Takes the steps after `start`.

        Args:
          state: The state after step `start`; its buffers are overwritten.
          start: Steps taken so far.

        Returns:
          The state, the last step, and the signal that ended the run; None if it is complete.

        Raises:
          TooManySkipsError: If updates were not finite too often in a row; the state is saved.
          SaveError: If a checkpoint cannot be saved, and that ends the run.
        """
        taken = self.log.rows[-1]["seconds"] if self.log.rows else 0.0
        self._start = time.perf_counter() - taken
        self._skipped_in_a_row = int(state.opt_state.notfinite_count)
        with progress.bar(self.console) as bar, self.profile:
            task = bar.add_task(
                "train", total=self.settings.steps, completed=start, **progress.fields()
            )
            show = _Shown(bar, task)
            if start == 0:
                self._log({"step": 0}, held_out=self._evaluate(state, 0, bar))
            for index in range(start + 1, self.settings.steps + 1):
                with self.clock.phase("data"):
                    batch = next(self.batches)
                if self.profile.starts_at(index):
                    self._finish(show)
                self.profile.before(index)
                dispatched = time.perf_counter()
                with self.clock.phase(STEPS):
                    state, figures = self.step(state, batch)
                self._finish(show)
                self._pending = (index, figures, dispatched)
                is_last = index == self.settings.steps
                asked = self.requests.after(index)
                is_evaluated = is_last or index % self.settings.eval_every == 0
                is_saved = is_last or asked is not None or index % self.settings.save_every == 0
                # One skip from the end, this step's figures are read before the next is dispatched.
                may_end = self._skipped_in_a_row >= self.settings.max_skips - 1
                if not (is_evaluated or is_saved or may_end or self.profile.ends_at(index)):
                    self._allowing_failure(self.checkpoints.check)
                    continue
                with self.clock.phase(STEPS):
                    jax.block_until_ready(state.step)
                done = time.perf_counter()
                loss = self._evaluate(state, index, bar) if is_evaluated else None
                self._finish(show, held_out=loss, done=done)
                self.profile.after(index)
                is_bad = self._skipped_in_a_row >= self.settings.max_skips
                if is_saved or is_bad:
                    self._save(index, state, loss, is_final=is_last or is_bad or asked is not None)
                if is_bad:
                    raise TooManySkipsError(
                        f"loss or gradients are not finite, {self._skipped_in_a_row} steps in a "
                        f"row until step {index}; the parameters are those before these steps, "
                        f"saved as step {index}. A larger --max-skips goes on; --fresh with a "
                        "lower --learning-rate starts anew"
                    )
                if asked is not None:
                    return state, index, asked
        return state, self.settings.steps, None

    def _finish(
        self, show: "_Shown", *, held_out: float | None = None, done: float | None = None
    ) -> None:
        """Waits for the pending step, if it is not known when it was done, and logs its figures."""
        if self._pending is None:
            return
        index, figures, dispatched = self._pending
        self._pending = None
        with self.clock.phase(STEPS):
            figures = jax.device_get(figures)
        done = time.perf_counter() if done is None else done
        # Devices begin a step when it is dispatched, or else when they are done with the last one.
        seconds = done - max(dispatched, self._done)
        self._done = done
        with self.clock.phase("logging"):
            loss = float(figures["loss"])
            self._skipped_in_a_row = int(figures["skipped_in_a_row"])
            if self._skipped_in_a_row:
                show.say(
                    f"step {index}: the loss or a gradient is not finite (loss {loss:g}); the "
                    f"update is left out, {self._skipped_in_a_row} in a row, "
                    f"{int(figures['skipped'])} in all"
                )
            row = {
                "step": index,
                "train_loss": loss,
                "learning_rate": float(figures["learning_rate"]),
                "grad_norm": float(figures["grad_norm"]),
                "skipped": int(figures["skipped"]),
                "tokens_per_second": self.speed.tokens / seconds,
                "mfu": self.speed.mfu(seconds),
                **self.to_row(figures),
            }
            self._log(row, held_out=held_out)
            show.update(index, loss=loss, speed=self.speed, seconds=seconds)

    def _log(self, row: Row, *, held_out: float | None) -> None:
        if held_out is not None:
            row |= {"held_out_loss": held_out, "held_out_perplexity": perplexity(held_out)}
        self.log.add(row | {"seconds": time.perf_counter() - self._start})

    def _evaluate(self, state: State, index: int, bar: Progress) -> float:
        with self.clock.phase("evaluating"):
            loss = self.held_out_loss(state)
        bar.console.print(
            f"step {index:>{len(str(self.settings.steps))}}  held-out loss {loss:.3f} nats a "
            f"{self.unit}"
            f"  perplexity {perplexity(loss):.2f}  {time.perf_counter() - self._start:6.1f} s"
        )
        return loss

    def _save(self, index: int, state: State, loss: float | None, *, is_final: bool) -> None:
        with self.clock.phase("saving"):
            self._allowing_failure(self.checkpoints.wait)  # for the save before
            facts = {**self.facts, "data": self.batches.position}

            def save() -> None:
                self.checkpoints.save(index, state, facts, held_out_loss=loss)
                if is_final:
                    self.checkpoints.wait()

            # Training does not go on after the final one.
            if is_final:
                save()
            else:
                self._allowing_failure(save)

    def _allowing_failure(self, save: Callable[[], None]) -> None:
        try:
            save()
        except SaveError as error:
            if self.settings.on_save_error == "stop":
                raise
            self.console.print(f"{error}; training goes on (--on-save-error continue)")


class _Shown:
    """The bar of a run, updated at most a few times a second."""

    def __init__(self, bar: Progress, task: Any):
        self._bar, self._task = bar, task
        self._last = 0.0

    def update(self, index: int, *, loss: float, speed: progress.Speed, seconds: float) -> None:
        now = time.perf_counter()
        if now - self._last < 0.5 and index != self._bar.tasks[0].total:
            return
        self._last = now
        self._bar.update(
            self._task,
            completed=index,
            **progress.fields(
                loss=f"{loss:.3f}",
                speed=speed.describe(seconds),
                memory=progress.memory_in_use(speed.devices),
            ),
        )

    def say(self, text: str) -> None:
        self._bar.console.print(text)
