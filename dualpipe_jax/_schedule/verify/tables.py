"""Verifies Tables, the last pass's outcome, knowing nothing of the passes before."""

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import IDLE, Opcode, is_one_of
from dualpipe_jax._schedule.excerpt import fail_at
from dualpipe_jax._schedule.tables import MOST_SETS, Tables
from dualpipe_jax._schedule.verify.tokens import BUFFER_OF, OF_I, OF_W, follow_tokens


def verify_tables(tables: Tables) -> None:
    """Checks that an executor that runs the tables computes the whole step, and nothing else.

    - All tables are int32[num_ticks, num_ranks]; every slot exists in its buffer.
    - Each (stage, microbatch) has exactly one F, one I and one W (forward-only: one F), each
      on a rank and a chunk that `stage_of` gives that stage.
    - I and W of a (stage, microbatch) run alike: split, deferred, or as a full backward.
    - An action names exactly the slots that it uses, an idle rank none. I and W name a slot in
      stash if split, in deferred if deferred, in neither if a full backward.
    - In the steady phase, and in lazy tables, nothing is sent later than made.
    - Tables have parts, and lazy ones none. Every tick outside of the steady phase has an exchange
      in every part, those in it none. The first one of a part is empty, and skipped by executors.
    - Pairs are neighbours, on the ring where the tables wrap; no rank is twice a source or a target
      to one side, be it in two parts. There are at most `MOST_SETS` distinct sets of pairs to a
      side.
    - Lazy tables have no steady phase.
    - A value that is stored on arrival was made by that neighbour in the tick before, or kept by it
      until then, and sent in a pair of that tick's exchange, or lazily.
    - Every read finds the value it expects; F, I and W of one (stage, microbatch) find each
      other's on the same rank and chunk.
    - Nothing is stored in a slot whose value is still to be read, and all slots end free.
    - No stash is in use on a rank that runs an I or a W of the deferred kind.

    Raises:
        ScheduleError: naming action, rank and tick, and showing the ticks around.
    """
    _check_shapes(tables)
    _check_actions(tables)
    _check_columns(tables)
    _check_exchanges(tables)
    follow_tokens(tables)


def _check_shapes(tables: Tables) -> None:
    shape = tables.num_ticks, tables.num_ranks
    for column in Tables.columns():
        table = getattr(tables, column)
        if table.shape != shape or table.dtype != np.int32:
            raise ScheduleError(f"table {column} is {table.dtype}{table.shape}, not int32{shape}")
    if tables.stage_of.shape != (tables.num_chunks, tables.num_ranks):
        raise ScheduleError(f"stage_of is {tables.stage_of.shape}, not [num_chunks, num_ranks]")
    for column, buffer in BUFFER_OF.items():
        table, num_slots = getattr(tables, column), tables.num_slots.get(buffer, 0)
        _fail_where(
            tables,
            (table < -1) | (table >= num_slots),
            f"{column} must be one of the {num_slots} {buffer} slots",
        )


def _check_actions(tables: Tables) -> None:
    acts = tables.opcode != IDLE
    limits = {
        "opcode": len(Opcode),
        "chunk": tables.num_chunks,
        "stage": tables.num_stages,
        "microbatch": tables.num_microbatches,
    }
    for column, limit in limits.items():
        table = getattr(tables, column)
        outside = acts & ((table < 0) | (table >= limit))
        _fail_where(tables, outside, f"{column} must be in 0..{limit - 1}")
        if column != "opcode":
            _fail_where(tables, ~acts & (table != -1), f"an idle rank must have no {column}")
    held = tables.stage_of[tables.chunk, np.arange(tables.num_ranks)]
    _fail_where(tables, acts & (held != tables.stage), "must be a stage that the rank's chunk is")

    place = tables.stage, tables.microbatch
    for letter, opcodes in (("F", (Opcode.FORWARD,)), ("I", OF_I), ("W", OF_W)):
        is_one = is_one_of(tables.opcode, opcodes)
        count = np.zeros((tables.num_stages, tables.num_microbatches), np.int64)
        np.add.at(count, (tables.stage[is_one], tables.microbatch[is_one]), 1)
        wanted = 0 if tables.forward_only and letter != "F" else 1
        for stage, microbatch in np.argwhere(count != wanted).tolist():
            action = f"{stage}{letter}{microbatch}"
            same = is_one & (tables.stage == stage) & (tables.microbatch == microbatch)
            _fail_where(tables, same, f"{action} must run exactly once")
            raise ScheduleError(f"{action} must run exactly once, but runs on no rank in no tick")
    # The I of each stage and microbatch, as a number in OF_I, and its W's in OF_W.
    form = np.full((2, tables.num_stages, tables.num_microbatches), -1)
    for of, opcodes in enumerate((OF_I, OF_W)):
        for number, opcode in enumerate(opcodes):
            here = tables.opcode == opcode
            form[of, tables.stage[here], tables.microbatch[here]] = number
    is_w = is_one_of(tables.opcode, OF_W)
    other = is_w & (form[0] != form[1])[place]
    _fail_where(tables, other, "is not the weight grad of its input grad")


