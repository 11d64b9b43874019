"""From records to figures: the rows of the table with their intervals, the report, and the table as text.

Legend: N problems, P seeds (adapters) of a policy.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import peft
import torch
import transformers

from s2t_recipes.answers import extract_answer
from s2t_recipes.commands import typed_command
from s2t_recipes.estimates import NUM_RESAMPLES, bootstrap_interval
from s2t_recipes.evaluation.fidelity import DEFINITION, describe
from s2t_recipes.evaluation.plan import Job, Plan
from s2t_recipes.evaluation.policies import GREEDY, Policy
from s2t_recipes.problems import Problem
from transformers_s2t import SelectorConfig, __version__


DEFINITIONS = {
    "accuracy": "per cent of problems, mean over the seeds",
    "accuracy_ci": f"95 % percentile bootstrap over problems, {NUM_RESAMPLES} resamples, of the mean over seeds",
    "accuracy_sd": "standard deviation over the seeds, where there are several",
    "gain, gain_ci": "accuracy minus greedy's, and the same bootstrap over problems of that difference (paired)",
    "helped, hurt": "problems that greedy has wrong and the policy right, and the reverse; mean over seeds",
    "achieved_rate": "triggered steps / generated tokens (end-of-sequence included)",
    "asked_rate": "steps with a trigger and two or more candidates above the floor / generated tokens",
    "flip_rate": "steps where another token than the student's first was taken / generated tokens",
    "mcnemar_p": "exact two-sided McNemar test against greedy; with several seeds the largest of their p-values",
    "seconds_vs_greedy": "time in generate relative to greedy in the same run, at this batch size (with "
    "batch_by='greedy_length' rows that have ended leave greedy's batches and not a selector's)",
    "cpu_seconds_vs_greedy": "the same of the process's CPU time, all threads",
    "extra_forwards": "batch forwards beyond those of plain decoding, by kind, mean over seeds",
    "fidelity": DEFINITION,
    "student_tokens, teacher_tokens": "tokens that a problem asks of each model, prompts, padding-free decoding, "
    "candidates and all samples counted, each as if it were read alone; mean over seeds",
}
#: Header and records of one job.
Run = tuple[dict, list[dict]]


def mcnemar(helped: int, hurt: int) -> float:
    """Exact two-sided p-value that `helped` and `hurt` are equally likely."""
    total = helped + hurt
    if total == 0:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(total + 1)]
    tail = sum(math.exp(log - total * math.log(2)) for log in logs[: min(helped, hurt) + 1])
    return min(1.0, 2 * tail)


def summarize(correct_PN: np.ndarray, greedy_N: np.ndarray | None, seed: int = 0) -> dict:
    """Accuracy, interval and the paired comparison with greedy of one row of the table; accuracies in per cent."""
    correct_PN = np.asarray(correct_PN, dtype=bool)
    summary = {
        "accuracy": 100 * float(correct_PN.mean()),
        "accuracy_ci": [100 * edge for edge in bootstrap_interval(correct_PN.mean(0), seed)],
        "accuracy_by_seed": [100 * float(value) for value in correct_PN.mean(1)],
        "accuracy_sd": 100 * float(correct_PN.mean(1).std(ddof=1)) if len(correct_PN) > 1 else None,
        **dict.fromkeys(("gain", "gain_ci", "helped", "hurt", "mcnemar_p")),
    }
    if greedy_N is not None:
        greedy_N = np.asarray(greedy_N, dtype=bool)
        gain_N = correct_PN.mean(0) - greedy_N
        summary["gain"] = 100 * float(gain_N.mean())
        summary["gain_ci"] = [100 * edge for edge in bootstrap_interval(gain_N, seed)]
        helped_P, hurt_P = (correct_PN & ~greedy_N).sum(1), (~correct_PN & greedy_N).sum(1)
        summary["helped"], summary["hurt"] = (
            int(counts_P[0]) if len(counts_P) == 1 else round(float(counts_P.mean()), 1)
            for counts_P in (helped_P, hurt_P)
        )
        summary["mcnemar_p"] = max(mcnemar(int(helped), int(hurt)) for helped, hurt in zip(helped_P, hurt_P))
    return summary


def local_agreement(configs: list[SelectorConfig]) -> dict[str, float]:
    """Held-out metrics that the trainer stored with the adapters, mean over them."""
    names = set.intersection(*(set(config.metrics) for config in configs)) if configs else set()
    numbers = (int, float)
    return {
        name: float(np.mean([config.metrics[name] for config in configs]))
        for name in sorted(names)
        if all(isinstance(config.metrics[name], numbers) for config in configs)
    }


def make_row(
    policy: Policy, runs: list[Run], greedy: Run | None, configs: list[SelectorConfig], seed: int = 0
) -> dict:
    """One row of the table: a policy's `runs`, one per seed, compared with `greedy` where that was run.

    `configs` are the settings of the S2T-Local adapters, `seed` is that of the resampling.
    """
    seeds = range(len(runs)) if policy.is_local or policy.is_tuned else (None,)
    correct_PN = np.array([[record["correct"] for record in records] for _, records in runs])
    greedy_N = None if greedy is None else np.array([record["correct"] for record in greedy[1]])
    no_answer = np.mean([[record["answer"] is None for record in records] for _, records in runs])
    return {
        "policy": policy.name,
        "label": policy.label,
        "records": [policy.record_name(number) for number in seeds],
        "trigger": policy.trigger,
        "target_rate": policy.target_rate,
        **rates(policy, runs),
        "uses_teacher": policy.needs_teacher,
        "is_tuned": policy.is_tuned,
        "num_seeds": len(runs),
        **summarize(correct_PN, None if policy.name == "greedy" else greedy_N, seed),
        "no_answer": 100 * float(no_answer),
        **costs(policy, runs, greedy),
        "adapter_scope": "/".join(sorted({config.adapter_scope for config in configs})) if policy.is_local else None,
    }


def rates(policy: Policy, runs: list[Run]) -> dict[str, float | None]:
    """How often a trigger fired, the selector was asked, and another token was taken; `None` without a trigger."""
    names = {"achieved_rate": "triggered", "asked_rate": "asked", "flip_rate": "flipped"}
    if policy.trigger is None:
        return dict.fromkeys(names)
    totals = [header["totals"] for header, _ in runs]
    generated = sum(each["generated"] for each in totals)
    return {name: sum(each[count] for each in totals) / generated for name, count in names.items()}


def costs(policy: Policy, runs: list[Run], greedy: Run | None) -> dict:
    """Tokens, seconds and forwards, mean over the seeds; beside greedy's where both are of one run."""
    totals = [header["totals"] for header, _ in runs]
    num_problems = len(runs[0][1])

    def mean_of(name: str) -> float:
        return float(np.mean([each[name] for each in totals]))

    same_run = greedy is not None and all(header["run_id"] == greedy[0]["run_id"] for header, _ in runs)
    kinds = sorted({kind for each in totals for kind in each["forwards"]})
    num_texts = len(runs) * num_problems
    return {
        "tokens_per_problem": sum(each["generated"] for each in totals) / num_texts / max(1, policy.num_votes),
        "seconds": mean_of("seconds"),
        **{
            f"{name}_vs_greedy": mean_of(name) / greedy[0]["totals"][name] if same_run else None
            for name in ("seconds", "cpu_seconds")
        },
        "student_tokens": mean_of("student_tokens") / num_problems,
        "teacher_tokens": mean_of("teacher_tokens") / num_problems,
        "extra_forwards": {kind: float(np.mean([each["forwards"].get(kind, 0) for each in totals])) for kind in kinds},
        "decoding_steps": mean_of("steps"),
    }


