"""Runs tables: one jitted program, whatever the schedule."""

from dualpipe_jax._executor.memory import MemoryReport as MemoryReport
from dualpipe_jax._executor.step import Step as Step
from dualpipe_jax._executor.work import Work as Work
from dualpipe_jax._leaves.explicit_axes import context_mesh as context_mesh
from dualpipe_jax._leaves.explicit_axes import platform_of as platform_of
