import inspect
import subprocess
import sys

import numpy as np
import pytest

from dualpipe_jax import _scopes, schedules
from dualpipe_jax._schedule.generators import GENERATORS

TWICE_P_STAGES = (
    "interleaved-1f1b",
    "interleaved-zb",
    "interleaved-paired",
    "dualpipev",
    "v-half",
)


def test_names_and_functions_agree():
    sizes = {"num_ranks": 4, "num_microbatches": 6}
    functions = {
        "gpipe": schedules.gpipe,
        "1f1b": schedules.one_f_one_b,
        "interleaved-1f1b": schedules.interleaved_one_f_one_b,
        "zb-h1": schedules.zb_h1,
        "interleaved-zb": schedules.interleaved_zb,
        "interleaved-paired": schedules.interleaved_paired,
        "chimera": schedules.chimera,
        "dualpipe": schedules.dualpipe,
        "dualpipev": schedules.dualpipev,
        "v-half": schedules.v_half,
    }
    assert schedules.names()[: len(functions)] == tuple(functions)
    for name, function in functions.items():
        schedule = function(**sizes)
        assert schedule == schedules.make(name, **sizes)
        assert {schedule: name}[schedules.make(name, **sizes)] == name
        assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, 4, 6)
        assert schedule.num_stages == (8 if name in TWICE_P_STAGES else 4)


@pytest.mark.parametrize(("name", "generate"), GENERATORS.items())
def test_every_generator_has_a_public_function(name, generate):
    function = getattr(schedules, generate.__name__)
    assert generate.__name__ in schedules.__all__
    assert function.__module__ == "dualpipe_jax.schedules"
    assert function.__doc__.startswith("Makes ")
    signature = inspect.signature(function)
    assert signature.return_annotation is schedules.Schedule
    assert signature.parameters == inspect.signature(generate).parameters
    sizes = {"num_ranks": 2, "num_microbatches": 3}
    assert function(**sizes) == schedules.make(name, **sizes)
    with pytest.raises(AttributeError, match="has no attribute 'bogus'"):
        _ = schedules.bogus


def test_unknown_name_names_the_known():
    with pytest.raises(ValueError, match="schedule='dual': must be one of 'gpipe', '1f1b', 'inter"):
        schedules.make("dual", num_ranks=2, num_microbatches=2)


def test_options_are_in_the_name_that_makes_the_schedule_again():
    sizes = {"num_ranks": 3, "num_microbatches": 7}
    cases = {
        "interleaved-1f1b": {"num_stages_per_rank": 2},
        "interleaved-1f1b(num_stages_per_rank=4)": {"num_stages_per_rank": np.int64(4)},
        "interleaved-zb": {"num_deferred": "r"},
        "interleaved-zb(num_stages_per_rank=1, num_deferred=2r)": {
            "num_deferred": "2r",
            "num_stages_per_rank": 1,
        },
        "interleaved-zb(num_deferred=(0, 3, 1))": {"num_deferred": np.array([0, 3, 1])},
    }
    for name, options in cases.items():
        base = name.partition("(")[0]
        schedule = schedules.make(base, **sizes, **options)
        assert schedule.name == name
        assert schedule.is_named
        assert schedules.make(name, **sizes) == schedule
        function = getattr(schedules, GENERATORS[base].__name__)
        assert function(**sizes, **options) == schedule
        assert schedules.Schedule.from_csv(schedule.to_csv(), name=name) == schedule
        # The name stands in compiled programs, from which readers make the schedule.
        scope = _scopes.of_schedule(name, **sizes)
        read = _scopes.read_schedule(f"jit(step)/{scope}/while")
        assert read is not None
        assert (schedules.make(read[0], **sizes), *read[1:]) == (schedule, 3, 7)
    other = schedules.make("1f1b", **sizes).to_csv()
    for name in ("interleaved-1f1b(num_stages_per_rank=3)", "1f1b(bogus=1)", "csv"):
        assert not schedules.Schedule.from_csv(other, name=name).is_named


