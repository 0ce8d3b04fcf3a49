"""The arrays that a rank carries from tick to tick and from beat to beat: slots, sums, messages.

`empty_state` makes them for the first tick. An action takes the buffers that it touches out of the
state (`State.take`) and puts them back, so that only these pass through its loop over layers.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax._executor import barriers, buffers
from dualpipe_jax._executor.buffers import SLOTS, Place, SlotBuffer, allocate_slots
from dualpipe_jax._executor.deliver import Delivery, Mail
from dualpipe_jax._executor.stages import Layer, Stages
from dualpipe_jax._executor.trace import Functions, Gradients
from dualpipe_jax._leaves.gradient import GradIndex, accumulated, pick_accumulated
from dualpipe_jax._leaves.rules import SUM, Rule
from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Aux, PyTree


class LayerBuffers(NamedTuple):
    """Holds the buffers of the layers of one kind that an action touches.

    Attributes:
      slots: The slot buffers by name, as in `State`.
      grads: The sum of each gradient that the action makes, by the number of its leaf:
        `[layer, ...]`, or with unrolled layers a list with an array for each layer.
      metrics: The same for the metrics of the layers.
    """

    slots: OrderedDict[str, SlotBuffer] = OrderedDict()  # noqa: RUF012
    grads: dict[int, Any] | None = None
    metrics: list[Any] | None = None

    def with_slots(self, changed: Mapping[str, SlotBuffer]) -> "LayerBuffers":
        """Returns the buffers with some slot buffers replaced."""
        return self._replace(slots=OrderedDict({**self.slots, **changed}))

    def take_layer(self, names: Sequence[str], layer: Layer) -> "LayerBuffers":
        """Takes those of an unrolled layer alone, of the buffers with these names."""

        def own(total: Any) -> Any:
            return _with_entry([None] * len(total), layer.entry, total[layer.entry])

        slots = ((name, buffer) for name, buffer in self.slots.items() if name in names)
        grads, metrics = self.grads or {}, self.metrics or []
        return LayerBuffers(
            slots=OrderedDict((name, buffer.take_layer(layer.index)) for name, buffer in slots),
            grads={n: own(total) for n, total in grads.items()} if "grads" in names else None,
            metrics=list(map(own, metrics)) if "metrics" in names else None,
        )

    def put_layer(self, changed: "LayerBuffers", layer: Layer) -> "LayerBuffers":
        """Puts back buffers that `take_layer` took, maybe changed."""

        def put(total: Any, new: Any) -> Any:
            return _with_entry(total, layer.entry, new[layer.entry])

        buffers = self.with_slots(
            {
                name: self.slots[name].put_layer(layer.index, new)
                for name, new in changed.slots.items()
            }
        )
        if changed.grads is not None:
            assert self.grads is not None
            sums = {n: put(self.grads[n], new) for n, new in changed.grads.items()}
            buffers = buffers._replace(grads=sums)
        if changed.metrics is not None:
            assert self.metrics is not None
            buffers = buffers._replace(metrics=list(map(put, self.metrics, changed.metrics)))
        return buffers

    @classmethod
    def of(cls, names: Sequence[str], entries: Sequence[Any]) -> "LayerBuffers":
        """Joins entries in the order of `State.take`."""
        named = OrderedDict(zip(names, entries, strict=True))
        sums = {name: named.pop(name) for name in ("grads", "metrics") if name in named}
        return cls(slots=named, **sums)

    def entries(self, names: Sequence[str]) -> tuple[Any, ...]:
        """Lists them in the order of `State.put`."""
        return tuple(self.slots[n] if n in self.slots else getattr(self, n) for n in names)


# The summed gradients of shared parameters, by the number of the leaf.
SharedGrads = dict[int, jax.Array]


class State(NamedTuple):
    """Holds the arrays that a rank carries from tick to tick.

    Buffers of layers have an entry for each kind of layer; `layer` counts the layers of that kind.

    Attributes:
      received: Activations and cotangents that wait for their action, `[slot, ...]` for each leaf
        of x; nobody reads the last slot.
      slots: The slot buffers by name, in the order of `SLOTS`, and by kind. F keeps values in
        `residual` for the input grad, and in `weight_residual` for the weight grad, which the input
        grad may read too. The input grad keeps values in `stash` for the weight grad (none where
        the two run fused), and in `deferred` for a deferred weight grad, which may recompute the
        rest (none where deferred weight grads share the stash).
      block_grads: For each chunk the gradients of the leaves that have one, `[layer, ...]`, or
        lists of as many arrays where layers are unrolled.
      ends_grads, shared_grads: The gradients of the leaves outside the stack that get one.
      loss, aux, metrics: The head's loss, the layers' aux losses and the head's metrics, each
        summed over microbatches.
      block_metrics: For each chunk the metrics of its layers, summed, laid out as block_grads.
      messages: The values received from the left and the right neighbour in the tick before, each
        with the structure of x. With lazy tables the value that this rank made in the tick before
        and has not sent yet.
      mail: Outputs that are kept or under way, in a program that returns outputs.
    """

    received: PyTree
    slots: OrderedDict[str, dict[Kind, SlotBuffer]]
    block_grads: list[dict[Kind, list[Any]]]
    ends_grads: list[jax.Array]
    shared_grads: list[jax.Array]
    loss: jax.Array
    aux: jax.Array | None
    metrics: PyTree
    block_metrics: list[dict[Kind, list[Any]]]
    messages: tuple[PyTree, ...]
    mail: Mail | None = None

    def take(
        self, names: Sequence[str], chunk: int, index: dict[Kind, GradIndex]
    ) -> tuple[Any, ...]:
        """Takes the buffers of a chunk's layers that `LayerBuffers` has under these names.

        Args:
          names: The names, in the order in which they are returned, each a dict by kind.
          chunk: The chunk.
          index: The gradients that are taken, by kind.
        """
        return tuple(
            {
                kind: {number: sums[number] for number in index[kind].layer}
                for kind, sums in self.block_grads[chunk].items()
            }
            if name == "grads"
            else self.block_metrics[chunk]
            if name == "metrics"
            else self.slots[name]
            for name in names
        )

    def put(self, names: Sequence[str], chunk: int, taken: Sequence[dict[Kind, Any]]) -> "State":
        """Puts back buffers that `take` took, maybe changed."""
        changed: dict[str, Any] = {}
        slots = OrderedDict(self.slots)
        for name, by_kind in zip(names, taken, strict=True):
            if name == "grads":
                sums = {
                    kind: [by_kind[kind].get(number, old) for number, old in enumerate(all_of_kind)]
                    for kind, all_of_kind in self.block_grads[chunk].items()
                }
                changed["block_grads"] = _with_entry(self.block_grads, chunk, sums)
            elif name == "metrics":
                changed["block_metrics"] = _with_entry(self.block_metrics, chunk, by_kind)
            else:
                slots[name] = by_kind
        return self._replace(slots=slots, **changed)

    def with_slots(self, changed: Mapping[str, dict[Kind, SlotBuffer]]) -> "State":
        """Returns the state with some slot buffers replaced."""
        return self._replace(slots=OrderedDict({**self.slots, **changed}))

    def take_shared(self, index: dict[Kind, GradIndex]) -> SharedGrads:
        """Takes the sums of shared's gradients to which any kind of layer adds."""
        numbers = sorted({number for of_kind in index.values() for number in of_kind.shared})
        return {number: self.shared_grads[number] for number in numbers}

    def put_shared(self, taken: SharedGrads) -> "State":
        """Puts back sums that `take_shared` took, maybe changed."""
        sums = [taken.get(number, old) for number, old in enumerate(self.shared_grads)]
        return self._replace(shared_grads=sums)

    def add_outside(self, gradients: list[jax.Array], rules: list[Rule | None]) -> "State":
        """Adds those gradients that have a rule; gradients of ends come first, then of shared."""
        num_ends = len(self.ends_grads)
        totals = [*self.ends_grads, *self.shared_grads]
        sums = [
            total if rule is None else rule.add(total, gradient)
            for total, gradient, rule in zip(totals, gradients, rules, strict=True)
        ]
        return self._replace(ends_grads=sums[:num_ends], shared_grads=sums[num_ends:])


