"""Rows -> a picture of steps over their work: a bar a schedule, a panel for ranks and costs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.by_the_clock.report import Row, faster, groups
from experiments.train_lm import pictures

_WORK, _NEEDED, _ELSE, _PREDICTED = "#12508f", "#8cc4ef", "#f2b266", "#2b2b2b"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a bar a schedule, its faster program: a column a number of ranks, a row a cost.

    A bar ends where the clock did; it is divided where the work ends and where the ideal step does.
    """
    all_ranks = sorted({row.ranks for row in rows})
    all_costs = list(dict.fromkeys(row.costs for row in rows))
    num_schedules = len({row.schedule for row in rows})
    height = (0.3 * num_schedules + 0.7) * len(all_costs) + 0.6
    figure = Figure(figsize=(3.2 * len(all_ranks) + 1.2, height), dpi=150, layout="constrained")
    panels = figure.subplots(len(all_costs), len(all_ranks), sharex=True, squeeze=False)
    for ranks, costs, mine in groups(rows):
        panel = panels[all_costs.index(costs), all_ranks.index(ranks)]
        _draw(panel, faster(mine))
        panel.set_title(f"{ranks} ranks, {costs}", loc="left", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("seconds over those of the work")
    columns = 4 if len(all_ranks) > 1 else 2
    pictures.legend_below(figure, panels[0, 0], columns=columns)
    figure.savefig(path)


def _draw(panel: Axes, rows: Sequence[Row]) -> None:
    places = np.arange(len(rows))
    ideal = np.array([row.ideal / row.work for row in rows])
    clock = np.array([row.over_work for row in rows])
    panel.barh(places, np.ones(len(rows)), color=_WORK, label="work")
    panel.barh(places, ideal - 1, left=1, color=_NEEDED, label="ideal: needed waits")
    panel.barh(places, clock - ideal, left=ideal, color=_ELSE, label="clock: all else")
    panel.scatter(
        [row.predicted / row.work for row in rows],
        places,
        s=26,
        color=_PREDICTED,
        marker="d",
        label="predicted",
        zorder=3,
    )
    for place, over_work in zip(places, clock, strict=True):
        panel.annotate(
            f"{over_work:.2f}",
            (over_work, float(place)),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    panel.set_yticks(places, [str(row.program) for row in rows], fontsize=8)
    panel.invert_yaxis()
    pictures.frame(panel, grid="x", hidden=("top", "right", "left"))
