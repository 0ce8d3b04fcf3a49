"""Trains a published model with a pipeline schedule: weights of the Hugging Face format in and out.

In: a folder with config.json, safetensors and tokenizer.json; text. Out, in a folder: checkpoints,
log.csv, config.toml, loss.png, and `model`, a folder of the format that came in. See README.md
beside it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp

import dualpipe_jax as dpj
from experiments.finetune import families
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE, PositiveFloat, Refusal
from experiments.train_lm.trainer import processes, run
from experiments.train_lm.trainer.flags import Settings, config_of, training
from experiments.train_lm.trainer.log import Row, perplexity, plot
from experiments.train_lm.trainer.mesh import DATA, FSDP, PIPE, batch_axes, make_mesh

FOLDER = "runs/finetune"
# Peaks of the learning rate.
RATE, LORA_RATE = 1e-5, 1e-4


@flags.script("finetune")
@click.option(
    "--model",
    "model_path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="The folder of the model: config.json, *.safetensors, tokenizer.json.",
)
@click.option(
    "--lora-rank",
    type=POSITIVE,
    show_default="none: all parameters are trained",
    help="Train adapters of this rank, and no other parameter.",
)
@click.option(
    "--lora-alpha",
    type=PositiveFloat(),
    show_default="twice the rank",
    help="Adapters count alpha / rank times.",
)
@click.option("--schedule", type=click.Choice(dpj.schedules.names()), default="dualpipe")
@flags.layers_per_stage
@click.option("--ranks", type=POSITIVE, default=2, help="Devices of the pipeline.")
@click.option(
    "--microbatches", type=POSITIVE, default=4, help="Microbatches of a step, on each shard of it."
)
@click.option("--steps", type=POSITIVE, default=100, help="Updates of the parameters.")
@click.option("--batch-size", type=POSITIVE, default=8, help="Windows of text a step.")
@click.option(
    "--context", type=POSITIVE, default=128, help="Tokens that a prediction looks at, at most."
)
@click.option(
    "--learning-rate",
    type=PositiveFloat(),
    show_default=f"{LORA_RATE:g} for LoRA, else {RATE:g}",
    help="Its peak, after warm-up.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of all random draws."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="The dtype of parameters, compute and AdamW's moments; the model is written in its own.",
)
@click.option(
    "--remat",
    type=click.Choice(["none", "block"]),
    default="none",
    help="Whether the forward of a layer is computed again for its backward.",
)
@flags.text()
@training(default=FOLDER, results="logs, picture, model")
@click.pass_context
def main(ctx: click.Context, **given: Any) -> None:
    """Train a published Llama, Qwen3 or Gemma 3 model with a pipeline schedule.

    The model is written to `model` in the folder of the run; with LoRA the adapters are merged into
    its matrices. A run with --output goes on after the last checkpoint when the same command is
    given again.
    """
    config = config_of(ctx)
    rank = given["lora_rank"]
    if given["learning_rate"] is None:
        given["learning_rate"] = RATE if rank is None else LORA_RATE
    settings = Settings.take(given)
    path = given["model_path"]
    published = families.read(path)
    _require_fitting(settings, given, vocab_size=published.vocab_size)
    plan = _make_schedule(settings, given["schedule"], path, layers=published.num_layers)
    place = _find_place(settings, path, vocab_size=published.vocab_size)
    folder = run.open_folder(settings, config, place, default=FOLDER)
    console = place.console
    sizes = {PIPE: settings.ranks or 1, DATA: settings.data_devices, FSDP: settings.fsdp_devices}
    mesh = make_mesh(place.devices, sizes)
    console.print(f"text      {place.text.summary}\ndevices   {place.which}")
    tuning = _make_tuning(published, path, given, settings, mesh, plan)
    of_mesh = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    console.print(
        f"pipeline  {plan.name}, {of_mesh}, {settings.microbatches} microbatches\n"
        f"model     {path}: {published.family.model}, {published.num_layers} layers, "
        f"{tuning.num_params:,} parameters"
    )
    if tuning.weights.unknown:
        console.print(f"unchanged {', '.join(tuning.weights.unknown[:8])}: no part of the model")
    target = folder.path / "model"

    def at_stop(rows: list[Row]) -> None:
        plot(rows, folder.path / "loss.png", title=f"{published.family.model}, {plan.name}")

    def write(trained: Any) -> None:
        tuning.write(trained, target)
        merged = ", LoRA merged into its matrices" if rank else ""
        console.print(f"written   {target}: the model{merged}")

    with run.ending(folder, console) as requests:
        outcome = run.train(
            tuning.job(),
            settings,
            place,
            folder,
            config,
            requests=requests,
            at_stop=at_stop,
            if_ended=lambda trained: None if target.exists() else write(trained),
        )
        loss = [row["held_out_loss"] for row in outcome.rows if row.get("held_out_loss")][-1]
        console.print(f"held out  perplexity {perplexity(loss):.3f} a token ({loss:.3f} nats)")
        write(outcome.params)
        console.print(f"written   {folder.path}: log.csv, loss.png")


def _require_fitting(settings: Settings, given: dict[str, Any], *, vocab_size: int) -> None:
    parts, of_parts = settings.microbatches, "--microbatches"
    if settings.batch_devices > 1:
        parts *= settings.batch_devices
        of_parts = "--microbatches x --data-devices x --fsdp-devices ="
    alpha, rank = given["lora_alpha"], given["lora_rank"]
    flags.refuse(
        {
            **flags.uneven_batch(settings.batch_size, parts, of_parts),
            f"--lora-alpha {alpha}: needs --lora-rank": alpha is not None and rank is None,
        }
    )


def _make_schedule(settings: Settings, name: str, path: Path, *, layers: int) -> dpj.Schedule:
    """Makes the schedule, each stage with a layer."""
    ranks, microbatches = settings.ranks or 1, settings.microbatches
    with flags.refusing(f"--ranks {ranks}, --microbatches {microbatches}"):
        plan = dpj.schedules.make(name, num_ranks=ranks, num_microbatches=microbatches)
    stages = plan.num_stages
    few = f"--model {path}: its {layers} layers are fewer than the {stages} stages of {plan.name}"
    flags.refuse({f"{few} over {ranks} ranks; lower --ranks": layers < stages})
    return plan


def _find_place(settings: Settings, path: Path, *, vocab_size: int) -> run.Place:
    """Finds devices and text, and encodes it."""
    from experiments.finetune import tokens

    count = (settings.ranks or 1) * settings.batch_devices
    flag = f"--ranks {settings.ranks}"
    if settings.batch_devices > 1:
        flag = f"--ranks x devices of data = {count}"
    place = run.find_place(settings, count=count, flag=flag, fake=count)
    with processes.together():
        text = tokens.encode(
            place.text, path, vocab_size=vocab_size, min_length=settings.context + 1
        )
    return dataclasses.replace(place, text=text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """A model, its weights, and how it is trained.

    Attributes:
      model: The model as a pipeline.
      weights: Of its folder.
      mesh: The devices.
      pipeline: The options of the pipeline's functions.
      specs: Of all parameters, over other axes than the pipeline's.
      value_and_grad: Of all parameters; adapters alone have gradients where there are some.
      context: Tokens of a window.
      stages: The layers of each stage, as words, if they are balanced.
      frozen: The parameters that are not trained; none without LoRA.
    """

    model: Any
    weights: Any
    mesh: Any
    pipeline: dict[str, Any]
    specs: Any
    value_and_grad: Any
    context: int
    stages: str
    frozen: Any

    @property
    def num_params(self) -> int:
        """How many parameters there are, adapters included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.model.shapes))

    def job(self) -> run.Job:
        """Makes the trainer's job."""
        model, value_and_grad = self.model, self.value_and_grad
        evaluate = dpj.evaluate(model.pipelined, **self.pipeline)

        def grad_fn(params: Any, batch: jax.Array, key: jax.Array, **frozen: Any) -> Any:
            loss, grads = value_and_grad(model.join(params, **frozen), batch)
            return (loss, {}), model.split(grads)[0]

        def held_out_loss(params: Any, batch: jax.Array, **frozen: Any) -> jax.Array:
            return evaluate(model.join(params, **frozen), batch)

        lora = model.lora
        return run.Job(
            mesh=self.mesh,
            init=model.init,
            param_specs=model.split(self.specs)[0],
            grad_fn=grad_fn,
            held_out_loss=held_out_loss,
            describe=(f"LoRA of rank {lora.rank}" if lora else "all are trained") + self.stages,
            flops_per_token=model.flops_per_token(self.context),
            load=None if lora else self.weights.load,
            frozen={"frozen": self.frozen} if lora else {},
            # Published weights are where a run begins; they are not pulled to zero.
            is_decayed=lambda params: jax.tree.map(lambda _: False, params),
        )

    def write(self, trained: Any, path: Path) -> None:
        """Writes the folder of the model; with LoRA, adapters merged into its matrices."""
        params = self.model.join(trained, self.frozen)
        self.weights.save(path, params, mesh=self.mesh, merge=self.model.merge)