def _with_entry(entries: list[Any], number: int, value: Any) -> list[Any]:
    return [*entries[:number], value, *entries[number + 1 :]]


def add_gradients(
    sums: dict[int, Any],
    shared: SharedGrads,
    gradients: Sequence[jax.Array],
    index: GradIndex,
    layer: Any,
) -> tuple[dict[int, Any], SharedGrads]:
    """Adds a layer's gradients, those of the layer's own leaves first, to the sums at `index`."""
    own, of_shared = gradients[: len(index.layer)], gradients[len(index.layer) :]
    added = zip(index.layer, own, index.rules, strict=True)
    sums = sums | {number: _add(sums[number], grad, layer, rule) for number, grad, rule in added}
    more = zip(index.shared, of_shared, strict=True)
    return sums, shared | {number: semantics.add(shared[number], grad) for number, grad in more}


def add_aux(loss: Any, metrics: list[Any], aux: Aux, layer: Any) -> tuple[Any, list[Any]]:
    """Adds a block's aux loss to the sum of all, and its metrics to the sums of its kind."""
    if aux.loss is not None:
        loss = semantics.add(loss, aux.loss)
    both = zip(metrics, jax.tree.leaves(aux.metrics), strict=True)
    return loss, [_add(total, value, layer, SUM) for total, value in both]


