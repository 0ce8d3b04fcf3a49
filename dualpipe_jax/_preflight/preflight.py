"""Compiles a step for a topology, ahead of time, and reads what became of it."""

import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dualpipe_jax._errors import raise_all, show
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._predict.waits import Waits
from dualpipe_jax._preflight.arguments import find_axes, put_on_mesh
from dualpipe_jax._preflight.collectives import find_global_permutes
from dualpipe_jax._preflight.copies import Copy, find_copies
from dualpipe_jax._preflight.hlo import Module, parse
from dualpipe_jax._preflight.kernels import KernelCost, Kernels, is_flops
from dualpipe_jax._preflight.links import Network
from dualpipe_jax._preflight.loops import FoundLoop, find_loop
from dualpipe_jax._preflight.options import compiler_options as options_of
from dualpipe_jax._preflight.predict import (
    Prediction,
    find_execution,
    find_num_trips,
    predict,
    runs_of_branches,
)
from dualpipe_jax._preflight.report import Loop, Memory, ProgramSize, Report
from dualpipe_jax._preflight.timing import Replay, exposed_seconds, with_runs
from dualpipe_jax._preflight.topologies import (
    Topology,
    find_topology,
    is_adjacent_along,
    make_mesh,
)
from dualpipe_jax._preflight.work import ActionWork, CompiledWork, WorkCounter, work_by_action

_EXHAUSTED = "RESOURCE_EXHAUSTED"


