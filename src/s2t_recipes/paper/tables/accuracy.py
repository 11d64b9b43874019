"""The kind "policies": accuracy and cost of policies on the same problems, and what their first flips are."""

from __future__ import annotations

import re

from transformers import AutoTokenizer

from s2t_recipes.jobs import Job
from s2t_recipes.paper.pipeline import Pipeline
from s2t_recipes.paper.sweep import SAMPLED
from s2t_recipes.paper.tables.base import Base
from s2t_recipes.paper.tables.result import (
    ACCURACY,
    COST,
    Collect,
    Result,
    difference,
    job_text,
    problems_note,
    read_report,
    row_of,
    sentence,
    training_rate_note,
)
from s2t_recipes.records import read_records
from s2t_recipes.row_names import label_of


def policies(pipeline: Pipeline, spec: dict) -> Collect:
    """Accuracy of policies on the same problems.

    Settings:
        policies: labels of policies, see `s2t eval`.
        limit: number of test problems; by default all.
        num_candidates: values of K to run the policies with; [8] by default.
        at_other_sizes: policies to run at all but the first of these; by default all but greedy.
        baselines: imitations to run too, among "sft", "kd" and, where selectors learn from sampled texts,
            "sft-sampled" and "kd-sampled"; each at its best learning rate, one training for each seed.
        second_rates: run each of these at a second rate too, where there is one that tuning can hardly tell from the
            best ("sft-second").
        compare: pairs of labels; a note gives the difference of each.
        router: `false` for selectors without a router.
        flips: labels; a note counts the first flips of each by kind of token.
        no_answer: add a note that counts the texts without an answer.
    """
    baselines = [m for m in spec.get("baselines", ()) if m not in SAMPLED or pipeline.num_rollouts > 1]
    thresholds = any(re.search(r":(?!always)", policy) for policy in spec["policies"])
    base = Base.of(pipeline, thresholds, route=spec.get("router", True))
    is_selected = any(policy.startswith("s2t-local") for policy in spec["policies"])
    sweeps = {"s2t-local": base.sweep} if is_selected and base.sweep is not None else {}
    tuned, rows_of = [], {}
    for method in baselines:
        sweeps[method] = base.imitation(method)
        rows_of[method] = [method, f"{method}-second"] if spec.get("second_rates") else [method]
        for place, name in enumerate(rows_of[method]):
            tuned += [(name, trained) for trained in sweeps[method].best(place)]
    left_out = set(spec.get("baselines", ())) - set(baselines)
    wanted = [policy for policy in dict.fromkeys([*spec["policies"], *baselines]) if policy not in left_out]
    wanted = [name for policy in wanted for name in rows_of.get(policy, [policy])]
    options = {"limit": spec.get("limit")}
    if any(policy.startswith("prior") for policy in wanted):
        options["prior_labels"] = str(base.selector_labels.path)
    sizes = spec.get("num_candidates", [8])
    evaluations = {
        size: pipeline.evaluation(
            spec["name"] + ("" if sizes == [8] else f"-{size}"),
            policies=wanted if size == sizes[0] else ["greedy", *spec.get("at_other_sizes", wanted[1:])],
            adapters=base.adapters,
            tuned=tuned,
            needs=[base.selector_labels],
            **options,
            **({} if size == 8 else {"num_candidates": size}),
        )
        for size in sizes
    }

    def collect() -> Result:
        rows, cost = [], {}
        for size, job in evaluations.items():
            report = read_report(job)
            more = {} if sizes == [8] else {"num_candidates": size}
            shown = [row for row in report["rows"] if size == sizes[0] or row["trigger"] is not None]
            rows += [row_of(row, report, llm="yes" if row["uses_teacher"] else "no", **more) for row in shown]
            for row in shown:
                times = {name: row[name] for name in ("seconds_vs_greedy", "cpu_seconds_vs_greedy")}
                cost[row["label"] + ("" if sizes == [8] else f" K={size}")] = times
        columns = [("policy", "policy", "text")]
        columns += [] if sizes == [8] else [("K", "num_candidates", "count")]
        columns += [("teacher at inference", "llm", "text"), *ACCURACY]
        columns += [("fired, %", "achieved_rate", "share"), ("flipped, %", "flip_rate", "share"), *COST]
        first = evaluations[sizes[0]]
        report = read_report(first)
        notes = [problems_note(report), *(training_rate_note(method, sweep) for method, sweep in sweeps.items())]
        labels = {row["label"]: label_of(row) for row in report["rows"]}
        for one, other in spec.get("compare", ()):
            if other in left_out or (other.endswith("-second") and other not in labels):
                continue
            notes.append(sentence(labels[one], labels[other], difference(first, one, first, other)))
        for label in spec.get("flips", ()):
            notes.append(f"First flip of each text, {labels[label]}: {flips_by_kind(first, label, pipeline.model)}")
        if spec.get("no_answer"):
            told = [f"{label_of(row)} {row['no_answer']:.1f}" for row in report["rows"] if row["no_answer"]]
            notes.append(f"Texts without an answer, which count as wrong, per cent: {', '.join(told) or 'none'}")
        return Result(columns, rows, notes, [job_text(job) for job in evaluations.values()], cost)

    return collect


#: Kinds of tokens, by the text that a token adds; the first one that fits.
TOKEN_KINDS = {
    "number": re.compile(r"\s*[\d.,$]*\d[\d.,]*\s*"),
    "operator": re.compile(r"\s*[-+*/=÷×−()]+\s*"),
    "end": re.compile(r""),
    "word or other": re.compile(r".*", re.DOTALL),
}


def kind_of_token(text: str) -> str:
    return next(kind for kind, pattern in TOKEN_KINDS.items() if pattern.fullmatch(text))


def flips_by_kind(job: Job, label: str, model: str) -> str:
    """How often the first flip of a text was of each kind, and how often the text then helped or hurt, as words.

    Figures are means over seeds.

    Args:
        job: an evaluation with the rows "greedy" and `label`.
        label: label of a policy that selects.
        model: Hub id or local path of the model, whose tokenizer reads the tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {row["label"]: row["records"] for row in read_report(job)["rows"]}
    records = job.output.parent / "records"
    greedy = read_records(records / found["greedy"][0])[1]
    counts = {kind: [0, 0, 0] for kind in TOKEN_KINDS}
    for file in found[label]:
        for before, after in zip(greedy, read_records(records / file)[1], strict=True):
            first = after["kinds"].find("f")
            if first < 0:
                continue
            ids = (after["student_tokens"][str(first)], after["tokens"][first])
            texts = ["" if id in tokenizer.all_special_ids else tokenizer.decode([id]) for id in ids]
            kind = min(map(kind_of_token, texts), key=list(TOKEN_KINDS).index)  # a number for a word: numbers
            gain = int(after["correct"]) - int(before["correct"])
            for place, counted in enumerate((True, gain > 0, gain < 0)):
                counts[kind][place] += counted
    num_seeds = len(found[label])
    told = [
        f"{kind} {one / num_seeds:g} ({good / num_seeds:g} helped, {bad / num_seeds:g} hurt)"
        for kind, (one, good, bad) in counts.items()
        if one
    ]
    return ", ".join(told) or "none"
