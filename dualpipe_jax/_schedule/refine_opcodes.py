"""Program -> Program: decides how each I and its W run, by opcodes of their own.

An I and its W run split, in a tick each, unless the options refine them:
- deferred, with `defers`: a W that does not directly follow its I reads slots of the deferred kind.
- a full backward, with `full_backward`: where a W directly follows its I, the I's tick runs both
  for the stage's last layers, the W's tick both for the first ones. So a neighbour gets its
  cotangent after W's tick. Where it reads that sooner, and where a stage has one layer or none, I's
  tick runs all of it. I and W of the steady phase stay split, since W hides a transfer there.

Two ranks of zb-h1, of which rank 1 defers its first weight grad:

>>> from dualpipe_jax._schedule.actions import Opcode
>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> program = GENERATORS["zb-h1"](num_ranks=2, num_microbatches=2)
>>> units = refine_opcodes(program, defers=True, full_backward=True).units
>>> for action in range(units.row_start[1], len(units)):
...     print(units.name(action), Opcode(units.opcode[action]).name)
1F0 FORWARD
1I0 INPUT_GRAD_DEFERRING
1F1 FORWARD
1I1 BACKWARD_UPPER
1W1 BACKWARD_LOWER
1W0 WEIGHT_GRAD_DEFERRED
"""

from dataclasses import replace

import numpy as np

from dualpipe_jax._schedule.actions import INPUT_GRAD, WEIGHT_GRAD, Opcode
from dualpipe_jax._schedule.dependencies import find_dependencies
from dualpipe_jax._schedule.find_steady import SteadyPhase
from dualpipe_jax._schedule.ir import Program, Timeline


def refine_opcodes(
    program: Program,
    *,
    defers: bool = False,
    full_backward: bool = False,
    whole_stages: frozenset[int] = frozenset(),
    aligned: Timeline | None = None,
    steady: SteadyPhase | None = None,
) -> Program:
    """Refines the opcodes of a program whose I's and W's run split.

    Args:
        program: The program.
        defers: Whether deferred weight grads have slots of their own.
        full_backward: Whether an I and the W that directly follows it are a full backward.
        whole_stages: Stages whose full backwards have no halves.
        aligned: The aligned timeline, whose ticks up to the end of its steady phase are kept.
        steady: That steady phase, if there is one.
    """
    units = program.units
    input_grads = np.flatnonzero(units.opcode == INPUT_GRAD)
    weight_grads = np.full_like(input_grads, -1)
    own = find_dependencies(program).own
    of_w = np.flatnonzero(units.opcode == WEIGHT_GRAD)
    weight_grads[np.searchsorted(input_grads, own[of_w])] = of_w
    # Actions of a rank are numbered in program order.
    follows = weight_grads == input_grads + 1
    opcode = units.opcode.copy()

    def run_as(input_grad: Opcode, weight_grad: Opcode, mask: np.ndarray) -> None:
        opcode[input_grads[mask]], opcode[weight_grads[mask]] = input_grad, weight_grad

    if defers:
        run_as(Opcode.INPUT_GRAD_DEFERRING, Opcode.WEIGHT_GRAD_DEFERRED, ~follows)
    if full_backward:
        is_whole = np.isin(units.stage[input_grads], list(whole_stages))
        if aligned is not None and steady is not None:
            tick = aligned.tick_of[input_grads]
            is_whole |= _sends_too_soon(aligned, steady)[input_grads]
            follows &= (tick < steady.first_tick) | (tick >= steady.stop)
        run_as(Opcode.BACKWARD, Opcode.WEIGHT_GRAD_DONE, follows & is_whole)
        run_as(Opcode.BACKWARD_UPPER, Opcode.BACKWARD_LOWER, follows & ~is_whole)
    return program if (opcode == units.opcode).all() else replace(program, opcode=opcode)


def _sends_too_soon(timeline: Timeline, steady: SteadyPhase) -> np.ndarray:
    """Marks I's before the phase's end whose cotangent is read by W's tick: bool[num_actions]."""
    units, tick_of = timeline.program.units, timeline.tick_of
    payload = find_dependencies(timeline.program).payload
    is_i = units.opcode == INPUT_GRAD
    readers = np.flatnonzero(is_i & (payload >= 0))
    made = payload[readers]
    weight_grads = np.minimum(made + 1, len(units) - 1)
    is_kept = is_i[made] & (tick_of[made] < steady.stop)
    too_soon = is_kept & (tick_of[readers] <= tick_of[weight_grads])
    sends_too_soon = np.zeros(len(units), bool)
    sends_too_soon[made[too_soon]] = True
    return sends_too_soon
