"""Schedule and costs -> makespan: replays the compiled tables, waiting as the program waits.

Every tick of the program ends with a permute to the right and one to the left, whether anybody
wants the value or not. So a rank begins tick t + 1 when its own tick t is done and what its
neighbours sent at the end of their tick t has arrived; an idle tick costs nothing by itself.
Waiting for a value that nobody stores is a false wait. A second replay waits for stored values
only, and only where they are read: no program that keeps each rank's order can be faster. Sending
takes no time from a rank, and a value may arrive before its receiver is ready for it.

Two ranks, two microbatches, weight grads that cost three. Where each tick ends: `0W0` needs nothing
from rank 1, but waits from 4 to 6 for the `1W0` of the tick before; the last W waits likewise.

>>> from dualpipe_jax import schedules
>>> from dualpipe_jax._schedule.ir import OPCODE_LETTERS
>>> tables = schedules.make("1f1b", num_ranks=2, num_microbatches=2).compiled().tables
>>> work = np.array([0.0, 1, 1, 3])[tables.opcode]
>>> def show(end):
...     for opcodes, ends in zip(tables.opcode.T, end.T, strict=True):
...         acts = zip(opcodes.tolist(), ends.tolist(), strict=True)
...         print(*(f"{OPCODE_LETTERS[o]}{e:g}" for o, e in acts))
>>> show(replay(tables, work, transfer=0))
F1 F2 .2 I4 W9 .9 I11 W16
.0 F2 I3 W6 F7 I10 W13 .13
>>> show(replay_dependencies(tables, work, transfer=0))
F1 F2 .2 I4 W7 .7 I9 W12
.0 F2 I3 W6 F7 I8 W11 .11
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dualpipe_jax._schedule.ir import FORWARD, INPUT_GRAD, Tables
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Says how long actions take, in any one unit of time.

    A schedule cuts the model into as many stages as there are ranks, or more. The costs are those
    of a rank's whole share of the layers, so that each schedule has the same work to do; a stage
    costs its fraction of them.

    Attributes:
      forward: F of num_layers / num_ranks layers.
      input_grad: I of as many.
      weight_grad: W of as many.
      embed: The embedding's forward. It belongs to the first stage's F; its gradient, which is a
        weight gradient alone, to the first stage's I, at `weight_grad / forward` times the cost.
      head: The head's forward. It belongs to the last stage's F and so does its gradient, at
        `(input_grad + weight_grad) / forward` times the cost.

    Raises:
      ValueError: if one is negative or not finite, or `forward` is zero, naming all such.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    embed: float = 0.0
    head: float = 0.0

    def __post_init__(self) -> None:
        wrong = [f"{n}={v!r}" for n, v in vars(self).items() if not 0 <= v < math.inf]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: a cost must be a finite number, 0 or more")
        if self.forward == 0:
            raise ValueError(f"forward={self.forward!r}: a forward must cost more than 0")

    @property
    def backward(self) -> float:
        """B of a rank's whole share of the layers."""
        return self.input_grad + self.weight_grad

    def of_stages(
        self, *, num_ranks: int, layers_of_stage: np.ndarray, forward_only: bool = False
    ) -> np.ndarray:
        """Spreads them over stages: float64[4, num_stages], by opcode.

        >>> costs = Costs(forward=2, input_grad=2, weight_grad=4, embed=1, head=1)
        >>> costs.of_stages(num_ranks=2, layers_of_stage=np.array([2, 1, 1])).tolist()
        [[0.0, 0.0, 0.0], [3.0, 1.0, 5.0], [4.0, 1.0, 1.0], [4.0, 2.0, 2.0]]
        """
        share = layers_of_stage * (num_ranks / layers_of_stage.sum())
        of_opcode = np.array([0.0, self.forward, self.input_grad, self.weight_grad])
        cost = of_opcode[:, None] * share
        cost[FORWARD, 0] += self.embed
        cost[FORWARD, -1] += self.head
        if not forward_only:
            cost[INPUT_GRAD, 0] += self.embed * self.weight_grad / self.forward
            cost[FORWARD, -1] += self.head * self.backward / self.forward
        return cost


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Tells what a replay of a schedule took.

    Attributes:
      schedule: The schedule's name.
      num_ranks: The ranks.
      num_microbatches: The microbatches of a step.
      timetable: The timetable that was replayed.
      makespan: From the first action's start to the last one's end, as the program waits.
      dependency_makespan: The same if ranks waited for stored values only: without false waits.
      work: For each rank the time in which it acts.
      idle_share: The share of `num_ranks * makespan` in which ranks do not act.
      bubble: The idle time of a rank, the mean over ranks.
      published_bubble: What the schedule's paper says of it; None where it says nothing.
      peak_activations: The most (stage, microbatch)s of a rank between their F and their I.
      peak_weight_activations: The most between their F and their W: what W reads is kept as long.
      stage_share: A stage's mean size, in shares of the layers that a rank has.
      parameter_copies: Parameters that a rank holds, in shares of the layers that a rank has.
      num_transfers: Values that a rank stores from a neighbour, over all ranks.
    """

    schedule: str
    num_ranks: int
    num_microbatches: int
    timetable: str
    makespan: float
    dependency_makespan: float
    work: tuple[float, ...]
    idle_share: float
    bubble: float
    published_bubble: float | None
    peak_activations: int
    peak_weight_activations: int
    stage_share: float
    parameter_copies: float
    num_transfers: int


def simulate(
    schedule: Schedule,
    *,
    costs: Costs | None = None,
    transfer: float = 0.0,
    num_layers: int | None = None,
    timetable: str = "shortest",
) -> Simulation:
    """Replays the tables of a schedule.

    >>> from dualpipe_jax import schedules
    >>> schedule = schedules.make("1f1b", num_ranks=2, num_microbatches=2)
    >>> simulation = simulate(schedule, costs=Costs(weight_grad=3))
    >>> simulation.makespan, simulation.dependency_makespan, simulation.published_bubble
    (16.0, 12.0, 5.0)

    Args:
      schedule: The schedule.
      costs: How long actions take; by default 1 each.
      transfer: How long a value travels to a neighbour, whatever the size of a stage.
      num_layers: The layers of the model, of which the first stages get one more if they do not
        divide; by default all stages are equal.
      timetable: As `Schedule.timeline`.

    Raises:
      ValueError: if the schedule cannot run or be aligned, there is no such timetable, `transfer`
        is negative or not finite, or there are fewer layers than stages.
    """
    costs = costs or Costs()
    if not 0 <= transfer < math.inf:
        raise ValueError(f"transfer={transfer!r}: a cost must be a finite number, 0 or more")
    num_ranks, num_stages = schedule.num_ranks, schedule.num_stages
    num_layers = num_stages if num_layers is None else num_layers
    if num_layers < num_stages:
        raise ValueError(
            f"num_layers={num_layers}: must be at least the {num_stages} stages of schedule "
            f"{schedule.name!r} on {num_ranks} ranks"
        )
    tables = schedule.compiled(timetable=timetable).tables
    fewest, rest = divmod(num_layers, num_stages)
    cost = costs.of_stages(
        num_ranks=num_ranks,
        layers_of_stage=fewest + (np.arange(num_stages) < rest),
        forward_only=tables.forward_only,
    )
    work = cost[tables.opcode, tables.stage]  # an idle tick has stage -1, and costs 0 there too
    makespan = float(replay(tables, work, transfer=transfer).max())
    # Where nobody idles, sums in different orders differ in their last bit.
    bubble = max(0.0, makespan - float(work.sum()) / num_ranks)
    is_even = rest == 0 and not costs.embed and not costs.head and not tables.forward_only
    return Simulation(
        schedule=schedule.name,
        num_ranks=num_ranks,
        num_microbatches=schedule.num_microbatches,
        timetable=timetable,
        makespan=makespan,
        dependency_makespan=float(replay_dependencies(tables, work, transfer=transfer).max()),
        work=tuple(work.sum(axis=0).tolist()),
        idle_share=bubble / makespan,
        bubble=bubble,
        published_bubble=_published_bubble(schedule, costs) if is_even else None,
        peak_activations=tables.num_slots["residual"],
        peak_weight_activations=tables.num_slots["weight_residual"],
        stage_share=num_ranks / num_stages,
        parameter_copies=tables.num_chunks * num_ranks / num_stages,
        num_transfers=int((tables.from_left >= 0).sum() + (tables.from_right >= 0).sum()),
    )


def replay(tables: Tables, work: np.ndarray, *, transfer: float) -> np.ndarray:
    """Finds when each tick ends if ranks wait as the program does, for both neighbours' last tick.

    Args:
      tables: The tables.
      work: float64[num_ticks, num_ranks], how long each tick's action takes; idle ones 0.
      transfer: How long a value travels.

    Returns:
      float64[num_ticks, num_ranks].
    """
    end = np.zeros((tables.num_ticks + 1, tables.num_ranks))
    arrives = np.empty(tables.num_ranks)
    for tick, took in enumerate(work):
        before = end[tick]
        # Nothing was sent before the first tick.
        sent = before + transfer if tick else before
        # start[r] = max(end[r], end[r - 1] + transfer, end[r + 1] + transfer), of the last tick
        arrives[:] = before
        np.maximum(arrives[1:], sent[:-1], out=arrives[1:])
        np.maximum(arrives[:-1], sent[1:], out=arrives[:-1])
        if tables.wraps:
            arrives[0], arrives[-1] = max(arrives[0], sent[-1]), max(arrives[-1], sent[0])
        end[tick + 1] = arrives + took
    return end[1:]


def replay_dependencies(tables: Tables, work: np.ndarray, *, transfer: float) -> np.ndarray:
    """Finds when each tick ends if ranks wait only for what they read, as late as they read it.

    Arguments and result are those of `replay`.
    """
    ranks = np.arange(tables.num_ranks)
    end = np.zeros((tables.num_ticks + 1, tables.num_ranks))
    # When what lies in each received slot came; one slot more, for -1: what nobody reads or wants.
    came = np.zeros((tables.num_ranks, tables.num_slots["received"] + 1))
    for tick, took in enumerate(work):
        before = end[tick]
        came[ranks, tables.from_left[tick]] = np.roll(before, 1) + transfer
        came[ranks, tables.from_right[tick]] = np.roll(before, -1) + transfer
        came[:, -1] = 0
        end[tick + 1] = np.maximum(before, came[ranks, tables.read[tick]]) + took
        came[ranks, tables.keep[tick]] = end[tick + 1]
    return end[1:]


def _published_bubble(schedule: Schedule, costs: Costs) -> float | None:
    """Looks up the idle time of a rank that a schedule's paper gives, without transfers."""
    formula = _PUBLISHED.get(schedule.name)
    if formula is None:
        return None
    P, N, S = schedule.num_ranks, schedule.num_microbatches, schedule.num_stages
    bubble = formula(P, N, S, costs)
    # A negative one is beyond what its formula is meant for.
    return None if bubble is None or bubble < 0 else float(bubble)


# Each of (P, N, number of stages, costs of a rank's share), None at sizes that it is not given for.
# B is the full backward, I and W; fused pairs, F&B, are taken to last as long as F and B.
_PUBLISHED: dict[str, Callable[[int, int, int, Costs], float | None]] = {
    # arXiv:1811.06965, arXiv:2104.04473: (P-1)(F+B)
    "gpipe": lambda P, N, S, c: (P - 1) * (c.forward + c.backward),
    "1f1b": lambda P, N, S, c: (P - 1) * (c.forward + c.backward),
    # arXiv:2104.04473: a v-th of it with v stages a rank; N a multiple of P
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
    # github.com/deepseek-ai/DualPipe: the same of 2P stages, each half a rank's share; N >= 2P
    "dualpipev": lambda P, N, S, c: (
        (P - 1) * (c.forward + 2 * c.backward - 3 * c.weight_grad) / 2 if N >= 2 * P else None
    ),
}
