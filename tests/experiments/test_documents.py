"""Texts between two comments of a page: replaced alone, and never at the cost of the rest."""

from pathlib import Path

import pytest

from experiments import documents

ROOT = Path(documents.__file__).resolve().parents[1]
PLACES = [
    ("experiments/benchmarks/table.md", "table"),
    *(("experiments/sharded/README.md", name) for name in ("ends", "heads")),
    *(
        ("experiments/compiled/README.md", name)
        for name in ("transfers", "efficiency", "size", "ticks", "times", "beats", "memory")
    ),
    *(("experiments/fuzz_losses/README.md", name) for name in ("outcomes", "refusals", "features")),
    *(("docs/mesh_axes.md", "zero"), ("docs/from_loss.md", "fuzz")),
    *(("docs/which_schedule.md", name) for name in ("schedules", "splits")),
]


@pytest.mark.parametrize("name", ["table", "zero"])
def test_the_text_replaces_the_one_before(tmp_path: Path, name: str) -> None:
    path, (begin, end) = tmp_path / "README.md", documents.marks(name)
    path.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    for text in ("| a |", "| b |\n"):
        documents.write_into(path, text, name=name)
    assert path.read_text() == f"above\n{begin}\n\n| b |\n\n{end}\nbelow\n"
    assert documents.read_from(path, name=name) == "| b |"


@pytest.mark.parametrize("text", ["", "{begin}\n", "{end}\n{begin}\n", "{begin}{end}{begin}{end}"])
def test_a_page_without_its_place_is_left_alone(tmp_path: Path, text: str) -> None:
    path, (begin, end) = tmp_path / "README.md", documents.marks("table")
    whole = text.format(begin=begin, end=end)
    path.write_text(whole)
    with pytest.raises(ValueError, match="once each; put them back"):
        documents.write_into(path, "| c |")
    assert path.read_text() == whole


@pytest.mark.parametrize(("page", "name"), PLACES)
def test_a_page_has_its_place(page: str, name: str) -> None:
    assert documents.read_from(ROOT / page, name=name).startswith("|")
