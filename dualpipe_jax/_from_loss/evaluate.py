"""Runs nodes of the graph on arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

from dualpipe_jax._from_loss.values import Literal, Node, Operand, Value, needed

Arrays = dict[Value, Any]


def evaluate(
    targets: Sequence[Operand],
    known: Arrays,
    literals: Mapping[tuple[Node, int], Any] | None = None,
) -> list[Any]:
    """Computes `targets`.

    Args:
      targets: Values.
      known: The arrays of inputs, and of any other values.
      literals: Arrays in place of literals, by node and number of the operand.
    """
    arrays, literals = dict(known), literals or {}

    def read(operand: Operand) -> Any:
        if isinstance(operand, Literal):
            return operand.value
        if operand not in arrays:
            assert operand.source is not None
            assert operand.source.kind == "const"
            return operand.source.array
        return arrays[operand]

    for node in needed(targets, known):
        args = [
            literals.get((node, number), read(operand))
            if isinstance(operand, Literal)
            else read(operand)
            for number, operand in enumerate(node.operands)
        ]
        arrays.update(zip(node.results, node.run(args), strict=True))
    return [read(target) for target in targets]
