"""What a model means, the same for the pipeline and for `sequential`."""