def test_other_options_are_refused():
    sizes = {"num_ranks": 2, "num_microbatches": 2}
    text = (
        r"^num_stages_per_rank=4: must be an option of schedule 'zb-h1', which has none; take "
        r"schedule 'interleaved-1f1b' or 'interleaved-zb' or 'interleaved-paired', or leave it out$"
    )
    with pytest.raises(ValueError, match=text):
        schedules.make("zb-h1", **sizes, num_stages_per_rank=4)
    with pytest.raises(ValueError, match=text):
        schedules.make("zb-h1(num_stages_per_rank=4)", **sizes)
    text = "^bogus=1: must be .* which has num_stages_per_rank, num_deferred; leave it out$"
    with pytest.raises(ValueError, match=text):
        schedules.make("interleaved-zb", **sizes, bogus=1)
    with pytest.raises(ValueError, match=r"num_stages_per_rank=4: must be that of schedule="):
        schedules.make("interleaved-zb(num_stages_per_rank=3)", **sizes, num_stages_per_rank=4)
    twice = "interleaved-zb(num_stages_per_rank=3, num_stages_per_rank=4)"
    separators = ("zb-h1(,,)", "interleaved-zb(num_deferred=(1 2))")
    for name in (
        *("1f1b(", "1f1b()x", "1f1b(x)", "interleaved-zb(num_deferred=2r]"),
        *(twice, *separators),
    ):
        with pytest.raises(ValueError, match="must be one of 'gpipe'"):
            schedules.make(name, **sizes)


def test_schedules_need_no_jax():
    code = (
        "import sys; from dualpipe_jax import schedules; "
        "schedules.dualpipe(num_ranks=4, num_microbatches=8).timeline(); "
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_sizes_are_explained() -> None:
    with pytest.raises(ValueError, match=r"schedule='1F1B': .*did you mean '1f1b'\?"):
        schedules.make("1F1B", num_ranks=2, num_microbatches=2)
    for sizes in (
        {"num_ranks": 10**9, "num_microbatches": 1},
        {"num_ranks": 2, "num_microbatches": 10**7},
    ):
        for name in schedules.names():
            with pytest.raises(ValueError, match="must be at most 20,000,000 forwards"):
                schedules.make(name, **sizes)
            with pytest.raises(ValueError, match="num_ranks=8000: must be at most 7,745"):
                schedules.make(name, num_ranks=8000, num_microbatches=1)
    with pytest.raises(TypeError, match=r"Schedule\('1f1b'\): must be made by .*schedules.make"):
        schedules.Schedule("1f1b")  # pyrefly: ignore
    for text, name in ((None, "csv"), (b"0F0", "csv"), ("0F0", 3)):
        with pytest.raises(TypeError, match="must be a str, got"):
            schedules.Schedule.from_csv(text, name)  # pyrefly: ignore


# Each: a line of a CSV by its number, and a text of the message.
MANY_MISTAKES = {
    "no cell": (lambda line: "x" * 500, "and 29992 more"),
    "backwards alone": (lambda line: f"{line}B0", "and 29992 more"),
    "one action": (lambda line: "0F0", "0F0 (30000 times, on rank 0, 1, 2, 3, 4, 5, 6, 7, ..)"),
    "twice": (lambda line: f"{line}F0,{line}B0,{line}B0", "and 59992 more"),
    "far too few": (lambda line: f"{line}F{line}", "30,000 stages x 30,000 microbatches"),
    "a large number": (lambda line: "0F999999999999", "microbatch 7 has none"),
    "a circle": (
        lambda line: f"{30_000 + line}F0,{line}F0,{30_000 + line}B0,{line}B0",
        "and 29992 ranks more",
    ),
}


@pytest.mark.parametrize("mistake", MANY_MISTAKES)
def test_messages_are_bounded(mistake: str) -> None:
    line, text = MANY_MISTAKES[mistake]
    with pytest.raises(ValueError, match="schedule 'csv'") as caught:
        schedules.Schedule.from_csv("\n".join(map(line, range(30_000))))
    assert len(str(caught.value)) < 2500
    assert text in str(caught.value)
