"""The names of a step's parts in a compiled program, as `jax.named_scope`s.

Every instruction that XLA keeps has them in its metadata (`op_name`), one after the other: the
segment of the timetable, then the action. Readers of compiled programs find the parts by them.
"""

import itertools
import re
from typing import Any, NamedTuple

PREFIX = "dualpipe."
# Segments: ticks that each rank runs by its opcode, and beats, the same code on all ranks.
RAMP, STEADY = "dualpipe.ramp", "dualpipe.steady"
# Actions.
FORWARD, INPUT_GRAD, WEIGHT_GRAD = (
    f"dualpipe.{name}" for name in ("forward", "input_grad", "weight_grad")
)
# Around an input grad and the weight grad that runs with it, at once or in two parts.
FULL_BACKWARD = "dualpipe.full_backward"
EMBED, EMBED_GRAD, HEAD = (f"dualpipe.{name}" for name in ("embed", "embed_grad", "head"))
# Transfers between ranks.
SEND = "dualpipe.send"
# An instruction's action is the innermost one of these in its name.
ACTIONS = (FORWARD, INPUT_GRAD, WEIGHT_GRAD, EMBED, EMBED_GRAD, HEAD, SEND)


def of_layers(count: int) -> str:
    """Names a loop of so many trips over the layers of a stage.

    The ranks that run it in a tick, and the layers over which they run it, are values in the loop.
    """
    return f"dualpipe.layers.{count}"


def read_layers(op_name: str) -> int | None:
    """Reads the number of trips of a loop over layers from its name; None of any other.

    >>> read_layers("jit(step)/dualpipe.ramp/dualpipe.layers.8/while")
    8
    >>> read_layers("jit(step)/dualpipe.ramp/dualpipe.layers.8/while/body/while")
    """
    found = re.search(r"dualpipe\.layers\.(\d+)/while$", op_name)
    return int(found[1]) if found else None


def of_beat(number: int) -> str:
    """Names a beat of a trip of the steady loop, around `STEADY`; its forward is that of a chunk.

    A trip has as many beats as a rank has chunks, and the beat the number of its forward's chunk.
    """
    return f"dualpipe.beat.{number}"


def read_beat(op_name: str) -> int | None:
    """Reads the number of a beat from an instruction's name; None outside of beats.

    >>> read_beat("jit(step)/while/body/dualpipe.beat.1/dualpipe.steady/dualpipe.forward/dot")
    1
    """
    found = re.search(r"dualpipe\.beat\.(\d+)/", op_name)
    return int(found[1]) if found else None


def of_schedule(name: str, *, num_ranks: int, num_microbatches: int) -> str:
    """Names a step of one of the named schedules.

    >>> of_schedule("zb-h1", num_ranks=4, num_microbatches=8)
    'dualpipe.schedule.zb-h1.4.8'
    """
    return f"dualpipe.schedule.{name.replace(' ', '')}.{num_ranks}.{num_microbatches}"


def read_schedule(op_name: str) -> tuple[str, int, int] | None:
    """Reads name, ranks and microbatches of the schedule from an instruction's name.

    >>> read_schedule("jit(step)/dualpipe.schedule.zb-h1.4.8/shard_map/while")
    ('zb-h1', 4, 8)
    >>> read_schedule(
    ...     of_schedule("interleaved-zb(num_deferred=2r)", num_ranks=4, num_microbatches=8)
    ... )
    ('interleaved-zb(num_deferred=2r)', 4, 8)
    """
    found = re.search(r"dualpipe\.schedule\.([\w-]+(?:\([^./]*\))?)\.(\d+)\.(\d+)", op_name)
    return (found[1], int(found[2]), int(found[3])) if found else None


class Placement(NamedTuple):
    """Holds how a step's actions were placed in ticks.

    Attributes:
      costs: The costs of actions.
      stages: For each stage the number of layers, their cost in layers of mean cost, and the part
        in the upper half of a full backward, as a share.
      execution: How the order became a program.
    """

    costs: tuple[float | None, ...]
    stages: tuple[tuple[int, float, float], ...]
    execution: tuple[Any, ...]


def of_placement(placement: Placement) -> str:
    """Names a step whose actions were placed in ticks by these costs.

    >>> stages = (2, 2.0, 0.5), (2, 2.0, 0.5), (1, 0.5, 1.0)
    >>> of_placement(Placement((1.0, 0.75, None), stages, (True, 3, False, "store")))
    'dualpipe.placed.1.0_0.75_none.2x2w2.0u0.5_1x1w0.5u1.0.true_3_false_store'
    """
    costs = "_".join("none" if cost is None else repr(float(cost)) for cost in placement.costs)
    choices = "_".join(
        choice if isinstance(choice, str) else str(choice).lower() for choice in placement.execution
    )
    runs = [(stage, len(list(run))) for stage, run in itertools.groupby(placement.stages)]
    stages = "_".join(
        f"{count}x{size}w{weight!r}u{upper!r}" for (size, weight, upper), count in runs
    )
    return f"dualpipe.placed.{costs}.{stages}.{choices}"


def read_placement(op_name: str) -> Placement | None:
    """Reads costs, the layers of stages and the execution from an instruction's name.

    >>> choices = ("two-tick", 3, False, "1.5GiB")
    >>> placement = Placement((1.0, None), ((2, 2.5, 0.5), (0, 0.0, 0.5)), choices)
    >>> read_placement(f"jit(step)/{of_placement(placement)}/shard_map/while") == placement
    True
    """
    number = r"[\d.]+(?:e[+-]?\d+)?"
    stage = rf"\d+x\d+w{number}u{number}"
    found = re.search(
        rf"dualpipe\.placed\.([^/)]+?)\.({stage}(?:_{stage})*)\.([\w.-]+)(?:[/)]|$)", op_name
    )
    if found is None:
        return None
    costs = tuple(None if cost == "none" else float(cost) for cost in found[1].split("_"))
    runs = (re.split("[xwu]", run) for run in found[2].split("_"))
    stages = tuple(
        (int(size), float(weight), float(upper))
        for count, size, weight, upper in runs
        for _ in range(int(count))
    )
    known: dict[str, Any] = {"none": None, "true": True, "false": False}
    choices = tuple(
        int(choice) if choice.isdigit() else known.get(choice, choice)
        for choice in found[3].split("_")
    )
    return Placement(costs, stages, choices)
