"""Follows a token for each value through the slots of Tables.

It knows nothing of the timeline or of the allocator: only the rules of `Tables`. A
token is a number for one value, such as "the x that enters stage 3 with microbatch 7". Every entry
that names a slot stores a token there, or expects one that it may free; so the entries of a slot,
in the order of time, tell whether each finds what it expects. An exchange sends the values of its
pairs, and nothing else. In lazy tables every neighbour's value is sent; in the steady phase it is
at hand, as `verify_steady` holds `Steady` to the tables.
"""

from dataclasses import dataclass

import numpy as np

from dualpipe_jax._schedule.actions import BUFFERS, DEFERRED, Opcode, is_one_of
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
_BUFFERS = (*BUFFERS, DEFERRED)
# The kinds of payload; the token of a value that stays on its rank counts the chunk instead.
_X, _COTANGENT, _IN_STAGE = range(3)


def follow_tokens(tables: Tables) -> None:
    """Follows the values of tables whose entries are known to be in range.

    Raises:
        ScheduleError: if a read does not find its value, a live value is overwritten, or a slot
            does not end free.
    """
    tokens = _Tokens(tables)
    uses = _list_uses(tables, tokens)
    entries = _Entries(tables, uses)
    entries.send(tables, tokens.output)
    entries.check(tables)
    entries.check_no_stash(tables)


class _Tokens:
    """Gives the tokens of each tick and rank: int64[num_ticks, num_ranks].

    Attributes:
      local: That of a value that its rank saves for a later action.
      expected: That which the action reads in a received slot.
      output: That of its output; -1 if nobody reads it.
    """

    def __init__(self, tables: Tables):
        opcode, stage, microbatch = tables.opcode, tables.stage, tables.microbatch
        is_f = opcode == Opcode.FORWARD
        is_upper, is_lower = opcode == Opcode.BACKWARD_UPPER, opcode == Opcode.BACKWARD_LOWER
        is_last = stage == tables.num_stages - 1

        def token(kind: np.ndarray | int, stage: np.ndarray) -> np.ndarray:
            return (kind * tables.num_stages + stage) * np.int64(
                tables.num_microbatches
            ) + microbatch

        self.local = token(tables.chunk, stage)
        read = np.select([is_f, is_lower], [_X, _IN_STAGE], _COTANGENT)
        self.expected = token(read, stage)
        # F sends x to the next stage, I (or a lower half) the cotangent of its x to the stage
        # before; the last stage's F makes its own cotangent, of the loss, and an upper half one
        # that stays in the stage.
        makes_dx = is_one_of(opcode, _MAKES_DX)
        ends = (is_f & is_last & tables.forward_only) | (makes_dx & (stage == 0))
        self.output = np.select(
            [ends, is_f & is_last, is_f, is_upper, makes_dx],
            [
                -1,
                token(_COTANGENT, stage),
                token(_X, stage + 1),
                token(_IN_STAGE, stage),
                token(_COTANGENT, stage - 1),
            ],
            -1,
        )


@dataclass(frozen=True, kw_only=True)
class _Use:
    """Tells how the entries of a column use their slots.

    Attributes:
      column: The column.
      of: Where it has such entries: bool[num_ticks, num_ranks], or everywhere.
      tokens: The tokens that they store, or expect: int64[num_ticks, num_ranks]; None for those of
        values that travel, which `_Entries.send` finds.
      stores: Whether they store.
      frees: Where they free the slot.
    """

    column: str
    of: np.ndarray | bool = True
    tokens: np.ndarray | None
    stores: bool = False
    frees: np.ndarray | bool = False


