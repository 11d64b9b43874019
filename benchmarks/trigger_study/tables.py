"""The report as tables, plain and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import setting

from transformers_s2t.router import RouterConfig
from trigger_study import CALIBRATED, FIRED, PAIRS, TRIGGERS


MIN_GAIN = RouterConfig(1, 1).min_gain


class Table(NamedTuple):
    """A title, the names of its columns, its cells, and sentences beneath."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the lowest and highest value where there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def pairs_of(report: dict[str, Any]) -> list[str]:
    return [pair for pair in PAIRS if any(row["pair"] == pair for row in report["rows"])]


def values_of(rows: list[dict], column: str, **where: Any) -> list[float]:
    return [row[column] for row in rows if all(row[key] == value for key, value in where.items())]


def rate_heads(report: dict[str, Any]) -> list[str]:
    return ["pair", "trigger", *(f"{100 * rate:g} %" for rate in report["meta"]["settings"]["rates"])]


def rate_lines(
    report: dict[str, Any],
    pair: str,
    part: str,
    columns: Sequence[str],
    form: Callable[..., str],
    names: Sequence[str] = TRIGGERS,
) -> list[list[str]]:
    """A pair's lines of a table, one for each name: at each rate `form` of the seeds' values in each column.

    A name is a trigger, or begins with one and a comma.
    """
    rates, lines = report["meta"]["settings"]["rates"], []
    for name in names:
        where = {"pair": pair, "trigger": name.split(",")[0]}
        cells = [form(*(values_of(report[part], column, rate=rate, **where) for column in columns)) for rate in rates]
        lines.append([pair, name, *cells])
    return lines


def auc_table(report: dict[str, Any]) -> Table:
    names = {"auc_gain": "gain", "auc_choice": "choices", "auc_gain_choice": "gain, choices"}
    head = ["pair", "trigger", "AUC", "95 % interval", *names.values(), "average precision"]
    rows, notes = [], []
    for pair in pairs_of(report):
        for row in (row for row in report["auc_means"] if row["pair"] == pair):
            low, high = row["auc_ci"]
            cells = [f"{row['auc']:.3f}", f"[{low:.3f}, {high:.3f}]", *(f"{row[name]:.3f}" for name in names)]
            rows.append([pair, row["trigger"], *cells, f"{row['average_precision']:.3f}"])
        gain = next(row for row in report["router_gain"] if row["pair"] == pair)
        one = next(row for row in report["aucs"] if row["pair"] == pair)
        low, high = gain["ci"]
        notes.append(
            f"{pair}: router minus the better of entropy and margin ({gain['better']}) {gain['difference']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}]; {one['positives']} of {one['tokens']} tokens are positive."
        )
    notes.append(
        "AUC of a trigger's value for “the teacher's best candidate above the floor is not the student's first”; "
        f"gain: “and gains more than {MIN_GAIN:g} nats”; choices: among tokens with two or more candidates above the "
        f"floor. Mean of the seeds ({report['meta']['settings']['num_seeds']}), intervals over problems."
    )
    return Table("How well a trigger tells where the student should be corrected", head, rows, notes)


def accuracy_table(report: dict[str, Any]) -> Table:
    rows, notes = [], []
    form, perfect = partial(spread, form=".1f"), ("router, teacher selects", "kl, teacher selects")
    for pair in pairs_of(report):
        rows += rate_lines(report, pair, "rows", ["accuracy"], form)
        rows += rate_lines(report, pair, "ceilings", ["accuracy"], form, perfect)
        others = [row for row in report["references"] if row["pair"] == pair]
        others = [f"{row['name']} {spread([one['accuracy'] for one in row['by_seed']], '.1f')}" for row in others]
        notes.append(f"{pair}: {'; '.join(others)}.")
    notes.append(
        "Per cent. embedded: problems solved. babyllama: tokens of the student's text that are the teacher's best "
        "candidate above the floor. Mean of the seeds, [lowest, highest]. Columns are target rates."
    )
    return Table("Accuracy by trigger and rate", rate_heads(report), rows, notes)


def help_table(report: dict[str, Any]) -> Table:
    def form(helped: list[int], hurt: list[int]) -> str:
        return f"+{statistics.fmean(helped):.0f} / −{statistics.fmean(hurt):.0f}"

    rows = [line for pair in pairs_of(report) for line in rate_lines(report, pair, "rows", ("helped", "hurt"), form)]
    notes = ["embedded: problems, against greedy; babyllama: tokens. Mean of the seeds."]
    return Table("Helped and hurt", rate_heads(report), rows, notes)


