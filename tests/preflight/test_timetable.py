"""A step in ticks: which branch how often, who waits when, and the text that says so."""

from dataclasses import replace

import pytest

from dualpipe_jax import _scopes, schedules
from dualpipe_jax._preflight.analysis import analyze
from dualpipe_jax._preflight.collectives import find_global_permutes
from dualpipe_jax._preflight.links import Network
from dualpipe_jax._preflight.report import Memory, ProgramSize, Report
from dualpipe_jax._preflight.text import ticks_table
from dualpipe_jax._schedule.tables import Exchange, Tables
from tests.preflight.snippets import FUSED, LOOP, TOY, WHILE, A, network, program, work

P, N = 4, 8
RAMP = f"jit(step)/{_scopes.of_schedule('1f1b', num_ranks=P, num_microbatches=N)}/{_scopes.RAMP}"
ACTIONS = {_scopes.FORWARD: 100, _scopes.INPUT_GRAD: 60, _scopes.WEIGHT_GRAD: 40}
LINK = 16  # seconds: of four float32 over a link of a byte a second


def tables_of_1f1b() -> Tables:
    return schedules.make("1f1b", num_ranks=P, num_microbatches=N).compiled().tables


def branch(number: int, exchange: Exchange, width: int, num_arrays: int) -> str:
    """Writes the permutes of an exchange, over a pipeline axis with a line for each index."""
    b = f"%b{number}"
    sends = []
    for side, pairs in zip(("right", "left"), exchange, strict=True):
        if pairs:
            devices = ",".join(
                f"{{{source * width + i},{target * width + i}}}"
                for i in range(width)
                for source, target in pairs
            )
            sends += [
                f"  %{side}.{number}.{array} = (f32[4]{{0}}, f32[4]{{0}}) "
                f"collective-permute-start({b}), source_target_pairs={{{devices}}}, "
                f'metadata={{op_name="{RAMP}/{_scopes.SEND}/ppermute"}}'
                for array in range(num_arrays)
            ]
    dones = [
        f"  %done.{line.split()[0][1:]} = f32[4]{{0}} collective-permute-done({line.split()[0]})"
        for line in sends
    ]
    lines = [f"  %b{number} = f32[4]{{0}} parameter(0)", *sends, *dones]
    lines.append(f"  ROOT %n{number} = f32[4]{{0}} negate(%b{number})")
    return "\n".join([f"%exchange.{number} (b{number}: f32[4]) -> f32[4] {{", *lines, "}"])


def step(exchanges: tuple[Exchange, ...], *, width: int = 1, num_arrays: int = 1) -> Report:
    """Reads a step whose scan over ticks has the three actions and these exchanges.

    Args:
      exchanges: The (source, target) ranks of the permutes of each branch.
      width: The size of a second mesh axis.
      num_arrays: The arrays of an x.
    """
    computations, lines = [], []
    for number, (action, cycles) in enumerate(ACTIONS.items()):
        inside = work(f"w{number}", cycles, f"p{number}").replace("  %", "  ROOT %")
        computations.append(
            f"%run.{number} (p{number}: f32[4]) -> f32[4] {{\n"
            f"  %p{number} = f32[4]{{0}} parameter(0)\n"
            f'{inside}, metadata={{op_name="{RAMP}/{action}/op"}}\n}}\n\n'
            f"%is_on.{number} (q{number}: f32[4]) -> pred[] {{\n"
            f"  ROOT %q{number} = f32[4]{{0}} parameter(0)\n}}"
        )
        lines.append(
            f"  %c{number} = f32[4]{{0}} while(%a), condition=%is_on.{number}, body=%run.{number}"
        )
    computations += [
        branch(number, each, width, num_arrays) for number, each in enumerate(exchanges)
    ]
    names = ", ".join(f"%exchange.{number}" for number in range(len(exchanges)))
    operands = ", ".join(["%a"] * (len(exchanges) + 1))
    lines.append(f"  %x = f32[4]{{0}} conditional({operands}), branch_computations={{{names}}}")
    ticks = tables_of_1f1b().num_ticks
    loop = LOOP.format(inside="\n".join(lines), limit=f"constant({ticks})")
    module = program(f"{A}\n{WHILE.format(start=0, more='')}", FUSED, *computations, loop)
    axes = {"pipe": P} if width == 1 else {"pipe": P, "expert": width}
    loop_found, prediction, waits, copies = analyze(module, Network(axes=axes, device=TOY))
    return Report(
        topology="toy",
        device="toy",
        axes=axes,
        apart=(),
        compiler_options={},
        compile_seconds=0.0,
        memory=Memory(),
        program=ProgramSize(
            num_instructions=0, code_bytes=None, global_permutes=find_global_permutes(module)
        ),
        loop=loop_found,
        copies=copies,
        prediction=prediction,
        waits=waits,
    )


