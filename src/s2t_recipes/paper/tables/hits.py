"""The kind "sufficiency": how often the teacher's token is among the student's first K, from labels alone."""

from __future__ import annotations

import numpy as np
import torch

from s2t_recipes.estimates import bootstrap_interval
from s2t_recipes.paper.pipeline import Pipeline
from s2t_recipes.paper.tables.result import Collect, Result, job_text
from transformers_s2t.labels.folder import read_labels
from transformers_s2t.proposals import floor_mask


def sufficiency(pipeline: Pipeline, spec: dict) -> Collect:
    """Hit@K: how often the teacher's token is among the student's first K.

    Settings:
        hits: values of K.
        part: part of the pair whose problems are used; "test" by default.
        problems: number of its first problems; by default all.
        buckets: upper edges of ranges of KL from the top, as shares of the tokens; one row for each range.
        top: instead of `buckets`, shares of the tokens with the highest KL; one row for each, one more for the stored
            points with a choice (all of them, where labels have `points: floor+kl`), and 95 % intervals over problems.
    """
    labels = pipeline.labels(spec.get("part", "test"), spec.get("problems"))

    def collect() -> Result:
        data, header = read_labels(labels.path, split="all")
        divergence_T = np.concatenate([np.asarray(row) for row in data["divergence"]])
        starts = np.cumsum([0, *map(len, data["divergence"])])
        found = []  # (divergence, rank of the teacher's token, candidates, of those above the floor, problem)
        numbers = {id: number for number, id in enumerate(dict.fromkeys(data["problem_id"]))}
        for start, row in zip(starts, data):
            columns = (row[name] for name in ("positions", "candidate_ids", "teacher_top_id", "student_logprobs"))
            for position, ids, top, logprobs in zip(*columns):
                rank = ids.index(top) if top in ids else np.inf
                divergence = divergence_T[start + position - row["prompt_length"]]
                offered = int(floor_mask(torch.tensor(logprobs), header.min_prob_ratio).sum())
                found.append((divergence, rank, len(ids), offered, numbers[row["problem_id"]]))
        divergence_N, rank_N, width_N, offered_N, problem_N = np.array(found).T
        hits = [k for k in spec["hits"] if k <= width_N.min()]  # beyond what was stored nobody knows
        form = "interval" if "top" in spec else "1f"
        rows, missing = [], []

        def add(name: str, inside_N: np.ndarray, lower: float | None = None) -> None:
            row = {"bucket": name, "points": int(inside_N.sum()), "divergence": lower}
            for k in hits if inside_N.any() else ():
                hit_N = rank_N[inside_N] < k
                row[f"hit{k}"] = 100 * float(hit_N.mean())
                if form == "interval":
                    points_P = np.bincount(problem_N[inside_N].astype(int), minlength=len(numbers))
                    hits_P = np.bincount(problem_N[inside_N].astype(int), hit_N, minlength=len(numbers))
                    some = points_P > 0
                    share_P = 100 * hits_P[some] / points_P[some]
                    row[f"hit{k}_ci"] = bootstrap_interval(share_P, weights_N=points_P[some])
            rows.append(row)

        low = 0.0
        for high in spec.get("buckets") or spec["top"]:
            upper = np.inf if low == 0 else np.quantile(divergence_T, 1 - low)
            lower = np.quantile(divergence_T, 1 - high)
            num_tokens = int(((divergence_T >= lower) & (divergence_T < upper)).sum())
            inside_N = (divergence_N >= lower) & (divergence_N < upper)
            if (found := int(inside_N.sum())) < num_tokens:  # the labels' threshold was estimated on some of them
                missing.append(f"{found} of the {num_tokens} tokens from {low:.0%} to {high:.0%} are labelled")
            name = f"top {100 * low:g} to {100 * high:g} %" if "buckets" in spec else f"top {100 * high:g} %"
            add(name, inside_N, float(lower))
            low = high if "buckets" in spec else 0.0
        if "top" in spec:
            add("points with a choice", offered_N > 1)
        columns = [("tokens by KL(teacher ‖ student)", "bucket", "text"), ("KL from, nats", "divergence", "2f")]
        columns += [("points", "points", "count"), *((f"Hit@{k}", f"hit{k}", form) for k in hits)]
        notes = [f"{len(data)} greedy texts of the small model, {len(divergence_T)} tokens."]
        notes += [f"{', '.join(missing)}: those above the label run's threshold, or with a choice."] if missing else []
        return Result(columns, rows, notes, [job_text(labels)])

    return collect
