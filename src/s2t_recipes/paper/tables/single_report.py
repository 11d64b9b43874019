"""The kinds that show one report of another command: "fidelity", "retention", "objective", "latency"."""

from __future__ import annotations

import json

import numpy as np

from s2t_recipes.commands import recipe
from s2t_recipes.paper.pipeline import Pipeline, as_arguments
from s2t_recipes.paper.tables.base import Base
from s2t_recipes.paper.tables.result import Collect, Result, job_text, read_report
from s2t_recipes.row_names import name_of


def fidelity(pipeline: Pipeline, spec: dict) -> Collect:
    """Agree@1 and Spearman at held-out labelled points, beside the controls; needs no answers.

    Settings:
        problems: number of test problems, the first ones; by default all.
    """
    base = Base.of(pipeline)
    labels = pipeline.labels("test", spec.get("problems"))
    name = "agreement" + ("" if "problems" not in spec else f"-{labels.path.name}")
    output = pipeline.folder / f"{name}.json"
    command = [recipe("agreement.py"), "--labels", str(labels.path)]
    command += ["--train_labels", str(base.selector_labels.path)]
    command += ["--model", pipeline.model, "--dtype", pipeline.pair.dtype, "--output", str(output)]
    command += ["--adapters", *(str(adapter.path) for adapter in base.adapters)]
    job = pipeline.add(name, output, command, [labels, base.selector_labels, *base.adapters])

    def collect() -> Result:
        found = read_report(job)
        by_kind = found["agree_at_1"]
        rows = []
        for name in by_kind["choice"]:
            row = {"name": name}
            for kind in ("kl", "choice"):
                figures = by_kind[kind][name]
                row |= {f"{kind}_agree": figures["agree_at_1"], f"{kind}_agree_ci": figures["ci"]}
                if "spearman" in figures:
                    low, high = figures["spearman_ci"]
                    row[f"{kind}_rank"] = f"{figures['spearman']:.2f} [{low:.2f}, {high:.2f}]"
            rows.append(row)
        columns = [("who chooses", "name", "text"), ("Agree@1, top-KL points", "kl_agree", "interval")]
        columns += [
            ("Spearman there", "kl_rank", "text"),
            ("Agree@1, points with a choice", "choice_agree", "interval"),
        ]
        columns += [("Spearman there", "choice_rank", "text")]
        counts = found["meta"]
        hits = ", ".join(f"@{size} {100 * share:.1f}" for size, share in found["hit_at_k"].items())
        notes = [
            f"{counts['points']} labelled points: {counts['kl_points']} of the top KL, {counts['choice_points']} with "
            f"two or more candidates above the floor. Hit at the top-KL points, per cent: {hits}."
        ]
        return Result(columns, rows, notes, [job_text(job)])

    return collect


def retention(pipeline: Pipeline, spec: dict) -> Collect:
    """How far each method moves the model on text that it was not trained for, by recipes/retention.py.

    Settings:
        methods: imitations, beside the selectors.
        problems: number of test problems, the first ones; by default all.
    """
    base = Base.of(pipeline)
    labels = pipeline.labels("test", spec.get("problems"))
    tuned = [(method, job) for method in spec["methods"] for job in base.imitation(method).best()]
    needs = [labels, *base.adapters, *(job for _, job in tuned)]
    text = dict(pipeline.pair.other_text)
    if not text:
        words = pipeline.data("words")
        text["text"] = words.path
        needs.append(words)
    name = "retention" + ("" if "problems" not in spec else f"-{labels.path.name}")
    output = pipeline.folder / f"{name}.json"

    def command() -> list[str]:
        options = {
            "model": pipeline.model,
            "labels": labels.path,
            "tuned": [f"{method}={job.path}" for method, job in tuned],
            "adapters": [adapter.path for adapter in base.adapters],
            "dtype": pipeline.pair.dtype,
            "output": output,
        } | text
        return [recipe("retention.py"), *as_arguments(options)]

    job = pipeline.add(name, output, command, needs)

    def collect() -> Result:
        rows = []
        for row in read_report(job)["rows"]:
            values = {"who": name_of(row["name"])}
            for figure, kinds in (("kl", ("generated", "prompts", "text")), ("loss", ("generated", "text"))):
                for kind in kinds:
                    if row[kind] is None:  # no token of it
                        continue
                    found = row[kind][figure]
                    low, high = found["ci"]
                    values[f"{figure}_{kind}"] = f"{found['value']:.3f} [{low:.3f}, {high:.3f}]"
            rows.append(values)
        columns = [("model", "who", "text"), ("KL, its own text", "kl_generated", "text")]
        columns += [("KL, prompts", "kl_prompts", "text"), ("KL, other text", "kl_text", "text")]
        columns += [("loss, its own text", "loss_generated", "text"), ("loss, other text", "loss_text", "text")]
        return Result(columns, rows, [], [job_text(job)])

    return collect


