"""V-Half (Qi et al. 2024, Pipeline Parallelism with Controllable Memory, arXiv:2405.15362).

Every microbatch goes down the ranks and up again, as in DualPipeV. The first stage that it enters
is the last that it leaves, and the stages at the turn are soon done with it; so the two stages of a
rank together hold it equally long on every rank, and a rank with half of 1F1B's activations need
not wait.

The order is reconstructed from the paper's building block, not copied from published code. A block
gives the ticks of one microbatch on every rank; the next microbatch runs six ticks later, and
weight grads run in the two ticks of six that are left over. Then the ramps are squeezed: an action
runs in an idle tick before its turn, if its rank's live activations stay within the block's peak.

Weight grads take equally long for all microbatches and for both stages of a rank. So one that
follows an input grad is that input grad's own: every second rank defers half of its weight grads,
the others only those of the ramps.

The ticks of microbatch 0 on four ranks, down and up, forwards and then input grads:

>>> for rank in range(4):
...     print(_block(rank, 4))
(0, 10, 14, 25)
(2, 9, 16, 24)
(4, 8, 18, 23)
(6, 7, 20, 22)
"""

from collections import deque
from collections.abc import Callable
from itertools import accumulate

from dualpipe_jax._schedule.generators.list_schedule import join_backwards
from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.ir import Action, Program

_PERIOD = 6
# By how much an action changes the number of live activations of its rank.
_KEEPS = {"F": 1, "I": 0, "W": -1}
_NUM_KINDS_AND_STAGES = 6


