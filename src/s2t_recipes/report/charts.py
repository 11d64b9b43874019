"""The pictures of a report: what each shows, at desktop and at phone width, with its figures as a table.

Knows the rows of a report and labelled points; knows no models, files or HTML. Every chart is a [`Chart`] or `None`
where the report does not hold what it needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from s2t_recipes.estimates import divergence_buckets
from s2t_recipes.report.canvas import Box, Canvas, place_labels, spread, text_width
from s2t_recipes.row_names import TRIGGERS, group_of, label_of, name_of


WIDE, HALF, NARROW = 1120, 556, 340  # pixels
MAX_DOTS = 6000
#: Ranks of the teacher's token that share a sector: first and last.
SECTORS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16))


@dataclass(frozen=True)
class Chart:
    """One picture. `head` and `rows` are its figures."""

    name: str
    title: str
    caption: str
    wide: Canvas
    narrow: Canvas
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Point:
    """A labelled decision point.

    Attributes:
        divergence: divergence of the teacher from the student, nats.
        rank: rank of the teacher's token among the student's candidates, from 1; `None` where it is not among them.
        best: rank of the candidate above the floor that the teacher likes best, from 1.
        num_above: number of candidates above the floor.
    """

    divergence: float
    rank: int | None
    best: int
    num_above: int


def per_cent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ---------------------------------------------------------------------------------------------------------------------
# Axes


class Axes:
    """A plot's box and its two scales."""

    def __init__(self, canvas: Canvas, box: Box, x: tuple[float, float], y: tuple[float, float], log_x: bool = False):
        self.canvas, self.box, self.log_x = canvas, box, log_x
        self.x_low, self.x_high = map(math.log, x) if log_x else x
        self.y_low, self.y_high = y

    def x(self, value: float) -> float:
        value = math.log(value) if self.log_x else value
        return self.box.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.box.right - self.box.left)

    def y(self, value: float) -> float:
        return self.box.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.box.bottom - self.box.top)

    def grid(self, x_ticks: list[tuple[float, str]], y_ticks: list[float], x_title: str, unit: str = "") -> None:
        box = self.box
        for value in y_ticks:
            self.canvas.line([(box.left, self.y(value)), (box.right, self.y(value))], "grid")
            self.canvas.text(box.left - 8, self.y(value), f"{value:g}{unit}", "faint", "end")
        self.canvas.line([(box.left, box.bottom), (box.right, box.bottom)], "faint")
        for value, text in x_ticks:
            at = self.x(value)
            self.canvas.line([(at, box.bottom), (at, box.bottom + 4)], "faint")
            self.canvas.text(at, box.bottom + 15, text, "faint", "middle")
        self.canvas.text((box.left + box.right) / 2, box.bottom + 36, x_title, "ink", "middle")


def ticks(low: float, high: float, number: int = 6) -> list[float]:
    """Round numbers inside [low, high]."""
    rough = (high - low) / number
    power = 10 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, room: float, gap: float = 40) -> list[float]:
    """Round numbers inside [low, high], `gap` pixels apart or more on a logarithmic axis `room` pixels long."""
    for bases in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        decades = [base * 10.0**power for power in range(-7, 7) for base in bases]
        chosen = sorted(value for value in decades if low <= value <= high)
        gaps = [math.log(after / before) for before, after in zip(chosen, chosen[1:])]
        if not gaps or min(gaps) / math.log(high / low) * room >= gap:
            break
    return chosen


def y_range(rows: list[dict], pad: float = 0.06) -> tuple[float, float]:
    low = min(row["accuracy_ci"][0] for row in rows)
    high = max(row["accuracy_ci"][1] for row in rows)
    gap = max(pad * (high - low), 0.4)
    return max(low - gap, -0.5), high + gap


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy against cost