def fired_table(report: dict[str, Any]) -> Table:
    def form(*shares: list[float]) -> str:
        return " / ".join(f"{100 * statistics.fmean(share):.0f}" for share in shares)

    rows = [line for pair in pairs_of(report) for line in rate_lines(report, pair, "fired", FIRED, form)]
    notes = [
        "Per cent of the tokens at which a trigger fires on the student's own test texts: to correct / a choice, but "
        "the student's first is the best / no choice: one candidate above the floor. Mean of the seeds."
    ]
    return Table("What fires", rate_heads(report), rows, notes)


def flip_table(report: dict[str, Any]) -> Table:
    head = ["pair", "decision", "agrees with the teacher, %", "helped", "hurt", "other"]
    rows, notes = [], []
    for pair in pairs_of(report):
        for decision in ("student", "bare", "fused"):
            where = {"pair": pair, "decision": decision}
            cells = [spread(values_of(report["flips"], "agree_at_1", **where), ".1f")]
            for name in ("helped", "hurt", "other"):
                cells.append("" if decision == "student" else spread(values_of(report["flips"], name, **where), ".0f"))
            rows.append([pair, decision, *cells])
        notes.append(f"{pair}: {values_of(report['flips'], 'points', pair=pair)[0]} points with a choice.")
    notes.append("bare: by the selector's score alone. helped: from wrong to right; other: from wrong to wrong.")
    return Table("Fusion at the points with a choice (test labels)", head, rows, notes)


def calibration_table(report: dict[str, Any]) -> Table:
    def form(rates: list[float]) -> str:
        return spread([100 * rate for rate in rates], ".2f")

    rows = []
    for pair in pairs_of(report):
        for line in rate_lines(report, pair, "calibration", ["achieved_rate"], form, CALIBRATED):
            close = values_of(report["calibration"], "is_close", pair=pair, trigger=line[1])
            rows.append([*line, f"{sum(close)} of {len(close)}"])
    close = values_of(report["calibration"], "is_close")
    covered = [low <= row["rate"] <= high for row in report["calibration"] for low, high in [row["achieved_ci"]]]
    notes = [
        f"Achieved rate on the test problems, per cent of tokens. In all, {sum(close)} of {len(close)} are within "
        f"20 % of the target; {sum(covered)} of {len(covered)} intervals over test problems hold it.",
        "embedded: while decoding. babyllama: on stored text.",
    ]
    return Table("Target and achieved rate", [*rate_heads(report), "within 20 %"], rows, notes)


def cost_table(report: dict[str, Any]) -> Table:
    head = ["model", "batch", "decoding step, ms", "router, ms", "router / step", "entropy / step"]
    rows = []
    for row in report["cost"]:
        cells = [f"{row['step_milliseconds']:.2f}", f"{row['router_milliseconds']:.3f}"]
        for name in ("router", "entropy"):
            low, high = (100 * value for value in row[f"{name}_ratio_range"])
            cells.append(f"{100 * row[f'{name}_ratio']:.2f} % [{low:.2f}, {high:.2f}]")
        model = f"{row['model']}, {row['layers']} layers, V = {row['vocab']}, prefix {row['prefix']}"
        rows.append([model, str(row["batch"]), *cells])
    meta = report["meta"]
    notes = [
        f"float32, {meta['device']}, {meta['threads']} thread(s), median of {report['cost'][0]['turns']} turns, "
        "[lowest, highest]. entropy: of the trigger of that name, for comparison."
    ]
    return Table("What one reading of a router costs", head, rows, notes)


def format_table(table: Table, as_markdown: bool) -> str:
    """In columns of plain text, or in Markdown."""
    if as_markdown:
        lines = setting.markdown(table.head, table.rows)
        return "\n".join([f"### {table.title}", "", *lines, "", "\n\n".join(table.notes)])
    return "\n".join([table.title, "", *setting.align([table.head, *table.rows]), "", *table.notes])


def format_report(report: dict[str, Any], as_markdown: bool = False) -> str:
    tables = [auc_table, accuracy_table, help_table, fired_table, flip_table, calibration_table]
    tables += [cost_table] if report["cost"] else []
    parts = [format_table(make_table(report), as_markdown) for make_table in tables]
    if report["meta"]["skipped"]:
        parts.append(f"Not measured: {', '.join(report['meta']['skipped'])}.")
    return ("\n\n" if as_markdown else "\n\n\n").join(parts)
