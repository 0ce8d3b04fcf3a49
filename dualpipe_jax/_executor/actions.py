"""The work of one rank: embedding, head, and the actions of one layer.

`stages.py` runs these over all layers of a stage; of that `tick.py` runs one action in a tick,
chosen by the tables, and `beat.py` a forward and a backward side by side.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax import _scopes
from dualpipe_jax._executor import barriers
from dualpipe_jax._executor import buffers as registers
from dualpipe_jax._executor.delivery import Delivery
from dualpipe_jax._executor.functions import Functions, Gradients
from dualpipe_jax._executor.rows import RESIDUALS, like_slots
from dualpipe_jax._executor.stages import Layer, Layout
from dualpipe_jax._executor.state import State
from dualpipe_jax._leaves.leaves import place
from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Context
from dualpipe_jax._schedule.ir import DEFERRED
from dualpipe_jax._split_vjp import contraction_flops

PyTree = Any
Row = dict[str, jax.Array]  # this rank's row of the tables, int32 scalars


@dataclass(frozen=True, eq=False, kw_only=True)
class Rank:
    """Runs the actions of one rank.

    Attributes:
      functions: The model's functions.
      layout: Which layers are whose.
      chunks: The layers' parameters of each chunk, and casts of them, for each kind
        `[max_layers, ...]`, or `registers.Layers` without the layers' dim.
      shared_casts: Casts of the shared parameters, for each kind.
      outside: `{"ends": ...}`, and `"shared"` where there is one: parameters outside the stack.
      microbatches: The batch, `[num_microbatches, ...]`.
      rng: The step's key, or None.
      shard: The index of this shard of the batch, or None if there is one only.
      loss_seed: The cotangent of each microbatch's loss, a scalar; None without a loss.
      aux_seed: The cotangent of each layer's aux loss, for each kind a scalar, or None.
      delivery: Where outputs go, in a program that gives them.
      full_backward: Whether the I of a W that follows it runs with it, as a full backward; then
        only what a deferred W needs is kept, in `deferred`.
      defers: Whether what deferred W need is in `deferred`.
      takes_turns: Whether of layers in a row the backward of each waits for that of the next.
      interleaves: Whether a beat's F and I are to run side by side, on devices that can.
      communicates: Whether the model's functions may have collectives of their own.
      device_kind: The kind of the devices, such as "TPU v5 lite", or None.
      poison: Whether to overwrite what is dead with values that spread, in tests.
    """

    functions: Functions
    layout: Layout
    chunks: list[dict[Kind, PyTree]]
    shared_casts: dict[Kind, list[jax.Array]]
    outside: dict[str, PyTree]
    microbatches: PyTree
    rng: jax.Array | None
    shard: jax.Array | None
    loss_seed: jax.Array | None
    aux_seed: dict[Kind, jax.Array | None]
    delivery: Delivery | None = None
    full_backward: bool = False
    defers: bool = False
    takes_turns: bool = False
    interleaves: bool = False
    communicates: bool = False
    device_kind: str | None = None
    poison: bool = False

    @property
    def gradients(self) -> Gradients:
        """The derivatives of the model's functions, in a program that has them."""
        assert self.functions.gradients is not None
        return self.functions.gradients

    def like_slots(self, layer: Layer, **values: Any) -> tuple[Any, ...]:
        """Has what slots hold for a layer lie as they do.

        Args:
          layer: The layer.
          **values: By the names of their buffers.
        """
        return tuple(
            like_slots(self.functions, layer.kind, name, each) for name, each in values.items()
        )

    def _context(self, row: Row, position: Any, *, is_layer: bool = False) -> Context:
        return semantics.context(
            semantics.take(self.microbatches, row["microbatch"]),
            semantics.microbatch_key(self.rng, row["microbatch"]),
            position,
            is_layer=is_layer,
            shard=self.shard,
        )

    def read_layer(self, row: Row, chunk: int, layer: Layer) -> tuple[PyTree, Context]:
        """Reads a layer's parameters, with the shared ones and the casts, and makes its context."""
        stack = self.chunks[chunk][layer.kind]
        if isinstance(stack, registers.Layers):
            params, casts = stack.each[layer.place]
        else:
            params, casts = registers.read(stack, layer.place)
        context = self._context(row, layer.position, is_layer=True)
        casts = [*casts, *self.shared_casts.get(layer.kind, [])]
        return ((params, self.outside.get("shared")), casts), context

    @jax.named_scope(_scopes.EMBED)
    def embed(self, row: Row) -> PyTree:
        """Runs the embedding."""
        return self.functions.embed(self.outside, self._context(row, self.layout.num_layers))

    # The embedding's gradient follows what makes dx in the first stage. Its forward runs again
    # rather than keeping its residuals in a slot; of a table look-up nothing is left of it.
    @jax.named_scope(_scopes.EMBED_GRAD)
    def embed_grad(self, state: State, dx: list[jax.Array], row: Row) -> State:
        """Adds up the embedding's gradient; dx has the leaves of x that have a cotangent."""
        ctx = self._context(row, self.layout.num_layers)
        _, doutside = self.gradients.embed(self.outside, ctx, dx)
        return state.add_outside(doutside, self.gradients.embed_rules)

    # The head follows the last stage's F: its value and gradient at once, so that its residuals
    # (the logits) never get a slot; what is kept is the cotangent of x.
    @jax.named_scope(_scopes.HEAD)
    def head(self, state: State, x: PyTree, row: Row) -> tuple[State, PyTree]:
        """Adds up loss and metrics, and gives x with its cotangent in place of its leaves.

        In a program that gives outputs, it sends these on their way instead.
        """
        ctx = self._context(row, self.layout.num_layers + 1)
        gradients = self.functions.gradients
        if self.delivery is not None:
            assert self.functions.output is not None
            assert state.mail is not None
            outputs = self.functions.output(self.outside, x, ctx)
            mail = self.delivery.post(state.mail, outputs, row["microbatch"], row["chunk"])
            return state._replace(mail=mail), x
        if gradients is None:
            assert self.functions.head is not None
            loss, metrics = self.functions.head(self.outside, x, ctx)
        else:
            (loss, metrics, dx), doutside = gradients.head(self.outside, x, ctx, self.loss_seed)
            state, x = state.add_outside(doutside, gradients.head_rules), place(x, dx)
        sums = semantics.add((state.loss, state.metrics), (loss, metrics))
        return state._replace(loss=sums[0], metrics=sums[1]), x

    # One layer: F: x -> y, residuals
    @jax.named_scope(_scopes.FORWARD)
    def forward_of(self, layer: Layer, x: PyTree, row: Row, chunk: int) -> Any:
        """Runs a layer forward: `(y, aux, residual, weight_residual)`."""
        params, ctx = self.read_layer(row, chunk, layer)
        return self.gradients.block[layer.kind].forward(params, x, ctx)

    # I: cotangent of y -> cotangent of x, stash (and gradients that are made with it: mostly none)
    @jax.named_scope(_scopes.INPUT_GRAD)
    def input_grad_of(
        self, layer: Layer, dy: list[jax.Array], kept: Any, kept_longer: Any, row: Row, chunk: int
    ) -> Any:
        """Runs a layer's input grad: `(dx, stash, deferred, early)`."""
        params, ctx = self.read_layer(row, chunk, layer)
        block, aux_seed = self.gradients.block[layer.kind], self.aux_seed[layer.kind]
        return block.input_grad(params, ctx, kept, kept_longer, dy, aux_seed)

    # W: stash (or what is deferred), residuals -> gradients of the layers and of what they share
    @jax.named_scope(_scopes.WEIGHT_GRAD)
    def weight_grad_of(
        self, layer: Layer, kept_longer: Any, values: Any, row: Row, chunk: int, source: str
    ) -> list[jax.Array]:
        """Runs a layer's weight grad from what a buffer, `stash` or `deferred`, has for it."""
        params, ctx = self.read_layer(row, chunk, layer)
        block = self.gradients.block[layer.kind]
        run = block.weight_grad if source == "stash" else block.deferred_weight_grad
        return run(params, ctx, kept_longer, values)

    def weight_grad_flops(
        self, layer: Layer, kept_longer: Any, values: Any, row: Row, chunk: int
    ) -> int:
        """Counts what `weight_grad_of` contracts, from the `stash`; nothing runs."""
        params, ctx = self.read_layer(row, chunk, layer)
        run = self.gradients.block[layer.kind].weight_grad
        return contraction_flops(run, params, ctx, kept_longer, values)

    @property
    def stashes_in_beats(self) -> bool:
        """Whether the run of beats has stashes that ticks have not: W of all layers hides there."""
        return self.full_backward and self.interleaves and not self.layout.is_unrolled

    # Of layers in a row XLA's CPU compiler runs first what waits for nothing: all that they
    # recompute. (Where it shards what they make, picking an entry of that would gather it.)
    def first_turn(self, row: Row) -> jax.Array | None:
        """Makes the turn of the layer whose backward is first: a zero, but XLA does not know it.

        None where layers take no turns.
        """
        if not self.takes_turns:
            return None
        return jnp.minimum(row["microbatch"], 0)

    def in_turn(self, row: Row, turn: jax.Array | None) -> Row:
        """Has a row name what a layer's backward reads only when it is its turn."""
        if turn is None:
            return row
        return {**row, **{name: row[name] + turn for name in (*RESIDUALS, DEFERRED) if name in row}}

    def next_turn(
        self, turn: jax.Array | None, layer: Layer, grads: list[Any], dx: Any = ()
    ) -> jax.Array | None:
        """Has the next layer's turn come when a layer's gradients are added, and its dx is made.

        Args:
          turn: The layer's own.
          layer: The layer.
          grads: What gradients are added up to, for the layers of its kind.
          dx: Its dx.
        """
        if turn is None:
            return None
        return barriers.zero_after((dx, [total[layer.place] for total in grads]), at=turn)