def v_half(*, num_ranks: int, num_microbatches: int) -> Program:
    """Makes V-Half (arXiv:2405.15362): half of 1F1B's activations, down the ranks and up again.

    A rank holds the activations of at most P / 2 + 1 microbatches for an even P, (P + 1) / 2 for an
    odd one, in shares of all its layers. At F = I = W = 1 a step takes 104.5 at P = 8, N = 32,
    where `zb-h1` takes 103 and holds 8.

    Its block is made for F = I = W. Where an input grad takes twice as long, as it does under
    rematerialisation, that step is 18.5 % longer than that of `zb-h1` (I = 2.08, W = 0.923,
    transfers 0.1), and more if deferred weight grads, a quarter of all, recompute.

    >>> for row in v_half(num_ranks=2, num_microbatches=2).to_csv().splitlines():
    ...     print(*row.split(","))
    0F0 0F1 3F0 3I0 3F1 3I1 0B0 0B1 3W0 3W1
    1F0 2F0 1F1 2F1 2I0 1I0 2I1 1B1 2W0 1W0 2W1

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    rows = _squeeze([_planned_row(r, num_ranks, num_microbatches) for r in range(num_ranks)])
    joined = tuple(join_backwards(row) for row in rows)
    return Program("v-half", num_ranks, 2 * num_ranks, num_microbatches, joined)


def _block(rank: int, num_ranks: int) -> tuple[int, int, int, int]:
    """Gives the ticks of microbatch 0: F down, F up, I of the way up, I of the way down.

    Hops down take F two ticks and I one, hops up one and two: between F and I of both stages
    together every rank has as many ticks. The ticks of a rank differ modulo 6.
    """
    P, r = num_ranks, rank
    # Without it, an even number of ranks would have two actions in a tick.
    gap = 3 if P % 2 == 0 else 0
    return 2 * r, 3 * P - r - 2, 3 * P + gap + 2 * r - 1, 6 * P + gap - r - 2


def _planned_row(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """Repeats the block every six ticks; weight grads, the oldest first, take the idle ticks."""
    down, up = rank, 2 * num_ranks - 1 - rank
    action_at = {
        tick + _PERIOD * m: Action(kind, stage, m)
        for tick, kind, stage in zip(
            _block(rank, num_ranks), "FFII", (down, up, up, down), strict=True
        )
        for m in range(num_microbatches)
    }
    row: list[Action] = []
    deferred: deque[Action] = deque()
    tick = 0
    while action_at or deferred:
        if tick in action_at:
            action = action_at.pop(tick)
            row.append(action)
            if action.kind == "I":
                deferred.append(action._replace(kind="W"))
        elif deferred:
            row.append(deferred.popleft())
        tick += 1
    return row


def _squeeze(planned: list[list[Action]]) -> list[list[Action]]:
    """Runs the rows tick by tick; a rank whose next action must wait runs a later one instead."""
    num_stages = 2 * len(planned)
    most = max(_peak(row) for row in planned)
    ranks = [_Rank(row, most) for row in planned]
    done: set[Action] = set()

    def is_ready(action: Action) -> bool:
        need = _need(action, num_stages)
        return need is None or need in done

    while any(rank.upcoming for rank in ranks):
        # All choose before any runs: a rank's value reaches others in the next tick.
        places = [rank.choose(is_ready) for rank in ranks]
        done.update(
            rank.run(place) for rank, place in zip(ranks, places, strict=True) if place is not None
        )
    return [_exchange_weight_grads(rank.row) for rank in ranks]


class _Rank:
    """Holds a rank's upcoming actions in planned order, and its row as it grows."""

    def __init__(self, planned: list[Action], max_live: int):
        self.upcoming, self.row = planned, list[Action]()
        self.live, self.max_live = 0, max_live
        self.first_stage = min(action.stage for action in planned)
        self.num_entering = sum(map(self._enters, planned))

    def _enters(self, action: Action) -> bool:
        return action.kind == "F" and action.stage == self.first_stage

    def choose(self, is_ready: Callable[[Action], bool]) -> int | None:
        """Picks the first upcoming action that can run; None if there is none.

        A forward overtakes others only if the live activations stay within `max_live` up to its
        turn. When no microbatch will enter any more, input grads overtake weight grads.
        """
        live = most = self.live
        weight_grad = None
        tried = set()
        for place, action in enumerate(self.upcoming):
            kind, stage, _ = action
            # Later ones of the same kind and stage follow it.
            if (kind, stage) not in tried and is_ready(action):
                if kind == "W" and not self.num_entering:
                    weight_grad = place if weight_grad is None else weight_grad
                elif kind != "F" or place == 0 or most < self.max_live:
                    return place
            tried.add((kind, stage))
            if len(tried) == _NUM_KINDS_AND_STAGES:
                break
            live += _KEEPS[kind]
            most = max(most, live)
        return weight_grad

    def run(self, place: int) -> Action:
        """Appends the action to the row."""
        action = self.upcoming.pop(place)
        self.row.append(action)
        self.live += _KEEPS[action.kind]
        self.num_entering -= self._enters(action)
        return action


def _exchange_weight_grads(row: list[Action]) -> list[Action]:
    """Lets each weight grad be that of the input grad before it, or else the oldest one.

    >>> row = [Action(kind, 0, m) for kind, m in ("I0", "F2", "W0", "I1", "W1", "I2", "W2")]
    >>> row[2:4] = row[3], row[2]
    >>> print(*row)
    0I0 0F2 0I1 0W0 0W1 0I2 0W2
    >>> print(*_exchange_weight_grads(row))
    0I0 0F2 0I1 0W1 0W0 0I2 0W2
    """
    exchanged: list[Action] = []
    deferred: deque[Action] = deque()
    for action in row:
        if action.kind == "W":
            action = deferred.pop() if exchanged[-1].kind == "I" else deferred.popleft()
        elif action.kind == "I":
            deferred.append(action._replace(kind="W"))
        exchanged.append(action)
    return exchanged


def _need(action: Action, num_stages: int) -> Action | None:
    """Names the action whose value this one reads; None for the first stage's F."""
    kind, stage, microbatch = action
    if kind == "F":
        return Action("F", stage - 1, microbatch) if stage else None
    if kind == "I" and stage + 1 < num_stages:
        return Action("I", stage + 1, microbatch)
    return Action("F" if kind == "I" else "I", stage, microbatch)


def _peak(row: list[Action]) -> int:
    """Counts the most (stage, microbatch)s of a row between their F and their W."""
    return max(accumulate(_KEEPS[action.kind] for action in row))
