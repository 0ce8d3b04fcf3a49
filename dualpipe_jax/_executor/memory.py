"""Counts the bytes of a step on one device, before any compiler is asked.

In: the traced functions, tables, stages. Out: a `MemoryReport` of slots, copies of weights and
accumulators, all that a step holds beside its arguments. All but two terms are exact: the sizes of
the arrays that the executor carries from tick to tick. The working set is an estimate, and weights
are assumed to be copied as XLA copies them. No term grows with the number of microbatches.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax._executor.buffers import SLOTS, Place, bytes_of
from dualpipe_jax._executor.host import padded_bytes
from dualpipe_jax._executor.stages import Stages
from dualpipe_jax._executor.trace import Arguments, Functions, Gradients
from dualpipe_jax._leaves.gradient import pick_accumulated
from dualpipe_jax._leaves.pick import pick
from dualpipe_jax._model import semantics
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.actions import DEFERRED
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._split_vjp import SplitVjp


@dataclass(frozen=True)
class Term:
    """Counts one kind of array that a step holds.

    Attributes:
      name: The arrays, in words.
      count: Their number, in words.
      num_bytes: Bytes of all of them on one device.
      phase: `"beats"` if they exist in the steady phase only, `"ticks"` if in the ticks before and
        after it only; empty if always.
      where: Whether they are in the device's memory or in the host's.
    """

    name: str
    count: str
    num_bytes: int
    phase: Literal["", "beats", "ticks"] = ""
    where: Literal["device", "host"] = "device"


@dataclass(frozen=True)
class MemoryReport:
    """Lists the arrays that a step holds on one device beside its arguments.

    `num_bytes` adds up all that exist at once in the device's memory, in the steady phase or in the
    ticks around it, whichever is more; the gradients that the step returns come after, when slots
    are free again. `host_bytes` are those in the host's memory.

    Attributes:
      terms: Each kind of array.
      execution: How the schedule's order becomes this program, all decided.
      layers_per_stage: The layers of each stage, in model order.
    """

    terms: tuple[Term, ...]
    execution: Execution
    layers_per_stage: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all terms that exist at once in the device's memory."""
        return _sum(self.fullest)

    @property
    def host_bytes(self) -> int:
        """Bytes of the terms in the host's memory, for each device."""
        return _sum(term for term in self.terms if term.where == "host")

    @property
    def fullest(self) -> tuple[Term, ...]:
        """The device's terms that exist at once, in beats or in other ticks, whichever are more."""
        on_device = [term for term in self.terms if term.where == "device"]
        in_beats, in_ticks = (
            tuple(term for term in on_device if term.phase in ("", phase))
            for phase in ("beats", "ticks")
        )
        return max(in_beats, in_ticks, key=_sum)

    def __str__(self) -> str:
        when = {"": "", "beats": "in beats", "ticks": "in other ticks"}
        rows = [
            (t.name, t.count, f"{t.num_bytes / 2**20:,.1f} MiB", when[t.phase]) for t in self.terms
        ]
        at_once = "at the most" if any(t.phase for t in self.terms) else ""
        total = f"{self.num_bytes / 2**20:,.1f} MiB"
        rows.append(("total beside the arguments", "", total, at_once))
        if self.host_bytes:
            total = f"{self.host_bytes / 2**20:,.1f} MiB"
            rows.append(("total in the host's memory", "", total, ""))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = (
            f"{name:{widths[0]}}  {count:{widths[1]}}  {size:>{widths[2]}}  {phase}".rstrip()
            for name, count, size, phase in rows
        )
        layers = " ".join(map(str, self.layers_per_stage))
        head = f"execution: {self.execution}", f"layers per stage: {layers}"
        return "\n".join((*head, *lines))


def _sum(terms: Iterable[Term]) -> int:
    return sum(term.num_bytes for term in terms)