@pytest.mark.parametrize("width", [1, 2])
def test_permutes_in_branches_run_as_often_as_the_tables_say(width: int) -> None:
    tables = tables_of_1f1b()
    loop = step(tables.exchanges[0], width=width).loop
    assert loop is not None
    assert len(loop.collectives) == sum(bool(side) for each in tables.exchanges[0] for side in each)
    for each in loop.collectives:
        assert each.branch is not None
        assert tables.exchanges[0][each.branch] != ((), ())
        assert each.num_runs == (tables.exchange == each.branch).sum()
        assert each.axes == ("pipe",)
    # Both sides of an exchange are under way together: a tick with any waits for the link once.
    share = (tables.exchange > 0).mean()
    assert loop.exposed_seconds == pytest.approx(share * LINK)


def test_branches_of_other_tables_count_as_the_most_expensive() -> None:
    tables = tables_of_1f1b()
    both = ((0, 1), (1, 2)), ((2, 1),)
    loop = step((*tables.exchanges[0], both)).loop
    assert loop is not None
    assert {each.num_runs for each in loop.collectives} == {None}
    assert loop.exposed_seconds == LINK


def test_waits_are_those_of_the_predicted_time_in_microseconds() -> None:
    report = step(tables_of_1f1b().exchanges[0])
    made, waits = report.prediction, report.waits
    assert made.loop_seconds is not None
    assert made.idle_share is not None
    assert waits is not None
    idle = sum(waits.by_reason().values()) + sum(waits.in_run) + sum(waits.finished)
    assert idle == pytest.approx(P * made.loop_seconds * made.idle_share * 1e6)
    first = waits.ticks[0]
    assert (first.actions, first.exchange) == (("0F0", None, None, None), (((0, 1),), ()))
    # Rank 1 has nothing to do before rank 0's forward has come.
    assert [(wait.rank, wait.other, wait.reason) for wait in first.waits] == [
        (0, 1, "transfer"),
        (1, 0, "reads it next"),
        (1, 0, "transfer"),
    ]
    assert [wait.time for wait in first.waits] == pytest.approx([16e6, 100e6, 16e6])
    assert made.dependency_seconds is not None
    assert made.dependency_seconds < made.loop_seconds


def test_all_arrays_of_an_x_travel() -> None:
    waits = step(tables_of_1f1b().exchanges[0], num_arrays=3).waits
    assert waits is not None
    times = [wait.time for wait in waits.ticks[0].waits if wait.reason == "transfer"]
    assert times == pytest.approx([3 * 16e6] * 2)


def test_report_has_a_table_tick_by_tick() -> None:
    report = step(tables_of_1f1b().exchanges[0])
    assert report.waits is not None
    text = str(report)
    lines = text.splitlines()
    (head,) = (at for at, line in enumerate(lines) if line.startswith("tick  permutes"))
    assert lines[head].split() == [
        "tick",
        "permutes",
        *["rank", "0", "rank", "1", "rank", "2", "rank", "3"],
    ]
    first = lines[head + 1].split()
    assert first[:4] == ["0", "0>1", "0F0", "<1"]
    assert "stand in the branches of a conditional" in text
    sums = {line.split("  ")[0]: line.split()[-1] for line in lines if line.endswith("%")}
    assert sums["acts"] == f"{1 - (report.prediction.idle_share or 0):.1%}"
    shares = [float(share.removesuffix("%")) for share in sums.values()]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    # Ticks in which nobody waits are named, and no tick is lost but those that come again.
    assert "ticks without waits: " in text


def test_ticks_that_come_again_are_written_once() -> None:
    waits = step(tables_of_1f1b().exchanges[0]).waits
    assert waits is not None
    _, rows = ticks_table(waits)
    again = [row for row in rows if row[0].startswith("...")]
    assert again
    assert all(" times more, up to tick " in row[1] for row in again)
    whole = replace(waits, ticks=waits.ticks[:4])
    assert not [row for row in ticks_table(whole)[1] if row[0].startswith("...")]


# As the TPU compiler writes a permute for whose pairs it has no barrier left.
GLOBAL = """  %s = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,1}}, metadata={op_name="jit(f)/dualpipe.send/ppermute"}, backend_config={"flag_configs":[],"barrier_config":{"barrier_type":"GLOBAL","id":"-1"},"scoped_memory_configs":[],"used_scoped_memory_configs":[]}"""  # noqa: E501


def test_permutes_of_all_cores_are_named() -> None:
    done = "  %d = f32[4]{0} collective-permute-done(%s)"
    paired = GLOBAL.replace('"GLOBAL","id":"-1"', '"CUSTOM","id":"3"').replace("%s", "%t")
    module = program("\n".join([A, GLOBAL, paired, done]))
    assert find_global_permutes(module) == {"s": "jit(f)/dualpipe.send/ppermute"}
    report = step(tables_of_1f1b().exchanges[0])
    assert "every core wait" not in str(report)
    for found, said in (
        ({"s": "f/send"}, "1 permute makes"),
        ({"s": "f/send", "t": ""}, "2 permutes make"),
    ):
        named = ProgramSize(num_instructions=1, code_bytes=None, global_permutes=found)
        text = str(replace(report, program=named))
        assert f"{said} every core wait: the compiler has no pairwise barrier left for" in text
        assert "           s  f/send\n" in text


def test_programs_that_are_not_predicted_have_no_waits() -> None:
    loop, _, waits, _ = analyze(program(A), network(pipe=P))
    assert (loop, waits) == (None, None)
