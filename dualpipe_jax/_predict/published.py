"""Gives the bubbles of the schedules' papers, as formulas of sizes and costs."""

import math
from collections.abc import Callable

from dualpipe_jax._costs import Costs
from dualpipe_jax._schedule.named import base_name
from dualpipe_jax.schedules import Schedule


def published_bubble(schedule: Schedule, costs: Costs) -> float | None:
    """Computes the idle time of a rank by the schedule's paper, without transfers."""
    formula = _PUBLISHED.get(base_name(schedule.name))
    if formula is None:
        return None
    P, N, S = schedule.num_ranks, schedule.num_microbatches, schedule.num_stages
    bubble = formula(P, N, S, costs)
    # A negative one is outside of the range of its formula.
    return None if bubble is None or bubble < 0 else float(bubble)


# Formulas of (P, N, number of stages, costs of a rank's share), None outside of their range.
# B is the full backward, I and W; fused pairs, F&B, are taken to last as long as F and B.
_PUBLISHED: dict[str, Callable[[int, int, int, Costs], float | None]] = {
    # arXiv:1811.06965, arXiv:2104.04473: (P-1)(F+B)
    "gpipe": lambda P, N, S, c: (P - 1) * (c.forward + c.backward),
    "1f1b": lambda P, N, S, c: (P - 1) * (c.forward + c.backward),
    # arXiv:2104.04473: a v-th of that with v stages a rank; N a multiple of P
    "interleaved-1f1b": lambda P, N, S, c: (
        (P - 1) * (c.forward + c.backward) * P / S if N % P == 0 else None
    ),
    # arXiv:2401.10241: (P-1)(F+B-2W), from N = P on
    "zb-h1": lambda P, N, S, c: (
        (P - 1) * (c.forward + c.backward - 2 * c.weight_grad) if N >= P else None
    ),
    # arXiv:2107.06925: (P-2)F, for even P, N a multiple of it, and F = B
    "chimera": lambda P, N, S, c: (
        (P - 2) * c.forward
        if P % 2 == 0 and N % P == 0 and math.isclose(c.forward, c.backward)
        else None
    ),
    # arXiv:2412.19437: (P/2-1)(F&B+B-3W), for even P and even N >= 2P
    "dualpipe": lambda P, N, S, c: (
        (P / 2 - 1) * (c.forward + 2 * c.backward - 3 * c.weight_grad)
        if P % 2 == 0 and N % 2 == 0 and N >= 2 * P
        else None
    ),
    # github.com/deepseek-ai/DualPipe: the same for 2P stages, each half a rank's share; N >= 2P
    "dualpipev": lambda P, N, S, c: (
        (P - 1) * (c.forward + 2 * c.backward - 3 * c.weight_grad) / 2 if N >= 2 * P else None
    ),
}
