"""The XLA options that overlap needs, each with its reason.

Only options that change a compiled program for the better are listed. Other options of the TPU
compiler were tried on a two-beat loop with permutes and all-to-alls, and changed nothing: those of
asynchronous permutes and of collective fusion, the scheduler's reruns, its real cost model and its
preference for depth, and asynchronous copies in place of slices; its release of starts exposed
more. Nor does the GPU compiler's latency-hiding scheduler have to be switched on. Its pass
`collective-permute-motion` moves a loop's last permutes to the next trip's start, where they are
waited for at once; it finds none in a program of this library, where received values pass through
a select (`_executor/barriers.py`).

The two for GPUs were an improvement before a beat had all the order that it has now, with which
XLA's defaults hide as much, in one larger permute a beat.
"""

from dataclasses import dataclass

from dualpipe_jax._errors import brief

PLATFORMS = ("tpu", "gpu", "cpu")


@dataclass(frozen=True, kw_only=True)
class CompilerOption:
    """Holds one option of XLA.

    Attributes:
      name: Its name, as `compiler_options` of `jax.jit` takes it.
      value: Its value. Booleans are Python's: the GPU compiler takes no others.
      reason: Its effect.
    """

    name: str
    value: bool | int | str
    reason: str


_OPTIONS: dict[str, tuple[CompilerOption, ...]] = {
    "tpu": (
        CompilerOption(
            name="xla_tpu_enable_async_all_to_all",
            value=True,
            reason="all-to-alls run while others compute; without it every one stops its device",
        ),
        CompilerOption(
            name="xla_tpu_enable_async_ragged_all_to_all",
            value=True,
            reason="the same for ragged ones",
        ),
        CompilerOption(
            name="xla_lhs_loop_fusion_latency_multiplier",
            value="0.5",
            reason="the scheduler puts more between an all-to-all's start and its done: it counts "
            "elementwise work by half, which it otherwise takes for longer than the transfer",
        ),
        CompilerOption(
            name="xla_msa_use_bundle_aware_cost_model",
            value=True,
            reason="more matmuls find their weights in fast memory: fewer cycles, and more so in a "
            "steady loop than in a step without a pipeline",
        ),
    ),
    "gpu": (
        CompilerOption(
            name="xla_gpu_experimental_parallel_collective_overlap_limit",
            value=4,
            reason="several transfers are under way at once; with one at a time, in a beat whose "
            "layers are a loop, the activations or the cotangents stop their device",
        ),
        CompilerOption(
            name="xla_gpu_collective_permute_combine_threshold_bytes",
            value=0,
            reason="activations and cotangents travel separately, each as soon as it is made",
        ),
    ),
    "cpu": (),
}


def compiler_options(platform: str) -> dict[str, bool | int | str]:
    """Gives the XLA options for overlap of communication, and for weights in fast memory.

    Pass them to the `jax.jit` of the training step. `dualpipe-jax preflight` prints them with their
    reasons, which are:

    >>> for platform in ("tpu", "gpu"):
    ...     for option in explain_options(platform):
    ...         print(f"{option.name}={option.value}: {option.reason}")
    xla_tpu_enable_async_all_to_all=True: all-to-alls run while others compute; without it every
      one stops its device
    xla_tpu_enable_async_ragged_all_to_all=True: the same for ragged ones
    xla_lhs_loop_fusion_latency_multiplier=0.5: the scheduler puts more between an all-to-all's
      start and its done: it counts elementwise work by half, which it otherwise takes for longer
      than the transfer
    xla_msa_use_bundle_aware_cost_model=True: more matmuls find their weights in fast memory: fewer
      cycles, and more so in a steady loop than in a step without a pipeline
    xla_gpu_experimental_parallel_collective_overlap_limit=4: several transfers are under way at
      once; with one at a time, in a beat whose layers are a loop, the activations or the cotangents
      stop their device
    xla_gpu_collective_permute_combine_threshold_bytes=0: activations and cotangents travel
      separately, each as soon as it is made
    >>> compiler_options("tpu")
    {'xla_tpu_enable_async_all_to_all': True, 'xla_tpu_enable_async_ragged_all_to_all': True,
     'xla_lhs_loop_fusion_latency_multiplier': '0.5', 'xla_msa_use_bundle_aware_cost_model': True}

    Args:
      platform: `"tpu"`, `"gpu"` or `"cpu"` (which has none).

    Returns:
      The options as `jax.jit(step, compiler_options=...)` takes them.

    Raises:
      ValueError: If there is no such platform.
    """
    return {option.name: option.value for option in explain_options(platform)}


def explain_options(platform: str) -> tuple[CompilerOption, ...]:
    """Lists the options of `compiler_options` with their reasons.

    Raises:
      ValueError: If there is no such platform.
    """
    if not isinstance(platform, str) or platform not in _OPTIONS:
        known = ", ".join(map(repr, PLATFORMS))
        raise ValueError(f"platform={brief(platform)}: must be one of {known}")
    return _OPTIONS[platform]
