"""The fused decision, the fit of its weights, and choices by weights that were fitted elsewhere.

Legend: N points, K candidates.
"""

import pytest
import torch

from transformers_s2t import FusionWeights
from transformers_s2t.calibration.scored_points import Flips, ScoredPoints, fit_fusion_to_points
from transformers_s2t.fusion import cross_fitted_choice, decide, fit_fusion, fused_scores
from transformers_s2t.proposals import Proposals


K = 4
KNOWN = FusionWeights(3.0, 0.7, -0.5, 0.9)


def make_points(num_points=400, seed=0, weights=KNOWN, scale=1.0):
    """Points (scores, logprobs, mask, target, router) whose targets are drawn from the fused scores' softmax."""
    generator = torch.Generator().manual_seed(seed)
    scores_NK = torch.rand(num_points, K, generator=generator) * scale
    logprobs_NK = torch.log_softmax(2 * torch.randn(num_points, K, generator=generator), -1).sort(descending=True)[0]
    mask_NK = torch.arange(K) < torch.randint(1, K + 1, (num_points, 1), generator=generator)
    router_N = 2 * torch.randn(num_points, generator=generator) - 1.0
    fused_NK = fused_scores(scores_NK / scale, logprobs_NK, mask_NK, weights, router_N)
    target_N = torch.multinomial(fused_NK.softmax(-1), 1, generator=generator)[:, 0]
    return scores_NK.masked_fill(~mask_NK, 0.0), logprobs_NK, mask_NK, target_N, router_N


@pytest.mark.parametrize("weights", [(1,), (0, 1), (0.5, 0.3, -0.2), (2.0, -0.4, 0.1, 0.8), (1, 0, 0, -0.6)])
def test_fused_scores_equal_a_double_loop(weights):
    fusion = FusionWeights(*weights)
    scores_NK, logprobs_NK, mask_NK, _, router_N = make_points(50)
    fused_NK = fused_scores(scores_NK, logprobs_NK, mask_NK, fusion, router_N)
    choice_N = decide(scores_NK, Proposals(torch.zeros_like(mask_NK).long(), logprobs_NK, mask_NK), fusion, router_N)
    for n in range(50):
        best, best_value = None, float("-inf")
        for k in range(K):
            if not mask_NK[n, k]:
                assert fused_NK[n, k] == float("-inf")
                continue
            value = fusion.selector * scores_NK[n, k].item() + fusion.logprob * logprobs_NK[n, k].item()
            if k > 0:
                value += fusion.switch + fusion.router * router_N[n].item()
            assert fused_NK[n, k].item() == pytest.approx(value, abs=1e-5)
            if value > best_value:
                best, best_value = k, value
        assert choice_N[n] == best


def test_a_log_probability_of_minus_infinity_below_the_floor_does_no_harm():
    logprobs = torch.tensor([[-0.1, -3.0, float("-inf")]])
    mask = torch.tensor([[True, True, False]])
    for fusion in (FusionWeights(), FusionWeights(1, 0.5, 0.1), FusionWeights(1, -0.5)):
        fused = fused_scores(torch.zeros(1, 3), logprobs, mask, fusion)
        assert fused.isneginf().tolist() == [[False, False, True]] and not fused.isnan().any()
    logprobs, mask = logprobs.repeat(20, 1), mask.repeat(20, 1)
    fit_fusion(torch.rand(20, 3), logprobs, mask, torch.arange(20) % 2)


def test_ties_go_to_the_higher_ranked_also_where_the_router_makes_them():
    logprobs, mask = torch.tensor([[-1.0, -2.0, -3.0]]), torch.ones(1, 3, dtype=torch.bool)
    proposals = Proposals(torch.tensor([[7, 8, 9]]), logprobs, mask)
    assert decide(torch.zeros(1, 3), proposals, FusionWeights()) == 0
    assert decide(torch.tensor([[0.0, 0.5, 0.5]]), proposals, FusionWeights()) == 1
    router = torch.tensor([2.0])
    assert decide(torch.tensor([[0.5, 0.0, 0.0]]), proposals, FusionWeights(1, 0, -0.5, 0.5), router) == 0  # level
    assert decide(torch.tensor([[0.5, 0.0, 0.0]]), proposals, FusionWeights(1, 0, 0, 0.5), router) == 1


def test_a_router_weight_without_logits_is_an_error_and_logits_without_a_weight_are_none():
    scores_NK, logprobs_NK, mask_NK, _, router_N = make_points(5)
    with pytest.raises(ValueError, match="gives the router the weight 0.5, but `router_N` is None"):
        fused_scores(scores_NK, logprobs_NK, mask_NK, FusionWeights(router=0.5))
    with pytest.raises(ValueError, match="`router_N` is None"):
        decide(scores_NK, Proposals(mask_NK.long(), logprobs_NK, mask_NK), FusionWeights(router=0.5))
    plain = fused_scores(scores_NK, logprobs_NK, mask_NK, FusionWeights())
    assert torch.equal(plain, fused_scores(scores_NK, logprobs_NK, mask_NK, FusionWeights(), router_N))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
