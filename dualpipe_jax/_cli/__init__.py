"""The command line: a file for each command, and `group` for all. It starts without JAX."""

from dualpipe_jax._cli.group import main as main