def cost_chart(rows: list[dict]) -> Chart | None:
    """Accuracy against time, one mark a policy; where many crowd at the top, they get a panel of their own."""
    timed = [row for row in rows if row.get("seconds_vs_greedy") is not None]
    if len(timed) < 2:
        return None
    crowd = crowd_of(timed)
    left_out = len(rows) - len(timed)
    return Chart(
        "cost",
        "Accuracy against time",
        "Time in generate relative to greedy in the same run, logarithmic; bars are 95 % intervals of the accuracy. "
        + ("The panel of the best shows the frame again, larger. " if crowd else "")
        + (f"Without a time of the same run: {left_out} of {len(rows)} policies." if left_out else ""),
        draw_cost(timed, crowd, WIDE),
        draw_cost(timed, crowd, NARROW),
        ("policy", "time", "accuracy", "95 % interval", "needs the larger model"),
        [
            (
                label_of(row),
                f"{row['seconds_vs_greedy']:.2f}×",
                f"{row['accuracy']:.1f}",
                "{:.1f} to {:.1f}".format(*row["accuracy_ci"]),
                "yes" if row["uses_teacher"] else "no",
            )
            for row in sorted(timed, key=lambda row: row["seconds_vs_greedy"])
        ],
    )


def crowd_of(rows: list[dict]) -> list[dict]:
    """The best policies, which need a panel of their own; none where all policies can be told apart without one."""
    best, worst = (choose(row["accuracy"] for row in rows) for choose in (max, min))
    top = [row for row in rows if row["accuracy"] >= best - 0.15 * (best - worst)]
    return top if len(top) >= 4 and best - worst > 12 and len(top) < len(rows) else []


def draw_cost(rows: list[dict], crowd: list[dict], width: float) -> Canvas:
    narrow = width < WIDE
    count = f"{len(rows)} policies"
    best = max(rows, key=lambda row: row["accuracy"])
    name = (
        f"Scatter plot of accuracy against time of {count}. The best is {label_of(best)} with {best['accuracy']:.1f}."
    )
    numbered = sorted(rows, key=lambda row: -row["accuracy"]) if narrow else []
    tall = 330 if narrow else 500
    list_height = 22 * len(numbered) + 24 if narrow else 0
    panels = (2 if narrow else 1) if crowd else 1
    canvas = Canvas(width, 34 + panels * (tall + (20 if panels > 1 else 0)) + list_height, name)
    legend(canvas, narrow)
    names = {id(row): str(place + 1) for place, row in enumerate(numbered)} or {id(row): short(row) for row in rows}
    rest = [row for row in rows if not any(row is other for other in crowd)]
    first = Box(54, 44, width - 14 if narrow or not crowd else 0.37 * width, 34 + tall - 52)
    x_all, y_all = x_range(rows), y_range(rows)
    frame = (x_range(crowd, 0.1), y_range(crowd, 0.04)) if crowd else None
    plot_cost(canvas, first, rows, rest if crowd else rows, names, x_all, y_all, frame)
    if crowd:
        top = 34 + tall + 30 if narrow else 44
        second = Box(54 if narrow else first.right + 64, top, width - 14, top + tall - 62)
        plot_cost(canvas, second, crowd, crowd, names, *frame, None)
        box_edges(canvas, second, "faint")
    if narrow:
        y = canvas.height - list_height + 14
        for place, row in enumerate(numbered):
            canvas.text(22, y, str(place + 1), color_of(row), "end", bold=True)
            canvas.text(30, y, label_of(row))
            canvas.text(width - 6, y, f"{row['accuracy']:.1f}", "ink", "end")
            y += 22
    return canvas


def short(row: dict) -> str:
    """The label beside a point. It leaves out who selects in S2T, which the colour says."""
    return label_of(row).replace(" (teacher selects)", "")


def x_range(rows: list[dict], pad: float = 0.12) -> tuple[float, float]:
    values = [math.log(row["seconds_vs_greedy"]) for row in rows]
    gap = max(pad * (max(values) - min(values)), 0.08)
    return math.exp(min(values) - gap), math.exp(max(values) + gap)


