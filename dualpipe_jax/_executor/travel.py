"""Plans how layers travel from their shards to the ranks that run them: by permutes alone.

In: which layers each rank holds as each of its chunks. Out: rounds, in each of which every rank
sends at most one piece of its shard and receives at most one, so that a round is one permute. A
piece is a number of adjacent layers, the same for all ranks. The layers are edges from rank to
rank; rounds are found by colouring the edges of this bipartite graph in as many colours as the
fullest rank has layers (König 1916). Colours with the same edges become one round, as far as their
layers are adjacent. Gradients travel the way back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching


@dataclass(frozen=True, eq=False)
class Round:
    """Describes one permute.

    Attributes:
      target: int[num_ranks], the rank to which each rank sends; -1 for none.
      first: int[num_ranks], the first layer that each rank sends, in its shard.
      entry: int[num_ranks], where each rank puts the piece that it receives, counted in layers over
        its chunks one after the other; -1 if it receives none.
      count: The layers that a piece has.
    """

    target: np.ndarray
    first: np.ndarray
    entry: np.ndarray
    count: int

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (source, target) pairs of the permute."""
        return [(source, int(t)) for source, t in enumerate(self.target) if t >= 0]

    @property
    def stays(self) -> bool:
        """Whether every rank keeps its piece, so that nothing needs to travel."""
        return all(source == target for source, target in self.pairs)


def plan_travel(
    *, stage_of: np.ndarray, first_layers: np.ndarray, shard_layers: int
) -> list[Round]:
    """Finds the rounds.

    Two ranks, four stages of one layer, placed as DualPipeV does: rank 0 holds stages 0 and 3. Its
    shard is layers 0 and 1; layer 0 stays, layer 1 goes to rank 1.

    >>> rounds = plan_travel(
    ...     stage_of=np.array([[0, 1], [3, 2]]), first_layers=np.arange(5), shard_layers=2
    ... )
    >>> for way in rounds:
    ...     print(way.pairs, way.first, way.entry, way.count)
    [(0, 0), (1, 1)] [0 0] [0 1] 1
    [(0, 1), (1, 0)] [1 1] [1 0] 1

    Args:
      stage_of: int[num_chunks, num_ranks], the stage that each rank holds as each chunk, or -1.
      first_layers: int[num_stages + 1], each stage's first layer, and the number of layers.
      shard_layers: Layers of each rank's shard of the canonical stack.
    """
    num_ranks = stage_of.shape[1]
    runs = _runs(stage_of, first_layers, shard_layers)
    counts = np.zeros((num_ranks, num_ranks), int)
    for way, found in runs.items():
        counts[way] = sum(count for _, _, count in found)

    rounds = []
    for matching, times in _matchings(counts):
        # `times` layers go this way; a round takes as many as are adjacent on all ranks.
        while times:
            count = min([times, *(runs[way][0][2] for way in matching)])
            target, first, entry = (np.full(num_ranks, -1) for _ in range(3))
            for source, rank in matching:
                target[source] = rank
                start, put, length = runs[source, rank].pop(0)
                first[source], entry[rank] = start, put
                if length > count:
                    runs[source, rank].insert(0, (start + count, put + count, length - count))
            rounds.append(Round(target, np.maximum(first, 0), entry, count))
            times -= count
    return rounds


# (source, target): the adjacent layers that have this way to go, as (first, entry, count)
Runs = dict[tuple[int, int], list[tuple[int, int, int]]]


def _runs(stage_of: np.ndarray, first_layers: np.ndarray, shard_layers: int) -> Runs:
    """Finds the adjacent layers that go from one rank's shard to one rank's chunk."""
    chunk_layers = int(np.diff(first_layers).max())
    runs: Runs = {}
    for (chunk, rank), stage in np.ndenumerate(stage_of):
        if stage < 0:
            continue
        begin, end = first_layers[stage : stage + 2].tolist()
        layer = begin
        while layer < end:
            source, first = divmod(layer, shard_layers)
            count = min(end - layer, shard_layers - first)
            entry = chunk * chunk_layers + layer - begin
            runs.setdefault((source, rank), []).append((first, entry, count))
            layer += count
    return runs


def _matchings(real: np.ndarray) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Divides the edges of a bipartite multigraph into as few matchings as possible.

    Yields each matching and how often it is used in a row.
    """
    size = len(real)
    degree = int(max(real.sum(0).max(), real.sum(1).max()))
    # Filled up to the same degree everywhere, the graph has a perfect matching, and again one
    # without that one.
    filler = np.zeros_like(real)
    for source in range(size):
        for target in range(size):
            total = real + filler
            missing = degree - max(total[source].sum(), total[:, target].sum())
            filler[source, target] += max(missing, 0)

    while degree:
        # Layers that stay on their rank go first and together: such a round needs no permute.
        cost = np.where(real > 0, 2 - np.eye(size), np.where(filler > 0, 3, 0))
        sources, targets = min_weight_full_bipartite_matching(csr_array(cost))
        ways = list(zip(sources.tolist(), targets.tolist(), strict=True))
        matching = [way for way in ways if real[way]]
        times = min(int(real[way] or filler[way]) for way in ways)
        for way in ways:
            (real if real[way] else filler)[way] -= times
        degree -= times
        yield matching, times