def report_memory(
    functions: Functions,
    arguments: Arguments,
    stages: Stages,
    tables: Tables,
    *,
    slots: dict[str, int],
    on_host: Collection[Place],
    layers_per_stage: tuple[int, ...],
    execution: Execution,
    recomputes: bool,
    rounds: bool,
) -> MemoryReport:
    """Adds up the arrays of one device.

    Args:
      functions: The functions.
      arguments: Avals of their arguments.
      stages: Which layers each rank has.
      tables: The tables.
      slots: The slots of each buffer, spare ones included.
      on_host: The values that wait in the host's memory.
      layers_per_stage: The layers of each stage.
      execution: How the tables are run, all decided.
      recomputes: Whether deferred weight gradients recompute their operands.
      rounds: Whether contractions round float32 to bfloat16, which XLA then does once a step.
    """
    gradients = functions.gradients
    assert gradients is not None
    terms = _slot_terms(
        functions, stages, tables, slots=slots, on_host=on_host, recomputes=recomputes
    )
    terms += _stash_terms(gradients, stages, tables, full_backward=not execution.split_backward)
    x = bytes_of(functions.outputs.x)
    between = 1 if tables.is_lazy else 2
    terms.append(Term("between ranks", f"{between} x and cotangents", between * x))
    if tables.steady is not None or tables.is_lazy:
        phase = "" if tables.is_lazy else "beats"
        terms.append(Term("arriving while others leave", "2 x and cotangents", 2 * x, phase))
    if tables.steady is not None and (num := tables.steady.num_waiting):
        terms.append(Term("waiting for a later beat", f"{num} x and cotangents", num * x, "beats"))
    terms += _weight_terms(gradients, arguments, stages, rounds=rounds)
    terms += _sum_terms(functions, gradients, arguments, stages)
    working = max(block.working_bytes for block in gradients.block.values())
    terms.append(Term("working set, estimated", "1 layer", working))
    return MemoryReport(tuple(terms), execution, layers_per_stage)


def _slot_terms(
    functions: Functions,
    stages: Stages,
    tables: Tables,
    *,
    slots: dict[str, int],
    on_host: Collection[Place],
    recomputes: bool,
) -> list[Term]:
    """Lists the slot buffers."""
    assert functions.gradients is not None
    idle, received = stages.idle_in(tables.steady), slots["received"]
    size = received * bytes_of(functions.outputs.x)
    terms = [Term("received x and cotangents", f"{received} slots", size)]
    names = {
        "residual": "residuals for I",
        "weight_residual": "residuals for I and W",
        "stash": "stashes for W",
        DEFERRED: "inputs of deferred W that recompute" if recomputes else "stashes for deferred W",
    }
    for buffer in SLOTS:
        count = f"{slots.get(buffer, 0)} slots x {_num_layers(stages)} layers"
        of_slot = _bytes_of_slot(functions.gradients, stages, buffer, on_host)
        here, there = (size * slots.get(buffer, 0) for size in of_slot)
        if tables.steady is not None:  # an array for each chunk
            there *= len(stages.stage_of)
        name = names.get(buffer, buffer)
        if here:
            terms.append(Term(name, count, here, "ticks" if buffer in idle else ""))
        if there:
            terms.append(Term(f"{name}, on the host", count, there, where="host"))
    return terms


def _bytes_of_slot(
    gradients: Gradients, stages: Stages, buffer: str, on_host: Collection[Place] = ()
) -> tuple[int, int]:
    """Counts the bytes of a slot of a buffer, on the device and in the host's memory."""
    here = there = 0
    for kind, block in gradients.block.items():
        for layer in range(stages.stacks[kind].max_layers):
            entry = layer if stages.is_unrolled else 0
            for number, aval in enumerate(getattr(block, buffer)):
                if (buffer, kind, entry, number) in on_host:
                    there += padded_bytes(aval)
                else:
                    here += bytes_of(aval)
    return here, there


def _stash_terms(
    gradients: Gradients, stages: Stages, tables: Tables, *, full_backward: bool
) -> list[Term]:
    """Lists the stashes that have no slot, or have one in beats only."""
    steady, terms = tables.steady, []
    of_one = max((bytes_of(block.stash) for block in gradients.block.values()), default=0)
    of_all = f"{_num_layers(stages)} layers", _bytes_of_slot(gradients, stages, "stash")[0]
    if steady is not None and stages.is_unrolled:
        phase = "beats" if full_backward or "stash" in stages.idle_in(steady) else ""
        terms.append(Term("stash of a beat, without a slot", *of_all, phase))
    if full_backward:
        phase = "" if steady is None else "ticks"
        name = "stash of a full backward, without a slot"
        terms.append(Term(name, "1 layer", of_one, phase))
        if steady is not None and not stages.is_unrolled:
            terms.append(Term("stashes for W", *of_all, "beats"))
    return terms


