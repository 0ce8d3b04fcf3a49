"""The predicted time: the simulator's, with the costs of the compiled program."""

from typing import Any

import pytest

from dualpipe_jax import _scopes, schedules
from dualpipe_jax._predict import Costs, Placement, StageLayers, simulate
from dualpipe_jax._preflight.analysis import analyze
from dualpipe_jax._preflight.predict import Prediction
from dualpipe_jax._preflight.text import prediction_line
from dualpipe_jax._schedule.execution import Execution
from tests.preflight.snippets import FUSED, LOOP, SWAP, WHILE, A, network, program, work

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
    return analyze(module, network(pipe=4))[1]


def simulated(
    *,
    split_backward: bool = True,
    num_layers: int | None = None,
    placed_by: Costs | None = None,
    **costs: Any,
) -> float:
    made = schedules.make("dualpipe", num_ranks=4, num_microbatches=16)
    # Each transfer takes the links 16 s.
    return simulate(
        made,
        costs=Costs(**costs),
        transfer=16,
        execution=Execution(overlap=True, split_backward=split_backward),
        num_layers=num_layers,
        placed_by=placed_by,
    ).makespan


def test_costs_are_those_of_a_beat() -> None:
    made = predict()
    assert (made.schedule, made.reason, made.outside_seconds) == ("dualpipe", "", 0)
    assert made.seconds == pytest.approx(simulated(forward=100, input_grad=120, weight_grad=140))


def test_work_under_no_action_is_spread_over_all() -> None:
    made = predict(work("slots", 72))  # a tenth of the others
    assert made.seconds == pytest.approx(simulated(forward=110, input_grad=132, weight_grad=154))


def test_exposed_collectives_of_the_model_are_part_of_its_actions() -> None:
    exchange = "  %e = f32[4]{0} all-to-all(%a), replica_groups={{0,1}}, dimensions={0}"
    made = predict(under(exchange, _scopes.FORWARD))  # half of 16 bytes, in one of two beats
    assert made.seconds == pytest.approx(simulated(forward=104, input_grad=120, weight_grad=140))


def test_the_head_counts_with_its_gradient() -> None:
    forward, backward = 100, 120 + 140
    made = predict(under(work("h", 50), _scopes.HEAD))
    # 25 in each beat; the simulator divides them by the costs of forward and gradient.
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


def placed(num_layers: int, *, overlap: bool) -> str:
    """Names a placement of four stages by other costs, at which other ticks are the best."""
    placement = Placement(
        costs=Costs(forward=1.0, input_grad=1.2, weight_grad=1.4),
        layers=StageLayers.cut([num_layers] * 4),
        execution=Execution(overlap=overlap, unroll=True, split_backward=False, deferred="store"),
    )
    return placement.name


PLACED_BY = Costs(forward=1, input_grad=1.2, weight_grad=1.4)


def test_full_backwards_around_the_run_are_seen() -> None:
    def seconds(num_layers: int) -> float:
        op_name = (
            f"{SCOPE}/{placed(num_layers, overlap=True)}/{_scopes.RAMP}/{_scopes.FULL_BACKWARD}/op"
        )
        made = predict(entry=f'{work("b", 0)}, metadata={{op_name="{op_name}"}}')
        assert made.seconds is not None
        return made.seconds

    cycles = {"forward": 100, "input_grad": 120, "weight_grad": 140, "split_backward": False}
    at_once, in_halves = seconds(1), seconds(2)
    assert at_once == pytest.approx(simulated(**cycles, num_layers=4, placed_by=PLACED_BY))
    assert in_halves == pytest.approx(simulated(**cycles, placed_by=PLACED_BY))
    assert at_once > in_halves > (predict().seconds or 0)


def test_work_outside_the_loops_is_added() -> None:
    made = predict(entry=work("adam", 1000))
    assert made.outside_seconds == 1000
    assert made.loop_seconds is not None
    assert made.seconds == made.loop_seconds + 1000


