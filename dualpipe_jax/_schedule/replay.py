"""Tables -> the time at which each action ends, if ranks wait as the program does.

In a ramp tick a rank runs its action; then come the permutes of the tick's exchange. A permute is a
rendezvous: a sender waits until its receiver has come to the same permute, then both wait for the
transfer; the two directions of one exchange run together, its parts one after the other.
So a rank waits for each rank with which it is a pair, even if it reads the value later or, where
sets of pairs were merged, never: a false wait. A rank in no pair waits for nobody, and an idle tick
costs nothing by itself.
(This holds on CPUs, by the clock, and on TPUs, where a permute's start waits for the target, and
its done for both values, the sent and the received: read in a v5e's low-level code. On GPUs sends
have a stream of their own, and nobody but the receiver waits: `rendezvous=False`.)

In the steady phase (`Tables.steady`) the F of a beat makes an x that travels behind the beat's I
and W, and the I a cotangent that travels behind W and the next beat's F. Their senders wait for
their receivers where the transfer starts, and the next beat's F, or I, for its end. The last beat's
transfers are awaited at the steady phase's end.

Lazy tables (`Tables.is_lazy`) have two permutes a tick between all neighbours, which start before
its action and are awaited after it. As a rendezvous they make every rank wait for its neighbours at
the start of every tick.

A second replay waits for values only, and only where they are read: no program that keeps
each rank's order can be faster. Sending takes no time from a rank, and a value may arrive before
its receiver is ready for it.

Two ranks, three microbatches, forwards that cost three. Where each tick ends: `0F2` waits from 9 to
11 for the `1I1` of the tick before, which rank 0 reads one tick later.

>>> from dualpipe_jax import schedules
>>> from dualpipe_jax._schedule.actions import letter_of
>>> made = schedules.make("zb-h1", num_ranks=2, num_microbatches=3).compiled()
>>> tables = made.tables
>>> work = np.array([0.0, 3, 1, 1])[tables.opcode]
>>> def show(end):
...     for opcodes, ends in zip(tables.opcode.T, end.T, strict=True):
...         acts = zip(opcodes.tolist(), ends.tolist(), strict=True)
...         print(*(f"{letter_of(o)}{e:g}" for o, e in acts))
>>> show(replay(tables, work, transfer=0))
F3 F6 .6 I8 W9 F14 I15 W16 I19 W20
.0 F6 I7 F10 I11 W12 F17 I18 W19 W20
>>> show(replay_dependencies(made.timeline, work, transfer=0))
F3 F6 .6 I8 W9 F12 I13 W14 I17 W18
.0 F6 I7 F10 I11 W12 F15 I16 W17 W18
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from dualpipe_jax._schedule.actions import Opcode, is_one_of
from dualpipe_jax._schedule.dependencies import find_dependencies
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT, Timeline
from dualpipe_jax._schedule.tables import Pairs, Tables


def as_full_backwards(
    tables: Tables,
    work: np.ndarray,
    *,
    upper_share: np.ndarray,
    cost: float = 1.0,
    embed_grad: float = 0.0,
) -> np.ndarray:
    """Gives the I and the W of each full backward the time that the two take fused.

    Each half takes its share of both; without halves I's tick takes all of it.

    >>> from dualpipe_jax import schedules
    >>> from dualpipe_jax._schedule.actions import unit_of
    >>> from dualpipe_jax._schedule.compile import compile_program
    >>> program = schedules.make("zb-h1", num_ranks=2, num_microbatches=2).program
    >>> for whole in ({0, 1}, {}):
    ...     whole_stages = frozenset(whole)
    ...     made = compile_program(program, full_backward=True, whole_stages=whole_stages)
    ...     tables = made.tables
    ...     before = np.array([0.0, 3, 1, 2])[unit_of(tables.opcode)]
    ...     after = as_full_backwards(tables, before, upper_share=np.full(2, 0.5))
    ...     for work in zip(before.T, after.T, strict=True):
    ...         print(*(" ".join(f"{time:g}" for time in times) for times in work), sep=" -> ")
    3 3 0 1 2 1 2 -> 3 3 0 3 0 3 0
    0 3 1 3 1 2 2 -> 0 3 1 3 3 0 2
    3 3 0 1 2 0 1 2 -> 3 3 0 1.5 1.5 0 1.5 1.5
    0 3 1 3 1 2 2 0 -> 0 3 1 3 1.5 1.5 2 0

    Args:
      tables: The tables.
      work: As for `replay`, with I and W split.
      upper_share: float64[num_stages], the share of each stage's layers in the upper half.
      cost: The time of the two fused, as a share of the two split.
      embed_grad: The time of the embedding's gradient in an input grad of the first stage, which
        follows all layers and is not to be multiplied.

    Returns:
      The `work` that `replay` takes.
    """
    work = work.copy()
    for rank, opcode in enumerate(tables.opcode.T):
        acts = np.flatnonzero(opcode)
        is_first = is_one_of(opcode[acts], (Opcode.BACKWARD_UPPER, Opcode.BACKWARD))
        before, here = acts[is_first], acts[np.flatnonzero(is_first) + 1]
        stage, in_halves = tables.stage[here, rank], opcode[before] == Opcode.BACKWARD_UPPER
        embedding = np.where(stage == 0, embed_grad, 0.0)
        of_layers = cost * (work[before, rank] + work[here, rank] - embedding)
        of_upper = of_layers * np.where(in_halves, upper_share[stage], 1)
        work[before, rank] = of_upper + np.where(in_halves, 0, embedding)
        work[here, rank] = of_layers - of_upper + np.where(in_halves, embedding, 0)
    return work


def replay(
    tables: Tables, work: np.ndarray, *, transfer: float, rendezvous: bool = True
) -> np.ndarray:
    """Finds when each tick ends if ranks wait as the program does.

    Args:
      tables: The tables.
      work: float64[num_ticks, num_ranks], how long each tick's action takes; idle ones 0.
      transfer: How long a value travels to a neighbour; one that a rank sends itself takes no time.
      rendezvous: Whether a sender waits for its receiver.

    Returns:
      float64[num_ticks, num_ranks].
    """
    end = np.empty(work.shape)
    permutes = partial(
        _Permutes, num_ranks=tables.num_ranks, transfer=transfer, rendezvous=rendezvous
    )
    parts, exchange = [permutes(of_part) for of_part in tables.exchanges], tables.exchange.tolist()

    def run_ramp(ticks: Iterable[int], ready: np.ndarray) -> np.ndarray:
        for tick in ticks:
            ready = end[tick] = ready + work[tick]
            for part, number in zip(parts, exchange[tick], strict=True):
                if number:
                    ready = part.over(number, ready)
        return ready

    # When each rank is free and has all that it awaits.
    ready = np.zeros(tables.num_ranks)
    if tables.is_lazy:
        lazy = permutes([tables.neighbours])
        for tick in range(tables.num_ticks):
            end[tick] = lazy.begun(0, ready) + work[tick]
            ready = np.maximum(end[tick], lazy.over(0, ready))
        return end
    steady = tables.steady
    if steady is None:
        run_ramp(range(tables.num_ticks), ready)
        return end
    ready = run_ramp(range(steady.ticks.start), ready)
    x, cotangent = (
        permutes([(pairs,) for pairs in both]) for both in (steady.x_pairs, steady.cotangent_pairs)
    )
    x_over = cotangent_over = ready
    for beat in range(steady.num_beats):
        forward, number = steady.first_tick + TICKS_PER_BEAT * beat, beat % steady.period
        input_grad, weight_grad = forward + 1, forward + 2
        end[forward] = np.maximum(ready, x_over) + work[forward]
        ready = np.maximum(x.begun(number, end[forward]), cotangent_over)
        end[input_grad] = ready + work[input_grad]
        end[weight_grad] = cotangent.begun(number, end[input_grad]) + work[weight_grad]
        ready = end[weight_grad]
        x_over = x.over(number, end[forward])
        cotangent_over = cotangent.over(number, end[input_grad])
    ready = np.maximum(ready, np.maximum(x_over, cotangent_over))
    run_ramp(range(steady.ticks.stop, tables.num_ticks), ready)
    return end


class _Permutes:
    """Finds which ranks wait for which in permutes that run together, one set of them at a time.

    A rank waits for itself and its two neighbours: those are the rows of float64[3, num_ranks]
    that say how long after each of the three it goes on, -inf where it does not wait for one.
    """

    def __init__(
        self,
        sets: Sequence[Iterable[Pairs]],
        *,
        num_ranks: int,
        transfer: float,
        rendezvous: bool,
    ):
        pairs = [(n, *pair) for n, sides in enumerate(sets) for side in sides for pair in side]
        number, source, target = np.array(pairs, np.int64).reshape(-1, 3).T
        # The row in which a sender has its receiver, and a receiver its sender: 0 is the left
        # neighbour, 1 the rank itself, 2 the right neighbour. (A rank that sends to itself is in no
        # other pair of the set.)
        is_own, goes_right = source == target, (target - source) % num_ranks == 1
        of_target = np.where(is_own, 1, np.where(goes_right, 2, 0))
        of_source = 2 - of_target
        travels = np.where(is_own, 0.0, transfer)
        self._begun = np.full((len(sets), 3, num_ranks), -np.inf)
        self._begun[:, 1] = 0.0
        self._over = self._begun.copy()
        self._over[number, of_source, target] = travels
        if rendezvous:
            self._begun[number, of_target, source] = 0.0
            self._over[number, of_target, source] = travels
            self._over[number, 1, source] = self._over[number, 1, target] = travels
        ranks = np.arange(num_ranks)
        self._nearby = np.stack([ranks - 1, ranks, ranks + 1]) % num_ranks

    def begun(self, number: int, end: np.ndarray) -> np.ndarray:
        """Finds when ranks that come at `end`, float64[num_ranks], go on beside the transfer."""
        return np.maximum.reduce(end[self._nearby] + self._begun[number])

    def over(self, number: int, end: np.ndarray) -> np.ndarray:
        """Finds when they go on if they await the transfer."""
        return np.maximum.reduce(end[self._nearby] + self._over[number])


def replay_dependencies(timeline: Timeline, work: np.ndarray, *, transfer: float) -> np.ndarray:
    """Finds when each tick ends if ranks wait only for values that they read, as they read them.

    Args:
      timeline: The actions in ticks: the order of each rank's actions is all that counts.
      work: As for `replay`; it and the result may have more dims, for the same order with other
        durations.
      transfer: As for `replay`.

    Returns:
      float64[num_ticks, num_ranks].
    """
    num_ticks, num_ranks = timeline.index.shape
    payload, rank = find_dependencies(timeline.program).payload, timeline.program.units.rank
    # The place of each action among the ticks of all ranks, and that of the one whose value it
    # reads: a tick before the first one if it reads none.
    place = (timeline.tick_of + 1) * num_ranks + rank
    made_at = np.zeros((num_ticks, num_ranks), np.int64)
    made_at[timeline.tick_of, rank] = np.where(payload < 0, 0, place[payload])
    is_sent = (made_at > 0) & (made_at % num_ranks != np.arange(num_ranks))
    more = work.shape[2:]
    travels = transfer * is_sent.reshape(*is_sent.shape, *(1 for _ in more))
    end = np.zeros((num_ticks + 1, num_ranks, *more))
    made = end.reshape(-1, *more)
    for tick, took in enumerate(work):
        comes = made[made_at[tick]] + travels[tick]
        end[tick + 1] = np.maximum(end[tick], comes) + took
    return end[1:]
