import subprocess
import sys

import pytest

from dualpipe_jax import schedules
from dualpipe_jax.schedules import Schedule


def test_names_and_functions_agree():
    sizes = {"num_ranks": 4, "num_microbatches": 6}
    functions = (schedules.gpipe, schedules.one_f_one_b, schedules.dualpipe)
    assert schedules.names() == ("gpipe", "1f1b", "dualpipe")
    for name, function in zip(schedules.names(), functions, strict=True):
        schedule = function(**sizes)
        assert schedule == schedules.make(name, **sizes)
        assert {schedule: name}[schedules.make(name, **sizes)] == name
        assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, 4, 6)
        assert schedule.num_stages == 4


def test_unknown_name_names_the_known():
    with pytest.raises(ValueError, match="schedule='dual': must be one of 'gpipe', '1f1b', 'dualp"):
        schedules.make("dual", num_ranks=2, num_microbatches=2)


def test_a_schedule_that_cannot_run_says_so_when_compiled():
    schedule = Schedule.from_csv("0F0,0B0\n1F0", name="mine")
    with pytest.raises(ValueError, match="schedule 'mine' must have exactly one F"):
        schedule.timeline()


def test_schedules_need_no_jax():
    code = (
        "import sys; from dualpipe_jax import schedules; "
        "schedules.dualpipe(num_ranks=4, num_microbatches=8).timeline(); "
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
