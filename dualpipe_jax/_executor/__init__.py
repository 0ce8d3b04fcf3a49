"""Runs tables: one jitted program, whatever the schedule."""

from dualpipe_jax._executor.memory import MemoryReport as MemoryReport
from dualpipe_jax._executor.step import Step as Step
