"""The picture of a timeline: every action is drawn once, in its own colour and place."""

import builtins
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

import dualpipe_jax as dpj
from dualpipe_jax._plot import FACES, IDLE, pair_spans, save

SIZES = [("dualpipe", 4, 10), ("1f1b", 3, 5), ("gpipe", 1, 1)]


def timeline(name: str, num_ranks: int, num_microbatches: int) -> dpj.Timeline:
    return dpj.schedules.make(
        name, num_ranks=num_ranks, num_microbatches=num_microbatches
    ).timeline()


def drawn_cells(figure: Any) -> dict[tuple[int, int], str]:
    """Maps (tick, rank) to the colour of the cell drawn there."""
    (axes,) = figure.axes
    cells = {}
    for collection in axes.collections:
        face = collection.get_facecolor()
        if not len(face):  # an outline
            continue
        for path in collection.get_paths():
            left, top = path.vertices.min(axis=0)
            place = (round(left), round(top + 0.5))
            assert place not in cells
            cells[place] = to_hex(face[0])
    return cells


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), SIZES)
def test_cells_have_the_colours_of_their_actions(
    name: str, num_ranks: int, num_microbatches: int
) -> None:
    made = timeline(name, num_ranks, num_microbatches)
    cells = drawn_cells(dpj.plot_timeline(made))
    assert len(cells) == made.num_ticks * num_ranks
    # Here a direction is told by the number: direction 0 has the first half of the microbatches.
    half = -(-num_microbatches // 2) if name == "dualpipe" else num_microbatches
    for tick, row in enumerate(made.actions):
        for rank, action in enumerate(row):
            expected = IDLE
            if action is not None:
                kind = next(kind for kind in FACES if kind in action)
                expected = FACES[kind][int(action.split(kind)[1]) >= half]
            assert cells[tick, rank] == expected


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), SIZES)
def test_numbers_are_microbatches(name: str, num_ranks: int, num_microbatches: int) -> None:
    (axes,) = dpj.plot_timeline(timeline(name, num_ranks, num_microbatches)).axes
    numbers = Counter(text.get_text() for text in axes.texts if text.get_text().isdigit())
    # An F, an I and a W of each microbatch on each stage, of which there are as many as ranks.
    assert numbers == {str(m): 3 * num_ranks for m in range(num_microbatches)}


def test_pairs_span_forward_to_weight_grad() -> None:
    made = timeline("dualpipe", 4, 10)
    spans = pair_spans(made)
    assert len(spans) == made.program.to_csv().count("OVERLAP_F_B") > 0
    for rank, first, last in spans:
        inside = [made.actions[tick][rank] for tick in range(first, last + 1)]
        assert [next(k for k in "FIW" if k in cell) for cell in inside if cell] == ["F", "I", "W"]


def test_no_pairs_no_outline() -> None:
    made = timeline("1f1b", 2, 4)
    assert pair_spans(made) == []
    assert all(len(c.get_facecolor()) for c in dpj.plot_timeline(made).axes[0].collections)


def test_legend_names_both_directions_only_when_there_are_two() -> None:
    titles = [
        dpj.plot_timeline(timeline(name, 3, 6)).legends[0].get_title().get_text()
        for name in ("dualpipe", "1f1b")
    ]
    assert "direction 1, enters at rank 2" in titles[0]
    assert "direction" not in titles[1]


def test_a_wide_timetable_leaves_out_numbers_and_stays_within_bounds() -> None:
    figure = dpj.plot_timeline(timeline("gpipe", 2, 700))
    assert figure.get_figwidth() < 50
    assert not [text for text in figure.axes[0].texts if text.get_text().isdigit()]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_path_is_written_with_the_title(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"picture.{suffix}"
    figure = dpj.plot_timeline(timeline("gpipe", 2, 2), title="a title", path=path)
    assert path.read_bytes().startswith(start)
    assert figure.axes[0].get_title(loc="left") == "a title"


def test_svg_is_reproducible() -> None:
    pictures = [io.BytesIO(), io.BytesIO()]
    for picture in pictures:
        save(dpj.plot_timeline(timeline("dualpipe", 2, 4)), picture, image_format="svg")
    assert pictures[0].getvalue() == pictures[1].getvalue()


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_matplotlib(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name=name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        dpj.plot_timeline(timeline("gpipe", 1, 1))


def test_colours_differ_in_lightness_between_directions() -> None:
    """Without any colour sight the directions are still told apart."""
    for light, dark in FACES.values():
        luminance = [
            np.dot([0.2126, 0.7152, 0.0722], [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            for c in (light, dark)
        ]
        assert luminance[0] - luminance[1] > 0.3