def make_rows(
    policy: Policy, runs: list[Run], greedy: Run | None, configs: list[SelectorConfig], seed: int = 0
) -> Iterator[dict]:
    """The row of a policy; for a vote a second one, the oracle: is any of the samples right?"""
    yield make_row(policy, runs, greedy, configs, seed)
    if policy.num_votes:
        found = [
            (header, [record | {"correct": record["any_correct"]} for record in records]) for header, records in runs
        ]
        best = replace(policy, name=f"best@{policy.num_votes}")
        yield make_row(best, found, greedy, configs, seed) | {"is_oracle": True, "records": []}  # the vote has them


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text."""
    texts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:])]


def make_example(tokenizer, problem: Problem, greedy: dict, record: dict, policy: Policy) -> dict:
    """One generation, token by token: its kind, and at a flip what the student would have written."""
    tokens = []
    texts = token_texts(tokenizer, record["tokens"])
    for step, (text, kind) in enumerate(zip(texts, record["kinds"])):
        token = {"text": text, "kind": {"k": "kept", "f": "flipped"}.get(kind, "plain")}
        if record["tokens"][step] in tokenizer.all_special_ids:
            token["text"] = ""  # the end
        if kind == "f":
            first = record["student_tokens"][str(step)]
            texts_so_far = token_texts(tokenizer, record["tokens"][:step] + [first])
            token["student"] = "" if first in tokenizer.all_special_ids else texts_so_far[-1]
        tokens.append(token)
    return {
        "id": problem.id,
        "policy": policy.label,
        "prompt": problem.prompt,
        "gold": extract_answer(problem.answer, "hash") or problem.answer,
        "greedy_text": greedy["text"],
        "tokens": tokens,
    }


def pick_examples(tokenizer, problems: list[Problem], results: dict, num_examples: int) -> list[dict]:
    """Problems that greedy has wrong and S2T-Local right, of a local policy without a teacher if there is one."""
    greedy = results.get(Policy("greedy"))
    local = sorted((policy for policy in results if policy.is_local), key=lambda policy: policy.needs_teacher)
    always = [policy for policy in local if policy.trigger == "always" and policy.name == "s2t-local"]
    if greedy is None or not local:
        return []
    policy = (always or local)[0]
    pairs = zip(problems, greedy[0][1], results[policy][0][1])
    found = [(p, before, after) for p, before, after in pairs if after["correct"] and not before["correct"]]
    found.sort(key=lambda item: "f" not in item[2]["kinds"])  # stable: the data set's order otherwise
    return [make_example(tokenizer, *item, policy) for item in found[:num_examples]]


def make_report(plan: Plan, runs: dict[Job, Run], fidelity: dict | None) -> dict:
    """The content of report.json, from the runs of all jobs and the figures of [`fidelity.measure_fidelity`]."""
    results = {policy: [runs[job] for job in plan.jobs if job.policy == policy] for policy in plan.policies}
    greedy = results.get(GREEDY, [None])[0]
    configs, metrics = plan.selectors.configs, local_agreement(plan.selectors.configs)
    rows = [row for policy, own in results.items() for row in make_rows(policy, own, greedy, configs, plan.args.seed)]
    num_examples = plan.args.num_examples
    return {
        "meta": describe_run(plan, metrics),
        "rows": rows,
        "hit_at_k": plan.hit_at_k,
        # student and second at the top-KL points; the selector's figures at all its held-out decision points
        "agree_at_1": plan.agree_at_1 | ({"held_out": metrics} if metrics else {}),
        "fidelity": fidelity,
        "examples": pick_examples(plan.bench.tokenizer, plan.bench.problems, results, num_examples),
    }


def describe_run(plan: Plan, metrics: dict[str, float]) -> dict:
    """What was run, on what, with which settings and versions."""
    configs, settings = plan.selectors.configs, asdict(plan.args)
    thresholds = {
        trigger: {f"{rate:g}": value for rate, value in table.items()}
        for trigger, table in plan.selectors.thresholds.items()
    }
    return {
        **{name: settings[name] for name in ("model", "teacher_model", "adapters", "dataset", "split")},
        "num_problems": len(plan.bench.problems),
        "num_seeds": len(configs),
        "eval_labels": settings["eval_labels"],
        "settings": settings,
        "thresholds": thresholds,
        "fusion": [None if config.fusion is None else asdict(config.fusion) for config in configs],
        "selector_metrics": metrics,
        "definitions": DEFINITIONS,
        "leaks": plan.leaks,
        "device": str(plan.bench.device),
        "versions": versions(),
        "command": typed_command(),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that decide figures."""
    found = {"python": platform.python_version(), "transformers_s2t": __version__}
    return found | {module.__name__: module.__version__ for module in (torch, transformers, peft)}


