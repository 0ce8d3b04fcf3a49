"""Tokens to their experts, on whatever device these are, and back: capacity and dropless modes.

In: tokens, their routing, the kernels of this device's experts. Out: for each token the sum over
its experts of gate times output, and how many choices were dropped.

A choice is a token beside one of its experts: choice c is token c // chosen. Choices move to slots,
sorted by expert, and slots to the experts' devices by an all-to-all over a mesh axis. Device e has
the experts e * local to (e + 1) * local - 1. Each device sorts and counts its own tokens only.

Gates travel along, and multiply an expert's hidden values: so their gradients are made where it is,
and a backward that recomputes needs neither the experts' outputs nor the way back once more.

All moves are gathers, forward and backward (`take_rows`), and sizes are static: in capacity mode
each device has `capacity` slots for each expert; in dropless mode as many for each device as it may
have choices for it at the worst.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.deepseek_mini.routing import Routing

# [experts, width, hidden] for "gate" and "up", [experts, hidden, width] for "down".
Kernels = Mapping[str, jax.Array]
# The arguments of `jax.lax.ragged_all_to_all` beside its buffers.
Route = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def every_expert(x: jax.Array, routing: Routing, kernels: Kernels) -> jax.Array:
    """Runs every expert on every token: the plain meaning of both modes, at many times the cost.

    Args:
      x: [tokens, width].
      routing: As of `routing.route`.
      kernels: Those of all experts.
    """
    num_experts = len(kernels["up"])
    is_chosen = jax.nn.one_hot(routing.experts, num_experts, dtype=routing.gates.dtype)
    gates = jnp.einsum("tke,tk->et", is_chosen, routing.gates)
    out = swiglu(jnp.broadcast_to(x, (num_experts, *x.shape)), kernels, gates)
    return out.sum(0)


def capacity_of(num_tokens: int, *, num_chosen: int, num_experts: int, factor: float) -> int:
    """Gives the slots for each expert: `factor` times the mean number of choices, rounded up."""
    return math.ceil(factor * num_tokens * num_chosen / num_experts)


def with_capacity(
    x: jax.Array,
    routing: Routing,
    kernels: Kernels,
    *,
    num_experts: int,
    capacity: int,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the chosen experts on up to `capacity` choices each from every device.

    Of too many choices those with the smallest gates are dropped: their expert adds nothing to
    the token (DeepSeek-V2, arXiv:2405.04434, section 2.2.4).

    Args:
      x: [tokens, width], this device's.
      routing: Theirs.
      kernels: Those of this device's experts.
      num_experts: On all devices.
      capacity: Slots for each expert.
      axis: The mesh axis of the experts; None if all are here.

    Returns:
      y, as x, and how many choices of this device were dropped, an int32 scalar.
    """
    num_tokens, num_chosen = routing.experts.shape
    num_choices, num_slots = num_tokens * num_chosen, num_experts * capacity
    num_local = len(kernels["up"])
    by_gate = -lax.stop_gradient(routing.gates).reshape(-1)
    order = jnp.lexsort((by_gate, routing.experts.reshape(-1))).astype(jnp.int32)
    expert = routing.experts.reshape(-1)[order]
    counts = _count(routing.experts, num_experts)
    place = jnp.arange(num_choices, dtype=jnp.int32) - _starts(counts)[expert]
    slot = jnp.where(place < capacity, expert * capacity + place, num_slots)
    slot_of_choice = _inverse(order, slot, num_choices)
    choice_of_slot = _inverse(slot, order, num_slots, missing=num_choices)
    # Slots are empty, and choices dropped.
    holes = {"has_holes": True, "inverse_has_holes": True}
    # The token in each slot, and the slots of each token.
    token, slots = choice_of_slot[:, None] // num_chosen, slot_of_choice.reshape(-1, num_chosen)

    def to_experts(sent: jax.Array) -> jax.Array:  # [slots, ...] to [local, slots, ...]
        sent = sent.reshape(-1, num_local, capacity, *sent.shape[1:])  # [device, local, slot, ...]
        received = _exchange(sent, axis).swapaxes(0, 1)
        return received.reshape(num_local, -1, *sent.shape[3:])

    gates = routing.gates.reshape(-1)
    gates = to_experts(take_rows(gates, choice_of_slot[:, None], slot_of_choice[:, None], **holes))
    out = swiglu(to_experts(take_rows(x, token, slots, **holes)), kernels, gates)
    out = out.reshape(num_local, -1, capacity, x.shape[-1]).swapaxes(0, 1)
    out = _exchange(out, axis).reshape(num_slots, -1)
    dropped = jnp.maximum(counts - capacity, 0).sum(dtype=jnp.int32)
    return take_rows(out, slots, token, **holes), dropped


