"""Who decides the loops of a tick on H100s: `make test-gpu`, as the compiler is large."""

from typing import Any

import jax
import pytest

from experiments.hardware import graphs

DEFAULT, *_, ALL = graphs.SETS


@pytest.mark.parametrize(
    ("schedule", "ranks", "overlap"),
    [("1f1b", 1, False), ("1f1b", 4, "two-tick"), ("dualpipe", 4, True)],
)
def test_a_tick_is_one_graph(schedule: str, ranks: int, overlap: Any) -> None:
    by_default, in_graphs = (
        _thunks(schedule, ranks, overlap, commands) for commands in (DEFAULT, ALL)
    )
    assert by_default.decided_by_host > 0
    assert in_graphs.decided_by_host == in_graphs.transfers_outside == 0
    assert in_graphs.buffers == 1
    # The same loops and conditionals, and the same transfers.
    for thunks in (by_default, in_graphs):
        decided = thunks.decided_by_host + thunks.decided_by_device
        assert decided == in_graphs.decided_by_device
        transfers = thunks.transfers_outside + thunks.transfers_inside
        assert transfers == in_graphs.transfers_inside


def _thunks(schedule: str, ranks: int, overlap: Any, commands: str) -> graphs.Thunks:
    with jax.enable_x64(False):
        row = graphs.measure(schedule, ranks, overlap, commands, width=512, tokens=1024)
    return row.thunks
