"""Measures both pairs into one report. Knows which figures there are and where each comes from.

Legend: N generated tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from setting import device_name

from s2t_recipes.models import load_model
from transformers_s2t import FusionWeights, LocalSelector, __version__
from transformers_s2t.calibration.scored_points import read_router, score_labels
from transformers_s2t.labels.folder import read_labels
from trigger_study import TRIGGERS, bare_rate, rows
from trigger_study.cost import measure_cost
from trigger_study.intervals import NUM_RESAMPLES
from trigger_study.prepare import is_local, prepare_babyllama, prepare_embedded, records_of
from trigger_study.tables import MIN_GAIN
from trigger_study.tokens import Tokens, decide_everywhere, read_tokens, threshold_of


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
    labels = in_order(labels.select([i for i, id in enumerate(labels["problem_id"]) if id in tested]))
    greedy = records_of(outputs[0], "greedy")

    def decoded(seed: int, policy: str) -> dict[str, Any]:
        return rows.decoded_row(records_of(outputs[seed], policy), greedy)

    read_pair("embedded", model, adapters, labels, report)
    for row in report["rows"]:
        if row["pair"] == "embedded":
            row |= decoded(row["seed"], f"s2t-local:{row['trigger']}:{row['rate']:g}")
    for trigger in TRIGGERS:
        for rate in args.rates:
            figures = decoded(0, f"s2t:{trigger}:{rate:g}")
            report["ceilings"].append({"pair": "embedded", "trigger": trigger, "seed": 0, "rate": rate, **figures})
    for name, policy in reference_policies(args.rates).items():
        seeds = range(args.num_seeds if is_local(policy) else 1)
        report["references"].append(rows.reference("embedded", name, [decoded(seed, policy) for seed in seeds]))


def reference_policies(rates: list[float]) -> dict[str, str]:
    """Name of a row beside the triggers -> its policy."""
    policies = {"greedy": "greedy", "teacher": "teacher", "teacher selects everywhere": "s2t:always"}
    policies |= {"always, fused": "s2t-local:always", "always, bare": "s2t-local-bare:always"}
    bare = f"{bare_rate(rates):g}"
    for trigger in ("router", "kl"):
        for name, policy in (("fused", "s2t-local"), ("bare", "s2t-local-bare")):
            policies[f"{trigger} {float(bare):.0%}, {name}"] = f"{policy}:{trigger}:{bare}"
    return policies


def measure_babyllama(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds everything about the babyllama pair to the report."""
    adapters = prepare_babyllama(args)
    test, calibration = (read_labels(args.babyllama_run / "labels" / part)[0] for part in ("test", "calibration"))
    if args.quick:
        test, calibration = (
            labels.select(range(min(size, len(labels))))
            for labels, size in ((test, args.num_test), (calibration, args.num_calibration))
        )
    read_pair("babyllama", args.babyllama[0], adapters, in_order(test), report, calibration)


def in_order(labels: Dataset) -> Dataset:
    """Shortest rows first, the order in which points are scored."""
    lengths = [len(ids) for ids in labels["input_ids"]]
    return labels.select(sorted(range(len(labels)), key=lambda i: lengths[i]))


def read_pair(
    pair: str,
    model_name: str,
    adapters: list[Path],
    labels: Dataset,
    report: dict[str, Any],
    calibration: Dataset | None = None,
) -> None:
    """Adds what the labels say: AUCs, curves, flips, and rows with an AUC and, with calibration labels, accuracy."""
    figures, resamples, everywhere = [], [], {}
    rates = report["meta"]["settings"]["rates"]
    about = report["meta"]["pairs"][pair] = {"texts": len(labels), "tokens": sum(map(len, labels["divergence"]))}
    about |= {"routers": [], "router_layer": [], "fusion": []}
    for seed, adapter in enumerate(adapters):
        model = load_model(str(model_name), "float32", torch.device("cpu"))
        selector = LocalSelector.from_pretrained(adapter, model)
        config, fusion = selector.selector_config, selector.fusion or FusionWeights()
        router_values = read_router(selector, labels)
        tokens = read_tokens(labels, config, router_values, seed)
        points = score_labels(selector, labels, router_values=router_values)
        found, drawn = rows.tell_apart(tokens)
        figures.append(found)
        resamples.append(drawn)
        add_tokens(pair, seed, tokens, found, report)
        report["flips"] += rows.flip_rows(pair, seed, points, fusion)
        if calibration is not None:
            fit = read_tokens(calibration, config, read_router(selector, calibration), seed + 1000)
            weights = {"fused": fusion, "bare": FusionWeights()}
            everywhere[seed] = tokens, fit, {name: decide_everywhere(labels, points, w) for name, w in weights.items()}
        about["routers"].append(config.router)
        about["router_layer"].append(selector.router.config.layer)
        about["fusion"].append(vars(fusion))
        del model, selector
        gc.collect()
    means, gain = rows.summarize_aucs(pair, figures, resamples)
    report["auc_means"] += means
    report["router_gain"].append(gain)
    if calibration is not None:
        add_forced(pair, rates, everywhere, report)


def add_tokens(pair: str, seed: int, tokens: Tokens, found: dict[str, dict[str, Any]], report: dict[str, Any]) -> None:
    """Adds what one seed's tokens say: the AUCs found, rows that begin with them, what fires, and the first curves."""
    rates = report["meta"]["settings"]["rates"]
    report["fired"] += rows.fired_rows(pair, seed, tokens, rates)
    known = tokens.where(tokens.late_N & ~tokens.gain_N.isnan())
    for trigger in TRIGGERS:
        common = {"pair": pair, "trigger": trigger, "seed": seed}
        report["aucs"].append(common | found[trigger])
        report["rows"] += [common | {"rate": rate, "auc": found[trigger]["auc"]} for rate in rates]
        if seed == 0:
            report["precision_recall"].append(common | rows.thin_curve(known.values[trigger], known.gain_N > 0))


def add_forced(pair: str, rates: list[float], everywhere: dict[int, tuple], report: dict[str, Any]) -> None:
    """Fills the rows of a pair that is measured on stored texts."""
    for row in report["rows"]:
        if row["pair"] != pair:
            continue
        tokens, fit, decisions = everywhere[row["seed"]]
        threshold = threshold_of(row["trigger"], fit, row["rate"])
        found = rows.forced_row(tokens.values[row["trigger"]] >= threshold, tokens, decisions["fused"])
        report["ceilings"].append(
            {name: row[name] for name in ("pair", "trigger", "seed", "rate")}
            | {"accuracy": found.pop("ceiling"), "achieved_rate": found["achieved_rate"]}
        )
        row |= {"threshold": round(threshold, 6), **found}
    bare = bare_rate(rates)
    by_name: dict[str, list[dict]] = {}
    for tokens, fit, decisions in everywhere.values():
        nowhere, always = torch.zeros_like(tokens.choice_N), torch.ones_like(tokens.choice_N)
        by_name.setdefault("greedy", []).append(rows.forced_row(nowhere, tokens, decisions["fused"]))
        for name in ("fused", "bare"):
            by_name.setdefault(f"always, {name}", []).append(rows.forced_row(always, tokens, decisions[name]))
        for trigger in ("router", "kl"):
            fires_N = tokens.values[trigger] >= threshold_of(trigger, fit, bare)
            for name in ("fused", "bare"):
                row = rows.forced_row(fires_N, tokens, decisions[name])
                by_name.setdefault(f"{trigger} {bare:.0%}, {name}", []).append(row)
    report["references"] += [
        rows.reference(pair, name, found[:1] if name == "greedy" else found) for name, found in by_name.items()
    ]
