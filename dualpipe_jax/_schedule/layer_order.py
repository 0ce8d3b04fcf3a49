"""The order of layers inside a beat, as lists that `beats.Beat` runs, and inside a tick, as drawn.

An order names F, I and W of the layers of a stage, and in a beat where its transfers start and
end. `F0` is the forward of the stage's first layer; `W1@send` waits for the start of the transfers,
so that it hides them, and `W0@receive` for their end. In a loop over layers, `loop(I F)`, I counts
down from the last layer while F counts up from the first.

Four layers, side by side: W of one layer hides the transfers, and W of another hides the fetch of
received values, which the next beat's first matmul reads:

>>> print(write(side_by_side(4, num_held=2, reads_arrivals=True)))
I3 F0 W3 I2 F1 W2 I1 F2 I0 F3 send W1 W0@receive
>>> print(write(side_by_side(2, num_held=2)))
I1 F0 I0 F1 send W1@send W0@send receive
>>> print(write(in_a_row(2)))
F0 F1 I1 W1 I0 W0 send receive
>>> print(write(LOOPED))
loop(I F) send loop(W) receive
"""

from typing import NamedTuple

SEND, RECEIVE = "send", "receive"


class LayerAction(NamedTuple):
    """Names one action of one layer of the stage.

    Attributes:
      action: `"F"`, `"I"`, `"W"`, or `"IW"` for both at once.
      layer: The layer's index in the stage.
      waits_for: `"send"` or `"receive"` for a W that waits for the start or for the end of the
        beat's transfers, `"I"` for an F that waits for the input grads before it, else empty.
    """

    action: str
    layer: int
    waits_for: str = ""

    def __str__(self) -> str:
        return f"{self.action}{self.layer}" + (f"@{self.waits_for}" if self.waits_for else "")


class Loop(NamedTuple):
    """Names actions over a stage's layers: `"F"`, `"I"`, `"W"`, `"IW"`; `"IF"` of two stages."""

    actions: str

    def __str__(self) -> str:
        return f"loop({' '.join(self.actions)})"


# Transfers are the strings `SEND` and `RECEIVE`.
Order = tuple[LayerAction | Loop | str, ...]

# Orders of a beat where layers are a loop.
LOOPED: Order = (Loop("IF"), SEND, Loop("W"), RECEIVE)
LOOPED_IN_A_ROW: Order = (Loop("F"), Loop("I"), SEND, Loop("W"), RECEIVE)
LOOPED_FULL_BACKWARD: Order = (Loop("F"), Loop("IW"), SEND)


def side_by_side(
    num_layers: int, *, num_held: int, reads_arrivals: bool = False, all_wait: bool = True
) -> Order:
    """Orders a beat of unrolled layers on devices that overlap transfers and compute.

    F of layer j runs beside I of layer L-1-j, so that either has its turn before the other needs
    a slot, and collectives inside a block have the other direction's compute to hide behind.

    Args:
      num_layers: The layers of the stage.
      num_held: How many W's run after the transfers have started.
      reads_arrivals: Whether the W's before the last one hide the transfers, so that the last one
        waits for their end. Else W's wait for their start.
      all_wait: Whether all of those do, or only the last one.
    """
    order: list[LayerAction | Loop | str] = []
    for number in range(num_layers):
        layer = num_layers - 1 - number
        order += [LayerAction("I", layer), LayerAction("F", number)]
        if number < num_layers - num_held:
            order.append(LayerAction("W", layer))
    order.append(SEND)
    for layer in reversed(range(num_held)):
        waits = RECEIVE if reads_arrivals else SEND
        is_on = layer == 0 or (all_wait and not reads_arrivals)
        order.append(LayerAction("W", layer, waits if is_on else ""))
    return (*order, *(() if reads_arrivals else (RECEIVE,)))


def in_a_row(num_layers: int) -> Order:
    """Orders a beat of unrolled layers on devices that overlap nothing, such as CPUs.

    All reads of the slots come after the writes of F, so that only the next beat's F waits.
    """
    forward = [LayerAction("F", layer) for layer in range(num_layers)]
    backward = [LayerAction(act, layer) for layer in reversed(range(num_layers)) for act in "IW"]
    return (*forward, *backward, SEND, RECEIVE)


def join_backwards(order: Order, *, num_always: int) -> Order:
    """Joins I and W of the layers that some stages do not have, at the place of I.

    A rank runs both or neither, so that nothing passes from one to the other where neither runs.

    >>> print(write(join_backwards(side_by_side(3, num_held=1), num_always=2)))
    IW2 F0 I1 F1 W1 I0 F2 send W0@send receive

    Args:
      order: An order of unrolled layers.
      num_always: The layers, the stage's first ones, that all stages have.
    """
    joined: list[LayerAction | Loop | str] = []
    for item in order:
        if isinstance(item, LayerAction) and item.layer >= num_always and item.action != "F":
            joined += [item._replace(action="IW")] if item.action == "I" else []
        else:
            joined.append(item)
    return tuple(joined)


def hold_last_forward(order: Order, *, num_forward: int) -> Order:
    """Has the last F wait for the input grads before it.

    >>> print(write(hold_last_forward(side_by_side(2, num_held=1), num_forward=2)))
    I1 F0 W1 I0 F1@I send W0@send receive

    Args:
      order: An order of unrolled layers.
      num_forward: The layers of the stage that runs forwards.
    """
    last = LayerAction("F", num_forward - 1)
    return tuple(last._replace(waits_for="I") if item == last else item for item in order)


def write(order: Order) -> str:
    """Writes an order in a line."""
    return " ".join(map(str, order))


def orders_of(num_layers: int, *, has_beats: bool) -> dict[str, Order]:
    """Names the orders of unrolled layers in a tick, and in a beat if the schedule has any.

    On TPUs and GPUs W of the stage's first layer runs beside the transfers. More W's do where one
    does not take long enough to hide them, or where blocks have collectives.

    >>> for name, order in orders_of(3, has_beats=True).items():
    ...     print(f"{name:23}{write(order)}")
    tick of F              F0 F1 F2
    tick of I              I2 I1 I0
    tick of W              W2 W1 W0
    full backward          I2 W2 I1 W1 I0 W0
    beat, TPUs and GPUs    I2 F0 W2 I1 F1 W1 I0 F2 send W0@send receive
    beat, CPUs             F0 F1 F2 I2 W2 I1 W1 I0 W0 send receive
    """
    up, down = range(num_layers), range(num_layers - 1, -1, -1)
    orders: dict[str, Order] = {
        "tick of F": tuple(LayerAction("F", layer) for layer in up),
        "tick of I": tuple(LayerAction("I", layer) for layer in down),
        "tick of W": tuple(LayerAction("W", layer) for layer in down),
        "full backward": tuple(LayerAction(action, layer) for layer in down for action in "IW"),
    }
    if has_beats:
        orders["beat, TPUs and GPUs"] = side_by_side(num_layers, num_held=1)
        orders["beat, CPUs"] = in_a_row(num_layers)
    return orders
