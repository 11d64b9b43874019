"""A teacher with another tokenizer: the student's candidates are scored by their text, as bytes.

Knows tokenizers and logits; knows nothing of files or models (`cross_teacher` runs the teacher).

The quantity is P(the text continues with c | prefix text), the teacher's probability of all token sequences whose text
starts with the bytes of candidate c. What is computed, for a decision point after prefix text p:

1. *Context.* The teacher reads the canonical tokens of the whole trajectory, once. The *anchor* is the boundary before
   the last `healed_tokens` of them that start inside p (token healing); r is the part of p after the anchor. So a
   teacher's token that spans the decision point, or would with another candidate, is not cut in two.
2. *Mass of a string s after the anchor*: the sum, over some teacher token sequences w whose text is a proper prefix
   of s, of P(w) times P(the next token starts with the rest of s). The last factor is an exact sum over a contiguous
   range of the sorted vocabulary. The w are: the trajectory's own tokens (no extra forward), the canonical tokens of
   s, and all that have at least `min_mass` of r's probability.
3. log P(c) = log mass(r + c) - log mass(r).

Exact given the anchor: with `min_mass=0`, or where no other w spell a proper prefix of s (a teacher of characters).
With the anchor at the start of the text (many `healed_tokens`) the prefix's own tokenizations are summed over as well
and it is the quantity itself. Otherwise an estimate: both masses are lower bounds, what was left out is known, and
`lower_NK` and `upper_NK` bound the value given the anchor. Nothing bounds what the anchor does: the trajectory's
tokens are canonical with what follows in view, and other tokenizations of the text before the anchor do not count.

Tokens without text (special ones, rows above the tokenizer) end the text: their mass belongs to no candidate but a
special one. Text scores nest: "th" is never below "the". To choose among candidates, or to compare with the student's
token probabilities, take `partition_NP`, where a text counts for the longest candidate alone.

For every position of a trajectory there is only what its own logits say: bounds of the partition (`bound_candidates`)
and the least divergence that they allow (`least_divergence`).

Legend: T teacher's tokens of a trajectory, N decision points, K candidates, V teacher's vocabulary.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from transformers_s2t.labeling.byte_vocabulary import ByteVocabulary, VocabularyRow
from transformers_s2t.reserved_tokens import vocab_hash


_CONTEXTS_AT_ONCE = 64  # branches in one extra forward


class TeacherSequence(NamedTuple):
    """A student's sequence as the teacher reads it.

    Offsets count bytes; a special token counts as one, and no teacher's token spans it. With one vocabulary they count
    tokens.

    Attributes:
        ids: the teacher's tokens.
        ends: the offset after each of them.
        offsets: for each of the student's positions, the offset at which its token begins, and then that of the end.
        fences: the offset after the last special token before each of `offsets`. Healing goes back no further.
        data: the bytes, 0 for a special token.
    """

    ids: list[int]
    ends: list[int]
    offsets: list[int]
    fences: list[int]
    data: bytes


class CandidateScores(NamedTuple):
    """What the teacher says of the candidates of some decision points; nats.

    Attributes:
        teacher_logprobs_NK: log-probability of each candidate's text; -inf where it has none or the teacher cannot
            write it.
        lower_NK, upper_NK: bounds given the anchor; equal to the estimate where nothing was left out.
        partition_NP: log-probabilities (N, K + 1) of disjoint events, see `partition`.
        teacher_top_id_N: the student's token with the longest text that the teacher's likeliest next token (beyond the
            prefix) starts with; -1 where there is none.
        num_forwards: number of contexts that were run besides the trajectory's own.
    """

    teacher_logprobs_NK: torch.Tensor
    lower_NK: torch.Tensor
    upper_NK: torch.Tensor
    partition_NP: torch.Tensor
    teacher_top_id_N: torch.Tensor
    num_forwards: int


class CandidateBounds(NamedTuple):
    """What the teacher's logits along a trajectory imply for the candidates at some of its positions.

    Attributes:
        lower_NP, upper_NP: bounds of the probabilities (not their logarithms) of the events of `partition`.
        teacher_top_id_N: as in [`CandidateScores`].
    """

    lower_NP: torch.Tensor
    upper_NP: torch.Tensor
    teacher_top_id_N: torch.Tensor


class _Point:
    """Masses at one decision point. Target 0 is r alone, target k + 1 is r and candidate k."""

    def __init__(self, anchor: int, rest: bytes, targets: list[tuple[bytes, tuple[int, ...]] | None]):
        self.anchor = anchor
        self.rest = rest
        self.targets = [(rest, ()), *(target and (rest + target[0], target[1]) for target in targets)]
        self.mass = np.zeros(len(self.targets))
        self.dropped = np.zeros(len(self.targets))
        self.planned: set[tuple[int, ...]] = set()
        self.least = float("inf")
        self.best = (-1.0, b"", -1)  # mass, text beyond r, special token
        if not rest:
            self.mass[0] = 1.0


class CrossTokenizer:
    """Scores the student's tokens with the logits of a teacher that has another tokenizer (see the top of the file).

    Where both have one vocabulary, the log-probabilities are the teacher's ordinary ones of the tokens, which
    are not those of their texts: another token may begin with the same text.

    Args:
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's.
        eos_token_ids: the student's end tokens; the tokenizer's own by default. Each of them counts as the sum of all
            of the teacher's.
        teacher_eos_token_ids: the teacher's end tokens, likewise.
        healed_tokens: how many teacher tokens to go back over.
        min_mass: follow every tokenization that has at least this part of r's probability; `None`: the canonical ones
            alone; 0: all, which is exact, and exponential in the length of r and the candidate.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase,
        teacher_processing_class: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int] | None = None,
        teacher_eos_token_ids: Sequence[int] | None = None,
        healed_tokens: int = 2,
        min_mass: float | None = 0.01,
    ):
        if healed_tokens < 0:
            raise ValueError(f"`healed_tokens` must be 0 or more, got {healed_tokens}.")
        if min_mass is not None and not 0.0 <= min_mass <= 1.0:
            raise ValueError(f"`min_mass` must be in [0, 1] or None, got {min_mass}.")
        teacher_hash = vocab_hash(teacher_processing_class)
        self.same_vocabulary = vocab_hash(processing_class) == teacher_hash
        #: what the scores depend on
        self.settings = {"teacher_vocab_hash": teacher_hash, "healed_tokens": healed_tokens, "min_mass": min_mass}
        self.student = ByteVocabulary(processing_class, "processing_class")
        self.teacher = ByteVocabulary(teacher_processing_class, "teacher_processing_class")
        self.healed_tokens, self.min_mass = healed_tokens, min_mass
        ends, teacher_ends = (
            tuple(i for i in ([one.eos_token_id] if given is None else given) if i is not None)
            for one, given in (
                (processing_class, eos_token_ids),
                (teacher_processing_class, teacher_eos_token_ids),
            )
        )
        # special tokens: by role, then by name
        self.special_of_id: dict[int, tuple[int, ...]] = {}
        for id in self.student.special_ids | set(ends):
            same = self.teacher.id_of_token.get(self.student.token_of_id.get(id, ""))
            self.special_of_id[id] = (same,) if same in self.teacher.special_ids else ()
        for role in ("bos_token_id", "pad_token_id"):
            id, teacher_id = getattr(processing_class, role), getattr(teacher_processing_class, role)
            if id is not None and teacher_id is not None and id not in ends and not self.special_of_id.get(id):
                self.special_of_id[id] = (teacher_id,)
        self.special_of_id |= dict.fromkeys(ends, teacher_ends)
        self.student_of_special = {t: id for id, ids in reversed(self.special_of_id.items()) for t in ids}
        self.student_of_special |= dict.fromkeys(teacher_ends, ends[0] if ends else -1)
        self.num_student_ids = max(self.student.token_of_id, default=-1) + 1
        self.bos_token_id = processing_class.bos_token_id
        first = teacher_processing_class("", add_special_tokens=True)["input_ids"][:1]
        self.teacher_prefix = [id for id in first if id == teacher_processing_class.bos_token_id]
        self._canonical = functools.lru_cache(maxsize=1 << 16)(self._canonical_pieces)

    def token_bytes(self, id: int) -> bytes:
        """The student's token as bytes; empty for special tokens and rows above the tokenizer."""
        return self.student.bytes_of_id.get(id, b"")

    def teacher_token_bytes(self, id: int) -> bytes:
        """The teacher's token as bytes, likewise."""
        return self.teacher.bytes_of_id.get(id, b"")

    def unreadable_ids(self) -> list[int]:
        """The student's ids that the teacher has no tokens for: special ones without a counterpart, bytes that it
        cannot write, and ids that no token has."""
        plain = all(bytes([byte]) in self.teacher.ids_of_bytes for byte in range(256))
        unreadable = []
        for id in range(self.num_student_ids):
            if not (data := self.token_bytes(id)):
                readable = bool(self.special_of_id.get(id)) or id == self.bos_token_id
            else:
                readable = plain or bool(self._canonical_pieces(data))
            if not readable:
                unreadable.append(id)
        return unreadable

    def _canonical_pieces(self, data: bytes) -> tuple[int, ...]:
        try:
            return tuple(self.teacher.encode(data))
        except ValueError:
            return ()

    def encode(
        self, ids: Sequence[int], prompt_length: int = 0, teacher_prompt_ids: Sequence[int] | None = None
    ) -> TeacherSequence:
        """The teacher's tokens of a student's sequence, with the offsets of both.

        Args:
            ids: the student's sequence.
            prompt_length: where the rollout begins.
            teacher_prompt_ids: the prompt as the teacher is to read it (its own chat template), in place of the
                student's. The rollout's text then begins with a new token. It also does where the teacher's first
                token would span prompt and rollout, because no logits come before that token.

        Raises:
            ValueError: for a special token of the student that the teacher has none for.
        """
        if self.same_vocabulary:
            own = list(ids if teacher_prompt_ids is None else [*teacher_prompt_ids, *ids[prompt_length:]])
            offsets = [max(0, i + len(own) - len(ids)) for i in range(len(ids) + 1)]
            return TeacherSequence(own, list(range(1, len(own) + 1)), offsets, offsets, b"")
        offsets, fences, pieces = [], [], []  # pieces: text, or tokens that take one byte
        at = fence = 0
        if teacher_prompt_ids is not None:
            pieces, at, fence = [tuple(teacher_prompt_ids)], 1, 1
        for i, id in enumerate(ids):
            offsets.append(at)
            fences.append(fence)
            if teacher_prompt_ids is not None and i < prompt_length:
                continue
            pieces.append(self.token_bytes(id) or self._special(id))
            at += max(1, len(self.token_bytes(id)))
            fence = fence if self.token_bytes(id) else at
        offsets.append(at)
        fences.append(fence)

        teacher_ids, ends, data, text = [], [], b"", b""
        if teacher_prompt_ids is None and pieces[:1] != [tuple(self.teacher_prefix)]:
            teacher_ids, ends = list(self.teacher_prefix), [0] * len(self.teacher_prefix)
        for piece in [*pieces, ()]:
            if isinstance(piece, bytes):
                text += piece
                continue
            for id in self.teacher.encode(text):
                data += self.teacher_token_bytes(id)
                teacher_ids.append(id)
                ends.append(len(data))
            data, text = data + b"\0", b""
            teacher_ids += piece
            ends += [len(data)] * len(piece)
        if prompt_length and teacher_prompt_ids is None and ends and ends[0] > offsets[prompt_length]:
            return self.encode(ids, prompt_length, self.encode(ids[:prompt_length]).ids)
        return TeacherSequence(teacher_ids, ends, offsets, fences, data[:-1])

    def count_tokens(
        self, ids: Sequence[int], prompt_length: int, teacher_prompt_ids: Sequence[int] | None = None
    ) -> int:
        """How many of the teacher's tokens the sequence takes.

        Raises:
            ValueError: where it cannot be read, or nothing stands before the rollout.
        """
        sequence = self.encode(ids, prompt_length, teacher_prompt_ids)
        self.anchor(sequence, prompt_length)
        return len(sequence.ids)

    def _special(self, id: int) -> tuple[int, ...]:
        """The teacher's token for a special one of the student; none for a beginning-of-sequence token that the
        teacher does not use."""
        special = self.special_of_id.get(id, ())[:1]
        if not special and id != self.bos_token_id:
            raise ValueError(
                f"The teacher's tokenizer has no counterpart of the special token "
                f"{self.student.token_of_id.get(id, id)!r}: pass `teacher_prompt_ids`, the prompt in its own form."
            )
        return special

    # -----------------------------------------------------------------------------------------------------------------

    def _target(self, id: int) -> tuple[bytes, tuple[int, ...]] | None:
        data = self.token_bytes(id)
        if data:
            return data, ()
        special = self.special_of_id.get(id, ())
        return (b"", special) if special else None

    def anchor(self, sequence: TeacherSequence, position: int) -> tuple[int, int]:
        """How many of the teacher's tokens stand before the anchor of a decision point, and the anchor's offset.

        Raises:
            ValueError: where there are none.
        """
        if self.same_vocabulary:
            return sequence.offsets[position], sequence.offsets[position]
        offset, fence = sequence.offsets[position], sequence.fences[position]
        ends = sequence.ends
        anchor = bisect_right(ends, offset)
        start = max(ends[anchor - 1] if anchor else 0, fence)
        back = self.healed_tokens - int(start < offset)  # a token that spans the offset is the first of them
        while back > 0 and anchor > 1 and start > fence:
            anchor, back = anchor - 1, back - 1
            start = max(ends[anchor - 1], fence)
        if anchor < 1:
            raise ValueError(
                f"No teacher token ends before position {position}: its logits there do not exist. Give the prompt "
                "one more token, or the teacher's tokenizer a beginning-of-sequence token."
            )
        return anchor, start

    def _point(self, sequence: TeacherSequence, position: int, candidate_ids: Sequence[int]) -> _Point:
        offset = sequence.offsets[position]
        anchor, start = self.anchor(sequence, position)
        point = _Point(anchor, sequence.data[start:offset], [self._target(int(id)) for id in candidate_ids])
        # the trajectory's own tokens up to the offset, and the canonical ones of each target
        own = [sequence.ids[i] for i in range(anchor, len(sequence.ids)) if sequence.ends[i] <= offset]
        point.planned = {tuple(own[:i]) for i in range(len(own) + 1)}
        for target in point.targets:
            if target is not None:
                pieces = self._canonical(target[0])
                point.planned |= {pieces[:i] for i in range(len(pieces) + bool(target[1]))}
        return point

    def _read(
        self, point: _Point, path: tuple[int, ...], mass: float, row: VocabularyRow
    ) -> dict[tuple[int, ...], tuple[float, list[int]]]:
        """Adds the masses that the logits after `path` give; returns longer paths with their masses and targets."""
        vocabulary, p_V = self.teacher, row.p_V
        text = b"".join(vocabulary.bytes_of_id[id] for id in path)
        children: dict[tuple[int, ...], tuple[float, list[int]]] = {}
        for k, target in enumerate(point.targets):
            if target is None or not target[0].startswith(text):
                continue
            data, special = target[0][len(text) :], target[1]
            if special and not data:
                point.mass[k] += sum(p_V[id] for id in special if id < len(p_V)) * mass
            if not special and data:
                low, high = vocabulary.range(data)
                point.mass[k] += row.p_W[low:high].sum() * mass
            for id, token in vocabulary.prefixes(data):
                if id < len(p_V) and (special or len(token) < len(data)):
                    children.setdefault((*path, id), (p_V[id] * mass, []))[1].append(k)
        self._find_best(point, text, mass, row)
        return children

    def _own_mass(self, point: _Point, sequence: TeacherSequence, rows: Callable[[int], VocabularyRow]) -> float:
        """The mass of r along the trajectory's own tokens, which `min_mass` is a share of."""
        if not self.min_mass or not point.rest:
            return 1.0
        own, mass = 0.0, 1.0
        rest = point.rest
        for end in range(point.anchor, len(sequence.ids)):
            row = rows(end - 1)
            low, high = self.teacher.range(rest)
            own += mass * float(row.p_W[low:high].sum())
            token = self.teacher_token_bytes(sequence.ids[end])
            if len(token) >= len(rest):
                break
            mass, rest = mass * float(row.p_V[sequence.ids[end]]), rest[len(token) :]
        return own

    def _find_best(self, point: _Point, text: bytes, mass: float, row: VocabularyRow) -> None:
        if not point.rest.startswith(text):
            return
        beyond = point.rest[len(text) :]
        low, high = self.teacher.range(beyond)
        low += len(self.teacher.ids_of_bytes.get(beyond, ()))
        if low < high:
            i = low + int(row.p_W[low:high].argmax())
            if row.p_W[i] * mass > point.best[0]:
                point.best = (row.p_W[i] * mass, self.teacher.sorted_bytes[i][len(beyond) :], -1)
        if not beyond:
            for id in self.student_of_special:
                if id < len(row.p_V) and row.p_V[id] * mass > point.best[0]:
                    point.best = (row.p_V[id] * mass, b"", id)

    def _top_id(self, point: _Point) -> int:
        _, text, special = point.best
        if special >= 0:
            return self.student_of_special[special]
        found = list(self.student.prefixes(text))
        return min(id for id, token in found if token == found[-1][1]) if found else -1

    def _rows(self, teacher_logits_TV: torch.Tensor, first: int) -> Callable[[int], VocabularyRow]:
        """The probabilities after each of the trajectory's tokens, by index; neighbouring points share them."""
        return functools.lru_cache(maxsize=32)(lambda index: self.teacher.row(teacher_logits_TV[index - first]))

    def bound_candidates(
        self,
        sequence: TeacherSequence,
        teacher_logits_TV: torch.Tensor,
        positions: Sequence[int],
        candidate_ids_NK: torch.Tensor,
        first: int = 0,
    ) -> CandidateBounds:
        """Bounds from the logits along the trajectory alone, without any other forward, at every position.

        The prefix is taken to be spelled as the trajectory spells it, and a candidate canonically. Where a candidate's
        spelling leaves the trajectory, what follows is unknown: it gets all of the branch's mass, or none.

        Args:
            sequence, teacher_logits_TV, positions, candidate_ids_NK, first: as in `score_candidates`.
        """
        rows = self._rows(teacher_logits_TV, first)
        points = []
        for position, ids in zip(positions, candidate_ids_NK.tolist()):
            point = self._point(sequence, position, ids)
            path, mass = (), 1.0
            while path is not None:
                end = point.anchor + len(path)
                children, own = self._read(point, path, mass, rows(end - 1)), (*path, *sequence.ids[end : end + 1])
                path = None
                for child, (child_mass, targets) in children.items():
                    if child not in point.planned:
                        continue
                    if child == own:
                        path, mass = child, child_mass
                    elif 0 not in targets:  # otherwise it is another spelling of the prefix
                        point.dropped[targets] += child_mass
            points.append(point)
        lower_NP, upper_NP = (torch.ones((len(points), candidate_ids_NK.shape[-1] + 1)).double() for _ in range(2))
        for n, point in enumerate(points):
            whole = max(point.mass[0], np.finfo(float).tiny)
            lower_NP[n, :-1] = torch.from_numpy(point.mass[1:] / whole)
            upper_NP[n, :-1] = torch.from_numpy((point.mass + point.dropped)[1:] / whole).clamp_max(1.0)
        # from probabilities of nested texts to those of disjoint events
        nesting_NPP = self._nesting(candidate_ids_NK)
        plus_NPP, minus_NPP = nesting_NPP.clamp_min(0.0), (-nesting_NPP).clamp_min(0.0)
        return CandidateBounds(
            lower_NP=(_times(plus_NPP, lower_NP) - _times(minus_NPP, upper_NP)).clamp(0.0, 1.0),
            upper_NP=(_times(plus_NPP, upper_NP) - _times(minus_NPP, lower_NP)).clamp(0.0, 1.0),
            teacher_top_id_N=torch.tensor([self._top_id(point) for point in points], dtype=torch.long),
        )

    def score_candidates(
        self,
        sequence: TeacherSequence,
        teacher_logits_TV: torch.Tensor,
        positions: Sequence[int],
        candidate_ids_NK: torch.Tensor,
        next_logits: Callable[[list[list[int]]], torch.Tensor],
        first: int = 0,
    ) -> CandidateScores:
        """Scores the candidates of some decision points of one sequence.

        Args:
            sequence: from `encode`.
            teacher_logits_TV: the teacher's logits after each token of `sequence.ids[first:]`.
            positions: the student's, as in the labels: the index of the token under decision.
            candidate_ids_NK: the student's.
            next_logits: function from some other contexts to the teacher's logits (B, V) after each; all points share
                its calls.
            first: see above.
        """
        if self.same_vocabulary:
            return self._score_same(sequence, teacher_logits_TV, positions, candidate_ids_NK, first)
        candidates = candidate_ids_NK.tolist()
        points = [self._point(sequence, position, ids) for position, ids in zip(positions, candidates)]
        rows = self._rows(teacher_logits_TV, first)
        if self.min_mass is not None:
            for point in points:
                point.least = self.min_mass * self._own_mass(point, sequence, rows)

        def read(point: _Point, path: tuple[int, ...], mass: float, row: VocabularyRow) -> list:
            """The paths to be read next."""
            later = []
            for child, (child_mass, targets) in self._read(point, path, mass, row).items():
                if child in point.planned or child_mass >= point.least:
                    later.append((point, child, child_mass))
                else:
                    point.dropped[targets] += child_mass
            return later

        num_forwards, follow = 0, [(point, (), 1.0) for point in points]
        while follow:
            elsewhere, later = [], []
            for point, path, mass in follow:
                end = point.anchor + len(path)
                if path == tuple(sequence.ids[point.anchor : end]):
                    later += read(point, path, mass, rows(end - 1))
                else:
                    elsewhere.append((point, path, mass))
            num_forwards += len(elsewhere)
            for start in range(0, len(elsewhere), _CONTEXTS_AT_ONCE):
                part = elsewhere[start : start + _CONTEXTS_AT_ONCE]
                logits_BV = next_logits([[*sequence.ids[: point.anchor], *path] for point, path, _ in part])
                for (point, path, mass), logits_V in zip(part, logits_BV):
                    later += read(point, path, mass, self.teacher.row(logits_V))
            follow = later
        mass = torch.tensor(np.array([point.mass for point in points])).reshape(len(points), -1)
        mass[:, 0].clamp_min_(torch.finfo(torch.float64).tiny)  # a prefix that the teacher finds impossible
        most = mass + torch.tensor(np.array([point.dropped for point in points])).reshape(len(points), -1)
        logprobs_NK = (mass[:, 1:] / mass[:, :1]).log()
        return CandidateScores(
            teacher_logprobs_NK=logprobs_NK,
            lower_NK=(mass[:, 1:] / most[:, :1]).log(),
            upper_NK=(most[:, 1:] / mass[:, :1]).clamp_max(1.0).log(),
            partition_NP=self.partition(logprobs_NK, candidate_ids_NK),
            teacher_top_id_N=torch.tensor([self._top_id(point) for point in points], dtype=torch.long),
            num_forwards=num_forwards,
        )

    def _score_same(self, sequence, teacher_logits_TV, positions, candidate_ids_NK, first) -> CandidateScores:
        """One vocabulary: the tokens are the same, and only heads may differ in rows."""
        rows = torch.tensor([sequence.offsets[position] - 1 - first for position in positions], dtype=torch.long)
        logits_NV = teacher_logits_TV[rows.to(teacher_logits_TV.device)].float().cpu()
        candidate_ids_NK, num_rows = candidate_ids_NK.cpu(), logits_NV.shape[-1]
        logprobs_NK = torch.log_softmax(logits_NV, dim=-1).gather(-1, candidate_ids_NK.clamp_max(num_rows - 1))
        logprobs_NK = logprobs_NK.masked_fill(candidate_ids_NK >= num_rows, float("-inf"))
        rest_N = -torch.expm1(logprobs_NK.double().logsumexp(-1)).clamp_max(0.0)
        partition_NP = torch.cat([logprobs_NK.double(), rest_N.log()[:, None]], dim=-1)
        return CandidateScores(logprobs_NK, logprobs_NK, logprobs_NK, partition_NP, logits_NV.argmax(-1), 0)

    # -----------------------------------------------------------------------------------------------------------------

    def partition(self, logprobs_NK: torch.Tensor, candidate_ids_NK: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (N, K + 1) of disjoint events: k is the longest candidate that the text starts with, for
        each candidate k; then, that it starts with none.

        Texts of candidates nest ("1", "12") or exclude one another, so an event's probability is the candidate's minus
        those of the next longer candidates that start with it. A text that two candidates share counts for the first.
        """
        probs_NP = torch.nn.functional.pad(logprobs_NK.double().exp(), (0, 1), value=1.0)
        return _times(self._nesting(candidate_ids_NK), probs_NP).clamp_min(0.0).log()

    def _nesting(self, candidate_ids_NK: torch.Tensor) -> torch.Tensor:
        """The matrices (N, P, P) that make disjoint events of nested ones, the last of which is certain."""
        num_points, num_candidates = candidate_ids_NK.shape
        nesting_NPP = np.zeros((num_points, num_candidates + 1, num_candidates + 1))
        nesting_NPP[:, -1, -1] = 1.0
        for n, ids in enumerate(candidate_ids_NK.tolist()):
            targets = [self._target(id) for id in ids]
            index_of = {target: k for k, target in reversed(list(enumerate(targets))) if target is not None}
            for target, k in index_of.items():
                shorter = (index_of.get((target[0][:end], ())) for end in range(len(target[0]) - 1, 0, -1))
                parent = next((j for j in shorter if j is not None), -1)
                nesting_NPP[n, k, k] = 1.0
                nesting_NPP[n, parent, k] = -1.0
        return torch.from_numpy(nesting_NPP)

    def student_partition(self, logits_NV: torch.Tensor, candidate_ids_NK: torch.Tensor) -> torch.Tensor:
        """The student's log-probabilities (N, K + 1) of the events of `partition`, by its next token alone.

        A student's token belongs to the longest candidate that it starts with. So the events are the same texts, but
        for those that the student would spell with tokens that are shorter than a candidate.
        """
        if self.same_vocabulary:
            probs_NK = torch.softmax(logits_NV.double(), dim=-1).cpu().gather(-1, candidate_ids_NK.cpu())
            rest_N = (1.0 - probs_NK.sum(-1)).clamp_min(0.0)
            return torch.cat([probs_NK, rest_N[:, None]], dim=-1).log()
        probs_NK = torch.zeros(candidate_ids_NK.shape, dtype=torch.float64)
        for n, ids in enumerate(candidate_ids_NK.tolist()):
            row = self.student.row(logits_NV[n])
            for k, id in enumerate(ids):
                if data := self.token_bytes(id):
                    low, high = self.student.range(data)
                    probs_NK[n, k] = row.p_W[low:high].sum()
                else:
                    target = self._target(id)
                    same = [other for other in self.special_of_id if target and self._target(other) == target]
                    probs_NK[n, k] = row.p_V[same].sum()
        return self.partition(probs_NK.log(), candidate_ids_NK)


def _times(matrix_NPP: torch.Tensor, vector_NP: torch.Tensor) -> torch.Tensor:
    return (matrix_NPP @ vector_NP[..., None])[..., 0]


def partition_divergence(teacher_NP: torch.Tensor, student_NP: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) (N,) in nats over the K + 1 events of `CrossTokenizer.partition`.

    A coarser partition has a smaller KL, so this is a lower bound of the one over texts as far as both sides are exact
    probabilities of those events; a KL over tokens of different vocabularies is not defined.
    """
    teacher_NP, student_NP = teacher_NP.double(), student_NP.double()
    term_NP = teacher_NP.exp() * (teacher_NP - student_NP.clamp_min(-1e4))
    return term_NP.masked_fill(teacher_NP == float("-inf"), 0.0).sum(-1).clamp_min(0.0)


def least_divergence(lower_NP: torch.Tensor, upper_NP: torch.Tensor, student_NP: torch.Tensor) -> torch.Tensor:
    """The least `partition_divergence` (N,) that a teacher between these bounds can have.

    The distribution between the bounds that is nearest to the student's is the student's own, scaled by one factor and
    cut at the bounds.

    Args:
        lower_NP, upper_NP: bounds of the teacher's probabilities.
        student_NP: the student's log-probabilities. Probabilities below 1e-12 are raised to it, because that of "none"
            is a difference with a rounding error.
    """
    student_NP = student_NP.double().cpu().clamp_min(math.log(1e-12))
    low_N1, high_N1 = (torch.full_like(student_NP[:, :1], bound) for bound in (-30.0, 30.0))
    for _ in range(60):
        factor_N1 = (low_N1 + high_N1) / 2
        teacher_NP = torch.minimum(torch.maximum((student_NP + factor_N1).exp(), lower_NP), upper_NP)
        above_N1 = teacher_NP.sum(-1, keepdim=True) > 1.0
        low_N1, high_N1 = torch.where(above_N1, low_N1, factor_N1), torch.where(above_N1, factor_N1, high_N1)
    return partition_divergence(teacher_NP.log(), student_NP)
