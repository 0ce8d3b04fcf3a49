"""How the model is trained: as a job of train_lm's trainer, over ranks, data and experts.

After each update the routers' biases move by the loads of the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import dualpipe_jax as dpj
from experiments.deepseek_mini import dispatch, model
from experiments.deepseek_mini.model import DeepSeekMini
from experiments.deepseek_mini.report import columns, to_row
from experiments.train_lm import flags
from experiments.train_lm.trainer.mesh import PIPE, batch_axes, with_fsdp
from experiments.train_lm.trainer.run import Job

EXPERT = "expert"


def make_job(
    sizes: DeepSeekMini,
    mesh: Mesh,
    schedule: Any,
    *,
    num_microbatches: int,
    bias_rate: float,
    context: int,
    batch_size: int,
    balanced: flags.Balanced = None,
) -> Job:
    """Makes the job.

    Args:
      sizes: The model.
      mesh: With the axes `pipe` and `expert`, and those of the data.
      schedule: The schedule.
      num_microbatches: Microbatches of a step, on each shard of the batch.
      bias_rate: By how much a step moves a router's bias.
      context: Bytes of a window.
      batch_size: Windows of a step.
      balanced: Whether layers are cut into stages by their costs.
    """
    shapes = jax.eval_shape(sizes.init, jax.random.key(0))
    options: Any = {
        "mesh": mesh,
        "num_microbatches": num_microbatches,
        "axis": PIPE,
        "batch_axes": batch_axes(mesh),
        "manual_axes": EXPERT,
        "param_specs": with_fsdp(sizes.param_specs(shapes, EXPERT), shapes, mesh),
        "layers_per_stage": balanced,
    }
    platform = mesh.devices.flat[0].platform
    pipelined = sizes.for_pipeline(EXPERT, is_ragged=dispatch.has_ragged(platform))
    value_and_grad = dpj.value_and_grad(
        pipelined, schedule=schedule, trainable=model.is_trained, **options
    )
    stages = ""
    if balanced:
        batch = jax.ShapeDtypeStruct((batch_size, context + 1), jnp.int32)
        stages = flags.show_layers(value_and_grad.memory(shapes, batch).layers_per_stage)
    evaluate = dpj.evaluate(pipelined, **options)
    # Metrics are sums over all of them.
    num_parts = num_microbatches * int(np.prod([mesh.shape[name] for name in batch_axes(mesh)]))

    def grad_fn(params: Any, batch: jax.Array, key: jax.Array) -> Any:
        (loss, metrics), grads = value_and_grad(params, batch)
        of_layers = metrics.blocks["experts"]
        figures = {name: value / num_parts for name, value in metrics.head.items()}
        figures |= {"load": of_layers["load"], "dropped": of_layers["dropped"].sum()}
        return (loss, figures), grads

    def balance(params: Any, figures: Any, is_finite: jax.Array) -> Any:
        return model.balance(params, figures["load"], rate=bias_rate * is_finite)

    return Job(
        mesh=mesh,
        init=sizes.init,
        param_specs=options["param_specs"],
        grad_fn=grad_fn,
        held_out_loss=lambda params, batch: evaluate(params, batch)[1].head["main"] / num_parts,
        describe=f"layers: {', '.join(sizes.layout)}{stages}",
        flops_per_token=sizes.flops_per_token(context),
        columns=columns(sizes.experts),
        to_row=to_row,
        after_update=balance,
    )