def _weight_terms(
    gradients: Gradients, arguments: Arguments, stages: Stages, *, rounds: bool
) -> list[Term]:
    """Lists the copies of weights, and the gathered parameters."""
    num_chunks, weights = len(stages.stage_of), 0
    for kind, layer in arguments.layers.items():
        weights += stages.stacks[kind].max_layers * _copies(
            gradients.block[kind], layer, num_chunks, is_unrolled=stages.is_unrolled, rounds=rounds
        )
    terms = [Term("copies of weights", f"{num_chunks} stages", weights)]
    blocks = {
        kind: stages.stacks[kind].shard_avals(layer) for kind, layer in arguments.layers.items()
    }
    are_gathered = [bool(leaf.gather_dims) for leaf in jax.tree.leaves(arguments.leaves)]
    gathered = pick({**arguments.outside, "blocks": blocks}, are_gathered)
    if gathered:
        terms.append(Term("parameters gathered from other devices", "", bytes_of(gathered)))
    return terms


def _sum_terms(
    functions: Functions, gradients: Gradients, arguments: Arguments, stages: Stages
) -> list[Term]:
    """Lists the accumulators of gradients and metrics."""
    num_chunks, leaves = len(stages.stage_of), gradients.leaves
    num_layers = {kind: stack.max_layers for kind, stack in stages.stacks.items()}
    sums = 0
    for kind, layer in arguments.layers.items():
        with_grad = pick_accumulated(leaves["blocks"][kind], layer)
        sums += num_chunks * num_layers[kind] * _accumulator_bytes(with_grad)
    of_outside = {part: leaves[part] for part in arguments.outside}
    outside = _accumulator_bytes(pick_accumulated(of_outside, arguments.outside))
    terms = [
        Term("gradients added up, of layers", f"{num_chunks} stages", sums),
        Term("gradients added up, of the rest", "", outside),
    ]
    sums = 0
    for kind, aux in functions.outputs.aux.items():
        sums += num_chunks * num_layers[kind] * _accumulator_bytes(jax.tree.leaves(aux.metrics))
    if sums:
        terms.append(Term("metrics added up, of layers", f"{num_chunks} stages", sums))
    return terms


def _num_layers(stages: Stages) -> int:
    """Counts the layers of all kinds for which a slot has room."""
    return sum(stack.max_layers for stack in stages.stacks.values())


def _copies(
    block: SplitVjp, layer: PyTree, num_chunks: int, *, is_unrolled: bool, rounds: bool
) -> int:
    """Counts the bytes of the copies of a layer's weights, over all chunks.

    Args:
      block: The layer's block.
      layer: Avals of its weights.
      num_chunks: The chunks of a rank.
      is_unrolled: Whether every layer has arrays of its own, as unrolled layers have.
      rounds: As `report_memory` takes it.
    """
    leaves = jax.tree.leaves(layer)
    rounded = [
        rounds and is_on and leaf.dtype == np.float32
        for leaf, is_on in zip(leaves, block.is_rounded[: len(leaves)], strict=True)
    ]
    read = [a and not b for a, b in zip(block.is_read[: len(leaves)], rounded, strict=True)]
    cast = [(leaves[i], dtype) for i, dtype in block.casts if i < len(leaves)]
    cast += [(leaf, jnp.bfloat16) for leaf in pick(leaves, rounded)]
    casts = sum(math.prod(leaf.shape) * np.dtype(dtype).itemsize for leaf, dtype in cast)
    # The rank's own shard is no copy, if it is used as it is.
    num_copies = num_chunks if is_unrolled else num_chunks - 1
    return num_chunks * casts + num_copies * bytes_of(pick(leaves, read))


def _accumulator_bytes(leaves: Iterable[Any]) -> int:
    return sum(
        math.prod(leaf.shape) * np.dtype(semantics.accumulator_dtype(leaf.dtype)).itemsize
        for leaf in leaves
    )
