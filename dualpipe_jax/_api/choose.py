"""`choose`: a model's shapes -> the schedules in order of the predicted step, as memory allows."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from dualpipe_jax import schedules as _schedules
from dualpipe_jax._api.build import Axes, checked
from dualpipe_jax._api.shardings import shardings
from dualpipe_jax._api.value_and_grad import value_and_grad
from dualpipe_jax._errors import raise_all, show
from dualpipe_jax._executor import Step, Work
from dualpipe_jax._model.types import AxisNames, Mesh, Model, PyTree
from dualpipe_jax._predict import (
    FULL_BACKWARD,
    HEADROOM,
    TRANSFER,
    Candidate,
    Choice,
    Costs,
    MemoryTerm,
    choices_of,
    in_order,
    usual_costs,
)
from dualpipe_jax._predict.costs import as_number
from dualpipe_jax._predict.memory import format_bytes, parse_bytes
from dualpipe_jax._schedule.execution import Execution

_REMATS = ("none", "block")


class Choices(tuple[Choice, ...]):
    """Choices in order: those that fit, the fastest first; then tight ones; then all others.

    `print` shows them, with the memory of the first one and the call that makes it. `left_out` says
    which schedules cannot run, by name, and why.
    """

    left_out: dict[str, str]

    def __str__(self) -> str:
        """Shows a row for each choice."""
        best = self[0].simulation.makespan
        head = ("", "schedule", "remat", "step", "", "idle", "memory", "execution", "why")
        rows = [
            (
                str(place) if choice.fits else "tight" if choice.is_tight else "-",
                choice.schedule,
                _show_remat(choice.remat),
                f"{choice.simulation.makespan:.4g}",
                f"{choice.simulation.makespan / best - 1:+.1%}",
                f"{choice.simulation.idle_share:.1%}",
                format_bytes(choice.num_bytes),
                str(choice.execution),
                choice.why,
            )
            for place, choice in enumerate(self, start=1)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if index in (0, 1, 2, 7, 8) else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        width = max(len(term.name) for term in self[0].terms)
        terms = [
            f"  {term.name:{width}}  {format_bytes(term.num_bytes):>8}  {term.why}".rstrip()
            for term in self[0].terms
        ]
        arguments = (
            f"{name}={'dpj.' * isinstance(value, Execution | Costs)}{value!r}"
            for name, value in self[0].arguments.items()
        )
        number = self[0].simulation.num_microbatches
        call = ", ".join(("model", "mesh=mesh", f"num_microbatches={number}", *arguments))
        left_out = [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(
            (
                *lines,
                *left_out,
                "",
                "memory of the first:",
                *terms,
                "",
                f"dpj.value_and_grad({call})",
            )
        )


def choose(
    model: Model,
    params: PyTree,
    batch: PyTree,
    *,
    mesh: Mesh,
    num_microbatches: int,
    memory: float | str = math.inf,
    headroom: float = HEADROOM,
    optimizer: Any = None,
    schedules: str | _schedules.Schedule | Iterable[str | _schedules.Schedule] | None = None,
    remat: Sequence[Any] = _REMATS,
    costs: Costs | None = None,
    axis: str = "pipe",
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    layers_per_stage: Sequence[int] | None = None,
    trainable: Any = True,
    rng: Any = None,
) -> Choices:
    """Ranks schedules for a model by the predicted step, within a memory limit; nothing runs.

    The time of a step is replayed from the schedule's tables, as by `simulate`, with a transfer of
    a tenth of the forward. The memory is that of `value_and_grad(...).memory(...)`, with the
    parameters, the batch and the optimizer's state as they lie on a device.

    >>> import jax, jax.numpy as jnp, dualpipe_jax as dpj
    >>> model = dpj.Model(
    ...     embed=lambda ends, ctx: ctx.microbatch,
    ...     block=lambda params, x, ctx: x + jnp.tanh(x @ params["up"]) @ params["down"],
    ...     head=lambda ends, x, ctx: jnp.square(x).mean(),
    ... )
    >>> blocks = {"up": jax.ShapeDtypeStruct((8, 64, 256), "float32")}
    >>> blocks["down"] = jax.ShapeDtypeStruct((8, 256, 64), "float32")
    >>> where = dict(mesh=jax.sharding.AbstractMesh((4,), ("pipe",)), num_microbatches=16)
    >>> params, batch = {"ends": (), "blocks": blocks}, jax.ShapeDtypeStruct((512, 64), "float32")
    >>> choices = dpj.choose(model, params, batch, **where, memory="2MiB")
    >>> choices[0].schedule, choices[0].fits
    ('dualpipev', True)
    >>> grad_fn = dpj.value_and_grad(model, **where, **choices[0].arguments)

    Args:
      model: The model.
      params: Its parameters: arrays, or `jax.ShapeDtypeStruct`s.
      batch: A batch, the same.
      mesh: As for `value_and_grad`; an AbstractMesh will do.
      num_microbatches: As there.
      memory: Bytes of a device, or a text such as `"80GiB"`.
      headroom: The share of it that is left to the compiler's own temporaries.
      optimizer: An optax transformation, whose state counts as it lies by `shardings`.
      schedules: A name or a Schedule, or several; None for all names.
      remat: What to try as `value_and_grad(remat=)`.
      costs: How long actions take, with a single remat; None for the FLOPs of the model's
        contractions, in those of the forward of a rank's layers.
      axis: As for `value_and_grad`.
      batch_axes: As there.
      manual_axes: As there.
      param_specs: As there.
      layers_per_stage: As there, for schedules that have as many stages.
      trainable: As there.
      rng: A key, if the model draws random numbers.

    Returns:
      Choices in order. Each has `simulation` (the predicted step is its `makespan`), `terms` of
      memory that add up to `num_bytes`, `fits`, `why`, and the `arguments` to pass on.

    Raises:
      ValueError: If an argument has a bad value, or no schedule can run.
      TypeError: If it has a wrong type.
    """
    limit = _bytes_of(memory)
    if not 0 <= as_number("headroom", headroom) < 1:
        raise ValueError(f"headroom={headroom!r}: must be a share, at least 0 and less than 1")
    remats = _listed("remat", remat, 'of "none", "block" and policies')
    named = _schedules.names() if schedules is None else schedules
    named = _listed("schedules", named, "of names and Schedules, or None")
    raise_all(
        "schedules: must be names, or Schedules",
        (show(each) for each in named if not isinstance(each, str | _schedules.Schedule)),
        error=TypeError,
    )
    if not isinstance(costs, Costs | None):
        raise TypeError(f"costs={repr(costs)[:80]}: must be a dualpipe_jax.Costs, or None")
    if optimizer is not None and not callable(getattr(optimizer, "init", None)):
        raise TypeError(
            f"optimizer={repr(optimizer)[:80]}: must be an optax transformation, or None"
        )
    if costs is not None and len(remats) != 1:
        raise ValueError(f"costs: must come with the one remat that they are of, not {remat!r}")
    axes = checked(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
    )
    given = _Given(
        model=model,
        params=params,
        batch=batch,
        rng=rng,
        num_microbatches=num_microbatches,
        axes=axes,
        options={
            "param_specs": param_specs,
            "layers_per_stage": layers_per_stage,
            "trainable": trainable,
        },
    )
    choices: list[Choice] = []
    refusals: dict[str, ValueError] = {}
    for each in remats:
        found = given.choices(
            named,
            remat=each,
            costs=costs,
            optimizer=optimizer,
            limit=limit,
            headroom=headroom,
            refusals=refusals,
        )
        choices += found
    if not choices:
        raise next(iter(refusals.values()), ValueError("schedules=(): must name one at least"))
    ordered = Choices(in_order(choices))
    ordered.left_out = {name: " ".join(str(e).split()) for name, e in refusals.items()}
    return ordered


@dataclass(frozen=True, kw_only=True)
class _Given:
    """All that the steps which are compared have in common."""

    model: Model
    params: PyTree
    batch: PyTree
    rng: Any
    num_microbatches: int
    axes: Axes
    options: dict[str, Any]

    def choices(
        self,
        schedules: Sequence[str | _schedules.Schedule],
        *,
        remat: Any,
        costs: Costs | None,
        optimizer: Any,
        limit: float,
        headroom: float,
        refusals: dict[str, ValueError],
    ) -> list[Choice]:
        """Looks at schedules with a remat; those that cannot run go to `refusals`."""
        recomputes, traces = remat != "none", {}
        outside, choices = self.terms_outside(optimizer), []

        def terms_of(step: Step) -> tuple[MemoryTerm, ...]:
            report = self._look(step.memory, traces)
            return (*outside, *(MemoryTerm(t.name, t.num_bytes, t.count) for t in report.fullest))

        for each in schedules:
            try:
                schedule = self.schedule(each)
                step_of = partial(self.step, schedule=schedule, remat=remat)
                step = step_of()
                if costs is None:
                    costs = self.costs(step, traces, recomputes=recomputes)
                candidate = Candidate(
                    schedule=schedule,
                    num_layers=step.num_layers,
                    layers_per_stage=step.layers_per_stage,
                    remat=remat,
                    costs=costs,
                    transfer=TRANSFER * costs.forward,
                )
                choices += choices_of(
                    candidate,
                    terms_of=lambda _, execution, step_of=step_of, costs=costs: terms_of(
                        step_of(execution=execution, costs=costs)
                    ),
                    limit=limit,
                    headroom=headroom,
                )
            except ValueError as error:
                refusals[each if isinstance(each, str) else each.name] = error
        return choices

    def schedule(self, schedule: str | _schedules.Schedule) -> _schedules.Schedule:
        """Makes a schedule of a name."""
        if not isinstance(schedule, str):
            return schedule
        num_ranks = self.axes.mesh.shape[self.axes.axis]
        return _schedules.make(
            schedule, num_ranks=num_ranks, num_microbatches=self.num_microbatches
        )

    def step(self, **more: Any) -> Step:
        """Makes a step, and checks its arguments."""
        options = {**vars(self.axes), **self.options, **more}
        grad_fn = value_and_grad(self.model, num_microbatches=self.num_microbatches, **options)
        return self._look(grad_fn.build.traced)

    def _look(self, function: Callable[..., Any], *more: Any) -> Any:
        """Calls a function with the shapes of the arguments, as they lie."""
        found = []

        def look(params: PyTree, batch: PyTree, rng: Any) -> None:
            found.append(function(params, batch, rng, *more))

        jax.eval_shape(look, self.params, self.batch, self.rng)
        return found[0]

    def costs(self, step: Step, traces: dict[bool, Any], *, recomputes: bool) -> Costs:
        """Counts FLOPs, in those of the forward of a rank's layers."""
        work: Work = self._look(step.work, traces, recomputes)
        if not work.forward:
            return usual_costs(recomputes=recomputes)  # of a model without contractions
        num_ranks = self.axes.mesh.shape[self.axes.axis]
        input_grad, weight_grad = work.input_grad / work.forward, work.weight_grad / work.forward
        return Costs.with_whole_ends(
            forward=1.0,
            input_grad=input_grad,
            weight_grad=weight_grad,
            embed=num_ranks * work.embed / work.forward,
            head=num_ranks * work.head / work.forward,
            recompute=max(0.0, work.deferred / work.forward - weight_grad),
            full_backward=FULL_BACKWARD * (input_grad + weight_grad),
        )

    def terms_outside(self, optimizer: Any) -> tuple[MemoryTerm, ...]:
        """Lists the arguments of a training step, as they lie on a device."""
        laid = {
            "mesh": self.axes.mesh,
            "axis": self.axes.axis,
            "param_specs": self.options["param_specs"],
        }

        def num_bytes(tree: PyTree) -> int:
            leaves, places = jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, **laid))
            return sum(
                math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf, place in zip(leaves, places, strict=True)
            )

        params, batch = jax.eval_shape(lambda *trees: trees, self.params, self.batch)
        terms = [MemoryTerm("parameters", num_bytes(params), "")]
        if optimizer is not None:
            terms.append(
                MemoryTerm("optimizer", num_bytes(jax.eval_shape(optimizer.init, params)), "")
            )
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
        return (*terms, MemoryTerm("batch", size / self.axes.num_shards, ""))


def _show_remat(remat: Any) -> str:
    return remat if isinstance(remat, str) else getattr(remat, "__name__", "policy")


def _listed(argument: str, value: Any, of: str) -> tuple[Any, ...]:
    """Makes a tuple of one thing, or of several."""
    if isinstance(value, str | _schedules.Schedule) or callable(value):
        return (value,)
    if not isinstance(value, Iterable):
        raise TypeError(f"{argument}={repr(value)[:80]}: must be a sequence {of}")
    return tuple(value)


def _bytes_of(memory: float | str) -> float:
    if memory == math.inf:
        return math.inf
    try:
        return parse_bytes(memory)
    except ValueError as error:
        raise ValueError(f"memory={memory!r}: {error}") from error
