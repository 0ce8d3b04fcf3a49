"""A model's costs -> how long the actions of its stages take, and the bytes that they keep."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, SupportsFloat

import numpy as np

from dualpipe_jax._costs.layers import StageLayers
from dualpipe_jax._errors import brief, show
from dualpipe_jax._schedule.actions import FORWARD, INPUT_GRAD
from dualpipe_jax._schedule.durations import Copies, Durations
from dualpipe_jax._sizes import parse_bytes

# The length of a transfer, as a share of a rank's forward, where it is not given: at a width of
# 1024 or more an activation takes up to about a tenth of it over today's links. (Without transfers
# no alignment would pay: its gain is that they run behind the beats' own compute.)
TRANSFER = 0.1
# A full backward stashes nothing for all layers of a stage. Compiled for a TPU v5e it takes 0.81 to
# 0.96 of the cycles of split I and W in eleven of twelve stages of transformers and MLPs, 1.01 in
# one of two layers of an MLP, without rematerialisation (experiments/compiled).
FULL_BACKWARD = 0.9
# The largest cost, and the inverse of the least of a forward: their products and sums over all
# actions of a step are still floats.
_MOST = 1e100
# The fields that are no times.
_NO_TIMES = ("layer", "activation_bytes", "stash_bytes")


def as_number(name: str, value: Any) -> float:
    """Converts a number, or an array of one, to a float.

    Raises:
      TypeError: if the value is no number.
      ValueError: if it is beyond all floats.
    """
    try:
        # A str is no SupportsFloat; a complex scalar of NumPy is one.
        is_wrong = isinstance(value, bool | np.bool_ | np.complexfloating)
        if isinstance(value, SupportsFloat) and not is_wrong:
            return float(value)
    except OverflowError:
        raise ValueError(f"{name}: must be finite, but is beyond all floats") from None
    except (TypeError, ValueError):
        pass  # an array of several, or a tracer
    raise TypeError(f"{name}={brief(value)}: must be a number")


def is_cost(number: float) -> bool:
    """Whether a number is neither negative nor so large that a step's time may overflow."""
    return 0 <= number <= _MOST


_COST = f"a cost must be a finite number, 0 or more and at most {_MOST:g}"