@pytest.mark.parametrize("router", [0.9, -0.4, 0.0])
def test_the_fit_recovers_the_weights_that_made_the_targets(router, scale):
    """Whatever the scores' unit, and with a router whose logits are far from 0 on average."""
    known = FusionWeights(3.0, 0.7, -0.5, router)
    scores_NK, logprobs_NK, mask_NK, target_N, router_N = make_points(20_000, weights=known, scale=scale)
    found = fit_fusion(scores_NK, logprobs_NK, mask_NK, target_N, router_N)
    assert found.selector * scale == pytest.approx(known.selector, abs=0.15)
    assert found.logprob == pytest.approx(known.logprob, abs=0.05)
    assert found.switch == pytest.approx(known.switch, abs=0.1)
    assert found.router == pytest.approx(known.router, abs=0.05)


def test_without_a_router_its_weight_is_zero_and_with_a_useless_one_near_it():
    *points, router_N = make_points(20_000, weights=FusionWeights(3.0, 0.7, -0.5))
    without = fit_fusion(*points)
    assert without.router == 0
    useless = fit_fusion(*points, router_N)
    assert useless.router == pytest.approx(0, abs=0.03)
    assert useless.selector == pytest.approx(without.selector, abs=0.05)
    constant = fit_fusion(*points, torch.full_like(router_N, 3.0))  # no more than the switch says
    assert constant == without


def test_the_fit_is_the_maximum_of_the_likelihood():
    """Against steps away from it, on the original scale."""
    scores_NK, logprobs_NK, mask_NK, target_N, router_N = make_points(300)
    found = fit_fusion(scores_NK, logprobs_NK, mask_NK, target_N, router_N)

    def loss(**changes):
        weights = FusionWeights(**(vars(found) | changes))
        fused_NK = fused_scores(scores_NK.double(), logprobs_NK.double(), mask_NK, weights, router_N)
        return float(torch.nn.functional.cross_entropy(fused_NK, target_N))

    for name, value in vars(found).items():
        assert loss(**{name: value + 0.1}) > loss() < loss(**{name: value - 0.1}), name


def test_points_without_a_choice_do_not_count():
    points = make_points(200)
    keep_N = points[2].sum(-1) > 1
    assert 0 < keep_N.sum() < 200
    assert fit_fusion(*points) == fit_fusion(*(tensor[keep_N] for tensor in points))
    few_N = keep_N.cumsum(0) <= 9
    with pytest.raises(ValueError, match="needs at least 10 decision points, got 9"):
        fit_fusion(*(tensor[few_N] for tensor in points))


