"""`dualpipe-jax choose`: which schedule is predicted to be the fastest within a memory limit."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from dualpipe_jax import schedules
from dualpipe_jax._cli import options
from dualpipe_jax._cli.choices import print_choices, to_object
from dualpipe_jax._cli.host import Host
from dualpipe_jax._cli.quantities import HostMemory, Numbers, Rate, Size, parse_costs, read_costs
from dualpipe_jax._cli.refusal import Command, Refusal
from dualpipe_jax._costs import format_bytes
from dualpipe_jax._devices import KNOWN, V5E, device_figures
from dualpipe_jax._predict import (
    HEADROOM,
    TRANSFER,
    Candidate,
    Choice,
    Costs,
    LayerBytes,
    ParameterBytes,
    Transformer,
    choices_of,
    memory_of,
    rank,
)
from dualpipe_jax._predict.transformer import ATTENTIONS, REMATS
from dualpipe_jax._schedule.named import variants_of
from dualpipe_jax._schedule.stage_sizes import BALANCED, stage_sizes

_HEADS = 32
_MEMORY = 80 * 2.0**30
_LAYER_BYTES = ("x", "residual", "weight_residual", "stash", "deferred", "working")


@click.command(cls=Command)
@options.ranks
@click.option(
    "--microbatches",
    type=Numbers(),
    default="20",
    show_default=True,
    help="Microbatches of a step. Of several numbers, with commas, each divides the windows of the "
    "first one; --microbatch-size, --costs and --transfer are those of the first.",
)
@click.option("--layers", type=int, default=64, show_default=True, help="Layers of the model.")
@options.layers_per_stage(default=BALANCED)
@click.option(
    "--memory",
    type=Size(),
    help="Memory of a device, for the step. By default that of --device, else 80GiB.",
)
@click.option(
    "--headroom",
    type=float,
    default=HEADROOM,
    show_default=True,
    help="The share of the memory that is left to the compiler's own temporaries.",
)
@click.option(
    "--host-memory",
    type=HostMemory(),
    default="0",
    show_default=True,
    help="Memory of the host for each device, such as 256GiB: activations that do not fit on the "
    "device may wait there.",
)
@click.option(
    "--host-link",
    type=Rate(),
    help="Bytes a second between a device and its host, each way, such as 32GB/s. By default the "
    "figure of --device.",
)
@click.option(
    "--device",
    type=click.Choice([device.name for device in KNOWN]),
    help="The device, whose published memory, link to the host and peak are meant. Without it "
    f"copies run beside compute at the peak of a {V5E.name}.",
)
@click.option(
    "--costs",
    help="F=..,I=..,W=.. of a rank's share of the layers, and B=.. of fused I and W, if not the "
    "sum. By default from the sizes.",
)
@click.option(
    "--costs-from",
    type=click.Path(path_type=Path, dir_okay=False),
    help='A JSON file with the same costs, {"costs": {"forward": .., "input_grad": .., ..}}.',
)
@click.option("--embed", type=float, help="Cost of the embedding's forward. By default 0.")
@click.option("--head", type=float, help="Cost of the head's forward. By default from the sizes.")
@click.option(
    "--transfer", type=float, help="How long a value travels to a neighbour. By default F / 10."
)
@click.option("--width", type=int, default=4096, show_default=True, help="Width of x.")
@click.option("--context", type=int, default=4096, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--microbatch-size",
    type=int,
    default=1,
    show_default=True,
    help="Sequences of a microbatch, on one device.",
)
@click.option("--vocabulary", type=int, default=32_000, show_default=True)
@click.option(
    "--heads",
    type=int,
    help="Heads of attention. By default 32, or the largest number that divides 32 and the width.",
)
@click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    default="fused",
    show_default=True,
    help="plain keeps the scores of attention.",
)
@click.option(
    "--remat",
    type=click.Choice(REMATS),
    default="none",
    show_default=True,
    help="Whether layers are recomputed.",
)
@click.option(
    "--activation-bytes", type=int, default=2, show_default=True, help="Bytes of an entry of x."
)
@click.option(
    "--parameter-bytes", type=float, default=2, show_default=True, help="Bytes of a parameter."
)
@click.option(
    "--gradient-bytes",
    type=float,
    default=4,
    show_default=True,
    help="Bytes of a gradient in the accumulators.",
)
@click.option(
    "--optimizer-bytes",
    type=float,
    default=12,
    show_default=True,
    help="Bytes of a parameter's optimizer state.",
)
@click.option(
    "--layer-parameters",
    type=float,
    help="Parameters of a layer. By default 12 width^2, and norms.",
)
@click.option(
    "--ends-parameters",
    type=float,
    help="Parameters outside the layers. By default 2 width x vocabulary, and a norm.",
)
@click.option("--x-bytes", type=Size(), help="Bytes of x. By default from the sizes.")
@click.option(
    "--residual-bytes", type=Size(), help="Bytes kept from F to I, of a layer and microbatch."
)
@click.option("--weight-residual-bytes", type=Size(), help="Bytes kept from F to W.")
@click.option("--stash-bytes", type=Size(), help="Bytes kept from I to W.")
@click.option(
    "--deferred-bytes", type=Size(), help="Bytes kept from I to a deferred W, under remat."
)
@click.option("--working-bytes", type=Size(), help="Bytes of the largest value in no buffer.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
)
def choose(
    ranks: int,
    microbatches: tuple[int, ...],
    layers: int,
    layers_per_stage: Any,
    memory: float | None,
    headroom: float,
    host_memory: float,
    host_link: float | None,
    device: str | None,
    costs: str | None,
    costs_from: Path | None,
    embed: float | None,
    head: float | None,
    transfer: float | None,
    layer_parameters: float | None,
    ends_parameters: float | None,
    parameter_bytes: float,
    gradient_bytes: float,
    optimizer_bytes: float,
    output_format: str,
    **sizes: Any,
) -> None:
    """Rank the schedules by predicted step time within a memory limit.

    Memory is that of the slots, copies and accumulators that the compiled program holds, at the
    bytes of a transformer of these sizes, or as given; XLA's own temporaries come on top, and have
    the headroom. The step's time is replayed as by `simulate`. Arithmetic, not a measurement.
    """
    given_bytes = {name: sizes.pop(f"{name}_bytes") for name in _LAYER_BYTES}
    if sizes["heads"] is None:
        sizes["heads"] = math.gcd(_HEADS, sizes["width"])
    if not 0 <= headroom < 1:
        raise Refusal(f"--headroom {headroom}: must be a share, at least 0 and less than 1")
    if len(microbatches) > 1 and any(value is not None for value in given_bytes.values()):
        raise Refusal(
            f"--microbatches {','.join(map(str, microbatches))}: must be one number where the "
            "bytes of a microbatch are given"
        )
    windows = microbatches[0] * sizes.pop("microbatch_size")
    figures = None if device is None else device_figures(device)
    if memory is None:
        memory = _MEMORY if figures is None else figures.memory
    host = Host.of(host_memory, host_link, figures)

    def setting_of(number: int) -> _Setting:
        model = Transformer(layers=layers, microbatch_size=_share_of(windows, number), **sizes)
        layer = _layer_bytes(model, given_bytes)
        found = _costs(model, ranks, costs, costs_from, embed=embed, head=head)
        return _Setting.make(
            model,
            costs=host.with_copies(found, model, layer, num_ranks=ranks),
            parameters=ParameterBytes(
                layer=model.layer_parameters if layer_parameters is None else layer_parameters,
                ends=model.ends_parameters if ends_parameters is None else ends_parameters,
                parameter=parameter_bytes,
                gradient=gradient_bytes,
                optimizer=optimizer_bytes,
            ),
            layer=layer,
            transfer=transfer,
            factor=microbatches[0] / number,  # to the unit of the first number
        )

    try:
        settings = {number: setting_of(number) for number in microbatches}
        limits = {"limit": memory, "headroom": headroom, "host_memory": host.memory}
        cases = _cases(settings, layers_per_stage, ranks=ranks, **limits)
        choices, errors = rank(cases, is_one_of_several=len(settings) > 1)
    except ValueError as error:
        raise Refusal(" ".join(str(error).split())) from error
    first = settings[microbatches[0]]
    if output_format == "json":
        result = {
            "ranks": ranks,
            "microbatches": microbatches[0] if len(microbatches) == 1 else microbatches,
            "layers": layers,
            "memory": memory,
            "headroom": headroom,
            **host.figures,
            "costs": first.costs.times,
            "transfer": first.transfer,
            "layer_bytes": vars(first.layer),
            "parameters": vars(first.parameters),
            "choices": [to_object(choice) for choice in choices],
        }
        click.echo(json.dumps(result, indent=2))
    else:
        of_best = settings[choices[0].simulation.num_microbatches]
        print_choices(
            choices,
            of_best.model,
            of_best.layer,
            of_best.parameters,
            of_best.costs,
            of_best.transfer,
            more_notes=host.notes,
        )
    for name, error in errors.items():
        click.echo(f"left out: {name}: {' '.join(str(error).split())}", err=True)
    if not (choices[0].fits or choices[0].is_tight):
        raise _nothing_fits(choices, memory, first.model.remat)


def _share_of(windows: int, number: int) -> int:
    """Divides the windows of a step into microbatches."""
    if windows % number:
        raise Refusal(
            f"--microbatches {number}: must divide the {windows} windows of a step, which are "
            "the first number of microbatches x --microbatch-size"
        )
    return windows // number


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """Holds a model with one number of microbatches, and predicts its schedules."""

    model: Transformer
    layer: LayerBytes
    parameters: ParameterBytes
    costs: Costs
    transfer: float

    @classmethod
    def make(
        cls, model: Transformer, *, costs: Costs, transfer: float | None, factor: float, **more: Any
    ) -> "_Setting":
        """Makes it of a model, with all times multiplied by a factor."""
        travels = costs.forward * TRANSFER if transfer is None else transfer
        return cls(model=model, costs=_scaled(costs, factor), transfer=travels * factor, **more)

    def choices(
        self,
        name: str,
        num_microbatches: int,
        ranks: int,
        layers_per_stage: Any,
        **limits: float,
    ) -> list[Choice]:
        """Predicts a schedule's time and memory."""
        sizes = {"num_ranks": ranks, "num_microbatches": num_microbatches}
        schedule = schedules.make(name, **sizes)
        candidate = Candidate(
            schedule=schedule,
            num_layers=self.model.layers,
            layers_per_stage=stage_sizes(
                layers_per_stage, num_stages=schedule.num_stages, where=""
            ),
            remat=self.model.remat,
            costs=self.costs,
            transfer=self.transfer,
        )
        terms_of = partial(memory_of, layer=self.layer, parameters=self.parameters)
        return choices_of(candidate, terms_of=terms_of, **limits)


