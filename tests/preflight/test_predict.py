"""The predicted time: the simulator's, with the costs that stand in the compiled program."""

import pytest

from dualpipe_jax import _scopes, schedules
from dualpipe_jax._preflight.check import _analysis
from dualpipe_jax._preflight.predict import Prediction
from dualpipe_jax._simulate import Costs, simulate
from tests.preflight.snippets import FUSED, SWAP, A, network, program, work
from tests.preflight.test_work import LOOP, WHILE

SCOPE = _scopes.of_schedule("dualpipe", num_ranks=4, num_microbatches=16)


def under(line: str, *scopes: str) -> str:
    """Puts an instruction under scopes of the steady loop."""
    name = "/".join(["jit(step)", SCOPE, "while/body", _scopes.STEADY, *scopes, "op"])
    return f'{line}, metadata={{op_name="{name}"}}'


def predict(*more: str, limit: str = "constant(5)", entry: str = "") -> Prediction:
    """Predicts the time of a step whose trip has F, I, W and others of these cycles."""
    actions = [_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD]
    lines = [
        under(work(f"w{i}", cycles), action)
        for i, (action, cycles) in enumerate(zip(actions, (200, 240, 280), strict=True))
    ]
    sent = f"  %s = (f32[4]{{0}}, f32[4]{{0}}) collective-permute-start(%a), {SWAP}"
    lines = [under(sent, _scopes.SEND), *lines, *more]
    lines.append("  %x = f32[4]{0} collective-permute-done(%s)")
    loop = LOOP.format(inside="\n".join(lines), limit=limit)
    while_lines = WHILE.format(start=0, more="")
    module = program(f"{A}\n{entry}\n{while_lines}", FUSED, loop)
    return _analysis(module, network(pipe=4))[1]


def simulated(
    *, full_backward: bool = False, num_layers: int | None = None, **costs: float
) -> float:
    made = schedules.make("dualpipe", num_ranks=4, num_microbatches=16)
    # Each transfer takes the links 16 s.
    return simulate(
        made,
        costs=Costs(**costs),
        transfer=16,
        timetable="aligned",
        full_backward=full_backward,
        num_layers=num_layers,
    ).makespan


def test_costs_are_those_of_a_beat() -> None:
    made = predict()
    assert (made.schedule, made.reason, made.outside_seconds) == ("dualpipe", "", 0)
    assert made.seconds == pytest.approx(simulated(forward=100, input_grad=120, weight_grad=140))


def test_what_stands_under_no_action_is_spread_over_all() -> None:
    made = predict(work("slots", 72))  # a tenth of the others
    assert made.seconds == pytest.approx(simulated(forward=110, input_grad=132, weight_grad=154))


def test_exposed_collectives_of_the_model_are_part_of_its_actions() -> None:
    exchange = "  %e = f32[4]{0} all-to-all(%a), replica_groups={{0,1}}, dimensions={0}"
    made = predict(under(exchange, _scopes.FORWARD))  # half of 16 bytes, in one of two beats
    assert made.seconds == pytest.approx(simulated(forward=104, input_grad=120, weight_grad=140))


def test_the_head_counts_with_its_gradient() -> None:
    forward, backward = 100, 120 + 140
    made = predict(under(work("h", 50), _scopes.HEAD))
    # In each beat, 25: what the simulator makes of a forward and its gradient in proportion.
    head = 25 * forward / (forward + backward)
    expected = simulated(forward=100, input_grad=120, weight_grad=140, head=head)
    assert made.seconds == pytest.approx(expected)


def test_the_embedding_counts_with_its_gradient() -> None:
    made = predict(
        under(work("e", 20), _scopes.EMBED),
        under(work("g", 28), _scopes.EMBED_GRAD),
    )
    # In each beat, 24 in all, of which the simulator gives the gradient W / F of the forward's.
    embed = 24 * 100 / (100 + 140)
    expected = simulated(forward=100, input_grad=120, weight_grad=140, embed=embed)
    assert made.seconds == pytest.approx(expected)


def test_full_backwards_around_the_run_are_seen() -> None:
    def seconds(scope: str) -> float:
        op_name = f"{SCOPE}/{_scopes.RAMP}/{scope}/op"
        made = predict(entry=f'{work("b", 0)}, metadata={{op_name="{op_name}"}}')
        assert made.seconds is not None
        return made.seconds

    cycles = {"forward": 100, "input_grad": 120, "weight_grad": 140, "full_backward": True}
    at_once, in_halves = seconds(_scopes.FULL_BACKWARD), seconds(_scopes.IN_HALVES)
    assert at_once == pytest.approx(simulated(**cycles, num_layers=4))
    assert in_halves == pytest.approx(simulated(**cycles))
    assert at_once > in_halves > (predict().seconds or 0)


def test_what_is_outside_the_loops_is_added() -> None:
    made = predict(entry=work("adam", 1000))
    assert made.outside_seconds == 1000
    assert made.loop_seconds is not None
    assert made.seconds == made.loop_seconds + 1000


def test_why_there_is_none() -> None:
    module = program(A)
    assert _analysis(module, network(pipe=4))[1].reason == (
        "the program has no steady loop of beats"
    )
