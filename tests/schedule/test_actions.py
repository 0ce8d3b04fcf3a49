"""The table of actions: whichever way an I and its W run, values are made once and slots freed."""

from collections import Counter

import numpy as np
import pytest

from dualpipe_jax._schedule.actions import (
    BUFFERS,
    DEFERRED,
    EFFECTS,
    FORWARD,
    Opcode,
    letter_of,
    opcodes_that,
    opcodes_with,
    unit_of,
)
from dualpipe_jax._schedule.verify.tokens import OF_I, OF_W


@pytest.mark.parametrize(("input_grad", "weight_grad"), list(zip(OF_I, OF_W, strict=True)))
def test_each_way_to_run_is_complete(input_grad: Opcode, weight_grad: Opcode) -> None:
    effects = [EFFECTS[opcode] for opcode in (FORWARD, input_grad, weight_grad)]
    assert [letter_of(effect.unit) for effect in effects] == ["F", "I", "W"]
    assert [effect.follows for effect in effects] == [None, *(e.unit for e in effects[:2])]
    made = Counter(effect.makes for effect in effects if effect.makes)
    taken = Counter(effect.takes for effect in effects if effect.takes)
    assert made == taken
    assert set(made.values()) == {1}
    written, freed = [], []
    for effect in effects:
        # A value is read after it was written, and before it is freed.
        assert set(effect.reads) <= set(written) - set(freed)
        assert set(effect.frees) <= set(written) - set(freed)
        written += effect.writes
        freed += effect.frees
    assert sorted(written) == sorted(freed)
    assert len(set(written)) == len(written)


def test_every_opcode_has_a_row_and_a_letter() -> None:
    assert [*EFFECTS] == [opcode for opcode in Opcode if opcode != Opcode.IDLE]
    assert "".join(map(letter_of, Opcode)) == ".FIWIWIWIW"
    assert unit_of(np.array(Opcode)).tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3]
    named = {name for e in EFFECTS.values() for name in (*e.reads, *e.writes, *e.frees)}
    assert named == {*BUFFERS[1:], DEFERRED}


def test_opcodes_are_found_by_their_effects() -> None:
    assert opcodes_that(makes="x") == (Opcode.FORWARD,)
    assert opcodes_that(writes="stash") == (Opcode.INPUT_GRAD,)
    assert opcodes_with("deferred") == (Opcode.INPUT_GRAD_DEFERRING, Opcode.WEIGHT_GRAD_DEFERRED)
    assert set(opcodes_that(unit=Opcode.INPUT_GRAD)) == set(OF_I)
    assert set(opcodes_that(follows=Opcode.INPUT_GRAD)) == set(OF_W)
