"""How often a selector agrees with the teacher at labelled, held-out decision points, beside the controls.

    python recipes/agreement.py --labels runs/babyllama/labels/test --adapters runs/babyllama/adapter-seed0 \
        --train_labels runs/babyllama/labels/train --output runs/babyllama/agreement.json

For models whose answers cannot be checked (story models, say) this is the measure: no text is generated. Hit@K is the
share of points at which the teacher's token is among the student's first K; Agree@1 the share at which the choice is
the teacher's best candidate above the floor; Spearman the rank correlation of scores with the teacher's
log-probabilities over the candidates above the floor, mean over the points with three or more of them. "kl" are the
points with the label run's top divergence, "choice" those with two or more candidates above the floor, the ones at
which a deployed selector is asked. Agreement and intervals (95 % bootstrap over problems with all their points) are
those of fidelity.py. Problems that an adapter has seen, in training or after (its seen_problems.json), are refused.

Legend: S seeds (adapters), N decision points, K candidates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers.hf_argparser import HfArg

from s2t_recipes.adapters import base_model_of, check_model
from s2t_recipes.estimates import mean_over_points
from s2t_recipes.evaluation.controls import prior_scores, token_prior
from s2t_recipes.evaluation.fidelity import HIT_SIZES, MIN_RANKED, find_agreement, problems_of_points, rows_with_points
from s2t_recipes.models import default_device, load_model
from s2t_recipes.options import Parser
from transformers_s2t import FusionWeights, LocalSelector, SelectorConfig
from transformers_s2t.calibration.scored_points import ScoredPoints, score_labels
from transformers_s2t.files import write_json
from transformers_s2t.fusion import fused_scores
from transformers_s2t.labels.folder import read_held_out_labels, read_labels
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.labels.seen_problems import STAGES, check_unseen
from transformers_s2t.losses import spearman


@dataclass
class AgreementArguments:
    """What is compared with the teacher, and where."""

    labels: str = HfArg(help="Labels of held-out prompts (s2t label).")
    adapters: list[str] = HfArg(help="Trained adapters, one per seed; figures are their mean.")
    model: str | None = HfArg(default=None, help="Base model (default: the one that the adapter names).")
    train_labels: str | None = HfArg(
        default=None, help="Training labels of the adapters, for the token prior; they must share no problem."
    )
    output: str | None = HfArg(default=None, help="JSON file to write.")
    batch_size: int = HfArg(default=32, help="Trajectories per forward.")
    dtype: str = HfArg(default="auto", help="Type of the weights.")


def compare(
    runs: list[ScoredPoints],
    fusions: list[FusionWeights],
    prior: Counter | None,
    keep_N: torch.Tensor,
    problems_N: np.ndarray,
) -> dict[str, dict]:
    """Name -> Agree@1 in per cent and, for those that give scores, Spearman, with their intervals.

    Args:
        runs, fusions: points as each seed's selector scores them, and its fusion weights.
        prior: counts of [`controls.token_prior`]; `None` for no such row.
        keep_N: points that count.
        problems_N: problem of each point: problems are resampled, with all their points.
    """
    kept = [run.where(keep_N) for run in runs]
    first, problems_N = kept[0], problems_N[keep_N.numpy()]
    target_N, ranked_N = first.target_N.numpy(), first.mask_NK.sum(-1) >= MIN_RANKED
    rows = {}
    for name, (choices_SN, scores_SNK) in contenders(kept, fusions, prior).items():
        hits_SN = find_agreement([choice_N.numpy() for choice_N in choices_SN], target_N)
        hits = mean_over_points(hits_SN, problems_N)
        rows[name] = {"agree_at_1": round(100 * hits["value"], 1), "ci": [round(100 * edge, 1) for edge in hits["ci"]]}
        if scores_SNK and bool(ranked_N.any()):
            rank_SN = np.stack([spearman(s_NK, first.teacher_NK, first.mask_NK)[ranked_N] for s_NK in scores_SNK])
            ranks = mean_over_points(rank_SN, problems_N[ranked_N.numpy()])
            rows[name]["spearman"] = round(ranks["value"], 3)
            rows[name]["spearman_ci"] = [round(edge, 3) for edge in ranks["ci"]]
    return rows


def contenders(
    runs: list[ScoredPoints], fusions: list[FusionWeights], prior: Counter | None
) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Name -> the candidates (N,) that it chooses and the scores (N, K) that it gives, one entry per seed.

    Those that only choose give no scores.
    """
    first = runs[0]
    generator = torch.Generator().manual_seed(0)
    noise_NK = torch.rand(first.mask_NK.shape, generator=generator)
    found = {
        "student first": ([torch.zeros_like(first.target_N)], [first.logprobs_NK]),
        # a point without a choice keeps the first candidate, whoever selects
        "second candidate": ([(first.mask_NK.sum(-1) > 1).long()], []),
        "random candidate": ([noise_NK.masked_fill(~first.mask_NK, -1.0).argmax(-1)], []),
    }
    if prior is not None:
        counts_NK = prior_scores(prior, first.candidate_ids_NK)
        found["token prior"] = ([counts_NK.masked_fill(~first.mask_NK, -1.0).argmax(-1)], [counts_NK])
    pairs = list(zip(runs, fusions))
    fused = [
        fused_scores(own.scores_NK, own.logprobs_NK, own.mask_NK, weights, own.router_N) for own, weights in pairs
    ]
    found["s2t-local"] = ([own.choice(FusionWeights()) for own in runs], [own.scores_NK for own in runs])
    found["s2t-local, fused"] = ([own.choice(weights) for own, weights in pairs], fused)
    return found


