import subprocess
import sys

import pytest

from dualpipe_jax import schedules


def test_names_and_functions_agree():
    sizes = {"num_ranks": 4, "num_microbatches": 6}
    functions = {
        "gpipe": schedules.gpipe,
        "1f1b": schedules.one_f_one_b,
        "interleaved-1f1b": schedules.interleaved_one_f_one_b,
        "zb-h1": schedules.zb_h1,
        "chimera": schedules.chimera,
        "dualpipe": schedules.dualpipe,
        "dualpipev": schedules.dualpipev,
    }
    assert schedules.names() == tuple(functions)
    for name, function in functions.items():
        schedule = function(**sizes)
        assert schedule == schedules.make(name, **sizes)
        assert {schedule: name}[schedules.make(name, **sizes)] == name
        assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, 4, 6)
        assert schedule.num_stages == (8 if name in ("interleaved-1f1b", "dualpipev") else 4)


def test_unknown_name_names_the_known():
    with pytest.raises(ValueError, match="schedule='dual': must be one of 'gpipe', '1f1b', 'inter"):
        schedules.make("dual", num_ranks=2, num_microbatches=2)


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
    with pytest.raises(TypeError, match=r"Schedule\('1f1b'\): must be made by .*schedules.make"):
        schedules.Schedule("1f1b")  # pyrefly: ignore
    for text, name in ((None, "csv"), (b"0F0", "csv"), ("0F0", 3)):
        with pytest.raises(TypeError, match="must be a str, got"):
            schedules.Schedule.from_csv(text, name)  # pyrefly: ignore


def test_messages_are_bounded() -> None:
    with pytest.raises(ValueError, match="has cells that are neither") as caught:
        schedules.Schedule.from_csv("\n".join(["x" * 500] * 100_000))
    assert len(str(caught.value)) < 2500
    assert "and 99992 more" in str(caught.value)