def color_of(row: dict) -> str:
    return "teacher" if row["uses_teacher"] else "free"


def legend(canvas: Canvas, narrow: bool) -> None:
    x = 8.0
    texts = ("runs without the larger model", "needs the larger model", "control (hollow)")
    if narrow:
        texts = ("no larger model", "needs it", "control")
    marks = (("circle", "free", False), ("square", "teacher", False), ("circle", "plain", True))
    for (shape, color, hollow), text in zip(marks, texts):
        canvas.mark(shape, x + 6, 12, 6, color, hollow)
        canvas.text(x + 18, 12, text)
        x += 18 + text_width(text, 13) + 18


def box_edges(canvas: Canvas, box: Box, color: str, dash: float = 0) -> None:
    corners = [(box.left, box.top), (box.right, box.top), (box.right, box.bottom), (box.left, box.bottom)]
    canvas.line([*corners, corners[0]], color, 1, dash)


def plot_cost(canvas: Canvas, box: Box, rows, labelled, names, x, y, frame) -> None:
    """One panel: marks for `rows`, labels for those in `labelled`, and a dashed `frame` around what another shows."""
    axes = Axes(canvas, box, x, y, log_x=True)
    x_ticks = [(value, f"{value:g}×") for value in log_ticks(*x, box.right - box.left)]
    axes.grid(x_ticks, [value for value in ticks(*y) if value <= 100], "time relative to greedy", " %")
    obstacles, thin = [], []
    if frame:
        (left, right), (low, high) = frame
        around = Box(axes.x(left), axes.y(high), axes.x(right), axes.y(low))
        box_edges(canvas, around, "faint", 3)
        obstacles.append(around)
        canvas.text(around.left + 2, around.bottom + 11, f"the best {len(rows) - len(labelled)}", "faint")
        wide = text_width("the best 00", 13)
        obstacles.append(Box(around.left, around.bottom, around.left + wide, around.bottom + 20))
    for row in rows:
        at, (low, high) = axes.x(row["seconds_vs_greedy"]), map(axes.y, row["accuracy_ci"])
        canvas.line([(at, low), (at, high)], color_of(row), 1.5, opacity=0.45)
        thin.append(Box(at - 1, high, at + 1, low))
    anchors = {id(row): (axes.x(row["seconds_vs_greedy"]), axes.y(row["accuracy"])) for row in rows}
    obstacles += [Box(px - 7, py - 7, px + 7, py + 7) for px, py in anchors.values()]
    texts = [names[id(row)] for row in labelled]
    points = [anchors[id(row)] for row in labelled]
    room = Box(box.left + 4, box.top + 2, box.right + 8, box.bottom)
    placed = place_labels(points, texts, 13, room, obstacles, thin)
    ends = [label_end(where, point) for (where, _), point in zip(placed, points)]
    for (_, far), point, (end, _) in zip(placed, points, ends):
        if far:
            canvas.line([point, end], "faint", 1, opacity=0.75)
    for row in rows:
        px, py = anchors[id(row)]
        control = group_of(row) == "control"
        low, high = row["accuracy_ci"]
        tip = f"{label_of(row)}: {row['accuracy']:.1f} % ({low:.1f} to {high:.1f}), {row['seconds_vs_greedy']:.2f}×"
        canvas.mark("square" if row["uses_teacher"] else "circle", px, py, 6, color_of(row), control, tip)
    for row, text, (where, _), (end, anchor) in zip(labelled, texts, placed, ends):
        x_text = (where.left + where.right) / 2 if anchor == "middle" else end[0]
        canvas.text(x_text, (where.top + where.bottom) / 2, text, color_of(row), anchor)


def label_end(where: Box, point: tuple[float, float]) -> tuple[tuple[float, float], str]:
    """Where the line to a label ends, and from where its text is to be set, so that it is as near as it looks."""
    middle = (where.left + where.right) / 2, (where.top + where.bottom) / 2
    if point[0] < where.left:
        return (where.left, middle[1]), "start"
    if point[0] > where.right:
        return (where.right, middle[1]), "end"
    return (middle[0], where.top if point[1] < middle[1] else where.bottom), "middle"


