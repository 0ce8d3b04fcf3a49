"""Executes Tables with tokens in place of arrays.

It knows nothing of the timeline or of the allocator: only the rules of `Tables`. A
token is a number for one value, such as "the x that enters stage 3 with microbatch 7". An exchange
sends the values of its pairs, and nothing else. In lazy tables every neighbour's value is sent; in
the steady phase it is at hand, as `verify_steady` holds `Steady` to the tables.
"""

import numpy as np

from dualpipe_jax._schedule.actions import BUFFERS, DEFERRED, Opcode
from dualpipe_jax._schedule.excerpt import fail_at
from dualpipe_jax._schedule.tables import Tables

# The I's, and the W that belongs to each.
OF_I = (
    Opcode.INPUT_GRAD,
    Opcode.INPUT_GRAD_DEFERRING,
    Opcode.BACKWARD_UPPER,
    Opcode.BACKWARD,
)
OF_W = (
    Opcode.WEIGHT_GRAD,
    Opcode.WEIGHT_GRAD_DEFERRED,
    Opcode.BACKWARD_LOWER,
    Opcode.WEIGHT_GRAD_DONE,
)
_MAKES_DX = (
    Opcode.INPUT_GRAD,
    Opcode.INPUT_GRAD_DEFERRING,
    Opcode.BACKWARD_LOWER,
    Opcode.BACKWARD,
)
# Which buffer a column of slots belongs to.
BUFFER_OF = {"from_left": "received", "from_right": "received", "read": "received"}
BUFFER_OF |= {"keep": "received", "send": "received"} | {
    name: name for name in (*BUFFERS[1:], DEFERRED)
}
# The kinds of payload; the token of a value that stays on its rank counts the chunk instead.
_X, _COTANGENT, _IN_STAGE = range(3)


def run_with_tokens(tables: Tables) -> None:
    """Runs tables whose entries are known to be in range.

    Raises:
        ScheduleError: if a read does not find its value, a live value is overwritten, or a slot
            does not end free.
    """
    _Interpreter(tables).run()


