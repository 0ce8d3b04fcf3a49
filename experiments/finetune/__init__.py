"""Trains published models of the Hugging Face format: weights in, weights out."""
