"""The kinds that show one report of another command: "fidelity", "retention", "objective", "latency"."""

from __future__ import annotations

import numpy as np

from s2t_recipes.commands import recipe
from s2t_recipes.paper.pipeline import Pipeline, as_arguments
from s2t_recipes.paper.tables.base import Base
from s2t_recipes.paper.tables.result import Collect, Result, job_text, read_report
from s2t_recipes.row_names import name_of


def with_interval(value: float, interval: list[float], decimals: int) -> str:
    low, high = interval
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def fidelity(pipeline: Pipeline, spec: dict) -> Collect:
    """Agree@1 and Spearman at held-out labelled points, beside the controls; needs no answers.

    Settings:
        problems: number of test problems, the first ones; by default all.
    """
    base = Base.of(pipeline)
    labels = pipeline.labels("test", spec.get("problems"))
    name = "agreement" + ("" if "problems" not in spec else f"-{labels.path.name}")
    output = pipeline.folder / f"{name}.json"
    options = {"labels": labels.path, "train_labels": base.selector_labels.path, "model": pipeline.model}
    options |= {"dtype": pipeline.pair.dtype, "output": output}
    command = [recipe("agreement.py"), *as_arguments(options), "--adapters"]
    command += [str(adapter.path) for adapter in base.adapters]
    job = pipeline.add(name, output, command, [labels, base.selector_labels, *base.adapters])

    def collect() -> Result:
        found = read_report(job)
        rows = [{"name": name} for name in found["agree_at_1"]["choice"]]
        columns = [("who chooses", "name", "text")]
        for kind, points in (("kl", "top-KL points"), ("choice", "points with a choice")):
            columns += [(f"Agree@1, {points}", f"{kind}_agree", "interval")]
            columns += [("Spearman there", f"{kind}_rank", "text")]
            for row in rows:
                figures = found["agree_at_1"][kind][row["name"]]
                row |= {f"{kind}_agree": figures["agree_at_1"], f"{kind}_agree_ci": figures["ci"]}
                if "spearman" in figures:
                    row[f"{kind}_rank"] = with_interval(figures["spearman"], figures["spearman_ci"], 2)
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
        options = {"model": pipeline.model, "labels": labels.path}
        options["tuned"] = [f"{method}={job.path}" for method, job in tuned]
        options["adapters"] = [adapter.path for adapter in base.adapters]
        options |= {"dtype": pipeline.pair.dtype, "output": output} | text
        return [recipe("retention.py"), *as_arguments(options)]

    job = pipeline.add(name, output, command, needs)

    def collect() -> Result:
        rows = []
        for row in read_report(job)["rows"]:
            values = {"who": name_of(row["name"])}
            for figure, kinds in (("kl", ("generated", "prompts", "text")), ("loss", ("generated", "text"))):
                for kind in kinds:
                    if row[kind] is not None:  # it has tokens
                        found = row[kind][figure]
                        values[f"{figure}_{kind}"] = with_interval(found["value"], found["ci"], 3)
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
        columns = [("changed", "variant", "text")]
        columns += [("Agree@1, score alone [lowest, highest]", "agree_at_1", "interval")]
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
        found = read_report(job)
        for row in found["rows"]:
            scope = f", {row['scope']} scope, {row['proposals']} proposals" if row["scope"] else ""
            ratio = "{:.2f}x [{:.2f}, {:.2f}]".format(row["ratio"], *row["ratio_range"])
            row |= {"way": row["name"] + scope, "ratio_text": ratio}
        columns = [("way", "way", "text"), ("asked, %", "asked_rate", "share"), ("batch", "batch", "count")]
        columns += [("prompt", "prefix", "count"), ("time [lowest, highest turn]", "ratio_text", "text")]
        columns += [("processor time", "cpu_ratio", "times"), ("forwards per token", "forwards_per_token", "2f")]
        meta = found["meta"]
        notes = [
            f"Random weights of the shape {meta['shape']}, {meta['layers']} layers, vocabulary {meta['vocab']}, "
            f"{meta['new_tokens']} new tokens, K = {meta['num_candidates']}, {meta['threads']} threads, "
            f"{meta['device']}. Times differ from run to run."
        ]
        return Result(columns, found["rows"], notes, [job_text(job)], holds_times=True)

    return collect
