"""How often a selector chooses what the teacher would, at labelled points: over all of them, and by divergence.

No text is generated and no answer is read, so it holds for any pair of models. What a selector says of each point is
kept in OUTPUT_DIR/fidelity, one file per adapter; the same settings do not score again. Knows folders of labels and
selectors; knows no problems and no policies.

Legend: S seeds (adapters), N decision points, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from s2t_recipes.adapters import check_same_tokenizer
from s2t_recipes.estimates import divergence_buckets, mean_over_points
from s2t_recipes.metrics import load_metric
from s2t_recipes.models import free_memory
from s2t_recipes.records import fingerprint, hash_of, read_records, write_records
from transformers_s2t import FusionWeights, LocalSelector, SelectorConfig, __version__
from transformers_s2t.calibration.scored_points import score_labels
from transformers_s2t.labels.folder import read_held_out_labels
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.losses import spearman


HIT_SIZES = (1, 2, 4, 8, 16)
FIDELITY_FORMAT = 1  # of OUTPUT_DIR/fidelity: another one is scored again
MIN_RANKED = 3  # candidates above the floor: two can only be in order or not
DEFINITION = (
    "at the points of eval_labels, where no text is generated; right is the teacher's best candidate above the floor. "
    "agree_at_1: share of right choices, fused as in decoding, at the points with two or more candidates above the "
    "floor (choice) and at those of top divergence (kl). spearman: rank correlation of the selector's own scores with "
    "the teacher's log-probabilities over the candidates above the floor, mean over the points with "
    f"{MIN_RANKED} or more. buckets: shares of right choices by divergence, all points; hit_at_k is that of the "
    "teacher's own token among the candidates offered. Means over the seeds, 95 % bootstrap over problems with all "
    "their points"
)


class Labels(NamedTuple):
    """Held-out labels: the name they came by, the rows, the header."""

    name: str
    rows: Dataset
    header: TrajectoryHeader


def open_labels(name: str, configs: Sequence[SelectorConfig] = ()) -> Labels:
    """Held-out labels, to be measured on with selectors of `configs`.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: for labels without a threshold of the divergence, or of another tokenizer than a selector's.
    """
    rows, header = read_held_out_labels(name)
    if header is None or header.divergence_threshold is None:
        raise ValueError(f"`eval_labels`: {name!r} has no `divergence_threshold` in its header: label it again.")
    for config in configs:
        check_same_tokenizer(name, header, config, "eval_labels")
    return Labels(name, rows, header)


def measure_hits(labels: Labels, num_candidates: int) -> tuple[dict[str, float], dict[str, float]]:
    """Hit@K and Agree@1 at the top-KL points of labels.

    Hit@K: share of points where the teacher's first token is among the student's first K. Agree@1: share where the
    best of the `num_candidates` by the teacher is the student's first, or second, candidate.
    """
    threshold = labels.header.divergence_threshold
    columns = ["prompt_length", "divergence", "positions", "candidate_ids", "teacher_logprobs", "teacher_top_id"]
    ranks, best, depth = [], [], 0
    for length, divergence, positions, candidates, logprobs, top_ids in zip(*(labels.rows[name] for name in columns)):
        for position, ids_K, logprobs_K, top_id in zip(positions, candidates, logprobs, top_ids):
            if divergence[position - length] >= threshold:
                depth = max(depth, len(ids_K))
                ranks.append(ids_K.index(top_id) if top_id in ids_K else math.inf)
                best.append(int(np.argmax(logprobs_K[:num_candidates])))
    if not best:
        raise ValueError(f"`eval_labels`: {labels.name!r} holds no position with a divergence of {threshold} or more.")
    hit_at_k = {str(size): sum(rank < size for rank in ranks) / len(ranks) for size in HIT_SIZES if size <= depth}
    student, second = find_agreement([np.zeros(len(best)), np.ones(len(best))], best).mean(1).tolist()
    return hit_at_k, {"student": student, "second": second, "num_points": len(best)}


def rows_with_points(labels: Dataset) -> Dataset:
    """The trajectories that hold decision points, the shortest first: the order in which these are scored."""
    lengths = [len(ids) for ids in labels["input_ids"]]
    return labels.select(sorted((i for i, at in enumerate(labels["positions"]) if at), key=lambda i: lengths[i]))


def problems_of_points(ids: Sequence[str], points: Sequence[Sequence]) -> np.ndarray:
    """The problem of each decision point, from each trajectory's problem and points."""
    return np.repeat(ids, [len(own) for own in points])


def score_points(
    selector: LocalSelector, labels: Dataset, num_candidates: int, min_prob_ratio: float, batch_size: int = 32
) -> list[dict]:
    """What a selector says of each labelled point: one record per trajectory that has any.

    A record holds lists with one entry per point: `divergence`; `num_above`, the candidates above the floor; `rank` of
    the teacher's own token among the candidates offered, from 0, or -1; `target`, the teacher's best above the floor;
    `choice`; `spearman`.
    """
    rows = rows_with_points(labels)
    points = score_labels(selector, rows, batch_size, num_candidates, min_prob_ratio)
    is_top_NK = (points.candidate_ids_NK == points.teacher_top_N[:, None]) & (points.logprobs_NK > -1e3)
    columns = {
        "divergence": points.divergence_N,
        "num_above": points.mask_NK.sum(-1),
        "rank": torch.where(is_top_NK.any(-1), is_top_NK.long().argmax(-1), -1),
        "target": points.target_N,
        "choice": points.choice(selector.fusion or FusionWeights()),
        "spearman": spearman(points.scores_NK, points.teacher_NK, points.mask_NK),
    }
    counts = [len(positions) for positions in rows["positions"]]
    split = {name: [part.tolist() for part in column_N.split(counts)] for name, column_N in columns.items()}
    return [
        {"id": id, "rollout": rollout, **{name: parts[n] for name, parts in split.items()}}
        for n, (id, rollout) in enumerate(zip(rows["problem_id"], rows["rollout"]))
    ]


