"""Teachers score the student's candidates: what labeling needs of one, and models in this process, with the student's
tokenizer or another one. (`http_teacher`: a model behind a vLLM server.)

Knows token ids and log-probabilities; knows nothing of rollouts, decision points or files. A teacher never generates.

Legend: S generated positions of a trajectory, K candidates, N tokens that a server names at a position, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from transformers_s2t.labeling.cross_teacher import score_with_teacher
from transformers_s2t.labeling.cross_tokenizer import CrossTokenizer, TeacherSequence, least_divergence
from transformers_s2t.labels.schema import MISSING_LOGPROB
from transformers_s2t.model_checks import check_causal_lm, check_reads_left_to_right, context_length
from transformers_s2t.models.forwards import TextLogits, head_rows, logits_from
from transformers_s2t.triggers import kl_divergence


class Comparison(NamedTuple):
    """The teacher's view of some positions.

    Attributes:
        divergence_S: KL(teacher || student), nats; a lower bound where the teacher names its best tokens only, or has
            another tokenizer.
        logprobs_SK: the candidates' log-probabilities over the teacher's full vocabulary, nats; nan where it was not
            asked yet.
        top_id_S: the teacher's argmax among the ids that the student has; -1 where another tokenizer's argmax has no
            counterpart.
    """

    divergence_S: torch.Tensor
    logprobs_SK: torch.Tensor
    top_id_S: torch.Tensor


class Reading(Protocol):
    """A batch of trajectories that a teacher has read."""

    def compare(self, b: int, where: slice, logits_SV: torch.Tensor, candidate_ids_SK: torch.Tensor) -> Comparison:
        """Row `b` at its generated positions `where`, against the student's logits (-inf where it may not write)."""


