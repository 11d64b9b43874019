"""The fused score that decides between candidates, and the fit of its weights. Tensors in, tensors out.

Legend: A or N points, K candidates (best first by the student), F features. `mask_NK` is True above the floor.
"""

from __future__ import annotations

import torch

from transformers_s2t.config import FusionWeights
from transformers_s2t.proposals import Proposals


MIN_POINTS = 10  # fewest points with a choice that three or four weights are fitted on


def fused_scores(
    scores_NK: torch.Tensor,
    logprobs_NK: torch.Tensor,
    mask_NK: torch.Tensor,
    fusion: FusionWeights,
    router_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """selector * score + logprob * log p_student + [not the first] * (switch + router * router_logit), (N, K).

    Args:
        scores_NK: the selector's scores.
        logprobs_NK: the student's log-probabilities, nats.
        mask_NK: candidates below the floor get -inf.
        fusion: the weights.
        router_N: the router's logits; read only where their weight is not 0.

    Raises:
        ValueError: where the router has a weight and its logits are missing.
    """
    if fusion.router and router_N is None:
        raise ValueError(
            f"`fusion` gives the router the weight {fusion.router:g}, but `router_N` is None: pass the router's "
            "logits, or weights with router=0."
        )
    fused_NK = fusion.selector * scores_NK.float()
    if fusion.logprob:
        fused_NK = fused_NK + fusion.logprob * logprobs_NK
    if fusion.switch or fusion.router:
        shift_N1 = fusion.router * router_N.float()[:, None] + fusion.switch if fusion.router else fusion.switch
        others_K = torch.arange(fused_NK.shape[-1], device=fused_NK.device) > 0
        fused_NK = fused_NK + shift_N1 * others_K
    return fused_NK.masked_fill(~mask_NK, float("-inf"))


def decide(
    scores_NK: torch.Tensor, proposals: Proposals, fusion: FusionWeights, router_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Index (N,) of the candidate with the best fused score among those above the floor.

    Ties go to the candidate that the student ranks higher.

    Raises:
        ValueError: where the router has a weight and its logits are missing.
    """
    return fused_scores(scores_NK, proposals.logprobs_BK, proposals.mask_BK, fusion, router_N).argmax(-1)


def fit_fusion(
    scores_NK: torch.Tensor,
    logprobs_NK: torch.Tensor,
    mask_NK: torch.Tensor,
    target_N: torch.Tensor,
    router_N: torch.Tensor | None = None,
    max_iterations: int = 200,
) -> FusionWeights:
    """Weights of the fused score that best predict the target: multinomial logistic regression, which is convex.

    Maximises the likelihood of the target under the softmax of the fused scores, in float64. Points without a choice
    are left out. Three or four numbers, so a few hundred points are enough.

    Args:
        scores_NK, logprobs_NK, mask_NK: as in [`fused_scores`].
        target_N: index of the right candidate, above the floor.
        router_N: the router's logits; without them its weight is 0.
        max_iterations: most iterations of L-BFGS.

    Raises:
        ValueError: for fewer than ten points with a choice.
    """
    keep_N = mask_NK.sum(-1) > 1
    if int(keep_N.sum()) < MIN_POINTS:
        raise ValueError(
            f"Fitting fusion weights needs at least {MIN_POINTS} decision points, got {int(keep_N.sum())}."
        )
    mask_NK, target_N = mask_NK[keep_N], target_N[keep_N]
    others_NK = torch.ones_like(mask_NK, dtype=torch.double)
    others_NK[:, 0] = 0.0
    features = [scores_NK[keep_N].double(), logprobs_NK[keep_N].double(), others_NK]
    mean = 0.0
    if router_N is not None:
        mean = float(router_N[keep_N].double().mean())
        features.append((router_N[keep_N].double()[:, None] - mean) * others_NK)
    features_NKF = torch.stack([feature_NK.masked_fill(~mask_NK, 0.0) for feature_NK in features], dim=-1)
    scale_F = _spread(features_NKF, mask_NK)
    features_NKF = features_NKF / scale_F
    weights_F = torch.zeros(len(features), dtype=torch.double, device=features_NKF.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights_F],
        max_iter=max_iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logits_NK = (features_NKF @ weights_F).masked_fill(~mask_NK, float("-inf"))
        # the second term keeps the weights finite where they can predict every target
        loss = torch.nn.functional.cross_entropy(logits_NK, target_N) + 1e-6 * weights_F.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    selector, logprob, switch, *rest = (weights_F.detach() / scale_F).tolist()
    router = rest[0] if rest else 0.0
    values = {"selector": selector, "logprob": logprob, "switch": switch - router * mean, "router": router}
    return FusionWeights(**{name: round(value, 6) for name, value in values.items()})


def _spread(features_NKF: torch.Tensor, mask_NK: torch.Tensor) -> torch.Tensor:
    """Standard deviation (F,) of each feature within points; differences between points tell no candidates apart.

    1 for a feature without information: float32 scores of two equal candidates differ by rounding.
    """
    count_N11 = mask_NK.sum(-1)[:, None, None]
    centred_NKF = features_NKF - features_NKF.sum(1, keepdim=True) / count_N11
    spread_F = centred_NKF[mask_NK].square().mean(0).sqrt()
    return torch.where(spread_F > 1e-6, spread_F, torch.ones_like(spread_F))


def cross_fitted_choice(
    scores_NK: torch.Tensor,
    logprobs_NK: torch.Tensor,
    mask_NK: torch.Tensor,
    target_N: torch.Tensor,
    groups_N: torch.Tensor,
    router_N: torch.Tensor | None = None,
    num_folds: int = 2,
) -> torch.Tensor:
    """Choice (N,) at every point, by weights that were fitted on other folds than its own.

    Shows what fusion gains on unseen problems without setting any aside. Groups go to the folds in turn, in the order
    of their numbers, so that the folds do not depend on the order of the points.

    Args:
        scores_NK, logprobs_NK, mask_NK, target_N, router_N: as in [`fit_fusion`].
        groups_N: integers. Points of one group (problem) are in one fold.
        num_folds: two or more.

    Raises:
        ValueError: for fewer groups than folds, or too few points outside a fold to fit weights on.
    """
    if num_folds < 2:
        raise ValueError(f"`num_folds` must be 2 or more, got {num_folds}.")
    groups, group_N = groups_N.unique(return_inverse=True)
    if len(groups) < num_folds:
        raise ValueError(f"Cross-fitting in {num_folds} folds needs as many groups of points, got {len(groups)}.")
    fold_N = group_N % num_folds
    choice_N = torch.zeros_like(target_N)
    for fold in range(num_folds):
        own_N = fold_N == fold
        fitted_on, decided = (
            [None if tensor is None else tensor[keep_N] for tensor in (scores_NK, logprobs_NK, mask_NK, router_N)]
            for keep_N in (~own_N, own_N)
        )
        weights = fit_fusion(*fitted_on[:3], target_N[~own_N], fitted_on[3])
        choice_N[own_N] = fused_scores(*decided[:3], weights, decided[3]).argmax(-1)
    return choice_N