# ---------------------------------------------------------------------------------------------------------------------
# Hit@K


def hits_chart(hit_at_k: dict[str, float]) -> Chart | None:
    if not hit_at_k:
        return None
    return Chart(
        "hits",
        "Hit@K: is the teacher's token within reach?",
        "Share of the points where student and teacher diverge most at which the teacher's own token is among the "
        "student's first K candidates.",
        draw_hits(hit_at_k, HALF),
        draw_hits(hit_at_k, NARROW),
        ("K", "share of points"),
        [(str(size), f"{100 * share:.2f} %") for size, share in sorted_hits(hit_at_k)],
    )


def sorted_hits(hit_at_k: dict[str, float]) -> list[tuple[int, float]]:
    """K and Hit@K as a share, by growing K."""
    return sorted((int(size), share) for size, share in hit_at_k.items())


def draw_hits(hit_at_k: dict[str, float], width: float, height: float = 360) -> Canvas:
    """Hit@K in per cent as a line over K, every point with its figure."""
    hits = [(size, 100 * share) for size, share in sorted_hits(hit_at_k)]
    name = "Line of Hit@K: " + ", ".join(f"{value:.1f} per cent at {size}" for size, value in hits)
    canvas = Canvas(width, height, name)
    axes = Axes(canvas, Box(52, 20, width - 24, height - 50), (-0.3, len(hits) - 0.7), (0, 106))
    x_ticks = [(place, str(size)) for place, (size, _) in enumerate(hits)]
    axes.grid(x_ticks, [0, 25, 50, 75, 100], "K: the student's best candidates", " %")
    points = [(axes.x(place), axes.y(value)) for place, (_, value) in enumerate(hits)]
    canvas.line(points, "free", 2.5)
    for place, ((x, y), (size, value)) in enumerate(zip(points, hits)):
        canvas.mark("circle", x, y, 5, "free", tip=f"Hit@{size}: {value:.2f} %")
        canvas.text(x + (0 if place else 12), y + 20, f"{value:.1f}", "ink", "middle", bold=True)
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Labelled points: divergence and rank


def sectors_of(depth: int) -> list[tuple[str, int, int | None]]:
    """Name, first and last rank of each sector, for candidates `depth` deep; the last sector is beyond them."""
    kept = [(first, min(last, depth)) for first, last in SECTORS if first <= depth]
    named = [(str(first) if first == last else f"{first}–{last}", first, last) for first, last in kept]
    return [*named, ("beyond", kept[-1][1] + 1, None)]


