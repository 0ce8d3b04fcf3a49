"""What the actions of a step in ticks cost, read off the scan over ticks.

In its body every action has a place of its own, a loop or a conditional that ranks with another one
pass over; a full backward in straight-line halves has two. What stands beside the places, such as
what arrives being stored, every tick takes.
"""

from collections import defaultdict
from collections.abc import Mapping

from dualpipe_jax import _scopes
from dualpipe_jax._predict import Costs
from dualpipe_jax._preflight import work
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.work import action_of

# In which order what stands in a place says what it is: a full backward has an I and a W.
_KINDS = (
    _scopes.FULL_BACKWARD,
    _scopes.FORWARD,
    _scopes.INPUT_GRAD,
    _scopes.WEIGHT_GRAD,
    _scopes.EMBED,
    _scopes.EMBED_GRAD,
    _scopes.HEAD,
)
_CALLS = ("while", "conditional")


def costs_of_ticks(
    module: Module,
    costs: work.WorkCounter,
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
        kind = next((kind for kind in _KINDS if kind in names), None)
        if kind is None:
            beside += cycles
        else:
            layers = work.most_trips(instruction)
            places[kind].append(cycles + layers * sum(waits.get(name, 0.0) for name in names))
    num_chunks = len(places[_scopes.FORWARD])
    has_backward = places[_scopes.INPUT_GRAD] or places[_scopes.FULL_BACKWARD]
    if not sum(places[_scopes.FORWARD]) or not has_backward:
        return None

    def of_chunk(cycles: list[float], *, ticks: int = 1) -> float:
        return (sum(cycles) / num_chunks + ticks * beside) * stages_per_rank

    # A W that is put off, which may recompute, has a place beside the one that is not.
    late = sorted(places[_scopes.WEIGHT_GRAD])
    at_once, put_off = late[:num_chunks], late[num_chunks:]
    both = places[_scopes.FULL_BACKWARD]
    full_backward = of_chunk(both, ticks=2) if both else None
    # Where all run as one, how much of it is I's does not matter.
    half = (full_backward or 0.0) / 2
    early = places[_scopes.INPUT_GRAD]
    return Costs.with_whole_ends(
        forward=of_chunk(places[_scopes.FORWARD]),
        input_grad=of_chunk(early) if early else half,
        weight_grad=of_chunk(at_once) if at_once else half,
        embed=sum(places[_scopes.EMBED]) + sum(places[_scopes.EMBED_GRAD]),
        head=sum(places[_scopes.HEAD]),
        recompute=of_chunk(put_off) - of_chunk(at_once) if put_off else 0.0,
        full_backward=full_backward,
    )


def _inside(module: Module, instruction: Instruction) -> set[str]:
    """The actions in a loop or conditional, and whether they are those of a full backward."""
    names = {
        each.op_name for callee in module.callees(instruction) for each in module.within(callee)
    }
    is_full = any(_scopes.FULL_BACKWARD in name for name in names)
    return {action_of(name) for name in names} | ({_scopes.FULL_BACKWARD} if is_full else set())
