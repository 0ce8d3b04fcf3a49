"""Finds which devices a collective joins, and how long its bytes need on the links between them.

A mesh axis of TPUs is taken as a line of chips, each joined to the next by a link each way: slices
of less than a full torus dim have no link from the last chip to the first. So times are those of
the most loaded link at its published bandwidth, without latency; where the torus closes, they are
upper bounds. GPUs of a host reach each other over a switch. Between slices of TPUs data goes over
the network of their hosts, each of which sends and receives for all of its chips.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualpipe_jax._devices import Device
from dualpipe_jax._preflight.hlo import Instruction

Pairs = tuple[tuple[int, int], ...]
# A mesh axis, and the way along it: 1, -1, or 0 where both ways share a device's links. Or a host,
# 1 out of it and -1 into it.
Lane = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Describes the links between the devices of a mesh.

    Attributes:
      axes: The sizes of the mesh axes, by name, outermost first.
      device: The device; None if nothing is published of its links.
      host_link: Bytes a second between a device and its host, each way; None if not known.
      hosts: The host of each device, in mesh order.
      dcn: Bytes a second of a host's data-centre network, each way; None if not known.
    """

    axes: dict[str, int]
    device: Device | None
    host_link: float | None = None
    hosts: tuple[int, ...] = ()
    dcn: float | None = None

    @property
    def num_devices(self) -> int:
        """Counts the devices of the mesh."""
        return math.prod(self.axes.values())

    def coordinates(self, devices: tuple[int, ...]) -> np.ndarray:
        """Finds the indices of devices along the axes: int[num_devices, num_axes]."""
        return np.stack(np.unravel_index(devices, tuple(self.axes.values())), axis=-1)

    def axes_of(self, collective: Instruction) -> tuple[str, ...]:
        """Names the mesh axes along which a collective moves data."""
        pairs = source_target_pairs(collective)
        joined = pairs if pairs is not None else groups(collective, self.num_devices)
        names = list(self.axes)
        used = {
            names[axis]
            for devices in joined
            for axis in np.nonzero(np.ptp(self.coordinates(tuple(devices)), axis=0))[0]
        }
        return tuple(name for name in names if name in used)

    def lanes_of(self, collective: Instruction) -> set[Lane]:
        """Names the ways along mesh axes that a collective takes; two on one way share its links.

        Along a line of chips each link carries as much each way. Over a switch a device has as many
        links in all, to whichever device it sends. Across slices each host has one network.
        """
        if collective.is_across_slices:
            sent, received = self._loads_of_hosts("", collective)
            return {*((f"host {h}", 1) for h in sent), *((f"host {h}", -1) for h in received)}
        axes, pairs = self.axes_of(collective), source_target_pairs(collective)
        if self.device is not None and self.device.is_switched:
            return {(axis, 0) for axis in axes}
        if pairs is None:
            return {(axis, way) for axis in axes for way in (1, -1)}
        ways = np.sign([np.diff(self.coordinates(pair), axis=0)[0] for pair in pairs])
        names = list(self.axes)
        return {(names[axis], int(way)) for step in ways for axis, way in enumerate(step) if way}

    def seconds(self, kind: str, collective: Instruction, num_bytes: int) -> float | None:
        """Computes how long the links need; None if nothing is published of them.

        Args:
          kind: The kind of collective.
          collective: The instruction that holds its groups or pairs.
          num_bytes: Bytes of a device's operand; for an all-gather those of its result.
        """
        if self.device is None:
            return None
        if collective.is_across_slices:
            if self.dcn is None:
                return None
            loads = [
                load for way in self._loads_of_hosts(kind, collective) for load in way.values()
            ]
            return max(loads, default=0.0) * num_bytes / self.dcn
        pairs = source_target_pairs(collective)
        if pairs is not None:
            return self._load(pairs) * num_bytes / self.device.link
        n = max((len(group) for group in groups(collective, self.num_devices)), default=1)
        share = _share(kind, n, is_line=not self.device.is_switched)
        return num_bytes * share / self.device.link

    def _loads_of_hosts(
        self, kind: str, collective: Instruction
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Counts how often each host sends and receives a device's bytes to and from other slices.

        Chips that send nothing, or nothing to another slice, do not count.
        """
        sent: defaultdict[int, float] = defaultdict(float)
        received: defaultdict[int, float] = defaultdict(float)
        pairs = source_target_pairs(collective)
        for source, target in pairs or ():
            sent[self.hosts[source]] += 1
            received[self.hosts[target]] += 1
        for group in () if pairs is not None else groups(collective, self.num_devices):
            for device in group:
                share = _share(kind, len(group), is_line=False)
                sent[self.hosts[device]] += share
                received[self.hosts[device]] += share
        return sent, received

    def _load(self, pairs: Pairs) -> int:
        """Counts the pairs that share the most loaded link in one direction."""
        moves = [pair for pair in pairs if pair[0] != pair[1]]
        if self.device is not None and self.device.is_switched:
            return max(Counter(source for source, _ in moves).values(), default=0)
        load: Counter[tuple[int, ...]] = Counter()
        for pair in moves:
            here, there = self.coordinates(pair)
            # Along one axis after the other, as torus routers do.
            for axis in range(len(here)):
                step = int(np.sign(there[axis] - here[axis]))
                while here[axis] != there[axis]:
                    load[(*here.tolist(), axis, step)] += 1
                    here[axis] += step
        return max(load.values(), default=0)


def _share(kind: str, n: int, *, is_line: bool) -> float:
    """Computes the share of a device's bytes on the most loaded link, in a group of n devices."""
    match kind:
        case "all-reduce":
            return 2 * (n - 1) / n  # a reduce-scatter, then an all-gather
        case "all-to-all" if is_line:
            # Over the middle link of a line one half of the chips sends to the other half.
            return (n // 2) * (n - n // 2) / n
        case _:
            return (n - 1) / n


def source_target_pairs(collective: Instruction) -> Pairs | None:
    """Reads the pairs of a permute: from which device to which."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", collective.attributes)
    if found is None:
        return None
    numbers = list(map(int, re.findall(r"\d+", found[1])))
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def groups(collective: Instruction, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Reads the groups of devices among which a collective runs; by default one of all devices.

    >>> from dualpipe_jax._preflight.hlo import parse
    >>> text = '''ENTRY %main (a: f32[4]) -> f32[4] {
    ...   %a = f32[4]{0} parameter(0)
    ...   ROOT %sum = f32[4]{0} all-reduce(%a), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
    ... }'''
    >>> groups(parse(text).entry.root, 4)
    ((0, 2), (1, 3))
    >>> named = text.replace("[2,2]<=[2,2]T(1,0)", "mesh['data'=2,'model'=2] {'data'}")
    >>> groups(parse(named).entry.root, 4)
    ((0, 2), (1, 3))
    >>> ordered = named.replace("] {", "], device_ids=([2,2]T(1,0)) {")
    >>> groups(parse(ordered).entry.root, 4)
    ((0, 1), (2, 3))
    """
    attributes = collective.attributes
    lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes)
    if lists is not None:
        return tuple(
            tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", lists[1])
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota is not None:
        rows = _iota(iota[2]).reshape(_numbers(iota[1])[0], -1)
        return tuple(map(tuple, rows.tolist()))
    # A mesh: names and sizes of its axes, its devices where not in order, the axes of a group.
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(((?:[^()]|\([\d,]+\))+)\))? "
        r"\{((?:[^{}])+)\}",
        attributes,
    )
    if mesh is not None:
        return _of_mesh(*mesh.groups())
    # A form that is not known must not be taken for all devices.
    unknown = re.search(r"replica_groups=(?!\{\}).*", attributes)
    if unknown is not None:
        raise ValueError(f"a program whose groups of devices cannot be read: {unknown[0]}")
    return (tuple(range(num_devices)),)