def preflight(
    step_fn: Callable[..., Any],
    args: tuple[PyTree, ...],
    topology: str,
    *,
    compiler_options: dict[str, bool | int | str] | None = None,
    mesh: Any = None,
    kernel_costs: Mapping[str, KernelCost] | None = None,
) -> Report:
    """Compiles a training step for hardware that need not be there, and says what became of it.

    Whether it fits into a device's memory, which collectives the steady loop has, whether compute
    hides them, and how long a step should take. Nothing runs; the figures are those of the
    compiler and of the devices' makers, and the times no measurements.

    >>> import jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((4,), ("pipe",), devices=jax.devices()[:4])
    >>> @jax.shard_map(mesh=mesh, out_specs=jax.P("pipe"))
    ... def step(x):
    ...     def swap(x, _):
    ...         return jax.lax.ppermute(x, "pipe", [(0, 1), (1, 0)]) @ x.T @ x, None
    ...
    ...     return jax.lax.scan(swap, x, length=3)[0]
    >>> x = jax.ShapeDtypeStruct(
    ...     (32, 8), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("pipe"))
    ... )
    >>> report = preflight(step, (x,), "cpu:4")
    >>> [(each.kind, each.num_bytes) for each in report.loop.collectives], report.loop.num_trips
    ([('collective-permute', 256)], 3)

    Args:
      step_fn: The step, jitted or not. It may be built over any mesh with the axes of the
        topology's, such as one of fake CPU devices. A `jax.jit` around it may donate, but must not
        name shardings of that mesh, and a `jax.shard_map` of your own must leave its mesh to the
        context.
      args: Its arguments: arrays, or `jax.ShapeDtypeStruct`s, which cost nothing. They lie on the
        topology as they lie on their mesh; those on no mesh are replicated.
      topology: The devices to compile for: `"tpu:v5e:2x4"` (needs `pip install 'jax[tpu]'`),
        `"gpu:h100:8"` (`'jax[cuda13]'`), or `"cpu:8"`, this process's CPU devices.
      compiler_options: XLA's options; None for those of `dualpipe_jax.compiler_options`.
      mesh: A mesh with the step's axes; None to read them off the arguments' shardings, or off the
        step.
      kernel_costs: The FLOPs of a call of kernels that XLA does not see into (Pallas's, Triton's),
        by the beginning of their names: a number, or a function of the operands
        (`jax.ShapeDtypeStruct`s). Other kernels count as they estimate themselves
        (`pl.CostEstimate`), the flash and splash attention that come with JAX by their matmuls; the
        report names the kernels whose cost is not known, which are not in its times.

    Returns:
      The report, frozen dataclasses; `print` shows it.

    Raises:
      ValueError: If the topology is not known or has not as many devices as the mesh, the
        arguments lie on more than one mesh, or on none and the step maps over none, or the compiler
        does not know its options.
      TypeError: If `step_fn` is no function, `args` no tuple, `mesh` no mesh, `compiler_options` no
        dict of values by name, or `kernel_costs` not of numbers and functions by name.
      ModuleNotFoundError: If the compiler for the topology is not installed.
    """
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args={type(args).__name__}: must be a tuple of the step's arguments; for a "
            "single one write (argument,)"
        )
    if not callable(step_fn):
        raise TypeError(f"step_fn={repr(step_fn)[:80]}: must be a function, jitted or not")
    kernels = Kernels(_checked(kernel_costs))
    found = find_topology(topology)
    axes = find_axes(step_fn, tuple(args), mesh)
    on = make_mesh(found, axes.sizes, axes.types)
    options: dict[str, Any] = options_of(found.platform)
    if compiler_options is not None:
        options = _checked_options(compiler_options)
    jitted = step_fn if isinstance(step_fn, jax.stages.Wrapped) else jax.jit(step_fn)
    with jax.set_mesh(on):
        try:
            traced = jitted.trace(*put_on_mesh(tuple(args), on))
        except ValueError as error:
            if "should match the mesh passed to shard_map" not in str(error):
                raise
            raise ValueError(
                "step_fn: calls jax.shard_map with a mesh, which is not that of the topology; "
                "leave mesh= out of it, and it takes the mesh of the context (jax.set_mesh)"
            ) from error
        lowered = traced.lower(lowering_platforms=(found.lowering_platform,))
    start = time.perf_counter()
    compiled, failure = None, ""
    try:
        with warnings.catch_warnings():
            # A program for absent devices cannot be read back from JAX's cache on disk.
            warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation")
            compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        failure = str(error)
        if compiler_options and "INVALID_ARGUMENT" in failure and "option" in failure:
            raise ValueError(
                f"compiler_options={options}: must be options of XLA for {topology!r}, each with a "
                "value that it takes; leave them out for those of dualpipe_jax.compiler_options "
                f"({failure})"
            ) from error
        if _EXHAUSTED not in failure:
            raise
    common: dict[str, Any] = {
        "topology": topology,
        "device": found.device.name if found.device else "CPU",
        "axes": axes.sizes,
        "apart": tuple(
            axis
            for dim, axis in enumerate(axes.sizes)
            if is_adjacent_along(on.devices, dim) is False
        ),
        "compiler_options": dict(options),
        "compile_seconds": time.perf_counter() - start,
    }
    if compiled is None:
        return Report(
            **common,
            memory=_exhausted(found, failure),
            program=None,
            loop=None,
            copies=(),
            prediction=Prediction(reason="the step does not fit"),
            failure=failure.splitlines()[0],
        )
    module = parse(compiled.as_text() or "")
    network = Network(axes=axes.sizes, device=found.device)
    loop, prediction, waits, copies = _analysis(module, network, kernels)
    analysis = compiled.memory_analysis()
    return Report(
        **common,
        memory=_memory(found, analysis),
        program=ProgramSize(
            num_instructions=sum(len(each.instructions) for each in module.computations.values()),
            # The CPU's compiler says nothing of it.
            code_bytes=getattr(analysis, "generated_code_size_in_bytes", None) or None,
            global_permutes=find_global_permutes(module),
        ),
        loop=loop,
        kernels=kernels.list_calls(module),
        copies=copies,
        execution=find_execution(module),
        prediction=prediction,
        waits=waits,
    )


def _checked_options(options: Any) -> dict[str, Any]:
    """Requires values by name."""
    if not isinstance(options, Mapping):
        raise TypeError(
            f"compiler_options={repr(options)[:80]}: must be a dict of XLA's options by name, or "
            "None"
        )
    raise_all(
        "compiler_options: must be numbers, texts, True or False by the names of XLA's options",
        (
            f"{option!r} is {show(value)}"
            for option, value in options.items()
            if not (isinstance(option, str) and isinstance(value, bool | int | float | str))
        ),
        error=TypeError,
    )
    return dict(options)


