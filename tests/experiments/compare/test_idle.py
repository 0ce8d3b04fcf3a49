"""The comparison of idle time, small: what it counts, that its committed figures are reproduced."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

import dualpipe_jax as dpj
from experiments.compare import costs
from experiments.compare import idle_report as report
from experiments.compare.idle import main, replay
from tests.experiments.refusals import refusal

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "experiments" / "compare"
SIZES = costs.Sizes(layers=64, width=4096, context=4096, heads=32, vocabulary=32_000)
SMALL = "--ranks 2 --ranks 4 --microbatches 2 --layers 8 --width 16 --context 8 --heads 2"


def test_flops_are_those_of_the_matmuls() -> None:
    B, T, D, V = 1, 24, 16, 40
    flops = costs.count(costs.Sizes(layers=2, width=D, context=T, heads=4, vocabulary=V))
    weights = 2 * B * T * 12 * D**2  # q, k, v, o; up and down of four widths
    attention = 2 * 2 * B * T * T * D
    assert flops.forward == weights + attention
    assert flops.input_grad == weights + 2 * attention
    assert flops.weight_grad == weights
    assert flops.head_forward == 2 * B * T * D * V
    assert flops.head_backward == 2 * flops.head_forward


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_costs_add_up_to_the_flops(num_ranks: int) -> None:
    flops = costs.count(costs.Sizes(layers=8, width=16, context=24, heads=2, vocabulary=100))
    made = flops.costs(num_layers=8, num_ranks=num_ranks)
    schedule = dpj.schedules.make("1f1b", num_ranks=num_ranks, num_microbatches=3)
    work = sum(dpj.simulate(schedule, costs=made, num_layers=8).work)
    of_layers = 8 * (flops.forward + flops.input_grad + flops.weight_grad)
    of_head = flops.head_forward + flops.head_backward
    assert work == pytest.approx(3 * (of_layers + of_head) / flops.forward)


def test_committed_figures_are_reproduced() -> None:
    rows = report.read_csv(FOLDER / "idle.csv")
    assert len(rows) == 4 * 4 * len(dpj.schedules.names())
    flops = costs.count(SIZES)
    small = [row for row in rows if row.ranks <= 8 and row.microbatches <= 8]
    assert len(small) == 3 * len(dpj.schedules.names())
    for row in small:
        made = replay(
            row.schedule,
            num_ranks=row.ranks,
            num_microbatches=row.microbatches,
            flops=flops,
            num_layers=64,
            transfer=0.14,
        )
        for name, value in vars(row).items():
            # Six digits are written.
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert getattr(made, name) == expected, (row.schedule, row.ranks, name)


def test_the_readme_has_the_table_of_the_committed_figures(tmp_path: Path) -> None:
    rows = report.read_csv(FOLDER / "idle.csv")
    report.write_markdown(rows, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() in (FOLDER / "idle.md").read_text()
    report.write_csv(rows, tmp_path / "idle.csv")
    assert (tmp_path / "idle.csv").read_text() == (FOLDER / "idle.csv").read_text()


def test_figures_that_the_readme_names() -> None:
    rows = {
        (row.schedule, row.ranks, row.microbatches): row
        for row in report.read_csv(FOLDER / "idle.csv")
    }
    text = (FOLDER / "idle.md").read_text()
    of_64 = [rows[n, 8, 64] for n in ("dualpipe", "dualpipev", "zb-h1", "1f1b")]
    with_transfers = [f"{100 * row.with_transfers:.1f}" for row in of_64]
    assert "for {} % of the step, DualPipeV for {} %, ZB-H1 for {} % and 1F1B for {} %".format(
        *with_transfers
    ) in (text)
    equal = [f"{100 * row.equal:.1f}" for row in of_64]
    assert "says {}, {}, {} and {} %".format(*equal) in text
    without = [f"{100 * rows[n, 8, 64].without_false_waits:.1f}" for n in ("1f1b", "zb-h1")]
    assert "1F1B would be at {} %, ZB-H1 at {} %".format(*without) in text
    of_full = "1F1B idles for {} % and not {}, interleaved 1F1B for {} and not {}, ZB-H1 for {} and"
    of_64 = [rows[n, 8, 64] for n in ("1f1b", "interleaved-1f1b", "zb-h1")]
    both = [f"{100 * v:.1f}" for row in of_64 for v in (row.full_backward, row.with_transfers)]
    assert f"{of_full} not {{}}.".format(*both) in text
    late = [f"{100 * rows[n, 32, 64].with_transfers:.1f}" for n in ("dualpipev", "zb-h1")]
    assert "idles more ({} %) than ZB-H1 ({} %)".format(*late) in text


@pytest.mark.slow
def test_it_writes_figures_table_and_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.compare.idle", *SMALL.split()]
    result = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    rows = report.read_csv(tmp_path / "idle.csv")
    assert [(row.ranks, row.microbatches) for row in rows[::7]] == [(2, 4), (4, 8)]
    for row in rows:
        schedule = dpj.schedules.make(
            row.schedule, num_ranks=row.ranks, num_microbatches=row.microbatches
        )
        idle = float((schedule.timeline().opcode == 0).mean())
        assert row.equal == pytest.approx(idle, abs=1e-6)
        if row.published is not None:
            assert row.equal <= row.published + 1e-6
        assert row.with_transfers >= row.transformer - 1e-6
        assert row.without_false_waits <= row.with_transfers + 1e-6
        assert row.uneven <= row.with_transfers + 1e-6
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    picture = matplotlib.image.imread(tmp_path / "idle.png")
    assert picture[..., :3].std() > 0.05  # not blank


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--heads 5", "--width 4096: must be divisible by --heads 5"),
        ("--layers 12 --ranks 8", "--layers 12: fewer than the 16 stages that a schedule has"),
        ("--ranks 0", "Invalid value for '--ranks': 0 is not in the range x>=1"),
        ("--transfer -1", "Invalid value for '--transfer'"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = refusal(
        main,
        flags.split(),
        name="idle_time",
        output=tmp_path / "out",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert message in printed
