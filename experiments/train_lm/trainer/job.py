"""The records that `run` takes and gives: a model and its functions, a place, an outcome."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh
from rich.console import Console

from . import data
from .log import Row
from .state import Figures, GradFn, PyTree, is_matrix


@dataclass(frozen=True, kw_only=True)
class Place:
    """The devices of a run, and its text.

    Attributes:
      console: Prints on process 0.
      devices: Those of all processes.
      which: A line about them.
      text: Both sides.
    """

    console: Console
    devices: list[jax.Device]
    which: str
    text: data.Text


@dataclass(frozen=True, kw_only=True)
class Job:
    """Holds the model that an experiment trains, and its functions.

    Attributes:
      mesh: The mesh; rows of a batch are spread over all axes but the pipeline's.
      init: Makes the parameters of a key; gives their shapes alone if `load` is given.
      param_specs: Their specs over other axes than the pipeline's.
      grad_fn: Gives loss, figures and gradients.
      held_out_loss: Of parameters and a batch, a scalar.
      describe: A line about the model.
      flops_per_token: Those of the model, forward and backward.
      columns: Columns of the log that the experiment adds.
      to_row: Makes them of the figures.
      after_update: As for `state.make_step`.
      load: Reads the first parameters, given their shapes, dtypes and shardings, those of this run.
      frozen: Arrays that no step changes and no checkpoint holds, by name: further arguments of
        `grad_fn` and `held_out_loss`.
      is_decayed: Says for every parameter whether its weight decays.
    """

    mesh: Mesh
    init: Callable[[jax.Array], PyTree]
    param_specs: PyTree
    grad_fn: GradFn
    held_out_loss: Callable[..., jax.Array]
    describe: str
    flops_per_token: float
    columns: Sequence[str] = ()
    to_row: Callable[[Figures], Row] = lambda figures: {}
    after_update: Callable[[PyTree, Figures, jax.Array], PyTree] | None = None
    load: Callable[[PyTree], PyTree] | None = None
    frozen: Mapping[str, PyTree] = field(default_factory=dict)
    is_decayed: Callable[[PyTree], PyTree] = is_matrix


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run that is complete.

    Attributes:
      params: The parameters, sharded.
      rows: The rows of its log.
    """

    params: PyTree
    rows: list[Row]
