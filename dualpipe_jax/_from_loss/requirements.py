"""Refuses losses that have no pipeline: each message names an equation, its line, and the cure."""

import math
from collections.abc import Sequence

from dualpipe_jax._errors import raise_all
from dualpipe_jax._from_loss.crossing import Slots, position
from dualpipe_jax._from_loss.layers import Layer
from dualpipe_jax._from_loss.terms import Terms
from dualpipe_jax._from_loss.values import Node, Operand, Stack, Value, needed


def require_layers(outputs: Sequence[Operand | Stack]) -> None:
    """Requires the loss, the first output, to depend on a layer.

    Raises:
      ValueError: If it depends on none.
    """
    if not any(isinstance(a, Value) and a.position >= 0 for a in outputs[:1]):
        raise ValueError(
            "loss_fn: its loss does not depend on the parameters of any layer; name in layers= the "
            "layers that it runs"
        )


def require_own_parameters(nodes: Sequence[Node], num_layers: int, *, is_weighted: bool) -> None:
    """Requires layers in order, each once, with parameters of their own.

    Raises:
      ValueError: If a layer, or the head, reads parameters of an earlier layer.
    """
    for node in nodes:
        here = position(node)
        for value in node.reads:
            if not value.is_weights or value.crosses or not 0 <= value.position < here:
                continue
            if node.results[0].is_weights and node.name in ("stack", "concatenate"):
                raise ValueError(
                    f"loss_fn: an equation at {node.where} mixes the parameters of several layers "
                    f"({value.position} and {here}) in one array; let it act on each layer's own "
                    "parameters, or compute its value outside of loss_fn"
                )
            if node.results[0].is_weights:
                why = "the loss is divided by weight=" if is_weighted else "is no sum over layers"
                raise ValueError(
                    f"loss_fn: the value of {node.name} at {node.where} depends on the parameters "
                    f"of several layers ({value.position} and {here}), and {why}; "
                    "compute it outside of loss_fn (a norm of all parameters, say, beside the "
                    "optimizer's update)"
                )
            reader = f"layer {here}" + (" (or the head)" if here == num_layers - 1 else "")
            raise ValueError(
                f"loss_fn: {reader} reads parameters of layer {value.position} in {node.name} at "
                f"{node.where}: {value}; layers must run in the order of their numbers, each once; "
                "name parameters that several layers use in shared=, and layers that run "
                "alternately with others by a pattern for each"
            )


def require_known_in_head(terms: Terms, slots: Slots) -> None:
    """Requires the head to read parameters of the ends only.

    Raises:
      ValueError: If it reads a layer's.
    """
    targets = [term.value for term in terms.of_head]
    for node in needed(targets, known=slots.before[-1].values()):
        for value in node.reads:
            if value.source is not None and value.source.kind == "layer":
                raise ValueError(
                    f"loss_fn: the head reads a parameter of layer {value.source.layer} in "
                    f"{node.name} at {node.where}: {value}; name it in shared=, or compute the "
                    "value outside of loss_fn"
                )


def require_narrow(slots: Slots, layers: Sequence[Layer], max_x: int) -> None:
    """Requires x to be no larger than `max_x` times the bytes that half of the layers touch.

    Raises:
      ValueError: If it is larger.
    """
    # Values that embed makes are inputs: a table's rows, of which each layer reads its own.
    of_layers = {s for before in slots.before for s, v in before.items() if v.position >= 0}
    total = sum(aval.num_bytes for slot, aval in enumerate(slots.avals) if slot in of_layers)
    sizes = []
    for layer in layers:
        read = {v for node in layer.nodes for v in node.reads}
        touched = {slot for slot, v in layer.x.items() if v in read}
        touched.update(slot for slot, _ in layer.outputs)
        sizes.append(sum(slots.avals[slot].num_bytes for slot in touched))
    usual = sorted(sizes)[len(sizes) // 2]
    needed_x = math.ceil(total / max(usual, 1))
    lines = [
        f"{aval.num_bytes:,} bytes: "
        + "; ".join(
            f"before layer {b} {v}"
            for b, before in enumerate(slots.before)
            for s, v in before.items()
            if s == slot
        )
        for slot, aval in enumerate(slots.avals)
        if slot in of_layers
    ]
    raise_all(
        f"loss_fn: {total:,} bytes cross between layers, more than max_x={max_x} times the "
        f"{usual:,} that half of the layers read and write: values of several layers travel to the "
        f"end; use them in the layer that makes them, or allow it with max_x={needed_x}",
        lines if total > max_x * usual else (),
    )
