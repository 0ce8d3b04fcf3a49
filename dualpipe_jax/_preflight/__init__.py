"""Compiles a step for hardware that need not be there, and reports on the compiled program.

`preflight` compiles, `analysis` reads the program: `hlo` parses it, `work`, `kernels` and
`collectives` count, `timing` replays a trip of the steady loop, `predict` a step.
"""

from dualpipe_jax._preflight.options import CompilerOption as CompilerOption
from dualpipe_jax._preflight.options import compiler_options as compiler_options
from dualpipe_jax._preflight.options import explain_options as explain_options
from dualpipe_jax._preflight.preflight import preflight as preflight
from dualpipe_jax._preflight.report import Report as Report
