"""One page of one evaluation that needs nothing but a browser: tables, charts, and every problem token by token.

Reads a folder that `s2t eval` wrote: report.json, records/, texts.json, and the labels that the report names.
What is missing is left out of the page, which says so. The same folder gives the same bytes. Knows no models; of the
page's looks and manners (report_page/) it knows only the names that they share.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

import jinja2

from s2t_recipes.report.canvas import to_png, to_svg
from s2t_recipes.report.charts import Chart, Point, buckets_chart, cost_chart, hits_chart, radial_chart, rates_chart
from s2t_recipes.row_names import grouped, label_of
from s2t_recipes.texts import BROKEN, find_texts, ids_of, locate
from transformers_s2t.files import atomic_write


PAGE = Path(__file__).with_name("page")
MAX_MEGABYTES = 8.0
PER_CENT = "\N{NO-BREAK SPACE}%"  # a rate stays on one line
#: What is dropped, step by step, from a page that would be too large; problems come last.
REDUCTIONS = ((), ("seeds",), ("seeds", "candidates"))
#: What a record may hold beside its problem's id and whether it is right.
RECORD_FIELDS = ("answer", "num_tokens", "text", "votes", "tokens", "kinds", "student_tokens", "asked")
#: Columns of the table: title and explanation.
COLUMNS = (
    ("policy", "what decodes, when it is asked"),
    ("accuracy", "per cent of the problems, mean over the seeds"),
    ("95 % interval", "bootstrap over problems; the dashed line is greedy"),
    ("helped", "problems that greedy has wrong and the policy right"),
    ("hurt", "problems that greedy has right and the policy wrong"),
    ("p", "exact McNemar test against greedy; with several seeds the largest"),
    ("fired", "triggered steps of the generated tokens"),
    ("flips", "steps where another token than the student's first was taken"),
    ("time", "in generate, relative to greedy in the same run"),
    ("extra forwards", "batch forwards beyond those of plain decoding"),
    ("larger model", "whether it runs at inference"),
    ("seeds", "adapters that the row is the mean of"),
)


@dataclass(frozen=True)
class Run:
    """The records of one policy and seed."""

    row: dict
    seed: int | None
    header: dict
    records: list[dict]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_report(path: Path) -> tuple[Path, dict]:
    """The file and content of a `report.json`, or of the one in a folder.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is not a report.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"`report`: {file} does not exist; `s2t eval` writes it.")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`report`: {file} is not JSON ({error}).") from None
    if not isinstance(report, dict) or not isinstance(report.get("meta"), dict) or not report.get("rows"):
        raise ValueError(f"`report`: {file} has no rows: it is not a report of `s2t eval`.")
    return file, report


def read_runs(folder: Path, rows: list[dict]) -> tuple[list[Run], list[str]]:
    """The records of the rows, and a sentence for each thing that is missing.

    Records whose accuracy is not the one of the row are of another evaluation and left out.

    Raises:
        ValueError: for a file that is not records.
    """
    runs, notes = [], []
    for row in rows:
        for seed, name in record_names(row):
            file = folder / "records" / name
            if not file.is_file():
                notes.append(f"records/{file.name} is not there.")
                continue
            header, records = read_record_file(file)
            accuracy = 100 * sum(record["correct"] for record in records) / max(1, len(records))
            if abs(accuracy - row["accuracy_by_seed"][seed or 0]) > 1e-6:
                notes.append(f"records/{file.name} is of another evaluation than report.json.")
            elif runs and [record["id"] for record in records] != [record["id"] for record in runs[0].records]:
                notes.append(f"records/{file.name} is of other problems than records of the rows before.")
            else:
                runs.append(Run(row, seed, header, records))
    return runs, notes


