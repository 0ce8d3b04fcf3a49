"""Groups the commands to `dualpipe-jax`."""

import click

from dualpipe_jax import __version__
from dualpipe_jax._cli.choose import choose
from dualpipe_jax._cli.measured import measured
from dualpipe_jax._cli.preflight import preflight
from dualpipe_jax._cli.refusal import Group
from dualpipe_jax._cli.search import search
from dualpipe_jax._cli.simulate import simulate
from dualpipe_jax._cli.timeline import timeline


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dualpipe-jax")
def main() -> None:
    """Pipeline-parallel training steps as one jitted JAX program."""


main.add_command(timeline)
main.add_command(simulate)
main.add_command(choose)
main.add_command(search)
main.add_command(preflight)
main.add_command(measured)
