"""How layers travel from the canonical stack to the ranks that run them: by permutes alone.

In: which layers each rank holds as each of its chunks. Out: rounds, in each of which every rank
sends at most one piece of its shard and gets at most one, so that a round is one permute. The
pieces are edges from rank to rank; to colour the edges of this bipartite graph, in as many colours
as the fullest rank has pieces (König 1916), is to find the rounds. Gradients take the way back.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching


@dataclass(frozen=True, eq=False)
class Round:
    """One permute.

    Attributes:
      target: int[num_ranks], the rank to which each rank sends; -1 for none.
      piece: int[num_ranks], which piece of its shard each rank sends.
      place: int[num_ranks], where each rank puts what it gets, counted in pieces over its chunks
        one after the other; -1 where it gets nothing.
    """

    target: np.ndarray
    piece: np.ndarray
    place: np.ndarray

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (source, target) pairs of the permute."""
        return [(source, int(t)) for source, t in enumerate(self.target) if t >= 0]

    @property
    def stays(self) -> bool:
        """Whether every rank keeps its piece, so that nothing needs to travel."""
        return all(source == target for source, target in self.pairs)


@dataclass(frozen=True, eq=False)
class Travel:
    """The rounds, and how many layers a piece has and pieces a chunk."""

    piece_layers: int
    chunk_pieces: int
    rounds: tuple[Round, ...]


def plan_travel(*, stage_of: np.ndarray, first_layers: np.ndarray, shard_layers: int) -> Travel:
    """Finds the rounds.

    Two ranks, four stages of one layer, placed as DualPipeV does: rank 0 holds stages 0 and 3. Its
    shard is layers 0 and 1; layer 0 stays, layer 1 goes to rank 1.

    >>> travel = plan_travel(
    ...     stage_of=np.array([[0, 1], [3, 2]]), first_layers=np.arange(5), shard_layers=2
    ... )
    >>> for way in travel.rounds:
    ...     print(way.pairs, way.piece, way.place)
    [(0, 0), (1, 1)] [0 0] [0 1]
    [(0, 1), (1, 0)] [1 1] [1 0]

    Args:
      stage_of: int[num_chunks, num_ranks], the stage that each rank holds as each chunk, or -1.
      first_layers: int[num_stages + 1], each stage's first layer, and the number of layers.
      shard_layers: Layers of each rank's shard of the canonical stack.
    """
    num_chunks, num_ranks = stage_of.shape
    size = int(np.gcd.reduce([shard_layers, *first_layers]))
    chunk_pieces = int(np.diff(first_layers).max()) // size
    shard_pieces = shard_layers // size

    # edges[source, target]: the (piece, place)s that have this way to go
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for chunk in range(num_chunks):
        for rank, stage in enumerate(stage_of[chunk]):
            if stage < 0:
                continue
            first, end = first_layers[stage : stage + 2] // size
            for position, piece in enumerate(range(first, end)):
                way = (piece // shard_pieces, rank)
                place = chunk * chunk_pieces + position
                edges.setdefault(way, []).append((piece % shard_pieces, place))

    rounds = []
    for matching in _matchings({way: len(found) for way, found in edges.items()}, num_ranks):
        target, piece, place = (np.full(num_ranks, -1) for _ in range(3))
        for source, rank in matching:
            target[source] = rank
            piece[source], place[rank] = edges[source, rank].pop(0)
        rounds.append(Round(target, np.maximum(piece, 0), place))
    return Travel(size, chunk_pieces, tuple(rounds))


def _matchings(counts: dict[tuple[int, int], int], size: int) -> list[list[tuple[int, int]]]:
    """Divides the edges of a bipartite multigraph into as few matchings as can be."""
    real = np.zeros((size, size), int)
    for way, count in counts.items():
        real[way] = count
    degree = int(max(real.sum(0).max(), real.sum(1).max()))
    # Filled up to the same degree everywhere the graph has a perfect matching, and still has one
    # without it.
    filler = np.zeros_like(real)
    for source in range(size):
        for target in range(size):
            total = real + filler
            missing = degree - max(total[source].sum(), total[:, target].sum())
            filler[source, target] += max(missing, 0)

    matchings = []
    for _ in range(degree):
        # What stays where it is goes first and together: such a round needs no permute.
        cost = np.where(real > 0, 2 - np.eye(size), np.where(filler > 0, 3, 0))
        sources, targets = min_weight_full_bipartite_matching(csr_array(cost))
        matching = []
        for way in zip(sources.tolist(), targets.tolist(), strict=True):
            used = real if real[way] else filler
            used[way] -= 1
            if used is real:
                matching.append(way)
        matchings.append(matching)
    return matchings