def _of_mesh(axes: str, devices: str | None, within: str) -> tuple[tuple[int, ...], ...]:
    """Groups the devices of a mesh along some of its axes, or along parts of them.

    Args:
        axes: Names and sizes of the mesh's axes: "'data'=2,'model'=4".
        devices: Its devices, row by row: a list of their numbers or an iota, "[2,4]T(1,0)"; in
            order by default.
        within: The axes of a group; "'model':(2)2" is the part of size 2 of an axis after a more
            major part of size 2 of that axis.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = [
        (found[1], int(found[2] or 1), int(found[3] or sizes[found[1]]))
        for found in re.finditer(r"'([^':]+)'?(?::\((\d+)\)(\d+)'?)?", within)
    ]
    # Each axis is cut at the bounds of its parts: dims by (name, the size of the parts before).
    dims = {}
    for name, size in sizes.items():
        bounds = {1, size}
        for _, before, width in (part for part in parts if part[0] == name):
            bounds |= {before, before * width}
        for begin, end in itertools.pairwise(sorted(bounds)):
            dims[name, begin] = end // begin
    if devices is None:
        numbers = np.arange(math.prod(sizes.values()))
    elif devices.startswith("["):
        numbers = _iota(devices)
    else:
        numbers = np.array(_numbers(devices))
    numbers = numbers.reshape(tuple(dims.values()))
    inner = [
        at
        for name, before, width in parts
        for at, (of, begin) in enumerate(dims)
        if of == name and before <= begin < before * width
    ]
    size = math.prod(numbers.shape[at] for at in inner)
    numbers = np.moveaxis(numbers, inner, tuple(range(-len(inner), 0)))
    return tuple(map(tuple, numbers.reshape(-1, size).tolist()))


def _iota(text: str) -> NDArray[np.int_]:
    """Makes an array of the numbers from 0, its dims then permuted: "[2,4]T(1,0)"."""
    shape, permutation = (_numbers(part) for part in text.split("]"))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(permutation) if permutation else numbers


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))
