"""How the actions of a step were placed in ticks, and back from the name that its program has."""

from dataclasses import dataclass, fields

from dualpipe_jax import _scopes
from dualpipe_jax._costs import Costs, StageLayers
from dualpipe_jax._schedule.execution import Execution


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Holds all that decides in which ticks the actions of a schedule run.

    >>> placement = Placement(
    ...     costs=Costs(), layers=StageLayers.cut((2, 1)), execution=Execution(overlap=True)
    ... )
    >>> Placement.read(f"jit(step)/{placement.name}/while") == placement
    True

    Attributes:
      costs: The costs of actions: their times. (Those of kinds are in the layers' weights.)
      layers: The layers of the stages.
      execution: How the order became a program.
    """

    costs: Costs
    layers: StageLayers
    execution: Execution

    @property
    def name(self) -> str:
        """The scope of the step in the compiled program."""
        return _scopes.of_placement(
            _scopes.Placement(
                costs=self.costs.numbers,
                stages=self.layers.of_each,
                execution=tuple(vars(self.execution).values()),
            )
        )

    @classmethod
    def read(cls, op_name: str) -> "Placement | None":
        """Reads it off an instruction's name; None if that does not say."""
        found = _scopes.read_placement(op_name)
        if found is None:
            return None
        choices = (field.name for field in fields(Execution))
        return cls(
            costs=Costs.of(found.costs),
            layers=StageLayers.of(found.stages),
            execution=Execution(**dict(zip(choices, found.execution, strict=True))),
        )