def radial_chart(points: list[Point], depth: int, num_candidates: int) -> Chart | None:
    """All points of top divergence: the angle is the rank of the teacher's token, the radius the divergence."""
    if not points:
        return None
    sectors = sectors_of(depth)
    members = [
        sorted(point.divergence for point in points if _in_sector(point.rank, first, last))
        for _, first, last in sectors
    ]
    counts = [len(values) for values in members]
    reach = sum(count for count, (_, _, last) in zip(counts, sectors) if last is not None and last <= num_candidates)
    step = max(1, math.ceil(len(points) / MAX_DOTS))
    low = max(min(point.divergence for point in points), 1e-6)
    high = max(max(point.divergence for point in points), 1.01 * low)

    def draw(width: float) -> Canvas:
        narrow = width < HALF
        side = 68 if narrow else 100
        outer = width / 2 - side
        inner = 0.2 * outer
        middle_x, middle_y = width / 2, outer + (46 if narrow else 40)
        canvas = Canvas(
            width,
            2 * outer + (92 if narrow else 80),
            "Polar plot of the rank of the teacher's token at the points of top divergence: "
            + ", ".join(f"{count} at rank {name}" for count, (name, *_) in zip(counts, sectors)),
        )

        def radius(value: float) -> float:
            share = (math.log(max(value, low)) - math.log(low)) / (math.log(high) - math.log(low))
            return inner + (outer - inner) * share

        def at(angle: float, distance: float) -> tuple[float, float]:
            """Clockwise from the top, in turns."""
            turn = math.tau * angle
            return middle_x + distance * math.sin(turn), middle_y - distance * math.cos(turn)

        share = 1 / len(sectors)
        rings = log_ticks(low, high, outer - inner, 17)
        for ring in (*map(radius, rings), inner, outer):
            canvas.line([at(k / 72, ring) for k in range(73)], "grid")
        for k in range(len(sectors)):
            canvas.line([at((k - 0.5) * share, inner), at((k - 0.5) * share, outer)], "faint", 1, opacity=0.5)
        for k, ((name, _, last), values) in enumerate(zip(sectors, members)):
            within = last is not None and last <= num_candidates
            color = "plain" if last == 1 else "free" if within else "bad"
            shown = values[::step]
            random = Random(k)  # where in its sector a dot lies means nothing
            dots = [at((k - 0.45 + 0.9 * random.random()) * share, radius(value)) for value in shown]
            crowded = len(shown) > 300
            canvas.dots(dots, 1.6 if crowded else 2.4, color, 0.55 if crowded else 0.8)
            x, y = at(k * share, outer + 12)
            turn = math.sin(math.tau * k * share)
            anchor = "middle" if abs(turn) < 0.2 else "start" if turn > 0 else "end"
            up = -10 if math.cos(math.tau * k * share) > 0.2 else 8
            title = name if last is None else f"rank {name}"
            count, part = str(len(values)), per_cent(len(values) / len(points))
            lines = [count, part] if narrow and anchor != "middle" else [f"{count} · {part}"]
            canvas.text(x, y + up - 8, title, color, anchor, bold=True)
            for number, line in enumerate(lines):
                canvas.text(x, y + up + 8 + 16 * number, line, "ink", anchor)
        for ring in rings:
            x, y = at(-0.5 * share, radius(ring))
            canvas.text(x, y, f"{ring:g}", "faint", "middle")
        return canvas

    sampled = f" Every {step}th dot is drawn." if step > 1 else ""
    return Chart(
        "divergence",
        "Where the two models part ways",
        f"Each dot is one of the {len(points)} points of top divergence. Its sector is the rank of the teacher's "
        f"token among the student's candidates; the farther out, the larger the divergence (nats, logarithmic, "
        f"{low:.2g} to {high:.2g}). Green: within reach of a selector that is offered {num_candidates} candidates, "
        f"{per_cent(reach / len(points))} with rank 1." + sampled,
        draw(HALF),
        draw(NARROW),
        ("rank of the teacher's token", "points", "share", "median divergence"),
        [
            (name, str(count), per_cent(count / len(points)), f"{values[count // 2]:.3f}" if count else "–")
            for (name, *_), count, values in zip(sectors, counts, members)
        ],
    )


def _in_sector(rank: int | None, first: int, last: int | None) -> bool:
    return (rank is None or rank >= first) if last is None else (rank is not None and first <= rank <= last)


