"""What a step holds on one device beside its arguments: slots, copies of weights, accumulators.

In: what the step is made of. Out: a `MemoryReport`. All but two terms are exact, the sizes of the
arrays that the executor carries from tick to tick: the working set is an estimate, and copies of
weights are counted as XLA keeps them. None grows with the number of microbatches.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax._executor.functions import Functions
from dualpipe_jax._executor.stages import Layout
from dualpipe_jax._leaves.pick import pick
from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.ir import DEFERRED
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._split_vjp import SplitVjp

PyTree = Any


@dataclass(frozen=True)
class Term:
    """One kind of array that a step holds.

    Attributes:
      name: What it is.
      count: How many there are, in words.
      num_bytes: Bytes of all of them on one device.
      phase: `"beats"` of what is there in the run of beats only, `"ticks"` in the ticks before and
        after it only; empty of what is always there.
    """

    name: str
    count: str
    num_bytes: int
    phase: Literal["", "beats", "ticks"] = ""


@dataclass(frozen=True)
class MemoryReport:
    """What a step holds on one device beside its arguments, by kind.

    `num_bytes` adds up all that is there at once, in the run of beats or in the ticks around it,
    whichever is more; the gradients that the step returns come after, when slots are free again.

    Attributes:
      terms: Each kind of array.
      execution: How the schedule's order becomes this program, all decided.
    """

    terms: tuple[Term, ...]
    execution: Execution

    @property
    def num_bytes(self) -> int:
        """Bytes of all terms that are there at once."""
        return _sum(self.fullest)

    @property
    def fullest(self) -> tuple[Term, ...]:
        """The terms that are there at once, in beats or in other ticks, whichever are more."""
        in_beats, in_ticks = (
            tuple(term for term in self.terms if term.phase in ("", phase))
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
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = (
            f"{name:{widths[0]}}  {count:{widths[1]}}  {size:>{widths[2]}}  {phase}".rstrip()
            for name, count, size, phase in rows
        )
        return "\n".join((f"execution: {self.execution}", *lines))


def _sum(terms: Iterable[Term]) -> int:
    return sum(term.num_bytes for term in terms)


def report(
    traced: Functions,
    layout: Layout,
    tables: Tables,
    *,
    slots: dict[str, int],
    layers: dict[Kind, PyTree],
    outside: list[Any],
    gathered: list[Any],
    execution: Execution,
    recomputes: bool,
    rounds: bool,
) -> MemoryReport:
    """Adds up the arrays of one device.

    Args:
      traced: The functions.
      layout: Where the layers lie.
      tables: The tables.
      slots: The slots of each buffer, spare ones included.
      layers: Avals of one layer of each kind, as it lies on one device.
      outside: Avals of the wanted leaves outside the stack.
      gathered: Avals of the leaves outside the stack that are gathered over the ranks.
      execution: How the tables are run, all decided.
      recomputes: Whether deferred weight gradients recompute what they need.
      rounds: Whether contractions round float32 to bfloat16, which XLA then does once a step.
    """
    gradients = traced.gradients
    assert gradients is not None
    x = _bytes(traced.outputs.x)
    num_layers = {kind: stack.max_layers for kind, stack in layout.stacks.items()}
    most_layers = sum(num_layers.values())

    def of_layers(name: str) -> int:
        blocks = gradients.block.items()
        return sum(num_layers[kind] * _bytes(getattr(block, name)) for kind, block in blocks)

    idle = layout.idle_in(tables.steady)
    terms = [Term("received x and cotangents", f"{slots['received']} slots", slots["received"] * x)]
    for buffer, name in (
        ("residual", "residuals for I"),
        ("weight_residual", "residuals for I and W"),
        ("stash", "stashes for W"),
        (DEFERRED, "what deferred W recompute from" if recomputes else "stashes for deferred W"),
    ):
        size = slots.get(buffer, 0) * of_layers(buffer)
        if size:
            count = f"{slots[buffer]} slots x {most_layers} layers"
            terms.append(Term(name, count, size, "ticks" if buffer in idle else ""))
    of_one = max((_bytes(block.stash) for block in gradients.block.values()), default=0)
    of_all = f"{most_layers} layers", of_layers("stash")
    full_backward = not execution.split_backward
    if tables.steady is not None and layout.is_unrolled:
        phase = "beats" if full_backward or "stash" in idle else ""
        terms.append(Term("stash of a beat, without a slot", *of_all, phase))
    if full_backward:
        phase = "" if tables.steady is None else "ticks"
        name = "stash of a full backward, without a slot"
        terms.append(Term(name, "1 layer", of_one, phase))
        if tables.steady is not None and not layout.is_unrolled:
            terms.append(Term("stashes for W", *of_all, "beats"))
    between = 1 if tables.is_lazy else 2
    terms.append(Term("between ranks", f"{between} x and cotangents", between * x))
    if tables.steady is not None or tables.is_lazy:
        phase = "" if tables.is_lazy else "beats"
        terms.append(Term("what arrives while it leaves", "2 x and cotangents", 2 * x, phase))

    num_chunks = len(layout.stage_of)
    weights = 0
    for kind, layer in layers.items():
        block = gradients.block[kind]
        weights += num_layers[kind] * _copies(
            block, layer, num_chunks, is_apart=layout.is_unrolled, rounds=rounds
        )
    terms.append(Term("copies of weights", f"{num_chunks} stages", weights))
    if gathered:
        terms.append(Term("parameters gathered from other devices", "", _bytes(gathered)))
    sums = 0
    for kind, layer in layers.items():
        leaves = jax.tree.leaves(layer)
        with_grad = pick(leaves, gradients.block[kind].has_grad[: len(leaves)])
        sums += num_chunks * num_layers[kind] * _accumulator_bytes(with_grad)
    terms.append(Term("gradients added up, of layers", f"{num_chunks} stages", sums))
    terms.append(Term("gradients added up, of the rest", "", _accumulator_bytes(outside)))
    sums = 0
    for kind, aux in traced.outputs.aux.items():
        sums += num_chunks * num_layers[kind] * _accumulator_bytes(jax.tree.leaves(aux.metrics))
    if sums:
        terms.append(Term("metrics added up, of layers", f"{num_chunks} stages", sums))
    working = max(block.working_bytes for block in gradients.block.values())
    terms.append(Term("working set, estimated", "1 layer", working))
    return MemoryReport(tuple(terms), execution)


def _copies(
    block: SplitVjp, layer: PyTree, num_chunks: int, *, is_apart: bool, rounds: bool
) -> int:
    """Bytes of the copies of a layer's weights, over all chunks.

    Args:
      block: The layer's block.
      layer: Avals of its weights.
      num_chunks: The chunks of a rank.
      is_apart: Whether every layer's arrays are its own, as unrolled ones are.
      rounds: As `report` takes it.
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
    # What lies on the rank as it is needed is no copy.
    num_copies = num_chunks if is_apart else num_chunks - 1
    return num_chunks * casts + num_copies * _bytes(pick(leaves, read))


def _accumulator_bytes(leaves: Iterable[Any]) -> int:
    return sum(
        math.prod(leaf.shape) * np.dtype(semantics.accumulator_dtype(leaf.dtype)).itemsize
        for leaf in leaves
    )


def _bytes(avals: PyTree | Sequence[Any]) -> int:
    leaves = jax.tree.leaves(avals)
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
