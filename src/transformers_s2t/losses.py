"""The re-ranking objective: tensors in, tensor out. Knows nothing of models, adapters or trainers.

Legend: N decision points, K candidates, V vocabulary. `mask_NK` is True at real candidates above the floor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F


#: Most logits that [`chunked_text_kl`] holds at one time: 32 MiB in float32, several times that with its temporaries.
MAX_LOGITS = 1 << 23


def best_candidate(teacher_logprobs_NK: torch.Tensor, mask_NK: torch.Tensor) -> torch.Tensor:
    """Index (N,) of the target: the candidate in the mask that the teacher finds most likely."""
    return teacher_logprobs_NK.masked_fill(~mask_NK, float("-inf")).argmax(-1)


def selection_cross_entropy(
    scores_NK: torch.Tensor, mask_NK: torch.Tensor, target_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """-log softmax(scores / temperature)[target] per point (N,): the paper's loss (arXiv 2604.26940, section 3.3)."""
    logits_NK = (scores_NK / temperature).masked_fill(~mask_NK, float("-inf"))
    return F.cross_entropy(logits_NK, target_N, reduction="none")


def distribution_kl(
    scores_NK: torch.Tensor, teacher_logprobs_NK: torch.Tensor, mask_NK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL(teacher over the candidates || softmax(scores / temperature)) per point (N,), nats."""
    floor = torch.finfo(torch.float32).min
    teacher_NK = torch.log_softmax(teacher_logprobs_NK.float().masked_fill(~mask_NK, floor), dim=-1)
    student_NK = torch.log_softmax((scores_NK / temperature).masked_fill(~mask_NK, floor), dim=-1)
    terms_NK = teacher_NK.exp() * (teacher_NK - student_NK)
    return terms_NK.masked_fill(~mask_NK, 0.0).sum(-1)


def hard_negative_hinge(
    scores_NK: torch.Tensor, mask_NK: torch.Tensor, target_N: torch.Tensor, margin: float
) -> torch.Tensor:
    """max(0, margin - (score of the target - best other score)) per point (N,); 0 where there is no other."""
    target_score_N = scores_NK.gather(-1, target_N[:, None])[:, 0]
    others_NK = mask_NK & (torch.arange(scores_NK.shape[-1], device=scores_NK.device) != target_N[:, None])
    has_other_N = others_NK.any(-1)
    best_other_N = scores_NK.masked_fill(~others_NK, torch.finfo(scores_NK.dtype).min).amax(-1)
    gap_N = torch.where(has_other_N, target_score_N - best_other_N, torch.full_like(target_score_N, margin))
    return (margin - gap_N).clamp_min(0.0)


def text_kl(
    base_logits_NV: torch.Tensor, logits_NV: torch.Tensor, excluded_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(frozen base || tuned) over ordinary text tokens per position (N,), nats; `excluded_ids` are left out.

    The regulariser of the paper's form, where the adapter is on while the prefix is read.
    """
    base_NV, tuned_NV = base_logits_NV.float(), logits_NV.float()
    if excluded_ids is not None and len(excluded_ids) > 0:
        keep_V = torch.ones(base_NV.shape[-1], dtype=torch.bool, device=base_NV.device)
        keep_V[excluded_ids.to(base_NV.device)] = False
        base_NV, tuned_NV = base_NV[..., keep_V], tuned_NV[..., keep_V]
    base_NV = torch.log_softmax(base_NV, dim=-1)
    tuned_NV = torch.log_softmax(tuned_NV, dim=-1)
    return (base_NV.exp() * (base_NV - tuned_NV)).sum(-1)


def chunked_text_kl(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    base_ND: torch.Tensor,
    tuned_ND: torch.Tensor,
    excluded_ids: torch.Tensor | None = None,
    max_logits: int = MAX_LOGITS,
) -> torch.Tensor:
    """[`text_kl`] (N,) from last hidden states, without N V logits in memory.

    Positions are taken in chunks of `max_logits` / V. The gradient of `tuned_ND` is worked out with the chunk, so that
    its logits are computed once and nothing of size V is kept for the backward pass.

    Args:
        logits_of: the head, hidden states (n, D) -> logits (n, V). It is frozen: its weights get no gradient.
        base_ND: hidden states of the frozen base; no gradient.
        tuned_ND: hidden states with the adapter.
        excluded_ids: tokens that are not text.
        max_logits: most logits in one chunk.
    """
    return _ChunkedTextKL.apply(tuned_ND, base_ND.detach(), logits_of, excluded_ids, max_logits)


class _ChunkedTextKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tuned_ND, base_ND, logits_of, excluded_ids, max_logits):
        kl_N = torch.empty(len(tuned_ND), dtype=torch.float32, device=tuned_ND.device)
        grad_ND = torch.empty_like(tuned_ND) if ctx.needs_input_grad[0] else None
        start, size = 0, 1  # the first position alone tells how wide logits are
        while start < len(tuned_ND):
            chunk = slice(start, start + size)
            base_nV = logits_of(base_ND[chunk])
            tuned_nD = tuned_ND[chunk].detach()
            with torch.set_grad_enabled(grad_ND is not None):
                tuned_nD.requires_grad_(grad_ND is not None)
                kl_n = text_kl(base_nV, logits_of(tuned_nD), excluded_ids)
                if grad_ND is not None:
                    (grad_ND[chunk],) = torch.autograd.grad(kl_n.sum(), tuned_nD)
            kl_N[chunk] = kl_n.detach()
            start, size = start + size, max(1, max_logits // base_nV.shape[-1])
        ctx.save_for_backward(grad_ND)
        return kl_N

    @staticmethod
    def backward(ctx, grad_N):
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_N[:, None].to(grad_ND.dtype), None, None, None, None


def spearman(scores_NK: torch.Tensor, teacher_logprobs_NK: torch.Tensor, mask_NK: torch.Tensor) -> torch.Tensor:
    """Rank correlation of two orders of the candidates in the mask, per point (N,): in [-1, 1], ties share a rank.

    0 where one of the two ranks all candidates equal. Any leading shape.
    """

    def centred_ranks(values_NK: torch.Tensor) -> torch.Tensor:
        below_NKK = (values_NK[..., None, :] < values_NK[..., :, None]) & mask_NK[..., None, :]
        level_NKK = (values_NK[..., None, :] == values_NK[..., :, None]) & mask_NK[..., None, :]
        ranks_NK = below_NKK.sum(-1) + 0.5 * level_NKK.sum(-1)
        mean_N1 = (ranks_NK * mask_NK).sum(-1, keepdim=True) / mask_NK.sum(-1, keepdim=True).clamp_min(1)
        return (ranks_NK - mean_N1) * mask_NK

    ours_NK, theirs_NK = centred_ranks(scores_NK.float()), centred_ranks(teacher_logprobs_NK.float())
    norm_N = (ours_NK.square().sum(-1) * theirs_NK.square().sum(-1)).sqrt()
    return torch.where(norm_N > 0, (ours_NK * theirs_NK).sum(-1) / norm_N.clamp_min(1e-9), torch.zeros_like(norm_N))
