"""What a pipelined step costs beside the same step without a pipeline, and JAX's usual recipe."""
