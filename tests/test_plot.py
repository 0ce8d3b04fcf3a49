"""The picture of a timeline: every action in its own colour and position, and the legend below."""

import builtins
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import dualpipe_jax as dpj
from dualpipe_jax._plot import FACES, pair_spans, save
from dualpipe_jax._plot.legend import IDLE

Box = tuple[float, ...]  # left, right, top, bottom
SIZES = [("dualpipe", 4, 10), ("1f1b", 3, 5), ("gpipe", 1, 1)]


def timeline(name: str, num_ranks: int, num_microbatches: int) -> dpj.Timeline:
    return dpj.schedules.make(
        name, num_ranks=num_ranks, num_microbatches=num_microbatches
    ).timeline()


def drawn_boxes(axes: Any) -> dict[Box, str]:
    """Maps (left, right, top, bottom), in halves of a tick and of a rank, to the colour there."""
    boxes = {}
    for collection in axes.collections:
        (face,) = collection.get_facecolor()
        for path in collection.get_paths():
            (left, top), (right, bottom) = path.vertices.min(axis=0), path.vertices.max(axis=0)
            box = tuple(round(2 * edge) / 2 for edge in (left, right, top, bottom))
            assert box not in boxes
            boxes[box] = to_hex(face)
    return boxes


def expected_boxes(made: dpj.Timeline, num_first: int) -> dict[Box, str]:
    """Lists the boxes drawn of a timeline; microbatches below `num_first` have direction 0."""
    colors = {}
    for tick, row in enumerate(made.actions):
        for rank, action in enumerate(row):
            colors[tick, rank] = IDLE
            if action is not None:
                kind = next(kind for kind in FACES if kind in action)
                colors[tick, rank] = FACES[kind][int(action.split(kind)[1]) >= num_first]
    boxes: dict[Box, str] = {}
    for rank, first, last in pair_spans(made):
        assert last == first + 2
        boxes[first, first + 3, rank - 0.5, rank] = colors.pop((first, rank))
        boxes[first, first + 1.5, rank, rank + 0.5] = colors.pop((first + 1, rank))
        boxes[first + 1.5, first + 3, rank, rank + 0.5] = colors.pop((last, rank))
    for (tick, rank), color in colors.items():
        boxes[tick, tick + 1, rank - 0.5, rank + 0.5] = color
    return boxes


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), SIZES)
def test_actions_have_their_colours_and_the_f_of_a_pair_is_above_its_i_and_w(
    name: str, num_ranks: int, num_microbatches: int
) -> None:
    made = timeline(name, num_ranks, num_microbatches)
    num_first = -(-num_microbatches // 2) if name == "dualpipe" else num_microbatches
    (axes,) = dpj.plot_timeline(made).axes
    assert drawn_boxes(axes) == expected_boxes(made, num_first)


def test_a_pair_that_waits_is_drawn_tick_by_tick() -> None:
    schedule = dpj.schedules.dualpipe(num_ranks=7, num_microbatches=20)
    made = schedule.timeline(overlap="two-tick")
    waiting = [(rank, first, last) for rank, first, last in pair_spans(made) if last > first + 2]
    assert waiting
    boxes: dict[Box, str] = {}
    for axes in dpj.plot_timeline(made).axes:
        boxes |= drawn_boxes(axes)
    for rank, *ticks in waiting:
        for tick in ticks:
            assert (tick, tick + 1, rank - 0.5, rank + 0.5) in boxes


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


def test_numbers_are_inside_their_boxes() -> None:
    figure = dpj.plot_timeline(timeline("dualpipe", 4, 102))
    renderer = FigureCanvasAgg(figure).get_renderer()
    num_numbers = 0
    for axes in figure.axes:
        boxes = np.array(list(drawn_boxes(axes)))
        left, right, top, bottom = boxes.T
        left, right = left.clip(*axes.get_xlim()), right.clip(*axes.get_xlim())
        for text in axes.texts:
            if text.get_text().isdigit():
                extent = text.get_window_extent(renderer).transformed(axes.transData.inverted())
                x, y = text.get_position()
                (box,) = np.flatnonzero((left < x) & (x < right) & (top < y) & (y < bottom))
                assert left[box] <= extent.x0 < extent.x1 <= right[box]
                assert top[box] <= min(extent.y0, extent.y1)
                assert max(extent.y0, extent.y1) <= bottom[box]
                num_numbers += 1
    assert num_numbers >= 3 * 4 * 102


def test_a_long_timeline_is_folded_into_bands() -> None:
    made = timeline("dualpipe", 16, 64)
    figure = dpj.plot_timeline(made)
    assert len(figure.axes) == 3
    assert max(figure.get_size_inches()) < 20
    edges = [axes.get_xlim() for axes in figure.axes]
    assert edges == [(0, 67), (67, 134), (134, made.num_ticks)]
    boxes: dict[Box, str] = {}
    for axes in figure.axes:
        boxes |= drawn_boxes(axes)  # a box that a band's end cuts is in both
        bottom, top = axes.get_ylim()
        assert (bottom, top) == (15.5, -0.5)
    assert boxes == expected_boxes(made, 32)
    numbers = [text for text in figure.axes[1].texts if text.get_text().isdigit()]
    assert len(numbers) > 16 * 67 - 3 * 16
    assert all(float(number.get_fontsize()) > 7 for number in numbers)


def test_a_large_timeline_leaves_out_numbers_and_stays_within_bounds() -> None:
    figure = dpj.plot_timeline(timeline("gpipe", 24, 300))
    assert max(figure.get_size_inches()) < 25
    assert not [t for axes in figure.axes for t in axes.texts if t.get_text().isdigit()]
    assert "microbatch" not in legend_labels(figure)


@pytest.mark.parametrize("size", [("gpipe", 1, 1), ("dualpipe", 4, 8), ("dualpipe", 8, 20)])
def test_legend_is_as_wide_as_the_chart(size: tuple[str, int, int]) -> None:
    figure = dpj.plot_timeline(timeline(*size))
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    extent, chart = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert extent.x0 == pytest.approx(chart.x0, abs=1)
    assert extent.x1 == pytest.approx(chart.x1, abs=1)
    assert 0 < extent.y0 < extent.y1 < figure.axes[-1].get_window_extent().y0


def legend_labels(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_legend_names_the_drawn_actions() -> None:
    actions = ["forward (F)", "input grad (I)", "weight grad (W)", "idle", "microbatch"]
    assert legend_labels(dpj.plot_timeline(timeline("1f1b", 3, 6))) == actions
    assert legend_labels(dpj.plot_timeline(timeline("dualpipe", 3, 6))) == [
        *actions,
        "pair: F beside I and W",
        "light: direction 0, enters at rank 0",
        "dark: direction 1, enters at rank 2",
    ]


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
    """Without any colour sight the directions are still distinguished."""
    for light, dark in FACES.values():
        luminance = [
            np.dot([0.2126, 0.7152, 0.0722], [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            for c in (light, dark)
        ]
        assert luminance[0] - luminance[1] > 0.3
