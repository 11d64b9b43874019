"""Labels: the student writes, the teacher scores the student's candidates, rows go to disk, shard by shard.

Knows a model, a teacher and token ids; knows nothing of text, where problems come from, where the teacher runs, or
training. The teacher never generates: one reading of a trajectory gives all that is stored.

Legend: B rows, T tokens, S generated positions of a trajectory, K candidates, V vocabulary.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from transformers_s2t.config import check_range
from transformers_s2t.fingerprints import model_hash
from transformers_s2t.labeling.points import (
    TrajectoryScores,
    check_num_candidates,
    choose_positions,
    in_chunks,
    score_trajectories,
)
from transformers_s2t.labeling.rollout import rollout
from transformers_s2t.labeling.teachers import Teacher, as_teacher
from transformers_s2t.labels.folder import (
    done_problem_ids,
    half_written_files,
    next_shard_index,
    read_header,
    remove_labels,
    shard_files,
    split_of,
    write_header,
    write_shard,
)
from transformers_s2t.labels.schema import CORRECTED_ROLLOUTS, HEADER_NAME, TrajectoryHeader
from transformers_s2t.model_checks import check_causal_lm, check_reads_left_to_right, context_length
from transformers_s2t.models.forwards import head_rows
from transformers_s2t.proposals import floor_mask
from transformers_s2t.triggers import calibrate_threshold


HIT_SIZES = (1, 2, 4, 8, 16)


def check_lengths(
    longest_prompt: int, max_new_tokens: int, models: Mapping[str, PretrainedConfig | int | None]
) -> None:
    """Raises a ValueError where prompt and rollout do not fit into the context of one of the models.

    Args:
        longest_prompt: tokens of the longest prompt.
        max_new_tokens: most new tokens.
        models: name -> the model's config, or how many tokens it takes, `None` where that is unknown.
    """
    for name, one in models.items():
        limit = context_length(one) if isinstance(one, PretrainedConfig) else one
        if limit is not None and longest_prompt + max_new_tokens > limit:
            raise ValueError(
                f"`max_new_tokens` must be at most {max(limit - longest_prompt, 0)}: `{name}` takes {limit} tokens "
                f"and the longest prompt has {longest_prompt}; got {max_new_tokens}."
            )


def divide(problem_ids: Iterable[str], validation_share: float) -> dict[str, str]:
    """Problem id -> its split. Raises a ValueError where none is left for training."""
    split = {id: split_of(id, validation_share) for id in problem_ids}
    if "train" not in split.values():
        raise ValueError(
            f"`validation_share` must leave a problem for training: {validation_share} holds out all {len(split)}."
        )
    return split


def find_unfinished(
    output_dir: str | os.PathLike, header: TrajectoryHeader, overwrite: bool
) -> TrajectoryHeader | None:
    """The header of the labels in `output_dir` that a run with the settings of `header` resumes.

    `None` where it starts anew: there is nothing yet, or `overwrite` is set. Writes nothing.

    Raises:
        ValueError: where the folder holds labels made with other settings, or something else.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {str(folder)!r}.")
    if not folder.is_dir() or set(folder.iterdir()) <= set(half_written_files(folder)):
        return None
    if overwrite and ((folder / HEADER_NAME).is_file() or shard_files(folder)):
        return None
    stored = read_header(folder)
    if stored is None:
        raise ValueError(
            f"`output_dir` must be a new or empty folder, or hold labels and their {HEADER_NAME}; {folder} holds "
            "other files. Choose another folder (--overwrite true replaces labels, never other files)."
        )
    differences = header.differences(stored)
    if differences:
        listed = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differences.items())
        raise ValueError(
            f"`output_dir` {folder} holds labels made with other settings ({listed}). Choose another folder, repeat "
            "the first settings to go on, or pass --overwrite true (overwrite=True) to start anew."
        )
    return stored


@dataclass
class _Trajectory:
    """A rollout and its scores, before points are chosen."""

    number: int
    ids: list[int]
    prompt_length: int
    scores: TrajectoryScores


