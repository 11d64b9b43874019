"""Rows of the report, from tokens, scored points and decoded texts. Knows no files and no models.

Legend: N generated tokens, P problems, R resamples, L points of a curve.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from transformers_s2t import FusionWeights
from transformers_s2t.calibration.router_training import (
    RouterData,
    auc,
    average_precision,
    precision_recall,
    trigger_metrics,
)
from transformers_s2t.calibration.scored_points import ScoredPoints
from transformers_s2t.router import RouterConfig
from transformers_s2t.triggers import calibrate_threshold
from trigger_study import FIRED, TRIGGERS
from trigger_study.intervals import interval_of, ratio_interval, resampled_auc
from trigger_study.tokens import Decisions, Tokens


CLOSE = 0.2  # relative error of an achieved rate that counts as met
MAX_CURVE_POINTS = 200


def tell_apart(tokens: Tokens) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Trigger -> AUCs, average precision and interval; and trigger -> its AUC in each resample."""
    known = tokens.where(tokens.late_N & ~tokens.gain_N.isnan())
    positive_N = known.gain_N > 0
    data = RouterData({}, known.gain_N[:, None], known.gain_N, known.values["kl"], known.choice_N, known.problem_N)
    config = RouterConfig(1, 1)
    figures, resamples = {}, {}
    for trigger, values_N in known.values.items():
        metrics = trigger_metrics(values_N, data, config)
        resamples[trigger] = resampled_auc(values_N, positive_N, known.problem_N)
        figures[trigger] = {
            "auc": round(auc(values_N, positive_N), 5),
            "auc_ci": interval_of(resamples[trigger]),
            "auc_gain": metrics.get("auc_gain"),
            "auc_choice": metrics.get("auc_differs_choice"),
            "auc_gain_choice": metrics.get("auc_gain_choice"),
            "average_precision": round(average_precision(values_N, positive_N), 5),
            "tokens": len(values_N),
            "positives": int(positive_N.sum()),
        }
    return figures, resamples


def thin_curve(values_N: torch.Tensor, positive_N: torch.Tensor) -> dict[str, list[float]]:
    """Precision and recall at no more than `MAX_CURVE_POINTS` thresholds, evenly spread over the recall."""
    precision_L, recall_L = precision_recall(values_N, positive_N)
    wanted = torch.linspace(float(recall_L[0]), 1.0, MAX_CURVE_POINTS, dtype=recall_L.dtype)
    at = torch.searchsorted(recall_L, wanted).clamp_max(len(recall_L) - 1).unique()
    return {
        "recall": [round(value, 4) for value in recall_L[at].tolist()],
        "precision": [round(value, 4) for value in precision_L[at].tolist()],
    }


def summarize_aucs(pair: str, figures: list[dict], resamples: list[dict[str, np.ndarray]]) -> tuple[list, dict]:
    """Means over seeds with intervals, and the paired difference of the router and the better of entropy and margin.

    The better one is taken anew in each resample.
    """
    means = []
    for trigger in TRIGGERS:
        row = {"pair": pair, "trigger": trigger}
        for name in ("auc", "auc_gain", "auc_choice", "auc_gain_choice", "average_precision"):
            row[name] = round(statistics.fmean(seed[trigger][name] for seed in figures), 5)
        row["auc_ci"] = interval_of(np.mean([seed[trigger] for seed in resamples], axis=0))
        row["by_seed"] = [seed[trigger]["auc"] for seed in figures]
        means.append(row)
    auc_of = {row["trigger"]: row["auc"] for row in means}
    difference_R = np.mean(
        [seed["router"] - np.maximum(seed["entropy"], seed["margin"]) for seed in resamples], axis=0
    )
    gain = {
        "pair": pair,
        "difference": round(auc_of["router"] - max(auc_of["entropy"], auc_of["margin"]), 5),
        "ci": interval_of(difference_R),
        "better": max(("entropy", "margin"), key=auc_of.get),
    }
    return means, gain


def decoded_row(records: list[dict], greedy: list[dict]) -> dict[str, Any]:
    """Accuracy, flips of problems and achieved rates from the records of recipes/eval.py."""
    right_P = np.array([record["correct"] for record in records])
    greedy_P = np.array([record["correct"] for record in greedy])
    row = {
        "accuracy": round(100 * float(right_P.mean()), 4),
        "accuracy_ci": ratio_interval(right_P.astype(float), np.ones(len(right_P)), 100),
        "helped": int((right_P & ~greedy_P).sum()),
        "hurt": int((~right_P & greedy_P).sum()),
    }
    if "kinds" in records[0]:
        tokens_P = np.array([len(record["kinds"]) for record in records])
        for name, kinds in (("achieved_rate", "tkf"), ("asked_rate", "kf"), ("flip_rate", "f")):
            count_P = np.array([sum(map(record["kinds"].count, kinds)) for record in records])
            row[name] = round(float(count_P.sum() / tokens_P.sum()), 6)
            if name == "achieved_rate":
                row["achieved_ci"] = ratio_interval(count_P.astype(float), tokens_P.astype(float))
        row["tokens"] = int(tokens_P.sum())
    return row


