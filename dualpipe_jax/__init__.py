"""Compile a pipeline-parallel training step, DualPipe first of all, into one jitted program.

The public names are imported when they are first used (PEP 562), so that `import dualpipe_jax`,
and with it the command line, starts without JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualpipe_jax import linen as linen
    from dualpipe_jax import nnx as nnx
    from dualpipe_jax import optimizers as optimizers
    from dualpipe_jax import schedules as schedules
    from dualpipe_jax._api.choose import choose as choose
    from dualpipe_jax._api.evaluate import apply as apply
    from dualpipe_jax._api.evaluate import evaluate as evaluate
    from dualpipe_jax._api.make_mesh import make_mesh as make_mesh
    from dualpipe_jax._api.sequential import sequential as sequential
    from dualpipe_jax._api.shardings import shardings as shardings
    from dualpipe_jax._api.value_and_grad import value_and_grad as value_and_grad
    from dualpipe_jax._devices import Device as Device
    from dualpipe_jax._devices import device_figures as device_figures
    from dualpipe_jax._from_loss import LossModel as LossModel
    from dualpipe_jax._from_loss import from_loss as from_loss
    from dualpipe_jax._model.types import Aux as Aux
    from dualpipe_jax._model.types import Context as Context
    from dualpipe_jax._model.types import Metrics as Metrics
    from dualpipe_jax._model.types import Model as Model
    from dualpipe_jax._plot import plot_timeline as plot_timeline
    from dualpipe_jax._predict import Costs as Costs
    from dualpipe_jax._predict import Simulation as Simulation
    from dualpipe_jax._predict import simulate as simulate
    from dualpipe_jax._preflight import compiler_options as compiler_options
    from dualpipe_jax._preflight import preflight as preflight
    from dualpipe_jax._schedule.execution import Execution as Execution
    from dualpipe_jax.schedules import Schedule as Schedule
    from dualpipe_jax.schedules import Timeline as Timeline

__version__ = "0.1.0"

# Where each public name lives; None: the name is a module of its own.
_HOME = {
    "Aux": "_model.types",
    "Context": "_model.types",
    "Costs": "_predict",
    "Device": "_devices",
    "Execution": "_schedule.execution",
    "LossModel": "_from_loss",
    "Metrics": "_model.types",
    "Model": "_model.types",
    "Schedule": "schedules",
    "Simulation": "_predict",
    "Timeline": "schedules",
    "apply": "_api.evaluate",
    "choose": "_api.choose",
    "compiler_options": "_preflight",
    "device_figures": "_devices",
    "evaluate": "_api.evaluate",
    "from_loss": "_from_loss",
    "linen": None,
    "make_mesh": "_api.make_mesh",
    "nnx": None,
    "optimizers": None,
    "plot_timeline": "_plot",
    "preflight": "_preflight",
    "schedules": None,
    "sequential": "_api.sequential",
    "shardings": "_api.shardings",
    "simulate": "_predict",
    "value_and_grad": "_api.value_and_grad",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        value: object = import_module(f"{__name__}.{name}")
    else:
        value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # the next access is a plain one
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
