"""Compiles a step ahead of time for a topology, and reports on the compiled program."""

import inspect
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dualpipe_jax._devices import Device
from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._grid import is_adjacent_along
from dualpipe_jax._model import call_checks, semantics
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._preflight.analysis import analyze
from dualpipe_jax._preflight.arguments import MeshAxes, find_axes, put_on_mesh
from dualpipe_jax._preflight.collectives import find_global_permutes
from dualpipe_jax._preflight.hlo import Module, parse
from dualpipe_jax._preflight.kernels import KernelCost, Kernels, is_flops
from dualpipe_jax._preflight.links import Network
from dualpipe_jax._preflight.options import compiler_options as default_options
from dualpipe_jax._preflight.predict import Prediction, find_execution
from dualpipe_jax._preflight.report import Memory, ProgramSize, Report
from dualpipe_jax._preflight.slices import Slices, join_slices
from dualpipe_jax._preflight.topologies import Topology, find_topology, make_mesh
from dualpipe_jax._sizes import as_host_memory, require_rate


def preflight(
    step_fn: Callable[..., Any],
    args: tuple[PyTree, ...],
    topology: str,
    *,
    compiler_options: dict[str, bool | int | str] | None = None,
    mesh: Any = None,
    kernel_costs: Mapping[str, KernelCost] | None = None,
    host_link: float | None = None,
    dcn: float | None = None,
    host_memory: float | str | None = None,
) -> Report:
    """Compiles a training step for hardware that need not be there, and reports on the program.

    The report says whether the step fits into a device's memory, which collectives the steady loop
    has, whether compute hides them, and how long a step should take. Nothing runs; the figures are
    those of the compiler and of the devices' makers, and the times are no measurements.

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
    >>> [(found.kind, found.num_bytes) for found in report.loop.collectives], report.loop.num_trips
    ([('collective-permute', 256)], 3)

    Args:
      step_fn: The step, jitted or not. It may be built over any mesh with the axes of the
        topology's, such as one of fake CPU devices. A `jax.jit` around it may donate, but must not
        name shardings of that mesh, and a `jax.shard_map` of your own must leave its mesh to the
        context.
      args: Its arguments: arrays, or `jax.ShapeDtypeStruct`s, which cost nothing. On the topology
        they are sharded as on their mesh; those on no mesh are replicated.
      topology: The devices to compile for: `"tpu:v5e:2x4"` (needs `pip install 'jax[tpu]'`),
        `"tpu:v5e:4x4*2"` for two slices, across which the axis `pipe` goes, else `data`, else the
        first that can, `"gpu:h100:8"` (`'jax[cuda13]'`), or `"cpu:8"`, this process's CPU devices.
      compiler_options: XLA's options; None for those of `dualpipe_jax.compiler_options`.
      mesh: A mesh with the step's axes; None to read them off the arguments' shardings, or off the
        step.
      kernel_costs: The FLOPs of a call of kernels that XLA does not see into (Pallas's, Triton's),
        by the beginning of their names: a number, or a function of the operands
        (`jax.ShapeDtypeStruct`s). Other kernels count as they estimate themselves
        (`pl.CostEstimate`), the flash and splash attention that come with JAX by their matmuls; the
        report names the kernels whose cost is not known, which are not in its times.
      host_link: Bytes a second of a device's link to its host, each way; None for the default of
        the device (`dualpipe_jax.device_figures`).
      dcn: Bytes a second of a host's data-centre network, each way, over which slices exchange
        data; None for the published share of a chip times the chips of a host.
      host_memory: The bytes of the host's memory for each device, or a text such as `"64GiB"`; more
        temporaries there are a fault. None for no limit.

    Returns:
      The report, frozen dataclasses; `print` shows it.

    Raises:
      ValueError: If the topology is not known or has not as many devices as the mesh, no axis can
        go across its slices, the arguments lie on more than one mesh, or on none and the step maps
        over none, the compiler does not know its options, or `host_memory` is no size.
      TypeError: If `step_fn` is no function, `args` no tuple, `mesh` no mesh, `compiler_options` no
        dict of values by name, `kernel_costs` not of numbers and functions by name, `host_link`
        or `dcn` no number above 0, or `host_memory` neither a number nor a text.
      ModuleNotFoundError: If the compiler for the topology is not installed.
    """
    _check_step(step_fn, args)
    kernels = Kernels(_check_kernel_costs(kernel_costs))
    require_rate("host_link", host_link)
    require_rate("dcn", dcn)
    if host_memory is not None:
        host_memory = as_host_memory("host_memory", host_memory)
    found = find_topology(topology)
    axes = find_axes(step_fn, tuple(args), mesh)
    on = make_mesh(found, axes.sizes, axes.types)
    options: dict[str, Any] = default_options(found.platform)
    if compiler_options is not None:
        options = _check_options(compiler_options)
    lowered = _lower(step_fn, tuple(args), on, found)
    start = time.perf_counter()
    compiled, failure = _compile(lowered, options, topology, is_given=bool(compiler_options))
    common: dict[str, Any] = {
        "topology": topology,
        "device": found.device.name if found.device else "CPU",
        "axes": axes.sizes,
        "apart": _axes_apart(axes, on),
        "compiler_options": dict(options),
        "compile_seconds": time.perf_counter() - start,
    }
    if compiled is None:
        return Report(
            **common,
            memory=_needed_memory(found, failure),
            program=None,
            loop=None,
            copies=(),
            prediction=Prediction(reason="the step does not fit"),
            failure=failure.splitlines()[0],
        )
    devices = tuple(on.devices.flat)
    module = join_slices(parse(compiled.as_text() or ""), Slices.of(devices))
    memory = compiled.memory_analysis()
    network = _network(axes, devices, found.device, host_link=host_link, dcn=dcn)
    return Report(
        **common,
        **analyze(module, network, kernels)._asdict(),
        memory=_memory(found, memory, host_memory),
        program=_program_size(module, memory),
        kernels=kernels.list_calls(module),
        execution=find_execution(module),
    )


