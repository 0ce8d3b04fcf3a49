"""Kernels that XLA does not see into: their costs, and those that a report leaves out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from dualpipe_jax._devices import V5E
from dualpipe_jax._preflight.hlo import Module
from dualpipe_jax._preflight.kernels import ESTIMATED, GIVEN, PUBLISHED, Kernels
from dualpipe_jax._preflight.work import WorkCounter
from tests.preflight.snippets import program
from tests.preflight.steps import make_mesh

ESTIMATE = r'"custom_call_config":{"cost_estimate":{"flops":"5000","transcendentals":"2"}}'


def with_kernel(name: str, *, estimate: str = "", dtype: str = "bf16") -> Module:
    return program(
        f"""  %q = {dtype}[2,16,8]{{2,1,0}} parameter(0)
  %m = s8[1,4]{{1,0}} parameter(1)
  %k = {dtype}[2,32,8]{{2,1,0}} parameter(2)
  ROOT %kernel.3 = bf16[2,16,8]{{2,1,0}} custom-call(%m, %q, %k), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/jvp({name})/pallas_call"}}, backend_config={{{estimate}}}"""  # noqa: E501
    )


def test_flops_are_given_or_estimated_or_published() -> None:
    known, mine = with_kernel("splash_mha_dq_segmented"), with_kernel("mine", estimate=ESTIMATE)
    in_float8 = with_kernel("flash_attention", dtype="f8e4m3fn")
    scores = 2 * 2 * 16 * 8 * 32
    given = {"splash": 7.0, "splash_mha": lambda operands: 10.0 * operands[1].shape[1]}
    for module, costs, name, flops, source in (
        (known, {}, "splash_mha_dq_segmented", 3 * scores, PUBLISHED),
        (known, given, "splash_mha_dq_segmented", 160, GIVEN),
        (in_float8, {}, "flash_attention", 2 * scores, PUBLISHED),
        (mine, {"mine": lambda operands: np.prod(operands[1].shape)}, "mine", 256, GIVEN),
        (mine, given, "mine", 5000, ESTIMATED),
        (mine, {"min": 3}, "mine", 3, GIVEN),
    ):
        kernels = Kernels(costs)
        (found,) = kernels.list_calls(module)
        assert (found.name, found.count, found.flops, found.source) == (name, 1, flops, source)
        work = WorkCounter(module, kernels=kernels, device=V5E).of_computation(module.entry)
        assert work.flops == flops
        assert work.cycles == pytest.approx(flops / (4 * 2 * 128 * 128))


def test_unknown_kernels_are_named() -> None:
    module = with_kernel("mine")
    (found,) = Kernels().list_calls(module)
    assert (found.name, found.flops, found.source) == ("mine", None, "")
    assert WorkCounter(module, device=V5E).of_computation(module.entry).cycles == 0
    # Under a known name, but not that kernel.
    (found,) = Kernels().list_calls(with_kernel("flash_attention", dtype="s8"))
    assert (found.name, found.flops, found.source) == ("flash_attention", None, "")
    with pytest.raises(
        ValueError, match="kernel_costs: the function for 'mine' gives nan, must be FLOPs"
    ):
        Kernels({"mine": lambda operands: float("nan")}).list_calls(module)


@pytest.mark.parametrize("costs", [3, {"mine": "3"}, {"mine": -1.0}, {3: 1.0}, {"": 1.0}])
def test_costs_that_are_none_are_refused(costs: Any) -> None:
    with pytest.raises(TypeError, match="kernel_costs"):
        dpj.preflight(lambda x: x, (jnp.ones(2),), "cpu:1", kernel_costs=costs)


def _attend(name: str) -> Any:
    if name == "flash":
        return flash_attention
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((128, 128))])
    kernel = splash_attention_kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "schedule"), [("flash", "1f1b"), ("splash", "dualpipe")])
def test_attention_kernels_are_counted(name: str, schedule: str) -> None:
    """The split backward goes through them, and their time is in that of a step."""

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        q, k, v = jnp.split(x @ params, 3, axis=-1)
        with jax.default_matmul_precision("default"):
            return x + _attend(name)(*(each[:, None] for each in (q, k, v)))[:, 0]

    model = dpj.Model(
        embed=lambda ends, ctx: ctx.microbatch * ends,
        block=block,
        head=lambda ends, x, ctx: (x * ends).astype(jnp.float32).mean(),
    )
    with jax.enable_x64(False):
        mesh = make_mesh(4)

        def aval(shape: tuple[int, ...], *spec: str) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

        params = {"ends": aval((128,)), "blocks": aval((4, 128, 384), "pipe")}
        step = dpj.value_and_grad(model, mesh=mesh, num_microbatches=8, schedule=schedule)
        args = params, aval((8, 128, 128))
        report = dpj.preflight(step, args, "tpu:v5e:2x2")
        more = dpj.preflight(step, args, "tpu:v5e:2x2", kernel_costs={name: 1e9})
    assert report.loop is not None
    assert report.loop.kind == ("steady" if schedule == "dualpipe" else "ramp")
    # Two beats are one trip; how often a loop of one trip runs the program does not say.
    assert report.loop.num_trips == 1 or schedule != "dualpipe"
    assert len(report.kernels) == 3
    assert all(kernel.flops for kernel in report.kernels)
    assert all(kernel.name in str(report) for kernel in report.kernels)
    assert {kernel.source for kernel in more.kernels} == {GIVEN}
    assert report.prediction.seconds is not None
    assert more.prediction.seconds is not None
    # A rank has 8 microbatches of a forward and two kernels backward.
    least = 8 * 3 * (1e9 - max(kernel.flops or 0 for kernel in report.kernels)) / 197e12
    assert more.prediction.seconds - report.prediction.seconds > least
