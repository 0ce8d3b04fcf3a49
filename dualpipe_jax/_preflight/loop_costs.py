"""The steady loop, or the scan over ticks, of a compiled step -> the costs of its actions.

The body of the steady loop holds a few beats in straight-line code: each action's cycles are summed
up by the names in the program. In the body of the scan over ticks every action has a part of its
own, a loop or a conditional that ranks with another action pass over; a full backward in
straight-line halves has two. The instructions beside the parts, such as those that store received
values, run in every tick.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from dualpipe_jax import _scopes
from dualpipe_jax._predict import Costs
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.loops import FoundLoop, beats_per_trip
from dualpipe_jax._preflight.timing import Collective
from dualpipe_jax._preflight.work import (
    OTHER,
    WorkCounter,
    action_of,
    count_parts,
    most_trips,
    work_by_action,
)

# A part is of the first of these that it holds: a full backward holds an I and a W.
_KINDS = (
    _scopes.FULL_BACKWARD,
    _scopes.FORWARD,
    _scopes.INPUT_GRAD,
    _scopes.WEIGHT_GRAD,
    _scopes.EMBED,
    _scopes.EMBED_GRAD,
    _scopes.HEAD,
)
_PARTS = ("while", "conditional")


def costs_of_loop(
    module: Module,
    loop: FoundLoop,
    counter: WorkCounter,
    collectives: Iterable[Collective],
    *,
    clock: float,
    stages_per_rank: float,
) -> Costs | None:
    """Finds the cycles that the simulator counts for each action.

    Args:
      module: The program.
      loop: Its steady loop, or its scan over ticks.
      counter: The work of its instructions.
      collectives: The collectives of one trip.
      clock: Cycles a second.
      stages_per_rank: A rank's whole share of the layers, in stages of the largest size.

    Returns:
      The costs; None if the loop has no forward, or no backward.
    """
    exposed = _exposed_cycles(collectives, clock)
    if loop.kind == "steady":
        work = work_by_action(module, counter, loop.body)
        cycles = {
            action: (work[action].cycles if action in work else 0.0) + exposed.get(action, 0.0)
            for action in {*work, *exposed}
        }
        return _costs_of_beats(module, loop, cycles, stages_per_rank=stages_per_rank)
    return _costs_of_ticks(
        module, loop.body, counter, exposed=exposed, stages_per_rank=stages_per_rank
    )


def _exposed_cycles(collectives: Iterable[Collective], clock: float) -> dict[str, float]:
    """Sums up by action for how many cycles of a trip the model's own collectives are exposed.

    The simulator counts the transfers between ranks itself.
    """
    exposed: dict[str, float] = defaultdict(float)
    for collective in collectives:
        action = action_of(collective.op_name)
        if action != _scopes.SEND:
            exposed[action] += (collective.exposed_seconds or 0) * collective.count * clock
    return exposed


def _costs_of_beats(
    module: Module, loop: FoundLoop, cycles: Mapping[str, float], *, stages_per_rank: float
) -> Costs | None:
    """Makes costs from the cycles of each action in a trip of the steady loop."""
    total, named = sum(cycles.values()), sum(cycles.values()) - cycles.get(OTHER, 0.0)
    if not cycles.get(_scopes.FORWARD):
        return None
    # Instructions without an action's name (copies, reads and writes of slots) count for all.
    scale, num_beats = total / named, beats_per_trip(module, loop)

    def of_beat(action: str, num_parts: float) -> float:
        return cycles.get(action, 0.0) * scale / num_parts

    forward, input_grad, weight_grad = (
        of_beat(action, num_beats) * stages_per_rank
        for action in (_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD)
    )
    # The ends belong to few ranks: they have a part in some beats of a trip, not in all.
    embed, head = (
        sum(
            of_beat(action, count_parts(module, loop.body, action) or num_beats)
            for action in actions
        )
        for actions in ((_scopes.EMBED, _scopes.EMBED_GRAD), (_scopes.HEAD,))
    )
    return Costs.with_whole_ends(
        forward=forward, input_grad=input_grad, weight_grad=weight_grad, embed=embed, head=head
    )


def _costs_of_ticks(
    module: Module,
    body: Computation,
    counter: WorkCounter,
    *,
    exposed: Mapping[str, float],
    stages_per_rank: float,
) -> Costs | None:
    """Makes costs from the parts in the body of the scan over ticks."""
    parts: dict[str, list[float]] = defaultdict(list)
    inside = {i: _names_in(module, i) for i in body.instructions if i.opcode in _PARTS}
    waits = {
        action: cycles / max(1, sum(action in names for names in inside.values()))
        for action, cycles in exposed.items()
    }
    beside = 0.0
    for instruction in body.instructions:
        names, cycles = inside.get(instruction, set()), counter.of(instruction, body).cycles
        kind = next((kind for kind in _KINDS if kind in names), None)
        if kind is None:
            beside += cycles
        else:
            layers = most_trips(instruction)
            parts[kind].append(cycles + layers * sum(waits.get(name, 0.0) for name in names))
    num_chunks = len(parts[_scopes.FORWARD])
    has_backward = parts[_scopes.INPUT_GRAD] or parts[_scopes.FULL_BACKWARD]
    if not sum(parts[_scopes.FORWARD]) or not has_backward:
        return None

    def of_chunk(cycles: list[float], *, ticks: int = 1) -> float:
        return (sum(cycles) / num_chunks + ticks * beside) * stages_per_rank

    # A deferred W, which may recompute, has a part beside that of a W at once, and costs more.
    weight_grads = sorted(parts[_scopes.WEIGHT_GRAD])
    at_once, deferred = weight_grads[:num_chunks], weight_grads[num_chunks:]
    both = parts[_scopes.FULL_BACKWARD]
    full_backward = of_chunk(both, ticks=2) if both else None
    # Where all backwards are full ones, it does not matter how much of them is I.
    share = (full_backward or 0.0) / 2
    input_grads = parts[_scopes.INPUT_GRAD]
    return Costs.with_whole_ends(
        forward=of_chunk(parts[_scopes.FORWARD]),
        input_grad=of_chunk(input_grads) if input_grads else share,
        weight_grad=of_chunk(at_once) if at_once else share,
        embed=sum(parts[_scopes.EMBED]) + sum(parts[_scopes.EMBED_GRAD]),
        head=sum(parts[_scopes.HEAD]),
        recompute=of_chunk(deferred) - of_chunk(at_once) if deferred else 0.0,
        full_backward=full_backward,
    )


def _names_in(module: Module, instruction: Instruction) -> set[str]:
    """Lists the actions in a part, with that of a full backward if they belong to one."""
    names = {
        inner.op_name for callee in module.callees(instruction) for inner in module.within(callee)
    }
    is_full = any(_scopes.FULL_BACKWARD in name for name in names)
    return {action_of(name) for name in names} | ({_scopes.FULL_BACKWARD} if is_full else set())