def require_cost(name: str, number: float) -> None:
    """Requires a number that is neither negative nor too large.

    Raises:
      ValueError: if it is.
    """
    if not is_cost(number):
        raise ValueError(f"{name}={brief(number)}: {_COST}")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Holds how long actions take, in any one unit of time, and the bytes that they keep.

    A schedule cuts the model into as many stages as there are ranks, or more. The costs are those
    of a rank's whole share of the layers, so that each schedule has the same work to do; a stage
    costs its fraction of them.

    Attributes:
      forward: F of num_layers / num_ranks layers.
      input_grad: I of as many.
      weight_grad: W of as many.
      embed: The embedding's forward. It belongs to the first stage's F. Its gradient has a weight
        gradient only, at `weight_grad / forward` times the cost, and belongs to the first stage's
        I, or to the half of a full backward that makes the cotangent of x.
      head: The head's forward. It belongs to the last stage's F and so does its gradient, at
        `(input_grad + weight_grad) / forward` times the cost.
      recompute: The additional cost of a deferred W of as many layers as F, if it recomputes.
      full_backward: B of as many, where I and W are fused (`Execution(split_backward=False)`);
        None for the sum of the two.
      layer: The relative cost of one layer of each kind in `Model.layout`, F, I and W together, in
        any unit: `{"dense": 0.5, "moe": 1.0}`; None if all layers cost the same. The costs above
        remain those of the whole model's layers divided by num_ranks.
      activation_bytes: The bytes of one activation: those that F of num_layers / num_ranks layers
        keeps of one microbatch on one device, for its I and W; None if not known. Only
        `schedules.search(memory=)` reads it and the next.
      stash_bytes: The bytes that I of as many keeps for a W that does not follow it at once.
      spill: How long the copy of one activation, of num_layers / num_ranks layers, takes to the
        host's memory. `Execution(slots_on_device=)` says which part of it leaves.
      fill: The same back to the device.

    Raises:
      TypeError: if one is no number, or `layer` no mapping of such.
      ValueError: if one is negative, not finite or larger than 1e100, naming all such; if `forward`
        is zero or `activation_bytes` less than 1, or `full_backward` is not zero where I and W are.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    embed: float = 0.0
    head: float = 0.0
    recompute: float = 0.0
    full_backward: float | None = None
    layer: Mapping[Hashable, float] | None = None
    activation_bytes: float | None = None
    stash_bytes: float = 0.0
    spill: float = 0.0
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.layer is not None:
            object.__setattr__(self, "layer", _costs_of_kinds(self.layer))
        stated = {
            name: value
            for name, value in vars(self).items()
            if name != "layer"
            and not (name in ("full_backward", "activation_bytes") and value is None)
        }
        for name, value in stated.items():
            number = as_number(name, value)
            # Measured ones may be arrays, which have no hash.
            if not isinstance(value, int | float):
                object.__setattr__(self, name, number)
                stated[name] = number
        wrong = [f"{name}={brief(value)}" for name, value in stated.items() if not is_cost(value)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: {_COST}")
        if not self.forward * _MOST >= 1:
            raise ValueError(
                f"forward={brief(self.forward)}: a forward must cost more than 0, and at least "
                f"{1 / _MOST:g}"
            )
        if self.activation_bytes is not None and self.activation_bytes < 1:
            raise ValueError(
                f"activation_bytes={brief(self.activation_bytes)}: must be at least 1, or None if "
                "not known"
            )
        if not is_cost(self.embed_grad + self.head * (1 + self.backward / self.forward)):
            raise ValueError(
                f"embed={brief(self.embed)}, head={brief(self.head)}: their gradients, in "
                f"proportion to those of the layers, must cost at most {_MOST:g}"
            )
        if self.full_backward and not self.backward:
            raise ValueError(
                f"full_backward={brief(self.full_backward)}: must be 0 or left out, as input_grad "
                "and weight_grad are 0"
            )
        if not is_cost(self.full_backward_share):
            raise ValueError(
                f"full_backward={brief(self.full_backward)}: must be at most {_MOST:g} times the "
                f"sum of input_grad and weight_grad, {self.backward!r}"
            )

    def __hash__(self) -> int:
        layer = None if self.layer is None else frozenset(self.layer.items())
        return hash((self.numbers, layer, self.activation_bytes, self.stash_bytes))

    @property
    def times(self) -> dict[str, float | None]:
        """All but `layer` and the bytes, by the names of the fields."""
        return {name: value for name, value in vars(self).items() if name not in _NO_TIMES}

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """The times, in the order of the fields: `Costs.of(numbers)` has the same."""
        return tuple(self.times.values())

    @classmethod
    def of(cls, numbers: Iterable[Any]) -> "Costs":
        """Makes costs of the `numbers` of others."""
        names = (field.name for field in fields(cls) if field.name not in _NO_TIMES)
        # Programs of earlier versions have no times of copies.
        return cls(**dict(zip(names, numbers, strict=False)))

    @classmethod
    def with_whole_ends(
        cls,
        *,
        forward: float,
        input_grad: float,
        weight_grad: float,
        embed: float,
        head: float,
        **more: Any,
    ) -> "Costs":
        """Makes costs where those of `embed` and `head` include their gradients.

        >>> Costs.with_whole_ends(forward=2, input_grad=2, weight_grad=4, embed=3, head=4)
        Costs(forward=2, input_grad=2, weight_grad=4, embed=1.0, head=1.0, ...)
        """
        return cls(
            forward=forward,
            input_grad=input_grad,
            weight_grad=weight_grad,
            embed=embed * forward / (forward + weight_grad),
            head=head * forward / (forward + input_grad + weight_grad),
            **more,
        )

    @property
    def backward(self) -> float:
        """Adds up I and W of a rank's whole share of the layers."""
        return self.input_grad + self.weight_grad

    @property
    def embed_grad(self) -> float:
        """Computes the cost of the embedding's gradient."""
        return self.embed * self.weight_grad / self.forward

    @property
    def full_backward_share(self) -> float:
        """Divides the cost of fused I and W by that of the two split."""
        if self.full_backward is None or not self.backward:
            return 1.0
        return self.full_backward / self.backward

    def of_stages(
        self, weights: np.ndarray, *, num_ranks: int, forward_only: bool = False
    ) -> np.ndarray:
        """Spreads the costs over stages: float64[4, num_stages, ...], by opcode.

        >>> costs = Costs(forward=2, input_grad=2, weight_grad=4, embed=1, head=1)
        >>> costs.of_stages(np.array([2, 1, 1]), num_ranks=2).tolist()
        [[0.0, 0.0, 0.0], [3.0, 1.0, 5.0], [4.0, 1.0, 1.0], [4.0, 2.0, 2.0]]

        Args:
          weights: float64[num_stages, ...], the cost of the layers of each stage, in any unit; more
            dims for more splits of the same layers.
          num_ranks: The ranks.
          forward_only: Whether there are no gradients.
        """
        share = _share(weights, num_ranks)
        of_opcode = (0.0, self.forward, self.input_grad, self.weight_grad)
        cost = np.stack([duration * share for duration in of_opcode])
        cost[FORWARD, 0] += self.embed
        cost[FORWARD, -1] += self.head
        if not forward_only:
            cost[INPUT_GRAD, 0] += self.embed_grad
            cost[FORWARD, -1] += self.head * self.backward / self.forward
        return cost

    def durations(
        self,
        layers: StageLayers,
        *,
        num_ranks: int,
        transfer: float,
        full_backward: bool,
        forward_only: bool = False,
        slots_on_device: int | str | None = None,
    ) -> Durations:
        """Spreads the costs over stages, as the schedule's compiler takes them.

        Args:
          layers: The layers of the stages.
          num_ranks: The ranks.
          transfer: How long a value travels to a neighbour.
          full_backward: Whether weight grads run with the input grads that they follow.
          forward_only: Whether there are no gradients.
          slots_on_device: As of `Execution`.

        Raises:
          ValueError: if slots_on_device is in bytes, and those of an activation are not known.
        """
        weights = np.array(layers.weights)
        of_opcode = self.of_stages(weights, num_ranks=num_ranks, forward_only=forward_only)
        share = _share(weights, num_ranks)
        recompute = self.recompute * share
        has_copies = slots_on_device is not None and (self.spill or self.fill)
        return Durations(
            of_opcode=tuple(map(tuple, of_opcode.tolist())),
            recompute=tuple(recompute.tolist()),
            upper_share=layers.upper_shares,
            full_backward=self.full_backward_share if full_backward else None,
            embed_grad=self.embed_grad,
            transfer=transfer,
            copies=self._copies(slots_on_device, share) if has_copies else None,
        )

    def with_copies(
        self, num_bytes: float, *, flops: float, host_link: float, peak_flops: float
    ) -> "Costs":
        """Adds how long the copies of an activation take, in the unit of the other costs.

        >>> costs = Costs(forward=2).with_copies(6e9, flops=1e12, host_link=3e9, peak_flops=1e12)
        >>> costs.spill, costs.fill  # two seconds, where the forward takes one
        (4.0, 4.0)

        Args:
          num_bytes: The bytes of an activation of num_layers / num_ranks layers.
          flops: The FLOPs of the forward of as many, which `forward` is the time of.
          host_link: Bytes a second between a device and its host, each way.
          peak_flops: FLOPs a second of the device.

        Raises:
          ValueError: if the copies take too long for a cost.
        """
        copy = self.forward * (num_bytes / host_link) / (flops / peak_flops)
        if not is_cost(copy):
            raise ValueError(
                f"host_link={brief(host_link)}: the copy of an activation would take "
                f"{copy / self.forward:g} times as long as its forward, too long for a cost"
            )
        return replace(self, spill=copy, fill=copy)

    def _copies(self, slots_on_device: int | str, share: np.ndarray) -> Copies:
        """Finds how long the copies of each stage take, and how many activations stay."""
        stay: float
        if isinstance(slots_on_device, int):
            stay = slots_on_device
        elif self.activation_bytes is None:
            raise ValueError(
                f"slots_on_device={slots_on_device!r}: a number of activations, or costs with the "
                "bytes of one (dpj.Costs(activation_bytes=)), must say how much of one leaves"
            )
        else:
            stay = parse_bytes(slots_on_device) / (self.activation_bytes * share.mean())
        return Copies(
            spill=tuple((self.spill * share).tolist()),
            fill=tuple((self.fill * share).tolist()),
            slots_on_device=stay,
        )


def _share(weights: np.ndarray, num_ranks: int) -> np.ndarray:
    """Divides the cost of each stage's layers by that of a rank's whole share of them."""
    return weights * (num_ranks / weights.sum(axis=0))


def _costs_of_kinds(layer: Any) -> dict[Hashable, float]:
    """Requires a cost for each of several kinds of layers."""
    must = "must map the kinds of layers in the model's layout to the cost of one, or be None"
    if not isinstance(layer, Mapping):
        raise TypeError(f"layer={brief(layer)}: {must}; got {show(layer)}")
    if not layer:
        raise ValueError(f"layer={{}}: {must}")
    costs = {kind: as_number(f"layer[{brief(kind)}]", cost) for kind, cost in layer.items()}
    wrong = [f"layer[{brief(k)}]={brief(c)}" for k, c in costs.items() if not is_cost(c)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: {_COST}")
    return costs


def of_transformer(*, attention: float, recomputes: bool, head: float = 0.0) -> Costs:
    """Makes costs from a transformer's multiplications, in forwards of a rank's share of it.

    A matmul's input grad and weight grad cost as much as its forward; attention, two matmuls of
    activations, has no weight grad, and twice the input grad.

    >>> of_transformer(attention=0.25, recomputes=True)
    Costs(forward=1.0, input_grad=2.25, weight_grad=0.75, embed=0.0, head=0.0, recompute=2.25,
      full_backward=2.7, ...)

    Args:
      attention: Its share of the forward.
      recomputes: Whether I runs the forward again, and a deferred W forward and input grad.
      head: The head's forward.
    """
    input_grad, weight_grad = 1 + attention + recomputes, 1 - attention
    return Costs(
        forward=1.0,
        input_grad=input_grad,
        weight_grad=weight_grad,
        head=head,
        recompute=input_grad if recomputes else 0.0,
        full_backward=FULL_BACKWARD * (input_grad + weight_grad),
    )
