"""The page of all schedules: its tables are those that the script makes."""

from pathlib import Path

import dualpipe_jax as dpj
from experiments import documents
from experiments.compare import all_schedules

README = Path(documents.__file__).resolve().parents[1] / "README.md"


def test_the_page_has_the_table_of_all_schedules() -> None:
    table = all_schedules.make_table(all_schedules.make_rows())
    assert documents.read_from(all_schedules.DOCS, name="schedules") == table.strip()


def test_the_page_has_the_table_of_splits() -> None:
    page = documents.read_from(all_schedules.DOCS, name="splits").splitlines()
    assert [line.split()[1] for line in page[2:]] == list(all_schedules.SPLIT)
    # Two of them: a balanced split takes longer to find than a step to replay.
    rows = [all_schedules.split(name) for name in ("zb-h1", "dualpipe")]
    header, rule, *lines = all_schedules.make_split_table(rows).splitlines()
    assert page[:2] == [header, rule]
    assert all(line in page for line in lines)


def test_the_readme_names_every_schedule() -> None:
    text = README.read_text()
    assert [name for name in dpj.schedules.names() if f"`{name}`" not in text] == []
