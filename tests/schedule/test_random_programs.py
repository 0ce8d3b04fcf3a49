"""Random legal programs of any routes: all compile, and all compute the gradients."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.grammar import parse_program
from tests import table_interpreter
from tests.schedule.random_programs import programs


@given(programs(), st.sampled_from(["shortest", "two-tick"]))
@settings(max_examples=200, deadline=None)
def test_random_programs_compute_the_gradients(program, timetable):
    tables = compile_program(program, timetable=timetable).tables
    model = table_interpreter.random_model(program.num_stages, program.num_microbatches)
    loss, grads = table_interpreter.run(tables, *model)
    expected_loss, expected_grads = table_interpreter.loss_and_grads(*model)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    if not program.forward_only:
        np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12)


@given(programs().filter(lambda program: all(program.rows)))
@settings(max_examples=50, deadline=None)
def test_random_programs_round_trip_through_csv(program):
    assert parse_program(program.to_csv(), name="random") == program
