"""Replays one trip of a loop: when each collective starts, when it is waited for, who waits.

Compute takes the compiler's estimate of cycles, or its FLOPs at the published peak where there is
no estimate. Asynchronous collectives that go the same way along a mesh axis share its links and go
one after the other. A loop inside counts as often as it runs.

What is exposed is the time for which compute stands still: all of a synchronous collective, and of
an asynchronous one what its links need beyond the compute between its start and its done.

A rank hides a transfer behind its own work. All ranks run the straight-line code, loops of a
known number of trips, and of a conditional at least the cheapest branch. Beside these a rank that
acts runs one of the `parts` that ranks run or pass over: the actions of a tick. So a trip is
replayed once for each part, with that one run and the others passed over, and the worst of these
replays counts: that of the rank that acts and has least to hide a collective behind. One more
replay, of a rank that passes over all parts, gives `most_exposed_seconds`. Without parts the two
are the same.
"""

from dataclasses import replace

from dualpipe_jax._devices import Device
from dualpipe_jax._preflight.collectives import Found, find_collectives
from dualpipe_jax._preflight.exposure import Collective, exposed_seconds
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.kernels import Kernels
from dualpipe_jax._preflight.links import Lane, Network
from dualpipe_jax._preflight.parts import Part, find_parts
from dualpipe_jax._preflight.work import Costs, Work, trip_count


class Replay:
    """Replays computations of one module."""

    def __init__(self, module: Module, network: Network, kernels: Kernels | None = None):
        self._module = module
        options = {"kernels": kernels, "device": network.device}
        self._costs = Costs(module, at_least=True, **options)
        self._most = Costs(module, **options)
        self._network = network

    def run(self, where: Computation, *, loops: bool = True) -> list[Collective]:
        """Lists the collectives of one run of a computation.

        Args:
          where: The computation.
          loops: Whether those of its loops and branches are among them.
        """
        found = find_collectives(self._module, where)
        inside = {}
        if loops:
            inside = {each.name: self._inside(each, where) for each in where.instructions}
        parts = find_parts(self._module, where, at_least=self._costs, at_most=self._most)
        passing = self._trip(where, found, inside, None)
        acting = [self._trip(where, found, inside, part) for part in parts] or [passing]
        out = []
        for instruction in where.instructions:
            name = instruction.name
            if name in passing:
                worst = max((trip[name] for trip in acting), key=_shortfall)
                out.append(replace(worst, most_exposed_seconds=passing[name].exposed_seconds))
            out += inside.get(name, [])
        return out

    def _trip(
        self,
        where: Computation,
        found: list[Found],
        inside: dict[str, list[Collective]],
        part: Part | None,
    ) -> dict[str, Collective]:
        """Replays a rank that runs a part, or none: its own collectives, by their starts."""
        begun = {each.start.name: each for each in found}
        waited = {each.done.name: each for each in found if each.done is not None}
        clock, done_work = 0.0, Work()
        free: dict[Lane, float] = {}  # when links that way along an axis are free
        flights: dict[str, tuple[float, Work]] = {}  # when it arrives, and the work before it
        out: dict[str, Collective] = {}
        for instruction in where.instructions:
            name = instruction.name
            if name in waited:
                each = waited[name]
                arrives, before = flights[each.start.name]
                exposed = max(0.0, arrives - clock)
                between = Work(done_work.flops - before.flops, done_work.cycles - before.cycles)
                out[each.start.name] = self._collective(each, between, exposed)
                clock += exposed
            elif name in begun:
                each = begun[name]
                seconds = self._link_seconds(each) or 0.0
                lanes = self._network.lanes_of(each.collective)
                arrives = max([clock, *(free.get(lane, 0.0) for lane in lanes)]) + seconds
                free |= dict.fromkeys(lanes, arrives)
                flights[name] = arrives, done_work
                if each.done is None:
                    out[name] = self._collective(each, Work(), arrives - clock)
                    clock = arrives
            else:
                work = self._costs.of(instruction, where)
                if part is not None and part.instruction == name:
                    work = part.work
                done_work += work
                clock += self.seconds(work) or 0.0
                clock += exposed_seconds(inside.get(name, []), choose=min) or 0.0
        return out

    def seconds(self, work: Work) -> float | None:
        """Says how long compute takes; None where nothing is known of the device."""
        device = self._network.device
        if device is None:
            return None
        if device.clock is not None:
            return work.cycles / device.clock
        return work.flops / device.peak_flops

    def _inside(self, instruction: Instruction, where: Computation) -> list[Collective]:
        """Lists the collectives in the body of a loop and in the branches of a conditional."""
        if instruction.opcode not in ("while", "conditional", "call"):
            return []
        out = []
        if instruction.opcode == "conditional":
            for number, branch in enumerate(self._module.branches(instruction)):
                for each in self.run(branch):
                    if each.conditional is None:
                        each = replace(each, conditional=instruction.name, branch=number)
                    out.append(each)
            return out
        trips = 1
        if instruction.opcode == "while":
            trips = trip_count(self._module, instruction, where) or 1
        for callee in self._module.callees(instruction):
            out += [replace(each, count=each.count * trips) for each in self.run(callee)]
        return out

    def _link_seconds(self, found: Found) -> float | None:
        return self._network.seconds(found.kind, found.collective, found.num_bytes)

    def _collective(self, found: Found, between: Work, exposed: float) -> Collective:
        device: Device | None = self._network.device
        link_seconds = self._link_seconds(found)
        has_cycles = device is not None and device.clock is not None
        return Collective(
            kind=found.kind,
            name=found.start.name,
            op_name=found.collective.op_name or found.start.op_name,
            axes=self._network.axes_of(found.collective),
            count=1,
            is_async=found.done is not None,
            num_bytes=found.num_bytes,
            flops=between.flops,
            cycles=between.cycles if has_cycles else None,
            compute_seconds=self.seconds(between),
            link_seconds=link_seconds,
            exposed_seconds=None if link_seconds is None else exposed,
            most_exposed_seconds=None if link_seconds is None else exposed,
        )


def _shortfall(each: Collective) -> tuple[float, float, float]:
    """Orders what replays say of a collective by how little of it is hidden."""
    return each.exposed_seconds or 0.0, -(each.cycles or 0.0), -each.flops
