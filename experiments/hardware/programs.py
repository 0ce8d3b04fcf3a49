"""Sizes -> the model, its arrays, and the steps that are measured."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

import dualpipe_jax as dpj
from experiments.benchmarks import variants
from experiments.compiled import models
from experiments.hardware.tasks import Sizes

AXIS = "pipe"
# Names of devices in `dpj.device_figures` -> topologies of `dpj.preflight`.
_TOPOLOGIES = {
    "H100 SXM": "gpu:h100",
    "TPU v5e": "tpu:v5e",
    "TPU v5p": "tpu:v5p",
    "TPU v6e": "tpu:v6e",
}
_TYPES_OF_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
_OPTION = "xla_gpu_enable_command_buffer"
# The sets of command buffers (CUDA graphs) that are compared on GPUs with XLA's default.
COMMANDS: dict[str, dict[str, str]] = {
    "conditionals, loops": {_OPTION: f"{_TYPES_OF_COMMANDS},CONDITIONAL,WHILE"},
    "conditionals, loops, collectives": {
        _OPTION: f"{_TYPES_OF_COMMANDS},CONDITIONAL,WHILE,COLLECTIVES"
    },
    "none": {_OPTION: ""},
}
Step = Callable[[], Any]


def platform() -> str:
    """Names the platform: `"cpu"`, `"gpu"` or `"tpu"`."""
    return jax.devices()[0].platform


def make_mesh(num_ranks: int) -> jax.sharding.Mesh:
    """Lays the first devices out along the pipeline."""
    # An Auto axis: gradient accumulation over one device takes the same arrays.
    devices = jax.devices()[:num_ranks]
    return dpj.make_mesh(pipe=num_ranks, devices=devices, axis_types=AxisType.Auto)


def make_arrays(sizes: Sizes, mesh: Any, *, layers: int, microbatches: int) -> tuple[Any, Any]:
    """Makes parameters, float32, sharded over the pipeline, and a batch of token ids."""
    avals = models.FAMILIES[sizes.family].avals(sizes.width, layers)
    leaves, tree = jax.tree.flatten(avals)

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        drawn = [
            0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, drawn)

    placed = dpj.shardings(avals, mesh=mesh, axis=AXIS)
    params = jax.jit(init, out_shardings=placed)(jax.random.key(0))
    # Random tokens: nothing is to be learned here.
    drawn = np.random.default_rng(0).integers(
        0, models.VOCABULARY, size=microbatches * sizes.tokens, dtype=np.int32
    )
    return params, jax.device_put(drawn, jax.NamedSharding(mesh, jax.P()))


def pipelined(
    sizes: Sizes, mesh: Any, *, microbatches: int, schedule: str = "1f1b", **options: Any
) -> Any:
    """Makes the pipelined loss and gradients."""
    return dpj.value_and_grad(
        models.FAMILIES[sizes.family].model,
        mesh=mesh,
        num_microbatches=microbatches,
        schedule=schedule,
        axis=AXIS,
        **options,
    )


def accumulated(sizes: Sizes, *, microbatches: int, unrolled: int) -> Any:
    """Makes loss and gradients without a pipeline: microbatches one after the other, added up."""
    model = models.FAMILIES[sizes.family].model
    return variants.limit(model, num_microbatches=microbatches, remat="none", unrolled=unrolled)


def compile_step(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any] | None = None
) -> Any:
    """Compiles a function of arrays."""
    return jax.jit(function).lower(*args).compile(compiler_options=options or {})


def runner(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any] | None = None
) -> Callable[[], Step]:
    """Makes a function that compiles, and returns one that runs a step."""
    return lambda: functools.partial(compile_step(function, args, options), *args)


def options_for_overlap() -> dict[str, Any]:
    """Gives the library's options of XLA for these devices."""
    return dict(dpj.compiler_options(platform()))


def flops_per_step(sizes: Sizes, *, layers: int, microbatches: int) -> float:
    """Counts the FLOPs of forward and backward (PaLM, arXiv:2204.02311, appendix B).

    Six for each token and weight of a matmul, and those of attention as if nothing were masked.
    """
    avals = models.FAMILIES[sizes.family].avals(sizes.width, layers)
    in_blocks = sum(math.prod(leaf.shape) for leaf in avals["blocks"].values() if leaf.ndim > 2)
    weights = in_blocks + math.prod(avals["ends"]["table"].shape)
    window = min(models.CONTEXT, sizes.tokens)
    heads = avals["blocks"].get("qkv")
    attention = 0 if heads is None else 12 * layers * math.prod(heads.shape[-2:]) * window
    return (6 * weights + attention) * sizes.tokens * microbatches


def num_parameters(sizes: Sizes, *, layers: int) -> int:
    """Counts the parameters."""
    avals = models.FAMILIES[sizes.family].avals(sizes.width, layers)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(avals))


def topology(mesh: Any) -> str | None:
    """Names a mesh's devices as `dpj.preflight` takes them; None if it does not know them."""
    devices = list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return f"cpu:{len(devices)}"
    figures = dpj.device_figures(devices[0])
    known = None if figures is None else _TOPOLOGIES.get(figures.name)
    if known is None:
        return None
    if devices[0].platform == "gpu":
        return f"{known}:{len(devices)}"
    coords: Any = np.array([device.coords for device in devices])
    dims = 3 if known == "tpu:v5p" else 2
    return f"{known}:{'x'.join(map(str, np.ptp(coords, axis=0)[:dims] + 1))}"


def peak_memory(mesh: Any) -> float | None:
    """Gives the most bytes in use so far on the fullest device; None where it does not count."""
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    peaks = [float(each["peak_bytes_in_use"]) for each in stats if "peak_bytes_in_use" in each]
    return max(peaks, default=None)


def compiled_memory(compiled: Any) -> float | None:
    """Gives the bytes of a program on a device, by its compiler; None if it says nothing."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return float(kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


def bytes_on_device(tree: Any) -> float:
    """Adds up the bytes of arrays on the fullest device."""
    sizes: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device] = sizes.get(shard.device, 0) + shard.data.nbytes
    return float(max(sizes.values()))