def _checked(kernel_costs: Any) -> Mapping[str, KernelCost]:
    if kernel_costs is None:
        return {}
    if not isinstance(kernel_costs, Mapping):
        raise TypeError(
            f"kernel_costs={kernel_costs!r}: must be a dict from the names of kernels to FLOPs"
        )
    for name, cost in kernel_costs.items():
        if not (isinstance(name, str) and name and (callable(cost) or is_flops(cost))):
            raise TypeError(
                f"kernel_costs[{name!r}]={cost!r}: must be the FLOPs of a call, or a function of "
                "its operands, by the name of a kernel"
            )
    return kernel_costs


def _analysis(
    module: Module, network: Network, kernels: Kernels | None = None
) -> tuple[Loop | None, Prediction, Waits | None, tuple[Copy, ...]]:
    costs = WorkCounter(module, kernels=kernels, device=network.device)
    replay = Replay(module, network, kernels)
    found = find_loop(module, costs)
    work = {} if found is None else work_by_action(module, costs, found.body)
    collectives = [] if found is None else replay.run(found.body)
    prediction, timetable = predict(
        module,
        found,
        costs_of=costs,
        work=work,
        collectives=collectives,
        outside_seconds=_outside_seconds(module, costs, replay, found),
        device=network.device,
    )
    copies = find_copies(module, costs, found)
    if found is None:
        return None, prediction, None, copies
    if timetable is not None:
        runs = runs_of_branches(module, found.body, network, timetable.tables)
        collectives = with_runs(collectives, runs)
    total, num_trips = costs.of_computation(found.body), find_num_trips(module, found)
    has_cycles = network.device is not None and network.device.clock is not None
    loop = Loop(
        kind=found.kind,
        name=found.instruction.name,
        num_trips=num_trips,
        flops=total.flops,
        cycles=total.cycles if has_cycles else None,
        compute_seconds=replay.seconds(total),
        exposed_seconds=exposed_seconds(collectives, num_trips=num_trips),
        actions=tuple(
            ActionWork(
                name=name.removeprefix("dualpipe."),
                flops=each.flops,
                cycles=each.cycles if has_cycles else None,
            )
            for name, each in sorted(
                work.items(), key=lambda item: (-item[1].cycles, -item[1].flops)
            )
            if each != CompiledWork()
        ),
        collectives=tuple(collectives),
    )
    return loop, prediction, None if timetable is None else timetable.waits(), copies


def _outside_seconds(
    module: Module, costs: WorkCounter, replay: Replay, loop: FoundLoop | None
) -> float | None:
    """How long what stands in the entry takes, but for the loop that holds the steady one."""
    if loop is None:
        return None
    total = CompiledWork()
    for instruction in module.entry.instructions:
        inside = [each.name for c in module.callees(instruction) for each in module.within(c)]
        if loop.instruction.name not in (instruction.name, *inside):
            total += costs.of(instruction, module.entry)
    exposed = exposed_seconds(replay.run(module.entry, loops=False))
    compute = replay.seconds(total)
    return None if exposed is None or compute is None else compute + exposed


def _memory(topology: Topology, analysis: Any) -> Memory:
    """Reads the compiler's analysis of memory."""
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    needed = arguments + outputs - aliased + temporaries
    capacity = topology.device.memory if topology.device else None
    return Memory(
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        # The CPU's compiler gives a number that leaves the temporaries out.
        peak=None if topology.platform == "cpu" else analysis.peak_memory_in_bytes,
        needed=needed,
        capacity=capacity,
        fits=None if capacity is None else needed <= capacity,
    )


def _exhausted(topology: Topology, failure: str) -> Memory:
    """Reads off the compiler's refusal how much would have been needed, if it says so."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", failure)
    number, unit = [group for group in used.groups() if group] if used else ("", "")
    power = {"K": 1, "M": 2, "G": 3, "T": 4}
    return Memory(
        needed=int(float(number) * 1024 ** power[unit]) if number else None,
        capacity=topology.device.memory if topology.device else None,
        fits=False,
    )
