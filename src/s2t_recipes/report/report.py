"""One picture of one evaluation: accuracy by policy, Hit@K, and two generations token by token. And a page of it all.

    s2t report runs/demo

writes report.png, report.html and a PNG of each chart into the folder that `s2t eval` wrote. The picture
needs `report.json` and nothing else; the page is html_report.py's. Knows no models.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from s2t_recipes.options import SmallParser
from s2t_recipes.report import charts
from s2t_recipes.report.canvas import paint, save_png
from s2t_recipes.report.html_report import read_report, write_page
from s2t_recipes.row_names import GROUPS, group_of, grouped, label_of


matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402
from matplotlib.transforms import blended_transform_factory  # noqa: E402


INK, FAINT, GRID = "#1f2430", "#7a8190", "#e4e7ec"
KEPT, FLIPPED, FLIPPED_BACK, STUDENT = "#4878a8", "#0b6b4f", "#c9eedf", "#c0392b"
#: The trainer's held-out figures: label and group (for its colour).
AGREEMENT = {
    "student_first": ("student's first", "baseline"),
    "second_candidate": ("second candidate", "control"),
    "agree_at_1": ("S2T-Local", "local"),
    "fused_agree_at_1": ("S2T-Local, fused", "local"),
}
WIDTH = 14.0  # inches; 1400 pixels at 100 dpi
DPI = 100
# Generations are set in DejaVu Sans Mono, whose characters are 0.602 em wide. Sizes and lines in points.
MONO_EM = 0.6021
EXAMPLE_WIDTH, MAX_LINES = 6.45, 9
NOTE_SIZE, NOTE_LINE = 9.5, 14.5
TEXT_SIZE, TEXT_LINE, WAS_SIZE = 13.0, 30.0, 11.0


def shorten(text: str | None, length: int) -> str:
    text = text or "none"
    return text if len(text) <= length else "…" + text[-length + 1 :]


def draw_bars(axes: Axes, rows: list[dict]) -> None:
    """Horizontal bars by group, with the intervals as lines and the figures in a column at the right."""
    y, ticks, labels = 0.0, [], []
    titles = blended_transform_factory(axes.transAxes, axes.transData)
    for title, members in grouped(rows):
        color = GROUPS[group_of(members[0])][1]
        axes.text(-0.005, y, title, transform=titles, ha="right", va="center", color=INK, weight="bold", size=9.5)
        y += 0.95
        for row in members:
            accuracy, (low, high) = row["accuracy"], row["accuracy_ci"]
            draw_bar(axes, y, accuracy, color)
            axes.plot([low, high], [y, y], color=INK, linewidth=1.3, zorder=3, solid_capstyle="butt")
            for edge in (low, high):
                axes.plot([edge, edge], [y - 0.16, y + 0.16], color=INK, linewidth=1.3, zorder=3)
            if row.get("helped") is not None:
                axes.text(120, y, f"+{row['helped']:.0f}", va="center", ha="right", color=FAINT, size=9)
                axes.text(129, y, f"−{row['hurt']:.0f}", va="center", ha="right", color=FAINT, size=9)
            ticks.append(y)
            labels.append(label_of(row) + (f"  ({row['num_seeds']} seeds)" if row.get("num_seeds", 1) > 1 else ""))
            y += 1.0
        y += 0.25
    greedy = next((row["accuracy"] for row in rows if row["policy"] == "greedy"), None)
    if greedy is not None:
        axes.axvline(greedy, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    name_bars(axes, ticks, labels)
    axes.set(xlim=(0, 100), ylim=(y - 0.5, -0.7))
    axes.tick_params(axis="x", length=0, labelsize=9, labelcolor=FAINT)
    label = "accuracy in per cent, 95 % interval;  + problems helped, − hurt against greedy"
    axes.set_xlabel(label, size=9, color=INK)
    axes.xaxis.grid(True, color=GRID, zorder=0)
    clear_frame(axes)


def draw_agreement(axes: Axes, metrics: dict) -> None:
    """Agree@1 on the trainer's held-out labels, one short bar each."""
    labels = []
    for y, (name, (label, group)) in enumerate(item for item in AGREEMENT.items() if item[0] in metrics):
        draw_bar(axes, y, 100 * metrics[name], GROUPS[group][1])
        labels.append(label)
    name_bars(axes, range(len(labels)), labels)
    axes.set(xlim=(0, 112), xticks=[], ylim=(len(labels) - 0.5, -0.5))
    axes.set_title("Agree@1 with the teacher, held-out decision points", size=10, loc="left", color=INK, x=-0.52)
    clear_frame(axes)