def record_names(row: dict) -> list[tuple[int | None, str]]:
    """Seed and file of each run of a row; reports that do not name the files are from before there were others."""
    local = row["policy"].startswith("s2t-local")
    seeds = range(row["num_seeds"]) if local or row.get("is_tuned") else (None,)
    stem = row["label"].replace(":", "_")
    names = [f"{stem}_adapter{seed}.jsonl" if local else f"{stem}.jsonl" for seed in seeds]
    return list(zip(seeds, row.get("records", names)))


def read_record_file(file: Path) -> tuple[dict, list[dict]]:
    lines = []
    with open(file, encoding="utf-8") as text:
        for number, line in enumerate(text, 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"`report`: line {number} of {file} is not JSON ({error}).") from None
    fine = all(isinstance(line, dict) and {"id", "answer", "correct"} <= line.keys() for line in lines[1:])
    if len(lines) < 2 or not fine:
        raise ValueError(f"`report`: {file} does not hold records of `s2t eval`.")
    return lines[0], lines[1:]


def read_points(folder: Path, meta: dict) -> tuple[list[Point], list[Point], int]:
    """The labelled points of the report's held-out labels, those of top divergence, and how deep candidates go."""
    name = meta.get("eval_labels")
    if not name:
        return [], [], 0
    from datasets import disable_progress_bars

    from transformers_s2t.labels.folder import read_held_out_labels
    from transformers_s2t.proposals import floor_mask

    disable_progress_bars()
    try:
        labels, header = read_held_out_labels(locate(folder, name))
    except (OSError, ValueError):
        return [], [], 0
    import torch

    settings = meta.get("settings", {})
    num_candidates, ratio = settings.get("num_candidates", 8), settings.get("min_prob_ratio", 0.05)
    columns = ("prompt_length", "divergence", "positions", "candidate_ids", "student_logprobs", "teacher_logprobs")
    points, depth = [], 1
    for length, divergence, positions, ids, student, teacher, tops in zip(
        *(labels[column] for column in (*columns, "teacher_top_id"))
    ):
        if not positions:
            continue
        mask_NK = floor_mask(torch.tensor(student)[:, :num_candidates], ratio)
        best_N = torch.tensor(teacher)[:, :num_candidates].masked_fill(~mask_NK, float("-inf")).argmax(-1)
        depth = max(depth, len(ids[0]))
        for n, (position, ids_K, top) in enumerate(zip(positions, ids, tops)):
            rank = ids_K.index(top) + 1 if top in ids_K else None
            points.append(Point(divergence[position - length], rank, int(best_N[n]) + 1, int(mask_NK[n].sum())))
    threshold = None if header is None else header.divergence_threshold
    top = [] if threshold is None else [point for point in points if point.divergence >= threshold]
    return points, top, depth


# ---------------------------------------------------------------------------------------------------------------------
# Records, packed


def vocabulary(runs: list[Run]) -> list[int]:
    """Every token id of the records, the most frequent first: in the page a token is its place here, a short one."""
    counts = Counter(id for run in runs for record in run.records if "tokens" in record for id in ids_of(record))
    return sorted(counts, key=lambda id: (-counts[id], id))


def pack(run: Run, texts: dict, place: dict[int, int], drop: tuple[str, ...] = (), number: int | None = None) -> dict:
    """One run as columns.

    Args:
        run, texts: a policy and seed, and the content of `texts.json`.
        place: token id -> its place in the vocabulary.
        drop, number: "candidates" to leave them out, and number of problems (`None` for all).
    """
    records = [renumber(record, place) for record in run.records[:number]]
    packed = {
        "label": run.row["label"],
        "seed": run.seed,
        "trigger": run.row["trigger"],
        "threshold": run.header.get("settings", {}).get("threshold"),
        "correct": "".join("01"[record["correct"]] for record in records),
    }
    for name in RECORD_FIELDS:
        if any(name in record for record in records) and not (name == "asked" and "candidates" in drop):
            packed[name] = [record.get(name) for record in records]
    if "tokens" in packed and "text" in packed:
        # what the tokens spell need not be there twice
        pairs = zip(packed["text"], run.records)
        packed["text"] = [None if spell(record["tokens"], texts) == text else text for text, record in pairs]
    return packed


