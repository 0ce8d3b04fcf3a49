"""What the actions of a step in ticks cost, read off the scan over ticks.

In its body every action has a place of its own, a loop or a conditional that ranks with another one
pass over; a full backward in straight-line halves has two. What stands beside the places, such as
what arrives being stored, every tick takes.
"""

from collections import defaultdict
from collections.abc import Mapping

from dualpipe_jax import _scopes
from dualpipe_jax._preflight import work
from dualpipe_jax._preflight.actions import action_of
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._simulate import Costs

_ENDS = (_scopes.EMBED, _scopes.EMBED_GRAD, _scopes.HEAD)
# In which order a place's actions say what it is.
_KINDS = (_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD, *_ENDS)


def costs_of_ticks(
    module: Module,
    costs: work.Costs,
    body: Computation,
    *,
    exposed: Mapping[str, float],
    stages_per_rank: float,
) -> Costs | None:
    """Finds what the simulator is to count for each action, in cycles.

    Args:
      module: The program.
      costs: What its instructions cost.
      body: The body of the scan over ticks.
      exposed: By action, for how many cycles of a tick the model's own collectives are waited for.
      stages_per_rank: How many stages a rank has.

    Returns:
      The costs; None if the program has no forward and backward.
    """
    places: dict[str, list[float]] = defaultdict(list)
    inside = {i: _inside(module, i) for i in body.instructions if i.opcode in _CALLS}
    waits = {
        action: cycles / max(1, sum(action in names for names in inside.values()))
        for action, cycles in exposed.items()
    }
    beside = 0.0
    for instruction in body.instructions:
        names, cycles = inside.get(instruction, set()), costs.of(instruction, body).cycles
        kind = next((k for k in (_scopes.FULL_BACKWARD, *_KINDS) if k in names), None)
        if kind is None:
            beside += cycles
        else:
            layers = work.most_trips(instruction)
            places[kind].append(cycles + layers * sum(waits.get(name, 0.0) for name in names))
    num_chunks = len(places[_scopes.FORWARD])
    has_backward = places[_scopes.INPUT_GRAD] or places[_scopes.FULL_BACKWARD]
    if not sum(places[_scopes.FORWARD]) or not has_backward:
        return None

    def of_chunk(kind: str, *, ticks: int) -> float | None:
        if not places[kind]:
            return None
        return (sum(places[kind]) / num_chunks + ticks * beside) * stages_per_rank

    both = of_chunk(_scopes.FULL_BACKWARD, ticks=2)
    # A W that is put off, which may recompute, has a place beside the one that is not.
    recompute, each = 0.0, sorted(places[_scopes.WEIGHT_GRAD])
    if len(each) == 2 * num_chunks:
        places[_scopes.WEIGHT_GRAD] = each[:num_chunks]
        recompute = (sum(each[num_chunks:]) - sum(each[:num_chunks])) / num_chunks * stages_per_rank
    forward = of_chunk(_scopes.FORWARD, ticks=1) or 0.0
    input_grad = of_chunk(_scopes.INPUT_GRAD, ticks=1)
    weight_grad = of_chunk(_scopes.WEIGHT_GRAD, ticks=1)
    # Where all run as one, how much of it is I's does not matter.
    input_grad = (both or 0.0) / 2 if input_grad is None else input_grad
    weight_grad = (both or 0.0) / 2 if weight_grad is None else weight_grad
    embed, head = (sum(sum(places[kind]) for kind in kinds) for kinds in (_ENDS[:2], _ENDS[2:]))
    # The simulator is given what forwards cost, and counts gradients in proportion.
    return Costs(
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight_grad,
        embed=embed * forward / (forward + weight_grad),
        head=head * forward / (forward + input_grad + weight_grad),
        recompute=recompute,
        full_backward=both,
    )


_CALLS = ("while", "conditional")


def _inside(module: Module, instruction: Instruction) -> set[str]:
    """The actions in a loop or conditional, and whether they are those of a full backward."""
    names = {
        each.op_name for callee in module.callees(instruction) for each in module.within(callee)
    }
    is_full = any(_scopes.FULL_BACKWARD in name for name in names)
    return {action_of(name) for name in names} | ({_scopes.FULL_BACKWARD} if is_full else set())
