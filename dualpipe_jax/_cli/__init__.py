"""The command line: one file a command, put together in `group`. Starts without JAX."""

from dualpipe_jax._cli.group import main as main
