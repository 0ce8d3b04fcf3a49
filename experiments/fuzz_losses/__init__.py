"""Random losses as people write them, each put through `dualpipe_jax.from_loss`."""
