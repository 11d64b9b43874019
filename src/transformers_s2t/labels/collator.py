"""Batches of labelled trajectories.

Legend: B texts, T tokens, P decision points, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from transformers_s2t.config import MAX_CANDIDATES, check_range
from transformers_s2t.labels.schema import MISSING_LOGPROB, is_int


@dataclass
class TrajectoryCollator:
    """Turns rows into tensors, padded on the right.

    Args:
        pad_token_id (`int`): fills `input_ids`.
        num_candidates (`int`, *optional*): number of the student's first candidates that are kept at each point.

    Example:

    ```python
    >>> rows = [
    ...     {"input_ids": [5, 6, 7, 8], "prompt_length": 2, "positions": [2, 3], "candidate_ids": [[7, 9], [8, 4]],
    ...      "student_logprobs": [[-0.5, -1.0], [-0.1, -3.0]], "teacher_logprobs": [[-2.0, -0.2], [-0.3, -4.0]],
    ...      "teacher_top_id": [9, 8]},
    ...     {"input_ids": [5, 6], "prompt_length": 1, "positions": [], "candidate_ids": [], "student_logprobs": [],
    ...      "teacher_logprobs": [], "teacher_top_id": []},
    ... ]
    >>> TrajectoryCollator(pad_token_id=0)(rows)
    {'input_ids': tensor([[5, 6, 7, 8],
                          [5, 6, 0, 0]]),
     'attention_mask': tensor([[1, 1, 1, 1],
                               [1, 1, 0, 0]]),
     'prompt_length': tensor([2, 1]),
     'text_start': tensor([0, 0]),
     'positions': tensor([[2, 3],
                          [1, 1]]),
     'position_mask': tensor([[ True,  True],
                              [False, False]]),
     'candidate_ids': tensor([[[7, 9], [8, 4]],
                              [[0, 0], [0, 0]]]),
     'student_logprobs': tensor([[[-0.5, -1.0], [-0.1, -3.0]],
                                 [[-1e4, -1e4], [-1e4, -1e4]]]),
     'teacher_logprobs': tensor([[[-2.0, -0.2], [-0.3, -4.0]],
                                 [[-1e4, -1e4], [-1e4, -1e4]]]),
     'teacher_top_id': tensor([[9, 8],
                               [0, 0]])}
    ```

    Padded points sit at `prompt_length` (any legal index) with a False mask, padded candidates have id 0 and
    log-probabilities of -1e4. There is always one point and one candidate at least, so no dimension is 0. Rows may
    have `text_start`, the first token whose prefix KL counts. Columns that are not named here are left out.
    """

    pad_token_id: int
    num_candidates: int | None = None

    def __post_init__(self):
        if not is_int(self.pad_token_id) or self.pad_token_id < 0:
            raise ValueError(f"`pad_token_id` must be an integer of 0 or more, got {self.pad_token_id!r}.")
        if self.num_candidates is not None:
            check_range("num_candidates", self.num_candidates, 1, MAX_CANDIDATES, integer=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        limit = MAX_CANDIDATES if self.num_candidates is None else self.num_candidates
        B = len(rows)
        T = max(len(row["input_ids"]) for row in rows)
        N = max([1, *(len(row["positions"]) for row in rows)])
        K = min(limit, max([1, *(len(ids) for row in rows for ids in row["candidate_ids"])]))
        prompt_length_B = torch.tensor([row["prompt_length"] for row in rows])
        batch = {
            "input_ids": torch.full((B, T), self.pad_token_id),
            "attention_mask": torch.zeros((B, T), dtype=torch.long),
            "prompt_length": prompt_length_B,
            "text_start": torch.tensor([row.get("text_start", 0) for row in rows]),
            "positions": prompt_length_B[:, None].repeat(1, N),
            "position_mask": torch.zeros((B, N), dtype=torch.bool),
            "candidate_ids": torch.zeros((B, N, K), dtype=torch.long),
            "student_logprobs": torch.full((B, N, K), MISSING_LOGPROB),
            "teacher_logprobs": torch.full((B, N, K), MISSING_LOGPROB),
            "teacher_top_id": torch.zeros((B, N), dtype=torch.long),
        }
        for b, row in enumerate(rows):
            num_tokens, num_points = len(row["input_ids"]), len(row["positions"])
            batch["input_ids"][b, :num_tokens] = torch.tensor(row["input_ids"])
            batch["attention_mask"][b, :num_tokens] = 1
            if num_points == 0:
                continue
            batch["position_mask"][b, :num_points] = True
            for name in ("positions", "teacher_top_id"):
                batch[name][b, :num_points] = torch.tensor(row[name])
            width = min(limit, len(row["candidate_ids"][0]))
            for name in ("candidate_ids", "student_logprobs", "teacher_logprobs"):
                batch[name][b, :num_points, :width] = torch.tensor([values[:width] for values in row[name]])
        return batch
