"""Meshes, and the figures of devices: `make_mesh`, `device_figures`."""

import jax
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.wrong_calls.arguments import axes_mistakes
from tests.wrong_calls.mistakes import (
    Mistake,
    always,
    but,
    counts,
    left_out,
    mistake,
    names,
    wrong_type,
)
from tests.wrong_calls.oracle import Target
from tests.wrong_calls.users import MESH


def _size() -> list[Mistake]:
    """Mistakes in the size of an axis, on four devices or on all eight; the other one takes two."""
    return [*counts(most=10**4), mistake("number that does not fit", 5, 7, 100)]


def targets() -> list[Target]:
    """Lists the callables that know the hardware."""
    explicit, auto = AxisType.Explicit, AxisType.Auto
    return [
        Target(
            name="make_mesh",
            call=dpj.make_mesh,
            valid={"pipe": 2, "data": 2, "devices": jax.devices()[:4]},
            mistakes={
                "pipe": [*_size(), left_out()],
                "data": _size(),
                "axis": names(("pipe", "data")),
                "batch_axes": [
                    wrong_type(lambda v: v is None or (isinstance(v, tuple | list) and not v)),
                    *but(axes_mistakes((None, "data", ("data",), ())), "wrong type"),
                ],
                "devices": [
                    wrong_type(lambda v: v is None),
                    mistake("too few", jax.devices()[:3], [], iter(jax.devices()[:1])),
                    mistake("mesh of another size", MESH),
                    mistake("class for an object", jax.Device, [jax.Device] * 4),
                    mistake("another form", None, tuple(jax.devices()), legal=always),
                ],
                "axis_types": [
                    wrong_type(lambda v: v is None),
                    mistake("too many", (auto,) * 3, [explicit] * 20_000),
                    mistake("too few", (auto,), ()),
                    mistake("text for a leaf", "Explicit", ("Auto", "Auto")),
                    mistake("class for an object", AxisType, (AxisType, AxisType)),
                    mistake("another form", auto, None, (auto, explicit), legal=always),
                ],
            },
            # Any other keyword is the name of an axis.
            takes_more=True,
            weight=2,
        ),
        Target(
            name="device_figures",
            call=dpj.device_figures,
            valid={"device": "TPU v4"},
            mistakes={
                "device": [
                    wrong_type(lambda v: isinstance(v, str)),
                    left_out(),
                    mistake("class for an object", jax.Device, type("Chip", (), {})),
                    # An unknown device has no figures.
                    mistake("another form", *jax.devices()[:1], "TPU v99", "", legal=always),
                ]
            },
        ),
    ]
