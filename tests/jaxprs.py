"""Reads the jaxprs of traced functions, before they are compiled."""

from typing import Any

from jax.extend import core as jcore


def loops(jaxpr: Any) -> list[Any]:
    """Lists the scans that hold a permute: that over ticks, and in it that over beats."""
    found = []
    for eqn in jaxpr.eqns:
        for inner in jcore.jaxprs_in_params(eqn.params):
            if eqn.primitive.name == "scan" and "ppermute" in str(inner):
                found.append(eqn)
            found += loops(inner)
    return found


def bytes_in(scan: Any) -> int:
    """Counts the bytes that go into a scan, whether they change from trip to trip or not."""
    avals = [var.aval for var in scan.invars]
    return sum(aval.size * aval.dtype.itemsize for aval in avals)
