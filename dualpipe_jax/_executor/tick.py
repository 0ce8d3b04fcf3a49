"""One tick of one rank: store what arrived, run this rank's action, send.

The tables say what to do; everything but the rank is static. Which action runs is decided by a
`lax.switch`, whose branches hold no collective over the pipeline axis: the two permutes that move
activations and cotangents, right and left, follow it on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax import _microbatches
from dualpipe_jax._executor import registers
from dualpipe_jax._executor.layout import Layout
from dualpipe_jax._split_vjp import SplitVjp, is_differentiable
from dualpipe_jax._types import Context, Model

PyTree = Any


class State(NamedTuple):
    """What a rank carries from tick to tick.

    Attributes:
      received: Activations and cotangents that wait for their action, `[slot, ...]` for each leaf
        of x; the last slot takes what nobody wants.
      residual: What the forward keeps for the input gradient, `[slot, layer, ...]`.
      weight_residual: What the forward keeps for the weight gradient, `[slot, layer, ...]`.
      stash: What the input gradient keeps for the weight gradient, `[slot, layer, ...]`.
      block_grads: For each chunk the gradients of the leaves that have one, `[layer, ...]`.
      ends_grads: The gradients of the differentiable leaves of `ends`.
      loss, aux, metrics: Sums over microbatches.
      from_left, from_right: What the neighbours sent in the tick before: an x.
    """

    received: PyTree
    residual: Any
    weight_residual: Any
    stash: Any
    block_grads: list[list[jax.Array]]
    ends_grads: list[jax.Array]
    loss: jax.Array
    aux: jax.Array | None
    metrics: PyTree
    from_left: PyTree
    from_right: PyTree


Row = dict[str, jax.Array]  # this rank's row of the tables, int32 scalars
Action = Callable[[State, Row], tuple[State, PyTree]]  # returns what it sends, an x


@dataclass(frozen=True, eq=False, kw_only=True)
class Rank:
    """Runs the actions of one rank.

    Attributes:
      model: The model.
      layout: Which layers are whose.
      split: The block's split backward; None in forward-only programs.
      block: `(params, x, ctx) -> (y, aux)`.
      chunks: The layers' parameters `[max_layers, ...]` of each chunk.
      ends: The parameters outside the layer stack.
      microbatches: The batch, `[num_microbatches, ...]`.
      rng: The step's key, or None.
      shard: The index of this shard of the batch, or None if there is one only.
      loss_seed: The cotangent of each microbatch's loss, a scalar.
      aux_seed: The cotangent of each layer's aux loss, a scalar; None without.
      x: Avals of x.
      poison: Whether to overwrite what is dead with values that spread, in tests.
    """

    model: Model
    layout: Layout
    split: SplitVjp | None
    block: Callable[..., tuple[PyTree, Any]]
    chunks: list[PyTree]
    ends: PyTree
    microbatches: PyTree
    rng: jax.Array | None
    shard: jax.Array | None
    loss_seed: jax.Array
    aux_seed: jax.Array | None
    x: PyTree
    poison: bool = False

    def actions(self) -> list[Action]:
        """Lists the branches: idle, then F, I, W of each chunk (`branch_of` numbers them)."""
        actions: list[Action] = [self._idle]
        for chunk in range(len(self.chunks)):
            for run in (self._forward, self._input_grad, self._weight_grad):
                if run == self._forward or self.split is not None:
                    actions.append(
                        lambda state, row, run=run, chunk=chunk: run(state, row, chunk)
                    )
        return actions

    def branch_of(self, opcode: Any, chunk: Any) -> Any:
        """Numbers the branch of an action in `actions`; opcodes are 0 idle, 1 F, 2 I, 3 W."""
        num_kinds = 3 if self.split is not None else 1
        return jnp.where(opcode == 0, 0, chunk * num_kinds + opcode)

    def _idle(self, state: State, row: Row) -> tuple[State, PyTree]:
        return state, self._nothing()

    def _nothing(self) -> PyTree:
        return registers.allocate(self.x, poison=self.poison)

    def _context(self, row: Row, position: Any, *, is_layer: bool = False) -> Context:
        return _microbatches.context(
            _microbatches.take(self.microbatches, row["microbatch"]),
            _microbatches.microbatch_key(self.rng, row["microbatch"]),
            position,
            is_layer=is_layer,
            shard=self.shard,
        )

    def _layer(self, row: Row, chunk: int, layer: Any) -> tuple[PyTree, Context]:
        """Reads a layer's parameters and makes its context."""
        params = registers.read(self.chunks[chunk], layer + self.layout.offset_of(row["stage"]))
        position = self.layout.first_layer_of(row["stage"]) + layer
        return params, self._context(row, position, is_layer=True)

    # F: x -> y, residuals; on the last stage also the head, whose cotangent of y is what it sends.
    def _forward(self, state: State, row: Row, chunk: int) -> tuple[State, PyTree]:
        num_layers, num_stages = self.layout.num_layers, self.layout.num_stages
        x = _either(
            row["stage"] == 0,
            num_stages == 1,
            lambda: _microbatches.strong(
                self.model.embed(self.ends, self._context(row, num_layers))
            ),
            lambda: registers.read(state.received, row["read"]),
        )

        def layer(index: Any, carry: Any) -> Any:
            x, aux_sum, residual, weight_residual = carry
            params, ctx = self._layer(row, chunk, index)
            if self.split is None:
                x, aux = self.block(params, x, ctx)
            else:
                x, aux, kept, kept_longer = self.split.forward(params, x, ctx)
                residual = registers.write(residual, kept, row["residual"], index)
                weight_residual = registers.write(
                    weight_residual, kept_longer, row["weight_residual"], index
                )
            if aux is not None:
                aux_sum = _microbatches.add(aux_sum, aux)
            return x, aux_sum, residual, weight_residual

        carry = (x, state.aux, state.residual, state.weight_residual)
        x, aux, residual, weight_residual = self.layout.loop(row["stage"], layer, carry)
        state = state._replace(aux=aux, residual=residual, weight_residual=weight_residual)
        sums = state.ends_grads, state.loss, state.metrics
        out, sums = _either(
            row["stage"] == num_stages - 1,
            num_stages == 1,
            lambda: self._head(x, sums, self._context(row, num_layers + 1)),
            lambda: (x, sums),
        )
        return state._replace(ends_grads=sums[0], loss=sums[1], metrics=sums[2]), out

    def _head(self, x: PyTree, sums: tuple, ctx: Context) -> tuple[PyTree, tuple]:
        ends_grads, loss_sum, metrics_sum = sums

        def head(ends_leaves: list, x_leaves: list) -> tuple[jax.Array, PyTree]:
            outputs = self.model.head(
                _with_leaves(self.ends, ends_leaves), _with_leaves(x, x_leaves), ctx
            )
            return _microbatches.head_outputs(self.model, outputs)

        args = _leaves(self.ends), _leaves(x)
        if self.split is None:
            loss, metrics = head(*args)
        else:
            loss, pull, metrics = jax.vjp(head, *args, has_aux=True)
            dends, dx = pull(self.loss_seed.astype(loss.dtype))
            ends_grads = _microbatches.add(ends_grads, dends)
            x = _with_leaves(x, dx)
        loss_sum, metrics_sum = _microbatches.add((loss_sum, metrics_sum), (loss, metrics))
        return x, (ends_grads, loss_sum, metrics_sum)

    # I: cotangent of y -> cotangent of x, stash; on the first stage also the embedding's gradient.
    def _input_grad(self, state: State, row: Row, chunk: int) -> tuple[State, PyTree]:
        assert self.split is not None
        split = self.split
        dy = _leaves(registers.read(state.received, row["read"]))

        def layer(index: Any, carry: Any) -> Any:
            dy, stash = carry
            params, ctx = self._layer(row, chunk, index)
            dx, values = split.input_grad(
                params,
                ctx,
                registers.read(state.residual, row["residual"], index),
                registers.read(state.weight_residual, row["weight_residual"], index),
                dy,
                self.aux_seed,
            )
            return dx, registers.write(stash, values, row["stash"], index)

        dx, stash = self.layout.loop(row["stage"], layer, (dy, state.stash), reverse=True)
        ends_grads = _either(
            row["stage"] == 0,
            self.layout.num_stages == 1,
            lambda: self._embed_grad(state.ends_grads, dx, row),
            lambda: state.ends_grads,
        )
        state = state._replace(stash=stash, ends_grads=ends_grads)
        if self.poison:
            state = state._replace(residual=registers.poison(state.residual, row["residual"]))
        return state, _with_leaves(self._nothing(), dx)

    def _embed_grad(self, grads: list[jax.Array], dx: list[jax.Array], row: Row) -> list[jax.Array]:
        ctx = self._context(row, self.layout.num_layers)

        def embed(leaves: list) -> list[jax.Array]:
            return _leaves(_microbatches.strong(
                self.model.embed(_with_leaves(self.ends, leaves), ctx)
            ))

        # The embedding's forward runs again rather than keeping its residuals in a slot; of a
        # table look-up nothing is left of it.
        return _microbatches.add(grads, jax.vjp(embed, _leaves(self.ends))[1](dx)[0])

    # W: stash, residuals -> gradients of the layers, added up in place.
    def _weight_grad(self, state: State, row: Row, chunk: int) -> tuple[State, PyTree]:
        assert self.split is not None
        split = self.split
        offset = self.layout.offset_of(row["stage"])

        def layer(index: Any, grads: Any) -> Any:
            params, ctx = self._layer(row, chunk, index)
            dparams = split.weight_grad(
                params,
                ctx,
                registers.read(state.weight_residual, row["weight_residual"], index),
                registers.read(state.stash, row["stash"], index),
            )
            return registers.accumulate(grads, dparams, index + offset)

        grads = self.layout.loop(row["stage"], layer, state.block_grads[chunk], reverse=True)
        block_grads = [grads if c == chunk else g for c, g in enumerate(state.block_grads)]
        state = state._replace(block_grads=block_grads)
        if self.poison:
            state = state._replace(
                weight_residual=registers.poison(state.weight_residual, row["weight_residual"]),
                stash=registers.poison(state.stash, row["stash"]),
            )
        return state, self._nothing()


