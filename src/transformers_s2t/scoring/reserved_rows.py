"""Scores of candidates from the logits of the reserved tokens.

Legend: K candidates, N positions, R reserved tokens, D hidden size.
"""

from __future__ import annotations

import torch
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from transformers_s2t.proposals import floor_mask


def candidate_scores(bin_logits_R: torch.Tensor, score_head: str = "bins") -> torch.Tensor:
    """Score of each candidate from its R reserved logits; any leading shape.

    "bins" is the paper's expected value, softmax(z) . linspace(0, 1, R), in [0, 1] (arXiv 2604.26940, section 3);
    "linear" is mean(z[R/2:]) - mean(z[:R/2]), without bounds.
    """
    bin_logits_R = bin_logits_R.float()
    num_bins = bin_logits_R.shape[-1]
    if score_head == "linear":
        return bin_logits_R[..., num_bins // 2 :].mean(-1) - bin_logits_R[..., : num_bins // 2].mean(-1)
    bins_R = torch.linspace(0.0, 1.0, num_bins, device=bin_logits_R.device)
    return torch.softmax(bin_logits_R, dim=-1) @ bins_R


class ReservedRows:
    """The trained rows (R, D) of the output head, in the order of `reserved_token_ids`. Calling the object reads them.

    Raises:
        ValueError: where the adapter holds no such rows, so that untrained logits are never read as scores.
    """

    def __init__(self, model: PreTrainedModel, reserved_token_ids: tuple[int, ...], adapter_name: str):
        head = model.get_output_embeddings()  # a tied head shares the embedding's rows
        layer = head.token_adapter if isinstance(head, TrainableTokensWrapper) else None
        if layer is not None and adapter_name in layer.trainable_tokens_delta:
            order = {id: row for row, id in enumerate(layer.token_indices[adapter_name])}
            if all(id in order for id in reserved_token_ids):
                self._rows, self._adapter_name = layer.trainable_tokens_delta, adapter_name
                self._order = torch.tensor([order[id] for id in reserved_token_ids])
                self._share: DTensor | None = None
                return
        raise ValueError(
            f"Adapter {adapter_name!r} holds no trained rows for the reserved tokens {list(reserved_token_ids)}: its "
            "LoraConfig needs `trainable_token_indices={'lm_head': reserved_token_ids}` (S2TTrainer sets it)."
        )

    def __call__(self) -> torch.Tensor:
        rows = self._rows[self._adapter_name] if self._share is None else self._share
        if isinstance(rows, DTensor):
            rows = rows.full_tensor(grad_placements=[Partial("avg")] * rows.device_mesh.ndim)
        return rows[self._order.to(rows.device)]

    def keep_share(self) -> None:
        """Under FSDP2, reads this process's shard of the rows from now on, even while the head's weights are gathered.

        FSDP2 gathers weights, and averages their gradients, around the forward of their module. Scores do not run the
        head's forward, and its forwards on text end before the scores have gradients. To be called before the first
        forward, while the head holds its shard alone.
        """
        rows = self._rows[self._adapter_name]
        if self._share is None and isinstance(rows, DTensor):
            self._share = rows


def bin_logits(hidden_D: torch.Tensor, rows_RD: torch.Tensor) -> torch.Tensor:
    """Reserved logits z = h W[reserved]^T, float32; any leading shape. Reads R rows, never the whole head."""
    return hidden_D.float() @ rows_RD.to(hidden_D.device).float().T


def valid_candidates(
    student_logprobs_BNK: torch.Tensor, position_mask_BN: torch.Tensor, min_prob_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates of labelled points compete (B, N, K), and which points have a choice, two or more (B, N).

    The same floor as in decoding; a point without a choice is no decision.
    """
    valid_BNK = floor_mask(student_logprobs_BNK, min_prob_ratio) & (student_logprobs_BNK > -1e3)
    valid_BNK = valid_BNK & position_mask_BN[..., None]
    point_BN = valid_BNK.sum(-1) > 1
    return valid_BNK & point_BN[..., None], point_BN