def buckets_chart(points: list[Point], num_candidates: int, fidelity: dict | None = None) -> Chart | None:
    """Agreement with the teacher by how far it diverges, in buckets with about as many points each.

    Args:
        points: labelled points; read only where there is no `fidelity`.
        num_candidates: number of candidates that a selector is offered.
        fidelity: the report's comparison of its adapters with the teacher; with one they get a line too.
    """
    buckets = fidelity["buckets"] if fidelity else buckets_of(points, num_candidates)
    if buckets is None:
        return None
    edges, counts, rates = buckets["edges"], buckets["num_points"], buckets["rates"]
    lines = {name: (*look, rates[key]) for key, (name, *look) in bucket_lines(num_candidates).items() if key in rates}

    def draw(width: float) -> Canvas:
        narrow = width < HALF
        canvas = Canvas(width, 390 if narrow else 436, "Lines of agreement with the teacher by divergence")
        right = width - (14 if narrow else 130)
        axes = Axes(canvas, Box(52, 58 if narrow else 20, right, canvas.height - 50), (0, len(counts)), (0, 104))
        axes.grid(
            [(k, f"{edges[k]:.2g}") for k in range(0, len(edges), 2)],
            [0, 25, 50, 75, 100],
            "divergence in nats" + ("" if narrow else " (equal shares of the points)"),
            " %",
        )
        ends = []
        for name, (color, shape, radius, values) in lines.items():
            spots = [(axes.x(k + 0.5), axes.y(100 * value)) for k, value in enumerate(values)]
            canvas.line(spots, color, 2.5)
            for k, (x, y) in enumerate(spots):
                tip = f"{name}, {edges[k]:.3g} to {edges[k + 1]:.3g} nats: {per_cent(values[k])}"
                canvas.mark(shape, x, y, radius, color, tip=tip)
            ends.append(spots[-1][1])
        if narrow:
            x = 8.0
            for place, (name, (color, shape, *_)) in enumerate(lines.items()):
                y = 12 if place < 2 else 34
                x = 8.0 if place in (0, 2) else x
                canvas.mark(shape, x + 6, y, 5, color)
                canvas.text(x + 16, y, name, color)
                x += 16 + text_width(name, 13) + 18
        else:
            for (name, (color, *_)), y in zip(lines.items(), spread(ends, 18, axes.box.top, axes.box.bottom)):
                canvas.text(right - 12, y, name, color)
        return canvas

    total = sum(counts)
    return Chart(
        "agreement",
        "Agreement with the teacher by divergence",
        f"All {total} labelled points, in {len(counts)} buckets of about {total // len(counts)}. First "
        "and second: the student's candidate is the one that the teacher likes best of those above the floor (where "
        f"only one is above it, the second is the first). Hit@{num_candidates}: the teacher's own token is among the "
        f"first {num_candidates}." + (fidelity_in_words(fidelity) if fidelity else ""),
        draw(HALF),
        draw(NARROW),
        ("divergence", "points", *lines),
        [
            (f"{low:.3g} to {high:.3g}", str(count), *map(per_cent, shares))
            for low, high, count, *shares in zip(edges, edges[1:], counts, *(values for *_, values in lines.values()))
        ],
    )


def buckets_of(points: list[Point], num_candidates: int) -> dict | None:
    """Rates by divergence that labels give without a selector."""
    hits = {
        "hit_at_k": [(point.rank or 10**9) <= num_candidates for point in points],
        "student_first": [point.best == 1 for point in points],
        "second_candidate": [point.best == min(2, point.num_above) for point in points],
    }
    return divergence_buckets([point.divergence for point in points], hits)


def bucket_lines(num_candidates: int) -> dict[str, tuple[str, str, str, float]]:
    """Key of the rates -> name, colour, mark and its radius. Marks drawn later are smaller, so that equal lines can be
    told apart."""
    return {
        "hit_at_k": (f"Hit@{num_candidates}", "teacher", "square", 7),
        "student_first": ("student's first", "plain", "circle", 6),
        "second_candidate": ("second candidate", "warm", "circle", 5),
        "selector": ("S2T-Local", "free", "circle", 3.5),
    }


def fidelity_in_words(fidelity: dict) -> str:
    """Explains the line of the selectors, and gives its overall figures."""
    number = fidelity["num_seeds"]
    words = " S2T-Local: the selector chooses the teacher's best above the floor"
    words += f" (mean of {number} adapters)." if number > 1 else "."
    if (choice := fidelity["agree_at_1"]["choice"]) is not None:
        value, low, high = (100 * edge for edge in (choice["selector"]["value"], *choice["selector"]["ci"]))
        words += (
            f" Of the {choice['num_points']} points with two or more above it, it does so at {value:.1f} % "
            f"({low:.1f} to {high:.1f})."
        )
    if (order := fidelity["spearman"]) is not None:
        words += (
            f" Rank correlation of its scores with the teacher's at the {order['num_points']} points with three or "
            f"more: {order['value']:.2f}."
        )
    return words