def test_why_there_is_none() -> None:
    module = program(A)
    assert analyze(module, network(pipe=4))[1].reason == (
        "the program has no loop of a pipelined step's beats or ticks, and none of known length"
    )


def test_a_step_without_a_pipeline_runs_its_loop_as_often_as_the_program_says() -> None:
    inside = f"  %b = f32[4]{{0}} collective-permute(%a), {SWAP}\n{work('x', 100, 'b')}"
    loop = LOOP.format(inside=inside, limit="constant(5)")
    lines = f"{A}\n{work('adam', 1000)}\n{WHILE.format(start=0, more='')}"
    made = analyze(program(lines, FUSED, loop), network(pipe=2))[1]
    # 16 bytes over a link of a byte a second stop the device.
    assert (made.schedule, made.loop_seconds) == (None, 5 * (100 + 16))
    assert (made.seconds, made.outside_exposed_seconds) == (5 * 116 + 1000, 0)
    assert prediction_line(made) == "1.58e+03 s predicted: the loop 580 s; outside of it 1e+03 s"


def in_ticks(
    schedule: str, places: list[tuple[str, int]], *, beside: int = 0, layers: int | None = None
) -> Prediction:
    """Predicts the time of a step in ticks.

    Args:
      schedule: Its name.
      places: The scopes and the cycles of the parts that ranks run or pass over, in program order.
      beside: The cycles of the instructions that all ranks run in every tick.
      layers: If given, places are loops over so many layers, of which each takes the cycles.
    """
    ramp = f"jit(step)/{_scopes.of_schedule(schedule, num_ranks=4, num_microbatches=16)}/while/body"
    ramp = f"{ramp}/{_scopes.RAMP}"
    computations = []
    sent = f"  %s = (f32[4]{{0}}, f32[4]{{0}}) collective-permute-start(%a), {SWAP}"
    lines = [f'{sent}, metadata={{op_name="{ramp}/{_scopes.SEND}/op"}}']
    for number, (scope, cycles) in enumerate(places):
        line = work(f"w{number}", cycles, operand=f"p{number}").replace("  %", "  ROOT %")
        computations.append(
            f"%run.{number} (p{number}: f32[4]) -> f32[4] {{\n"
            f"  %p{number} = f32[4]{{0}} parameter(0)\n"
            f'{line}, metadata={{op_name="{ramp}/{scope}/op"}}\n}}\n\n'
            f"%other.{number} (q{number}: f32[4]) -> pred[] {{\n"
            f"  ROOT %q{number} = f32[4]{{0}} parameter(0)\n}}"
        )
        if layers is None:
            lines.append(
                f"  %c{number} = f32[4]{{0}} conditional(%i, %a, %a), "
                f"branch_computations={{%run.{number}, %other.{number}}}"
            )
        else:
            lines.append(
                f"  %c{number} = f32[4]{{0}} while(%a), condition=%other.{number}, "
                f"body=%run.{number}, "
                f'metadata={{op_name="{ramp}/{_scopes.of_layers(layers)}/while"}}'
            )
    lines += [work("each", beside), "  %x = f32[4]{0} collective-permute-done(%s)"]
    loop = LOOP.format(inside="\n".join(lines), limit="constant(50)")
    module = program(f"{A}\n{WHILE.format(start=0, more='')}", FUSED, *computations, loop)
    return analyze(module, network(pipe=4))[1]


FORWARD, INPUT_GRAD, WEIGHT_GRAD = _scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD


@pytest.mark.parametrize("layers", [None, 3])
def test_costs_are_those_of_a_tick(layers: int | None) -> None:
    made = in_ticks(
        "1f1b", [(FORWARD, 100), (INPUT_GRAD, 120), (WEIGHT_GRAD, 140)], beside=9, layers=layers
    )
    times = layers or 1
    costs = Costs(forward=100 * times + 9, input_grad=120 * times + 9, weight_grad=140 * times + 9)
    schedule = schedules.make("1f1b", num_ranks=4, num_microbatches=16)
    expected = simulate(schedule, costs=costs, transfer=16)
    assert (made.schedule, made.reason) == ("1f1b", "")
    assert made.loop_seconds == pytest.approx(expected.makespan)
    assert made.idle_share == pytest.approx(expected.idle_share)