def dropless(
    x: jax.Array,
    routing: Routing,
    kernels: Kernels,
    *,
    num_experts: int,
    axis: str | None = None,
    is_ragged: bool = False,
) -> jax.Array:
    """Runs the chosen experts on all choices: matmuls in groups, `jax.lax.ragged_dot`.

    Args:
      x: [tokens, width], this device's.
      routing: Theirs.
      kernels: Those of this device's experts.
      num_experts: On all devices.
      axis: The mesh axis of the experts; None if all are here.
      is_ragged: Whether only filled slots are sent, by `jax.lax.ragged_all_to_all`, and not the
        empty ones too. See `has_ragged`.

    Returns:
      y, as x.
    """
    num_choices, num_chosen = routing.experts.size, routing.experts.shape[1]
    order = jnp.argsort(routing.experts.reshape(-1), stable=True).astype(jnp.int32)
    counts = _count(routing.experts, num_experts)
    gates = routing.gates.reshape(-1)
    gates = gates.astype(jnp.promote_types(gates.dtype, jnp.float32))
    place = jnp.arange(num_choices, dtype=jnp.int32)
    # Sorted by expert: the token at each index, and the indices of each token.
    place_of_choice = _inverse(order, place, num_choices)
    token, places = order[:, None] // num_chosen, place_of_choice.reshape(-1, num_chosen)
    if axis is None:
        gates = take_rows(gates, order[:, None], place_of_choice[:, None])
        sent = take_rows(x, token, places)
        out = grouped_swiglu(sent, kernels, gates, counts)
        return take_rows(out, places, token)

    num_devices, num_local = lax.axis_size(axis), len(kernels["up"])
    limit = len(x) * min(num_chosen, num_local)  # a token's experts are all different
    counts = counts.reshape(num_devices, num_local)
    sizes = counts.sum(1, dtype=jnp.int32)
    device = routing.experts.reshape(-1)[order] // num_local
    # For each device as many slots as it may have choices at the worst.
    num_slots = num_devices * limit
    slot = device * limit + place - _starts(sizes)[device]
    slot_of_choice = _inverse(order, slot, num_choices)
    choice_of_slot = _inverse(slot, order, num_slots, missing=num_choices)
    # In empty slots may be anything, here and below, until `grouped` has zeros for them.
    gates = take_rows(gates, choice_of_slot[:, None], slot_of_choice[:, None])
    if not is_ragged:
        token, places = choice_of_slot[:, None] // num_chosen, slot_of_choice.reshape(places.shape)
    sent = take_rows(x, token, places)

    # One small exchange: gates, how many rows for each expert, where these begin on their device.
    tables = jnp.concatenate([counts, _starts(sizes)[:, None]], 1)
    gates = _varying(gates.reshape(num_devices, limit), {axis})
    gates, theirs = exchange_gates(axis, gates, tables)
    gates = gates.reshape(-1)
    their_counts, their_starts = theirs[:, :-1], theirs[:, -1]
    their_sizes = their_counts.sum(1, dtype=jnp.int32)
    # For each device: where its rows begin, how many, where they are put, how many are sent back.
    to_me = jnp.full_like(sizes, limit) * lax.axis_index(axis)
    from_me = jnp.arange(num_devices, dtype=jnp.int32) * limit
    there = (_starts(sizes), sizes, to_me, their_sizes)
    back = (from_me, their_sizes, their_starts, sizes)
    if is_ragged:
        sent = _varying(sent, {axis})
        received = send_ragged(axis, (num_choices, num_slots), sent, there, back)
    else:
        received = _exchange(sent.reshape(num_devices, limit, -1), axis).reshape(num_slots, -1)
    # Rows came sorted by expert from each device. Empty slots stand for an expert beyond the last,
    # and are read as zeros; their outputs' cotangents become zeros, too.
    ends = jnp.cumsum(their_counts, 1)
    expert = (jnp.arange(limit)[:, None] >= ends[:, None]).sum(-1)  # [from device, slot]
    by_expert = jnp.argsort(expert.reshape(-1), stable=True).astype(jnp.int32)
    rows = jnp.arange(num_slots, dtype=jnp.int32)
    by_expert = jnp.where(rows < their_sizes.sum(), by_expert, len(rows))
    as_they_came = _inverse(by_expert, rows, len(rows), missing=len(rows))[:, None]
    by_expert = by_expert[:, None]
    grouped = take_rows(received, by_expert, as_they_came, has_holes=True)
    gates = take_rows(gates, by_expert, as_they_came)
    out = grouped_swiglu(grouped, kernels, gates, their_counts.sum(0, dtype=jnp.int32))
    out = take_rows(out, as_they_came, by_expert, inverse_has_holes=True)
    if is_ragged:
        out = send_ragged(axis, (num_slots, num_choices), out, back, there)
    else:
        out = _exchange(out.reshape(num_devices, limit, -1), axis).reshape(num_slots, -1)
    return take_rows(out, places, token)


