"""The parts of `dualpipe_jax.nnx`: a module taken apart into layers and the rest, and its calls."""
