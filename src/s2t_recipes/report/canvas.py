"""A sheet to draw on that becomes an inline SVG and a PNG alike. Knows shapes, texts and colours by name; no data.

Lengths are CSS pixels from the top left corner. In the SVG a colour is a class, so that the page decides what it is in
light and in dark; in the PNG it is one of `COLORS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import patheffects  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Polygon  # noqa: E402

from transformers_s2t.files import atomic_write  # noqa: E402


#: Colours on white. report_page/style.css has the same names for both schemes.
COLORS = {
    "ink": "#1f2430",
    "faint": "#5f6776",
    "grid": "#e1e4ea",
    "free": "#0f7a59",
    "teacher": "#2f67a3",
    "warm": "#a8620a",
    "bad": "#b3372b",
    "plain": "#6b7484",
}
CHARACTER = 0.57  # of a font's size: how wide a character is, a little more than in most sans-serif fonts
PNG_DPI = 200


def text_width(text: str, size: float) -> float:
    return len(text) * CHARACTER * size


@dataclass(frozen=True)
class Box:
    """A rectangle of a sheet."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def grown(self, by: float) -> Box:
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)


@dataclass
class Canvas:
    """Shapes in the order in which they are drawn. `name` is the text for screen readers."""

    width: float
    height: float
    name: str
    shapes: list[tuple] = field(default_factory=list)

    def line(self, points, color: str, width: float = 1, dash: float = 0, opacity: float = 1) -> None:
        self.shapes.append(("line", list(points), color, width, dash, opacity))

    def area(self, points, color: str, opacity: float = 1) -> None:
        self.shapes.append(("area", list(points), color, opacity))

    def mark(self, shape: str, x: float, y: float, radius: float, color: str, hollow=False, tip: str = "") -> None:
        """A "circle", "square" or "diamond"."""
        self.shapes.append(("mark", shape, x, y, radius, color, hollow, tip))

    def dots(self, points, radius: float, color: str, opacity: float) -> None:
        self.shapes.append(("dots", list(points), radius, color, opacity))

    def text(
        self, x: float, y: float, text: str, color: str = "ink", anchor: str = "start", size: float = 13, bold=False
    ) -> None:
        """Text with a seam in the paper's colour. `y` is the middle of the line, `anchor` start, middle or end."""
        self.shapes.append(("text", x, y, text, color, anchor, size, bold))


# ---------------------------------------------------------------------------------------------------------------------
# SVG


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def to_svg(canvas: Canvas, css_class: str) -> str:
    """One inline element that grows and shrinks with its place."""
    shapes = "".join(_SVG[kind](*shape) for kind, *shape in canvas.shapes)
    box = f"0 0 {_n(canvas.width)} {_n(canvas.height)}"
    return f'<svg class="{css_class}" viewBox="{box}" role="img" aria-label="{escape(canvas.name)}">{shapes}</svg>'


def _path(points) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _svg_line(points, color, width, dash, opacity) -> str:
    more = f' stroke-dasharray="{_n(dash)} {_n(dash)}"' if dash else ""
    more += f' stroke-opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<path class="s-{color}" d="{_path(points)}" fill="none" stroke-width="{_n(width)}"{more}/>'


def _svg_area(points, color, opacity) -> str:
    return f'<path class="f-{color}" d="{_path(points)}Z" fill-opacity="{opacity:g}"/>'


def _svg_mark(shape, x, y, radius, color, hollow, tip) -> str:
    look = f'class="s-{color} f-paper" stroke-width="2"' if hollow else f'class="f-{color} s-paper" stroke-width="1"'
    tip = f"<title>{escape(tip)}</title>" if tip else ""
    if shape == "circle":
        return f'<circle {look} cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}">{tip}</circle>'
    return f'<path {look} d="{_path(_corners(shape, x, y, radius))}Z">{tip}</path>'


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "diamond":
        radius *= 1.25
        return [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
    radius *= 0.9
    return [(x - radius, y - radius), (x + radius, y - radius), (x + radius, y + radius), (x - radius, y + radius)]


def _svg_dots(points, radius, color, opacity) -> str:
    """Eight paths: the dots of one do not darken where they lie on one another, those of several do."""
    look = f'class="s-{color}" stroke-width="{_n(2 * radius)}" stroke-linecap="round" stroke-opacity="{opacity:g}"'
    parts = ["".join(f"M{_n(x)} {_n(y)}h0" for x, y in points[start::8]) for start in range(8)]
    return "".join(f'<path {look} d="{path}"/>' for path in parts if path)


def _svg_text(x, y, text, color, anchor, size, bold) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text class="t-{color}" x="{_n(x)}" y="{_n(y + 0.35 * size)}" font-size="{_n(size)}" '
        f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
    )


