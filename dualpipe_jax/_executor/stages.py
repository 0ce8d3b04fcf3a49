"""Spreads layers of one or several kinds over stages, and runs loops over a stage's layers.

The layers of a model are spread over stages in model order. Each kind has its own stack of
parameters (`bring.Stack`), in which a stage's layers of that kind are neighbours. A rank has room
for as many layers of each kind as the stage that has the most of it; no layer is padded to the
shapes of another kind.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from dualpipe_jax import _scopes
from dualpipe_jax._executor import buffers as slot_buffers
from dualpipe_jax._executor.bring import Spread, Stack, spread
from dualpipe_jax._executor.buffers import when
from dualpipe_jax._leaves.rules import Rule
from dualpipe_jax._model.kinds import Kind, indices_in_stack
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.stage_sizes import is_lower, is_upper, upper_layers
from dualpipe_jax._schedule.tables import Steady

# Layers are unrolled up to this number a stage: XLA then fuses and schedules across them. Beyond,
# a loop keeps program size and compile time from growing with depth.
_MAX_UNROLLED = 4


class Layer(NamedTuple):
    """Describes one layer of a stage to the body of the loop over its layers.

    Attributes:
      kind: The layer's kind.
      index: Its entry in the slot buffers: its number among the stage's layers of this kind.
      entry: Its entry in the chunk's parameters and gradients of this kind; `index` if unrolled.
      position: Its global index, in the model.
      is_there: Whether the stage has it: a bool, or a bool scalar where that differs by rank.
    """

    kind: Kind
    index: Any
    entry: Any
    position: Any
    is_there: Any = True


@dataclass(frozen=True, eq=False, kw_only=True)
class Stages:
    """Spreads layers over stages, and stages over ranks.

    Attributes:
      axis: The name of the pipeline axis.
      kinds: The kind of every layer, in model order.
      num_stages: Stages of the schedule.
      stage_of: int[num_chunks, num_ranks], the stage that each rank holds as each chunk, or -1.
      layers_per_stage: The layers of each stage; None to spread them evenly.
      unroll: As of `Execution`; None unrolls up to four layers, where `can_unroll`.
    """

    axis: str
    kinds: tuple[Kind, ...]
    num_stages: int
    stage_of: np.ndarray
    layers_per_stage: tuple[int, ...] | None = None
    unroll: bool | int | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.kinds)

    @cached_property
    def _layers(self) -> Spread:
        if self.layers_per_stage is None:
            return Spread(first_layers=spread(self.num_layers, self.num_stages))
        return Spread(first_layers=np.cumsum([0, *self.layers_per_stage]))

    @cached_property
    def stacks(self) -> dict[Kind, Stack]:
        """The stack of every kind."""
        firsts = self._layers.first_layers
        return {
            kind: Stack(
                axis=self.axis,
                stage_of=self.stage_of,
                # the number of layers of this kind before each stage's first layer
                first_layers=np.cumsum([0, *(k == kind for k in self.kinds)])[firsts],
            )
            for kind in dict.fromkeys(self.kinds)
        }

    @property
    def specs(self) -> dict[Kind, PartitionSpec]:
        """The spec of each kind's stack, and of its gradient: over the axis where it divides."""
        return {
            kind: PartitionSpec(self.axis) if stack.is_sharded else PartitionSpec()
            for kind, stack in self.stacks.items()
        }

    @cached_property
    def _kinds_of_stages(self) -> list[tuple[Kind, ...]]:
        firsts = self._layers.first_layers.tolist()
        return [self.kinds[a:b] for a, b in pairwise(firsts)]

    @cached_property
    def is_unrolled(self) -> bool:
        """Whether a stage's layers are straight-line code, not a loop."""
        return self.unrolled_by is True

    @cached_property
    def unrolled_by(self) -> bool | int:
        """How many layers the body of the loop over them has: `unroll`, with None decided."""
        most = self._layers.max_layers
        if self.unroll is None:
            return self.can_unroll and most <= _MAX_UNROLLED
        if isinstance(self.unroll, bool):
            return self.unroll
        if self.unroll >= most and self.can_unroll:
            return True
        return min(self.unroll, most) if min(self.unroll, most) > 1 else False

    @property
    def can_unroll(self) -> bool:
        """Whether each stage has the same kinds of layers in the same order, as far as it goes."""
        return all(kinds == self._kinds_of_largest[: len(kinds)] for kinds in self._kinds_of_stages)

    @property
    def _kinds_of_largest(self) -> tuple[Kind, ...]:
        return max(self._kinds_of_stages, key=len)

    def idle_in(self, steady: Steady | None) -> tuple[str, ...]:
        """Names the buffers that the beats do not use: beats of unrolled layers stash nothing.

        They end where the beats begin, and are made again after them.
        """
        names = () if steady is None else steady.idle
        return tuple(name for name in names if name != "stash" or self.is_unrolled)

    def fetch(self, stacks: dict[Kind, PyTree]) -> list[dict[Kind, PyTree]]:
        """Brings each chunk's layers of each kind to this rank, `[max layers of a stage, ...]`."""
        fetched = {kind: stack.fetch(stacks[kind]) for kind, stack in self.stacks.items()}
        return [
            {kind: chunks[chunk] for kind, chunks in fetched.items()}
            for chunk in range(len(self.stage_of))
        ]

    def collect(
        self, grads: list[dict[Kind, list[Any]]], rules: Mapping[Kind, Sequence[Rule]]
    ) -> dict[Kind, list[Any]]:
        """Adds up the chunks' gradients in the stack of each kind, each by its rule."""
        return {
            kind: stack.collect([chunk[kind] for chunk in grads], rules[kind])
            for kind, stack in self.stacks.items()
        }

    def unstack(self, chunk: int, layers: dict[Kind, PyTree]) -> dict[Kind, PyTree]:
        """Gives the unrolled layers of a chunk their parameters in arrays of their own."""
        return {kind: self.stacks[kind].unstack(chunk, slab) for kind, slab in layers.items()}

    def loop(
        self,
        stage: Any,
        is_on: Any,
        body: Callable[[Layer, Any, Any], tuple[Any, Any]],
        carry: Any,
        buffers: tuple[dict[Kind, Any], ...],
        *,
        reverse: bool = False,
        leave: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda buffers: buffers,
    ) -> tuple[Any, tuple[dict[Kind, Any], ...]]:
        """Runs `body` for each of a stage's layers, in order or in reverse, if `is_on` holds.

        A full backward in halves gives two `is_on`: one for the upper layers, which run first and
        may be one more, and one for the lower layers.

        Args:
          stage: The stage, an int32 scalar.
          is_on: Whether to run at all, a bool scalar; True without a choice; or a tuple of two.
          body: `(layer, carry, entries) -> (carry, entries)`, with the entry of each of `buffers`
            for the layer's kind. It heeds the layer's `is_there`.
          carry: The values that pass from layer to layer.
          buffers: Dicts with an entry for each kind.
          reverse: Whether to begin with the last layer.
          leave: A function that is applied to buffers at a loop's end; not in straight-line code.

        Returns:
          carry and buffers, after the last layer.
        """

        def run(layer: Layer, predicate: Any, carry: Any, buffers: tuple) -> Any:
            def one(loop: Any) -> Any:
                return body(layer, *loop)

            loop = carry, tuple(by_kind[layer.kind] for by_kind in buffers)
            carry, entries = one(loop) if predicate is None else when(predicate, one, loop)
            both = zip(buffers, entries, strict=True)
            return carry, tuple({**by_kind, layer.kind: new} for by_kind, new in both)

        def left(loop: Any) -> Any:
            carry, buffers = loop
            return carry, leave(buffers)

        if self.is_unrolled:

            def unrolled(loop: Any, part: Sequence[Layer]) -> Any:
                for layer in part:
                    if layer.is_there is not False:
                        loop = run(layer, None, *loop)
                return loop

            halves = isinstance(is_on, tuple)
            parts = [
                self.layers_of(stage, is_in=is_in)[:: -1 if reverse else 1]
                for is_in in ((is_upper, is_lower) if halves else (np.less,))
            ]
            loop = carry, buffers
            if is_on is True:
                return unrolled(loop, parts[0])
            for predicate, part in zip(is_on if halves else [is_on], parts, strict=True):
                loop = when(predicate, lambda loop, part=part: left(unrolled(loop, part)), loop)
            return loop

        count = self._layers.num_layers_of(stage)

        def step(i: Any, loop: Any) -> Any:
            index = count - 1 - i if reverse else i
            if len(self.stacks) == 1:
                return left(run(self.layer_of_only_kind(stage, index), None, *loop))
            # The program has each kind's body once, run or skipped.
            number, index_in_kind = slot_buffers.read(self._tables, stage, index)
            for n, kind in enumerate(self.stacks):
                loop = run(self._layer(stage, kind, index, index_in_kind), number == n, *loop)
            return left(loop)

        start, stop = 0, count
        if isinstance(is_on, tuple):
            middle = upper_layers(count)
            start, stop = jnp.where(is_on[0], 0, middle), jnp.where(is_on[1], count, middle)
        elif is_on is not True:
            stop = jnp.where(is_on, count, 0)
        return self._for_layers(start, stop, step, (carry, buffers), parts=isinstance(is_on, tuple))

    def _for_layers(
        self,
        start: Any,
        stop: Any,
        step: Callable[[Any, Any], Any],
        carry: Any,
        *,
        parts: bool = False,
    ) -> Any:
        """Runs `step(i, carry) -> carry` for i from start to stop, `unrolled_by` in each trip.

        Args:
          start: The first i.
          stop: The one after the last i.
          step: The function to run.
          carry: The values that pass from one i to the next.
          parts: Whether start and stop may be in the middle of a stage.
        """
        together, most = max(1, int(self.unrolled_by)), self._layers.max_layers
        if together == 1:
            with jax.named_scope(_scopes.of_layers(most)):
                return lax.fori_loop(start, stop, step, carry)

        def trip(number: Any, carry: Any) -> Any:
            for i in range(together):
                carry = step(start + number * together + i, carry)
            return carry

        num_trips = (stop - start) // together
        with jax.named_scope(_scopes.of_layers(most // together)):
            carry = lax.fori_loop(0, num_trips, trip, carry)
        sizes = np.diff(self._layers.first_layers)
        if parts:
            sizes = np.concatenate([sizes, upper_layers(sizes)])
        if not (sizes % together).any():
            return carry
        with jax.named_scope(_scopes.of_layers(together - 1)):
            return lax.fori_loop(start + num_trips * together, stop, step, carry)

    def pairs(self, forward: int, backward: int) -> list[tuple[int, int]]:
        """Lists the kinds of layers that meet where one chunk is forward beside another's backward.

        Layer j of a rank's forward stage meets layer L-1-j of its backward one, or none if that has
        fewer. Kinds are numbered as in `stacks`; -1 stands for no layer.
        """
        number = {kind: n for n, kind in enumerate(self.stacks)}
        met: dict[tuple[int, int], None] = {}
        for stages in zip(self.stage_of[forward], self.stage_of[backward], strict=True):
            ahead, back = ([number[k] for k in self._kinds_of_stages[int(s)]] for s in stages)
            met |= dict.fromkeys(zip_longest(ahead, back[::-1], fillvalue=-1))
        return list(met)

    def loop_pairs(
        self,
        chunks: tuple[int, int],
        stages: tuple[Any, Any],
        body: Callable[[Layer | None, Layer | None, Any], Any],
        carry: Any,
    ) -> Any:
        """Runs `body` for each layer of a forward stage beside one of a backward stage.

        Args:
          chunks: The chunk that is forward, and the one that is backward.
          stages: Their stages, int32 scalars.
          body: `(forward's layer, backward's layer, carry) -> carry`, None for a layer if there is
            none left. The program has it once for each of `pairs`.
          carry: The values that pass from one pair to the next.
        """
        pairs, kinds = self.pairs(*chunks), list(self.stacks)
        counts = [self._layers.num_layers_of(stage) for stage in stages]

        def layer(number: int, stage: Any, index: Any, index_in_kind: Any) -> Layer | None:
            return None if number < 0 else self._layer(stage, kinds[number], index, index_in_kind)

        def step(j: Any, carry: Any) -> Any:
            indices = j, counts[1] - 1 - j
            if len(pairs) == 1:
                # Each of the two stages is of one kind, whichever ranks hold them.
                ahead, back = map(layer, pairs[0], stages, indices, indices)
                return body(ahead, back, carry)
            numbers, indices_in_kind = [], []
            for stage, index, count in zip(stages, indices, counts, strict=True):
                is_there = (index >= 0) & (index < count)
                number, index_in_kind = slot_buffers.read(
                    self._tables, stage, jnp.where(is_there, index, 0)
                )
                numbers.append(jnp.where(is_there, number, -1))
                indices_in_kind.append(index_in_kind)
            for pair in pairs:
                ahead, back = map(layer, pair, stages, indices, indices_in_kind)
                is_met = (numbers[0] == pair[0]) & (numbers[1] == pair[1])
                carry = when(is_met, functools.partial(body, ahead, back), carry)
            return carry

        most = max(counts) if self._layers.is_even else jnp.maximum(*counts)
        return self._for_layers(0, most, step, carry)

    def layers_of(
        self,
        stage: Any,
        chunk: int | None = None,
        *,
        is_in: Callable[[int, np.ndarray], np.ndarray] = np.less,
    ) -> list[Layer]:
        """Describes the unrolled layers of a stage, in order: as many as the largest stage has.

        Args:
          stage: The stage.
          chunk: The chunk as which ranks hold it; None for any.
          is_in: `(index, layers of each stage) ->` which stages have that layer, bool[num_stages].
        """
        stages = self.stage_of if chunk is None else self.stage_of[chunk]
        sizes, kinds = np.diff(self._layers.first_layers), self._kinds_of_largest
        layers = []
        for index, (kind, in_kind) in enumerate(zip(kinds, indices_in_stack(kinds), strict=True)):
            of_stage = is_in(index, sizes)
            found = set(of_stage[stages[stages >= 0]].tolist())
            is_there = (
                found.pop() if len(found) == 1 else slot_buffers.read(jnp.asarray(of_stage), stage)
            )
            layer = Layer(kind, in_kind, in_kind, None)
            if is_there is not False:
                layer = self._layer(stage, kind, index, in_kind)
            layers.append(layer._replace(is_there=is_there))
        return layers

    def sizes_of(self, chunk: int) -> set[int]:
        """Collects the numbers of layers of the stages that ranks hold as a chunk."""
        stages = self.stage_of[chunk]
        return set(np.diff(self._layers.first_layers)[stages[stages >= 0]].tolist())

    def layer_of_only_kind(self, stage: Any, index: Any) -> Layer:
        """Describes the layer of a stage that has this index, where there is one kind only."""
        return self._layer(stage, self.kinds[0], index, index)

    def _layer(self, stage: Any, kind: Kind, index: Any, index_in_kind: Any) -> Layer:
        """Describes the layer of a stage that has this index in it."""
        offset = 0 if self.is_unrolled else self.stacks[kind].offset_of(stage)
        return Layer(
            kind=kind,
            index=index_in_kind,
            entry=index_in_kind + offset,
            position=self._layers.first_layer_of(stage) + index,
        )

    @property
    def _tables(self) -> tuple[jax.Array, jax.Array]:
        """For each stage's layers the number of the kind and the index in it, `[stage, layer]`."""
        numbers = {kind: number for number, kind in enumerate(self.stacks)}
        shape = self.num_stages, self._layers.max_layers
        number, index = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for stage, kinds in enumerate(self._kinds_of_stages):
            number[stage, : len(kinds)] = [numbers[kind] for kind in kinds]
            index[stage, : len(kinds)] = indices_in_stack(kinds)
        return jnp.asarray(number), jnp.asarray(index)
