"""Lets `python -m dualpipe_jax` be the command line `dualpipe-jax`."""

from dualpipe_jax._cli import main as main

if __name__ == "__main__":
    main(prog_name="dualpipe-jax")