def objective(pipeline: Pipeline, spec: dict) -> Collect:
    """Agree@1 of one training setting after another, by benchmarks/objective.py.

    Settings:
        recipe: YAML of the training.
        variants: names among its VARIANTS.
        seeds: number of trainings of each; by default the pair's.
    """
    labels = pipeline.selector_labels()
    output = pipeline.folder / f"{spec['name']}.json"
    seeds = spec.get("seeds", pipeline.pair.num_seeds)
    command = ["benchmarks/objective.py", "--recipe", spec["recipe"], "--model", pipeline.model]
    command += ["--labels", str(labels.path), "--variants", *spec["variants"], "--seeds", str(seeds)]
    job = pipeline.add(spec["name"], output, [*command, "--json", str(output)], [labels, *pipeline.models])

    def collect() -> Result:
        found = read_report(job)
        first = found["rows"][0]
        rows = []
        for variant in spec["variants"]:
            own = [row for row in found["rows"] if row["variant"] == variant]
            row = {"variant": variant}
            for key in ("agree_at_1", "fused_agree_at_1"):
                values = [100 * figures[key] for figures in own]
                row |= {key: float(np.mean(values)), f"{key}_ci": [min(values), max(values)]}
            rows.append(row)
        columns = [
            ("changed", "variant", "text"),
            ("Agree@1, score alone [lowest, highest]", "agree_at_1", "interval"),
        ]
        columns += [("Agree@1, fused", "fused_agree_at_1", "interval")]
        settings = found["meta"]
        notes = [
            f"{settings['num_train']} problems to train on, {settings['num_fusion']} to fit the fused score on, "
            f"{settings['num_held_out']} others with {first['points']} points to measure; {seeds} seeds. The first of "
            f"the student: {100 * first['student_first']:.1f}, its second: {100 * first['second_candidate']:.1f}."
        ]
        return Result(columns, rows, notes, [job_text(job)])

    return collect


def latency(pipeline: Pipeline, spec: dict) -> Collect:
    """What selecting costs, by benchmarks/decode.py, which runs alone.

    Settings:
        arguments: its command line.
    """
    output = pipeline.folder / f"{spec['name']}.json"
    job = pipeline.add(spec["name"], output, ["benchmarks/decode.py", *spec["arguments"], "--json", str(output)])
    job.alone = True

    def collect() -> Result:
        found = json.loads(output.read_text(encoding="utf-8"))
        rows = [
            row
            | {
                "way": row["name"] + (f", {row['scope']} scope, {row['proposals']} proposals" if row["scope"] else ""),
                "ratio_text": "{:.2f}x [{:.2f}, {:.2f}]".format(row["ratio"], *row["ratio_range"]),
            }
            for row in found["rows"]
        ]
        columns = [("way", "way", "text"), ("asked, %", "asked_rate", "share"), ("batch", "batch", "count")]
        columns += [("prompt", "prefix", "count"), ("time [lowest, highest turn]", "ratio_text", "text")]
        columns += [("processor time", "cpu_ratio", "times"), ("forwards per token", "forwards_per_token", "2f")]
        meta = found["meta"]
        notes = [
            f"Random weights of the shape {meta['shape']}, {meta['layers']} layers, vocabulary {meta['vocab']}, "
            f"{meta['new_tokens']} new tokens, K = {meta['num_candidates']}, {meta['threads']} threads, "
            f"{meta['device']}. Times differ from run to run."
        ]
        return Result(columns, rows, notes, [job_text(job)], holds_times=True)

    return collect
