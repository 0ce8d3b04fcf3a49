"""The parts of `dualpipe_jax.linen`: modules as pure functions, their metadata, their layers."""
