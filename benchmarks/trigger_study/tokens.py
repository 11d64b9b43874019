"""What labels say of every generated token, and what a selector would write there. Knows no files and no report.

Legend: N generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset

from transformers_s2t import FusionWeights, SelectorConfig
from transformers_s2t.calibration.router_training import gains
from transformers_s2t.calibration.scored_points import ScoredPoints
from transformers_s2t.triggers import calibrate_threshold
from trigger_study import TRIGGERS


class Tokens(NamedTuple):
    """Every generated token of labelled texts, row by row.

    Attributes:
        values: trigger -> (N,), bigger = more in doubt.
        gain_N: nats by which the teacher likes its best candidate above the floor better than the first.
        choice_N: two or more candidates above the floor.
        late_N: behind the warm-up, where a trigger can fire.
        problem_N: index of the text.
    """

    values: dict[str, torch.Tensor]
    gain_N: torch.Tensor
    choice_N: torch.Tensor
    late_N: torch.Tensor
    problem_N: torch.Tensor

    def where(self, keep_N: torch.Tensor) -> Tokens:
        return Tokens(
            {name: values_N[keep_N] for name, values_N in self.values.items()}, *(t[keep_N] for t in self[1:])
        )


def read_tokens(
    labels: Dataset, config: SelectorConfig, router_values: Sequence[torch.Tensor] | None = None, seed: int = 0
) -> Tokens:
    """What labels say of every generated token, and the router's logits there; random values are uniform."""
    lengths = [len(row) for row in labels["divergence"]]
    columns = {"entropy": "entropy", "margin": "margin", "kl": "divergence"}
    values = {name: torch.cat([torch.tensor(row) for row in labels[column]]) for name, column in columns.items()}
    values["random"] = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    if router_values is not None:
        values["router"] = torch.cat(list(router_values))
    floor = np.log(config.min_prob_ratio) if config.min_prob_ratio else -np.inf
    return Tokens(
        {name: values[name] for name in TRIGGERS if name in values},
        torch.cat([gains(row, config.min_prob_ratio) for row in labels]),
        values["margin"] >= floor,
        torch.cat([torch.arange(length) >= config.warmup_tokens for length in lengths]),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
    )


def threshold_of(trigger: str, calibration: Tokens, rate: float) -> float:
    """As decoding has it: uniform values need no calibration; the warm-up counts but never fires."""
    if trigger == "random":
        return 1.0 - rate
    values_N = calibration.values[trigger].double()
    return calibrate_threshold(values_N.masked_fill(~calibration.late_N, -torch.inf), rate)


class Decisions(NamedTuple):
    """What would be written at every generated token, were the selector asked there, against the teacher's best
    candidate above the floor. Without a choice the first candidate is that one."""

    first_right_N: torch.Tensor
    chosen_right_N: torch.Tensor
    flipped_N: torch.Tensor


def decide_everywhere(labels: Dataset, points: ScoredPoints, fusion: FusionWeights) -> Decisions:
    """Decisions (N,) of points that lie in the order of the labels' rows.

    Raises:
        ValueError: where they do not.
    """
    starts = [0, *accumulate(map(len, labels["divergence"]))]
    rows = zip(starts, labels["positions"], labels["prompt_length"])
    at = [start + position - prompt_length for start, positions, prompt_length in rows for position in positions]
    at_N = torch.tensor(at)
    divergence_N = torch.cat([torch.tensor(row) for row in labels["divergence"]])
    if len(at_N) != len(points.divergence_N) or not torch.equal(divergence_N[at_N], points.divergence_N):
        raise ValueError("the scored points are not in the order of the labels' rows.")
    first_right_N, chosen_right_N = torch.ones(starts[-1], dtype=torch.bool), torch.ones(starts[-1], dtype=torch.bool)
    flipped_N = torch.zeros(starts[-1], dtype=torch.bool)
    choice_N, target_N = points.choice(fusion), points.target_N
    first_right_N[at_N], chosen_right_N[at_N] = target_N == 0, choice_N == target_N
    flipped_N[at_N] = choice_N != 0
    return Decisions(first_right_N, chosen_right_N, flipped_N)
