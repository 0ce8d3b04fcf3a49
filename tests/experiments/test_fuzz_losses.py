"""A sample of the random losses: exact beside the loss itself, or refused by a line of theirs."""

import re

import jax
import pytest

from dualpipe_jax import LossModel
from experiments.fuzz_losses.check import ROWS, refusal_or_model
from experiments.fuzz_losses.grammar import Program, write

SEEDS = range(100, 160)


def model_of(program: Program) -> LossModel | Exception:
    return refusal_or_model(program, program.load())


def test_most_losses_are_taken_and_refusals_name_a_line() -> None:
    programs = list(map(write, SEEDS))
    refused = {p.file: m for p in programs if isinstance(m := model_of(p), Exception)}
    assert len(refused) <= 0.25 * len(programs)
    for file, error in refused.items():
        assert re.search(rf"{re.escape(file)}:\d", str(error)), error


# They have between them U-nets, a maximum of layers, a norm of all parameters, loops over indices,
# rows of a table by layer, reversible streams, an encoder, windows by layer and experts by turns.
@pytest.mark.parametrize("seed", [15, 18, 37, 131, 140, 158, 161, 164, 170])
def test_losses_are_exact(seed: int) -> None:
    program = write(seed)
    functions, model = program.load(), model_of(program)
    assert isinstance(model, LossModel), model
    params, batch = functions["init"](seed), functions["make_batch"](seed, ROWS)
    rng = jax.random.key(seed) if program.has_key else None
    assert model.verify(params, batch, rng=rng) <= 1e-9