def read_labels_and_prior(
    args: AgreementArguments, configs: list[SelectorConfig]
) -> tuple[Dataset, TrajectoryHeader, Counter | None]:
    """Labels that no adapter has seen, their header, and the token prior of other ones.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: for labels without a threshold of the divergence, or that were seen, adapters that cannot be
            compared, or a model that is none.
    """
    labels, header = read_held_out_labels(args.labels)
    if header is None or header.divergence_threshold is None:
        raise ValueError(f"`labels` {args.labels!r} have no header with a divergence threshold: label again.")
    shapes = {(config.num_candidates, config.min_prob_ratio) for config in configs}
    if len(shapes) > 1:
        raise ValueError(f"`adapters` must share K and candidate floor to be compared, got {sorted(shapes)}.")
    for adapter in args.adapters:
        check_unseen(adapter, labels["problem_id"], STAGES, "labels")
    prior = None
    if args.train_labels is not None:
        train_labels, _ = read_labels(args.train_labels)
        shared = set(train_labels["problem_id"]) & set(labels["problem_id"])
        if shared:
            raise ValueError(
                f"`labels` and `train_labels` share {len(shared)} problems ({sorted(shared)[:3]} ...): measure on "
                "prompts that the selector was not trained on."
            )
        prior = token_prior(train_labels)
    for adapter, config in zip(args.adapters, configs):
        check_model("model", base_model_of(adapter, config, args.model))
    return labels, header, prior


def format_rows(rows: dict[str, dict]) -> list[str]:
    """The rows of [`compare`] as lines of text."""
    lines = []
    for row, figures in rows.items():
        lines.append(f"  {row:<18} {figures['agree_at_1']:5.1f}  " + "[{:.1f}, {:.1f}]".format(*figures["ci"]))
        if "spearman" in figures:
            lines[-1] += f"   {figures['spearman']:.3f}  " + "[{:.3f}, {:.3f}]".format(*figures["spearman_ci"])
    return lines


def main(argv: list[str] | None = None) -> None:
    (args,) = Parser(AgreementArguments).parse_args_and_config(argv)
    configs = [SelectorConfig.from_pretrained(adapter) for adapter in args.adapters]
    labels, header, prior = read_labels_and_prior(args, configs)
    runs, fusions = [], []
    for adapter, config in zip(args.adapters, configs):
        model = load_model(args.model or config.base_model, args.dtype, default_device())
        runs.append(score_labels(LocalSelector.from_pretrained(adapter, model), labels, args.batch_size))
        fusions.append(config.fusion or FusionWeights())

    points, rows = runs[0], rows_with_points(labels)
    problems_N = problems_of_points(rows["problem_id"], rows["positions"])
    at_kl_N, has_choice_N = points.divergence_N >= header.divergence_threshold, points.mask_NK.sum(-1) > 1
    ranks_NK = points.candidate_ids_NK == points.teacher_top_N[:, None]
    sizes = [k for k in HIT_SIZES if k <= ranks_NK.shape[1]]
    hit_at_k = {str(k): round(float(ranks_NK[at_kl_N, :k].any(-1).float().mean()), 4) for k in sizes}
    print(f"\n{len(labels)} trajectories, {len(at_kl_N)} labelled points, {int(at_kl_N.sum())} of them top-KL")
    print("Hit@K at the top-KL points: " + ", ".join(f"@{k} {value:.3f}" for k, value in hit_at_k.items()))
    agree = {}
    for name, keep_N in (("kl", at_kl_N), ("choice", has_choice_N)):
        if not bool(keep_N.any()):
            print(f"\nno {name} points")
            continue
        agree[name] = compare(runs, fusions, prior, keep_N, problems_N)
        count = int(keep_N.sum())
        print(f"\nAgree@1 in per cent, and Spearman; {name} points ({count}), mean of {len(runs)} selector seeds")
        print("\n".join(format_rows(agree[name])))
    if args.output:
        meta = {
            "labels": args.labels,
            "adapters": args.adapters,
            "model": header.model,
            "teacher_model": header.teacher_model,
            "points": len(at_kl_N),
            "kl_points": int(at_kl_N.sum()),
            "choice_points": int(has_choice_N.sum()),
        }
        report = {"meta": meta, "hit_at_k": hit_at_k, "agree_at_1": agree}
        print(f"\nwritten to {write_json(Path(args.output), report)}")
