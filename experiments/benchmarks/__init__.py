"""A pipelined step's cost beside the same step without a pipeline, and JAX's usual recipe."""
