"""A compiled program -> its steady loop, the predicted time of a step, waits, and copies."""

from typing import NamedTuple

from dualpipe_jax._predict.waits import Waits
from dualpipe_jax._preflight.copies import Copy, find_copies
from dualpipe_jax._preflight.hlo import Module
from dualpipe_jax._preflight.kernels import Kernels
from dualpipe_jax._preflight.links import Network
from dualpipe_jax._preflight.loops import FoundLoop, beats_per_trip, find_loop
from dualpipe_jax._preflight.predict import (
    Prediction,
    count_runs_of_branches,
    find_num_trips,
    predict,
)
from dualpipe_jax._preflight.report import LoopTrip
from dualpipe_jax._preflight.timing import Collective, Replay, exposed_seconds, with_runs
from dualpipe_jax._preflight.work import (
    ActionWork,
    CompiledWork,
    WorkCounter,
    short_name,
    work_by_action,
)


class Analysis(NamedTuple):
    """The fields of a `Report` that are read off the program's text."""

    loop: LoopTrip | None
    prediction: Prediction
    waits: Waits | None
    copies: tuple[Copy, ...]


def analyze(module: Module, network: Network, kernels: Kernels | None = None) -> Analysis:
    """Finds the steady loop of a program, times it, and predicts the step.

    Args:
      module: The program.
      network: The devices, and the links between them.
      kernels: The costs of kernels.
    """
    counter = WorkCounter(module, kernels=kernels, device=network.device)
    found = find_loop(module, counter)
    copies = find_copies(module, counter, found)
    replay = Replay(module, network, kernels)
    if found is None:
        prediction, _ = predict(module, None, counter=counter, device=network.device)
        return Analysis(None, prediction, None, copies)
    collectives = replay.run(found.body)
    outside, outside_exposed = _outside_seconds(module, counter, replay, found)
    prediction, timetable = predict(
        module,
        found,
        counter=counter,
        collectives=collectives,
        outside_seconds=outside,
        outside_exposed_seconds=outside_exposed,
        device=network.device,
    )
    if timetable is not None:
        runs = count_runs_of_branches(module, found.body, network, timetable.tables)
        collectives = with_runs(collectives, runs)
    loop = _loop(module, found, counter, replay, collectives)
    return Analysis(loop, prediction, None if timetable is None else timetable.waits(), copies)


def _loop(
    module: Module,
    found: FoundLoop,
    counter: WorkCounter,
    replay: Replay,
    collectives: list[Collective],
) -> LoopTrip:
    """Describes one trip of the loop."""
    total, num_trips = counter.of_computation(found.body), find_num_trips(module, found)
    has_cycles = counter.has_cycles
    work = work_by_action(module, counter, found.body)
    order = sorted(work.items(), key=lambda item: (-item[1].cycles, -item[1].flops))
    return LoopTrip(
        kind=found.kind,
        name=found.instruction.name,
        num_trips=num_trips,
        num_beats=beats_per_trip(module, found) if found.kind == "steady" else None,
        flops=total.flops,
        cycles=total.cycles if has_cycles else None,
        compute_seconds=replay.seconds(total),
        exposed_seconds=exposed_seconds(collectives, num_trips=num_trips),
        actions=tuple(
            ActionWork(
                name=short_name(name),
                flops=of_action.flops,
                cycles=of_action.cycles if has_cycles else None,
            )
            for name, of_action in order
            if of_action != CompiledWork()
        ),
        collectives=tuple(one for one in collectives if not one.is_host_copy),
        host_copies=tuple(one for one in collectives if one.is_host_copy),
    )


def _outside_seconds(
    module: Module, counter: WorkCounter, replay: Replay, loop: FoundLoop
) -> tuple[float | None, float | None]:
    """Times the entry computation without the loop that holds the steady one, and its waits."""
    total = CompiledWork()
    for instruction in module.entry.instructions:
        inside = [inner.name for c in module.callees(instruction) for inner in module.within(c)]
        if loop.instruction.name not in (instruction.name, *inside):
            total += counter.of(instruction, module.entry)
    exposed = exposed_seconds(replay.run(module.entry, loops=False))
    compute = replay.seconds(total)
    return (None if exposed is None or compute is None else compute + exposed), exposed
