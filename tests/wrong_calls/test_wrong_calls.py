"""Wrong calls of the public API and of the command lines, generated, and judged by one oracle.

`make test` makes a sample of them, the same on every machine. `make wrong-calls` makes
`WRONG_CALLS` calls for each class of mistakes in each argument, and writes the figures into
docs/reliability.md.
"""

import importlib
import os
from collections.abc import Iterator

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dualpipe_jax as dpj
from tests.wrong_calls.mistakes import mistake
from tests.wrong_calls.oracle import Tally, Target, Wrong, problem_of, wrong_calls

GROUPS = (
    *("steps", "schedules", "predictions", "preflights", "meshes"),
    *("linen_models", "nnx_models", "losses", "commands", "experiments", "checkpoints"),
)
# Calls of a sample for each unit of a callable's weight.
SAMPLE = 7


@pytest.fixture(autouse=True)
def whole_tracebacks() -> Iterator[None]:
    """Keeps the frames of JAX in tracebacks, which tell where an exception comes from."""
    before = jax.config.jax_traceback_filtering  # pyrefly: ignore[missing-attribute]
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def targets_of(group: str) -> list[Target]:
    return importlib.import_module(f"tests.wrong_calls.{group}").targets()


def check(target: Target, calls: st.SearchStrategy[list[Wrong]], *, most: int, fixed: bool) -> None:
    """Makes up to `most` calls; `fixed` makes the same ones every time."""

    @settings(
        max_examples=most,
        derandomize=fixed,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls)
    def run(wrong: list[Wrong]) -> None:
        problem = problem_of(target, wrong)
        assert problem is None, f"{target.name}({wrong}) {problem}"

    run()


# Orbax leaves coroutines behind where a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("group", GROUPS)
def test_wrong_calls_are_refused(group):
    for target in targets_of(group):
        number = int(os.environ.get("WRONG_CALLS", 0))
        if number or not target.is_slow:
            target.call(**target.valid)  # or every refusal would mean nothing
        if number:
            for first in range(len(target.all_mistakes)):
                check(target, wrong_calls(target, first), most=number, fixed=False)
        else:
            most = max(1, round(SAMPLE * target.weight))
            check(target, wrong_calls(target), most=most, fixed=True)


def test_every_public_callable_is_called():
    called = {target.name for group in GROUPS for target in targets_of(group)}
    # A Context and a Metrics are made by the library, the others returned by it.
    returned = {"Context", "Device", "Metrics", "Simulation", "Timeline"}
    modules = {"linen", "nnx", "optimizers", "schedules"}
    public = {name for name in dpj.__all__ if name not in modules and name != "__version__"}
    public |= {f"{name}.{inner}" for name in modules for inner in getattr(dpj, name).__all__}
    classes = {"linen.LinenModel", "nnx.NNXModel", "schedules.names", "LossModel"}
    public -= {"schedules.Schedule", "schedules.Timeline"} | classes | returned
    assert public <= called


class TestOracle:
    """The oracle finds fault with calls that end badly."""

    @pytest.mark.parametrize(
        ("call", "fault"),
        [
            (lambda amount: None, "was accepted"),
            (lambda amount: dpj.schedules.make("gpip", num_ranks=2, num_microbatches=2), "names"),
            (lambda amount: jax.numpy.zeros(amount), "comes from"),
            (lambda amount: {}["amount"], "another exception"),
        ],
    )
    def test_bad_ends(self, call, fault):
        target = Target(
            name="f", call=call, valid={"amount": 1}, mistakes={"amount": [mistake("text", "a")]}
        )
        wrong = Wrong(argument="amount", mistake=target.mistakes["amount"][0], value="amount")
        problem = problem_of(target, [wrong], Tally())
        assert problem is not None
        assert fault in problem

    def test_legal_value_that_is_refused(self):
        legal = mistake("another form", 0, legal=lambda _: True)
        target = Target(name="f", call=dpj.Costs, valid={}, mistakes={"forward": [legal]})
        problem = problem_of(target, [Wrong(argument="forward", mistake=legal, value=0)], Tally())
        assert problem is not None
        assert "is legal, but was refused" in problem
