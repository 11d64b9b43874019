"""Measures both pairs into one report. Knows which figures there are and where each comes from.

Legend: N generated tokens.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from setting import device_name

from s2t_recipes.models import free_memory, load_model
from transformers_s2t import FusionWeights, LocalSelector, __version__
from transformers_s2t.calibration.scored_points import read_router, score_labels
from transformers_s2t.labels.folder import read_labels
from trigger_study import TRIGGERS, bare_rate, rows
from trigger_study.cost import measure_cost
from trigger_study.intervals import NUM_RESAMPLES
from trigger_study.prepare import is_local, prepare_babyllama, prepare_embedded, records_of
from trigger_study.tables import MIN_GAIN
from trigger_study.tokens import decide_everywhere, read_tokens, threshold_of


LISTS = ("rows", "ceilings", "references", "auc_means", "router_gain", "aucs", "fired", "flips", "calibration", "cost")
LISTS += ("precision_recall",)
DEFINITIONS = {
    "auc": "held-out test labels, tokens behind the warm-up: the chance that a token at which the teacher's best "
    "candidate above the floor is not the student's first has a bigger trigger value than one at which it is",
    "auc_gain": f"the same for tokens at which it gains more than {MIN_GAIN:g} nats",
    "auc_choice, auc_gain_choice": "among tokens with two or more candidates above the floor",
    "accuracy": "per cent; embedded: of problems solved; babyllama: of generated tokens that are the teacher's best "
    "candidate above the floor, teacher-forced on the student's text",
    "helped, hurt": "embedded: problems that greedy has wrong and this right, and the reverse; babyllama: tokens",
    "achieved_rate": "tokens at which the trigger fired / generated tokens, on the test problems",
    "asked_rate": "those with two or more candidates above the floor",
    "intervals": f"95 % percentile bootstrap over problems, {NUM_RESAMPLES} resamples",
}


def empty_report(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured with what; lists of rows, still empty."""
    names = ("quick", "num_seeds", "rates", "num_test", "num_calibration", "turns", "cost_layers")
    meta = {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_s2t": __version__,
        "settings": {name: getattr(args, name) for name in names},
        "definitions": DEFINITIONS,
        "pairs": {},
        "skipped": [],
    }
    return {"meta": meta} | {name: [] for name in LISTS}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    report = empty_report(args)
    measure_embedded(args, report)
    if args.babyllama is not None:
        measure_babyllama(args, report)
    else:
        report["meta"]["skipped"].append("babyllama (--babyllama WEAK STRONG)")
    report["calibration"] = [rows.check_row(row) for row in report["rows"] if row["trigger"] != "random"]
    if args.cost:
        report["cost"] = measure_cost(args)
    else:
        report["meta"]["skipped"].append("cost (--no-cost)")
    return report