def _cases(
    settings: dict[int, _Setting], layers_per_stage: Any, *, ranks: int, **limits: float
) -> Iterator[tuple[str, Callable[[], list[Choice]]]]:
    """Yields the name of each schedule in each setting, and a function that predicts its steps."""
    for number, setting in settings.items():
        where = f", {number} microbatches" if len(settings) > 1 else ""
        for known in schedules.names():
            for name in variants_of(known, num_ranks=ranks, num_layers=setting.model.layers):
                yield (
                    name + where,
                    partial(setting.choices, name, number, ranks, layers_per_stage, **limits),
                )


def _layer_bytes(model: Transformer, given: dict[str, float | None]) -> LayerBytes:
    """Makes the bytes of a layer as given, and else by the model's sizes."""
    by_sizes = vars(model.layer_bytes)
    return LayerBytes(**{n: by_sizes[n] if v is None else v for n, v in given.items()})


def _nothing_fits(choices: list[Choice], memory: float, remat: str) -> Refusal:
    """Makes the message if no choice fits."""
    least = min(choices, key=lambda choice: choice.num_bytes)
    or_remat = ", or --remat block" if remat == "none" else ""
    return Refusal(
        f"--memory {format_bytes(memory)}: nothing fits; the least is "
        f"{format_bytes(least.num_bytes)}, by {least.simulation.schedule}: take more ranks, "
        f"a smaller microbatch{or_remat}"
    )


