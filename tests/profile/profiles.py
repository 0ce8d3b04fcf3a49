"""Makes profiles as JAX writes them: an XSpace with a program of ticks, and events of its run."""

from pathlib import Path
from typing import NamedTuple

from dualpipe_jax import _scopes
from dualpipe_jax._predict import Costs, Placement, StageLayers
from dualpipe_jax._profile.steps import Plan, find_plan
from dualpipe_jax._schedule.actions import Opcode, letter_of
from dualpipe_jax._schedule.execution import Execution

MICROSECOND = 1_000_000  # in picoseconds
MODULE, PROGRAM_ID = "jit_step", 7


def field(number: int, value: int | str | bytes) -> bytes:
    """Encodes a field of a message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def plan_of(
    name: str, *, num_ranks: int, num_microbatches: int, split_backward: bool = True
) -> tuple[str, Plan]:
    """Names a step in ticks, of two layers a stage; and its plan."""
    execution = Execution(
        overlap=False, unroll=True, split_backward=split_backward, deferred="store"
    )
    layers = StageLayers.cut([2] * num_ranks)
    placed = Placement(costs=Costs(), layers=layers, execution=execution).name
    schedule = _scopes.of_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    scope = f"jit(step)/{schedule}/{placed}/while/body/{_scopes.RAMP}"
    plan = find_plan([scope])
    assert plan is not None
    return scope, plan


# Instructions by number of their computation: the entry, a tick, F, I, W and sends.
ENTRY, TICK, FORWARD, INPUT_GRAD, WEIGHT_GRAD, SEND = range(1, 7)


def program(scope: str) -> bytes:
    """Encodes a program: a loop over ticks, which runs F, I or W and a transfer, or none."""

    def instruction(
        name: str, opcode: str, op_name: str = "", called: tuple[int, ...] = ()
    ) -> bytes:
        ids = b"".join(map(_varint, called))
        return (
            field(1, name)
            + field(2, opcode)
            + field(7, field(2, op_name))
            + (field(38, ids) if called else b"")
        )

    def computation(number: int, *instructions: bytes) -> bytes:
        return field(3, field(5, number) + b"".join(field(2, each) for each in instructions))

    module = (
        field(1, MODULE)
        + field(6, ENTRY)
        + computation(
            ENTRY,
            instruction("first", "fusion"),
            # Moved out of its loop: no action, wherever it runs.
            instruction("moved", "fusion", f"{scope}/while/body/{_scopes.FORWARD}/slice"),
            instruction("ticks", "while", "", (TICK,)),
        )
        + computation(
            TICK,
            instruction("look_up", "fusion", f"{scope}/dynamic_slice"),
            instruction("moved.1", "fusion", f"{scope}/while/body/{_scopes.INPUT_GRAD}/slice"),
            *(
                instruction(f"when.{n}", "while", f"{scope}/while", (n,))
                for n in (FORWARD, INPUT_GRAD, WEIGHT_GRAD)
            ),
            instruction("exchange", "conditional", f"{scope}/cond", (SEND,)),
        )
        + computation(
            FORWARD,
            instruction("forward", "fusion", f"{scope}/while/body/{_scopes.FORWARD}/dot"),
            instruction("write", "fusion", f"{scope}/while/body/dynamic_update_slice"),
            instruction("head", "fusion", f"{scope}/while/body/{_scopes.HEAD}/dot"),
        )
        + computation(
            INPUT_GRAD, instruction("input_grad", "fusion", f"{scope}/{_scopes.INPUT_GRAD}/dot")
        )
        + computation(
            WEIGHT_GRAD, instruction("weight_grad", "fusion", f"{scope}/{_scopes.WEIGHT_GRAD}/dot")
        )
        + computation(SEND, instruction("send", "collective-permute", f"{scope}/{_scopes.SEND}/p"))
    )
    return field(1, module)


class Run(NamedTuple):
    """An event: a device, an instruction, and microseconds."""

    device: int
    instruction: str
    start: int
    duration: int


def runs_of(plan: Plan, *, start: int = 0) -> list[Run]:
    """Lists the events of one run: each tick takes 10 us, I and W of split backwards take 4.

    The half of a full backward takes 3 for I and 2 for W.
    """
    tables, found = plan.tables, []
    for rank in range(tables.num_ranks):
        found += [Run(rank, "first", start, 1), Run(rank, "moved", start + 1, 1)]
        for tick, opcode in enumerate(tables.opcode[:, rank].tolist()):
            at = start + 2 + 10 * tick
            found += [Run(rank, "look_up", at, 1), Run(rank, "moved.1", at, 1)]
            if opcode in (Opcode.BACKWARD_UPPER, Opcode.BACKWARD_LOWER):
                found.append(Run(rank, "input_grad", at + 1, 3))
                found.append(Run(rank, "weight_grad", at + 4, 2))
                found.append(Run(rank, "send", at + 8, 2))
                continue
            for name, kind in (("forward", "F"), ("input_grad", "I"), ("weight_grad", "W")):
                if letter_of(opcode) == kind:
                    found.append(Run(rank, name, at + 1, 4))
            if letter_of(opcode) == "F":
                is_last = tables.stage[tick, rank] == tables.num_stages - 1
                found.append(Run(rank, "write", at + 5, 1))
                found += [Run(rank, "head", at + 6, 1)] * int(is_last)
            found.append(Run(rank, "send", at + 8, 2))
    return found


def write_host(path: Path, scope: str, runs: list[list[Run]]) -> Path:
    """Writes a profile of CPUs: a plane of the host, each event with the number of its run."""
    names = {1: "hlo_op", 2: "hlo_module", 3: "program_id", 4: "run_id", 5: "device_ordinal"}
    events = b"".join(
        field(
            4,
            field(1, 1)
            + field(2, run.start * MICROSECOND)
            + field(3, run.duration * MICROSECOND)
            + field(4, field(1, 1) + field(5, run.instruction))
            + field(4, field(1, 2) + field(5, MODULE))
            + field(4, field(1, 3) + field(4, PROGRAM_ID))
            + field(4, field(1, 4) + field(4, number))
            + field(4, field(1, 5) + field(3, run.device)),
        )
        for number, of_run in enumerate(runs)
        for run in of_run
    )
    return _write(path, scope, _plane("/host:CPU", field(3, events), {1: "an event"}, names))


def write_devices(path: Path, scope: str, runs: list[list[Run]]) -> Path:
    """Writes a profile of TPUs: a plane for each device, instructions by their text."""
    planes = b""
    listed = sorted({run.instruction for of_run in runs for run in of_run})
    ids = {name: number for number, name in enumerate(listed, start=1)}
    for device in sorted({run.device for of_run in runs for run in of_run}):
        events = b"".join(
            field(
                4,
                field(1, ids[run.instruction])
                + field(2, run.start * MICROSECOND)
                + field(3, run.duration * MICROSECOND),
            )
            for of_run in runs
            for run in of_run
            if run.device == device
        )
        texts = {number: f"%{name} = f32[] fusion()" for name, number in ids.items()}
        stat = field(5, field(1, 1) + field(3, PROGRAM_ID))
        line = field(3, field(3, 5) + events)
        planes += _plane(f"/device:TPU:{device}", line, texts, {1: "program_id"}, stat)
    return _write(path, scope, planes)


def _plane(
    name: str, lines: bytes, events: dict[int, str], stats: dict[int, str], more: bytes = b""
) -> bytes:
    def entry(key: int, content: bytes) -> bytes:
        return field(1, key) + field(2, field(1, key) + content)

    described = b"".join(field(4, entry(k, field(2, text) + more)) for k, text in events.items())
    named = b"".join(field(5, entry(key, field(2, text))) for key, text in stats.items())
    return field(1, field(2, name) + lines + described + named)


def _write(path: Path, scope: str, planes: bytes) -> Path:
    stat = field(5, field(1, 1) + field(6, program(scope)))
    name = {1: f"{MODULE}({PROGRAM_ID})"}
    programs = _plane("/host:metadata", b"", name, {1: "Hlo Proto"}, stat)
    folder = path / "plugins" / "profile" / "2026_01_01"
    folder.mkdir(parents=True)
    (folder / "host.xplane.pb").write_bytes(programs + planes)
    return path
