"""The exported CSV in PyTorch's own hands; runs where PyTorch is installed, which nothing requires.

Seen with PyTorch 2.13. Its runtime loads, validates and lowers gpipe, 1f1b, interleaved-1f1b, zb-h1
and dualpipev. In its model a stage is on one rank: it parses every cell of chimera and dualpipe,
and its validator refuses them because a stage is on two ranks; it judges nothing else of them.
"""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from dualpipe_jax import schedules
from dualpipe_jax.schedules import Schedule
from tests.schedules_under_test import NAMES

pytest.importorskip("torch", reason="PyTorch is not installed")
# A release of it in which this has moved is no reason to skip.
pipelining = importlib.import_module("torch.distributed.pipelining.schedules")

SIZES = ((1, 3), (2, 4), (2, 5), (3, 6), (4, 3), (4, 8), (5, 11), (8, 20))
BIDIRECTIONAL = ("chimera", "dualpipe")
# One rank has one direction.
CASES = [(name, P, N) for name in NAMES for P, N in SIZES]
ONE_DIRECTION = [case for case in CASES if case[0] not in BIDIRECTIONAL or case[1] == 1]
TWO_DIRECTIONS = [case for case in CASES if case not in ONE_DIRECTION]


def make(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def stage_of(schedule: Schedule) -> SimpleNamespace:
    """Makes a stage as PyTorch's schedules ask for before they run."""
    return SimpleNamespace(
        num_stages=schedule.num_stages,
        group_size=schedule.num_ranks,
        group_rank=0,
        stage_index=0,
        submod=None,
    )


def parse(schedule: Schedule) -> dict[int, list]:
    lines = schedule.to_csv().splitlines()
    return {
        rank: [pipelining._Action.from_str(cell) for cell in line.split(",")]
        for rank, line in enumerate(lines)
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pytorch_reads_every_cell(case: tuple[str, int, int]) -> None:
    schedule = make(*case)
    written = [",".join(map(str, row)) for row in parse(schedule).values()]
    assert written == schedule.to_csv().splitlines()


@pytest.mark.parametrize("case", ONE_DIRECTION, ids=str)
def test_pytorchs_runtime_loads_schedules_of_one_direction(
    case: tuple[str, int, int], tmp_path: Path
) -> None:
    schedule = make(*case)
    (tmp_path / "schedule.csv").write_text(schedule.to_csv())
    runtime = pipelining._PipelineScheduleRuntime([stage_of(schedule)], schedule.num_microbatches)
    # Parses, validates, and adds sends and receives: it fails where ranks would wait for ever.
    runtime._load_csv(str(tmp_path / "schedule.csv"))
    (route,) = schedule.program.routes
    assert runtime.stage_index_to_group_rank == dict(enumerate(route))


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("dualpipev", "ScheduleDualPipeV"), ("interleaved-1f1b", "ScheduleInterleaved1F1B")],
)
@pytest.mark.parametrize("size", [(2, 4), (4, 8), (4, 12), (8, 24)])
def test_pytorchs_own_order_is_ours(name: str, class_name: str, size: tuple[int, int]) -> None:
    ours = make(name, *size)
    stages = [stage_of(ours)] * 2
    theirs = getattr(pipelining, class_name)(stages, ours.num_microbatches).pipeline_order
    # A cell of theirs is None where the rank waits for others.
    rows = [[str(action) for action in row if action is not None] for row in theirs.values()]
    assert rows == [line.split(",") for line in ours.to_csv().splitlines()]


@pytest.mark.parametrize("case", TWO_DIRECTIONS, ids=str)
def test_pytorch_has_no_word_for_two_directions(case: tuple[str, int, int]) -> None:
    schedule = make(*case)
    with pytest.raises(AssertionError, match=r"Stage \d+ is assigned to both rank"):
        pipelining._validate_schedule(
            parse(schedule), schedule.num_ranks, schedule.num_stages, schedule.num_microbatches
        )
