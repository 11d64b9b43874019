"""Scores both models along a text, and chooses which of its tokens become decision points.

Legend: N texts, T tokens, P points, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import (
    PreTrainedModel,
)

from transformers_s2t.config import check_choice
from transformers_s2t.labeling.teachers import Comparison, Teacher, as_teacher, compare_logits
from transformers_s2t.labels.schema import MISSING_LOGPROB, POINTS
from transformers_s2t.model_checks import check_causal_lm, check_reads_left_to_right
from transformers_s2t.models.forwards import TextLogits, head_rows
from transformers_s2t.proposals import exclude, propose
from transformers_s2t.triggers import entropy, margin


_MAX_NUMBERS = 1 << 28  # most hidden states (or logits) of both models in memory at one time, in the models' own type
_MAX_TOKENS = 1 << 14  # most tokens of one forward
_MAX_FLOAT_LOGITS = 1 << 24  # most logits in float32 at one time


class TrajectoryScores(NamedTuple):
    """What both models say at every generated position of one trajectory, on the CPU.

    Attributes:
        divergence_S: KL(teacher || student), nats; a lower bound from a teacher that names its best tokens only, or
            has another tokenizer.
        entropy_S: the student's entropy over its renormalised top 64, nats.
        margin_S: minus the difference of the student's two best log-probabilities, nats.
        candidate_ids_SK: the student's top K, best first.
        student_logprobs_SK: over the student's full vocabulary less the excluded tokens, nats.
        teacher_logprobs_SK: over the teacher's full vocabulary, nats; -1e4 at ids that the teacher does not have; nan
            where such a teacher (see `divergence_S`) has not been asked yet.
        teacher_top_id_S: the teacher's argmax among the ids that the student has; -1 where there is none.
    """

    divergence_S: torch.Tensor
    entropy_S: torch.Tensor
    margin_S: torch.Tensor
    candidate_ids_SK: torch.Tensor
    student_logprobs_SK: torch.Tensor
    teacher_logprobs_SK: torch.Tensor
    teacher_top_id_S: torch.Tensor


def score_positions(
    logits_SV: torch.Tensor,
    teacher_logits_SV: torch.Tensor,
    num_candidates: int,
    excluded_ids: torch.Tensor | None = None,
) -> TrajectoryScores:
    """Scores of some positions from the next-token logits of both models there. The heads may differ in rows."""
    return _score(logits_SV, partial(compare_logits, teacher_logits_SV), num_candidates, excluded_ids)


def _score(
    logits_SV: torch.Tensor,
    compare: Callable[[torch.Tensor, torch.Tensor], Comparison],
    num_candidates: int,
    excluded_ids: torch.Tensor | None,
) -> TrajectoryScores:
    logits_SV = exclude(logits_SV.float(), excluded_ids)
    proposals = propose(logits_SV, num_candidates)
    teacher = compare(logits_SV, proposals.ids_BK)
    return TrajectoryScores(
        divergence_S=teacher.divergence_S,
        entropy_S=entropy(logits_SV),
        margin_S=margin(logits_SV),
        candidate_ids_SK=proposals.ids_BK,
        student_logprobs_SK=proposals.logprobs_BK.clamp_min(MISSING_LOGPROB),
        teacher_logprobs_SK=teacher.logprobs_SK,
        teacher_top_id_S=teacher.top_id_S,
    )


@torch.no_grad()
def score_trajectories(
    model: PreTrainedModel,
    teacher_model: PreTrainedModel | Teacher,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    num_candidates: int,
    excluded_ids: Sequence[int] = (),
) -> list[TrajectoryScores]:
    """Scores every generated position of some trajectories, by one teacher-forced forward of the student and one
    reading by the teacher.

    Rows are padded on the right, which no causal model can see. Only hidden states of generated positions are kept,
    and logits of a few of them at a time; batches that would take more than about a gigabyte are run in parts. The
    models may be on different devices.

    Args:
        model: the student, in eval mode.
        teacher_model: a model of the same tokenizer, put into eval mode, or another teacher.
        sequences: prompts and rollouts, token ids.
        prompt_lengths: where each rollout begins; 1 at least.
        num_candidates: K.
        excluded_ids: reserved tokens, never proposed.

    Raises:
        ValueError: for a K above what the head offers, token ids that one of the models does not have, or a model
            that is no causal language model.
    """
    teacher = as_teacher(teacher_model)
    check_causal_lm("model", model)
    check_reads_left_to_right("model", model)
    num_rows = head_rows(model)
    check_num_candidates(num_candidates, num_rows, excluded_ids)
    largest = max(max(ids) for ids in sequences)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    for name, rows in (("model", num_embeddings), ("teacher_model", teacher.num_embeddings)):
        if rows is not None and largest >= rows:
            raise ValueError(f"`sequences` hold token id {largest}, which `{name}` has no embedding for.")
    if any(not 1 <= prompt_length < len(ids) for ids, prompt_length in zip(sequences, prompt_lengths)):
        raise ValueError("`prompt_lengths` must be at least 1 and leave one generated token at least in each row.")
    width = max(len(ids) for ids in sequences)
    kept = width - min(prompt_lengths) + 1
    numbers = model.get_input_embeddings().weight.shape[1] + teacher.numbers_per_position
    rows_at_once = max(1, min(_MAX_NUMBERS // (kept * numbers), _MAX_TOKENS // width))
    scores = []
    for start in range(0, len(sequences), rows_at_once):
        part = slice(start, start + rows_at_once)
        scores += _score_batch(model, teacher, sequences[part], prompt_lengths[part], num_candidates, excluded_ids)
    return scores


def _score_batch(
    model: PreTrainedModel,
    teacher: Teacher,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    num_candidates: int,
    excluded_ids: Sequence[int],
) -> list[TrajectoryScores]:
    first = min(prompt_lengths) - 1  # logits at index p - 1 decide the token at index p
    reading = teacher.read(sequences, prompt_lengths)  # first: a server works on it during the student's forward
    logits = TextLogits(model, sequences, first)
    excluded = torch.tensor(list(excluded_ids), dtype=torch.long, device=logits.kept_BTX.device)
    chunk = max(1, _MAX_FLOAT_LOGITS // max(head_rows(model), teacher.numbers_per_position))
    scores = []
    for b, (ids, prompt_length) in enumerate(zip(sequences, prompt_lengths)):
        parts = []
        num_generated = len(ids) - prompt_length
        for start in range(0, num_generated, chunk):
            where = slice(start, min(start + chunk, num_generated))
            logits_SV = logits.at(b, prompt_length - 1 + where.start, prompt_length - 1 + where.stop)
            parts.append(_score(logits_SV, partial(reading.compare, b, where), num_candidates, excluded))
        scores.append(TrajectoryScores(*(torch.cat(columns).cpu() for columns in zip(*parts))))
    return scores


def choose_positions(
    divergence_S: torch.Tensor,
    floor_count_S: torch.Tensor,
    divergence_threshold: float,
    points: str = "floor+kl",
    max_points: int | None = None,
) -> torch.Tensor:
    """Which generated positions become decision points: their indices (N,), ascending.

    Args:
        divergence_S: KL(teacher || student), nats.
        floor_count_S: how many candidates are above the floor.
        divergence_threshold: nats.
        points: "kl": the divergence reaches the threshold (the paper's rule, arXiv 2604.26940); "floor": two or more
            candidates are above the floor, which needs no teacher at inference; "floor+kl": either; "all".
        max_points: most points of one trajectory. Of more, that many are kept, evenly spaced, so that the share of
            points at which the teacher agrees does not change: a selector has to learn that too.
    """
    check_choice("points", points, POINTS)
    chosen_S = torch.full_like(divergence_S, points == "all", dtype=torch.bool)
    if "kl" in points:
        chosen_S |= divergence_S >= divergence_threshold
    if "floor" in points:
        chosen_S |= floor_count_S >= 2
    chosen_N = chosen_S.nonzero()[:, 0]
    if max_points is not None and len(chosen_N) > max_points:
        every = len(chosen_N) / max_points
        chosen_N = chosen_N[((torch.arange(max_points) + 0.5) * every).long()]
    return chosen_N


def check_num_candidates(num_candidates: int, num_head_rows: int, excluded_ids: Sequence[int]) -> None:
    """Raises a ValueError where the student has fewer tokens to propose."""
    offered = num_head_rows - len(excluded_ids)
    if num_candidates > offered:
        raise ValueError(f"`num_candidates` must be at most {offered} for this model, got {num_candidates}.")


def in_chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