def align(lines: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """Lines of cells as plain text with a rule below the first; the first `left` columns are set to the left."""
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    text = [
        "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths)) for line in lines)
    ]
    text.insert(1, "-" * len(text[0]))
    return text


def format_table(report: dict) -> str:
    """The rows of a report as aligned plain text."""

    def number(value, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    titles = ("policy", "trigger", "rate", "fired", "flips", "teacher", "accuracy", "95% interval")
    titles += ("helped", "hurt", "p", "time")
    lines = [titles]
    for row in report["rows"]:
        seeds = f" (x{row['num_seeds']})" if row["num_seeds"] > 1 else ""
        p = row["mcnemar_p"]
        lines.append(
            (
                row["policy"] + (" (oracle)" if row.get("is_oracle") else "") + seeds,
                row["trigger"] or "-",
                number(row["target_rate"], ".3g", 100),
                number(row["achieved_rate"], ".1f", 100),
                number(row["flip_rate"], ".1f", 100),
                "yes" if row["uses_teacher"] else "-",
                number(row["accuracy"], ".1f"),
                "[{:.1f}, {:.1f}]".format(*row["accuracy_ci"]),
                number(row["helped"], "g"),
                number(row["hurt"], "g"),
                "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}",
                number(row["seconds_vs_greedy"], ".1f") + ("x" if row["seconds_vs_greedy"] is not None else ""),
            )
        )
    text = align(lines, left=2)
    meta = report["meta"]
    teacher = "; no teacher" if meta["teacher_model"] is None else f", teacher {meta['teacher_model']}"
    notes = [
        f"{meta['num_problems']} problems of {meta['dataset']}; model {meta['model']}{teacher}.",
        "rate, fired, flips: per cent of generated tokens. teacher: the large model runs at inference. (xN): mean of "
        "N seeds.",
    ]
    red, plain = ("\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for leak in meta["leaks"]:
        notes.insert(0, f"{red}LEAK, these figures are not held out: {leak}{plain}")
    if report["hit_at_k"]:
        hits = "  ".join(f"Hit@{size} {value:.3f}" for size, value in report["hit_at_k"].items())
        notes.append(f"At the top-KL points of {meta['eval_labels']}: {hits}")
    if report.get("fidelity"):
        notes += describe(report["fidelity"])
    return "\n".join([*text, "", *notes])
