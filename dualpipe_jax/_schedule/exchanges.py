"""Tables -> Tables: says at the end of each tick between which ranks values travel.

A permute makes a sender wait for its receiver, and a receiver for its sender; a rank in no pair
waits for nobody. So a tick's exchange has the pairs whose value is stored, and no others. In the
run of beats transfers are those of `Steady`.

A compiler for TPUs has about 35 barriers between pairs of cores, one for each distinct set of
pairs of a permute; permutes beyond make every core wait. So a direction has at most `MOST_SETS`
sets: those are kept with which the fewest pairs wait that need not, and every other set becomes
the smallest kept one that has all of its pairs.

Two ranks, two microbatches of 1f1b. Nothing travels after the ticks of W, nor of F on rank 1, whose
head gives the cotangent:

>>> from dualpipe_jax._schedule.allocate import allocate
>>> from dualpipe_jax._schedule.emit import emit
>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> timeline = place_shortest(GENERATORS["1f1b"](num_ranks=2, num_microbatches=2))
>>> tables = add_exchanges(emit(timeline, allocate(timeline)))
>>> tables.exchanges
(((), ()), (((0, 1),), ()), ((), ((1, 0),)))
>>> for actions, exchange in zip(timeline.actions, tables.exchange, strict=True):
...     print(*(action or "..." for action in actions), exchange)
0F0 ... 1
0F1 1F0 1
... 1I0 2
0I0 1W0 0
0W0 1F1 0
... 1I1 2
0I1 1W1 0
0W1 ... 0
"""

from dataclasses import replace

import numpy as np

from dualpipe_jax._schedule.ir import MOST_SETS, Pairs, Tables

# Sets that are looked at to be kept, the most frequent ones: more take time and change nothing.
_MOST_CANDIDATES = 256


def add_exchanges(tables: Tables, *, most_sets: int = MOST_SETS) -> Tables:
    """Finds the exchange of each tick.

    Args:
        tables: The tables.
        most_sets: How many distinct sets of pairs a direction may have; 1 is the one with all pairs
            that any tick needs.
    """
    is_ramp = np.ones(tables.num_ticks, bool)
    if tables.steady is not None:
        is_ramp[tables.steady.ticks] = False
    # bool[num_ticks, num_ranks, 2]: who is sent something from the left, and from the right.
    is_target = np.zeros((tables.num_ticks, tables.num_ranks, 2), bool)
    is_target[:-1, :, 0] = tables.from_left[1:] >= 0
    is_target[:-1, :, 1] = tables.from_right[1:] >= 0
    is_target[~is_ramp] = False
    for side in range(2):
        is_target[:, :, side] = _merge(is_target[:, :, side], most_sets)

    # Numbered in the order in which they first occur, behind the empty one.
    exchange, exchanges = np.full(tables.num_ticks, -1, np.int32), {((), ()): 0}
    known: dict[bytes, int] = {}
    for tick in np.flatnonzero(is_ramp).tolist():
        key = is_target[tick].tobytes()
        if key not in known:
            right, left = (
                _pairs(is_target[tick, :, side], step) for side, step in ((0, 1), (1, -1))
            )
            known[key] = exchanges.setdefault((right, left), len(exchanges))
        exchange[tick] = known[key]
    return replace(tables, exchange=exchange, exchanges=tuple(exchanges))


def _pairs(is_target: np.ndarray, step: int) -> Pairs:
    targets = np.flatnonzero(is_target).tolist()
    return tuple(((target - step) % len(is_target), target) for target in targets)


def _merge(is_target: np.ndarray, most_sets: int) -> np.ndarray:
    """Has at most so many distinct rows, of those that are not empty, by adding to rows."""
    sets, which, count = np.unique(is_target, axis=0, return_inverse=True, return_counts=True)
    size = sets.sum(axis=1)
    if (size > 0).sum() <= most_sets:
        return is_target
    # The union serves all, and has to be there; the empty set is kept without being counted.
    kept, union = [sets[size == 0], sets.any(axis=0)[None]], sets.any(axis=0).sum()
    left = sets[size > 0]
    weight, size = count[size > 0], size[size > 0]
    order = np.argsort(-weight, kind="stable")[:_MOST_CANDIDATES]
    candidates = left[order]
    # float32[num_sets, num_candidates]: the pairs that a set waits for beside its own.
    beyond = left.astype(np.float32) @ (~candidates).T.astype(np.float32)
    excess = np.where(beyond == 0, candidates.sum(axis=1) - size[:, None], np.inf)
    best = (union - size).astype(float)
    for _ in range(most_sets - 1):
        totals = weight @ np.minimum(best[:, None], excess)
        chosen = int(totals.argmin())
        kept.append(candidates[chosen][None])
        best = np.minimum(best, excess[:, chosen])
    kept = np.concatenate(kept)
    beyond = sets.astype(np.float32) @ (~kept).T.astype(np.float32)
    smallest = np.where(beyond == 0, kept.sum(axis=1), np.inf).argmin(axis=1)
    return kept[smallest][which.reshape(-1)]