_SVG = {"line": _svg_line, "area": _svg_area, "mark": _svg_mark, "dots": _svg_dots, "text": _svg_text}


# ---------------------------------------------------------------------------------------------------------------------
# PNG


def to_png(canvas: Canvas, path: Path, title: str) -> Path:
    """The same with a title above it, whole or not at all."""
    head = 44
    height = canvas.height + head
    figure = plt.figure(figsize=(canvas.width / 100, height / 100), dpi=PNG_DPI, facecolor="white")
    paint(canvas, figure.add_axes((0, 0, 1, canvas.height / height)))
    above = Canvas(canvas.width, head, title)
    above.text(14, head / 2 + 2, title, size=16, bold=True)
    paint(above, figure.add_axes((0, canvas.height / height, 1, head / height)))
    return save_png(figure, path)


def paint(canvas: Canvas, axes: Axes) -> None:
    """Draws a canvas on matplotlib's `axes`, which it fills; a hundred of its pixels make an inch."""
    axes.set(xlim=(0, canvas.width), ylim=(canvas.height, 0))
    axes.axis("off")
    points = 72 / 100  # of a pixel
    for order, (kind, *shape) in enumerate(canvas.shapes):
        if kind == "line":
            line, color, width, dash, opacity = shape
            style = {"color": COLORS[color], "linewidth": width * points, "alpha": opacity, "zorder": order}
            if dash:
                style["linestyle"] = (0, (dash / width, dash / width))
            axes.plot(*zip(*line), **style, solid_capstyle="butt", clip_on=False)
        elif kind == "area":
            corners, color, opacity = shape
            axes.add_patch(Polygon(corners, facecolor=COLORS[color], alpha=opacity, linewidth=0, zorder=order))
        elif kind == "mark":
            shape_name, x, y, radius, color, hollow, _ = shape
            look = {"facecolor": "white", "edgecolor": COLORS[color], "linewidth": 2 * points}
            if not hollow:
                look = {"facecolor": COLORS[color], "edgecolor": "white", "linewidth": points}
            if shape_name == "circle":
                axes.add_patch(plt.Circle((x, y), radius, **look, zorder=order))
            else:
                axes.add_patch(Polygon(_corners(shape_name, x, y, radius), **look, zorder=order))
        elif kind == "dots":
            dots, radius, color, opacity = shape
            if dots:
                area = (2 * radius * points) ** 2
                axes.scatter(*zip(*dots), s=area, color=COLORS[color], alpha=opacity, linewidths=0, zorder=order)
        else:
            x, y, text, color, anchor, size, bold = shape
            side = {"start": "left", "middle": "center", "end": "right"}[anchor]
            look = {"color": COLORS[color], "size": size * points, "weight": "bold" if bold else "normal"}
            place = {"ha": side, "va": "center_baseline", "zorder": order}
            drawn = axes.text(x, y, text, **look, **place, parse_math=False)
            drawn.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def save_png(figure: Figure, path: Path) -> Path:
    """Writes a figure at its own resolution, whole or not at all, closes it and returns `path`."""
    with atomic_write(path) as out:
        figure.savefig(out, dpi=figure.dpi, format="png", metadata={"Software": None})
    plt.close(figure)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Labels that do not lie on one another


