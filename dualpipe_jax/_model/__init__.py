"""The meaning of a model, the same for the pipeline and for `sequential`."""