def test_targets_that_the_score_tells_without_an_error_leave_the_weights_finite():
    scores_NK, logprobs_NK, _, _, router_N = make_points(100)
    mask_NK = torch.ones_like(scores_NK, dtype=torch.bool)
    scores_NK = torch.rand(100, K, generator=torch.Generator().manual_seed(2))
    fusion = fit_fusion(scores_NK, logprobs_NK, mask_NK, scores_NK.argmax(-1), router_N)
    proposals = Proposals(mask_NK.long(), logprobs_NK, mask_NK)
    assert torch.equal(decide(scores_NK, proposals, fusion, router_N), scores_NK.argmax(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Cross-fitting


def test_a_cross_fitted_choice_is_a_fit_on_the_other_folds_by_hand():
    scores_NK, logprobs_NK, mask_NK, target_N, router_N = make_points(120)
    groups_N = torch.arange(120) * 7 % 31 * 1000  # 31 groups of 3 or 4 points each
    for num_folds in (2, 3):
        found_N = cross_fitted_choice(scores_NK, logprobs_NK, mask_NK, target_N, groups_N, router_N, num_folds)
        numbers = sorted(set(groups_N.tolist()))
        fold_N = torch.tensor([numbers.index(group) % num_folds for group in groups_N.tolist()])
        for fold in range(num_folds):
            own_N = fold_N == fold
            rest = (tensor[~own_N] for tensor in (scores_NK, logprobs_NK, mask_NK, target_N, router_N))
            fusion = fit_fusion(*rest)
            own = Proposals(mask_NK[own_N].long(), logprobs_NK[own_N], mask_NK[own_N])
            assert torch.equal(found_N[own_N], decide(scores_NK[own_N], own, fusion, router_N[own_N]))


def test_a_cross_fitted_choice_never_reads_the_targets_of_a_points_own_fold():
    """Changing them changes the in-sample choice, and never the cross-fitted one."""
    scores_NK, logprobs_NK, mask_NK, target_N, _ = make_points(200)
    groups_N = torch.arange(200) // 5
    own_N = groups_N % 2 == 0
    changed_N = torch.where(own_N, (mask_NK.sum(-1) - 1), target_N)  # the last candidate above the floor
    before_N = cross_fitted_choice(scores_NK, logprobs_NK, mask_NK, target_N, groups_N)
    after_N = cross_fitted_choice(scores_NK, logprobs_NK, mask_NK, changed_N, groups_N)
    assert torch.equal(before_N[own_N], after_N[own_N]) and not torch.equal(before_N[~own_N], after_N[~own_N])
    proposals = Proposals(mask_NK.long(), logprobs_NK, mask_NK)
    in_sample = [
        decide(scores_NK, proposals, fit_fusion(scores_NK, logprobs_NK, mask_NK, targets_N))[own_N]
        for targets_N in (target_N, changed_N)
    ]
    assert not torch.equal(*in_sample)


def test_a_score_that_is_right_in_one_fold_alone_misleads_where_it_is_wrong():
    """In one half the score names the target, in the other it names what is not: in-sample half is right."""
    num_points = 200
    mask_NK = torch.ones(num_points, 2, dtype=torch.bool)
    logprobs_NK = torch.log(torch.tensor([0.5, 0.5])).repeat(num_points, 1)
    groups_N = torch.arange(num_points) % 2
    target_N = torch.randint(0, 2, (num_points,), generator=torch.Generator().manual_seed(0))
    named_N = torch.where(groups_N == 0, target_N, 1 - target_N)
    scores_NK = torch.nn.functional.one_hot(named_N, 2).float()
    choice_N = cross_fitted_choice(scores_NK, logprobs_NK, mask_NK, target_N, groups_N)
    assert not (choice_N == target_N).any()


def test_the_order_of_the_points_makes_no_difference():
    points = make_points(100)
    groups_N = torch.arange(100) // 4
    order_N = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    expected_N = cross_fitted_choice(*points[:4], groups_N, points[4])
    found_N = cross_fitted_choice(*(tensor[order_N] for tensor in points[:4]), groups_N[order_N], points[4][order_N])
    assert torch.equal(found_N, expected_N[order_N])


def test_what_cannot_be_cross_fitted_says_why():
    points = make_points(100)[:4]
    with pytest.raises(ValueError, match="2 folds needs as many groups of points, got 1"):
        cross_fitted_choice(*points, torch.zeros(100, dtype=torch.long))
    with pytest.raises(ValueError, match="needs at least 10 decision points, got"):
        cross_fitted_choice(*points, (torch.arange(100) < 95).long())
    with pytest.raises(ValueError, match="`num_folds` must be 2 or more, got 1"):
        cross_fitted_choice(*points, torch.arange(100), num_folds=1)


# ---------------------------------------------------------------------------------------------------------------------
# Points that a selector scored


def scored(router_N=None):
    """Teacher's best: 1, 0, 2, 0, 0; the last point has no choice."""
    teacher_NK = torch.tensor([[-2, -1, -3], [-1, -2, -3], [-3, -2, -1], [-1, -2, -3], [-4, -1, -1.0]])
    scores_NK = torch.tensor([[0.1, 0.9, 0.2], [0.1, 0.2, 0.9], [0.1, 0.9, 0.2], [0.9, 0.1, 0.1], [0.0, 0.0, 0.0]])
    mask_NK = torch.tensor([[True] * 3] * 4 + [[True, False, False]])
    ids_NK = torch.arange(3).repeat(5, 1)
    top_N, divergence_N = torch.zeros(5, dtype=torch.long), torch.zeros(5)
    return ScoredPoints(
        scores_NK, ids_NK, torch.full((5, 3), -1.0), teacher_NK, mask_NK, top_N, divergence_N, router_N
    )


def test_flips_are_counted_as_by_hand():
    points = scored()
    assert points.target_N.tolist() == [1, 0, 2, 0, 0]
    assert points.choice(FusionWeights()).tolist() == [1, 2, 1, 0, 0]
    assert points.flips(FusionWeights()) == Flips(helped=1, hurt=1, other=1)
    assert points.flips(FusionWeights(1, 0, -2)) == (0, 0, 0)
    assert points.with_choice().flips(FusionWeights()) == (1, 1, 1)
    gained = points.agreement(FusionWeights()) - points.agreement(FusionWeights(1, 0, -2))
    assert gained == pytest.approx((1 - 1) / 5)


def test_points_carry_the_routers_logits_or_none():
    router_N = torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0])
    fusion = FusionWeights(1, 0, 0, 1)
    with pytest.raises(ValueError, match="`router_N` is None"):
        scored().choice(fusion)
    assert scored().with_choice().router_N is None
    points = scored(router_N)
    assert points.flips(fusion) == Flips(helped=1, hurt=0, other=1)
    assert points.with_choice().router_N.tolist() == router_N[:4].tolist()
    assert points.with_choice().choice(fusion).tolist() == [1, 0, 1, 0]


def test_scored_points_are_fitted_with_their_router():
    scores_NK, logprobs_NK, mask_NK, target_N, router_N = make_points(300)
    teacher_NK = torch.nn.functional.one_hot(target_N, K).float()
    ids_NK = torch.arange(K).repeat(300, 1)
    points = ScoredPoints(scores_NK, ids_NK, logprobs_NK, teacher_NK, mask_NK, target_N, torch.zeros(300))
    assert fit_fusion_to_points(points) == fit_fusion(scores_NK, logprobs_NK, mask_NK, target_N)
    routed = fit_fusion_to_points(points._replace(router_N=router_N))
    assert routed == fit_fusion(scores_NK, logprobs_NK, mask_NK, target_N, router_N) and routed.router != 0