def place_labels(
    anchors: list[tuple[float, float]], texts: list[str], size: float, room: Box, obstacles: list[Box], thin: list[Box]
) -> list[tuple[Box, bool]]:
    """Where the label of each point goes: near it, inside `room`, off other labels, points and leaders.

    Args:
        anchors, texts: points in pixels, and the label of each.
        size: size of the font, in pixels.
        room: box in which labels stay.
        obstacles, thin: boxes that no label may lie on, and boxes that a label had better not lie on.

    Returns:
        Box of each label, and whether it is far enough from its point to need a line to it.
    """
    directions = [(math.cos(math.tau * k / 16), math.sin(math.tau * k / 16)) for k in range(16)]
    placed: list[tuple[float, Box, tuple] | None] = [None] * len(anchors)

    def options(number: int):
        (x, y), wide, tall = anchors[number], text_width(texts[number], size), 1.15 * size
        for distance in (11, 16, 24, 34, 46, 60, 76, 94, 114, 138, 166, 200, 240, 290, 350, 420):
            for dx, dy in directions:
                # the side of the label that faces the point is `distance` away from it
                middle_x = x + dx * (distance + wide / 2 * (abs(dx) > 0.3))
                middle_y = y + dy * (distance + tall / 2 * (abs(dx) <= 0.3))
                box = Box(middle_x - wide / 2, middle_y - tall / 2, middle_x + wide / 2, middle_y + tall / 2)
                if box.left >= room.left and box.right <= room.right and room.top <= box.top <= room.bottom - tall:
                    yield distance + 6 * abs(dy) * (distance < 20), box

    def cost(number: int, distance: float, box: Box) -> float:
        leader = (anchors[number], _nearest(box, anchors[number]))
        total = distance
        for other in obstacles:
            x, y = anchors[number]
            inside = other.left <= x <= other.right and other.top <= y <= other.bottom
            total += 2000 * box.overlaps(other) + 40 * (not inside and _crosses(leader, other))
        total += sum(12 * box.overlaps(other) for other in thin)
        for place, known in enumerate(placed):
            if known is None or place == number:
                continue
            _, other, other_leader = known
            total += 3000 * box.grown(1).overlaps(other)
            total += 400 * _crosses(leader, other) + 400 * _crosses(other_leader, box)
            total += 150 * _meet(leader, other_leader)
        return total

    def crowd(number: int) -> int:
        return sum(math.dist(anchors[number], other) < 40 for other in anchors)

    order = sorted(range(len(anchors)), key=lambda number: (-crowd(number), number))
    for _ in range(4):
        for number in order:
            # a label that fits nowhere is set below its point, come what may
            (x, y), half = anchors[number], text_width(texts[number], size) / 2
            last = (0.0, 11, Box(x - half, y + 11, x + half, y + 11 + size))
            tried = ((cost(number, far, box), far, box) for far, box in options(number))
            _, far, box = min(tried, key=lambda item: item[0], default=last)
            placed[number] = (far, box, (anchors[number], _nearest(box, anchors[number])))
    return [(box, far > 16) for far, box, _ in placed]


def _nearest(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    """The point on the edge of a box that faces `point`: the nearest on a long side, the middle of a short one."""
    x, y = point
    if box.left - 4 <= x <= box.right + 4:
        return min(max(x, box.left), box.right), box.top if y < box.top else box.bottom
    return box.left if x < box.left else box.right, (box.top + box.bottom) / 2


def _meet(first, second) -> bool:
    """Whether two lines cross."""
    (a, b), (c, d) = first, second

    def side(p, q, r) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def _crosses(line, box: Box) -> bool:
    """Whether a line touches a box."""
    (x, y), (u, v) = line
    if Box(min(x, u), min(y, v), max(x, u), max(y, v)).grown(0.01).overlaps(box):
        if any(box.left < px < box.right and box.top < py < box.bottom for px, py in line):
            return True
        falling = ((box.left, box.top), (box.right, box.bottom))
        rising = ((box.left, box.bottom), (box.right, box.top))
        return _meet(line, falling) or _meet(line, rising)
    return False


def spread(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """The positions, moved as little as it takes to be `gap` apart inside [low, high] (where there is room)."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    moved = [positions[i] for i in order]
    for _ in range(200):
        for i in range(1, len(moved)):
            overlap = gap - (moved[i] - moved[i - 1])
            if overlap > 0:
                moved[i - 1] -= overlap / 2
                moved[i] += overlap / 2
        moved = [min(max(y, low + i * gap), high - (len(moved) - 1 - i) * gap) for i, y in enumerate(moved)]
    return [y for _, y in sorted(zip(order, moved))]
