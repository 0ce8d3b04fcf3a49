"""What a rank carries from tick to tick and from beat to beat: slots, accumulators, messages."""

from typing import Any, NamedTuple

import jax

from dualpipe_jax._executor import accumulators
from dualpipe_jax._executor.accumulators import LayerGrads, LayerMetrics, Places
from dualpipe_jax._executor.delivery import Mail
from dualpipe_jax._leaves.rules import Rule
from dualpipe_jax._model.kinds import Kind

PyTree = Any


class State(NamedTuple):
    """What a rank carries from tick to tick.

    What belongs to layers has an entry for each kind of layer, `layer` counting those of the kind;
    `[slot, layer, ...]` is `registers.Layers` of `[slot, ...]` where layers are unrolled.

    Attributes:
      received: Activations and cotangents that wait for their action, `[slot, ...]` for each leaf
        of x; the last slot takes what nobody wants.
      residual: What the forward keeps for the input gradient, `[slot, layer, ...]`.
      weight_residual: What the forward keeps for the weight gradient, `[slot, layer, ...]`.
      stash: What the input gradient keeps for the weight gradient, `[slot, layer, ...]`. Empty
        where these run as one.
      deferred: What it keeps for a deferred one, which may recompute, `[slot, layer, ...]`. Empty
        where that has no slots of its own.
      block_grads: For each chunk the gradients of the leaves that have one, `[layer, ...]`, or
        lists of as many arrays where layers are unrolled.
      ends_grads, shared_grads: The gradients of the leaves outside the stack that get one.
      loss, aux, metrics: Sums over microbatches: of what head gives, and of the layers' aux losses.
      block_metrics: For each chunk the metrics of its layers, summed, laid out as block_grads.
      messages: The values of the tick before from the left and the right neighbour, an x each; of
        lazy tables the x that this rank made then, and has not sent yet.
      mail: Outputs that are kept or on their way, in a program that gives them.
    """

    received: PyTree
    residual: dict[Kind, Any]
    weight_residual: dict[Kind, Any]
    stash: dict[Kind, Any]
    deferred: dict[Kind, Any]
    block_grads: list[LayerGrads]
    ends_grads: list[jax.Array]
    shared_grads: list[jax.Array]
    loss: jax.Array
    aux: jax.Array | None
    metrics: PyTree
    block_metrics: list[LayerMetrics]
    messages: tuple[PyTree, ...]
    mail: Mail | None = None

    def take_grads(self, chunk: int, places: dict[Kind, Places]) -> Any:
        """Takes the accumulators of a chunk, and of shared, that stand at `places`."""
        return accumulators.take(self.block_grads[chunk], self.shared_grads, places)

    def put_grads(self, chunk: int, places: dict[Kind, Places], taken: Any) -> "State":
        """Puts back what was taken."""
        grads, shared = accumulators.put(self.block_grads[chunk], self.shared_grads, places, taken)
        block_grads = [grads if c == chunk else old for c, old in enumerate(self.block_grads)]
        return self._replace(block_grads=block_grads, shared_grads=shared)

    def put_aux(self, chunk: int, loss: Any, metrics: LayerMetrics) -> "State":
        """Puts back the sum of aux losses, and a chunk's metrics."""
        block_metrics = [metrics if c == chunk else old for c, old in enumerate(self.block_metrics)]
        return self._replace(aux=loss, block_metrics=block_metrics)

    def add_outside(self, gradients: list[jax.Array], rules: list[Rule | None]) -> "State":
        """Adds gradients of ends, then of shared, those that have a rule."""
        num_ends = len(self.ends_grads)
        totals = [*self.ends_grads, *self.shared_grads]
        sums = [
            total if rule is None else rule.add(total, gradient)
            for total, gradient, rule in zip(totals, gradients, rules, strict=True)
        ]
        return self._replace(ends_grads=sums[:num_ends], shared_grads=sums[num_ends:])