def label_problems(
    model: PreTrainedModel,
    teacher_model: PreTrainedModel | Teacher,
    prompts: Mapping[str, Sequence[int]],
    output_dir: str | os.PathLike,
    header: TrajectoryHeader,
    pad_token_id: int,
    batch_size: int = 32,
    shard_size: int = 100,
    overwrite: bool = False,
    show_progress: bool = True,
    decode_with: Mapping[str, Any] | None = None,
) -> TrajectoryHeader:
    """Rolls out, scores and writes every problem that `output_dir` does not hold yet.

    A problem's rollouts are in one shard, and a shard belongs to one split (`labels.folder.split_of`). It is written
    whole or not at all, so a killed run loses one shard's work at most (or the sample's, while the threshold is
    estimated), and the same call resumes it, to the same bytes. Processes that `accelerate launch` has started divide
    the shards among them. In float32 the rows do not depend on `batch_size`, `shard_size` or the number of processes
    beyond rounding.

    Args:
        model: the student; put into eval mode.
        teacher_model: a model, put into eval mode, or another teacher: `http_teacher.HTTPTeacher`, or
            `teachers.CrossTokenizerTeacher`.
        prompts: problem id -> token ids of its prompt, in the order in which they are to be labelled.
        output_dir: folder of the labels.
        header: the settings, such as the number of rollouts of a problem and the share of problems that is held out.
            A missing `divergence_threshold` is estimated, as the value that a share `target_rate` of the generated
            positions of the first `threshold_sample` problems reaches, and stored before any row.
        pad_token_id: the tokenizer's id of padding.
        batch_size: rows of one forward.
        shard_size: most problems of one shard.
        overwrite: start anew where the folder holds labels.
        show_progress: shows a bar of the tokens that are read and written, with the time left, the problems that are
            done, and Hit@K at the chosen points.
        decode_with: arguments of `generate` that correct the student where the header's rollout is "s2t" or
            "s2t-local", see [`rollout`].

    Returns:
        The header as stored, with the threshold and `complete=True`.

    Raises:
        ValueError: for illegal arguments or a folder with other settings, before anything is written.
    """
    check_range("batch_size", batch_size, 1, 1 << 20, integer=True)
    check_range("shard_size", shard_size, 1, 1 << 20, integer=True)
    if not prompts:
        raise ValueError("`prompts` must hold one problem at least, got none.")
    if any(len(ids) == 0 for ids in prompts.values()):
        raise ValueError("`prompts` must have one token at least each.")
    teacher = as_teacher(teacher_model)
    if (header.rollout in CORRECTED_ROLLOUTS) != bool(decode_with):
        raise ValueError(
            f"`decode_with` must be given for the rollouts {', '.join(map(repr, CORRECTED_ROLLOUTS))} and for no "
            f"others, got {decode_with!r} for {header.rollout!r}."
        )
    check_causal_lm("model", model)
    check_num_candidates(header.num_candidates, head_rows(model), header.excluded_ids)
    longest = max(len(ids) for ids in prompts.values())
    check_lengths(longest, header.max_new_tokens, {"model": context_length(model)})
    longest = max(teacher.count_tokens(ids, len(ids)) for ids in prompts.values())
    check_lengths(longest, header.max_new_tokens, {"teacher_model": teacher.max_length})
    header = replace(
        header,
        model_hash=model_hash(model),
        teacher_source=teacher.source,
        top_logprobs=teacher.top_logprobs,
        cross_tokenizer=dict(teacher.cross_tokenizer),
    )
    stored = find_unfinished(output_dir, header, overwrite)
    done = set() if stored is None else done_problem_ids(output_dir)
    todo = [id for id in prompts if id not in done]
    split = divide(sorted(done.union(prompts)), header.validation_share)
    splits = sorted(set(split.values()))
    if stored is not None:
        header = stored
        if not todo and stored.complete:
            return stored

    model.eval()
    check_reads_left_to_right("model", model)
    state = PartialState(cpu=model.device.type == "cpu")  # one process, unless more were launched
    state.wait_for_everyone()  # all have looked at the folder before anybody writes
    first_index = 0 if overwrite else next_shard_index(output_dir)
    chunks = [ids for name in splits for ids in in_chunks([id for id in todo if split[id] == name], shard_size)]
    order = {id: i for i, id in enumerate(todo)}
    chunks.sort(key=lambda ids: order[ids[0]])
    shards = list(enumerate(chunks, start=first_index))[state.process_index :: state.num_processes]
    mine = {id for _, ids in shards for id in ids}
    disable = not show_progress or not state.is_main_process
    with tqdm(unit="token", unit_scale=True, smoothing=0, disable=disable) as bar:
        worker = _Worker(model, teacher, prompts, header, pad_token_id, batch_size, bar, decode_with)
        worker.expect(mine)
        ready: dict[str, list[_Trajectory]] = {}
        if header.divergence_threshold is None:
            bar.set_description("Estimating the threshold")
            sample = list(prompts)[: header.threshold_sample]
            # Whole shards, as a resumed run makes them: other batches would round differently.
            for _, ids in shards:
                if not set(sample).isdisjoint(ids):
                    ready |= worker.run(ids)
            own = [(id, torch.cat([one.scores.divergence_S for one in rollouts])) for id, rollouts in ready.items()]
            divergences = dict(gather_object(own))
            threshold = calibrate_threshold(torch.cat([divergences[id] for id in sample]), header.target_rate)
            header = replace(header, divergence_threshold=threshold)
        header = replace(header, num_problems=len(split), complete=False)
        if state.is_main_process:
            if overwrite:
                remove_labels(output_dir)
            for file in half_written_files(output_dir):
                file.unlink()
            write_header(output_dir, header, splits)
        state.wait_for_everyone()
        bar.set_description("Labeling")
        for index, ids in shards:
            ready |= worker.run([id for id in ids if id not in ready])
            rows = [make_row(id, trajectory, header) for id in ids for trajectory in ready.pop(id)]
            fill_in(rows, teacher)
            write_shard(output_dir, index, rows, split[ids[0]])
            worker.count_hits(rows)
    state.wait_for_everyone()
    header = replace(header, complete=True)
    if state.is_main_process:
        write_header(output_dir, header, splits)
    return header