def _add(total: Any, value: jax.Array, layer: Any, rule: Rule) -> Any:
    """Adds a value to a layer's entry of a sum.

    A sum is an array `[layer, ...]`, or a list of as many arrays: with the layers unrolled XLA
    would look through one layer's update of an array to the array before it, keep both alive, and
    so copy it.
    """
    if isinstance(total, list):
        return _with_entry(total, layer, rule.add(total[layer], value))
    return buffers.write(total, rule.add(buffers.read(total, layer), value), layer)


def empty_state(
    functions: Functions,
    stages: Stages,
    params: PyTree,
    *,
    slots: dict[str, int],
    on_host: Collection[Place],
    has_beats: bool,
    delivery: Delivery | None,
    is_lazy: bool,
    poison: bool,
) -> State:
    """Makes the state with which a rank starts: empty slots, and empty sums.

    Args:
      functions: The model's functions.
      stages: Where the layers are.
      params: The parameters of this device.
      slots: The slots of each buffer.
      on_host: The values that wait in the host's memory.
      has_beats: Whether the program has beats.
      delivery: Where outputs go, in a program that returns outputs.
      is_lazy: Whether the tables are lazy.
      poison: Whether slots start as values that spread, in tests.
    """
    outs, gradients = functions.outputs, functions.gradients
    num_chunks = len(stages.stage_of)

    def slot_buffers(name: str) -> dict[Kind, SlotBuffer]:
        return {
            kind: allocate_slots(
                None if gradients is None else gradients.block[kind],
                name,
                kind,
                num_slots=slots.get(name, 0),
                num_layers=stack.max_layers,
                num_chunks=num_chunks if has_beats else 1,
                is_unrolled=stages.is_unrolled,
                size_of_x=functions.size_of_x,
                on_host=on_host,
                poison=poison,
            )
            for kind, stack in stages.stacks.items()
        }

    def zero_sums(part: str) -> list[jax.Array]:
        if gradients is None or part not in params:
            return []
        leaves = gradients.leaves[part]
        values = pick_accumulated(leaves, params[part])
        return [
            gradient.leaf.rule.start(value.shape, semantics.accumulator_dtype(value.dtype))
            for gradient, value in zip(accumulated(leaves), values, strict=True)
        ]

    def zero_grads(kind: Kind, stack: PyTree) -> list[Any]:
        assert gradients is not None
        leaves = gradients.leaves["blocks"][kind]
        layers = [
            jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
            for value in pick_accumulated(leaves, stack)
        ]
        rules = [gradient.leaf.rule for gradient in accumulated(leaves)]
        return _zero_sums(stages, kind, layers, rules)

    loss, aux, metrics = semantics.zeros_for_sum((outs.loss, outs.aux_sum, outs.metrics))
    metrics_of = {kind: jax.tree.leaves(aux.metrics) for kind, aux in outs.aux.items()}
    nothing = buffers.allocate(outs.x, poison=poison)
    return State(
        received=buffers.allocate(outs.x, slots["received"], poison=poison),
        slots=OrderedDict((name, slot_buffers(name)) for name in SLOTS),
        block_grads=[]
        if gradients is None
        else [
            {kind: zero_grads(kind, stack) for kind, stack in params["blocks"].items()}
            for _ in range(num_chunks)
        ],
        ends_grads=zero_sums("ends"),
        shared_grads=zero_sums("shared"),
        loss=loss,
        aux=aux,
        metrics=metrics,
        block_metrics=[
            {
                kind: _zero_sums(stages, kind, metrics, [SUM] * len(metrics))
                for kind, metrics in metrics_of.items()
            }
            for _ in range(num_chunks)
        ],
        messages=(nothing,) if is_lazy else (nothing, nothing),
        mail=None if delivery is None else delivery.start(outs.applied),
    )