def _check_step(step_fn: Any, args: Any) -> None:
    """Requires a function, and a tuple of its arguments."""
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args={type(args).__name__}: must be a tuple of the step's arguments; for a "
            "single one write (argument,)"
        )
    if not callable(step_fn):
        raise TypeError(f"step_fn={brief(step_fn)}: must be a function, jitted or not")
    call_checks.arrays(semantics.pytree("args", args), "args")
    try:
        inspect.signature(step_fn).bind(*args)
    except ValueError:  # some builtins have none
        pass
    except TypeError as error:
        raise TypeError(
            f"step_fn: must take the {len(args)} arguments in args, but it does not: {error}"
        ) from error


def _check_options(options: Any) -> dict[str, Any]:
    """Requires values by name."""
    if not isinstance(options, Mapping):
        raise TypeError(
            f"compiler_options={brief(options)}: must be a dict of XLA's options by name, or None"
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


def _check_kernel_costs(kernel_costs: Any) -> Mapping[str, KernelCost]:
    """Requires FLOPs, or functions that give them, by name."""
    if kernel_costs is None:
        return {}
    if not isinstance(kernel_costs, Mapping):
        raise TypeError(
            f"kernel_costs={brief(kernel_costs)}: must be a dict from the names of kernels to FLOPs"
        )
    for name, cost in kernel_costs.items():
        if not (isinstance(name, str) and name and (callable(cost) or is_flops(cost))):
            raise TypeError(
                f"kernel_costs[{name!r}]={brief(cost)}: must be the FLOPs of a call, or a function "
                "of its operands, by the name of a kernel"
            )
    return kernel_costs


def _lower(
    step_fn: Callable[..., Any],
    args: tuple[PyTree, ...],
    mesh: jax.sharding.Mesh,
    topology: Topology,
) -> jax.stages.Lowered:
    """Traces the step over the topology's mesh, and lowers it for its platform."""
    jitted = step_fn if isinstance(step_fn, jax.stages.Wrapped) else jax.jit(step_fn)
    with jax.set_mesh(mesh):
        try:
            traced = jitted.trace(*put_on_mesh(args, mesh))
        except ValueError as error:
            if "should match the mesh passed to shard_map" not in str(error):
                raise
            raise ValueError(
                "step_fn: calls jax.shard_map with a mesh, which is not that of the topology; "
                "leave mesh= out of it, and it takes the mesh of the context (jax.set_mesh)"
            ) from error
        return traced.lower(lowering_platforms=(topology.lowering_platform,))


def _compile(
    lowered: jax.stages.Lowered, options: dict[str, Any], topology: str, *, is_given: bool
) -> tuple[jax.stages.Compiled | None, str]:
    """Compiles a step; if it does not fit, gives None and the compiler's words."""
    try:
        with warnings.catch_warnings():
            # A program for absent devices cannot be read back from JAX's cache on disk.
            warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation")
            return lowered.compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        failure = str(error)
        if is_given and "INVALID_ARGUMENT" in failure and "option" in failure:
            raise ValueError(
                f"compiler_options={options}: must be options of XLA for {topology!r}, each with a "
                "value that it takes; leave them out for those of dualpipe_jax.compiler_options "
                f"({failure})"
            ) from error
        if "RESOURCE_EXHAUSTED" not in failure:
            raise
        return None, failure


def _axes_apart(axes: MeshAxes, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Names the axes along which not all neighbours are neighbours on the chips' grid."""
    return tuple(
        axis for dim, axis in enumerate(axes.sizes) if is_adjacent_along(mesh.devices, dim) is False
    )


def _network(
    axes: MeshAxes,
    devices: Sequence[Any],
    device: Device | None,
    *,
    host_link: float | None,
    dcn: float | None,
) -> Network:
    """Describes the links between the devices of a mesh, in mesh order; None for the published."""
    hosts = [(getattr(one, "slice_index", None), one.process_index) for one in devices]
    if device is not None:
        host_link = device.host_link if host_link is None else host_link
        if dcn is None and device.dcn is not None:
            dcn = device.dcn * max(Counter(hosts).values())
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return Network(
        axes=axes.sizes,
        device=device,
        host_link=host_link,
        hosts=tuple(numbers[host] for host in hosts),
        dcn=dcn,
    )


def _program_size(module: Module, analysis: Any) -> ProgramSize:
    """Counts instructions and code."""
    return ProgramSize(
        num_instructions=sum(
            len(computation.instructions) for computation in module.computations.values()
        ),
        # The CPU's compiler does not count its code.
        code_bytes=getattr(analysis, "generated_code_size_in_bytes", None) or None,
        global_permutes=find_global_permutes(module),
    )


def _memory(topology: Topology, analysis: Any, host_memory: float | None) -> Memory:
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
        host_temporaries=analysis.host_temp_size_in_bytes,
        host_capacity=host_memory,
        # The CPU's compiler gives a number that leaves the temporaries out.
        peak=None if topology.platform == "cpu" else analysis.peak_memory_in_bytes,
        needed=needed,
        capacity=capacity,
        fits=None if capacity is None else needed <= capacity,
    )


def _needed_memory(topology: Topology, failure: str) -> Memory:
    """Reads off the compiler's refusal how much memory the step needs, if the refusal names it."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", failure)
    number, unit = [group for group in used.groups() if group] if used else ("", "")
    power = {"K": 1, "M": 2, "G": 3, "T": 4}
    return Memory(
        needed=int(float(number) * 1024 ** power[unit]) if number else None,
        capacity=topology.device.memory if topology.device else None,
        fits=False,
    )