def has_ragged(platform: str) -> bool:
    """Whether `jax.lax.ragged_all_to_all` runs there: on TPUs and GPUs, not on CPUs."""
    return platform in ("tpu", "gpu", "cuda")


def swiglu(x: jax.Array, kernels: Kernels, gates: jax.Array) -> jax.Array:
    """Gives gate times output of expert e on `x[e]`: [experts, rows, width] to the same.

    Args:
      x: [experts, rows, width].
      kernels: Those of these experts.
      gates: [experts, rows].
    """
    gate, up, down = (kernels[name].astype(x.dtype) for name in ("gate", "up", "down"))
    hidden = jax.nn.silu(jnp.einsum("erd,edh->erh", x, gate))
    hidden = hidden * jnp.einsum("erd,edh->erh", x, up)
    return jnp.einsum("erh,ehd->erd", _times(hidden, gates), down)


def grouped_swiglu(x: jax.Array, kernels: Kernels, gates: jax.Array, sizes: jax.Array) -> jax.Array:
    """Runs the first expert on the first `sizes[0]` rows, and so on; [rows, width] to the same.

    Outputs of rows beyond the last group are not to be used; nothing else depends on them.
    """
    gate, up, down = (kernels[name].astype(x.dtype) for name in ("gate", "up", "down"))
    hidden = jax.nn.silu(lax.ragged_dot(x, gate, sizes)) * lax.ragged_dot(x, up, sizes)
    return lax.ragged_dot(_times(hidden, gates), down, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def take_rows(
    values: jax.Array,
    index: jax.Array,
    inverse: jax.Array,
    has_holes: bool = False,
    inverse_has_holes: bool = False,
) -> jax.Array:
    """Adds up `values[index[:, i]]` over i, with zeros where `index` is the number of rows.

    The derivative is made of gathers too, not the scatter that JAX would make of it.

    Args:
      values: [rows, ...].
      index: int32[taken, n], which rows each one that is made is the sum of.
      inverse: int32[rows, m], where in `index` each row stands; `taken` for places that it has
        not.
      has_holes: Whether there are to be zeros; without, any row may replace them, and the
        result is not read and written once more.
      inverse_has_holes: The same of the derivative.
    """
    del inverse, inverse_has_holes
    mode: Any = {"mode": "fill", "fill_value": 0} if has_holes else {"mode": "clip"}
    taken = [values.at[index[:, i]].get(**mode) for i in range(index.shape[1])]
    if len(taken) == 1:
        return taken[0]
    wide = jnp.promote_types(values.dtype, jnp.float32)
    total = functools.reduce(jnp.add, (each.astype(wide) for each in taken))
    return total.astype(values.dtype)


def _take_rows_forward(
    values: jax.Array, index: jax.Array, inverse: jax.Array, *has_holes: bool
) -> Any:
    return take_rows(values, index, inverse, *has_holes), (index, inverse)


def _take_rows_backward(
    has_holes: bool, inverse_has_holes: bool, residual: Any, cotangent: jax.Array
) -> Any:
    index, inverse = residual
    back = take_rows(cotangent, inverse, index, inverse_has_holes, has_holes)
    return back, None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def exchange_gates(axis: str, gates: jax.Array, tables: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sends `gates[e]` and `tables[e]` to device e of an axis, both in one exchange, as bits.

    Args:
      axis: The mesh axis.
      gates: [to device, slots], float32 or float64.
      tables: int32[to device, n].

    Returns:
      Both, [from device, ...].
    """
    bits = lax.bitcast_convert_type(gates, jnp.int32)  # [to device, slots], or [..., 2]
    flat = bits.reshape(len(bits), -1)
    both = _exchange(jnp.concatenate([flat, tables], 1), axis)
    received = both[:, : flat.shape[1]].reshape(bits.shape)
    return lax.bitcast_convert_type(received, gates.dtype), both[:, flat.shape[1] :]


def _exchange_gates_forward(axis: str, gates: jax.Array, tables: jax.Array) -> Any:
    return exchange_gates(axis, gates, tables), None


def _exchange_gates_backward(axis: str, residual: None, cotangents: Any) -> Any:
    del residual
    return _exchange(cotangents[0], axis), None


exchange_gates.defvjp(_exchange_gates_forward, _exchange_gates_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def send_ragged(
    axis: str, num_rows: tuple[int, int], values: jax.Array, there: Route, back: Route
) -> jax.Array:
    """Sends to each device of an axis its rows; in rows that nobody sent is whatever was there.

    The derivative sends the cotangents back the same way. JAX's own derivative exchanges the
    offsets, twice for each ragged exchange, before it can send anything.

    Args:
      axis: The mesh axis.
      num_rows: The number of `values` and of received rows.
      values: [num_rows[0], width].
      there: For each device, int32[devices]: where its rows begin, how many, where they go to in
        its memory, and how many it sends here.
      back: The same for the way back: from the received rows to their indices in `values`.
    """
    del back
    received = lax.empty((num_rows[1], values.shape[1]), values.dtype)
    received = _varying(received, _axes_of(values) | {axis})
    return lax.ragged_all_to_all(values, received, *there, axis_name=axis)


def _send_ragged_forward(
    axis: str, num_rows: tuple[int, int], values: jax.Array, there: Route, back: Route
) -> Any:
    return send_ragged(axis, num_rows, values, there, back), (there, back)


def _send_ragged_backward(
    axis: str, num_rows: tuple[int, int], residual: Any, cotangent: jax.Array
) -> Any:
    there, back = residual
    return send_ragged(axis, num_rows[::-1], cotangent, back, there), None, None


send_ragged.defvjp(_send_ragged_forward, _send_ragged_backward)


def _times(hidden: jax.Array, gates: jax.Array) -> jax.Array:
    """Multiplies rows by their gates, in the wider of the dtypes, and rounds once."""
    return (hidden * gates[..., None]).astype(hidden.dtype)


def _axes_of(values: jax.Array) -> frozenset[str]:
    """Gives the manual mesh axes over which values are known to vary."""
    return jax.typeof(values).manual_axis_type.varying


def _varying(values: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Has values vary over these axes too, as the type of their results says."""
    missing = tuple(sorted(set(axes) - _axes_of(values)))
    return lax.pcast(values, missing, to="varying") if missing else values


def _exchange(values: jax.Array, axis: str | None) -> jax.Array:
    """Sends `values[e]` to device e: [to device, ...] to [from device, ...]."""
    return values if axis is None else lax.all_to_all(values, axis, 0, 0, tiled=True)


def _count(experts: jax.Array, num_experts: int) -> jax.Array:
    return jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum((0, 1), dtype=jnp.int32)


def _starts(sizes: jax.Array) -> jax.Array:
    """Gives where each of groups that follow one another begins."""
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


def _inverse(index: jax.Array, values: jax.Array, size: int, missing: int = 0) -> jax.Array:
    """Puts `values[i]` at `index[i]` of an array of `missing`s, if it is in there."""
    return jnp.full(size, missing, values.dtype).at[index].set(values, mode="drop")
