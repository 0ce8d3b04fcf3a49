"""The options that all commands about a schedule have."""

import click

from dualpipe_jax import schedules

ranks = click.option(
    "--ranks", type=int, default=8, show_default=True, help="Devices of the pipeline."
)
microbatches = click.option(
    "--microbatches", type=int, default=20, show_default=True, help="Of one step."
)
timetable = click.option(
    "--timetable",
    type=click.Choice(schedules.timetables()),
    default="shortest",
    show_default=True,
    help="aligned: there is a run of beats, in which every rank runs a pair. two-tick, for GPUs: "
    "what a rank makes is read by another in the second tick after.",
)
