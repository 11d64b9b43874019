"""recipes/agreement.py: Agree@1 and rank correlations at labelled points, against loops over points."""

from collections import Counter

import numpy as np
import pytest
import torch

from s2t_recipes.evaluation import agreement
from transformers_s2t import FusionWeights
from transformers_s2t.calibration.scored_points import ScoredPoints


NUM_POINTS, NUM_CANDIDATES = 60, 5
PROBLEMS_N = np.arange(NUM_POINTS) // 4


def random_points(seed, labels_seed=0):
    """Points of the same labels whatever the selector's seed: some with one or two candidates, some scores level."""
    of_labels, own = (torch.Generator().manual_seed(number) for number in (labels_seed, 100 + seed))
    shape = (NUM_POINTS, NUM_CANDIDATES)
    logprobs_NK = torch.randn(shape, generator=of_labels).log_softmax(-1).sort(-1, descending=True).values
    width_N = torch.randint(1, NUM_CANDIDATES + 1, (NUM_POINTS,), generator=of_labels)
    teacher_NK = torch.randint(-4, 0, shape, generator=of_labels).float()
    candidate_ids_NK = torch.rand((NUM_POINTS, 30), generator=of_labels).argsort(-1)[:, :NUM_CANDIDATES]
    return ScoredPoints(
        scores_NK=torch.randint(0, 6, shape, generator=own) / 5,
        candidate_ids_NK=candidate_ids_NK,
        logprobs_NK=logprobs_NK,
        teacher_NK=teacher_NK,
        mask_NK=torch.arange(NUM_CANDIDATES) < width_N[:, None],
        teacher_top_N=torch.randint(0, 30, (NUM_POINTS,), generator=of_labels),
        divergence_N=torch.rand(NUM_POINTS, generator=of_labels),
        router_N=torch.randn(NUM_POINTS, generator=own),
    )


def rank_correlation(scores, others):
    """Pearson's correlation of ranks; level values share the mean of their ranks."""

    def ranks(values):
        ordered = sorted(values)
        return [np.mean([place for place, value in enumerate(ordered) if value == own]) for own in values]

    one, other = ranks(scores), ranks(others)
    return 0.0 if len(set(one)) == 1 or len(set(other)) == 1 else float(np.corrcoef(one, other)[0, 1])


def fused(points, fusion, n, k):
    return (
        fusion.selector * float(points.scores_NK[n, k])
        + fusion.logprob * float(points.logprobs_NK[n, k])
        + (k > 0) * (fusion.switch + fusion.router * float(points.router_N[n]))
    )


@pytest.mark.parametrize("part", ["all", "some"])
def test_figures_are_those_of_a_loop_over_points(part):
    runs = [random_points(seed) for seed in range(2)]
    fusions = [FusionWeights(1.5, 0.3, -0.2, 0.4), FusionWeights(0.5, 1.0, 0.1, -0.3)]
    prior = Counter({id: 1 + id % 4 for id in range(20)})
    keep_N = torch.ones(NUM_POINTS, dtype=torch.bool) if part == "all" else runs[0].divergence_N >= 0.5
    rows = agreement.compare(runs, fusions, prior, keep_N, PROBLEMS_N)
    first = runs[0]
    scores = {  # of each seed
        "student first": [lambda n, k: float(first.logprobs_NK[n, k])],
        "token prior": [lambda n, k: prior[int(first.candidate_ids_NK[n, k])]],
        "s2t-local": [lambda n, k, points=points: float(points.scores_NK[n, k]) for points in runs],
        "s2t-local, fused": [
            lambda n, k, points=points, fusion=fusion: fused(points, fusion, n, k)
            for points, fusion in zip(runs, fusions)
        ],
    }
    for name, by_seed in scores.items():
        hits, correlations = [], []
        for score in by_seed:
            for n in keep_N.nonzero()[:, 0].tolist():
                offered = range(int(first.mask_NK[n].sum()))
                own, teacher = [score(n, k) for k in offered], [float(first.teacher_NK[n, k]) for k in offered]
                hits.append(own.index(max(own)) == teacher.index(max(teacher)))
                if len(offered) >= 3:
                    correlations.append(rank_correlation(own, teacher))
        assert rows[name]["agree_at_1"] == pytest.approx(100 * np.mean(hits), abs=0.0501), name
        assert rows[name]["spearman"] == pytest.approx(np.mean(correlations), abs=5.01e-4), name
        for figure, ci in (("agree_at_1", "ci"), ("spearman", "spearman_ci")):
            assert rows[name][ci][0] <= rows[name][figure] <= rows[name][ci][1]
    for name in ("second candidate", "random candidate"):  # they choose, and order nothing
        assert "spearman" not in rows[name]


def test_a_perfect_order_and_its_reverse():
    points = random_points(0)
    generator = torch.Generator().manual_seed(5)
    points = points._replace(teacher_NK=torch.rand(points.teacher_NK.shape, generator=generator))  # nothing level
    every_N = torch.ones(NUM_POINTS, dtype=torch.bool)
    for sign in (1, -1):
        rows = agreement.compare(
            [points._replace(scores_NK=sign * points.teacher_NK)], [FusionWeights()], None, every_N, PROBLEMS_N
        )
        assert rows["s2t-local"]["spearman"] == rows["s2t-local, fused"]["spearman"] == sign
        assert rows["s2t-local"]["spearman_ci"] == [sign, sign]
        assert (rows["s2t-local"]["agree_at_1"] == 100) == (sign == 1)
    assert "token prior" not in rows
    level = agreement.compare(
        [points._replace(scores_NK=torch.zeros_like(points.scores_NK))], [FusionWeights()], None, every_N, PROBLEMS_N
    )
    assert level["s2t-local"]["spearman"] == 0
    assert level["s2t-local"]["agree_at_1"] == level["student first"]["agree_at_1"]


def test_what_is_below_the_floor_changes_nothing():
    points = random_points(0)
    every_N = torch.ones(NUM_POINTS, dtype=torch.bool)
    expected = agreement.compare([points], [FusionWeights(1.0, 0.5)], Counter({3: 2}), every_N, PROBLEMS_N)
    changed = [
        torch.where(points.mask_NK, values_NK, torch.full_like(values_NK, filler))
        for values_NK, filler in ((points.scores_NK, 9.0), (points.teacher_NK, 9.0), (points.candidate_ids_NK, 3))
    ]
    changed = points._replace(scores_NK=changed[0], teacher_NK=changed[1], candidate_ids_NK=changed[2])
    assert agreement.compare([changed], [FusionWeights(1.0, 0.5)], Counter({3: 2}), every_N, PROBLEMS_N) == expected


def test_two_candidates_have_no_order_to_speak_of():
    points = random_points(0)
    keep_N = points.mask_NK.sum(-1) == 2
    rows = agreement.compare([points], [FusionWeights()], Counter(), keep_N, PROBLEMS_N)
    assert not any("spearman" in row for row in rows.values())
    assert rows["s2t-local"]["agree_at_1"] > 0
