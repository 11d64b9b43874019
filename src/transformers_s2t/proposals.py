"""The student's proposals: its top-K next tokens, and which of them are good enough to be offered.

Pure functions of logits. Legend: B rows, K candidates, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Proposals(NamedTuple):
    """What the student offers at one step.

    Attributes:
        ids_BK: token ids, best first.
        logprobs_BK: the student's log-probabilities of them over the full vocabulary, nats.
        mask_BK: True where a candidate is above the floor. The first one always is.
    """

    ids_BK: torch.Tensor
    logprobs_BK: torch.Tensor
    mask_BK: torch.Tensor


def floor_mask(logprobs_BK: torch.Tensor, min_prob_ratio: float) -> torch.Tensor:
    """Which candidates are above the floor: p >= `min_prob_ratio` * p(best).

    Args:
        logprobs_BK: log-probabilities, best first, nats. Any leading shape.
        min_prob_ratio: in [0, 1]; 0 keeps every candidate with a finite log-probability.

    Returns:
        bool tensor of the same shape; the first candidate is always kept.
    """
    mask_BK = torch.isfinite(logprobs_BK)
    if min_prob_ratio > 0:
        floor = torch.log(torch.tensor(min_prob_ratio, dtype=logprobs_BK.dtype, device=logprobs_BK.device))
        mask_BK = mask_BK & (logprobs_BK >= logprobs_BK[..., :1] + floor)
    mask_BK[..., 0] = True
    return mask_BK


def exclude(logits_BV: torch.Tensor, excluded_ids: torch.Tensor | None) -> torch.Tensor:
    """Logits with -inf at `excluded_ids` (R,): neither triggers nor proposals see reserved tokens."""
    if excluded_ids is None or len(excluded_ids) == 0:
        return logits_BV
    return logits_BV.index_fill(-1, excluded_ids.to(logits_BV.device), float("-inf"))


def propose(logits_BV: torch.Tensor, num_candidates: int, min_prob_ratio: float = 0.0) -> Proposals:
    """The student's `num_candidates` best next tokens.

    Args:
        logits_BV: next-token logits after the user's own processors (-inf entries are never proposed). Any leading
            shape.
        num_candidates: K.
        min_prob_ratio: the candidate floor, see [`floor_mask`].

    Raises:
        ValueError: where the vocabulary is smaller than K.
    """
    logits_BV = logits_BV.float()
    vocab_size = logits_BV.shape[-1]
    if num_candidates > vocab_size:
        raise ValueError(f"`num_candidates` must be in [1, {vocab_size}], the vocabulary, got {num_candidates}.")
    top_BK, ids_BK = stable_topk(logits_BV, num_candidates)
    logprobs_BK = top_BK - torch.logsumexp(logits_BV, dim=-1, keepdim=True)
    return Proposals(ids_BK, logprobs_BK, floor_mask(logprobs_BK, min_prob_ratio))


def stable_topk(values_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.topk` whose first index is the one that `argmax` takes, so that K = 1 is greedy decoding in ties too."""
    top_BK, ids_BK = torch.topk(values_BV, k, dim=-1)
    first_B1 = torch.argmax(values_BV, dim=-1, keepdim=True)
    swap_BK = ids_BK == first_B1
    at_B1 = swap_BK.int().argmax(dim=-1, keepdim=True)
    found_B1 = swap_BK.any(dim=-1, keepdim=True)
    # if argmax's index is further down among equal values, swap the two: the order stays best first
    moved_BK = ids_BK.scatter(-1, at_B1, ids_BK[..., :1])
    moved_BK = torch.cat([first_B1, moved_BK[..., 1:]], dim=-1)
    ids_BK = torch.where(found_B1, moved_BK, torch.cat([first_B1, ids_BK[..., 1:]], dim=-1))
    return top_BK, ids_BK