def draw_bar(axes: Axes, y: float, value: float, color: str) -> None:
    """A horizontal bar from 0 to `value` per cent, and the figure in a column right of the axes."""
    axes.barh(y, value, height=0.68, color=color, zorder=2)
    axes.text(111, y, f"{value:.1f}", va="center", ha="right", color=INK, size=9.5, weight="bold")


def name_bars(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    """Names left of the bars at these places."""
    axes.set(yticks=places, yticklabels=labels)
    axes.tick_params(axis="y", length=0, labelsize=9.5, labelcolor=INK)


def draw_hits(axes: Axes, hit_at_k: dict[str, float]) -> None:
    """The page's chart of Hit@K at the size of `axes`, with a title."""
    width, height = axes.get_position().size * axes.figure.get_size_inches() * 100
    paint(charts.draw_hits(hit_at_k, width, height), axes)
    title = "Hit@K: is the teacher's token among the student's first K?"
    more = "(per cent of the points where they disagree most)"
    axes.set_title(f"{title}\n{more}", size=10, loc="left", color=INK)


def clear_frame(axes: Axes) -> None:
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


@dataclass(frozen=True)
class Piece:
    """A run of characters of one token on one line of a page; `student` is what a flip replaced."""

    line: int
    column: int
    text: str
    kind: str
    student: str | None = None


def lay_out(tokens: list[dict], num_columns: int) -> Iterator[Piece]:
    """Places tokens on lines of `num_columns` monospaced characters; breaks at newlines and where a line is full.

    A flipped token that is white space or the end is shown by a sign, so that it can be seen. Above it stands what the
    student would have written, so the next flip keeps clear of it.
    """
    line = column = 0
    for token in tokens:
        flipped, student = token["kind"] == "flipped", token.get("student")
        text = token["text"]
        if flipped and not text.strip():
            text = visible(text)
        for number, part in enumerate(text.split("\n")):
            if number:
                line, column = line + 1, 0
            if column and column + len(part) > num_columns:
                line, column = line + 1, 0
                part = part.lstrip(" ")
            while part:
                yield Piece(line, column, part[:num_columns], token["kind"], student)
                student = None
                column += len(part[:num_columns])
                part = part[num_columns:]
                if part:
                    line, column = line + 1, 0
        if flipped and text != token["text"] and "\n" in token["text"]:
            line, column = line + 1, 0


def visible(text: str) -> str:
    """A token as a mark on paper: newlines and spaces get a sign, an end-of-sequence token (no text) a name."""
    if not text:
        return "(end)"
    text = text.replace("\n", "¶")
    return text.strip() or text.replace(" ", "·")


def draw_example(axes: Axes, example: dict) -> None:
    """Prompt, what greedy wrote, and the generation with its decisions marked, on axes `EXAMPLE_WIDTH` inches wide and
    [`example_height`] tall. One data unit = one point (1/72 inch)."""
    axes.set(xlim=(0, 72 * EXAMPLE_WIDTH), ylim=(72 * example_height(example), 0))
    axes.axis("off")
    mono = {"family": "monospace", "va": "center", "parse_math": False, "clip_on": False}
    y = 0.5 * NOTE_LINE
    for text, color in notes_of(example):
        axes.text(0, y, text, **mono, size=NOTE_SIZE, color=color)
        y += NOTE_LINE
    top = y + 0.9 * TEXT_LINE - 0.5 * NOTE_LINE
    cell = TEXT_SIZE * MONO_EM
    free_from: dict[int, float] = {}  # line -> where the last small token above it ends
    for piece in lay_out(example["tokens"], int(72 * EXAMPLE_WIDTH / cell)):
        y = top + piece.line * TEXT_LINE
        if piece.line >= MAX_LINES:
            axes.text(0, y, "…", **mono, size=TEXT_SIZE, color=FAINT)
            break
        x, end = piece.column * cell, (piece.column + len(piece.text)) * cell
        style = {"size": TEXT_SIZE, "color": {"flipped": FLIPPED, "kept": KEPT}.get(piece.kind, INK)}
        if piece.kind == "flipped":
            style["weight"] = "bold"
            height = 1.25 * TEXT_SIZE
            box = FancyBboxPatch((x, y - height / 2), end - x, height, boxstyle="square,pad=0", linewidth=0)
            box.set_facecolor(FLIPPED_BACK)
            axes.add_patch(box)
        if piece.kind == "kept":
            axes.plot([x + 0.8, end - 0.8], [y + 0.68 * TEXT_SIZE] * 2, color=KEPT, linewidth=1.6)
        axes.text(x, y, piece.text, **mono, **style)
        if piece.student is not None:
            was = visible(piece.student)
            half, above = len(was) * WAS_SIZE * MONO_EM / 2, y - 1.1 * TEXT_SIZE
            middle = max((x + end) / 2, half, free_from.get(piece.line, 0.0) + half)
            free_from[piece.line] = middle + half + 3
            axes.text(middle, above, was, **mono, size=WAS_SIZE, ha="center", color=STUDENT)


def notes_of(example: dict) -> list[tuple[str, str]]:
    """Lines above a generation, with their colours: the prompt, greedy's text, the right answer."""
    width = int(72 * EXAMPLE_WIDTH / (NOTE_SIZE * MONO_EM))
    greedy = " / ".join(example["greedy_text"].strip().splitlines())
    texts = [(example["prompt"], 4, INK), (f"greedy, wrong:  {greedy}", 2, FAINT)]
    texts.append((f"right answer:   {example['gold']}", 1, FAINT))
    notes = []
    for text, limit, color in texts:
        lines = [line for part in text.strip().split("\n") for line in textwrap.wrap(part, width) or [""]]
        if len(lines) > limit:
            lines = [*lines[: limit - 1], lines[limit - 1][: width - 2] + " …"]
        notes += [(line, color) for line in lines]
    return notes


def example_height(example: dict) -> float:
    """Inches that a generation and what stands above it take."""
    pieces = lay_out(example["tokens"], int(72 * EXAMPLE_WIDTH / (TEXT_SIZE * MONO_EM)))
    num_lines = min(max((piece.line for piece in pieces), default=0) + 1, MAX_LINES + 1)
    return (len(notes_of(example)) * NOTE_LINE + (num_lines + 0.4) * TEXT_LINE) / 72


def draw_legend(figure: Figure, left: float, y: float) -> None:
    """What the marks mean, as one line of figure text; positions follow from the measured texts."""
    renderer = figure.canvas.get_renderer()
    x = left

    def add(text: str, gap: float, **style) -> tuple[float, float]:
        nonlocal x
        drawn = figure.text(x, y, text, **({"va": "center_baseline", "size": 10.5, "color": INK} | style))
        start, end = (edge / (DPI * WIDTH) for edge in drawn.get_window_extent(renderer).intervalx)
        x = end + gap / WIDTH
        return start, end

    def underline(ends: tuple[float, float]) -> None:
        at = y - 9 / 72 / figure.get_figheight()
        figure.add_artist(plt.Line2D(ends, [at, at], color=KEPT, linewidth=1.6, transform=figure.transFigure))

    mono = {"family": "monospace", "size": TEXT_SIZE}
    add("S2T-Local, token by token", 0.35, weight="bold", size=11)
    add("27", 0.08, **mono)
    add("not asked", 0.35)
    underline(add("27", 0.08, **mono, color=KEPT))
    add("asked, kept the student's token", 0.35)
    add("27", 0.1, **mono, color=FLIPPED, weight="bold", bbox={"facecolor": FLIPPED_BACK, "linewidth": 0, "pad": 2})
    add("asked, took another candidate", 0.35)
    add("27", 0.08, **(mono | {"size": WAS_SIZE}), color=STUDENT)
    add("the student's own token there", 0)


def draw(report: dict, path: str | Path) -> Path:
    """Draws the content of a report.json as one PNG, 1400 pixels wide, and returns its `path`.

    Raises:
        ValueError: where the report has no rows.
    """
    rows, examples = report["rows"], report.get("examples", [])[:2]
    if not rows:
        raise ValueError("`report` has no rows: there is nothing to draw.")
    has_hits = bool(report.get("hit_at_k"))
    metrics = report["meta"].get("selector_metrics") or {}
    has_metrics = any(name in metrics for name in AGREEMENT)
    num_groups = len({group_of(row) for row in rows})
    least = 4.2 if has_hits and has_metrics else 3.2  # as tall as what stands beside the bars
    bars_height = max(0.245 * (len(rows) + 1.2 * num_groups) + 0.2, least)
    text_height = max(map(example_height, examples), default=0.0)
    head, gap = 0.85, 0.65
    height = head + bars_height + gap + (0.5 + text_height if examples else 0.0) + 0.1
    figure = plt.figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        """Axes in inches from the top left corner."""
        return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

    draw_title(figure, report["meta"], height)
    draw_bars(place(2.95, head, 4.7 if has_hits or has_metrics else 8.2, bars_height), rows)
    agreement_height = 1.35 if has_metrics else 0.0
    if has_hits:
        room = bars_height - 0.45 - (agreement_height + 1.0 if has_metrics else 0.0)
        draw_hits(place(9.35, head + 0.4, 4.5, max(min(room, 3.4), 1.2) + 0.45), report["hit_at_k"])
    if has_metrics:
        top = head + (bars_height - agreement_height if has_hits else 0.45)
        draw_agreement(place(11.1, top, 2.55, agreement_height), metrics)
    if examples:
        top = head + bars_height + gap + 0.15
        draw_legend(figure, 0.35 / WIDTH, 1 - top / height)
        for number, example in enumerate(examples):
            left, tall = 0.35 + 6.85 * number, example_height(example)
            draw_example(place(left, top + 0.35, EXAMPLE_WIDTH, tall), example)
    return save_png(figure, Path(path))


def draw_title(figure: Figure, meta: dict, height: float) -> None:
    style = {"ha": "left", "va": "center", "parse_math": False}
    title = f"Select to Think on {shorten(meta['model'], 60)}: {meta['num_problems']} problems"
    figure.text(0.35 / WIDTH, 1 - 0.28 / height, title, **style, size=15, weight="bold", color=INK)
    line = f"teacher {shorten(meta.get('teacher_model'), 50)}  ·  data {shorten(meta['dataset'], 60)}"
    figure.text(0.35 / WIDTH, 1 - 0.56 / height, line, **style, size=10, color=FAINT)


def main() -> None:
    parser = SmallParser("What is drawn, and where it goes", "[--output FILE.png] FOLDER")
    parser.add_argument("report", metavar="FOLDER", type=Path, help="Folder of `s2t eval`, or its report.json.")
    text = "File of the picture, beside which the page and the charts go (default: report.png beside the report)."
    parser.add_argument("--output", type=Path, help=text)
    args = parser.parse_args()
    file, report = read_report(args.report)
    picture = draw(report, args.output or file.with_name("report.png"))
    for path in (picture, *write_page(report, file.parent, picture)):
        print(path)
