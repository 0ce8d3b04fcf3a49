"""Choices -> the output of `dualpipe-jax choose`."""

from collections.abc import Sequence
from dataclasses import asdict

import click

from dualpipe_jax._cli.options import show_overlap
from dualpipe_jax._cli.table import print_call, print_table, print_text
from dualpipe_jax._costs import format_bytes
from dualpipe_jax._predict import Choice, Costs, LayerBytes, ParameterBytes, Transformer
from dualpipe_jax._schedule.named import short_name

_SEVERAL = "microbatches"  # a column where choices differ in it
_HOST = "host"  # a column where its memory is given
_HEAD = (
    *("", "schedule", _SEVERAL, "overlap", "step", "against best", "idle", "memory", _HOST),
    "why",
)
_LEFT = ("schedule", "overlap", "why")
_FULL = "full backwards"
_NOTES = (
    "in brackets: stages a rank, if not 2, and weight grads that rank r defers, if not r;",
    "uneven: ranks with less work than the busiest; bubble: the busiest waits for values it needs;",
    "false waits: for values not needed yet, or never; recomputed: for deferred weight grads;",
    "full backwards: weight grads run with the input grads that they follow, layer by layer",
)


def to_object(choice: Choice) -> dict[str, object]:
    """Makes the JSON object of a choice."""
    made = choice.simulation
    found: dict[str, object] = {
        "schedule": made.schedule,
        "microbatches": made.num_microbatches,
        "execution": asdict(choice.execution),
        "layers_per_stage": choice.layers_per_stage,
        "fits": choice.fits,
        "tight": choice.is_tight,
        "makespan": made.makespan,
        "idle_share": made.idle_share,
        "losses": choice.losses,
        "memory": choice.num_bytes,
        "terms": {term.name: term.num_bytes for term in choice.terms},
        "why": choice.why,
    }
    return {**found, "host_bytes": choice.host_bytes} if choice.host_memory else found


def print_choices(
    choices: list[Choice],
    model: Transformer,
    layer: LayerBytes,
    parameters: ParameterBytes,
    costs: Costs,
    transfer: float,
    *,
    more_notes: Sequence[str] = (),
) -> None:
    """Prints the choices, the model's sizes and costs, the first one's memory, and its call."""
    best = choices[0]
    notes = _sizes_and_costs(best, model, layer, parameters, costs, transfer)
    rows = [_row(choice, place, best) for place, choice in enumerate(choices, start=1)]
    has = {_SEVERAL: best.is_one_of_several, _HOST: bool(best.host_memory)}
    shown = [title for title in _HEAD if has.get(title, True)]
    print_table(
        shown,
        [[row[_HEAD.index(title)] for title in shown] for row in rows],
        notes=(*notes, *_NOTES, *more_notes),
        left=[shown.index(title) for title in _LEFT],
        optional=("against best", "idle", *(h for h in (_HOST,) if has[h]), "memory", "overlap"),
        last_below=True,
    )
    made = best.simulation
    click.echo()
    print_text(f"memory of a rank, {made.schedule}, {best.execution}:")
    for term in best.terms:
        if term.num_bytes:
            print_text(term.why, after=f"  {term.name:15}  {format_bytes(term.num_bytes):>8}  ")
    if best.fits or best.is_tight:
        split = best.layers_per_stage
        arguments = [
            "model",
            "mesh=mesh",
            f"num_microbatches={made.num_microbatches}",
            f'schedule="{made.schedule}"',
            *([] if split is None else [f"layers_per_stage={split}"]),
            f'remat="{model.remat}"',
            f"execution=dpj.{best.execution!r}",
            f"costs=dpj.{best.costs!r}",
        ]
        click.echo()
        print_call("dpj.value_and_grad", arguments)


def _row(choice: Choice, place: int, best: Choice) -> tuple[str, ...]:
    made = choice.simulation
    slower = made.makespan / best.simulation.makespan - 1
    return (
        str(place) if choice.fits else "tight" if choice.is_tight else "-",
        short_name(made.schedule),
        str(made.num_microbatches),
        show_overlap(choice.execution),
        f"{made.makespan:.4g}",
        f"{slower:+.1%}" if choice is not best else "",
        f"{made.idle_share:.1%}",
        format_bytes(choice.num_bytes),
        format_bytes(choice.host_bytes),
        choice.why if choice.execution.split_backward else f"{_FULL}; {choice.why}",
    )


def _sizes_and_costs(
    choice: Choice,
    model: Transformer,
    layer: LayerBytes,
    parameters: ParameterBytes,
    costs: Costs,
    transfer: float,
) -> list[str]:
    made = choice.simulation
    sizes = f"ranks {made.num_ranks}, microbatches {made.num_microbatches}, {model.layers} layers"
    sizes += f" of {parameters.layer / 1e6:,.4g} M parameters, {parameters.ends / 1e6:,.4g} M in"
    times = f"costs of a rank's layers: F={costs.forward:.3g}, I={costs.input_grad:.3g}, "
    times += f"W={costs.weight_grad:.3g}, fused {costs.full_backward_share * costs.backward:.3g}; "
    times += f"transfer {transfer:.3g}, embed {costs.embed:.3g}, head {costs.head:.3g}"
    if costs.recompute:
        times += f", recomputing a deferred W {costs.recompute:.3g}"
    if choice.host_memory:
        times += f"; the copy of an activation {costs.spill:.3g}"
    kept = ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(num_bytes)}"
        for name, num_bytes in vars(layer).items()
        if name != "working"
    )
    return [f"{sizes} the ends", times, f"one layer and microbatch: {kept}"]
