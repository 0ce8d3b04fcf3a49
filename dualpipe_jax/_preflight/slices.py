"""A program over several slices of TPUs -> one whose collectives are those of the whole mesh.

The TPU compiler makes one program for all slices, in which collectives inside a slice name devices
by their places there, in mesh order. Transfers between slices go over the hosts' network: a `send`
to the host and a `recv` from it, of which each has its kind and the devices' global ids in its
attributes. A permute whose pairs differ from slice to slice is divided: the pairs across slices
become a send and a recv, the others a conditional with a branch, `localizer`, for each slice.

Here each send becomes the start of its collective, and the recv's done its done: the send's own
done waits only until the host has the bytes. Each such conditional becomes a synchronous
collective, and all devices are places in the mesh. The compiler keeps no names of divided
collectives; they get those of the instructions that make their operands.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.collectives import is_collective
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.links import groups, source_target_pairs
from dualpipe_jax._preflight.work import OTHER, action_of

_PERMUTE = "collective-permute"
_KINDS = {
    "ONE_TO_ONE": _PERMUTE,
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "REDUCE_SCATTER": "reduce-scatter",
}
_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(r'_xla_megascale_target="?(\{[^"_]*\})')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')
# Ids of devices are the number of the slice, from 1, times this, plus the place in the slice.
_IDS_OF_A_SLICE = 100_000

_Devices = tuple[int, ...]


@dataclass(frozen=True)
class Slices:
    """Holds which devices of a mesh are in which slice.

    Attributes:
      members: The places in the mesh of the devices of each slice, in mesh order.
      places: The place in the mesh of each device, by its id.
    """

    members: tuple[_Devices, ...]
    places: dict[int, int]

    @classmethod
    def of(cls, devices: Sequence[Any]) -> "Slices":
        """Reads the slices off the devices of a mesh, in mesh order."""
        numbers = [getattr(device, "slice_index", None) or 0 for device in devices]
        members = (
            tuple(place for place, found in enumerate(numbers) if found == number)
            for number in sorted(set(numbers))
        )
        return cls(tuple(members), {device.id: place for place, device in enumerate(devices)})


def join_slices(module: Module, slices: Slices) -> Module:
    """Rewrites the collectives of a program over several slices as those of its mesh.

    Raises:
      ValueError: If the devices or the kind of a transfer between slices cannot be read.
    """
    return module if len(slices.members) == 1 else _Join(module, slices).run()


class _Join:
    """Rewrites one module."""

    def __init__(self, module: Module, slices: Slices):
        self._module = module
        self._slices = slices

    def run(self) -> Module:
        computations = {
            name: self._rewrite(computation)
            for name, computation in self._module.computations.items()
        }
        return Module(computations, computations[self._module.entry.name])

    def _rewrite(self, where: Computation) -> Computation:
        if where.name.startswith("localizer"):
            return where
        received = {_rendezvous(i): i for i in where.instructions if i.opcode == "recv"}
        sends = {_rendezvous(i): i for i in where.instructions if i.opcode == "send"}
        started = {received[key].name: sends[key] for key in sends if key in received}
        out = []
        for instruction in where.instructions:
            match instruction.opcode:
                case "send" if _TYPE.search(instruction.attributes):
                    recv = received.get(_rendezvous(instruction))
                    instruction = self._start(where, instruction, recv)
                case "send-done":
                    instruction = replace(instruction, opcode="after-all")
                case "recv-done" if instruction.operands[0] in started:
                    send = started[instruction.operands[0]]
                    kind, names = _kind_across(send), (send.name,)
                    instruction = replace(instruction, opcode=f"{kind}-done", operands=names)
                case "conditional" if _is_by_slice(self._module, instruction):
                    instruction = self._inside_slices(where, instruction)
                case _ if is_collective(instruction):
                    kind, data = instruction.opcode.removesuffix("-start"), instruction.operands[0]
                    name = self._name(where, data, kind, users_of=instruction)
                    devices = self._devices(instruction)
                    instruction = _among(instruction, *devices, op_name=name)
            out.append(instruction)
        return Computation(where.name, tuple(out), where.root_name)

    def _start(
        self, where: Computation, send: Instruction, recv: Instruction | None
    ) -> Instruction:
        """Makes the start of a collective across slices."""
        kind, data = _kind_across(send), send.operands[:1]
        sent = where.by_name[data[0]].shapes[:1] if data[0] in where.by_name else send.shapes[:1]
        name = self._name(where, data[0], kind, users_of=recv)
        start = replace(
            send,
            opcode=f"{kind}-start",
            operands=data,
            shapes=(*sent, *(() if recv is None else recv.shapes[:1])),
        )
        return _among(start, *self._devices_across(send), op_name=name)

    def _inside_slices(self, where: Computation, conditional: Instruction) -> Instruction:
        """Joins the collectives that a conditional has, one for each slice."""
        pairs: list[_Devices] = []
        joined: list[_Devices] = []
        kind = ""
        for branch, members in zip(
            self._module.branches(conditional), self._slices.members, strict=True
        ):
            inner = next(filter(is_collective, branch.instructions))
            kind = inner.opcode.removesuffix("-start")
            of_branch = source_target_pairs(inner)
            if of_branch is None:
                joined += _placed(groups(inner, len(members)), members)
            else:
                pairs += _placed(of_branch, members)
        data = conditional.operands[1]
        name = self._name(where, data, kind, users_of=conditional)
        collective = replace(conditional, opcode=kind, operands=(data,), attributes="")
        return _among(collective, pairs, joined, op_name=name)

    def _devices(self, collective: Instruction) -> tuple[list[_Devices], list[_Devices]]:
        """Finds the pairs of a collective inside slices, or its groups: the same in each slice."""
        pairs, members = source_target_pairs(collective), self._slices.members
        if pairs is not None:
            return [pair for each in members for pair in _placed(pairs, each)], []
        found = groups(collective, len(members[0]))
        return [], [group for each in members for group in _placed(found, each)]

    def _devices_across(self, send: Instruction) -> tuple[list[_Devices], list[_Devices]]:
        """Finds the pairs of a transfer across slices, or its groups."""
        found = _TARGET.search(send.attributes)
        target = found[1] if found else ""
        places = self._slices.places
        if "->" in target:
            pairs = re.findall(r"(\d+)->(\d+)", target)
            return [(places[int(source)], places[int(to)]) for source, to in pairs], []
        product = re.fullmatch(r"(\{[\d,:]+\})x(\{[\d,:]+\})", target)
        if product is not None:
            slices, devices = map(_numbers, product.groups())
            ids = [[_IDS_OF_A_SLICE * s + device for s in slices] for device in devices]
        else:
            ids = [
                list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", target)
            ]
        if not ids:
            raise ValueError(f"a program whose transfers between slices cannot be read: {target}")
        return [], [tuple(places[each] for each in group) for group in ids]

    def _name(
        self, where: Computation, data: str, kind: str, *, users_of: Instruction | None
    ) -> str:
        """Names a collective of which the compiler has dropped the name.

        A permute in the loops of a pipelined step is a transfer between ranks. Any other collective
        belongs to the action that makes its operand, or else to the one that uses its result.
        """
        name = self._name_of_maker(where, data)
        if kind == _PERMUTE:
            in_loop = _scopes.RAMP in name or _scopes.STEADY in name
            return f"{name}/{_scopes.SEND}/ppermute" if in_loop else name
        if action_of(name) != OTHER or users_of is None:
            return name
        used = (n for n in _names_of_users(where, users_of) if action_of(n) != OTHER)
        return next(used, name)

    def _name_of_maker(self, where: Computation, name: str) -> str:
        """Finds the name of the instruction that makes a value, or that calls its computation."""
        left, seen = [name], {name}
        while left:
            here = where.by_name.get(left.pop(0))
            if here is None:
                continue
            if here.op_name:
                return here.op_name
            left += [operand for operand in here.operands if operand not in seen]
            seen |= set(here.operands)
        caller, outer = self._callers.get(where.name, (None, where))
        if caller is None:
            return ""
        return caller.op_name or self._name_of_maker(outer, caller.operands[-1])

    @cached_property
    def _callers(self) -> dict[str, tuple[Instruction, Computation]]:
        return {
            callee: (instruction, computation)
            for computation in self._module.computations.values()
            for instruction in computation.instructions
            for callee in instruction.callees
        }


def _names_of_users(where: Computation, value: Instruction) -> Iterator[str]:
    """Yields the names of the instructions that use a value, the nearest first."""
    reached = {value.name}
    for instruction in where.instructions:
        if reached & set(instruction.operands):
            reached.add(instruction.name)
            if instruction.op_name:
                yield instruction.op_name


def _rendezvous(transfer: Instruction) -> str:
    found = _RENDEZVOUS.search(transfer.attributes)
    return found[1] if found else transfer.name


def _kind_across(send: Instruction) -> str:
    found = _TYPE.search(send.attributes)
    kind = _KINDS.get(found[1]) if found else None
    if kind is None:
        raise ValueError(
            f"a program whose transfers between slices cannot be read: {send.attributes[:400]}"
        )
    return kind


def _is_by_slice(module: Module, conditional: Instruction) -> bool:
    """Whether a conditional has a collective for each slice."""
    branches = module.branches(conditional)
    return all(branch.name.startswith("localizer") for branch in branches)


def _placed(found: Iterable[_Devices], members: _Devices) -> list[_Devices]:
    """Turns places in a slice to places in the mesh."""
    return [tuple(members[place] for place in devices) for devices in found]


def _among(
    collective: Instruction,
    pairs: Sequence[_Devices],
    joined: Sequence[_Devices],
    *,
    op_name: str = "",
) -> Instruction:
    """Gives a collective its devices, and a name; readers take the first of several."""
    key, devices = ("replica_groups", joined) if joined else ("source_target_pairs", pairs)
    listed = ",".join(f"{{{','.join(map(str, group))}}}" for group in devices)
    attributes = f"{key}={{{listed}}}{collective.attributes}"
    if op_name and not collective.op_name:
        attributes += f', metadata={{op_name="{op_name}"}}'
    return replace(collective, attributes=attributes)


def _numbers(text: str) -> list[int]:
    """Reads a set of numbers.

    >>> _numbers("{1,4:6}")
    [1, 4, 5, 6]
    """
    parts = (tuple(map(int, part.split(":"))) for part in text.strip("{}").split(","))
    return list(itertools.chain.from_iterable(range(p[0], p[-1] + 1) for p in parts))
