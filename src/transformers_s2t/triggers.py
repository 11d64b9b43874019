"""When to ask the selector: one value per step, bigger = more in doubt, compared with a calibrated threshold.

Pure functions of logits, the same for decoding, labeling and calibration. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import torch


def entropy(logits_BV: torch.Tensor, top_k: int = 64) -> torch.Tensor:
    """Entropy of the student over its renormalised `top_k` tokens (all, where there are fewer), nats, shape (B,).

    64 tokens as in arXiv 2604.26940 (LLM-free triggers).
    """
    top_BK = torch.topk(logits_BV.float(), min(top_k, logits_BV.shape[-1]), dim=-1).values
    logp_BK = torch.log_softmax(top_BK, dim=-1)
    return -(logp_BK.exp() * logp_BK.masked_fill(torch.isinf(logp_BK), 0.0)).sum(-1)


def margin(logits_BV: torch.Tensor) -> torch.Tensor:
    """Minus the log-probability difference of the two best tokens, nats, shape (B,): 0 = a tie, -5 = a clear case."""
    top_B2 = torch.topk(logits_BV.float(), min(2, logits_BV.shape[-1]), dim=-1).values
    return top_B2[..., -1] - top_B2[..., 0]


def kl_divergence(teacher_logits_BV: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the tokens that both have and the student may write, nats, shape (B,).

    The heads of one family may be padded to different sizes (Qwen2.5: 151936 and 152064 rows), and a user's processors
    may forbid tokens (-inf), which cannot be chosen: both sides are renormalised over the rest.
    """
    shared = min(teacher_logits_BV.shape[-1], logits_BV.shape[-1])
    student_BV = torch.log_softmax(logits_BV[..., :shared].float(), dim=-1)
    teacher_BV = teacher_logits_BV[..., :shared].float().masked_fill(torch.isneginf(student_BV), float("-inf"))
    teacher_BV = torch.log_softmax(teacher_BV, dim=-1)
    difference_BV = (teacher_BV - student_BV).masked_fill(torch.isinf(student_BV) | torch.isinf(teacher_BV), 0.0)
    return (teacher_BV.exp() * difference_BV).sum(-1).clamp_min(0.0)


def calibrate_threshold(values: torch.Tensor, target_rate: float) -> float:
    """The threshold at which `values >= threshold` holds for the share `target_rate` of `values`.

    Args:
        values: trigger values at every generated position of held-out rollouts, shape (N,). -inf marks positions
            that can never trigger (warm-up): they count in the rate.
        target_rate: in (0, 1].

    Returns:
        A value midway between two of the given ones, so that rounding does not move the rate. Where ties straddle the
        rate, the side that comes closer to it is taken.

    Raises:
        ValueError: for a rate out of range or for no values.
    """
    if not 0 < target_rate <= 1:
        raise ValueError(f"`target_rate` must be in (0, 1], got {target_rate!r}.")
    values = values.flatten().double()
    if torch.isnan(values).any():
        raise ValueError("`values` holds nan.")
    total = values.numel()
    values = values[torch.isfinite(values)]
    if values.numel() == 0:
        raise ValueError("`values` holds no finite trigger value: there is nothing to calibrate on.")
    levels, counts = torch.unique(values, return_counts=True)  # ascending
    rates = counts.flip(0).cumsum(0).flip(0) / total  # share of values >= levels[i]
    rates = torch.cat([rates, rates.new_zeros(1)])  # and above them all
    best = int((rates - target_rate).abs().argmin())
    if best == 0:
        return float(levels[0]) - 1e-6
    if best == len(levels):
        return float(levels[-1]) + 1e-6
    return float((levels[best] + levels[best - 1]) / 2)
