"""The report as one picture: accuracy against the achieved rate, and precision against recall."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from trigger_study import TRIGGERS
from trigger_study.tables import pairs_of, values_of


INK, FAINT, GRID = "#1f2430", "#7a8190", "#e4e7ec"
COLORS = {"entropy": "#4878a8", "margin": "#d9a441", "router": "#1b9e77", "kl": "#8e5ea2", "random": "#9aa1ad"}
TITLES = {
    "embedded": ("Embedded pair: problems solved, per cent", "greedy"),
    "babyllama": ("Babyllama pair: tokens as the larger model has them, per cent", "the small model alone"),
}


def spread_out(heights: list[float], least: float, low: float, high: float) -> list[float]:
    """The heights moved apart so that neighbours are `least` apart or more, within [low, high]."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [0.0] * len(heights)
    floor = low
    for i in order:
        placed[i] = floor = max(heights[i], floor)
        floor += least
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - least
    return placed


def draw_accuracy(axes: Any, report: dict[str, Any], pair: str) -> None:
    """Accuracy against the achieved rate: a line per trigger, a band over seeds, the oracle's ceiling, greedy."""
    rates = report["meta"]["settings"]["rates"]
    ends: list[tuple[float, float, str, str]] = []

    def line(rows: list[dict], trigger: str, name: str, **style: Any) -> None:
        own = [row for row in rows if (row["pair"], row["trigger"]) == (pair, trigger)]
        parts = [[row for row in own if row["rate"] == rate] for rate in rates]
        x = [100 * statistics.fmean(row["achieved_rate"] for row in part) for part in parts]
        y = [statistics.fmean(row["accuracy"] for row in part) for part in parts]
        axes.plot(x, y, color=COLORS[trigger], **style)
        if "marker" in style:
            band = [[edge(row["accuracy"] for row in part) for part in parts] for edge in (min, max)]
            axes.fill_between(x, *band, color=COLORS[trigger], alpha=0.18, linewidth=0)
        ends.append((x[-1], y[-1], name, COLORS[trigger]))

    for trigger in reversed(TRIGGERS):
        name = "kl (oracle)" if trigger == "kl" else trigger
        line(report["rows"], trigger, name, marker="o", markersize=4.5, linewidth=2.2, zorder=3)
    for trigger in ("router", "kl"):
        name = f"{trigger}, teacher selects"
        line(report["ceilings"], trigger, name, linestyle=(0, (4, 2)), linewidth=1.5, zorder=2)
    greedy = values_of(report["references"], "accuracy", pair=pair, name="greedy")[0]
    axes.axhline(greedy, color=INK, linewidth=1.2, linestyle=":", zorder=1)
    axes.set_xscale("log")
    left, right = 100 * min(rates) * 0.6, 100 * max(rates) * 1.25
    low, high = axes.get_ylim()
    low, high = low - 0.04 * (high - low), high + 0.01 * (high - low)
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.text(left * 1.05, greedy - 0.012 * (high - low), TITLES[pair][1], size=9.5, color=INK, va="top")
    heights = spread_out([end[1] for end in ends], 0.052 * (high - low), low, high - 0.03 * (high - low))
    for (x, y, name, color), height in zip(ends, heights):
        place = {"xytext": (right * 1.1, height), "va": "center", "annotation_clip": False}
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(name, (x, y), **place, size=10, color=color, weight="bold", arrowprops=arrow)
    axes.set_xticks([100 * rate for rate in rates], [f"{100 * rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("tokens at which the trigger fires, per cent (achieved)", size=10, color=INK)
    axes.set_title(TITLES[pair][0], loc="left", size=11, color=INK, weight="bold")


def draw_curves(axes: Any, report: dict[str, Any], pair: str) -> None:
    """Precision against recall, with the area beside each name."""
    area = {row["trigger"]: row["average_precision"] for row in report["auc_means"] if row["pair"] == pair}
    curves = {row["trigger"]: row for row in report["precision_recall"] if row["pair"] == pair}
    for trigger in reversed(TRIGGERS):
        recall, precision = ([100 * value for value in curves[trigger][name]] for name in ("recall", "precision"))
        axes.plot(recall, precision, color=COLORS[trigger], linewidth=1.8)
    style = {"transform": axes.transAxes, "va": "center"}
    axes.text(1.03, 0.96, "area (average precision)", size=9, color=FAINT, **style)
    for place, trigger in enumerate(sorted(TRIGGERS, key=area.get, reverse=True)):
        text = f"{area[trigger]:.3f}  {trigger}"
        axes.text(1.03, 0.82 - 0.125 * place, text, size=10, color=COLORS[trigger], weight="bold", **style)
    axes.set(xlim=(0, 100), ylim=(0, 103))
    axes.set_xlabel("recall: of the tokens to correct, per cent that fire", size=10, color=INK)
    axes.set_title("Precision: of the tokens that fire, per cent to correct", loc="left", size=10.5, color=INK)


def draw(report: dict[str, Any], file: Path) -> None:
    """Draws a report as one PNG, 1400 pixels wide: a column for each pair."""
    from matplotlib.figure import Figure

    from s2t_recipes.report.canvas import save_png

    pairs = pairs_of(report)
    figure = Figure(figsize=(14, 8.8), dpi=100, facecolor="white")
    seeds = report["meta"]["settings"]["num_seeds"]
    title = "When to ask the selector: five triggers, the same selector"
    note = (
        f"lines: mean of {seeds} seed{'s' * (seeds > 1)}, bands: lowest to highest; dashed: the larger model selects"
    )
    figure.text(0.033, 0.968, title, size=14, weight="bold", color=INK, va="center")
    figure.text(0.967, 0.968, note, size=10, color=FAINT, va="center", ha="right")
    width = 1 / len(pairs)
    for column, pair in enumerate(pairs):
        left, wide = column * width + 0.033, width - 0.17
        upper = figure.add_axes((left, 0.385, wide, 0.51))
        draw_accuracy(upper, report, pair)
        lower = figure.add_axes((left, 0.065, wide, 0.215))
        draw_curves(lower, report, pair)
        for axes in (upper, lower):
            axes.grid(color=GRID, zorder=0)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelsize=9.5, labelcolor=FAINT)
            for spine in axes.spines.values():
                spine.set_visible(False)
    save_png(figure, file)
