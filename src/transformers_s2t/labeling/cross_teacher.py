"""Scores of candidates by a teacher with another tokenizer, along a whole trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from transformers_s2t.labeling.cross_tokenizer import CandidateScores, CrossTokenizer
from transformers_s2t.models.forwards import fork_cache
from transformers_s2t.scoring.candidates import supports_tree


_ROWS_AT_ONCE = 8  # where each has to be read from its beginning


@torch.no_grad()
def score_with_teacher(
    cross: CrossTokenizer,
    teacher_model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    positions: Sequence[Sequence[int]],
    candidate_ids: Sequence[torch.Tensor],
    teacher_prompt_ids: Sequence[Sequence[int]] | None = None,
) -> list[CandidateScores]:
    """Scores some sequences: one forward of the teacher for each, and a few more for contexts that branch off.

    Args:
        cross: the pair of tokenizers.
        teacher_model: in eval mode.
        sequences, prompt_lengths: the student's, as in `score_trajectories`.
        positions: the decision points (N,) of each sequence.
        candidate_ids: the candidates (N, K) of each sequence.
        teacher_prompt_ids: each sequence's prompt in the teacher's own form; `None` for the student's.
    """
    scores = []
    for b, ids in enumerate(sequences):
        sequence = cross.encode(ids, prompt_lengths[b], None if teacher_prompt_ids is None else teacher_prompt_ids[b])
        first = min((cross.anchor(sequence, position)[0] for position in positions[b]), default=1) - 1
        text = _Trajectory(teacher_model, sequence.ids, first)
        scores.append(
            cross.score_candidates(sequence, text.logits_TV, positions[b], candidate_ids[b], text.next_logits, first)
        )
    return scores


class _Trajectory:
    """A trajectory that the teacher has read: its logits from `first` on, and those after contexts that branch off.

    All branches run in one forward on the trajectory's cache, each seeing its own prefix and itself. Where a mask
    cannot express that (windows, recurrent layers, flash attention), every branch is read from its beginning.
    """

    def __init__(self, model: PreTrainedModel, ids: list[int], first: int):
        self.model, self.ids = model, ids
        inputs = {"input_ids": torch.tensor([ids], device=model.device), "use_cache": True}
        output = model(**inputs, **_kept(model, torch.arange(first, len(ids))))
        self.logits_TV = output.logits[0, -(len(ids) - first) :]
        cache = getattr(output, "past_key_values", None)
        plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        self.cache = cache if plain and supports_tree(model, cache) else None

    def next_logits(self, contexts: list[list[int]]) -> torch.Tensor:
        """Logits (B, V) after each context."""
        if self.cache is not None:
            return self._from_branch(contexts)
        parts = [contexts[start : start + _ROWS_AT_ONCE] for start in range(0, len(contexts), _ROWS_AT_ONCE)]
        return torch.cat([self._from_start(part) for part in parts])

    def _from_branch(self, contexts: list[list[int]]) -> torch.Tensor:
        tokens, positions, limits, owners, last = [], [], [], [], []
        for b, context in enumerate(contexts):
            at = next((i for i, (x, y) in enumerate(zip(context, self.ids)) if x != y), len(self.ids))
            at = min(at, len(context) - 1)
            tokens += context[at:]
            positions += range(at, len(context))
            limits += [at] * (len(context) - at)
            owners += [b] * (len(context) - at)
            last.append(len(tokens) - 1)
        device = self.model.device
        limits_M, owners_M, order_M = torch.tensor(limits), torch.tensor(owners), torch.arange(len(tokens))
        before_MT = torch.arange(len(self.ids)) < limits_M[:, None]
        own_MM = (owners_M[:, None] == owners_M) & (order_M <= order_M[:, None])
        mask_11MC = torch.cat([before_MT, own_MM], dim=-1)[None, None].to(device)
        if self.model.config._attn_implementation == "eager":
            least = torch.finfo(self.model.dtype).min
            mask_11MC = torch.zeros_like(mask_11MC, dtype=self.model.dtype).masked_fill(~mask_11MC, least)
        output = self.model(
            input_ids=torch.tensor([tokens], device=device),
            attention_mask=mask_11MC,
            position_ids=torch.tensor([positions], device=device),
            past_key_values=fork_cache(self.cache),
            use_cache=True,
            **(kept := _kept(self.model, torch.tensor(last))),
        )
        return output.logits[0] if kept else output.logits[0, last]

    def _from_start(self, contexts: list[list[int]]) -> torch.Tensor:
        ids_BT = torch.zeros((len(contexts), max(map(len, contexts))), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for b, context in enumerate(contexts):
            ids_BT[b, : len(context)] = torch.tensor(context)
            mask_BT[b, : len(context)] = 1
        last_B = torch.tensor([len(context) - 1 for context in contexts])
        last_U, index_B = torch.unique(last_B, return_inverse=True)
        device = self.model.device
        kept = _kept(self.model, last_U)
        logits_BTV = self.model(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False, **kept
        ).logits
        return logits_BTV[torch.arange(len(contexts)), index_B if kept else last_B]


def _kept(model: PreTrainedModel, index: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that asks for logits at some indices only, where the model has one."""
    named = "logits_to_keep" in signature(model.forward).parameters
    return {"logits_to_keep": index.to(model.device)} if named else {}