class Teacher(Protocol):
    """What labeling needs of a teacher.

    Attributes:
        source: "local", or the name under which a server offers the model.
        top_logprobs: how many tokens it names at a position; `None` for all.
        num_embeddings: it can read the student's token ids below this; `None` where unknown.
        unreadable_ids: ids below `num_embeddings` that it cannot read.
        max_length: how many of its own tokens it can read; `None` where unknown.
        numbers_per_position: how many numbers it keeps on a device for each position, to plan a batch's memory.
        cross_tokenizer: settings that the scores of a teacher with another tokenizer depend on; empty otherwise.
    """

    source: str
    top_logprobs: int | None
    num_embeddings: int | None
    unreadable_ids: Sequence[int]
    max_length: int | None
    numbers_per_position: int
    cross_tokenizer: Mapping[str, Any]

    def count_tokens(self, ids: Sequence[int], prompt_length: int) -> int:
        """How many of the teacher's own tokens a prompt and its rollout take."""

    def prefetch(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> None:
        """Starts what `read` will be asked for, in any batches, where it can run beside the caller's work."""

    def read(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> Reading:
        """Reads prompts and rollouts; `prompt_lengths` says where the rollouts begin."""

    def cancel(self) -> None:
        """Drops everything that was started: nobody will ask for it."""

    def logprobs_of(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        positions: Sequence[Sequence[int]],
        ids: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[list[float]]]:
        """Log-probabilities over the full vocabulary, nats, of tokens at some positions of each sequence.

        Args:
            sequences, prompt_lengths: as in `read`.
            positions: for each sequence, where its prefixes end: at index p, `ids` follow `sequence[:p]`.
            ids: for each position, the candidates that were nan in `Comparison.logprobs_SK`.
        """


def as_teacher(teacher: PreTrainedModel | Teacher) -> Teacher:
    """A model as a [`LocalTeacher`]; other teachers as they are."""
    return LocalTeacher(teacher) if isinstance(teacher, torch.nn.Module) else teacher


class LocalTeacher:
    """A model in this process, put into eval mode: its next-token logits along right-padded rows.

    Raises:
        ValueError: for a model that is no causal language model.
    """

    source = "local"
    top_logprobs = None
    unreadable_ids: Sequence[int] = ()
    cross_tokenizer: Mapping[str, Any] = {}

    def __init__(self, model: PreTrainedModel):
        check_causal_lm("teacher_model", model)
        self.model = model.eval()
        check_reads_left_to_right("teacher_model", self.model)
        self.num_embeddings = model.get_input_embeddings().weight.shape[0]
        self.max_length = context_length(model)
        self.numbers_per_position = model.get_input_embeddings().weight.shape[1]

    def prefetch(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> None:
        pass  # it would take the device from the student

    def cancel(self) -> None:
        pass

    def count_tokens(self, ids: Sequence[int], prompt_length: int) -> int:
        return len(ids)

    def read(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> _LogitsReading:
        first = min(prompt_lengths) - 1  # logits at index p - 1 decide the token at index p
        return _LogitsReading(TextLogits(self.model, sequences, first), prompt_lengths)

    @torch.no_grad()
    def logprobs_of(self, sequences, prompt_lengths, positions, ids) -> list[list[list[float]]]:
        rows = []
        for sequence, prompt_length, at_N, wanted in zip(sequences, prompt_lengths, positions, ids):
            logits_TV = logits_from(self.model, [sequence], prompt_length - 1)[0]
            logp_NV = torch.log_softmax(logits_TV[[at - prompt_length for at in at_N]].float(), -1)
            rows.append(
                [logp_V[list(one)].clamp_min(MISSING_LOGPROB).tolist() for logp_V, one in zip(logp_NV, wanted)]
            )
        return rows


class _LogitsReading:
    def __init__(self, logits: TextLogits, prompt_lengths: Sequence[int]):
        self.logits, self.prompt_lengths = logits, prompt_lengths

    def compare(self, b: int, where: slice, logits_SV: torch.Tensor, candidate_ids_SK: torch.Tensor) -> Comparison:
        first = self.prompt_lengths[b] - 1
        teacher_logits_SV = self.logits.at(b, first + where.start, first + where.stop)
        return compare_logits(teacher_logits_SV.to(logits_SV.device), logits_SV, candidate_ids_SK)


def compare_logits(
    teacher_logits_SV: torch.Tensor, logits_SV: torch.Tensor, candidate_ids_SK: torch.Tensor
) -> Comparison:
    """A comparison from full logits of both. Heads may differ in rows: -1e4 at candidates that the teacher lacks."""
    teacher_logits_SV = teacher_logits_SV.float()
    num_rows, num_teacher_rows = logits_SV.shape[-1], teacher_logits_SV.shape[-1]
    teacher_logp_SV = torch.log_softmax(teacher_logits_SV, dim=-1)
    logprobs_SK = teacher_logp_SV.gather(-1, candidate_ids_SK.clamp_max(num_teacher_rows - 1))
    logprobs_SK = logprobs_SK.masked_fill(candidate_ids_SK >= num_teacher_rows, MISSING_LOGPROB)
    return Comparison(
        divergence_S=kl_divergence(teacher_logits_SV, logits_SV),
        logprobs_SK=logprobs_SK.clamp_min(MISSING_LOGPROB),
        top_id_S=teacher_logits_SV[..., :num_rows].argmax(-1),
    )


class CrossTokenizerTeacher(LocalTeacher):
    """A model in this process that has another tokenizer, and scores the texts of the student's tokens.

    Its log-probabilities are those of disjoint events (`CrossTokenizer.partition`), and are found at the chosen points
    only. The divergence, at all positions, comes from the logits along the trajectory: it is the lowest that they
    allow over these events, see `CrossTokenizer.bound_candidates`.

    Args:
        model: the teacher.
        cross: the pair of tokenizers.
        teacher_prompts: the student's prompt -> the same in the teacher's own form (its chat template). `None`: the
            teacher reads the student's text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cross: CrossTokenizer,
        teacher_prompts: Mapping[tuple[int, ...], Sequence[int]] | None = None,
    ):
        super().__init__(model)
        if cross.same_vocabulary:
            raise ValueError("`cross` must be of two different tokenizers: with one, pass the model itself.")
        self.cross, self.teacher_prompts = cross, teacher_prompts
        self.numbers_per_position = head_rows(model)
        self.num_embeddings, self.unreadable_ids = cross.num_student_ids, cross.unreadable_ids()
        self.cross_tokenizer = cross.settings

    def _prompt(self, ids: Sequence[int], prompt_length: int) -> Sequence[int] | None:
        if self.teacher_prompts is None:
            return None
        prompt = tuple(ids[:prompt_length])
        if prompt not in self.teacher_prompts:
            raise ValueError(f"`teacher_prompts` must hold every prompt, and lacks the one of the tokens {prompt}.")
        return self.teacher_prompts[prompt]

    def count_tokens(self, ids: Sequence[int], prompt_length: int) -> int:
        """Raises a ValueError for a prompt that the teacher cannot read."""
        return self.cross.count_tokens(ids, prompt_length, self._prompt(ids, prompt_length))

    def read(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> _TextReading:
        own = [self.cross.encode(ids, p, self._prompt(ids, p)) for ids, p in zip(sequences, prompt_lengths)]
        first = min(self.cross.anchor(one, p)[0] for one, p in zip(own, prompt_lengths)) - 1
        logits_BTV = logits_from(self.model, [one.ids for one in own], first)
        return _TextReading(self.cross, own, prompt_lengths, logits_BTV, first)

    def logprobs_of(self, sequences, prompt_lengths, positions, ids) -> list[list[list[float]]]:
        prompts = [self._prompt(one, p) for one, p in zip(sequences, prompt_lengths)]
        candidates = [torch.tensor(one) for one in ids]
        scores = score_with_teacher(
            self.cross,
            self.model,
            sequences,
            prompt_lengths,
            positions,
            candidates,
            None if self.teacher_prompts is None else prompts,
        )
        return [one.partition_NP[:, :-1].clamp_min(MISSING_LOGPROB).tolist() for one in scores]


class _TextReading:
    """The teacher's own tokens of a batch, and its logits after them from index `first` on."""

    def __init__(
        self,
        cross: CrossTokenizer,
        sequences: Sequence[TeacherSequence],
        prompt_lengths: Sequence[int],
        logits_BTV: torch.Tensor,
        first: int,
    ):
        self.cross, self.sequences, self.prompt_lengths = cross, sequences, prompt_lengths
        self.logits_BTV, self.first = logits_BTV, first

    def compare(self, b: int, where: slice, logits_SV: torch.Tensor, candidate_ids_SK: torch.Tensor) -> Comparison:
        positions = range(self.prompt_lengths[b] + where.start, self.prompt_lengths[b] + where.stop)
        bounds = self.cross.bound_candidates(
            self.sequences[b], self.logits_BTV[b], positions, candidate_ids_SK, self.first
        )
        student_SP = self.cross.student_partition(logits_SV, candidate_ids_SK)
        return Comparison(
            divergence_S=least_divergence(bounds.lower_NP, bounds.upper_NP, student_SP).float(),
            logprobs_SK=torch.full(candidate_ids_SK.shape, math.nan),
            top_id_S=bounds.teacher_top_id_N,
        )