def measure_embedded(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds everything about the embedded pair to the report."""
    model, adapters, outputs = prepare_embedded(args)
    lines = (args.run / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    tested = {json.loads(line)["id"] for line in lines[: args.num_test]}
    labels, _ = read_labels(args.run / "labels" / "test")
    labels = labels.select([i for i, id in enumerate(labels["problem_id"]) if id in tested])
    greedy = records_of(outputs[0], "greedy")

    def decoded(seed: int, policy: str) -> dict[str, Any]:
        return rows.decoded_row(records_of(outputs[seed], policy), greedy)

    read_pair("embedded", model, adapters, labels, report)
    for row in report["rows"]:
        if row["pair"] == "embedded":
            row |= decoded(row["seed"], f"s2t-local:{row['trigger']}:{row['rate']:g}")
    for trigger, rate in product(TRIGGERS, args.rates):
        figures = decoded(0, f"s2t:{trigger}:{rate:g}")
        report["ceilings"].append({"pair": "embedded", "trigger": trigger, "seed": 0, "rate": rate, **figures})
    bare = bare_rate(args.rates)
    policies = {"greedy": "greedy", "teacher": "teacher", "teacher selects everywhere": "s2t:always"}
    policies |= {"always, fused": "s2t-local:always", "always, bare": "s2t-local-bare:always"}
    for trigger in ("router", "kl"):
        policies[f"{trigger} {bare:.0%}, fused"] = f"s2t-local:{trigger}:{bare:g}"
        policies[f"{trigger} {bare:.0%}, bare"] = f"s2t-local-bare:{trigger}:{bare:g}"
    for name, policy in policies.items():
        seeds = range(args.num_seeds if is_local(policy) else 1)
        report["references"].append(rows.reference("embedded", name, [decoded(seed, policy) for seed in seeds]))


def measure_babyllama(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds everything about the babyllama pair to the report."""
    adapters = prepare_babyllama(args)
    sizes = {"test": args.num_test, "calibration": args.num_calibration}
    parts = {part: read_labels(args.babyllama_run / "labels" / part)[0] for part in sizes}
    if args.quick:
        parts = {part: labels.select(range(min(sizes[part], len(labels)))) for part, labels in parts.items()}
    read_pair("babyllama", str(args.babyllama[0]), adapters, parts["test"], report, parts["calibration"])


def read_pair(
    pair: str,
    model_name: str,
    adapters: list[Path],
    labels: Dataset,
    report: dict[str, Any],
    calibration: Dataset | None = None,
) -> None:
    """Adds what the labels say: AUCs, curves, what fires, flips, and rows with an AUC and, with calibration labels,
    accuracy."""
    lengths = [len(ids) for ids in labels["input_ids"]]
    labels = labels.select(
        sorted(range(len(labels)), key=lambda i: lengths[i])
    )  # the order in which points are scored
    rates = report["meta"]["settings"]["rates"]
    about = report["meta"]["pairs"][pair] = {"texts": len(labels), "tokens": sum(map(len, labels["divergence"]))}
    about |= {"routers": [], "router_layer": [], "fusion": []}
    figures, resamples, everywhere = [], [], {}
    for seed, adapter in enumerate(adapters):
        model = load_model(model_name, "float32", torch.device("cpu"))
        selector = LocalSelector.from_pretrained(adapter, model)
        config, fusion = selector.selector_config, selector.fusion or FusionWeights()
        router_values = read_router(selector, labels)
        tokens = read_tokens(labels, config, router_values, seed)
        points = score_labels(selector, labels, router_values=router_values)
        found, drawn = rows.tell_apart(tokens)
        figures.append(found)
        resamples.append(drawn)
        known = tokens.where(tokens.late_N & ~tokens.gain_N.isnan())
        for trigger in TRIGGERS:
            common = {"pair": pair, "trigger": trigger, "seed": seed}
            report["aucs"].append(common | found[trigger])
            report["rows"] += [common | {"rate": rate, "auc": found[trigger]["auc"]} for rate in rates]
            if seed == 0:
                curve = rows.thin_curve(known.values[trigger], known.gain_N > 0)
                report["precision_recall"].append(common | curve)
        report["fired"] += rows.fired_rows(pair, seed, tokens, rates)
        report["flips"] += rows.flip_rows(pair, seed, points, fusion)
        if calibration is not None:
            fit = read_tokens(calibration, config, read_router(selector, calibration), seed + 1000)
            weights = {"fused": fusion, "bare": FusionWeights()}
            everywhere[seed] = tokens, fit, {name: decide_everywhere(labels, points, w) for name, w in weights.items()}
        about["routers"].append(config.router)
        about["router_layer"].append(selector.router.config.layer)
        about["fusion"].append(vars(fusion))
        del model, selector
        free_memory()
    means, gain = rows.summarize_aucs(pair, figures, resamples)
    report["auc_means"] += means
    report["router_gain"].append(gain)
    if calibration is not None:
        add_forced(pair, rates, everywhere, report)


def add_forced(pair: str, rates: list[float], everywhere: dict[int, tuple], report: dict[str, Any]) -> None:
    """Fills the rows of a pair that is measured on stored texts, and adds its references.

    Args:
        everywhere: seed -> tokens, those of the calibration labels, and decisions by the "fused" and the "bare" score.
    """

    def forced(seed: int, trigger: str, rate: float, score: str = "fused") -> dict[str, Any]:
        tokens, fit, decisions = everywhere[seed]
        fires_N = tokens.values[trigger] >= threshold_of(trigger, fit, rate)
        return rows.forced_row(fires_N, tokens, decisions[score])

    for row in report["rows"]:
        if row["pair"] == pair:
            found = forced(row["seed"], row["trigger"], row["rate"])
            ceiling = {name: row[name] for name in ("pair", "trigger", "seed", "rate")}
            ceiling |= {"accuracy": found.pop("ceiling"), "achieved_rate": found["achieved_rate"]}
            report["ceilings"].append(ceiling)
            threshold = threshold_of(row["trigger"], everywhere[row["seed"]][1], row["rate"])
            row |= {"threshold": round(threshold, 6), **found}
    bare = bare_rate(rates)
    first, *_ = everywhere
    # the random trigger fires nowhere at a rate of 0, and everywhere at 1
    references = {"greedy": [forced(first, "random", 0.0)]}
    for name, trigger, rate in (("always", "random", 1.0), *((f"{t} {bare:.0%}", t, bare) for t in ("router", "kl"))):
        for score in ("fused", "bare"):
            references[f"{name}, {score}"] = [forced(seed, trigger, rate, score) for seed in everywhere]
    report["references"] += [rows.reference(pair, name, found) for name, found in references.items()]