def _make_tuning(
    published: families.Published,
    path: Path,
    given: dict[str, Any],
    settings: Settings,
    mesh: Any,
    plan: dpj.Schedule,
) -> Tuning:
    """Imports tunix, traces the model, and finds its tensors."""
    try:
        from experiments.finetune.model import Lora, Model
        from experiments.finetune.weights import Folder, Weights

        rank = given["lora_rank"]
        lora = None if rank is None else Lora(rank=rank, alpha=given["lora_alpha"] or 2.0 * rank)
        rows = settings.batch_size // (settings.microbatches * settings.batch_devices)
        dtype = jnp.dtype(given["dtype"])
        length = settings.context + 1
        model = Model(published, dtype=dtype, lora=lora, rows=rows, length=length)
    except ModuleNotFoundError as error:
        raise Refusal(f"{error}; make finetune makes an environment that has it") from error
    with processes.together():
        weights = Weights(Folder(path), published, model.own)
    specs = model.specs(mesh)
    pipeline: dict[str, Any] = {
        "mesh": mesh,
        "num_microbatches": settings.microbatches,
        "axis": PIPE,
        "batch_axes": batch_axes(mesh),
        "param_specs": model.to_tree(specs),
        "layers_per_stage": given["layers_per_stage"],
    }
    value_and_grad = dpj.value_and_grad(
        model.pipelined,
        schedule=plan,
        trainable=model.is_trained,
        remat=given["remat"],
        **pipeline,
    )
    stages = ""
    if given["layers_per_stage"]:
        batch = jax.ShapeDtypeStruct((settings.batch_size, length), jnp.int32)
        stages = flags.show_layers(value_and_grad.memory(model.shapes, batch).layers_per_stage)
    _, frozen = model.split(model.shapes)
    if frozen:
        frozen = weights.load(model.placed(mesh, frozen, model.split(specs)[1]))
    return Tuning(
        model=model,
        weights=weights,
        mesh=mesh,
        pipeline=pipeline,
        specs=specs,
        value_and_grad=value_and_grad,
        context=settings.context,
        stages=stages,
        frozen=frozen,
    )


if __name__ == "__main__":
    main()
