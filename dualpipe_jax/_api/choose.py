"""`choose`: from a model's shapes to its schedules, ranked by predicted step time and memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax

from dualpipe_jax._api.build import StepAxes, check_axes
from dualpipe_jax._api.choices import Choices
from dualpipe_jax._api.count_costs import costs_of
from dualpipe_jax._api.host import Host
from dualpipe_jax._api.shardings import shardings
from dualpipe_jax._api.tried import Tried, values_to_try
from dualpipe_jax._api.value_and_grad import GradFunction, value_and_grad
from dualpipe_jax._costs import as_bytes, as_number
from dualpipe_jax._errors import brief
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
    HEADROOM,
    TRANSFER,
    Candidate,
    Choice,
    Costs,
    MemoryTerm,
    choices_of,
    rank,
    usual_costs,
    weights_by_kind,
)
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.named import variants_of
from dualpipe_jax._schedule.stage_sizes import BALANCED, LayersPerStage, stage_sizes
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule, make

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
    num_microbatches: int | Sequence[int],
    memory: float | str = math.inf,
    headroom: float = HEADROOM,
    host_memory: float | str = 0,
    host_link: float | None = None,
    optimizer: Optimizer | None = None,
    schedules: str | Schedule | Iterable[str | Schedule] | None = None,
    remat: Remat | Sequence[Remat] = _REMATS,
    costs: Costs | None = None,
    axis: str = "pipe",
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    layers_per_stage: LayersPerStage = BALANCED,
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
      num_microbatches: As there, or several numbers to try; then `arguments` have it too.
      memory: The bytes of a device, or a text such as `"80GiB"`.
      headroom: The share of the memory that is left to the compiler's own temporaries, from 0 to 1.
      host_memory: The bytes of the host's memory for each device, or such a text. Schedules that do
        not fit on the device are then also tried with slots on the host, as many on the device as
        fit there (docs/offload.md). With 0 all activations stay on the device.
      host_link: Bytes a second between a device and its host, each way; None for the default of
        the mesh's devices (`dualpipe_jax.device_figures`).
      optimizer: An optax transformation, whose state counts as sharded by `shardings`.
      schedules: A name or a Schedule, or several; None for all names. Names without options are
        tried with several: two and four stages a rank, r and 2r deferred weight grads.
      remat: The values to try as `value_and_grad(remat=)`.
      costs: The durations of actions, with a single remat and number of microbatches; None counts
        the work of the model's functions, with the forward of a rank's layers as the unit. Unless
        they have `spill` and `fill`, copies to the host and back take the bytes of an activation
        by `host_link`, beside a forward at the peak of the mesh's devices, or at that of a TPU v5e
        (197 TFLOPs a second) where their figures are not known: a slower forward hides more.
      axis: As for `value_and_grad`.
      batch_axes: As there.
      manual_axes: As there.
      param_specs: As there.
      layers_per_stage: As there, for schedules that have as many stages; `"balanced"`, the default,
        with a largest stage that fits the memory.
      trainable: As there.
      rng: A key, if the model draws random numbers.

    Returns:
      Choices in order. Each has `simulation` (the predicted time of a step is its `makespan`),
      `terms` of memory that add up to `num_bytes`, `host_bytes`, `fits`, `why`, and `arguments`
      for `value_and_grad`.

    Raises:
      ValueError: If an argument has a bad value, or no schedule can run.
      TypeError: If an argument has a wrong type.
    """
    limit = as_bytes("memory", memory)
    if not 0 <= as_number("headroom", headroom) < 1:
        raise ValueError(f"headroom={brief(headroom)}: must be a share, at least 0 and less than 1")
    if optimizer is not None and not callable(getattr(optimizer, "init", None)):
        raise TypeError(f"optimizer={brief(optimizer)}: must be an optax transformation, or None")
    tried = values_to_try(schedules, remat, num_microbatches, costs=costs)
    axes = check_axes(
        model,
        mesh=mesh,
        num_microbatches=tried.numbers[0],
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
        axes=axes,
        options={
            "param_specs": param_specs,
            "layers_per_stage": layers_per_stage,
            "trainable": trainable,
        },
        costs=costs,
        host=Host.of(mesh, memory=host_memory, link=host_link, costs=costs),
        limit=limit,
        headroom=headroom,
        terms_outside=_terms_outside(params, batch, optimizer, axes=axes, param_specs=param_specs),
    )
    choices, errors = rank(_cases(given, tried), is_one_of_several=len(tried.numbers) > 1)
    ordered = Choices(choices)
    ordered.left_out = {name: " ".join(str(error).split()) for name, error in errors.items()}
    return ordered


