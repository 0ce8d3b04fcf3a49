"""Replays one trip of a loop: when each collective starts, when it is waited for, who waits.

Compute takes the compiler's estimate of cycles, or its FLOPs at the published peak where there is
no estimate; what only some ranks run hides nothing, since the others wait. Asynchronous collectives
over the same mesh axis share its links and go one after the other. A loop inside counts as often as
it runs.

What is exposed is the time for which compute stands still: all of a synchronous collective, and of
an asynchronous one what its links need beyond the compute between its start and its done.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dualpipe_jax._devices import Device
from dualpipe_jax._preflight.collectives import Found, find_collectives
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.links import Network
from dualpipe_jax._preflight.work import Costs, Work, trip_count


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Tells of a collective.

    Attributes:
      kind: `"collective-permute"`, `"all-to-all"`, ...
      name: The name of the instruction that starts it.
      op_name: The JAX functions and scopes that it stands for.
      axes: The mesh axes along which it moves data.
      count: How often it runs in a trip of the loop.
      is_async: Whether compute goes on between its start and its done.
      num_bytes: Bytes of a device's operands; of an all-gather, of its result; of a ragged
        all-to-all, of the smaller of its two buffers, which is the most that may move
        where no row goes to two devices.
      flops: FLOPs of the matmuls between its start and its done.
      cycles: Cycles of what lies between them, as the compiler estimates; None without estimates.
      compute_seconds: How long that takes; None where neither cycles nor a peak are known.
      link_seconds: How long its bytes need on its links, at the published bandwidth; None where
        none is published.
      exposed_seconds: For how long compute stands still for it; None where times are unknown.
    """

    kind: str
    name: str
    op_name: str
    axes: tuple[str, ...]
    count: int
    is_async: bool
    num_bytes: int
    flops: float
    cycles: float | None
    compute_seconds: float | None
    link_seconds: float | None
    exposed_seconds: float | None

    @property
    def is_hidden(self) -> bool | None:
        """Whether it is asynchronous and costs no time; None where times are unknown."""
        if not self.is_async:
            return False
        return None if self.exposed_seconds is None else self.exposed_seconds == 0


class Replay:
    """Replays computations of one module."""

    def __init__(self, module: Module, network: Network):
        self._module = module
        self._costs = Costs(module, at_least=True)
        self._network = network

    def run(self, where: Computation, *, loops: bool = True) -> list[Collective]:
        """Lists the collectives of one run of a computation.

        Args:
          where: The computation.
          loops: Whether those of its loops are among them.
        """
        found = find_collectives(self._module, where)
        begun = {each.start.name: each for each in found}
        waited = {each.done.name: each for each in found if each.done is not None}
        clock, done_work = 0.0, Work()
        free: dict[tuple[str, ...], float] = {}  # when the links of these axes are free
        flights: dict[str, tuple[float, Work]] = {}  # when it arrives, and the work before it
        out: dict[str, list[Collective]] = {}
        for instruction in where.instructions:
            if instruction.name in waited:
                each = waited[instruction.name]
                arrives, before = flights[each.start.name]
                exposed = max(0.0, arrives - clock)
                between = Work(done_work.flops - before.flops, done_work.cycles - before.cycles)
                out[each.start.name] = [self._collective(each, between, exposed)]
                clock += exposed
            elif instruction.name in begun:
                each = begun[instruction.name]
                seconds = self._link_seconds(each) or 0.0
                axes = self._network.axes_of(each.collective)
                start = max([clock, *(t for a, t in free.items() if set(a) & set(axes))])
                free[axes] = start + seconds
                flights[instruction.name] = start + seconds, done_work
                out[instruction.name] = []
                if each.done is None:
                    out[instruction.name] = [
                        self._collective(each, Work(), start + seconds - clock)
                    ]
                    clock = start + seconds
            else:
                work = self._costs.of(instruction, where)
                inside = list(self._inside(instruction, where)) if loops else []
                out[instruction.name] = inside
                done_work += work
                clock += self.seconds(work) or 0.0
                clock += sum((each.exposed_seconds or 0.0) * each.count for each in inside)
        return [each for collectives in out.values() for each in collectives]

    def seconds(self, work: Work) -> float | None:
        """Says how long compute takes; None where nothing is known of the device."""
        device = self._network.device
        if device is None:
            return None
        if device.clock is not None:
            return work.cycles / device.clock
        return work.flops / device.peak_flops

    def _inside(self, instruction: Instruction, where: Computation) -> Iterator[Collective]:
        """Yields the collectives in the body of a loop and in the branches of a conditional."""
        if instruction.opcode not in ("while", "conditional", "call"):
            return
        trips = 1
        if instruction.opcode == "while":
            trips = trip_count(self._module, instruction, where) or 1
        for callee in self._module.callees(instruction):
            for each in self.run(callee):
                yield replace(each, count=each.count * trips)

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
        )
