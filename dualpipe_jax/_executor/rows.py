"""How slots lie in a TPU's memory, where ticks and beats share them.

XLA chooses layouts for every loop by itself. In a tick the loops of F, I and W, and behind them the
run of beats, stand one after the other, each run or passed over (`registers.when`); where two want
a slot buffer in different layouts, XLA copies all of its slots between them, in every tick, whether
they run or not. So in ticks, and where the run of beats begins and ends, slots lie row by row: a
loop that wants a value otherwise turns that value alone, and the run of beats turns a buffer once.

Only slots for which that is cheap do. Of residuals, those no larger than x: an attention's scores
lie as its softmax likes them, in all loops alike. Of stashes, and of what deferred weight grads
recompute from, all. Values of one or two dims are left alone: loops mostly agree on them.

(TPU v5e, estimated cycles of such copies in a tick, without this and with it: a transformer of two
layers a stage, width 2048, a sequence of 2048, rematerialised, 6.7 and 0.2 million, where F takes
8.8; width 1024, four sequences of 1024, not rematerialised, 5.2 and 0.2 million. Row by row within
beats of unrolled layers too, these took 8 % more cycles. Where layers are a loop the residuals do
lie so in beats: the loops of I and of W copied whole buffers between them there as well. With six
layers a stage beats took 3 % fewer cycles, ticks copied nothing instead of 12.9 million cycles'
worth, and the step's temporaries were 6.1 GiB instead of 6.8.)
"""

from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._executor import order, registers
from dualpipe_jax._executor.functions import Functions
from dualpipe_jax._executor.leaves import pick, place
from dualpipe_jax._kinds import Kind

RESIDUALS = ("residual", "weight_residual")
_STASHES = ("stash", "deferred")
SLOTS = (*RESIDUALS, *_STASHES)


def in_rows(functions: Functions, buffers: dict[str, dict[Kind, Any]]) -> dict[str, Any]:
    """Returns the buffers; on TPUs the slots for which it is cheap lie row by row.

    Args:
      functions: The model's functions.
      buffers: By the name that the state has for them; others than `SLOTS` come back as they are.
        For each kind its tuple of buffers, or `registers.Layers` of them.
    """
    gradients = functions.gradients
    if gradients is None:
        return buffers

    def is_cheap(name: str, aval: Any, parts: int) -> bool:
        if len(aval.shape) < 3 or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            return False
        return name in _STASHES or aval.size * aval.dtype.itemsize <= parts * functions.size_of_x

    def flags(name: str, kind: Kind, buffers: Any) -> Any:
        if isinstance(buffers, registers.Layers):
            return tuple(flags(name, kind, layer) for layer in buffers.each)
        if not buffers:  # none in a run of beats, or none at all
            return ()
        avals = getattr(gradients.block[kind], name)
        parts = getattr(gradients.block[kind], f"{name}_parts", (1,) * len(avals))
        return tuple(is_cheap(name, *each) for each in zip(avals, parts, strict=True))

    # All at once: JAX makes a choice between platforms of every call.
    slots = {name: each for name, each in buffers.items() if name in SLOTS}
    wanted = jax.tree.leaves(
        {
            name: {kind: flags(name, kind, of) for kind, of in each.items()}
            for name, each in slots.items()
        }
    )
    return {**buffers, **place(slots, order.row_major(pick(slots, wanted)), wanted)}
