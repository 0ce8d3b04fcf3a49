"""How slots lie in a TPU's memory, where ticks and beats share them.

XLA chooses layouts for every loop by itself. In a tick the loops of F, I and W, and behind them the
run of beats, stand one after the other, each run or passed over (`registers.when`); where two want
a slot buffer in different layouts, XLA copies all of its slots between them, in every tick, whether
they run or not. So in ticks, and where the run of beats begins and ends, a buffer has one layout:
residuals the one that the contractions around them have (`_split_vjp/memory_order.py`), stashes row
by row. So have the entries that a tick writes and reads: a loop that wants a value otherwise turns
that value alone, where it else would turn the buffer before it reads the value.

Left alone are values of one or two dims, on which loops mostly agree, and residuals larger than x
that a softmax may read: an attention's scores lie as it likes them, in all loops alike.

(TPU v5e, a transformer of two layers a stage, width 1024, four sequences of 1024 a microbatch,
stacked queries, keys and values: the cycles of a tick in which all actions run are 31.3 million
instead of 62.3, a trip of the steady loop's 34.3 instead of 34.4, of which the choice is XLA's own,
and temporaries 3,499 MiB instead of 4,268. Scores row by row too: 6,701. Row by row within beats of
unrolled layers too, these took 8 to 10 % more cycles. Where layers are a loop, buffers and entries
do lie so in beats: the loops of I and of W copied whole buffers between them there as well.)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._executor import barriers
from dualpipe_jax._executor import buffers as registers
from dualpipe_jax._executor.functions import Functions
from dualpipe_jax._model.kinds import Kind

RESIDUALS = ("residual", "weight_residual")
_STASHES = ("stash", "deferred")
SLOTS = (*RESIDUALS, *_STASHES)
_Dims = tuple[int, ...] | None


def in_rows(functions: Functions, buffers: dict[str, dict[Kind, Any]]) -> dict[str, Any]:
    """Returns the buffers; on TPUs the slots that ticks and beats share lie alike in all loops.

    Args:
      functions: The model's functions.
      buffers: By the name that the state has for them; others than `SLOTS` come back as they are.
        For each kind its tuple of buffers, or `registers.Layers` of them.
    """
    if functions.gradients is None:
        return buffers

    def orders(name: str, kind: Kind, buffers: Any) -> list[_Dims]:
        if isinstance(buffers, registers.Layers):
            return [dims for layer in buffers.each for dims in orders(name, kind, layer)]
        if not buffers:  # none in a run of beats, or none at all
            return []
        of_values = zip(buffers, _orders(functions, name, kind), strict=True)
        return [_behind(buffer.ndim, dims) for buffer, dims in of_values]

    # All at once: JAX makes a choice between platforms of every call.
    slots = {name: each for name, each in buffers.items() if name in SLOTS}
    each_wants = {
        name: {kind: orders(name, kind, of) for kind, of in each.items()}
        for name, each in slots.items()
    }
    lists = jax.tree.leaves(each_wants, is_leaf=lambda each: isinstance(each, list))
    wanted = [dims for each in lists for dims in each]
    return {**buffers, **barriers.row_major(slots, wanted)}


def like_slots(functions: Functions, kind: Kind, name: str, values: Sequence[Any]) -> Any:
    """Returns what a slot holds for a layer of this kind; on TPUs it lies as `in_rows` has it.

    Without that XLA may turn the whole buffer for who reads the value in another layout.
    """
    return barriers.row_major(tuple(values), _orders(functions, name, kind))


def _orders(functions: Functions, name: str, kind: Kind) -> list[_Dims]:
    """For each value that a buffer holds its dims, the outermost first; None to leave it to XLA."""
    assert functions.gradients is not None
    block = functions.gradients.block[kind]

    def of(number: int, aval: Any) -> _Dims:
        if len(aval.shape) < 3 or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            return None
        if name in _STASHES:
            return tuple(range(len(aval.shape)))
        best = getattr(block, f"{name}_orders")[number]
        parts = getattr(block, f"{name}_parts")[number]
        is_small = aval.size * aval.dtype.itemsize <= parts * functions.size_of_x
        return best.dims if is_small or best.is_sure else None

    return [of(*each) for each in enumerate(getattr(block, name))]


def _behind(num_dims: int, dims: _Dims) -> _Dims:
    """Puts the dims of a value behind those of slots and layers."""
    if dims is None:
        return None
    lead = num_dims - len(dims)
    return (*range(lead), *(lead + dim for dim in dims))
