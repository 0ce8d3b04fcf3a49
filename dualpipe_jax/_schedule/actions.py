"""Lists the values that each action of one tick reads, writes, frees and makes, in one table.

The passes, the simulator and the executor read this table; the verifiers have rules of their own. A
program has three actions of each (stage, microbatch), F, I and W. `refine_opcodes` decides how each
I and its W run: split; split and deferred, with separate slots for W's operands; or as a full
backward, which stashes nothing, in two halves or in the I's tick alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial

import numpy as np

# The buffers of an executor, by the name under which `num_slots` counts their slots.
BUFFERS = ("received", "residual", "weight_residual", "stash")
# One more, in tables in which deferred weight grads keep their operands in separate slots.
DEFERRED = "deferred"


class Opcode(IntEnum):
    """Numbers the actions, as tables do."""

    IDLE = 0
    FORWARD = 1
    INPUT_GRAD = 2
    WEIGHT_GRAD = 3
    # An I that keeps in `deferred` the operands of its W, and that W.
    INPUT_GRAD_DEFERRING = 4
    WEIGHT_GRAD_DEFERRED = 5
    # The halves of a full backward: I and W of the stage's last layers, then of its first ones.
    BACKWARD_UPPER = 6
    BACKWARD_LOWER = 7
    # A whole full backward, and the tick of its W, in which nothing is left to run.
    BACKWARD = 8
    WEIGHT_GRAD_DONE = 9


# The actions of a program, for short.
IDLE, FORWARD, INPUT_GRAD, WEIGHT_GRAD = list(Opcode)[:4]

# The values that actions make, and take from a received slot, which is free after that: an x and
# its cotangent go from stage to stage, the one between the halves of a backward stays.
X, COTANGENT, MIDDLE = "x", "cotangent", "middle"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Describes the effects of one action on values and buffers.

    Attributes:
      unit: Which action of a program it is: F, I or W.
      follows: Which action of the same stage and microbatch it follows, on the same rank.
      takes: The value that it reads in a received slot. (Stage 0's F takes none.)
      makes: The value that it makes. (The last stage's F makes the cotangent that the head gives.)
      reads, writes, frees: The other buffers in which it names a slot. A value lives from the
        action that writes it to the one of the same stage and microbatch that frees it. (A
        forward-only program writes none.)
    """

    unit: Opcode
    follows: Opcode | None = None
    takes: str = ""
    makes: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()


_BOTH = ("residual", "weight_residual")
_input_grad = partial(Effect, unit=INPUT_GRAD, follows=FORWARD, takes=COTANGENT, reads=_BOTH)
_weight_grad = partial(Effect, unit=WEIGHT_GRAD, follows=INPUT_GRAD)
EFFECTS = {
    Opcode.FORWARD: Effect(unit=FORWARD, takes=X, makes=X, writes=_BOTH),
    Opcode.INPUT_GRAD: _input_grad(makes=COTANGENT, writes=("stash",), frees=("residual",)),
    Opcode.WEIGHT_GRAD: _weight_grad(
        reads=("weight_residual", "stash"), frees=("weight_residual", "stash")
    ),
    Opcode.INPUT_GRAD_DEFERRING: _input_grad(
        makes=COTANGENT, writes=(DEFERRED,), frees=("residual",)
    ),
    Opcode.WEIGHT_GRAD_DEFERRED: _weight_grad(
        reads=("weight_residual", DEFERRED), frees=("weight_residual", DEFERRED)
    ),
    Opcode.BACKWARD_UPPER: _input_grad(makes=MIDDLE),
    Opcode.BACKWARD_LOWER: _weight_grad(takes=MIDDLE, makes=COTANGENT, reads=_BOTH, frees=_BOTH),
    Opcode.BACKWARD: _input_grad(makes=COTANGENT, frees=("residual",)),
    Opcode.WEIGHT_GRAD_DONE: _weight_grad(frees=("weight_residual",)),
}
_UNITS = np.array([IDLE, *(effect.unit for effect in EFFECTS.values())])
assert [*EFFECTS] == [*Opcode][1:]


@cache
def opcodes_that(
    *,
    unit: Opcode | None = None,
    follows: Opcode | None = None,
    takes: str = "",
    makes: str = "",
    writes: str = "",
    frees: str = "",
) -> tuple[Opcode, ...]:
    """Lists the opcodes that are of a unit, follow one, and do all of this to a value or a buffer.

    >>> [opcode.name for opcode in opcodes_that(frees="residual")]
    ['INPUT_GRAD', 'INPUT_GRAD_DEFERRING', 'BACKWARD_LOWER', 'BACKWARD']
    """
    return tuple(
        opcode
        for opcode, effect in EFFECTS.items()
        if unit in (None, effect.unit)
        and follows in (None, effect.follows)
        and takes in ("", effect.takes)
        and makes in ("", effect.makes)
        and writes in ("", *effect.writes)
        and frees in ("", *effect.frees)
    )


def opcodes_with(buffer: str) -> tuple[Opcode, ...]:
    """Lists the opcodes that name a slot of a buffer, to read, write or free it."""
    return tuple(
        opcode
        for opcode, effect in EFFECTS.items()
        if buffer in (*effect.reads, *effect.writes, *effect.frees)
    )


def is_one_of(opcode: np.ndarray, opcodes: Iterable[int]) -> np.ndarray:
    """Whether each opcode is one of some, as `np.isin` and quicker: bool of its shape.

    >>> is_one_of(np.array([Opcode.IDLE, Opcode.BACKWARD]), opcodes_that(unit=INPUT_GRAD)).tolist()
    [False, True]
    """
    is_one = np.zeros(len(Opcode), bool)
    is_one[list(opcodes)] = True
    return is_one[opcode]


def unit_of(opcode: np.ndarray) -> np.ndarray:
    """Maps opcodes to actions of a program: IDLE, FORWARD, INPUT_GRAD or WEIGHT_GRAD.

    >>> unit_of(np.array([Opcode.IDLE, Opcode.BACKWARD, Opcode.WEIGHT_GRAD_DONE])).tolist()
    [0, 2, 3]
    """
    return _UNITS[opcode]


def letter_of(opcode: int) -> str:
    """Writes an opcode as a cell of the CSV does: F, I or W; "." where a rank idles.

    >>> letter_of(Opcode.FORWARD), letter_of(Opcode.BACKWARD_UPPER)
    ('F', 'I')
    """
    return ".FIW"[_UNITS[opcode]]
