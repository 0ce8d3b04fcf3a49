"""Reads a `jax.profiler` trace of a step: which rank ran which action when. Without JAX.

One file an idea: `wire` (protobuf), `xspace` (events of a file), `program` (the compiled program in
it), `parts` (which part of the step an instruction is), `steps` (the runs of steps), `moments` (to
which action each moment belongs), `measured` (a run as a timetable).
"""

from dualpipe_jax._profile.measured import Measured as Measured
from dualpipe_jax._profile.measured import RankTimes as RankTimes
from dualpipe_jax._profile.measured import measure as measure
from dualpipe_jax._profile.moments import Segment as Segment
from dualpipe_jax._profile.steps import Step as Step
from dualpipe_jax._profile.steps import find_steps as find_steps