def _check_columns(tables: Tables) -> None:
    is_f, is_i, is_w = (is_one_of(tables.opcode, of) for of in ((Opcode.FORWARD,), OF_I, OF_W))
    is_upper, is_lower = (
        tables.opcode == half for half in (Opcode.BACKWARD_UPPER, Opcode.BACKWARD_LOWER)
    )
    saves = is_f & (not tables.forward_only)
    last_f = saves & (tables.stage == tables.num_stages - 1)
    used = {
        "read": (is_f & (tables.stage > 0)) | is_i | is_lower,
        "residual": saves | is_i | is_lower,
        "weight_residual": saves | is_i | is_w,
        "stash": is_one_of(tables.opcode, (OF_I[0], OF_W[0])),
        "deferred": is_one_of(tables.opcode, (OF_I[1], OF_W[1])),
    }
    for column, mask in used.items():
        named = getattr(tables, column) >= 0
        _fail_where(tables, mask & ~named, f"needs a slot in {column}")
        _fail_where(tables, named & ~mask, f"must have no slot in {column}")
    keeps = tables.keep >= 0
    _fail_where(tables, last_f & ~keeps, "must keep the cotangent that the head gives")
    _fail_where(tables, is_upper & ~keeps, "must keep the cotangent that the lower half reads")
    sends = is_f & ~last_f & (tables.stage < tables.num_stages - 1)
    sends |= ((is_i & ~is_upper) | is_lower) & (tables.stage > 0)
    _fail_where(tables, keeps & ~(sends | last_f | is_upper), "has no output to keep")
    if not tables.wraps:
        wrapped = np.zeros(tables.opcode.shape, bool)
        wrapped[:, 0] |= tables.from_left[:, 0] >= 0
        wrapped[:, -1] |= tables.from_right[:, -1] >= 0
        _fail_where(tables, wrapped, "receives around the ring, but the tables do not wrap")


def _check_exchanges(tables: Tables) -> None:
    exchange, shape = tables.exchange, (tables.num_ticks, len(tables.exchanges))
    if exchange.shape != shape or exchange.dtype != np.int32:
        raise ScheduleError(f"exchange is {exchange.dtype}{exchange.shape}, not int32{shape}")
    if tables.is_lazy and (tables.exchanges or tables.steady is not None):
        raise ScheduleError("lazy tables have exchanges, or a steady phase")
    if bool(tables.exchanges) == tables.is_lazy:
        wanted = "no part" if tables.is_lazy else "a part"
        raise ScheduleError(f"exchanges have {len(tables.exchanges)} parts, must have {wanted}")
    in_steady = np.zeros(tables.num_ticks, bool)
    if tables.steady is not None:
        in_steady[tables.steady.ticks] = True
    at_once = (in_steady | tables.is_lazy)[:, None]
    _fail_where(tables, at_once & (tables.send >= 0), "must send its output in its own tick")
    limits = np.array([len(of_part) for of_part in tables.exchanges])
    known = np.where(in_steady[:, None], exchange == -1, (exchange >= 0) & (exchange < limits))
    for tick, part in np.argwhere(~known).tolist():
        wanted = "-1" if in_steady[tick] else f"in 0..{limits[part] - 1}"
        fail_at(tables, tick, 0, f"exchange {exchange[tick, part]} must be {wanted}")
    for of_part in tables.exchanges:
        if of_part[0] != ((), ()):
            raise ScheduleError(f"the first exchange of a part is {of_part[0]}, not an empty one")
    for side, step in enumerate((1, -1)):
        sets = [{pairs[side] for pairs in of_part} - {()} for of_part in tables.exchanges]
        num_sets = sum(map(len, sets))
        if num_sets > MOST_SETS:
            raise ScheduleError(
                f"exchanges have {num_sets} distinct sets of pairs to one side, more than "
                f"{MOST_SETS}, beyond which TPUs may have every core wait"
            )
        pairs_of = [{pair for pairs in of_part for pair in pairs} for of_part in sets]
        for source, target in sorted(set().union(*pairs_of)):
            there = source + step
            if tables.wraps and 0 <= source < tables.num_ranks:
                there %= tables.num_ranks
            if target != there or not {source, there} <= set(range(tables.num_ranks)):
                raise ScheduleError(f"exchanges pair {source} and {target}: no neighbours")
        # As neighbours, sources are distinct where targets are.
        in_a_set = any(len(set(pairs)) < len(pairs) for of_part in sets for pairs in of_part)
        if in_a_set or len(set().union(*pairs_of)) < sum(map(len, pairs_of)):
            raise ScheduleError("exchanges have a pair twice in a set, or in two parts")


def _fail_where(tables: Tables, mask: np.ndarray, fault: str) -> None:
    if mask.any():
        tick, rank = np.argwhere(mask)[0].tolist()
        fail_at(tables, tick, rank, fault)
