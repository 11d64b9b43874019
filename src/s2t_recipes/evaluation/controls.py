"""Control selectors: what can be had without training, which a trained selector has to beat at the same trigger.

The second and a random candidate know nothing: they tell what a trigger alone is worth (the "kl" trigger leaks that
the student's first choice is probably wrong). The token prior knows what the teacher likes, and nothing of the text.
The zero-shot scorer reads the text, with the small model as it is.

Legend: A asked rows, K candidates, N points, P real candidates of all asked rows, T tokens so far, D hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from transformers_s2t import Selector
from transformers_s2t.models.forwards import text_logits
from transformers_s2t.scoring.candidates import append_candidates


HEAD_BATCH = 256  # candidates whose logits over the whole vocabulary are held at a time


class ControlSelector(Selector):
    """A selector without an adapter.

    Args:
        thresholds: trigger -> {target rate: threshold}, as calibrated for another selector.
    """

    def __init__(self, thresholds: Mapping[str, Mapping[float, float]] | None = None):
        self.thresholds = dict(thresholds or {})


class SecondCandidateSelector(ControlSelector):
    """Always the student's second candidate. Steps where the floor leaves one candidate only are not asked."""

    def score(self, session, rows_A: torch.Tensor, proposals) -> torch.Tensor:
        scores_AK = torch.zeros_like(proposals.logprobs_BK)
        scores_AK[:, 1:2] = 1.0
        return scores_AK


class RandomCandidateSelector(ControlSelector):
    """Any of the candidates above the floor, all equally likely.

    Args:
        seed: the same seed and the same calls in the same order give the same choices.
        thresholds: see [`ControlSelector`].
    """

    def __init__(self, seed: int = 0, thresholds: Mapping[str, Mapping[float, float]] | None = None):
        super().__init__(thresholds)
        self._random = torch.Generator().manual_seed(seed)

    def score(self, session, rows_A: torch.Tensor, proposals) -> torch.Tensor:
        # the best of uniform numbers is uniform; candidates below the floor are masked by the caller
        scores_AK = torch.rand(proposals.logprobs_BK.shape, generator=self._random)
        return scores_AK.to(proposals.logprobs_BK.device)


def token_prior(labels: Dataset) -> Counter:
    """How often each token is the teacher's choice in the training labels: a choice without any context."""
    return Counter(id for ids in labels["teacher_top_id"] for id in ids)


def prior_scores(prior: Counter, candidate_ids_NK: torch.Tensor) -> torch.Tensor:
    """The count of each candidate (N, K) in a [`token_prior`]."""
    counts = [[prior[id] for id in ids] for ids in candidate_ids_NK.tolist()]
    return torch.tensor(counts, dtype=torch.float32, device=candidate_ids_NK.device)


class PriorSelector(ControlSelector):
    """The candidate that the teacher chose most often in the training labels, whatever the text.

    A tie, as between tokens that it never chose, goes to the candidate that the student ranks higher.

    Args:
        prior: counts of [`token_prior`].
        thresholds: see [`ControlSelector`].
    """

    def __init__(self, prior: Counter, thresholds: Mapping[str, Mapping[float, float]] | None = None):
        super().__init__(thresholds)
        self._prior = prior

    def score(self, session, rows_A: torch.Tensor, proposals) -> torch.Tensor:
        return prior_scores(self._prior, proposals.ids_BK)


class ZeroShotSelector(ControlSelector):
    """The small model reads the text with each candidate behind it, as it is: no adapter, no training.

    With a token (a sign of doubt, say), the score is -log P(token) behind the candidate: the one after which the model
    is least likely to write it. Without one it is minus the entropy of what the model would write next: the candidate
    after which it is the most certain. All candidates of a step go through the model in one forward, on the cache that
    decoding keeps where it is at hand.

    Nothing is masked: probabilities are the model's own over its whole head, so reserved tokens, and those that the
    user's processors forbid, take part in them (they are never proposed, and so never scored as candidates). The end
    of the text is scored like any other candidate, by what the model would write behind it.

    Args:
        model: the small model that generates.
        token_id: the token that the choice is to make unlikely; `None` for the most certain candidate.
        thresholds: see [`ControlSelector`].
    """

    shares_the_cache = True  # the model that writes is the one that scores

    def __init__(
        self,
        model: PreTrainedModel,
        token_id: int | None = None,
        thresholds: Mapping[str, Mapping[float, float]] | None = None,
    ):
        super().__init__(thresholds)
        self.model = model
        self._token_id = token_id

    def score(self, session, rows_A: torch.Tensor, proposals) -> torch.Tensor:
        prefix, num_new = session.student_prefix(self)
        if num_new:  # the driving call's cache is not at hand: one of its own catches up
            session.count_forward("scorer", num_new * len(session.input_ids_BT))
            prefix.feed(session.input_ids_BT, session.mask_BT)
        device = self.model.device
        mask_AT, ids_AK = session.mask_BT[rows_A].to(device), proposals.ids_BK.to(device)
        whole_batch = len(rows_A) == len(session.mask_BT)
        session.count_forward("scorer", ids_AK.numel())
        appended = append_candidates(
            self.model, prefix.cache, mask_AT, ids_AK, row_index=None if whole_batch else rows_A.to(device)
        )
        hidden_AKD = appended.hidden_BMD
        hidden_PD = hidden_AKD[proposals.mask_BK.to(hidden_AKD.device)]
        values_P = torch.cat([self._read(text_logits(self.model, part_PD)) for part_PD in hidden_PD.split(HEAD_BATCH)])
        scores_AK = torch.zeros_like(proposals.logprobs_BK)  # below the floor nobody looks
        scores_AK[proposals.mask_BK] = values_P.to(scores_AK)
        return scores_AK

    def _read(self, logits_PV: torch.Tensor) -> torch.Tensor:
        """Scores (P,) from the logits behind each candidate."""
        logits_PV = logits_PV.float()
        if self._token_id is not None:
            return -logits_PV.log_softmax(-1)[:, self._token_id]
        return -torch.special.entr(logits_PV.softmax(-1)).sum(-1)
