"""Tables -> Tables: finds the pairs of ranks that exchange values at the end of each tick.

A permute makes a sender wait for its receiver, and a receiver for its sender; a rank in no pair
waits for nobody. So a tick's exchange has the pairs whose value is stored, and no others. In the
steady phase transfers are those of `Steady`; lazy tables have no exchanges.

XLA for TPUs has 36 barriers between pairs of cores, one for each distinct set of pairs that
permutes have; with more sets every core waits. So the permutes to one side have at most `MOST_SETS`
sets: the kept ones make the fewest pairs wait needlessly, and every other set is replaced by the
smallest kept one that has all of its pairs.

The line of ranks may be cut into parts, each with exchanges of its own, one after the other. Two
links have at most three sets that are not empty, and so need no merging; and few branches in each
part make a smaller program than one branch for every combination. But a rank between two parts may
wait for two transfers in one tick.

Two ranks, two microbatches of 1f1b. Nothing is sent after a W, nor after an F of rank 1, whose head
gives the cotangent:

>>> from dualpipe_jax._schedule.allocate import allocate
>>> from dualpipe_jax._schedule.emit import emit
>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> timeline = place_shortest(GENERATORS["1f1b"](num_ranks=2, num_microbatches=2))
>>> tables = add_exchanges(emit(timeline, allocate(timeline)))
>>> tables.exchanges
((((), ()), ((), ((1, 0),)), (((0, 1),), ())),)
>>> for actions, exchange in zip(timeline.actions, tables.exchange[:, 0], strict=True):
...     print(*(action or "..." for action in actions), exchange)
0F0 ... 2
0F1 1F0 2
... 1I0 1
0I0 1W0 0
0W0 1F1 0
... 1I1 1
0I1 1W1 0
0W1 ... 0
"""

from dataclasses import replace
from itertools import compress

import numpy as np

from dualpipe_jax._schedule.tables import MOST_SETS, Exchange, Tables

# The most frequent sets, the candidates to be kept: more take time and change nothing.
_MOST_CANDIDATES = 256


def add_exchanges(tables: Tables, *, num_parts: int = 1, most_sets: int = MOST_SETS) -> Tables:
    """Finds the exchanges of each tick.

    Args:
        tables: The tables.
        num_parts: Into how many parts the line of ranks is cut, if there are as many links.
        most_sets: How many distinct sets of pairs the permutes to one side may have.
    """
    if tables.is_lazy:
        return replace(tables, exchange=np.empty((tables.num_ticks, 0), np.int32))
    is_ramp = np.ones(tables.num_ticks, bool)
    if tables.steady is not None:
        is_ramp[tables.steady.ticks] = False
    # bool[2, num_ticks, num_ranks], to the right and to the left: over which links something goes.
    # Link r joins rank r to the next one.
    used = np.zeros((2, tables.num_ticks, tables.num_ranks), bool)
    used[0, :-1] = np.roll(tables.from_left[1:] >= 0, -1, axis=1)
    used[1, :-1] = tables.from_right[1:] >= 0
    used = used[:, is_ramp]
    links = np.flatnonzero(used.any(axis=(0, 1)))
    parts = np.array_split(links, max(1, min(num_parts, len(links))))
    exchange = np.full((tables.num_ticks, len(parts)), -1, np.int32)
    exchanges = []
    for number, part in enumerate(parts):
        right, left = (_merge(side[:, part], most_sets // len(parts)) for side in used)
        of_tick, of_part = _number(np.concatenate([right, left], axis=1), part, tables.num_ranks)
        exchange[is_ramp, number] = of_tick
        exchanges.append(of_part)
    return replace(tables, exchange=exchange, exchanges=tuple(exchanges))


def _number(
    used: np.ndarray, part: np.ndarray, num_ranks: int
) -> tuple[np.ndarray, tuple[Exchange, ...]]:
    """Numbers a part's exchanges, the empty one 0: the number of each tick, the pairs of each."""
    rows, which, _ = _distinct(used)
    if rows[:1].any():
        rows, which = np.concatenate([np.zeros_like(rows[:1]), rows]), which + 1

    to_right = [(link, (link + 1) % num_ranks) for link in part.tolist()]
    to_left = [(target, source) for source, target in to_right]
    right, left = (side.tolist() for side in np.split(rows, 2, axis=1))
    exchanges = (
        (tuple(compress(to_right, of_right)), tuple(compress(to_left, of_left)))
        for of_right, of_left in zip(right, left, strict=True)
    )
    return which, tuple(exchanges)


def _merge(used: np.ndarray, most_sets: int) -> np.ndarray:
    """Adds to rows until at most `most_sets` distinct ones are not empty."""
    sets, which, count = _distinct(used)
    needed = sets.any(axis=1)
    if needed.sum() <= most_sets:
        return used
    # The union serves all, and has to be there; the empty set is kept without being counted.
    union = np.logical_or.reduce(sets)
    kept = [np.zeros_like(union), union]
    left, weight = sets[needed], count[needed]
    candidates = left[np.argsort(-weight, kind="stable")[:_MOST_CANDIDATES]]
    # float[num_sets, num_candidates]: the pairs of a candidate that a set does not need.
    excess = _excess(left, candidates)
    best = _excess(left, union[None])[:, 0]
    for _ in range(most_sets - 1):
        chosen = int((weight @ np.minimum(best[:, None], excess)).argmin())
        kept.append(candidates[chosen])
        best = np.minimum(best, excess[:, chosen])
    smallest = _excess(sets, np.array(kept)).argmin(axis=1)
    return np.array(kept)[smallest][which]


def _distinct(used: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the distinct rows in order, the number of each row among them, and their counts."""
    # As the bits of integers: a single one a row sorts fastest.
    num_rows, width = used.shape
    padded = np.zeros((num_rows, 64 * (width // 64 + 1)), bool)
    padded[:, :width] = used
    words = np.packbits(padded, axis=1).view(">u8")
    _, first, which, count = np.unique(
        words,
        axis=0 if words.shape[1] > 1 else None,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    return used[first], which.reshape(-1), count


def _excess(sets: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Counts the pairs of `by` that a set lacks: float[num_sets, num_by], inf if `by` lacks any."""
    lacks = sets.astype(np.float32) @ (~by).T.astype(np.float32)
    return np.where(lacks > 0, np.inf, by.sum(axis=1) - sets.sum(axis=1)[:, None])