def renumber(record: dict, names) -> dict:
    """The record with other numbers for its tokens."""
    record = dict(record)
    if "tokens" in record:
        record["tokens"] = [names[id] for id in record["tokens"]]
        record["student_tokens"] = {step: names[id] for step, id in record.get("student_tokens", {}).items()}
    if "asked" in record:
        record["asked"] = {
            step: [value, [[names[id], *numbers] for id, *numbers in candidates]]
            for step, (value, candidates) in record["asked"].items()
        }
    return record


def spell(ids: list[int], texts: dict) -> str:
    special = set(texts["special"])
    return "".join(texts["tokens"].get(str(id), BROKEN) for id in ids if id not in special)


def to_json(data: object) -> str:
    """JSON that can stand inside a script element: no `<`, `>` or `&`, so no tag and no comment can begin or end."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def data_elements(runs: list[Run], texts: dict, limit: float) -> tuple[list[str], list[str]]:
    """Script elements with the problems and the records, of `limit` bytes at most, and what was left out for that."""
    ids = vocabulary(runs)
    kept, number = runs, None
    for drop in REDUCTIONS:
        kept = [run for run in runs if not run.seed] if "seeds" in drop else runs
        elements = _elements(kept, texts, ids, drop, None)
        size = sum(len(element.encode("utf-8", "replace")) for element in elements)
        if size <= limit:
            break
    else:
        number = max(1, int(0.95 * len(runs[0].records) * limit / size))
        elements = _elements(kept, texts, ids, drop, number)
    notes = []
    if len(kept) < len(runs):
        notes.append("Of policies with several seeds only the first can be browsed here: the page would be too large.")
    if "candidates" in drop:
        notes.append("Candidates and their scores were left out: the page would be too large. records/ has them.")
    if number is not None:
        notes.append(f"Only the first {number} problems can be browsed here: the page would be too large.")
    return elements, notes


def _elements(runs: list[Run], texts: dict, ids: list[int], drop: tuple[str, ...], number: int | None) -> list[str]:
    known = {id: (prompt, gold) for id, prompt, gold in texts["problems"]}
    place = {id: n for n, id in enumerate(ids)}
    common = {
        "problems": [[record["id"], *known.get(record["id"], (None, None))] for record in runs[0].records[:number]],
        "ids": ids,
        "tokens": [texts["tokens"].get(str(id)) for id in ids] if texts["tokens"] else [],
        "special": [place[id] for id in texts["special"] if id in place],
        "joined": {
            " ".join(str(place[int(id)]) for id in run.split()): text
            for run, text in texts["joined"].items()
            if all(int(id) in place for id in run.split())
        },
        "runs": [
            {"label": run.row["label"], "name": label_of(run.row), "seed": run.seed, "seeds": run.row["num_seeds"]}
            for run in runs
        ],
        "groups": [[title, [row["label"] for row in rows]] for title, rows in grouped([run.row for run in runs])],
    }
    packed = [common, *(pack(run, texts, place, drop, number) for run in runs)]
    names = ["data", *(f"run-{n}" for n in range(len(runs)))]
    return [
        f'<script type="application/json" id="{name}">{to_json(data)}</script>' for name, data in zip(names, packed)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(rows: list[dict]) -> str:
    """All rows, grouped; every cell carries the number that it is sorted by."""
    greedy = next((row["accuracy"] for row in rows if row["policy"] == "greedy"), None)
    head = "".join(
        f'<th scope="col" title="{escape(tip)}"><button type="button" data-column="{place}">{escape(title)}'
        '<span class="arrow" aria-hidden="true"></span></button></th>'
        for place, (title, tip) in enumerate(COLUMNS)
    )
    bodies, order = [], itertools.count()
    for title, members in grouped(rows):
        lines = "".join(table_row(row, greedy, next(order)) for row in members)
        bodies.append(
            f'<tbody><tr class="group"><th colspan="{len(COLUMNS)}" scope="rowgroup"><span>{escape(title)}</span></th>'
            f"</tr>{lines}</tbody>"
        )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="h-table"><table id="policies">'
        f"<thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div>"
    )


def table_row(row: dict, greedy: float | None, order: int) -> str:
    low, high = row["accuracy_ci"]
    forwards = row.get("extra_forwards") or {}
    total = sum(forwards.values())
    p = row.get("mcnemar_p")
    line = "" if greedy is None else f'<i class="greedy" style="left:{greedy:.2f}%"></i>'
    bar = (
        f'<span class="interval"><span class="bar" aria-hidden="true">{line}'
        f'<i class="range" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
        f'<i class="at" style="left:{row["accuracy"]:.2f}%"></i></span><span>{low:.1f} to {high:.1f}</span></span>'
    )
    by_seed = row.get("accuracy_by_seed") or []
    seeds = "" if len(by_seed) < 2 else f' title="{escape(", ".join(f"{value:.1f}" for value in by_seed))}"'
    cells = [
        (row["accuracy"], f"<b{seeds}>{row['accuracy']:.1f}</b>"),
        (low, bar),
        (row.get("helped"), _number(row.get("helped"), "+{:g}")),
        (row.get("hurt"), _number(row.get("hurt"), "−{:g}" if row.get("hurt") else "{:g}")),
        (p, "–" if p is None else "&lt; 0.001" if p < 0.001 else f"{p:.3f}"),
        (row.get("achieved_rate"), _number(row.get("achieved_rate"), "{:.1%}")),
        (row.get("flip_rate"), _number(row.get("flip_rate"), "{:.1%}")),
        (row.get("seconds_vs_greedy"), _number(row.get("seconds_vs_greedy"), "{:.2f}×")),
        (total, ",<br>".join(f"{value:.0f} {escape(kind)}" for kind, value in forwards.items()) or "–"),
        (int(row.get("uses_teacher", False)), "yes" if row.get("uses_teacher") else "no"),
        (row["num_seeds"], str(row["num_seeds"])),
    ]
    kind = "teacher" if row.get("uses_teacher") else "free"
    name = escape(label_of(row).replace(" %", PER_CENT))
    first = f'<th scope="row" data-v="{order}"><i class="dot {kind}"></i>{name}</th>'
    rest = "".join(f'<td data-v="{"" if value is None else f"{value:.6g}"}">{text}</td>' for value, text in cells)
    return f"<tr>{first}{rest}</tr>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def chart_section(chart: Chart, wide: bool) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in chart.head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in chart.rows)
    return (
        f'<section class="card{" full" if wide else ""}" id="chart-{chart.name}" aria-labelledby="h-{chart.name}">'
        f'<h2 id="h-{chart.name}">{escape(chart.title)}</h2><p class="caption">{escape(chart.caption)}</p>'
        f"{to_svg(chart.wide, 'chart wide')}{to_svg(chart.narrow, 'chart narrow')}"
        f'<details><summary>Figures</summary><div class="scroll" role="region" tabindex="0" '
        f'aria-label="Figures: {escape(chart.title)}"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></details></section>"
    )


def banner(meta: dict) -> str:
    leaks = meta.get("leaks") or []
    if not leaks:
        return ""
    items = "".join(f"<li>{escape(str(leak))}</li>" for leak in leaks)
    return (
        '<div class="banner" role="alert"><strong>A leak guard was overridden: do not quote these figures.</strong>'
        f"<ul>{items}</ul></div>"
    )


def about(meta: dict, notes: list[str]) -> str:
    """How the figures were made, and what is not on the page."""
    definitions = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in (meta.get("definitions") or {}).items()
    )
    settings = json.dumps(meta.get("settings", {}), indent=2, ensure_ascii=False)
    versions = ", ".join(f"{name} {version}" for name, version in (meta.get("versions") or {}).items())
    left_out = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        '<section class="card full" aria-labelledby="h-about"><h2 id="h-about">How this was made</h2>'
        + (f"<h3>Not on this page</h3><ul>{left_out}</ul>" if notes else "")
        + f"<dl>{definitions}</dl>"
        + (f"<p>{escape(versions)}; {escape(str(meta.get('device', '')))}</p>" if versions else "")
        + '<details><summary>Command and settings</summary><div class="scroll" role="region" tabindex="0" '
        f'aria-label="Command and settings"><pre>{escape(meta.get("command", ""))}\n\n{escape(settings)}</pre></div>'
        "</details></section>"
    )


def charts_of(report: dict, folder: Path) -> list[Chart]:
    """Those that the report and its labels give, in the order of the page."""
    meta = report["meta"]
    num_candidates = meta.get("settings", {}).get("num_candidates", 8)
    points, top, depth = read_points(folder, meta)
    charts = [
        cost_chart(report["rows"]),
        radial_chart(top, depth, num_candidates),
        buckets_chart(points, num_candidates, report.get("fidelity")),
        hits_chart(report.get("hit_at_k") or {}),
        rates_chart(report["rows"]),
    ]
    return [chart for chart in charts if chart is not None]


def build(report: dict, folder: Path, charts: list[Chart], max_megabytes: float = MAX_MEGABYTES) -> str:
    """The page of a report in `folder` as a text, with `charts` of [`charts_of`].

    Records take at most `max_megabytes` of it; what does not fit is left out, seeds first.
    """
    meta = report["meta"]
    runs, notes = read_runs(folder, report["rows"])
    elements: list[str] = []
    if runs:
        texts, missing = find_texts(folder, meta, [run.records for run in runs])
        elements, dropped = data_elements(runs, texts, 1e6 * max_megabytes)
        notes = [*dropped, *missing, *notes]
    else:
        notes = ["The problems: there are no records beside report.json.", *notes]
    if not any(chart.name == "divergence" for chart in charts):
        notes.append("The divergence of the two models: the report names no held-out labels that are at hand.")
    if not any(chart.name == "rates" for chart in charts):
        notes.append("Accuracy by rate: no policy was run at two rates.")
    facts = [f"{meta.get('num_problems', '?')} problems of {meta.get('dataset')}", f"model {meta.get('model')}"]
    facts.append(f"teacher {meta.get('teacher_model') or 'none'}")
    if meta.get("num_seeds"):
        facts.append(f"{meta['num_seeds']} selector seed{'s' if meta['num_seeds'] > 1 else ''}")
    parts = {
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "script": (PAGE / "script.js").read_text(encoding="utf-8"),
        "title": escape(f"Select to Think on {Path(str(meta.get('model'))).name or meta.get('model')}"),
        "facts": "".join(f"<li>{escape(fact)}</li>" for fact in facts),
        "banner": banner(meta),
        "table": table(report["rows"]),
        "charts": "".join(chart_section(chart, chart.name == "cost") for chart in charts),
        "browser": (PAGE / "browser.html").read_text(encoding="utf-8") if runs else "",
        "about": about(meta, notes),
        "data": "\n".join(elements),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    return jinja2.Environment(keep_trailing_newline=True).from_string(page).render(parts)


def write_page(report: dict, folder: Path, picture: Path) -> list[Path]:
    """Writes the page and a PNG of each chart beside `picture`, named after it. Returns all paths, page first."""
    charts = charts_of(report, folder)
    page = picture.with_suffix(".html")
    with atomic_write(page) as out:
        out.write(build(report, folder, charts).encode("utf-8", "replace"))
    files = [picture.with_name(f"{picture.stem}-{chart.name}.png") for chart in charts]
    return [page, *(to_png(chart.wide, file, chart.title) for chart, file in zip(charts, files))]
