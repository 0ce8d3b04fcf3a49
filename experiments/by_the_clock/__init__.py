"""Seconds a step of every schedule, by the clock, on ranks that sleep instead of computing."""
