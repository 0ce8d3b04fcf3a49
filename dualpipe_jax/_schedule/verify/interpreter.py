"""Executes Tables with tokens in place of arrays.

It knows nothing of the timeline or of the allocator: only the rules of `Tables`. A
token is a number for one value, such as "the x that enters stage 3 with microbatch 7". An exchange
sends the values of its pairs, and nothing else. In lazy tables every neighbour's value is sent; in
the steady phase it is at hand, as `verify_steady` holds `Steady` to the tables.
"""

from functools import partial

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


class _Entries:
    """Finds the ranks of each tick that name a slot in a column, where `of` holds."""

    def __init__(self, tables: Tables, column: str, *, of: np.ndarray | bool = True):
        slot = getattr(tables, column)
        ticks, self._ranks = np.nonzero((slot >= 0) & of)
        self._slots = slot[ticks, self._ranks]
        self._first = np.searchsorted(ticks, np.arange(tables.num_ticks + 1)).tolist()
        self.column, self.buffer = column, BUFFER_OF[column]

    def of_tick(self, tick: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Gives the ranks and their slots; None if there are none."""
        first, end = self._first[tick : tick + 2]
        if first == end:
            return None
        return self._ranks[first:end], self._slots[first:end]


class _Interpreter:
    """Runs tables on all ranks at once, a token in every slot; -1 is a free one."""

    def __init__(self, tables: Tables):
        self.tables = tables
        self.slots = {
            buffer: np.full((tables.num_ranks, tables.num_slots.get(buffer, 0)), -1)
            for buffer in (*BUFFERS, DEFERRED)
        }
        self.is_target = _find_targets(tables)
        ranks = np.arange(tables.num_ranks)
        self.neighbours = np.stack([ranks - 1, ranks + 1]) % tables.num_ranks
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
        is_i, is_w = (np.isin(opcode, of) for of in (OF_I, OF_W))
        named = partial(_Entries, tables)
        # The reads, with the ranks that free their slots; the writes; and the values that travel.
        self.loads = [
            (named("read"), self.expected, opcode != Opcode.IDLE),
            (named("residual", of=is_i | is_lower), self.local, makes_dx),
            *(
                (named(name, of=of), self.local, is_w)
                for name, of in (
                    ("weight_residual", is_i | is_w),
                    ("stash", is_w),
                    (DEFERRED, is_w),
                )
            ),
        ]
        self.without_stash = named(DEFERRED, of=is_i | is_w)
        self.stores = [
            *(named(name, of=is_f) for name in ("residual", "weight_residual")),
            *(named(name, of=is_i) for name in ("stash", DEFERRED)),
        ]
        self.kept, self.sent = named("keep"), named("send")
        self.arrivals = named("from_left"), named("from_right")
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
            for entries, tokens, free in self.loads:
                self._load(tick, entries, tokens[tick], free=free[tick])
            self._expect_no_stash(tick)
            for entries in self.stores:
                self._store(tick, entries, self.local[tick])
            self._store(tick, self.kept, self.output[tick])
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
        for entries, tokens in zip(self.arrivals, arrived, strict=True):
            self._store(tick, entries, tokens)

    def _sent(self, tick: int) -> np.ndarray:
        """Finds the value that each rank sends: this tick's output, or one kept until now."""
        named = self.sent.of_tick(tick)
        if named is None:
            return self.output[tick]
        received, sent = self.slots["received"], self.output[tick].copy()
        ranks, slot = named
        sent[ranks] = received[named]
        for rank, number in zip(ranks.tolist(), slot.tolist(), strict=True):
            if sent[rank] < 0:
                fail_at(self.tables, tick, rank, f"sends received slot {number}, which is free")
        received[named] = -1
        return sent

    def _exchange(self, tick: int, sent: np.ndarray) -> np.ndarray:
        """Delivers the sent values: int64[2, num_ranks], from the left and from the right."""
        from_neighbours = sent[self.neighbours]
        if (self.tables.exchange[tick] < 0).all():
            return from_neighbours
        return np.where(self.is_target[tick], from_neighbours, -1)

    def _store(self, tick: int, entries: _Entries, tokens: np.ndarray) -> None:
        """Stores the tokens of ranks in the slots that they name, which must be free."""
        named = entries.of_tick(tick)
        if named is None:
            return
        slots, stored = self.slots[entries.buffer], tokens[named[0]]
        if slots[named].max() >= 0 or stored.min() < 0:
            for rank, slot in zip(*(each.tolist() for each in named), strict=True):
                fault = f"{entries.column} stores in {entries.buffer} slot {slot}"
                if tokens[rank] < 0:
                    fail_at(self.tables, tick, rank, f"{fault}, but nothing was sent")
                if slots[rank, slot] >= 0:
                    still = self._describe(entries.buffer, slots[rank, slot])
                    fail_at(self.tables, tick, rank, f"{fault}, where {still} is still to be read")
        slots[named] = stored

    def _load(self, tick: int, entries: _Entries, tokens: np.ndarray, *, free: np.ndarray) -> None:
        """Expects the tokens of ranks in the slots that they name; frees those of `free` ranks."""
        named = entries.of_tick(tick)
        if named is None:
            return
        (ranks, slot), buffer = named, entries.buffer
        slots = self.slots[buffer]
        is_wrong = slots[named] != tokens[ranks]
        if is_wrong.any():
            first = int(is_wrong.argmax())
            rank, number = int(ranks[first]), int(slot[first])
            found = self._describe(buffer, slots[rank, number])
            wanted = self._describe(buffer, tokens[rank])
            where = f"{buffer} slot {number}"
            fail_at(self.tables, tick, rank, f"expects {wanted} in {where} and finds {found}")
        is_freed = free[ranks]
        slots[ranks[is_freed], slot[is_freed]] = -1

    def _expect_no_stash(self, tick: int) -> None:
        """Expects all stashes free where executors overwrite or end them."""
        named = self.without_stash.of_tick(tick)
        for rank in () if named is None else named[0].tolist():
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
