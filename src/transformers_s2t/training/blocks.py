"""Labels as training takes them: checked rows, cut into blocks of decision points that fit into memory.

Knows labelled rows and the floor of decoding; knows nothing of models, adapters or losses.

Legend: B rows, T tokens, N decision points, K candidates.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from datasets import Dataset

from transformers_s2t.labels.schema import FEATURES, validate_row
from transformers_s2t.scoring.reserved_rows import valid_candidates
from transformers_s2t.training.s2t_config import MAX_PACKED_TOKENS, S2TConfig


_POINT_COLUMNS = ("positions", "candidate_ids", "student_logprobs", "teacher_logprobs", "teacher_top_id")
_COLUMNS = ("input_ids", "prompt_length", *_POINT_COLUMNS)


def text_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens (B, T) that count in the prefix KL. Each token of a trajectory counts in its first block only."""
    columns_T = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    return inputs["attention_mask"].bool() & (columns_T >= inputs["text_start"][:, None])


def cut_to_blocks(
    dataset: Dataset, args: S2TConfig, name: str, vocab_size: int, reserved_token_ids: tuple[int, ...]
) -> Dataset:
    """Checked rows whose trajectory and candidates fit `max_packed_tokens`; long ones become several blocks of points.

    Points with a single candidate above the floor are no decisions and are dropped, as are trajectories without any
    point. Points so late that their prefix alone exceeds the limit are dropped with a warning. A block has the columns
    of a row, plus `text_start`, the index of its first token that no earlier block has, and `length`, the number of
    its packed tokens. Blocks can be cut again.

    Args:
        dataset: labelled rows, or blocks of an earlier cut.
        args: K, floor and limits.
        name: name of the argument that the rows were given as, for errors.
        vocab_size: rows of the model's embedding.
        reserved_token_ids: no candidate may be one of them.

    Raises:
        ValueError: for missing columns, an illegal row, or where no point is left.
    """
    missing = [column for column in _COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(f"`{name}` lacks the columns {missing}, it has {dataset.column_names}; see `s2t label`.")
    num_dropped: list[int] = []
    settings = {
        "num_candidates": args.num_candidates,
        "min_prob_ratio": args.min_prob_ratio,
        "max_packed_tokens": args.max_packed_tokens,
        "max_points": args.max_points_per_block or MAX_PACKED_TOKENS,
        "vocab_size": vocab_size,
        "reserved_token_ids": reserved_token_ids,
        "name": name,
    }
    known = [column for column in dataset.column_names if column in (*FEATURES, "text_start")]
    result = dataset.select_columns(known).map(
        functools.partial(_cut_batch, num_dropped=num_dropped),
        batched=True,
        batch_size=256,
        remove_columns=known,
        fn_kwargs=settings,
        load_from_cache_file=False,  # rows are checked, and dropped points named, at every run
        desc=f"Preparing {name}",
    )
    if sum(num_dropped):
        warnings.warn(
            f"{sum(num_dropped)} decision points lie beyond max_packed_tokens={args.max_packed_tokens} and are left "
            f"out of `{name}`; raise it to train on them.",
            stacklevel=4,
        )
    if len(result) == 0:
        raise ValueError(
            f"`{name}` has no decision point with two candidates above min_prob_ratio={args.min_prob_ratio} that fits "
            f"max_packed_tokens={args.max_packed_tokens}."
        )
    return result


def _cut_batch(
    batch: dict[str, list],
    num_candidates: int,
    min_prob_ratio: float,
    max_packed_tokens: int,
    max_points: int,
    vocab_size: int,
    reserved_token_ids: tuple[int, ...],
    name: str,
    num_dropped: list[int],
) -> dict[str, list]:
    out: dict[str, list] = {key: [] for key in (*_COLUMNS, "text_start", "length")}
    for i in range(len(batch["input_ids"])):
        row = {key: values[i] for key, values in batch.items()}
        try:
            _check_row(row, num_candidates, vocab_size, reserved_token_ids)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None
        if not row["positions"]:
            continue
        logprobs_NK = torch.tensor([point[:num_candidates] for point in row["student_logprobs"]])
        here_N = torch.ones(len(logprobs_NK), dtype=torch.bool)
        valid_1NK, _ = valid_candidates(logprobs_NK[None], here_N[None], min_prob_ratio)
        blocks: list[list[int]] = [[]]
        used = 0
        for n, size in enumerate(valid_1NK[0].sum(-1).tolist()):
            prefix = row["positions"][n] + 1
            if size < 2:
                continue
            if prefix + size > max_packed_tokens:
                num_dropped.append(1)
                continue
            if len(blocks[-1]) == max_points or (blocks[-1] and prefix + used + size > max_packed_tokens):
                blocks.append([])
                used = 0
            blocks[-1].append(n)
            used += size
        text_start = row.get("text_start", 0)
        for block in filter(None, blocks):
            end = row["positions"][block[-1]] + 1
            for key in _POINT_COLUMNS:
                out[key].append([row[key][n] for n in block])
            out["input_ids"].append(row["input_ids"][:end])
            out["prompt_length"].append(row["prompt_length"])
            out["text_start"].append(text_start)
            out["length"].append(end + int(valid_1NK[0, block].sum()))
            text_start = end
    return out


def _check_row(row: dict[str, Any], num_candidates: int, vocab_size: int, reserved_token_ids: tuple[int, ...]) -> None:
    """Raises a ValueError, naming the column and what is wrong, for a row that this model cannot be trained on."""
    num_generated = len(row["input_ids"] or ()) - (row["prompt_length"] or 0)
    unread = {
        "problem_id": "unnamed",
        "rollout": 0,
        **dict.fromkeys(("divergence", "entropy", "margin"), [0.0] * num_generated),
    }
    row = unread | row  # what training does not read may be missing
    validate_row({name: row[name] for name in FEATURES})
    where = f"(problem_id {row['problem_id']!r})"
    reserved = set(reserved_token_ids)
    for name, ids in (("input_ids", row["input_ids"]), *(("candidate_ids", ids) for ids in row["candidate_ids"])):
        if ids and max(ids) >= vocab_size:
            raise ValueError(f"`{name}` must be below {vocab_size}, the model's vocabulary, got {max(ids)} {where}.")
    for ids in row["candidate_ids"]:
        if len(ids) < num_candidates:
            raise ValueError(
                f"the labels hold {len(ids)} candidates per point, num_candidates={num_candidates} asks for more "
                f"{where}: label with more (s2t label --num_candidates), or train with fewer."
            )
        if not reserved.isdisjoint(ids):
            raise ValueError(
                f"`candidate_ids` must be text, got the reserved tokens {sorted(reserved.intersection(ids))} {where}: "
                "label with the same reserved tokens as you train."
            )
