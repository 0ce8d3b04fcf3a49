"""The ground of every test: eight fake CPU devices, float64, a compilation cache on disk.

The devices and the cache go through the environment, so that a test's subprocess inherits them;
float64 does not, a subprocess runs as a user's would.
"""

import os
from importlib import metadata
from pathlib import Path

# JAX reads these when it is imported, which chex does.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).resolve().parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Compiling takes the time here, not running: the same HLO, less of LLVM.
flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# Release 0.10 spends a third of it on emitting fusions, which an older emitter does at once. It
# fuses and so rounds a few otherwise: where a test counts copies or compares bits of two programs,
# `tests.hlo.AS_EVER` has a user's.
if metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # errors only, none of XLA's chatter
# Searches of a few moves: compiling their loops would take longer than running them.
os.environ["NUMBA_DISABLE_JIT"] = "1"

import chex
import jax

chex.set_n_cpu_devices(8)  # before a backend starts
# Most numeric tests compare in float64; one about 32-bit behaviour names its dtypes.
jax.config.update("jax_enable_x64", True)

# Run by `make faults`, which names the folder.
collect_ignore = ["faults"]
