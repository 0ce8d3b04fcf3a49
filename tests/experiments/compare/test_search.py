from pathlib import Path

import dualpipe_jax as dpj
from experiments import tables
from experiments.compare import search
from experiments.compare.search import CASES, COSTS, Row

ROOT = Path(__file__).resolve().parents[3]
FIGURES = ROOT / "experiments" / "compare" / "search.csv"


def test_the_page_has_the_table_of_the_committed_figures(tmp_path: Path) -> None:
    rows = tables.read_csv(Row, FIGURES)
    assert search.make_table(rows) in (ROOT / "docs" / "schedule_search.md").read_text()
    assert [(row.placement, row.costs) for row in rows] == [
        (case.placement, costs) for case in CASES for costs in COSTS
    ]


def test_found_orders_are_not_slower_and_keep_their_beats() -> None:
    for row in tables.read_csv(Row, FIGURES):
        assert row.found_values <= row.named_values
        schedule = dpj.schedules.make(
            row.named, num_ranks=row.ranks, num_microbatches=row.microbatches
        )
        if not row.uneven:
            made = dpj.simulate(schedule, costs=COSTS[row.costs], transfer=search.TRANSFER)
            # Six digits are written.
            assert abs(made.dependency_makespan / row.named_values - 1) < 1e-5


def test_a_case_is_searched_and_replayed() -> None:
    (case,) = (case for case in CASES if case.named == "zb-h1")
    row = search.run(case, "attn", moves=20)
    # Proven optimal by a constraint solver: nothing is shorter.
    assert row.found_values == row.named_values
    assert abs(row.found_values - 29.025) < 1e-9
    assert row.found_beats == row.named_beats == 0
