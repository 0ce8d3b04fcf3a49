"""Proof before the hardware is there: compile a step ahead of time and read what became of it."""

from dualpipe_jax._preflight.options import CompilerOption as CompilerOption
from dualpipe_jax._preflight.options import compiler_options as compiler_options
from dualpipe_jax._preflight.options import explain_options as explain_options
from dualpipe_jax._preflight.preflight import preflight as preflight
from dualpipe_jax._preflight.report import Report as Report