@pytest.mark.parametrize(("name", "stages"), [("interleaved-1f1b", 2), ("chimera", 1)])
def test_every_chunk_of_a_tick_has_its_places(name: str, stages: int) -> None:
    """Each of two chunks has half of a rank's layers, or all of them with two directions."""
    one = [(FORWARD, 100), (INPUT_GRAD, 120), (WEIGHT_GRAD, 140)]
    made = in_ticks(name, [*one, *one])
    schedule = schedules.make(name, num_ranks=4, num_microbatches=16)
    costs = Costs(forward=100 * stages, input_grad=120 * stages, weight_grad=140 * stages)
    assert made.loop_seconds == pytest.approx(simulate(schedule, costs=costs, transfer=16).makespan)


def test_weight_grads_that_are_put_off_may_recompute() -> None:
    schedule = schedules.make("zb-h1", num_ranks=4, num_microbatches=16)
    made = in_ticks(
        "zb-h1", [(FORWARD, 100), (INPUT_GRAD, 220), (WEIGHT_GRAD, 360), (WEIGHT_GRAD, 140)]
    )
    costs = Costs(forward=100, input_grad=220, weight_grad=140, recompute=220)
    assert made.loop_seconds == pytest.approx(simulate(schedule, costs=costs, transfer=16).makespan)
    # With full backwards, only those have a cost of their own.
    halves = f"{_scopes.FULL_BACKWARD}/{INPUT_GRAD}", f"{_scopes.FULL_BACKWARD}/{WEIGHT_GRAD}"
    made = in_ticks(
        "zb-h1",
        [(FORWARD, 100), (halves[0], 170), (halves[1], 150), (INPUT_GRAD, 220), (WEIGHT_GRAD, 360)],
    )
    costs = Costs(forward=100, input_grad=220, weight_grad=360, full_backward=320)
    full = simulate(schedule, costs=costs, transfer=16, execution=Execution(split_backward=False))
    assert made.loop_seconds == pytest.approx(full.makespan)


def test_full_backwards_of_ticks_at_once_and_in_halves() -> None:
    schedule = schedules.make("1f1b", num_ranks=4, num_microbatches=16)
    for num_layers in (1, 2):
        scope = f"{placed(num_layers, overlap=False)}/{_scopes.FULL_BACKWARD}/{INPUT_GRAD}"
        made = in_ticks("1f1b", [(FORWARD, 100), (scope, 240)], beside=5)
        costs = Costs(forward=105, input_grad=125, weight_grad=125, full_backward=250)
        full = simulate(
            schedule,
            costs=costs,
            transfer=16,
            execution=Execution(split_backward=False),
            num_layers=4 * num_layers,
            placed_by=PLACED_BY,
        )
        assert made.loop_seconds == pytest.approx(full.makespan)


def test_ends_of_ticks_count_with_their_gradients() -> None:
    ends = [(_scopes.EMBED, 20), (_scopes.EMBED_GRAD, 28), (_scopes.HEAD, 90)]
    made = in_ticks("1f1b", [(FORWARD, 100), (INPUT_GRAD, 120), (WEIGHT_GRAD, 140), *ends])
    schedule = schedules.make("1f1b", num_ranks=4, num_microbatches=16)
    costs = Costs(forward=100, input_grad=120, weight_grad=140, embed=20, head=25)
    assert costs.embed_grad == 28
    assert made.loop_seconds == pytest.approx(simulate(schedule, costs=costs, transfer=16).makespan)


def test_a_step_without_a_backward_is_not_predicted() -> None:
    for places in ([(FORWARD, 100)], [(FORWARD, 0), (INPUT_GRAD, 5)], [(WEIGHT_GRAD, 5)]):
        made = in_ticks("1f1b", places)
        assert made.seconds is None
        assert "none of a backward" in made.reason