def _costs(
    model: Transformer,
    ranks: int,
    text: str | None,
    path: Path | None,
    *,
    embed: float | None,
    head: float | None,
) -> Costs:
    """Makes costs as given, and else by the model's sizes."""
    if text is not None and path is not None:
        raise Refusal(f"--costs {text!r} and --costs-from {path}: give one of them")
    if ranks < 1:
        raise Refusal(f"--ranks {ranks}: must be at least 1")
    by_sizes: dict[str, Any] = vars(model.costs(ranks))
    given: dict[str, Any] = {}
    if text is not None:
        given = {"forward": 1.0, "input_grad": 1.0, "weight_grad": 1.0, **parse_costs(text)}
    elif path is not None:
        given = read_costs(path)
    if given:
        # The given costs are in another unit than those by the sizes.
        by_sizes = {"head": by_sizes["head"] * given["forward"]}
    given |= {name: v for name, v in (("embed", embed), ("head", head)) if v is not None}
    by_sizes |= given
    costs = Costs(**by_sizes)
    # A deferred W repeats the work of I, its forward included.
    return replace(costs, recompute=costs.input_grad if model.remat == "block" else 0.0)


def _scaled(costs: Costs, factor: float) -> Costs:
    """Multiplies all costs."""
    return Costs.of(None if number is None else number * factor for number in costs.numbers)
