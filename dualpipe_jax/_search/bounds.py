"""Problem -> a time that no order is below: the largest of three simple bounds.

- A rank cannot begin before its first x can arrive, and has all its work to do.
- Before its first cotangent can arrive a rank can only run forwards, as many as it may hold.
- Little's law: each activation is held from its F to its W at least as long as a microbatch that
  waits nowhere takes, so N of them take N times as long over the number that a rank may hold.
"""

import numpy as np

from dualpipe_jax._search.problem import Problem


def lower_bound(problem: Problem) -> float:
    """Computes the bound of the makespan."""
    lanes = problem.lanes
    x_comes, cotangent_comes, residence = _one_microbatch(problem)
    largest, most_held = 0.0, problem.max_activations - problem.stash * lanes.least[1]
    for rank in range(problem.num_ranks):
        mine = np.flatnonzero(lanes.rank == rank)
        first, work = x_comes[mine].min(), float(lanes.work[rank])
        largest = max(largest, float(first) + work)
        if not np.isfinite(most_held):
            continue
        cost, size = lanes.cost[0, mine], lanes.size[mine]
        if (size > 0).all():
            backward = cotangent_comes[mine].min()
            longest = most_held * (cost / size).max()
            before = min(backward - first, longest)
            largest = max(largest, float(backward - before) + work)
        held = float((lanes.count[mine] * residence[mine] * size).sum())
        largest = max(largest, held / most_held)
    return largest


def _one_microbatch(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sends one microbatch of each direction alone through all stages.

    Returns:
      float64[num_lanes] each: when x comes, when the cotangent comes, and how long the activation
      is held.
    """
    lanes = problem.lanes
    x_comes, cotangent_comes, residence = np.zeros((3, len(lanes.rank)))
    for direction in range(len(problem.routes)):
        first = direction * problem.num_stages
        along = range(first, first + problem.num_stages)
        time = 0.0
        for lane in along:
            before = lanes.before[lane]
            if before >= 0 and lanes.rank[before] != lanes.rank[lane]:
                time += problem.transfer
            x_comes[lane] = time
            time += lanes.cost[0, lane]
        for lane in reversed(along):
            after = lanes.after[lane]
            if after >= 0 and lanes.rank[after] != lanes.rank[lane]:
                time += problem.transfer
            cotangent_comes[lane] = time
            time += lanes.cost[1, lane]
            residence[lane] = time + lanes.cost[2, lane] - x_comes[lane]
    return x_comes, cotangent_comes, residence