class _Interpreter:
    """Runs tables on all ranks at once, a token in every slot; -1 is a free one."""

    def __init__(self, tables: Tables):
        self.tables = tables
        self.slots = {
            buffer: np.full((tables.num_ranks, tables.num_slots.get(buffer, 0)), -1)
            for buffer in (*BUFFERS, DEFERRED)
        }
        self.is_target = _find_targets(tables)
        opcode, stage, microbatch = tables.opcode, tables.stage, tables.microbatch
        is_f = opcode == Opcode.FORWARD
        is_upper, is_lower = opcode == Opcode.BACKWARD_UPPER, opcode == Opcode.BACKWARD_LOWER
        is_last = stage == tables.num_stages - 1
        self.local = self._token(tables.chunk, stage, microbatch)
        read = np.select([is_f, is_lower], [_X, _IN_STAGE], _COTANGENT)
        self.expected = self._token(read, stage, microbatch)
        # F sends x to the next stage, I (or a lower half) the cotangent of its x to the stage
        # before; the last stage's F makes its own cotangent, of the loss, and an upper half one
        # that stays in the stage.
        makes_dx = np.isin(opcode, _MAKES_DX)
        self.is_f, self.makes_dx, self.is_lower = is_f, makes_dx, is_lower
        self.is_i, self.is_w = (np.isin(opcode, of) for of in (OF_I, OF_W))
        ends = (is_f & is_last & tables.forward_only) | (makes_dx & (stage == 0))
        self.output = np.select(
            [ends, is_f & is_last, is_f, is_upper, makes_dx],
            [
                -1,
                self._token(_COTANGENT, stage, microbatch),
                self._token(_X, stage + 1, microbatch),
                self._token(_IN_STAGE, stage, microbatch),
                self._token(_COTANGENT, stage - 1, microbatch),
            ],
            -1,
        )

    def _token(self, kind: np.ndarray | int, stage: np.ndarray, microbatch: np.ndarray):
        tables = self.tables
        return (kind * tables.num_stages + stage) * np.int64(tables.num_microbatches) + microbatch

    def run(self) -> None:
        """Executes every tick."""
        tables = self.tables
        arrived = np.full((2, tables.num_ranks), -1)
        for tick in range(tables.num_ticks):
            if not tables.is_lazy:
                self._store_arrivals(tick, arrived)
            opcode, local = tables.opcode[tick], self.local[tick]
            is_f, is_i, is_w = self.is_f[tick], self.is_i[tick], self.is_w[tick]
            self._load(tick, "read", self.expected[tick], free=opcode != Opcode.IDLE)
            of = is_i | self.is_lower[tick]
            self._load(tick, "residual", local, of=of, free=self.makes_dx[tick])
            self._load(tick, "weight_residual", local, of=is_i | is_w, free=is_w)
            self._load(tick, "stash", local, of=is_w, free=is_w)
            self._load(tick, DEFERRED, local, of=is_w, free=is_w)
            self._expect_no_stash(tick, of=(is_i | is_w) & (tables.deferred[tick] >= 0))
            self._store(tick, "residual", local, of=is_f)
            self._store(tick, "weight_residual", local, of=is_f)
            self._store(tick, "stash", local, of=is_i)
            self._store(tick, DEFERRED, local, of=is_i)

            self._store(tick, "keep", self.output[tick])
            sent = self._sent(tick)
            if tables.is_lazy:
                self._store_arrivals(tick, arrived)
            arrived = self._exchange(tick, sent)
        for buffer, slots in self.slots.items():
            for rank, slot in np.argwhere(slots >= 0).tolist():
                fault = (
                    f"{buffer} slot {slot} still holds {self._describe(buffer, slots[rank, slot])}"
                )
                fail_at(tables, tables.num_ticks - 1, rank, f"{fault} after the last tick")

    def _store_arrivals(self, tick: int, arrived: np.ndarray) -> None:
        for column, tokens in zip(("from_left", "from_right"), arrived, strict=True):
            self._store(tick, column, tokens)

    def _sent(self, tick: int) -> np.ndarray:
        """Finds the value that each rank sends: this tick's output, or one kept until now."""
        slot = self.tables.send[tick]
        ranks = np.flatnonzero(slot >= 0)
        if not ranks.size:
            return self.output[tick]
        received, sent = self.slots["received"], self.output[tick].copy()
        sent[ranks] = received[ranks, slot[ranks]]
        for rank in ranks[sent[ranks] < 0].tolist():
            fail_at(self.tables, tick, rank, f"sends received slot {slot[rank]}, which is free")
        received[ranks, slot[ranks]] = -1
        return sent

    def _exchange(self, tick: int, sent: np.ndarray) -> np.ndarray:
        """Delivers the sent values: int64[2, num_ranks], from the left and from the right."""
        from_neighbours = np.stack([np.roll(sent, 1), np.roll(sent, -1)])
        if (self.tables.exchange[tick] < 0).all():
            return from_neighbours
        return np.where(self.is_target[tick], from_neighbours, -1)

    def _store(
        self, tick: int, column: str, tokens: np.ndarray, *, of: np.ndarray | bool = True
    ) -> None:
        """Stores tokens in free slots, on the ranks `of` that name one in `column`."""
        slot = getattr(self.tables, column)[tick]
        ranks = np.flatnonzero((slot >= 0) & of)
        if not ranks.size:
            return
        slots, at = self.slots[BUFFER_OF[column]], (ranks, slot[ranks])
        if (slots[at] >= 0).any() or (tokens[ranks] < 0).any():
            for rank in ranks.tolist():
                fault = f"{column} stores in {BUFFER_OF[column]} slot {slot[rank]}"
                if tokens[rank] < 0:
                    fail_at(self.tables, tick, rank, f"{fault}, but nothing was sent")
                if slots[rank, slot[rank]] >= 0:
                    still = self._describe(BUFFER_OF[column], slots[rank, slot[rank]])
                    fail_at(self.tables, tick, rank, f"{fault}, where {still} is still to be read")
        slots[at] = tokens[ranks]

    def _load(
        self,
        tick: int,
        column: str,
        tokens: np.ndarray,
        *,
        of: np.ndarray | bool = True,
        free: np.ndarray,
    ) -> None:
        """Expects tokens in the slots of the ranks `of`; on the ranks `free` for the last time."""
        slot = getattr(self.tables, column)[tick]
        ranks = np.flatnonzero((slot >= 0) & of)
        if not ranks.size:
            return
        slots, at = self.slots[BUFFER_OF[column]], (ranks, slot[ranks])
        if (slots[at] != tokens[ranks]).any():
            rank = int(ranks[slots[at] != tokens[ranks]][0])
            buffer = BUFFER_OF[column]
            found = self._describe(buffer, slots[rank, slot[rank]])
            wanted = self._describe(buffer, tokens[rank])
            where = f"{buffer} slot {slot[rank]}"
            fail_at(self.tables, tick, rank, f"expects {wanted} in {where} and finds {found}")
        freed = ranks[free[ranks]]
        slots[freed, slot[freed]] = -1

    def _expect_no_stash(self, tick: int, *, of: np.ndarray) -> None:
        """Expects all stashes free on the ranks `of`, where executors overwrite or end them."""
        for rank in np.flatnonzero(of).tolist():
            for slot, token in enumerate(self.slots["stash"][rank].tolist()):
                if token >= 0:
                    fault = f"names a slot in deferred while stash slot {slot} holds"
                    fail_at(self.tables, tick, rank, f"{fault} {self._describe('stash', token)}")

    def _describe(self, buffer: str, token: int) -> str:
        if token < 0:
            return "nothing"
        rest, microbatch = divmod(token, self.tables.num_microbatches)
        kind, stage = divmod(rest, self.tables.num_stages)
        if buffer == "received":
            payload = "the x of" if kind == _X else "the cotangent for"
            return f"{payload} {stage}{'FIW'[kind]}{microbatch}"
        return f"the value that chunk {kind} saved for stage {stage}, microbatch {microbatch}"


def _find_targets(tables: Tables) -> np.ndarray:
    """Marks ranks that are sent a value, from the left and right: bool[num_ticks, 2, num_ranks]."""
    is_target = np.zeros((tables.num_ticks, 2, tables.num_ranks), bool)
    for part, exchanges in enumerate(tables.exchanges):
        for number, both in enumerate(exchanges):
            ticks = np.flatnonzero(tables.exchange[:, part] == number)
            for side, pairs in enumerate(both):
                # They are known to be neighbours.
                is_target[ticks[:, None], side, [target for _, target in pairs]] = True
    return is_target
