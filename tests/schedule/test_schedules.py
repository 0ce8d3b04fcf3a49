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