def forced_row(fires_N: torch.Tensor, tokens: Tokens, decisions: Decisions) -> dict[str, Any]:
    """Agreement, flips of tokens and rates, where the selector decides at the tokens that fire and have a choice."""
    fires_N = fires_N & tokens.late_N
    asked_N = fires_N & tokens.choice_N
    first_N, chosen_N, flipped_N = decisions
    right_N = torch.where(asked_N, chosen_N, first_N)
    sizes_P = torch.bincount(tokens.problem_N).double().numpy()

    def by_problem(flags_N: torch.Tensor) -> np.ndarray:
        return torch.bincount(tokens.problem_N, weights=flags_N.double(), minlength=len(sizes_P)).numpy()

    def share(flags_N: torch.Tensor, scale: float = 1.0) -> float:
        return round(scale * float(flags_N.double().mean()), 6)

    return {
        "accuracy": share(right_N, 100),
        "accuracy_ci": ratio_interval(by_problem(right_N), sizes_P, 100),
        "helped": int((asked_N & ~first_N & chosen_N).sum()),
        "hurt": int((asked_N & first_N & ~chosen_N).sum()),
        "other": int((asked_N & flipped_N & ~first_N & ~chosen_N).sum()),
        "achieved_rate": share(fires_N),
        "achieved_ci": ratio_interval(by_problem(fires_N), sizes_P),
        "asked_rate": share(asked_N),
        "flip_rate": share(asked_N & flipped_N),
        "tokens": len(fires_N),
        "ceiling": share(asked_N | first_N, 100),
    }


def fired_rows(pair: str, seed: int, tokens: Tokens, rates: list[float]) -> list[dict[str, Any]]:
    """What the tokens are at which a trigger fires, at thresholds that give each rate on these very tokens."""
    rows = []
    for trigger, values_N in tokens.values.items():
        values_N = values_N.double().masked_fill(~tokens.late_N, -torch.inf)
        for rate in rates:
            fires_N = values_N >= calibrate_threshold(values_N, rate)
            corrected_N = tokens.gain_N > 0
            kinds = (corrected_N, tokens.choice_N & ~corrected_N, ~tokens.choice_N)
            counts = [int((kind_N & fires_N).sum()) for kind_N in kinds]
            row = {name: round(count / max(1, sum(counts)), 5) for name, count in zip(FIRED, counts)}
            rows.append({"pair": pair, "trigger": trigger, "seed": seed, "rate": rate, **row})
    return rows


def flip_rows(pair: str, seed: int, points: ScoredPoints, fusion: FusionWeights) -> list[dict[str, Any]]:
    """What a selector changes at the points with a choice, by its score alone and fused."""
    points = points.with_choice()
    common = {"pair": pair, "seed": seed, "points": len(points.target_N)}
    first = float((points.target_N == 0).float().mean())
    rows = [common | {"decision": "student", "agree_at_1": round(100 * first, 4), "helped": 0, "hurt": 0, "other": 0}]
    for name, weights in (("bare", FusionWeights()), ("fused", fusion)):
        agree = round(100 * points.agreement(weights), 4)
        rows.append(common | {"decision": name, "agree_at_1": agree, **points.flips(weights)._asdict()})
    return rows


def check_row(row: dict[str, Any]) -> dict[str, Any]:
    """Target and achieved rate of a row on problems that calibration has not seen."""
    error = row["achieved_rate"] / row["rate"] - 1
    return {name: row[name] for name in ("pair", "trigger", "seed", "rate", "achieved_rate", "achieved_ci")} | {
        "relative_error": round(error, 4),
        "is_close": abs(error) <= CLOSE,
    }


def reference(pair: str, name: str, by_seed: list[dict]) -> dict[str, Any]:
    """A row beside the triggers: mean over seeds."""
    shared = {"pair": pair, "name": name, "accuracy": round(statistics.fmean(row["accuracy"] for row in by_seed), 4)}
    return shared | {"by_seed": by_seed}
