"""The result of one table on one pair, and the rows, differences and notes that are made from reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2t_recipes.estimates import bootstrap_interval
from s2t_recipes.jobs import Job, typed
from s2t_recipes.paper.sweep import Sweep
from s2t_recipes.records import read_records
from s2t_recipes.row_names import label_of
from transformers_s2t.labels.folder import read_labels


@dataclass
class Result:
    """One table for one pair.

    Args:
        columns: title, key of the rows, and form (see recipes/results.py) of each column.
        rows: values by key; a key may be missing.
        notes: sentences with figures, printed below the table.
        commands: the jobs behind it, as a user would type them.
        cost: times of this run, kept apart from what must come out the same again.
        holds_times: whether the rows hold times themselves.
    """

    columns: list[tuple[str, str, str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    holds_times: bool = False


Collect = Callable[[], Result]
ACCURACY = [
    ("accuracy", "accuracy", "interval"),
    ("seed by seed", "by_seed", "text"),
    ("gain over greedy", "gain", "signed interval"),
    ("helped / hurt", "flips", "text"),
    ("p", "mcnemar_p", "p"),
]
COST = [
    ("student tokens", "student_tokens", "0f"),
    ("teacher tokens", "teacher_tokens", "0f"),
    ("forwards", "forwards", "2f"),
]


def read_report(job: Job) -> dict:
    return json.loads(job.output.read_text(encoding="utf-8"))


def row_of(row: dict, report: dict, **more) -> dict:
    """The figures of a row of `s2t eval` that tables show. `forwards` is batch forwards relative to greedy's."""
    kept = ("accuracy", "accuracy_ci", "accuracy_sd", "gain", "gain_ci", "mcnemar_p", "num_seeds")
    kept += ("helped", "hurt", "achieved_rate", "asked_rate", "flip_rate", "student_tokens", "teacher_tokens")
    values = {name: row[name] for name in kept}
    if row["helped"] is not None:
        values["flips"] = f"{row['helped']:g} / {row['hurt']:g}"
    values["by_seed"] = seed_by_seed(row["accuracy_by_seed"])
    for other in report["rows"]:
        if other["label"] == "greedy":
            own = row["decoding_steps"] + sum(row["extra_forwards"].values())
            values["forwards"] = own / other["decoding_steps"]
    return {"policy": label_of(row), **values, **more}


def seed_by_seed(accuracy_S: Sequence[float]) -> str:
    """Accuracies of several seeds; empty for one."""
    return ", ".join(f"{value:.1f}" for value in accuracy_S) if len(accuracy_S) > 1 else ""


def correct_by_seed(*rows: tuple[Job, str]) -> list[np.ndarray]:
    """For each row, given as (evaluation, label), an array (seeds, problems): 1.0 for a right answer, else 0.0.

    Raises:
        ValueError: where a report has no such row, a row has no records, or two rows are of other problems.
    """
    runs = []
    for job, label in rows:
        found = {row["label"]: row["records"] for row in read_report(job)["rows"]}
        files = [job.output.parent / "records" / name for name in found.get(label, ())]
        runs.append([read_records(file)[1] for file in files if file.is_file()])
        if not files or len(runs[-1]) < len(files):
            raise ValueError(f"{job.output} has no records of {label!r}; its rows: {', '.join(found)}.")
    ids = [record["id"] for record in runs[0][0]]
    for (job, label), seeds in zip(rows, runs):
        if any([record["id"] for record in records] != ids for records in seeds):
            raise ValueError(
                f"{job.output}: {label!r} is of other problems than {rows[0][1]!r} of {rows[0][0].output}."
            )
    return [np.array([[record["correct"] for record in records] for records in seeds], dtype=float) for seeds in runs]


def difference(job: Job, label: str, other_job: Job, other: str) -> dict[str, Any]:
    """Accuracy of one row minus another's on the same problems, in points, with a 95 % interval (paired bootstrap).

    Seeds are averaged first.
    """
    right_SN, other_SN = correct_by_seed((job, label), (other_job, other))
    return mean_difference(100 * (right_SN.mean(0) - other_SN.mean(0)))


def mean_difference(difference_N: np.ndarray) -> dict[str, Any]:
    """The mean of the problems' differences, with a 95 % interval."""
    return {"difference": float(difference_N.mean()), "difference_ci": bootstrap_interval(difference_N)}


def sentence(name: str, other: str, found: Mapping[str, Any]) -> str:
    low, high = found["difference_ci"]
    return f"{name} minus {other}: {found['difference']:+.1f} [{low:+.1f}, {high:+.1f}] points"


def teacher_tokens_of(labels: Job) -> int:
    """Number of tokens that the teacher read to make labels: every text once, with its corrections."""
    data, _ = read_labels(labels.path, split="all")
    return int(sum(map(len, data["input_ids"])))


def problems_note(report: Mapping[str, Any]) -> str:
    return f"{report['meta']['num_problems']} test problems."


def training_rate_note(method: str, sweep: Sweep) -> str:
    found = sweep.accuracies()
    tried = ", ".join(
        f"{rate:g}: {' and '.join(f'{value:.1f}' for value in values)}" for rate, values in found.items()
    )
    best = sweep.best_rate()
    edge = " (the end of what was tried)" if best in (min(found), max(found)) else ""
    return f"{method}: accuracy on the tuning problems by learning rate {tried}; {best:g} taken{edge}"


def job_text(job: Job) -> str:
    return typed(job.arguments())
