"""`choose`: from a model's shapes to its schedules, ranked by predicted step time and memory."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Protocol

import jax

from dualpipe_jax._api.build import StepAxes, check_axes, check_remat
from dualpipe_jax._api.choices import Choices
from dualpipe_jax._api.shardings import shardings
from dualpipe_jax._api.value_and_grad import value_and_grad
from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._executor import Step, Work
from dualpipe_jax._model import call_checks
from dualpipe_jax._model.types import (
    AxisNames,
    Batch,
    Mesh,
    Model,
    Params,
    ParamsMask,
    PyTree,
    Remat,
)
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
from dualpipe_jax._predict.memory import parse_bytes
from dualpipe_jax.schedules import Schedule, make, names

_REMATS = ("none", "block")


class Optimizer(Protocol):
    """Describes an optax transformation, of which `init` alone is used."""

    @property
    def init(self) -> Callable[[Params], PyTree]:
        """Makes the state for parameters."""
        ...


def choose(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    mesh: Mesh,
    num_microbatches: int,
    memory: float | str = math.inf,
    headroom: float = HEADROOM,
    optimizer: Optimizer | None = None,
    schedules: str | Schedule | Iterable[str | Schedule] | None = None,
    remat: Remat | Sequence[Remat] = _REMATS,
    costs: Costs | None = None,
    axis: str = "pipe",
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    layers_per_stage: Sequence[int] | None = None,
    trainable: ParamsMask = True,
    rng: jax.Array | None = None,
) -> Choices:
    """Ranks schedules for a model by the predicted time of a step, within a memory limit.

    Nothing runs. The time of a step is simulated from the schedule's tables, as by `simulate`; a
    transfer takes a tenth of the forward. The memory is that of `value_and_grad(...).memory(...)`,
    with a device's shards of the parameters, the batch and the optimizer's state.

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
      batch: A batch: arrays, or `jax.ShapeDtypeStruct`s, `[B, ...]`.
      mesh: As for `value_and_grad`; an AbstractMesh will do.
      num_microbatches: As there.
      memory: The bytes of a device, or a text such as `"80GiB"`.
      headroom: The share of the memory that is left to the compiler's own temporaries, from 0 to 1.
      optimizer: An optax transformation, whose state counts as sharded by `shardings`.
      schedules: A name or a Schedule, or several; None for all names.
      remat: The values to try as `value_and_grad(remat=)`.
      costs: The durations of actions, with a single remat; None counts the FLOPs of the model's
        contractions, with the forward of a rank's layers as the unit.
      axis: As for `value_and_grad`.
      batch_axes: As there.
      manual_axes: As there.
      param_specs: As there.
      layers_per_stage: As there, for schedules that have as many stages.
      trainable: As there.
      rng: A key, if the model draws random numbers.

    Returns:
      Choices in order. Each has `simulation` (the predicted time of a step is its `makespan`),
      `terms` of memory that add up to `num_bytes`, `fits`, `why`, and `arguments` for
      `value_and_grad`.

    Raises:
      ValueError: If an argument has a bad value, or no schedule can run.
      TypeError: If an argument has a wrong type.
    """
    limit = _bytes_of(memory)
    if not 0 <= as_number("headroom", headroom) < 1:
        raise ValueError(f"headroom={brief(headroom)}: must be a share, at least 0 and less than 1")
    remats = _as_tuple("remat", remat, 'of "none", "block" and policies')
    chosen = names() if schedules is None else schedules
    chosen = _as_tuple("schedules", chosen, "of names and Schedules, or None")
    raise_all(
        "schedules: must be names, or Schedules",
        (show(value) for value in chosen if not isinstance(value, str | Schedule)),
        error=TypeError,
    )
    raise_all(
        f"schedules: must be some of {', '.join(map(repr, names()))}, or Schedules",
        (show(value) for value in chosen if isinstance(value, str) and value not in names()),
    )
    for argument, values in {"schedules": chosen, "remat": remats}.items():
        if not values:
            raise ValueError(f"{argument}=(): must hold at least one")
    for one_remat in remats:
        check_remat(one_remat)
    if not isinstance(costs, Costs | None):
        raise TypeError(f"costs={brief(costs)}: must be a dualpipe_jax.Costs, or None")
    if optimizer is not None and not callable(getattr(optimizer, "init", None)):
        raise TypeError(f"optimizer={brief(optimizer)}: must be an optax transformation, or None")
    if costs is not None and len(remats) != 1:
        raise ValueError(f"costs: must come with the one remat that they hold for, not {remat!r}")
    axes = check_axes(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
    )
    call_checks.arguments(params, batch, rng)
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
    for one_remat in remats:
        choices += given.choices(
            chosen,
            remat=one_remat,
            costs=costs,
            optimizer=optimizer,
            limit=limit,
            headroom=headroom,
            refusals=refusals,
        )
    if not choices:
        raise next(iter(refusals.values()))
    ordered = Choices(in_order(choices))
    ordered.left_out = {name: " ".join(str(e).split()) for name, e in refusals.items()}
    return ordered


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Holds the arguments that all compared steps have in common."""

    model: Model
    params: Params
    batch: Batch
    rng: jax.Array | None
    num_microbatches: int
    axes: StepAxes
    options: dict[str, Any]

    def choices(
        self,
        schedules: Sequence[str | Schedule],
        *,
        remat: Remat,
        costs: Costs | None,
        optimizer: Optimizer | None,
        limit: float,
        headroom: float,
        refusals: dict[str, ValueError],
    ) -> list[Choice]:
        """Predicts the steps of schedules with a remat; `refusals` gets those that cannot run."""
        recomputes, traces = remat != "none", {}
        outside, choices = self.terms_outside(optimizer), []

        def terms_of(step: Step) -> tuple[MemoryTerm, ...]:
            report = self._on_avals(step.memory, traces)
            return (*outside, *(MemoryTerm(t.name, t.num_bytes, t.count) for t in report.fullest))

        for named in schedules:
            try:
                schedule = self.schedule(named)
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
                refusals[named if isinstance(named, str) else named.name] = error
        return choices

    def schedule(self, schedule: str | Schedule) -> Schedule:
        """Makes a named schedule."""
        if not isinstance(schedule, str):
            return schedule
        num_ranks = self.axes.mesh.shape[self.axes.axis]
        return make(schedule, num_ranks=num_ranks, num_microbatches=self.num_microbatches)

    def step(self, **more_options: Any) -> Step:
        """Makes a step, and checks its arguments."""
        options = {**vars(self.axes), **self.options, **more_options}
        grad_fn = value_and_grad(self.model, num_microbatches=self.num_microbatches, **options)
        return self._on_avals(grad_fn.build.traced)

    def _on_avals(self, function: Callable[..., Any], *more: Any) -> Any:
        """Calls a function with tracers of params, batch and rng, which keep their shardings."""
        results = []

        def run(params: Params, batch: Batch, rng: Any) -> None:
            results.append(function(params, batch, rng, *more))

        jax.eval_shape(run, self.params, self.batch, self.rng)
        return results[0]

    def costs(self, step: Step, traces: dict[bool, Any], *, recomputes: bool) -> Costs:
        """Counts FLOPs; the unit is the forward of a rank's layers."""
        work: Work = self._on_avals(step.work, traces, recomputes)
        if not work.forward:
            return usual_costs(recomputes=recomputes)  # the model has no contractions
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

    def terms_outside(self, optimizer: Optimizer | None) -> tuple[MemoryTerm, ...]:
        """Lists the bytes of a device's shards of a training step's arguments."""
        options = {
            "mesh": self.axes.mesh,
            "axis": self.axes.axis,
            "param_specs": self.options["param_specs"],
        }

        def num_bytes(tree: PyTree) -> int:
            leaves = jax.tree.leaves(tree)
            return sum(
                math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf, sharding in zip(
                    leaves, jax.tree.leaves(shardings(tree, **options)), strict=True
                )
            )

        params, batch = jax.eval_shape(lambda *trees: trees, self.params, self.batch)
        terms = [MemoryTerm("parameters", num_bytes(params), "")]
        if optimizer is not None:
            terms.append(
                MemoryTerm("optimizer", num_bytes(jax.eval_shape(optimizer.init, params)), "")
            )
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
        return (*terms, MemoryTerm("batch", size / self.axes.num_shards, ""))


def _as_tuple(argument: str, value: Any, of: str) -> tuple[Any, ...]:
    """Makes a tuple of one value, or of several."""
    if isinstance(value, str | Schedule) or callable(value):
        return (value,)
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"{argument}={brief(value)}: must be a sequence {of}") from None


def _bytes_of(memory: float | str) -> float:
    if not isinstance(memory, str | Real):
        raise TypeError(f"memory={brief(memory)}: must be a number of bytes, or such as '80GiB'")
    if memory == math.inf:
        return math.inf
    try:
        return parse_bytes(memory)
    except ValueError as error:
        raise ValueError(f"memory={brief(memory)}: {error}") from error
