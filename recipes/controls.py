"""Control selectors: what a trigger alone is worth, without anybody who knows which candidate is right.

The "kl" trigger leaks that the student's first choice is probably wrong, so a selector has to beat both of these at
the same trigger. They know nothing of the text. Legend: A asked rows, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from transformers_s2t import Selector


class SecondCandidateSelector(Selector):
    """Always the student's second candidate. Steps where the floor leaves one candidate only are not asked.

    Args:
        thresholds: trigger -> {target rate: threshold}, as calibrated for another selector.
    """

    def __init__(self, thresholds: Mapping[str, Mapping[float, float]] | None = None):
        self.thresholds = dict(thresholds or {})

    def score(self, session, rows_A: torch.Tensor, proposals) -> torch.Tensor:
        scores_AK = torch.zeros_like(proposals.logprobs_BK)
        scores_AK[:, 1:2] = 1.0
        return scores_AK


class RandomCandidateSelector(Selector):
    """Any of the candidates above the floor, all equally likely.

    Args:
        seed: the same seed and the same calls in the same order give the same choices.
        thresholds: trigger -> {target rate: threshold}, as calibrated for another selector.
    """

    def __init__(self, seed: int = 0, thresholds: Mapping[str, Mapping[float, float]] | None = None):
        self.thresholds = dict(thresholds or {})
        self._random = torch.Generator().manual_seed(seed)

    def score(self, session, rows_A: torch.Tensor, proposals) -> torch.Tensor:
        # the best of uniform numbers is uniform; candidates below the floor are masked by the caller
        scores_AK = torch.rand(proposals.logprobs_BK.shape, generator=self._random)
        return scores_AK.to(proposals.logprobs_BK.device)
