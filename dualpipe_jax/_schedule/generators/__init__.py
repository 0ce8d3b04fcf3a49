"""One module a schedule: each makes a `Program` of any number of ranks and microbatches.

A new schedule is a module here and a line of `GENERATORS`, whose names the public functions, the
command line, `choose` and the tests take from it.
"""

from collections.abc import Callable

from dualpipe_jax._schedule.generators.chimera import chimera
from dualpipe_jax._schedule.generators.dualpipe import dualpipe
from dualpipe_jax._schedule.generators.dualpipev import dualpipev
from dualpipe_jax._schedule.generators.forward_only import forward_only as forward_only
from dualpipe_jax._schedule.generators.gpipe import gpipe
from dualpipe_jax._schedule.generators.interleaved_one_f_one_b import interleaved_one_f_one_b
from dualpipe_jax._schedule.generators.interleaved_paired import interleaved_paired
from dualpipe_jax._schedule.generators.interleaved_zb import interleaved_zb
from dualpipe_jax._schedule.generators.one_f_one_b import one_f_one_b
from dualpipe_jax._schedule.generators.v_half import v_half
from dualpipe_jax._schedule.generators.zb_h1 import zb_h1
from dualpipe_jax._schedule.ir import Program

# The schedules of a training step by their public names.
GENERATORS: dict[str, Callable[..., Program]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved-1f1b": interleaved_one_f_one_b,
    "zb-h1": zb_h1,
    "interleaved-zb": interleaved_zb,
    "interleaved-paired": interleaved_paired,
    "chimera": chimera,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
    "v-half": v_half,
}