def make_tick(rank: Rank, *, num_ranks: int, wraps: bool) -> Callable[[State, Row], State]:
    """Makes the function that runs one row of the tables."""
    axis = rank.layout.axis
    right = [(r, (r + 1) % num_ranks) for r in range(num_ranks if wraps else num_ranks - 1)]
    left = [(target, source) for source, target in right]
    actions = rank.actions()

    def tick(state: State, row: Row) -> State:
        # A slot of -1, none, becomes the last one, which nobody reads.
        last = jax.tree.leaves(state.received)[0].shape[0] - 1
        from_left, from_right, keep, read = (
            jnp.where(row[name] < 0, last, row[name])
            for name in ("from_left", "from_right", "keep", "read")
        )
        row = {**row, "read": read}
        received = registers.write(state.received, state.from_left, from_left)
        received = registers.write(received, state.from_right, from_right)
        state = state._replace(received=received)
        branch = rank.branch_of(row["opcode"], row["chunk"])
        state, out = lax.switch(branch, actions, state, row)
        received = state.received
        if rank.poison:
            received = registers.poison(received, read)
        state = state._replace(received=registers.write(received, out, keep))
        if num_ranks == 1:
            return state
        return state._replace(
            from_left=lax.ppermute(out, axis, right), from_right=lax.ppermute(out, axis, left)
        )

    return tick


def _either(predicate: Any, is_always: bool, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """As `lax.cond`, without the branch that is never taken."""
    return yes() if is_always else lax.cond(predicate, yes, no)


def _leaves(tree: PyTree) -> list[jax.Array]:
    """Lists the leaves that have a cotangent."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_differentiable(leaf)]


def _with_leaves(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
    """Puts `leaves` in the places of those leaves of `tree` that have a cotangent."""
    rest = iter(leaves)
    return jax.tree.map(lambda old: next(rest) if is_differentiable(old) else old, tree)
