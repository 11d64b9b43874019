"""The kinds that train anew: "variants" (one change), "efficiency" (fewer problems), "stacking" (a second round)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from s2t_recipes.estimates import bootstrap_interval
from s2t_recipes.evaluation.rows import mcnemar
from s2t_recipes.paper.pipeline import Pipeline, tag
from s2t_recipes.paper.sweep import METHODS, BestTraining
from s2t_recipes.paper.tables.base import Base
from s2t_recipes.paper.tables.result import (
    ACCURACY,
    COST,
    Collect,
    Result,
    correct_by_seed,
    difference,
    job_text,
    mean_difference,
    problems_note,
    read_report,
    row_of,
    seed_by_seed,
    sentence,
    teacher_tokens_of,
    training_rate_note,
)
from s2t_recipes.row_names import label_of
from transformers_s2t.config import CALIBRATION_NAME


def variants(pipeline: Pipeline, spec: dict) -> Collect:
    """S2T-Local with one thing changed at a time.

    Settings:
        label_problems: number of problems to learn from; by default the pair's.
        limit: number of test problems; by default all.
        seeds: number of selectors of each variant; by default the pair's.
        policy: label of the policy that is compared.
        variants: list of mappings, the first one the reference: `name`, and what differs: `train`, `label` (arguments
            of the recipes), `router: false`, `rounds: 2` (the second one learns from one text of each problem, in as
            many steps), `decoding` (arguments of `s2t eval`), `policy`.
    """
    limit, calibration = spec.get("label_problems"), pipeline.labels("calibration")
    seeds = range(spec.get("seeds", pipeline.pair.num_seeds))
    evaluations = {}
    for variant in spec["variants"]:
        name = variant["name"]
        labels = pipeline.selector_labels(limit, **variant.get("label", {}))
        settings = {"calibration": calibration, "decode": False, "route": variant.get("router", True)}
        settings |= variant.get("train", {})
        if variant.get("rounds", 1) == 2:  # the first round's selector writes what the second one learns from
            epochs = {}
            if pipeline.num_rollouts > 1:
                epochs["num_train_epochs"] = f"{pipeline.pair.train['num_train_epochs'] * pipeline.num_rollouts:g}"
            adapters = []
            for seed in seeds:
                writer = pipeline.selector(labels, seed, **settings)
                texts = pipeline.labels("label", limit, adapter=writer, rollout_policy="s2t-local")
                adapters.append(pipeline.selector(texts, seed, **settings | epochs))
        else:
            adapters = [pipeline.selector(labels, seed, **settings) for seed in seeds]
        policy = variant.get("policy", spec["policy"])
        folder = f"{spec['name']}{tag({'variant': name.replace(' ', '_')})}"
        options = {"limit": spec.get("limit")} | variant.get("decoding", {})
        job = pipeline.evaluation(folder, policies=["greedy", policy], adapters=adapters, **options)
        evaluations[name] = (policy, job, adapters)

    def collect() -> Result:
        rows, cost = [], {}
        base_name = spec["variants"][0]["name"]
        base_policy, base_job, _ = evaluations[base_name]
        for name, (policy, job, adapters) in evaluations.items():
            report = read_report(job)
            row = next(row for row in report["rows"] if row["label"] == policy)
            more = {} if name == base_name else difference(job, policy, base_job, base_policy)
            files = [adapter.path / CALIBRATION_NAME for adapter in adapters]
            agree = [json.loads(file.read_text(encoding="utf-8"))["in_sample_points"] for file in files]
            if all(agree):
                more["agree"] = 100 * float(np.mean([points["fused"]["agree_at_1"] for points in agree]))
                more["bare_agree"] = 100 * float(np.mean([points["selector"]["agree_at_1"] for points in agree]))
            rows.append(row_of(row, report, variant=name, **more))
            cost[name] = {"seconds_vs_greedy": row["seconds_vs_greedy"]}
        columns = [("changed", "variant", "text"), *ACCURACY[:2]]
        columns += [(f"minus {base_name}", "difference", "signed interval"), ACCURACY[3]]
        columns += [("Agree@1, score alone", "bare_agree", "1f"), ("Agree@1, fused", "agree", "1f"), COST[0], COST[2]]
        number = limit or pipeline.pair.label_problems or pipeline.pair.sizes["label"]
        notes = [
            problems_note(read_report(base_job)),
            f"{number} label problems, {len(seeds)} seeds each; policy {base_policy} unless the row says otherwise. "
            "Agree@1 with the teacher at points with a choice, on the calibration problems, on which the weights of "
            "the fused score were fitted.",
        ]
        return Result(columns, rows, notes, [job_text(job) for _, job, _ in evaluations.values()], cost)

    return collect


def efficiency(pipeline: Pipeline, spec: dict) -> Collect:
    """Accuracy by number of label problems, for S2T-Local and both imitations; each with its best learning rate.

    Settings:
        policy: label of the selector's policy.
        problems: numbers of label problems, one for each row.
        epochs: number of problems -> passes over them for a method that learns from one text of each; with several
            texts there are as many fewer, so all methods take as many steps.
        min_calibration: the least number of calibration problems; 30 by default.
        seeds: number of trainings of each method; by default the pair's.
        fewer_seeds: number of problems -> a smaller number of trainings.
    """
    runs: dict[tuple[int, str], tuple] = {}
    pair = pipeline.pair
    for number in spec["problems"]:
        seeds = range(spec.get("fewer_seeds", {}).get(number, spec.get("seeds", pair.num_seeds)))
        held_out = max(spec.get("min_calibration", 30), round(0.6 * number))
        held_out = None if held_out >= pipeline.pair.sizes["calibration"] else held_out
        calibration = pipeline.labels("calibration", held_out)
        for method in METHODS:
            is_local = method == "s2t-local"
            texts = pipeline.selector_labels(number) if is_local else pipeline.labels("label", number)
            epochs = spec["epochs"][number] / (pipeline.num_rollouts if is_local else 1)
            usual = (pair.train if is_local else pair.baseline).get("num_train_epochs")
            options = {} if epochs == usual else {"num_train_epochs": f"{epochs:g}"}  # not twice under two names
            rates = pair.learning_rates_by_problems.get(number, {}).get(method)
            tried = pipeline.seeds if number == pair.label_problems else seeds  # there it is that of other tables
            sweep = pipeline.sweep(method, texts, calibration=calibration, seeds=tried, rates=rates, **options)
            best = sweep.best()[: len(seeds)]
            label = spec["policy"] if is_local else method
            more = {"adapters": best} if is_local else {"tuned": [(method, job) for job in best]}
            name = f"{spec['name']}-{method}-{number}"
            job = pipeline.evaluation(name, policies=["greedy", label], **more)
            runs[number, method] = (label, job, sweep, texts, calibration)

    def collect() -> Result:
        rows, commands = [], []
        for number in spec["problems"]:
            row: dict[str, Any] = {"problems": number}
            for method in METHODS:
                label, job, sweep, texts, calibration = runs[number, method]
                found = next(found for found in read_report(job)["rows"] if found["label"] == label)
                row |= {method: found["accuracy"], f"{method}_ci": found["accuracy_ci"]}
                row[f"{method}_by_seed"] = seed_by_seed(found["accuracy_by_seed"])
                row[f"{method}_rate"] = sweep.best_rate()
                commands.append(job_text(job))
                if method == "s2t-local":
                    row["tokens"] = teacher_tokens_of(texts) + teacher_tokens_of(calibration)
                else:
                    row["imitation_tokens"] = teacher_tokens_of(texts)  # of "sft" about as many: it writes them
            ours, ours_job = runs[number, "s2t-local"][:2]
            for method in ("sft", "kd"):
                label, job = runs[number, method][:2]
                found = difference(ours_job, ours, job, label)
                row |= {f"over_{method}": found["difference"], f"over_{method}_ci": found["difference_ci"]}
            rows.append(row)
        columns = [("label problems", "problems", "count"), ("teacher tokens, S2T-Local", "tokens", "count")]
        columns += [("teacher tokens, imitation", "imitation_tokens", "count")]
        columns += [("S2T-Local", "s2t-local", "interval"), ("LoRA on the teacher's texts", "sft", "interval")]
        columns += [("LoRA distillation", "kd", "interval"), ("S2T-Local − texts", "over_sft", "signed interval")]
        columns += [("S2T-Local − distillation", "over_kd", "signed interval")]
        notes = [
            f"{number} problems, {training_rate_note(method, runs[number, method][2])}"
            for method in METHODS
            for number in spec["problems"]
        ]
        return Result(columns, rows, notes, commands)

    return collect


def stacking(pipeline: Pipeline, spec: dict) -> Collect:
    """A selector on top of a student that imitates already, trained on fresh problems, beside imitating them too.

    The tuned student is merged into a model. Labels are made of what it writes, and from them it gets a selector and,
    beside it, a second round of the same imitation, each with the best learning rate for the first seed's student.

    Settings:
        methods: imitations, among "sft" and "kd".
        label: arguments of `s2t label` for these labels.
        train: arguments that both trainings share.
        learning_rates: method -> rates tried first; by default those of the pair.
        seeds: number of students of each method; by default the pair's.
    """
    base = Base.of(pipeline)
    seeds = spec.get("seeds", pipeline.pair.num_seeds)
    options = spec.get("train", {})
    runs, sweeps = {}, {}
    for method in spec["methods"]:
        for seed, imitation in enumerate(base.imitation(method).best()[:seeds]):
            on_top = pipeline.on_top_of(imitation, f"{method}{seed}")
            calibration = on_top.labels("calibration")
            labels = on_top.labels("fresh", **spec.get("label", {}))
            trained = {}
            for kind, more in (("s2t-local", {"route": False}), (method, {})):
                settings = {"calibration": calibration} | options | more
                if seed == 0:  # the other seeds are other students
                    rates = spec.get("learning_rates", {}).get(kind)
                    sweeps[method, kind] = on_top.sweep(kind, labels, seeds=[seed], rates=rates, **settings)
                    trained[kind] = BestTraining(sweeps[method, kind])
                else:
                    trained[kind] = on_top.train(kind, labels, seed, sweeps[method, kind], **settings)
            policies = ["greedy", "s2t-local:always", "s2t-local-bare:always", method, "s2t:always"]
            made = {"adapters": [trained["s2t-local"]], "tuned": [(method, trained[method])]}
            runs[method, seed] = on_top.evaluation(f"{spec['name']}-{method}", policies=policies, **made)
    name = f"{spec['name']}-alone"
    alone = pipeline.evaluation(name, policies=["greedy", "s2t-local:always"], adapters=base.adapters[:seeds])

    def collect() -> Result:
        report = read_report(alone)  # what the parts reach by themselves
        rows = [row_of(row, report, student="as it was") for row in report["rows"]]
        notes = [problems_note(report)]
        for method in spec["methods"]:
            jobs = [job for (found, _), job in runs.items() if found == method]
            correct = {}
            for found in read_report(jobs[0])["rows"]:
                label = found["label"]
                right_SN = np.concatenate(correct_by_seed(*((job, label) for job in jobs)))
                correct[label] = right_SN
                greedy_SN = correct["greedy"]
                by_seed = 100 * right_SN.mean(1)
                row = {"student": f"after {method}", "policy": label_of(found), "accuracy": float(by_seed.mean())}
                row["accuracy_ci"] = [100 * edge for edge in bootstrap_interval(right_SN.mean(0))]
                row["by_seed"] = seed_by_seed(by_seed)
                if label != "greedy":
                    gain_N = 100 * (right_SN - greedy_SN).mean(0)
                    row |= {"gain": float(gain_N.mean()), "gain_ci": bootstrap_interval(gain_N)}
                    helped = ((right_SN > greedy_SN).sum(1), (right_SN < greedy_SN).sum(1))
                    row["flips"] = " / ".join(f"{round(values.mean(), 1):g}" for values in helped)
                    row["mcnemar_p"] = max(mcnemar(int(good), int(bad)) for good, bad in zip(*helped))
                rows.append(row)
            ours = "s2t-local:always"
            ours_SN, *on_top = correct_by_seed((alone, ours), *((job, ours) for job in jobs))
            found = mean_difference(100 * (np.concatenate(on_top).mean(0) - ours_SN.mean(0)))
            notes.append(sentence(f"S2T-Local on top of {method}", "S2T-Local alone", found))
            found = mean_difference(100 * (correct[ours] - correct[method]).mean(0))
            notes.append(sentence(f"S2T-Local on top of {method}", f"{method} on top of {method}", found))
        notes += [f"after {method}, {training_rate_note(kind, sweep)}" for (method, kind), sweep in sweeps.items()]
        columns = [("student", "student", "text"), ("policy", "policy", "text"), *ACCURACY]
        return Result(columns, rows, notes, [job_text(job) for job in (alone, *runs.values())])

    return collect