def _cases(given: "_Given", tried: Tried) -> Iterator[tuple[str, Callable[[], list[Choice]]]]:
    """Yields the name of each schedule in each setting, and a function that predicts its steps."""
    unit = None
    for number in tried.numbers:
        where = f", {number} microbatches" if len(tried.numbers) > 1 else ""
        for remat in tried.remats:
            setting = _Setting(given, num_microbatches=number, remat=remat, unit=unit)
            for schedule in given.variants(tried.schedules):
                name = schedule if isinstance(schedule, str) else schedule.name
                yield name + where, partial(setting.choices, schedule)
            unit = unit or setting.unit


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Holds the arguments that all compared steps have in common."""

    model: Model
    params: Params
    batch: Batch
    rng: jax.Array | None
    axes: StepAxes
    options: dict[str, Any]
    costs: Costs | None
    host: Host
    limit: float
    headroom: float
    terms_outside: tuple[MemoryTerm, ...]

    @property
    def num_ranks(self) -> int:
        """The ranks of the pipeline."""
        return self.axes.mesh.shape[self.axes.axis]

    def variants(self, schedules: Sequence[str | Schedule]) -> Iterator[str | Schedule]:
        """Yields the schedules, and names also with the options that are worth a try."""
        num_layers = self.num_layers()
        for schedule in schedules:
            if isinstance(schedule, str):
                yield from variants_of(schedule, num_ranks=self.num_ranks, num_layers=num_layers)
            else:
                yield schedule

    def num_layers(self, **stages: Any) -> int:
        """Counts the layers; `stages` are as `call_checks.num_layers` takes them."""

        def count(params: Params, *more: Any) -> int:
            del more
            return call_checks.num_layers(params, self.model.layout, **stages)

        return self.on_avals(count)

    def on_avals(self, function: Callable[..., Any], *more: Any) -> Any:
        """Calls a function with tracers of params, batch and rng, which keep their shardings."""
        results = []

        def run(params: Params, batch: Batch, rng: Any) -> None:
            results.append(function(params, batch, rng, *more))

        jax.eval_shape(run, self.params, self.batch, self.rng)
        return results[0]


class _Setting:
    """Predicts the steps of schedules with one remat and one number of microbatches.

    Args:
      given: The arguments that all steps have in common.
      num_microbatches: The microbatches.
      remat: As for `value_and_grad`.
      unit: The work that costs 1; None for the forward of a rank's layers.
    """

    def __init__(self, given: _Given, *, num_microbatches: int, remat: Remat, unit: float | None):
        self._given, self._num_microbatches, self._remat = given, num_microbatches, remat
        self._recomputes = remat != "none"
        # Steps that differ in their schedule only share the traces of the model's functions.
        self._traces: dict[bool, Any] = {}
        self._costs: Costs | None = None
        self.unit = unit

    def choices(self, schedule: str | Schedule) -> list[Choice]:
        """Predicts the steps of a schedule.

        Raises:
          ValueError: If it cannot run.
        """
        given = self._given
        if isinstance(schedule, str):
            sizes = {"num_ranks": given.num_ranks, "num_microbatches": self._num_microbatches}
            schedule = make(schedule, **sizes)
        self._grad_fn(schedule=schedule)  # or raises
        where = f" of schedule {schedule.name!r} over {schedule.num_ranks} ranks"
        sizes = stage_sizes(
            given.options["layers_per_stage"], num_stages=schedule.num_stages, where=where
        )
        num_layers = given.num_layers(
            num_stages=1 if isinstance(sizes, tuple) else schedule.num_stages, where=where
        )
        costs = self._costs = self._costs or self._costs_of(schedule)
        candidate = Candidate(
            schedule=schedule,
            num_layers=num_layers,
            layer_weights=weights_by_kind(costs.layer, given.model.layout),
            layers_per_stage=sizes,
            remat=self._remat,
            costs=costs,
            transfer=TRANSFER * costs.forward,
        )

        def terms_of(
            tables: Tables, execution: Execution, *, sizes: tuple[int, ...]
        ) -> tuple[MemoryTerm, ...]:
            del tables  # The step compiles them.
            step = self._step(
                schedule=schedule, execution=execution, costs=costs, layers_per_stage=sizes
            )
            report = given.on_avals(step.memory, self._traces)
            on_host = (term for term in report.terms if term.where == "host")
            inside = (
                MemoryTerm(t.name, t.num_bytes, t.count, t.where)
                for t in (*report.fullest, *on_host)
            )
            return (*given.terms_outside, *inside)

        return choices_of(
            candidate,
            terms_of=terms_of,
            limit=given.limit,
            headroom=given.headroom,
            host_memory=given.host.memory,
        )

    def _grad_fn(self, **more_options: Any) -> GradFunction:
        """Makes a step's function, and checks its options."""
        given = self._given
        options: dict[str, Any] = {
            **vars(given.axes),
            **given.options,
            "remat": self._remat,
            **more_options,
        }
        return value_and_grad(given.model, num_microbatches=self._num_microbatches, **options)

    def _step(self, **more_options: Any) -> Step:
        """Makes a step, and checks its arguments."""
        return self._given.on_avals(self._grad_fn(**more_options).build.traced)

    def _costs_of(self, schedule: Schedule) -> Costs:
        """Gives the costs, counted where none are given, with times of copies if there may be any.

        The unit of counted ones is the forward of a rank's layers.
        """
        given = self._given
        lacks_times, num_ranks = given.host.lacks_times(given.costs), given.num_ranks
        if given.costs is not None and not lacks_times:
            return given.costs
        work = self._work(schedule)
        costs = given.costs
        if costs is None:
            self.unit = self.unit or work.all_layers.forward / num_ranks
            counted = costs_of(work, num_ranks=num_ranks, unit=self.unit)
            costs = counted or usual_costs(recomputes=self._recomputes)
        if lacks_times:
            costs = given.host.with_copies(costs, work, num_ranks=num_ranks)
        return costs

    def _work(self, schedule: Schedule) -> Work:
        """Counts the work of a step."""
        given = self._given
        # All splits and executions have the same work.
        sizes = given.options["layers_per_stage"]
        step = self._step(
            schedule=schedule,
            layers_per_stage=None if isinstance(sizes, str) else sizes,
            execution=Execution(overlap=False, split_backward=True),
        )
        return given.on_avals(step.work, self._traces, self._recomputes)


def _terms_outside(
    params: Params,
    batch: Batch,
    optimizer: Optimizer | None,
    *,
    axes: StepAxes,
    param_specs: PyTree,
) -> tuple[MemoryTerm, ...]:
    """Lists the bytes of a device's shards of a training step's arguments."""
    options = {"mesh": axes.mesh, "axis": axes.axis, "param_specs": param_specs}

    def num_bytes(tree: PyTree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(
                leaves, jax.tree.leaves(shardings(tree, **options)), strict=True
            )
        )

    params, batch = jax.eval_shape(lambda *trees: trees, params, batch)
    terms = [MemoryTerm("parameters", num_bytes(params), "")]
    if optimizer is not None:
        state = jax.eval_shape(optimizer.init, params)
        terms.append(MemoryTerm("optimizer", num_bytes(state), ""))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    return (*terms, MemoryTerm("batch", size / axes.num_shards, ""))