def _list_uses(tables: Tables, tokens: _Tokens) -> list[_Use]:
    """Lists the uses of slots in the order in which a tick has them."""
    opcode = tables.opcode
    is_f, is_lower = opcode == Opcode.FORWARD, opcode == Opcode.BACKWARD_LOWER
    is_i, is_w, makes_dx = (is_one_of(opcode, of) for of in (OF_I, OF_W, _MAKES_DX))
    local = tokens.local
    arrivals = [_Use(column=c, tokens=None, stores=True) for c in ("from_left", "from_right")]
    return [
        *([] if tables.is_lazy else arrivals),
        _Use(column="read", tokens=tokens.expected, frees=True),
        _Use(column="residual", of=is_i | is_lower, tokens=local, frees=makes_dx),
        _Use(column="weight_residual", of=is_i | is_w, tokens=local, frees=is_w),
        *(_Use(column=c, of=is_w, tokens=local, frees=True) for c in ("stash", DEFERRED)),
        *(
            _Use(column=c, of=is_f, tokens=local, stores=True)
            for c in ("residual", "weight_residual")
        ),
        *(_Use(column=c, of=is_i, tokens=local, stores=True) for c in ("stash", DEFERRED)),
        _Use(column="keep", tokens=tokens.output, stores=True),
        _Use(column="send", tokens=None, frees=True),
        *(arrivals if tables.is_lazy else []),
    ]


