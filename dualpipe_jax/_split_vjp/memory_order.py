"""In which order the dims of a kept value lie best in memory, as far as its readers tell.

It changes no value; it is for a compiler that has to keep the value in a slot, whose layout all
loops share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpipe_jax._split_vjp.cut import CHEAP_LATER, REDUCTIONS
from dualpipe_jax._split_vjp.graph import Graph, Node, When

_MOVES = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "squeeze"})
# They give a value's elements, or what is computed of each, in the places that these have.
_ELEMENTWISE = (CHEAP_LATER | {"name", "optimization_barrier", "pcast", "pvary"}) - _MOVES
# For each dim of a value the dim of the kept one that it is, or None.
_Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class MemoryOrder:
    """Tells how a value is to lie in memory.

    Attributes:
      dims: Its dims, the outermost first.
      is_sure: Whether everything that reads the value is known, and nothing reduces its last dim.
        If not, as of a softmax's scores, XLA may know better.
    """

    dims: tuple[int, ...]
    is_sure: bool


@dataclass
class _Seen:
    """What readers do with the dims of a value.

    Attributes:
      cut: Dims of which they take entries.
      batch: Batch dims of contractions.
      orders: The orders in which contractions with batch dims have them, those of the backward.
      is_sure: As of `MemoryOrder`.
    """

    cut: set[int | None] = field(default_factory=set)
    batch: set[int | None] = field(default_factory=set)
    orders: set[_Dims] = field(default_factory=set)
    is_sure: bool = True


def memory_orders(
    graph: Graph, nodes: Sequence[Node], values: Sequence[int]
) -> tuple[MemoryOrder, ...]:
    """Finds an order for each of the values.

    First come dims of which readers take entries, as of stacked queries, keys and values, then
    batch dims of contractions, such as heads. A TPU's contractions so read a slot where it lies,
    and need no copy of it. The others follow as the contractions of the backward have them, which
    read the slot: contracted dims last; or row by row if these disagree. A value that no such
    contraction reads, but one has made, lies as that makes it. So XLA has them in beats, where it
    chooses by itself.

    Args:
      graph: The graph.
      nodes: The nodes that make or read the values, in an order in which they can run.
      values: The values.
    """
    makers = {output: node for node in nodes for output in node.outputs}

    def order_of(value: int) -> MemoryOrder:
        in_rows = tuple(range(len(graph.avals[value].shape)))
        seen = _look(graph, nodes, value)
        if not seen.cut | seen.batch:
            return MemoryOrder(_as_made(graph, makers, value) or in_rows, seen.is_sure)
        (order, *others) = seen.orders or {()}
        wanted = (*(dim for dim in in_rows if dim in seen.cut), *order)
        # A dim that a reshape has joined or divided is missing there.
        if others or {*wanted} != {*in_rows} or len(wanted) != len(in_rows):
            wanted = sorted(in_rows, key=lambda dim: (dim not in seen.cut, dim not in seen.batch))
        return MemoryOrder(tuple(dim for dim in wanted if dim is not None), seen.is_sure)

    return tuple(map(order_of, values))


def _look(graph: Graph, nodes: Sequence[Node], value: int) -> _Seen:
    """Looks at all that reads a value, and at what reads the same elements in other shapes."""
    seen = _Seen()
    last = len(graph.avals[value].shape) - 1
    dims_of: dict[int, _Dims] = {value: tuple(range(last + 1))}
    for node in nodes:
        for place, read in enumerate(node.inputs):
            if not isinstance(read, int) or read not in dims_of:
                continue
            dims, old = dims_of[read], tuple(graph.avals[read].shape)
            new = tuple(graph.avals[node.outputs[0]].shape) if node.outputs else ()
            if node.name == "dot_general":
                contracted, batch = (each[place] for each in node.params["dimension_numbers"])
                if batch:
                    free = [dim for dim in range(len(old)) if dim not in (*contracted, *batch)]
                    seen.batch.update(
                        dim for dim in map(dims.__getitem__, batch) if dim is not None
                    )
                    if node.when is When.BACKWARD:
                        seen.orders.add(tuple(dims[dim] for dim in (*batch, *free, *contracted)))
                continue
            if node.name in REDUCTIONS:
                seen.is_sure &= last not in {dims[axis] for axis in node.params["axes"]}
                continue
            if node.name in ("slice", "unstack"):
                sizes = zip(dims, old, new if node.name == "slice" else (1, *old[1:]), strict=True)
                seen.cut.update(dim for dim, a, b in sizes if b == 1 != a)
                out = dims if node.name == "slice" else dims[1:]
            elif node.name == "transpose":
                out = tuple(dims[dim] for dim in node.params["permutation"])
            elif node.name in _MOVES:
                out = _moved(dims, old, new)
            elif node.name in _ELEMENTWISE and old == new:
                out = dims
            else:
                seen.is_sure = False
                continue
            for output in node.outputs:
                dims_of.setdefault(output, out)
    return seen


def _as_made(graph: Graph, makers: dict[int, Node], value: int) -> tuple[int, ...] | None:
    """Finds the order that a contraction with batch dims has the dims of its result in.

    None if no such contraction makes the value, moved at most.
    """
    dims: _Dims = tuple(range(len(graph.avals[value].shape)))
    here = value
    while here in makers and len(makers[here].reads) == 1:
        node = makers[here]
        (source,) = node.reads
        new, old = (tuple(graph.avals[v].shape) for v in (here, source))
        if node.name == "transpose":
            permutation = node.params["permutation"]
            dims = tuple(dims[permutation.index(dim)] for dim in range(len(old)))
        elif node.name in _MOVES:
            dims = _moved(dims, new, old)
        elif node.name not in _ELEMENTWISE or old != new:
            return None
        here = source
    maker = makers.get(here)
    if maker is None or maker.name != "dot_general" or not maker.params["dimension_numbers"][1][0]:
        return None
    # Dims that were joined stand where the parts did, if these stood together.
    joined = [dim for dim in range(len(graph.avals[value].shape)) if dim not in dims]
    parts = [place for place, dim in enumerate(dims) if dim is None]
    if not parts:
        return None if joined else tuple(dim for dim in dims if dim is not None)
    before, between, behind = dims[: parts[0]], dims[parts[0] : parts[-1]], dims[parts[-1] + 1 :]
    if any(dim is not None for dim in between):
        return None
    return tuple(dim for dim in (*before, *joined, *behind) if dim is not None)


def _moved(dims: _Dims, old: tuple[int, ...], new: tuple[int, ...]) -> _Dims:
    """Follows dims through a reshape: those before and behind the ones that it joins or divides.

    >>> _moved((0, 1, 2), (2, 3, 8), (6, 8)), _moved((0, 1, 2), (2, 3, 8), (1, 2, 3, 4, 2))
    ((None, 2), (None, 0, 1, None, None))
    """
    # Dims of size one may come and go.
    left = [(size, dim) for size, dim in zip(old, dims, strict=True) if size != 1]
    places = [place for place, size in enumerate(new) if size != 1]
    out: list[int | None] = [None] * len(new)
    for step in (1, -1):
        for (size, dim), place in zip(left[::step], places[::step], strict=False):
            if size != new[place]:
                break
            out[place] = dim
    return tuple(out)
