"""Proof on TPUs, compiled ahead of time, that compute hides the pipeline's communication."""