class _Entries:
    """Holds the entries of all uses, slot after slot, each slot's in the order of time.

    Attributes:
      use: The number of each entry's use: int64[num_entries], as are all of them.
      tick, rank, slot: Where it stands, and the slot that it names.
      token: The token that it stores or expects.
    """

    def __init__(self, tables: Tables, uses: list[_Use]):
        self._uses = uses
        found = []
        for number, use in enumerate(uses):
            slots = getattr(tables, use.column)
            tick, rank = np.nonzero((slots >= 0) & use.of)
            frees = np.broadcast_to(use.frees, slots.shape)[tick, rank]
            token = np.full(len(tick), -1) if use.tokens is None else use.tokens[tick, rank]
            buffer = np.full(len(tick), _BUFFERS.index(BUFFER_OF[use.column]))
            number = np.full(len(tick), number)
            found.append((number, tick, rank, slots[tick, rank], buffer, token, frees))
        columns = [np.concatenate(of_each) for of_each in zip(*found, strict=True)]
        number, tick, rank, slot, buffer, *_ = columns
        order = np.lexsort((number, tick, slot, rank, buffer))
        self.use, self.tick, self.rank, self.slot, self._buffer, self.token, self._frees = (
            column[order] for column in columns
        )
        self._stores = np.array([use.stores for use in uses])[self.use]
        # Whether an entry finds its slot in use: by the one before it, which is of the same slot.
        places = np.stack([self._buffer, self.rank, self.slot])
        is_same = (places[:, 1:] == places[:, :-1]).all(axis=0)
        self._is_last = np.append(~is_same, True)[: len(order)]
        self._finds = ~np.roll(self._is_last | self._frees, 1)

    def _of(self, column: str) -> np.ndarray:
        """Finds the entries of a column that one use has."""
        (number,) = (n for n, use in enumerate(self._uses) if use.column == column)
        return np.flatnonzero(self.use == number)

    def send(self, tables: Tables, output: np.ndarray) -> None:
        """Finds the tokens of values that ranks kept and send, and of those that arrive."""
        sent, sends, kept = output.copy(), self._of("send"), np.zeros(len(self.use), bool)
        kept[self._of("keep")] = True
        is_kept = self._finds[sends] & kept[sends - 1]
        self.token[sends] = np.where(is_kept, self.token[sends - 1], -1)
        sent[self.tick[sends], self.rank[sends]] = self.token[sends]
        is_target = _find_targets(tables)
        for side, (column, step) in enumerate((("from_left", -1), ("from_right", 1))):
            arrives = self._of(column)
            tick, rank = self.tick[arrives] - 1, self.rank[arrives]
            token = sent[tick, (rank + step) % tables.num_ranks]
            self.token[arrives] = np.where((tick >= 0) & is_target[tick, side, rank], token, -1)

    def check(self, tables: Tables) -> None:
        """Requires entries that store to find a free slot, the others to find their token."""
        found = np.where(self._finds, np.roll(self.token, 1), -1)
        is_wrong = np.where(self._stores, self._finds, found != self.token) | (self.token < 0)
        if is_wrong.any():
            wrong = np.flatnonzero(is_wrong)
            first = np.lexsort((self.rank[wrong], self.use[wrong], self.tick[wrong]))[0]
            self._fail(tables, int(wrong[first]), int(found[wrong[first]]))
        for entry in np.flatnonzero(self._is_last & ~self._frees).tolist():
            rank, where = int(self.rank[entry]), self._name(entry)
            fault = f"{where} still holds {self._describe(tables, entry, self.token[entry])}"
            fail_at(tables, tables.num_ticks - 1, rank, f"{fault} after the last tick")

    def check_no_stash(self, tables: Tables) -> None:
        """Expects all stashes free where executors overwrite or end them."""
        is_on = (tables.deferred >= 0) & is_one_of(tables.opcode, OF_I + OF_W)
        count = np.cumsum(is_on, axis=0)
        # A stash is in use between the entry that stores it and the next one, which frees it.
        stored = np.flatnonzero(self._stores & (self._buffer == _BUFFERS.index("stash")))
        first, rank = self.tick[stored], self.rank[stored]
        is_named = count[self.tick[stored + 1] - 1, rank] > count[first, rank]
        for entry in stored[is_named].tolist():
            rank, tick = int(self.rank[entry]), int(self.tick[entry]) + 1
            tick += int(is_on[tick:, rank].argmax())
            fault = f"names a slot in deferred while {self._name(entry)} holds"
            described = self._describe(tables, entry, self.token[entry])
            fail_at(tables, tick, rank, f"{fault} {described}")

    def _fail(self, tables: Tables, entry: int, found: int) -> None:
        """Says of an entry that it finds a wrong token, -1 for none."""
        token, column = int(self.token[entry]), self._uses[self.use[entry]].column
        where = self._name(entry)
        if column == "send":
            fault = f"sends {where}, which has no value that the rank kept"
        elif self._stores[entry] and token < 0:
            fault = f"{column} stores in {where}, but nothing was sent"
        elif self._stores[entry]:
            still = self._describe(tables, entry, found)
            fault = f"{column} stores in {where}, where {still} is still to be read"
        else:
            wanted, there = (self._describe(tables, entry, each) for each in (token, found))
            fault = f"expects {wanted} in {where} and finds {there}"
        fail_at(tables, int(self.tick[entry]), int(self.rank[entry]), fault)

    def _name(self, entry: int) -> str:
        return f"{_BUFFERS[self._buffer[entry]]} slot {self.slot[entry]}"

    def _describe(self, tables: Tables, entry: int, token: int) -> str:
        """Describes a token in the slot of an entry."""
        if token < 0:
            return "nothing"
        rest, microbatch = divmod(token, tables.num_microbatches)
        kind, stage = divmod(rest, tables.num_stages)
        if _BUFFERS[self._buffer[entry]] == "received":
            payload = "the x of" if kind == _X else "the cotangent for"
            return f"{payload} {stage}{'FIW'[kind]}{microbatch}"
        return f"the value that chunk {kind} saved for stage {stage}, microbatch {microbatch}"


def _find_targets(tables: Tables) -> np.ndarray:
    """Marks ranks that are sent a value, from the left and right: bool[num_ticks, 2, num_ranks]."""
    is_target = np.zeros((tables.num_ticks, 2, tables.num_ranks), bool)
    # In the steady phase, and in lazy tables, all values are at hand.
    is_target[np.all(tables.exchange < 0, axis=1)] = True
    for part, exchanges in enumerate(tables.exchanges):
        of_exchange = np.zeros((len(exchanges), 2, tables.num_ranks), bool)
        for number, both in enumerate(exchanges):
            for side, pairs in enumerate(both):
                # They are known to be neighbours.
                of_exchange[number, side, [target for _, target in pairs]] = True
        has_exchange = tables.exchange[:, part] >= 0
        is_target[has_exchange] |= of_exchange[tables.exchange[has_exchange, part]]
    return is_target