def _zero_sums(stages: Stages, kind: Kind, avals: list[Any], rules: Sequence[Rule]) -> list[Any]:
    """Makes a chunk's empty sums of the values that each layer of a kind adds, as in `avals`.

    Each is an array `[layer, ...]`, or with unrolled layers a list of arrays.
    """
    size = stages.stacks[kind].max_layers
    sums: list[Any] = []
    for aval, rule in zip(avals, rules, strict=True):
        dtype = semantics.accumulator_dtype(aval.dtype)
        if stages.is_unrolled:
            sums.append([rule.start(aval.shape, dtype) for _ in range(size)])
        else:
            sums.append(rule.start((size, *aval.shape), dtype))
    return sums


def one_stash(gradients: Gradients, stages: Stages, like: dict[Kind, SlotBuffer]) -> Any:
    """Makes avals of a stash buffer of a single slot, for looped layers."""

    def of(kind: Kind, num_layers: int) -> SlotBuffer:
        avals = tuple(
            jax.ShapeDtypeStruct((1, num_layers, *aval.shape), aval.dtype)
            for aval in gradients.block[kind].stash
        )
        return like[kind].with_arrays(avals)

    return {kind: of(kind, stack.max_layers) for kind, stack in stages.stacks.items()}


def empty_after(arrays: PyTree, *, after: PyTree, poison: bool) -> PyTree:
    """Makes empty buffers like these, not before `after` is known.

    So slots that hold nothing take no memory for a while: they end, and are made again.
    """
    if barriers.xla_shards():  # an entry might be fetched from another device
        zero, _ = lax.optimization_barrier((jnp.zeros((), jnp.int32), after))
    else:
        zero = barriers.zero_after(after)

    def one(array: jax.Array) -> jax.Array:
        value = buffers.allocate(jax.ShapeDtypeStruct((), array.dtype), poison=poison)
        # XLA cannot tell which of the two it is; a known array it would fill earlier.
        return jnp.broadcast_to(jnp.where(zero == 0, value, jnp.ones_like(value)), array.shape)

    return jax.tree.map(one, arrays)
