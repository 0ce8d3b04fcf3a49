"""Finds the order in memory of a residual's dims that suits its readers, as far as they tell.

It changes no value; it is for a compiler that has to keep the value in a slot, whose memory layout
all loops share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpipe_jax._split_vjp.graph import Graph, Node, When
from dualpipe_jax._split_vjp.primitives import ELEMENTWISE, REDUCTIONS, RESHAPES

# For each dim of a value the dim of the residual that it is, or None.
_Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class MemoryOrder:
    """A value's order in memory.

    Attributes:
      dims: Its dims, the outermost first.
      is_sure: Whether all readers of the value are known, and none reduces its last dim. If not, as
        with a softmax's scores, XLA may know better.
    """

    dims: tuple[int, ...]
    is_sure: bool


@dataclass
class _Uses:
    """The ways in which readers use the dims of a value.

    Attributes:
      cut: Dims along which they take entries.
      batch: Batch dims of contractions.
      orders: The orders in which the backward's contractions with batch dims have the dims.
      is_sure: As in `MemoryOrder`.
    """

    cut: set[int | None] = field(default_factory=set)
    batch: set[int | None] = field(default_factory=set)
    orders: set[_Dims] = field(default_factory=set)
    is_sure: bool = True


def memory_orders(
    graph: Graph, nodes: Sequence[Node], values: Sequence[int]
) -> tuple[MemoryOrder, ...]:
    """Finds an order for each of the values.

    First come dims along which readers take entries, as with stacked queries, keys and values, then
    batch dims of contractions, such as heads. A TPU's contractions then read a slot in place, and
    need no copy of it. The others follow as the contractions of the backward have them, which read
    the slot: contracted dims last; or row by row if these disagree. A value that no such
    contraction reads, but one has made, gets the order in which that makes it. XLA has the values
    of beats in these orders, where it chooses by itself.

    Args:
      graph: The graph.
      nodes: The nodes that make or read the values, in an order in which they can run.
      values: The values.
    """
    makers = {output: node for node in nodes for output in node.outputs}

    def order_of(value: int) -> MemoryOrder:
        in_rows = tuple(range(len(graph.avals[value].shape)))
        uses = _uses_of(graph, nodes, value)
        if not uses.cut | uses.batch:
            return MemoryOrder(_as_made(graph, makers, value) or in_rows, uses.is_sure)
        (order, *others) = uses.orders or {()}
        wanted = (*(dim for dim in in_rows if dim in uses.cut), *order)
        # A dim that a reshape has joined or divided is missing there.
        if others or {*wanted} != {*in_rows} or len(wanted) != len(in_rows):
            wanted = sorted(in_rows, key=lambda dim: (dim not in uses.cut, dim not in uses.batch))
        return MemoryOrder(tuple(dim for dim in wanted if dim is not None), uses.is_sure)

    return tuple(map(order_of, values))


def _uses_of(graph: Graph, nodes: Sequence[Node], value: int) -> _Uses:
    """Collects the uses of a value, and of values that hold the same elements in other shapes."""
    uses = _Uses()
    last = len(graph.avals[value].shape) - 1
    dims_of: dict[int, _Dims] = {value: tuple(range(last + 1))}
    for node in nodes:
        for operand, read in enumerate(node.inputs):
            if not isinstance(read, int) or read not in dims_of:
                continue
            dims, old = dims_of[read], tuple(graph.avals[read].shape)
            new = tuple(graph.avals[node.outputs[0]].shape) if node.outputs else ()
            if node.name == "dot_general":
                _contract(uses, node, operand, dims)
                continue
            if node.name in REDUCTIONS:
                uses.is_sure &= last not in {dims[axis] for axis in node.params["axes"]}
                continue
            if node.name in ("slice", "unstack"):
                sizes = zip(dims, old, new if node.name == "slice" else (1, *old[1:]), strict=True)
                uses.cut.update(dim for dim, a, b in sizes if b == 1 != a)
                out = dims if node.name == "slice" else dims[1:]
            elif node.name == "transpose":
                out = tuple(dims[dim] for dim in node.params["permutation"])
            elif node.name in RESHAPES:
                out = _moved(dims, old, new)
            elif node.name in ELEMENTWISE and old == new:
                out = dims
            else:
                uses.is_sure = False
                continue
            for output in node.outputs:
                dims_of.setdefault(output, out)
    return uses


def _contract(uses: _Uses, node: Node, operand: int, dims: _Dims) -> None:
    """Adds a contraction that has `dims` as its operand of that number."""
    contracted, batch = (both[operand] for both in node.params["dimension_numbers"])
    if not batch:
        return
    free = [dim for dim in range(len(dims)) if dim not in (*contracted, *batch)]
    uses.batch.update(dims[dim] for dim in batch if dims[dim] is not None)
    if node.when is When.BACKWARD:
        uses.orders.add(tuple(dims[dim] for dim in (*batch, *free, *contracted)))


def _as_made(graph: Graph, makers: dict[int, Node], value: int) -> tuple[int, ...] | None:
    """Finds the order in which a contraction with batch dims has the dims of its result.

    None if no such contraction makes the value, moved at most.
    """
    dims: _Dims = tuple(range(len(graph.avals[value].shape)))
    here = value
    # Each step goes from a result to its operand, which an earlier node made.
    while here in makers and len(makers[here].reads) == 1:
        node = makers[here]
        (source,) = node.reads
        new, old = (tuple(graph.avals[v].shape) for v in (here, source))
        if node.name == "transpose":
            permutation = node.params["permutation"]
            dims = tuple(dims[permutation.index(dim)] for dim in range(len(old)))
        elif node.name in RESHAPES:
            dims = _moved(dims, new, old)
        elif node.name not in ELEMENTWISE or old != new:
            return None
        here = source
    maker = makers.get(here)
    if maker is None or maker.name != "dot_general" or not maker.params["dimension_numbers"][1][0]:
        return None
    # Joined dims stand where their parts did, if these stood together.
    joined = [dim for dim in range(len(graph.avals[value].shape)) if dim not in dims]
    parts = [index for index, dim in enumerate(dims) if dim is None]
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
    indices = [index for index, size in enumerate(new) if size != 1]
    out: list[int | None] = [None] * len(new)
    for step in (1, -1):
        for number in range(min(len(left), len(indices))):
            (size, dim), index = left[::step][number], indices[::step][number]
            if size != new[index]:
                break
            out[index] = dim
    return tuple(out)
