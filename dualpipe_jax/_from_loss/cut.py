"""The pipeline of a traced loss, as `find` finds it."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax

from dualpipe_jax._from_loss.crossing import Slots
from dualpipe_jax._from_loss.free import Family, Recipe
from dualpipe_jax._from_loss.inputs import Inputs
from dualpipe_jax._from_loss.kinds import Kind
from dualpipe_jax._from_loss.terms import Terms
from dualpipe_jax._from_loss.values import Operand, Stack, Value, needed


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Holds the pipeline of a traced loss.

    Attributes:
      inputs: Its inputs.
      outputs: Its outputs: the loss, and the leaves of its metrics.
      structure: The structure of the loss and its metrics.
      terms: The outputs of layers and head.
      slots: The values that cross, by slot of x.
      kinds: The kinds of layers.
      recipes: For each kind, how its block makes the free values that it reads.
      families: The families of keys that travel in x, behind the slots.
      notes: Remarks for the user.
      doubts: The layers of which `check` cannot tell whether their kind's block is their program,
        and the equations at which it cannot.
    """

    inputs: Inputs
    outputs: list[Operand | Stack]
    structure: Any
    terms: Terms
    slots: Slots
    kinds: list[Kind]
    recipes: list[list[Recipe]]
    families: list[Family] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: dict[int, str] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.inputs.layers)

    @property
    def layout(self) -> tuple[str | None, ...]:
        """The name of the kind of every layer; None for layers of one kind."""
        if len(self.kinds) == 1:
            return (None,) * self.num_layers
        names = {i: f"kind_{n}" for n, kind in enumerate(self.kinds) for i in kind.indices}
        return tuple(names[layer] for layer in range(self.num_layers))

    @property
    def has_tracers(self) -> bool:
        """Whether the loss reads values of a trace around it."""
        read = [v for node in needed(self.terms.values) for v in node.reads]
        arrays = [v.source.array for v in read if v.source is not None]
        return any(isinstance(array, jax.core.Tracer) for array in arrays)

    @functools.cached_property
    def shared(self) -> frozenset[str]:
        """The paths of the parameters of the ends that layers read."""
        found: set[str] = set()
        for layer in (layer for kind in self.kinds for layer in kind.layers):
            read = {v for node in layer.nodes for v in node.reads}
            read.update(v for v in layer.targets if isinstance(v, Value))
            tokens = [layer.token(v) for v in read]
            found.update(token[1] for token in tokens if token and token[0] == "ends")
        return frozenset(found)
