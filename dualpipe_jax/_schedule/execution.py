"""`Execution`: how a schedule's order becomes a program, which nobody has to choose."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from dualpipe_jax._errors import brief, show
from dualpipe_jax._sizes import parse_bytes

_TWO_TICK = "two-tick"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Says how the order of a schedule becomes a program: each None is decided for you.

    Overlap and split_backward become those of the fastest step by simulation, at the costs that the
    step is given (with a steady phase, I and W stay split). Every choice gives the same
    gradients, and the choice is the same on every platform: a test over fake CPU devices runs the
    program that a pod runs. (docs/execution.md)

    >>> import dualpipe_jax as dpj
    >>> print(dpj.Execution(overlap=True, deferred="store"))
    overlap, deferred weight grads store

    Attributes:
      overlap: True: all ranks start their pairs together (the aligned timetable) and, as long as
        every rank has one, run straight-line code, the steady phase, in which XLA hides transfers
        behind compute. False: every action runs as soon as it can (the shortest timetable).
        `"two-tick"`, for GPUs, on request only and not on TPUs: another rank's value is read in the
        second tick after it was made or later, so that a whole action hides each transfer.
      unroll: How many layers of a stage the body of the loop over them has, as in `jax.lax.scan`:
        True for all, without a loop, which XLA schedules better; False, or 1, for one, which
        compiles sooner. By default all of up to four where all stages have the same kinds of
        layers in the same order, as far as they go, else one.
      split_backward: True: the input grad (I) of a stage and its weight grad (W) are two actions,
        so that a neighbour gets its cotangent sooner. False: where W follows its I outside of the
        steady phase, the two run as a full backward, the last layers in I's tick and the first ones
        in W's, and nothing is stashed for a whole stage.
      deferred: The values that are kept for a deferred weight grad under rematerialisation:
        `"recompute"`, its blocks' inputs and cotangents only, so that zero-bubble schedules do not
        take the memory that `remat` saves; `"store"`, all that it needs. By default it recomputes;
        without rematerialisation there is nothing to recompute.
      slots_on_device: How many slots of a rank, each with the values that a microbatch keeps in a
        stage from F to W, have room on the device; or bytes for them, such as "12GiB". Values of
        the first layers of each stage then wait in the host's memory, copied there and back beside
        compute (docs/offload.md). None: all stay on the device, but those that a policy of
        `jax.checkpoint` offloads.

    Raises:
      ValueError: If a value is none of these.
      TypeError: If it is of another type.
    """

    overlap: bool | Literal["two-tick"] | None = None
    unroll: bool | int | None = None
    split_backward: bool | None = None
    deferred: Literal["recompute", "store"] | None = None
    slots_on_device: int | str | None = None

    def __post_init__(self) -> None:
        _require_one_of("overlap", self.overlap, True, False, _TWO_TICK)
        _require_one_of("split_backward", self.split_backward, True, False)
        _require_one_of("deferred", self.deferred, "recompute", "store")
        if self.unroll is not None:
            must = "must be True, False, a number of layers, or None"
            if not isinstance(self.unroll, int):
                raise TypeError(f"unroll={brief(self.unroll)}: {must}; got {show(self.unroll)}")
            if not isinstance(self.unroll, bool) and self.unroll < 1:
                raise ValueError(f"unroll={self.unroll}: {must}, at least 1")
            if self.unroll == 1:  # as True does
                object.__setattr__(self, "unroll", self.unroll is True)
        if self.slots_on_device is not None:
            _require_slots(self.slots_on_device)
        if isinstance(self.slots_on_device, str):  # a program's name has it
            object.__setattr__(self, "slots_on_device", "".join(self.slots_on_device.split()))

    def __str__(self) -> str:
        """Names all decided choices in a line."""
        words: dict[str, dict[Any, str]] = {
            "overlap": {True: "overlap", False: "no overlap", _TWO_TICK: "two-tick"},
            "unroll": {True: "layers unrolled", False: "layers looped"},
            "split_backward": {True: "split backwards", False: "full backwards"},
            "deferred": {
                "recompute": "deferred weight grads recompute",
                "store": "deferred weight grads store",
            },
        }
        given = {name: value for name in words if (value := getattr(self, name)) is not None}
        found = [
            f"layers unrolled by {value}"
            if name == "unroll" and not isinstance(value, bool)
            else words[name][value]
            for name, value in given.items()
        ]
        if self.slots_on_device is not None:
            of = {True: " of slots", False: " slot" if self.slots_on_device == 1 else " slots"}
            is_size = isinstance(self.slots_on_device, str)
            found.append(f"{self.slots_on_device}{of[is_size]} on the device")
        return ", ".join(found) or "decided for you"

    def __repr__(self) -> str:
        """Writes the decided fields, to be pasted."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        written = (f"{name}={value!r}" for name, value in given.items() if value is not None)
        return f"Execution({', '.join(written)})"

    @property
    def timetable(self) -> str:
        """The timetable that the schedule's compiler makes, where `overlap` is decided."""
        return timetable_of(self.overlap)


def timetable_of(overlap: Any) -> str:
    """Names the timetable of an `overlap`.

    >>> timetable_of(True), timetable_of(False), timetable_of("two-tick")
    ('aligned', 'shortest', 'two-tick')
    """
    if overlap is None:
        raise TypeError(f"overlap=None: must be True, False or {_TWO_TICK!r}")
    _require_one_of("overlap", overlap, True, False, _TWO_TICK)
    if overlap == _TWO_TICK:
        return _TWO_TICK
    return "aligned" if overlap else "shortest"


def _require_slots(value: Any) -> None:
    must = "must be a number of activations, a size such as '12GiB', or None"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"slots_on_device={brief(value)}: {must}; got {show(value)}")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"slots_on_device={value}: {must}, at least 1")
    if isinstance(value, str):
        try:
            is_size = parse_bytes(value) > 0 and value.strip().endswith("B")
        except ValueError:
            is_size = False
        if not is_size:  # a number without a unit would be activations, or bytes
            raise ValueError(f"slots_on_device={brief(value)}: {must}")


def _require_one_of(name: str, value: Any, *known: Any) -> None:
    if value is None or any(type(value) is type(one) and value == one for one in known):
        return
    listed = ", ".join(map(repr, known))
    error = ValueError if any(type(value) is type(one) for one in known) else TypeError
    raise error(f"{name}={brief(value)}: must be {listed}, or None")