def measure_fidelity(
    folder: Path,
    adapters: Sequence[str],
    labels: Labels,
    load: Callable[[], PreTrainedModel],
    num_candidates: int,
    min_prob_ratio: float,
    settings: dict,
    seed: int = 0,
) -> dict:
    """The figures of [`summarize_points`] for some adapters; scores what is not on disk yet.

    Args:
        folder: OUTPUT_DIR.
        adapters, labels: adapters, one per seed, and labels from [`open_labels`].
        load: function that gives a new base model; every adapter gets its own.
        num_candidates, min_prob_ratio: how the evaluation offers candidates.
        settings: what else in the evaluation changes scores.
        seed: seed of the intervals.
    """
    settings = settings | {
        "version": __version__,
        "format": FIDELITY_FORMAT,
        "labels": fingerprint(labels.name),
        "num_candidates": num_candidates,
        "min_prob_ratio": min_prob_ratio,
    }
    runs = []
    for number, adapter in enumerate(adapters):
        file = folder / "fidelity" / f"adapter{number}.jsonl"
        mine = settings | {"adapter": fingerprint(adapter)}
        if (found := read_records(file, hash_of(mine))) is None:
            model = load()
            selector = LocalSelector.from_pretrained(adapter, model, adapter_name=f"s2t_{number}")
            records = score_points(selector, labels.rows, num_candidates, min_prob_ratio)
            write_records(file, {"settings_hash": hash_of(mine), "settings": mine}, records)
            found = read_records(file)
            del model, selector
            free_memory()
        runs.append(found[1])
    figures = summarize_points(runs, labels.header.divergence_threshold, seed)
    return {"num_candidates": num_candidates, "min_prob_ratio": min_prob_ratio, **figures}


def find_agreement(choices_SN: Sequence[np.ndarray], target_N: np.ndarray) -> np.ndarray:
    """Whether each seed's choice at each point is the teacher's best candidate, (S, N)."""
    metric = load_metric("selection_agreement")
    return np.array([metric.compute(predictions=choice_N, references=target_N)["agrees"] for choice_N in choices_SN])


def summarize_points(runs: list[list[dict]], threshold: float, seed: int = 0) -> dict:
    """Agreement with the teacher over all points and by divergence, beside the student's first and second candidate.

    Args:
        runs: records of [`score_points`] for each seed, of the same labels.
        threshold: least divergence of the top-KL points, nats.
        seed: seed of the resampling.

    Returns:
        `num_points`, `num_seeds`, `agree_at_1`, `spearman` and `buckets`, see `DEFINITION`; `None` in place of figures
        without a point.
    """

    def column(name: str, records: list[dict]) -> np.ndarray:
        return np.concatenate([record[name] for record in records])

    first = runs[0]
    divergence_N, above_N, rank_N, target_N = (
        column(name, first) for name in ("divergence", "num_above", "rank", "target")
    )
    problems_N = problems_of_points([record["id"] for record in first], [record["target"] for record in first])
    choices = {
        "student_first": [np.zeros_like(target_N)],
        # a point without a choice keeps the first candidate, whoever selects
        "second_candidate": [np.minimum(above_N, 2) - 1],
        "selector": [column("choice", run) for run in runs],
    }
    hits = {who: find_agreement(choices_SN, target_N) for who, choices_SN in choices.items()}

    def mean(values_SN: np.ndarray, keep_N: np.ndarray) -> dict:
        return mean_over_points(values_SN[:, keep_N], problems_N[keep_N], seed)

    agree_at_1 = {}
    for name, keep_N in (("choice", above_N > 1), ("kl", divergence_N >= threshold)):
        agree_at_1[name] = None
        if keep_N.any():
            figures = {who: mean(hits_SN, keep_N) for who, hits_SN in hits.items()}
            agree_at_1[name] = {"num_points": int(keep_N.sum()), **figures}
    ranked_N = above_N >= MIN_RANKED
    correlation_SN = np.stack([column("spearman", run) for run in runs])
    rates = {"hit_at_k": rank_N >= 0} | {name: hits_SN.mean(0) for name, hits_SN in hits.items()}
    return {
        "num_points": len(target_N),
        "num_seeds": len(runs),
        "agree_at_1": agree_at_1,
        "spearman": {"num_points": int(ranked_N.sum()), **mean(correlation_SN, ranked_N)} if ranked_N.any() else None,
        "buckets": divergence_buckets(divergence_N, rates),
    }


def describe(fidelity: dict) -> list[str]:
    """The figures in sentences, for the end of a table."""
    names = {"selector": "S2T-Local", "student_first": "the student's first", "second_candidate": "its second"}
    sentences = []
    for part, place in (("choice", "where there is a choice"), ("kl", "at the points of top divergence")):
        if (figures := fidelity["agree_at_1"][part]) is not None:
            shares = []
            for key, name in names.items():
                share, low, high = (100 * edge for edge in (figures[key]["value"], *figures[key]["ci"]))
                shares.append(f"{name} {share:.1f} [{low:.1f}, {high:.1f}]")
            sentences.append(f"Agree@1 in per cent {place} ({figures['num_points']} points): {', '.join(shares)}.")
    if (figures := fidelity["spearman"]) is not None:
        low, high = figures["ci"]
        sentences.append(
            f"Rank correlation of its scores with the teacher's, at the {figures['num_points']} points with "
            f"{MIN_RANKED} or more candidates above the floor: {figures['value']:.3f} [{low:.3f}, {high:.3f}]."
        )
    return sentences