class _Worker:
    """Rolls out and scores problems in length-sorted batches, and updates the progress bar."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher,
        prompts: Mapping[str, Sequence[int]],
        header: TrajectoryHeader,
        pad_token_id: int,
        batch_size: int,
        bar: tqdm,
        decode_with: Mapping[str, Any] | None,
    ):
        self.decode_with = decode_with
        self.model, self.teacher, self.prompts, self.header = model, teacher, prompts, header
        self.pad_token_id, self.batch_size, self.bar = pad_token_id, batch_size, bar
        # ids that the teacher cannot read, such as rows that only the student's padded head has, must not be written
        num_rows = head_rows(model)
        teacher_rows = num_rows if teacher.num_embeddings is None else teacher.num_embeddings
        self.suppressed_ids = sorted({*header.excluded_ids, *range(teacher_rows, num_rows), *teacher.unreadable_ids})
        self.num_rollouts = self.num_tokens = self.num_points = self.num_hits = 0
        self.num_problems, self.num_done, self.num_prompt_tokens = 0, 0, 0

    def expect(self, problem_ids: Collection[str]) -> None:
        """Adds problems to the bar's total."""
        self.num_problems += len(problem_ids)
        self.num_prompt_tokens += sum(len(self.prompts[id]) for id in problem_ids)
        self._tell()

    def run(self, problem_ids: Sequence[str]) -> dict[str, list[_Trajectory]]:
        """All rollouts of some problems, with their scores."""
        try:
            return self._score(problem_ids, self._roll_out(problem_ids))
        except BaseException:  # Ctrl-C too: nobody needs what the teacher has begun
            self.teacher.cancel()
            raise

    def _roll_out(self, problem_ids: Sequence[str]) -> dict[tuple[str, int], list[int]]:
        """Problem id and number of the rollout -> prompt and rollout."""
        header = self.header
        wanted = [(id, number) for id in problem_ids for number in range(header.num_rollouts)]
        sequences = {}
        for batch in in_chunks(sorted(wanted, key=lambda one: len(self.prompts[one[0]])), self.batch_size):
            new_ids = rollout(
                self.model,
                [self.prompts[id] for id, _ in batch],
                header.max_new_tokens,
                self.pad_token_id,
                header.eos_token_ids,
                do_sample=header.rollout == "sample",
                temperature=header.temperature,
                seed=header.seed,
                rollouts=[number for _, number in batch],
                suppressed_ids=self.suppressed_ids,
                decode_with=self.decode_with,
            )
            for one, new in zip(batch, new_ids):
                sequences[one] = self._cut([*self.prompts[one[0]], *new], len(self.prompts[one[0]]))
                self.num_tokens += len(new)
            self.num_rollouts += len(batch)
            self.bar.update(sum(len(sequences[one]) for one in batch))
            self.teacher.prefetch([sequences[one] for one in batch], [len(self.prompts[id]) for id, _ in batch])
            self._tell()
        return sequences

    def _score(
        self, problem_ids: Sequence[str], sequences: Mapping[tuple[str, int], list[int]]
    ) -> dict[str, list[_Trajectory]]:
        done: dict[tuple[str, int], _Trajectory] = {}
        for batch in in_chunks(sorted(sequences, key=lambda one: len(sequences[one])), self.batch_size):
            prompt_lengths = [len(self.prompts[id]) for id, _ in batch]
            scores = score_trajectories(
                self.model,
                self.teacher,
                [sequences[one] for one in batch],
                prompt_lengths,
                self.header.num_candidates,
                self.header.excluded_ids,
            )
            for one, prompt_length, score in zip(batch, prompt_lengths, scores):
                done[one] = _Trajectory(one[1], sequences[one], prompt_length, score)
            self.bar.update(sum(len(sequences[one]) for one in batch))
        self.num_done += len(problem_ids)
        return {id: [done[id, number] for number in range(self.header.num_rollouts)] for id in problem_ids}

    def _cut(self, ids: list[int], prompt_length: int) -> list[int]:
        """Cuts a sequence to the teacher's context: in the teacher's own tokens it may be longer than expected."""
        limit = self.teacher.max_length
        if limit is None or self.teacher.count_tokens(ids, prompt_length) <= limit:
            return ids
        ends = range(prompt_length + 1, len(ids))
        fitting = bisect_right(ends, limit, key=lambda end: self.teacher.count_tokens(ids[:end], prompt_length))
        return ids[: prompt_length + max(fitting, 1)]

    def count_hits(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.num_points += len(row["positions"])
            self.num_hits += sum(top in ids for top, ids in zip(row["teacher_top_id"], row["candidate_ids"]))
        self._tell()

    def _tell(self) -> None:
        # every token of a prompt and of its rollout is run twice: in the rollout and in the scoring
        mean = self.num_tokens / self.num_rollouts if self.num_rollouts else self.header.max_new_tokens
        self.bar.total = round(2 * self.header.num_rollouts * (self.num_prompt_tokens + self.num_problems * mean))
        hit = f"{self.num_hits / self.num_points:.3f}" if self.num_points else "-"
        told = {"problems": f"{self.num_done}/{self.num_problems}", f"Hit@{self.header.num_candidates}": hit}
        self.bar.set_postfix(told)


def make_row(problem_id: str, trajectory: _Trajectory, header: TrajectoryHeader) -> dict[str, Any]:
    """The row of one trajectory, with points chosen by the header's rule and threshold."""
    scores = trajectory.scores
    floor_count_S = floor_mask(scores.student_logprobs_SK, header.min_prob_ratio).sum(-1)
    chosen_N = choose_positions(
        scores.divergence_S, floor_count_S, header.divergence_threshold, header.points, header.max_points
    )
    return {
        "problem_id": problem_id,
        "rollout": trajectory.number,
        "input_ids": trajectory.ids,
        "prompt_length": trajectory.prompt_length,
        "divergence": scores.divergence_S.tolist(),
        "entropy": scores.entropy_S.tolist(),
        "margin": scores.margin_S.tolist(),
        "positions": (chosen_N + trajectory.prompt_length).tolist(),
        "candidate_ids": scores.candidate_ids_SK[chosen_N].tolist(),
        "student_logprobs": scores.student_logprobs_SK[chosen_N].tolist(),
        "teacher_logprobs": scores.teacher_logprobs_SK[chosen_N].tolist(),
        "teacher_top_id": scores.teacher_top_id_S[chosen_N].tolist(),
    }


def fill_in(rows: Sequence[dict[str, Any]], teacher: Teacher) -> None:
    """Asks the teacher for the candidates that it did not name by itself. Only at the chosen points, because each one
    costs a request or a forward, and most positions are no points."""
    asked, positions, ids = [], [], []
    for row in rows:
        unknown = [
            [id for id, value in zip(*pair) if math.isnan(value)]
            for pair in zip(row["candidate_ids"], row["teacher_logprobs"])
        ]
        if any(unknown):
            asked.append(row)
            positions.append([position for position, some in zip(row["positions"], unknown) if some])
            ids.append([some for some in unknown if some])
    if not asked:
        return
    sequences, prompt_lengths = [row["input_ids"] for row in asked], [row["prompt_length"] for row in asked]
    for row, found in zip(asked, teacher.logprobs_of(sequences, prompt_lengths, positions, ids)):
        known = iter(value for values in found for value in values)
        for values in row["teacher_logprobs"]:
            values[:] = [next(known) if math.isnan(value) else value for value in values]


def label_stats(labels: Dataset, divergence_threshold: float) -> dict[str, Any]:
    """What a set of labels holds, and its local sufficiency.

    Returns:
        `rows`, `tokens` (generated), `points` (stored), `kl_tokens` (generated tokens whose divergence reaches the
        threshold), `kl_points` (those of them that are stored) and `hit_at_k`: at how many of the latter, as a share,
        the teacher's argmax is among the student's first k candidates.
    """
    tokens = points = kl_tokens = kl_points = 0
    width = 0
    hits = dict.fromkeys(HIT_SIZES, 0)
    for row in labels.select_columns(["prompt_length", "divergence", "positions", "candidate_ids", "teacher_top_id"]):
        tokens += len(row["divergence"])
        points += len(row["positions"])
        kl_tokens += sum(value >= divergence_threshold for value in row["divergence"])
        for position, ids, top in zip(row["positions"], row["candidate_ids"], row["teacher_top_id"]):
            if row["divergence"][position - row["prompt_length"]] >= divergence_threshold:
                kl_points += 1
                width = max(width, len(ids))
                for k in HIT_SIZES:
                    hits[k] += top in ids[:k]
    return {
        "rows": len(labels),
        "tokens": tokens,
        "points": points,
        "kl_tokens": kl_tokens,
        "kl_points": kl_points,
        "hit_at_k": {str(k): hits[k] / kl_points for k in HIT_SIZES if k <= width} if kl_points else {},
    }
