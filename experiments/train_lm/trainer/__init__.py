"""Trains for days: processes, data, checkpoints, signals and logs around a jitted step."""
