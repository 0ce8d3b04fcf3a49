"""List schedules by scores: the rank that is free first runs the action that it prefers.

These are loops as those of `loops`, and compiled likewise.
"""

import numpy as np

from dualpipe_jax._search.loops import (
    FORWARD,
    INPUT_GRAD,
    NEVER,
    WEIGHT_GRAD,
    Lanes,
    compiled,
)

# The numbers by which `list_schedule` prefers actions.
SCORES = (
    "forward",
    "forward_by_depth",
    "forward_by_live",
    "input_grad",
    "input_grad_by_depth",
    "weight_grad",
    "weight_grad_by_depth",
    "weight_grad_by_waiting",
    "weight_grad_if_full",
    "patience",
    "most_live",
)


@compiled
def score(
    kind: int, lane: int, depth: float, is_full: bool, counts: np.ndarray, scores: np.ndarray
) -> float:
    """Says how much a rank prefers the next action of a kind and lane; its columns are `SCORES`."""
    if kind == FORWARD:
        live = counts[FORWARD, lane] - counts[INPUT_GRAD, lane]
        return scores[0] + scores[1] * depth + scores[2] * live
    if kind == INPUT_GRAD:
        return scores[3] + scores[4] * depth
    waiting = counts[INPUT_GRAD, lane] - counts[WEIGHT_GRAD, lane]
    value = scores[5] + scores[6] * depth + scores[7] * waiting
    return value + scores[8] if is_full else value


@compiled
def arrival(kind: int, lane: int, lanes: Lanes, counts: np.ndarray, end: np.ndarray) -> float:
    """Finds when the value for the next action of a kind and lane arrives; NEVER if unknown yet."""
    microbatch = counts[kind, lane]
    if kind > 0 and counts[kind - 1, lane] <= microbatch:
        return NEVER
    source = -1
    if kind == FORWARD:
        source = lanes.before[lane]
    elif kind == INPUT_GRAD:
        source = lanes.after[lane]
    if source < 0:
        return 0.0
    if counts[kind, source] <= microbatch:
        return NEVER
    transfer = lanes.transfer if lanes.rank[source] != lanes.rank[lane] else 0.0
    return end[kind, source, microbatch] + transfer


@compiled
def list_schedule(
    rows: np.ndarray, lanes: Lanes, depth: np.ndarray, scores: np.ndarray, end: np.ndarray
) -> bool:
    """Lets the rank that is free first run the action that it prefers, until all have run.

    Args:
      rows: The order, filled in place.
      lanes: The problem.
      depth: float64[num_lanes], each stage's place in the model, from 0 to below 1.
      scores: float64[len(SCORES)].
      end: float64[3, num_lanes, most microbatches], room for the ends of actions.

    Returns:
      Whether all actions have run: ranks may hold too many activations to go on.
    """
    num_ranks = rows.shape[0]
    counts = np.zeros((3, lanes.rank.shape[0]), np.int64)
    reached = np.zeros(num_ranks, np.int64)
    free, wakes = np.zeros(num_ranks), np.zeros(num_ranks)
    held, stashed = np.zeros(num_ranks), np.zeros(num_ranks)
    # The slots that ranks need so far, those reserved for deeper lanes included.
    most_held, most_stashed = lanes.least[0], lanes.least[1]
    left = lanes.length.sum()
    while left:
        rank = wakes.argmin()
        if wakes[rank] == NEVER:
            return False
        best, best_arrival, best_token, next_arrival = -NEVER, 0.0, -1, NEVER
        room = lanes.limit - lanes.stash * most_stashed
        for lane in lanes.of_rank[rank]:
            if lane < 0:
                continue
            for kind in range(3):
                if counts[kind, lane] >= lanes.count[lane]:
                    continue
                size = lanes.size[lane]
                if kind == FORWARD:
                    live = counts[FORWARD, lane] - counts[INPUT_GRAD, lane]
                    most = max(1.0, scores[10] * (1.0 - depth[lane]))
                    if held[rank] + size + lanes.reserve[lane] > room or live >= most:
                        continue
                elif kind == INPUT_GRAD:
                    # If there is no room for one more stash, a W frees one.
                    stashes = max(most_stashed, stashed[rank] + size)
                    if most_held + lanes.stash * stashes > lanes.limit:
                        continue
                comes = arrival(kind, lane, lanes, counts, end)
                if comes > wakes[rank] + scores[9]:
                    next_arrival = min(next_arrival, comes)
                    continue
                is_full = held[rank] + size > room
                value = score(kind, lane, depth[lane], is_full, counts, scores)
                if value > best:
                    best, best_arrival, best_token = value, comes, 3 * lane + kind
        if best_token < 0:
            wakes[rank] = next_arrival
            continue
        lane, kind = best_token // 3, best_token % 3
        ends = max(free[rank], best_arrival) + lanes.cost[kind, lane]
        end[kind, lane, counts[kind, lane]] = ends
        counts[kind, lane] += 1
        rows[rank, reached[rank]] = best_token
        reached[rank] += 1
        left -= 1
        free[rank] = wakes[rank] = ends
        if kind == FORWARD:
            held[rank] += lanes.size[lane]
            most_held = max(most_held, held[rank] + lanes.reserve[lane])
        elif kind == INPUT_GRAD:
            stashed[rank] += lanes.size[lane]
            most_stashed = max(most_stashed, stashed[rank])
        else:
            held[rank] -= lanes.size[lane]
            stashed[rank] -= lanes.size[lane]
        target = -1
        if kind == FORWARD:
            target = lanes.after[lane]
        elif kind == INPUT_GRAD:
            target = lanes.before[lane]
        if target >= 0:
            other = lanes.rank[target]
            comes = ends + (lanes.transfer if other != rank else 0.0)
            wakes[other] = min(wakes[other], max(free[other], comes))
    return True
