"""One verifier after every pass: each raises `ScheduleError`, its rules are in its docstring."""

from dualpipe_jax._schedule.verify.allocation import verify_allocation as verify_allocation
from dualpipe_jax._schedule.verify.program import verify_program as verify_program
from dualpipe_jax._schedule.verify.steady import verify_steady as verify_steady
from dualpipe_jax._schedule.verify.tables import verify_tables as verify_tables
from dualpipe_jax._schedule.verify.timeline import verify_pairs as verify_pairs
from dualpipe_jax._schedule.verify.timeline import verify_timeline as verify_timeline