# ---------------------------------------------------------------------------------------------------------------------
# Trigger rates


def rates_chart(rows: list[dict]) -> Chart | None:
    """Accuracy against the achieved rate: a line for each policy and trigger that was run at two rates or more."""
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["target_rate"] is not None and row["achieved_rate"] is not None:
            lines.setdefault((row["policy"], row["trigger"]), []).append(row)
    lines = {key: members for key, members in lines.items() if len(members) > 1}
    if not lines:
        return None
    for members in lines.values():
        members.sort(key=lambda row: row["achieved_rate"])
    drawn = [row for members in lines.values() for row in members]

    def draw(width: float) -> Canvas:
        narrow = width < HALF
        list_height = 22 * len(lines) + 8 if narrow else 0
        canvas = Canvas(width, 360 + list_height, f"Lines of accuracy against the rate of {len(lines)} policies")
        right = width - (26 if narrow else 218)
        high = 100 * max(row["achieved_rate"] for row in drawn)
        y = y_range(drawn)
        axes = Axes(canvas, Box(52, 20, right, 310), (0, 1.06 * high), y)
        x_ticks = [(value, f"{value:g} %") for value in ticks(0, 1.06 * high, 4)]
        axes.grid(x_ticks, [value for value in ticks(*y) if value <= 100], "triggered share of the tokens", " %")
        ends = []
        for number, members in enumerate(lines.values()):
            color = color_of(members[0])
            spots = [(axes.x(100 * row["achieved_rate"]), axes.y(row["accuracy"])) for row in members]
            for row, (x, _) in zip(members, spots):
                canvas.line([(x, axes.y(edge)) for edge in row["accuracy_ci"]], color, 1.5, opacity=0.35)
            canvas.line(spots, color, 2.2, DASHES[number % len(DASHES)])
            for row, (x, y_at) in zip(members, spots):
                tip = f"{label_of(row)}: {row['accuracy']:.1f} % at {100 * row['achieved_rate']:.1f} %"
                canvas.mark("square" if row["uses_teacher"] else "circle", x, y_at, 5, color, tip=tip)
            ends.append(spots[-1])
        names = [f"{name_of(policy)} · {TRIGGERS.get(trigger, trigger)}" for policy, trigger in lines]
        colors = [color_of(members[0]) for members in lines.values()]
        if narrow:
            order = sorted(range(len(names)), key=lambda i: ends[i][1])
            at = spread([ends[i][1] for i in order], 15, axes.box.top, axes.box.bottom)
            for place, (i, y_at) in enumerate(zip(order, at)):
                canvas.text(right + 6, y_at, str(place + 1), colors[i], bold=True)
                canvas.text(22, 368 + 22 * place, str(place + 1), colors[i], "end", bold=True)
                canvas.text(30, 368 + 22 * place, names[i], colors[i])
        else:
            at = spread([y for _, y in ends], 18, axes.box.top, axes.box.bottom)
            for (x, end), y_at, text, color in zip(ends, at, names, colors):
                canvas.line([(x + 7, end), (right + 4, y_at)], color, 1, opacity=0.5)
                canvas.text(right + 8, y_at, text, color)
        return canvas

    return Chart(
        "rates",
        "How often to ask",
        "Accuracy against the share of tokens at which the trigger fired, for policies that were run at several "
        "rates; bars are 95 % intervals.",
        draw(HALF),
        draw(NARROW),
        ("policy", "fired", "accuracy", "95 % interval"),
        [
            (
                label_of(row),
                per_cent(row["achieved_rate"]),
                f"{row['accuracy']:.1f}",
                "{:.1f} to {:.1f}".format(*row["accuracy_ci"]),
            )
            for row in drawn
        ],
    )


DASHES = (0, 7, 3)
