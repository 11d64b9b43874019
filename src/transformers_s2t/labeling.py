"""Labels: the student writes, the teacher scores the student's candidates, rows go to disk, shard by shard.

Knows a model, a teacher and token ids; knows nothing of text, of where problems come from, of where the teacher runs,
or of training. The teacher never generates: one reading of a trajectory gives all that is stored.

Legend: B rows, T tokens, S generated positions of a trajectory, K candidates, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .config import _check_choice, _check_range
from .fingerprints import model_hash
from .model_checks import check_causal_lm, check_reads_left_to_right, context_length
from .proposals import exclude, floor_mask, propose
from .shared_prefix import can_share, pad_prompts, read_shared, without_wrapper
from .teachers import Comparison, Teacher, TextLogits, as_teacher, compare_logits, head_rows
from .trajectories import (
    CORRECTED_ROLLOUTS,
    HEADER_NAME,
    MISSING_LOGPROB,
    POINTS,
    TrajectoryHeader,
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
from .triggers import calibrate_threshold, entropy, margin


HIT_SIZES = (1, 2, 4, 8, 16)
_MAX_NUMBERS = 1 << 28  # hidden states (or logits) of both models alive at one time, in the models' own type
_MAX_TOKENS = 1 << 14  # of one forward
_MAX_FLOAT_LOGITS = 1 << 24  # logits alive in float32 at one time


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


class _GumbelNoise(LogitsProcessor):
    """Makes argmax a sample from softmax(logits / temperature), each row from a generator of its own.

    So what is sampled for a prompt depends on the seed, that prompt and which of its rollouts it is, and not on its
    neighbours in the batch.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        rollouts: Sequence[int],
        temperature: float,
        seed: int,
        device: torch.device,
    ):
        self.temperature = temperature
        self.generators = []
        for ids, number in zip(prompt_ids, rollouts, strict=True):
            digest = hashlib.sha256(f"{seed} {number} {list(ids)}".encode()).digest()
            row_seed = int.from_bytes(digest[:8], "big") >> 1
            self.generators.append(torch.Generator(device=device).manual_seed(row_seed))

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch alone."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for b, generator in enumerate(self.generators):
            noise_BV[b].exponential_(generator=generator)
        return scores.float() / self.temperature - noise_BV.clamp_min(torch.finfo(torch.float32).tiny).log()


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_token_id: int,
    eos_token_ids: Sequence[int] = (),
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    rollouts: Sequence[int] | None = None,
    suppressed_ids: Sequence[int] = (),
    decode_with: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, in one batch.

    The checkpoint's `generation_config` does not apply: no repetition penalty, no top-k, top-p or other setting of it
    is inherited. Greedy is the argmax, sampling is from the whole softmax at `temperature`.

    Args:
        model: in eval mode.
        prompt_ids: token ids, one prompt a row, without padding.
        max_new_tokens: of each row.
        pad_token_id: for shorter prompts.
        eos_token_ids: end a row; the models' defaults are not looked up.
        do_sample, temperature, seed: see above; a row's samples depend on the seed, its prompt and its number only.
        rollouts: the number of each row, for prompts that are sampled several times; 0 if not given.
        suppressed_ids: never generated.
        decode_with: for `generate`: `custom_generate=s2t_generate` with a selector corrects the model as it writes.

    Returns:
        New tokens of each row, up to its first end-of-sequence token, which is included: it is a decision too.
    """
    decode_with = decode_with or {}
    selector, teacher = decode_with.get("selector"), decode_with.get("teacher_model")
    readers = [model, getattr(selector, "teacher_model", None), teacher]
    inputs = pad_prompts(prompt_ids, pad_token_id, [reader for reader in readers if reader is not None])
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        suppress_tokens=list(suppressed_ids) or None,
    )
    processors = LogitsProcessorList()
    if do_sample:
        numbers = [0] * len(prompt_ids) if rollouts is None else rollouts
        processors.append(_GumbelNoise(prompt_ids, numbers, temperature, seed, model.device))
    # `generate` fills everything that is None from the model's own config, so that one has to be out of the way.
    owner = without_wrapper(model)  # a PeftModel's own would not be read
    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        if decode_with:
            config.max_new_tokens = max_new_tokens
            width = inputs["input_ids"].shape[1]
            output_BT = model.generate(**inputs, generation_config=config, logits_processor=processors, **decode_with)
            new = output_BT[:, width:].tolist()
        else:
            new = generate_rows(model, inputs, config, max_new_tokens, processors)
    finally:
        owner.generation_config = own
    ends = set(eos_token_ids)
    return [ids[: next((i + 1 for i, id in enumerate(ids) if id in ends), len(ids))] for ids in new]


#: A batch of fewer rows is not made smaller: on a CPU a step of these takes about as long as one of half as many.
_FEW_ROWS = 8


class _HalfFinished(StoppingCriteria):
    """Stops a batch when half of its rows have ended."""

    def __init__(self, eos_token_id: int | Collection[int], width: int, device: torch.device):
        ids = [eos_token_id] if isinstance(eos_token_id, int) else sorted(eos_token_id)
        self.ends, self.width = torch.tensor(ids, device=device), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        ended_B = torch.isin(input_ids[:, self.width :], self.ends).any(-1)
        return torch.full_like(ended_B, bool(2 * ended_B.sum() >= len(ended_B)))


def _can_lose_rows(model: PreTrainedModel) -> bool:
    """Whether all that a model knows of the rows of a batch is in its cache (Qwen2-VL keeps offsets of positions)."""
    return can_share(model) and not any(hasattr(module, "rope_deltas") for module in model.modules())


def generate_rows(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    config: GenerationConfig,
    max_new_tokens: int,
    processors: Sequence[_GumbelNoise] = (),
    cache: Cache | None = None,
) -> list[list[int]]:
    """`model.generate` in which rows leave the batch: where half of them have ended the others go on alone.

    So one long text does not hold a batch. What the prompts begin with is read once.

    Args:
        model: in eval mode.
        inputs: `input_ids` and `attention_mask` (B, T) of `shared_prefix.pad_prompts`.
        config: how; changed here. Its end-of-sequence tokens end a row.
        max_new_tokens: of each row.
        processors: of the logits, told by `keep(rows)` which rows go on.
        cache: of the prompts, where some of their tokens are read already.

    Returns:
        New tokens of each row, with whatever stands behind its end while others go on.
    """
    input_ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    rows, new = list(range(len(input_ids_BT))), [[] for _ in input_ids_BT]
    cache = read_shared(model, input_ids_BT, mask_BT) if cache is None else cache
    num_left, drops = max_new_tokens, config.eos_token_id not in (None, []) and _can_lose_rows(model)
    while rows:
        width, several = input_ids_BT.shape[1], drops and len(rows) > _FEW_ROWS
        stop = [_HalfFinished(config.eos_token_id, width, input_ids_BT.device)] if several else []
        config.max_new_tokens, config.return_dict_in_generate = num_left, several
        given = {} if cache is None else {"past_key_values": cache}
        output = model.generate(
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(stop),
            **given,
        )
        all_ids_BT = output.sequences if several else output
        new_BS = all_ids_BT[:, width:]
        for row, ids in zip(rows, new_BS.tolist()):
            new[row] += ids
        num_left -= new_BS.shape[1]
        if not several or num_left <= 0:
            break
        left_A = (~torch.isin(new_BS, stop[0].ends).any(-1)).nonzero()[:, 0]
        rows = [rows[b] for b in left_A.tolist()]
        cache = output.past_key_values
        cache.reorder_cache(left_A)
        input_ids_BT = all_ids_BT[left_A]
        mask_BT = torch.cat([mask_BT[left_A], mask_BT.new_ones(len(left_A), new_BS.shape[1])], dim=1)
        for processor in processors:
            processor.keep(left_A.tolist())
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Scores


class TrajectoryScores(NamedTuple):
    """What both models say at every generated position of one trajectory, on the CPU.

    Attributes:
        divergence_S: KL(teacher || student), nats; a lower bound from a teacher that names its best tokens only, or
            has another tokenizer.
        entropy_S: of the student over its renormalised top 64, nats.
        margin_S: minus the difference of the student's two best log-probabilities, nats.
        candidate_ids_SK: the student's top K, best first.
        student_logprobs_SK: over the student's full vocabulary less the excluded tokens, nats.
        teacher_logprobs_SK: over the teacher's full vocabulary, nats; -1e4 at ids that the teacher does not have; nan
            where such a teacher has not been asked yet.
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
    """Scores every generated position of some trajectories: one teacher-forced forward of the student,
    one reading of the teacher.

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
        max_points: of one trajectory. Where there are more, that many stay which are evenly spread among them: so the
            share of points at which the teacher agrees stays what it is, which a selector has to learn too.
    """
    _check_choice("points", points, POINTS)
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


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def check_num_candidates(num_candidates: int, num_head_rows: int, excluded_ids: Sequence[int]) -> None:
    """Raises a ValueError where the student has fewer tokens to propose."""
    offered = num_head_rows - len(excluded_ids)
    if num_candidates > offered:
        raise ValueError(f"`num_candidates` must be at most {offered} for this model, got {num_candidates}.")


