"""Random legal programs of any routes: all compile, and all compute the gradients."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.ir import Action, Program
from tests import table_interpreter


@st.composite
def programs(draw) -> Program:
    """Draws routes on the ring, gives each microbatch one, and runs ready actions at random."""
    P, S, N = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    forward_only = draw(st.booleans())

    def route():
        ranks = [draw(st.integers(0, P - 1))]
        for _ in range(S - 1):
            ranks.append((ranks[-1] + draw(st.integers(-1, 1))) % P)
        return ranks

    routes = [route() for _ in range(draw(st.integers(1, 3)))]
    route_of = [draw(st.sampled_from(routes)) for _ in range(N)]
    rows: list[list[Action]] = [[] for _ in range(P)]
    random = draw(st.randoms(use_true_random=False))
    ready = [Action("F", 0, m) for m in range(N)]
    while ready:
        action = ready.pop(random.randrange(len(ready)))
        kind, stage, microbatch = action
        rows[route_of[microbatch][stage]].append(action)
        if kind == "F" and stage < S - 1:
            ready.append(Action("F", stage + 1, microbatch))
        elif kind == "F" and not forward_only:
            ready.append(Action("I", stage, microbatch))
        elif kind == "I":
            ready.append(Action("W", stage, microbatch))
            if stage:
                ready.append(Action("I", stage - 1, microbatch))
    return Program("random", P, S, N, tuple(map(tuple, rows)), forward_only)


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