def check_lengths(
    longest_prompt: int, max_new_tokens: int, models: Mapping[str, PretrainedConfig | int | None]
) -> None:
    """Raises a ValueError where prompt and rollout do not fit into the context of one of the models.

    `models`: name -> its config, or how many tokens it takes, `None` where that is unknown.
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
    """The header of the labels in `output_dir` that a run with the settings of `header` goes on with.

    `None` where it starts anew: there is nothing yet, or `overwrite` is set. Reads only.

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

    A problem's rollouts are in one shard, and a shard belongs to one split (`trajectories.split_of`). It is written
    at once or not at all, so a killed run loses one shard's work at most (or the sample's, while the threshold is
    estimated), and the same call goes on with the rest, to the same bytes. Processes that `accelerate launch` has
    started share the shards. In float32 the rows do not depend on `batch_size`, `shard_size` or the number of
    processes beyond rounding.

    Args:
        model: the student; put into eval mode.
        teacher_model: a model, put into eval mode, or another teacher: `teachers.HTTPTeacher`, or
            `teachers.CrossTokenizerTeacher`.
        prompts: problem id -> token ids of its prompt, in the order in which they are to be labelled.
        output_dir: folder of the labels.
        header: the settings. Where it has no `divergence_threshold`, the one that a share `target_rate` of the
            generated positions of the first `threshold_sample` problems reaches is taken, and stored before any row.
            It says how many rollouts a problem has, and which share of the problems is held out.
        pad_token_id: of the tokenizer.
        batch_size: rows of one forward.
        shard_size: problems of one shard, at most.
        overwrite: start anew where the folder holds labels.
        show_progress: a bar over the tokens that are read and written, with the time that is left by it, the problems
            that are done and Hit@K at the chosen points.
        decode_with: how `generate` corrects the student where the header's rollout is "s2t" or "s2t-local", see
            [`rollout`].

    Returns:
        The header as stored, with the threshold and `complete=True`.

    Raises:
        ValueError: for illegal arguments or a folder with other settings, before anything is written.
    """
    _check_range("batch_size", batch_size, 1, 1 << 20, integer=True)
    _check_range("shard_size", shard_size, 1, 1 << 20, integer=True)
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
    state = PartialState(cpu=model.device.type == "cpu")  # of one process where nothing else was launched
    state.wait_for_everyone()  # all have looked at the folder before anybody writes
    first_index = 0 if overwrite else next_shard_index(output_dir)
    chunks = [ids for name in splits for ids in _chunks([id for id in todo if split[id] == name], shard_size)]
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
            # Whole shards, as a run that goes on makes them: in other batches rounding would be another one.
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
    """Rolls out and scores problems in length-sorted batches, and tells the progress bar."""

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
        # what the teacher cannot read, as rows that only the student's padded head has, must not be written
        num_rows = head_rows(model)
        teacher_rows = num_rows if teacher.num_embeddings is None else teacher.num_embeddings
        self.suppressed_ids = sorted({*header.excluded_ids, *range(teacher_rows, num_rows), *teacher.unreadable_ids})
        self.num_rollouts = self.num_tokens = self.num_points = self.num_hits = 0
        self.num_problems, self.num_done, self.num_prompt_tokens = 0, 0, 0

    def expect(self, problem_ids: Collection[str]) -> None:
        """Tells the bar what there is to do."""
        self.num_problems += len(problem_ids)
        self.num_prompt_tokens += sum(len(self.prompts[id]) for id in problem_ids)
        self._tell()

    def run(self, problem_ids: Sequence[str]) -> dict[str, list[_Trajectory]]:
        """All rollouts of some problems, with their scores."""
        try:
            return self._score(problem_ids, self._roll_out(problem_ids))
        except BaseException:  # Ctrl-C too: what the teacher has begun is for nobody now
            self.teacher.cancel()
            raise

    def _roll_out(self, problem_ids: Sequence[str]) -> dict[tuple[str, int], list[int]]:
        """Problem id and number of the rollout -> prompt and rollout."""
        header = self.header
        wanted = [(id, number) for id in problem_ids for number in range(header.num_rollouts)]
        sequences = {}
        for batch in _chunks(sorted(wanted, key=lambda one: len(self.prompts[one[0]])), self.batch_size):
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
        for batch in _chunks(sorted(sequences, key=lambda one: len(sequences[one])), self.batch_size):
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
        """As much as the teacher's context takes: in tokens of its own, a rollout may be longer than expected."""
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
        # every token of a prompt and of what was written behind it goes through a rollout and a scoring
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
    """Asks the teacher for the candidates that it did not name by itself: here and not earlier, because it is asked
    once for each point, and most positions are none."""
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


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
