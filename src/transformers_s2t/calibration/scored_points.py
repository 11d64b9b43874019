"""Thresholds and fusion weights from labelled, held-out training trajectories, to be stored in `s2t_config.json`.

Knows labels and a selector; never sees evaluation problems. Legend: N decision points, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from transformers_s2t.calibration.router_training import collect, cross_fitted_logits, predict
from transformers_s2t.config import FusionWeights
from transformers_s2t.decoding.local_selector import LocalSelector
from transformers_s2t.fusion import decide, fit_fusion
from transformers_s2t.labels.collator import TrajectoryCollator
from transformers_s2t.losses import best_candidate
from transformers_s2t.proposals import Proposals
from transformers_s2t.scoring.packing import PackedPoints, packed_hidden
from transformers_s2t.scoring.reserved_rows import valid_candidates
from transformers_s2t.triggers import calibrate_threshold


#: Target rates that calibration writes thresholds for, as shares of the generated tokens.
TARGET_RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_COLUMNS = {"kl": "divergence", "entropy": "entropy", "margin": "margin"}


def calibrate_on_labels(
    labels: Dataset,
    target_rates: Iterable[float] = TARGET_RATES,
    warmup_tokens: int = 3,
    router_values: Sequence[torch.Tensor] | None = None,
) -> dict[str, dict[float, float]]:
    """Thresholds of the "kl", "entropy" and "margin" triggers for each target rate, on the labelled text.

    Corrected text is less in doubt: where a selector writes, these fire too rarely (see
    `thresholds.calibrate_by_decoding`).

    Args:
        labels: trajectories of held-out training problems, with the trigger values at every generated position.
        target_rates: shares of the generated tokens, in (0, 1].
        warmup_tokens: number of first new tokens that never trigger but count as generated.
        router_values: logits from [`read_router`], for thresholds of the "router" trigger too.

    Returns:
        trigger -> {target rate: threshold}.
    """
    table = {}
    columns = {trigger: labels[column] for trigger, column in _COLUMNS.items()}
    if router_values is not None:
        columns["router"] = router_values
    for trigger, column in columns.items():
        rows = []
        for row in column:
            values = torch.as_tensor(row, dtype=torch.float64).clone()
            values[:warmup_tokens] = float("-inf")
            rows.append(values)
        values = torch.cat(rows)
        table[trigger] = {float(rate): calibrate_threshold(values, rate) for rate in target_rates}
    return table


class Flips(NamedTuple):
    """What a selector changed, counted against the teacher's best candidate above the floor.

    Attributes:
        helped: the student's first candidate is wrong, the choice is right.
        hurt: the first is right, the choice is wrong.
        other: from a wrong first candidate to another wrong one.
    """

    helped: int
    hurt: int
    other: int


class ScoredPoints(NamedTuple):
    """Labelled decision points, scored by a selector.

    Attributes:
        scores_NK: the selector's scores; 0 at candidates below the floor.
        candidate_ids_NK: the student's candidates, best first.
        logprobs_NK: the student's log-probabilities, nats.
        teacher_NK: the teacher's log-probabilities, nats.
        mask_NK: True above the floor. Points with a single True hold no choice.
        teacher_top_N: the teacher's argmax over the whole vocabulary.
        divergence_N: KL(teacher || student) there, nats.
        router_N: the router's logits that the first candidate is wrong; `None` without a router.
    """

    scores_NK: torch.Tensor
    candidate_ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    teacher_NK: torch.Tensor
    mask_NK: torch.Tensor
    teacher_top_N: torch.Tensor
    divergence_N: torch.Tensor
    router_N: torch.Tensor | None = None

    def where(self, keep_N: torch.Tensor) -> ScoredPoints:
        """The points for which `keep_N` is True."""
        return ScoredPoints(*(None if tensor is None else tensor[keep_N] for tensor in self))

    def with_choice(self) -> ScoredPoints:
        """The points with two or more candidates above the floor."""
        return self.where(self.mask_NK.sum(-1) > 1)

    @property
    def target_N(self) -> torch.Tensor:
        """Index of the teacher's best candidate above the floor."""
        return best_candidate(self.teacher_NK, self.mask_NK)

    def choice(self, fusion: FusionWeights) -> torch.Tensor:
        """Index (N,) of the candidate that the fused score chooses, as in decoding."""
        proposals = Proposals(self.candidate_ids_NK, self.logprobs_NK, self.mask_NK)
        return decide(self.scores_NK, proposals, fusion, self.router_N)

    def agreement(self, fusion: FusionWeights) -> float:
        """Agree@1: share of points at which the fused decision is the teacher's best candidate."""
        return float((self.choice(fusion) == self.target_N).float().mean())

    def flips(self, fusion: FusionWeights) -> Flips:
        """How often the fused decision replaces the student's first candidate, by whether that helps or hurts."""
        choice_N, target_N = self.choice(fusion), self.target_N
        flipped_N, first_is_right_N, is_right_N = choice_N != 0, target_N == 0, choice_N == target_N
        return Flips(
            helped=int((flipped_N & is_right_N).sum()),
            hurt=int((flipped_N & first_is_right_N).sum()),
            other=int((flipped_N & ~first_is_right_N & ~is_right_N).sum()),
        )


@torch.no_grad()
def score_labels(
    selector: LocalSelector,
    labels: Dataset,
    batch_size: int = 32,
    num_candidates: int | None = None,
    min_prob_ratio: float | None = None,
    router_values: Sequence[torch.Tensor] | None = None,
) -> ScoredPoints:
    """Scores every labelled point as decoding would, with one packed forward per trajectory, the shortest first.

    Args:
        selector: S2T-Local selector.
        labels: trajectories.
        batch_size: trajectories per forward.
        num_candidates, min_prob_ratio: `None` for the selector's own.
        router_values: logits from [`read_router`]; `None` reads the selector's router, where it has one.

    Raises:
        ValueError: where the labels hold no point.
    """
    config = selector.selector_config
    num_candidates = config.num_candidates if num_candidates is None else num_candidates
    min_prob_ratio = config.min_prob_ratio if min_prob_ratio is None else min_prob_ratio
    collate = TrajectoryCollator(pad_token_id=0, num_candidates=num_candidates)
    rows = sorted((i for i, at in enumerate(labels["positions"]) if at), key=lambda i: len(labels[i]["input_ids"]))
    if not rows:
        raise ValueError("The labels hold no decision point: nothing to score.")
    parts: list[tuple[torch.Tensor, ...]] = []
    views = selector.views()
    for start in tqdm(range(0, len(rows), batch_size), desc="Scoring labels", unit="batch"):
        chunk = [labels[i] for i in rows[start : start + batch_size]]
        batch = {name: tensor.to(selector.model.device) for name, tensor in collate(chunk).items()}
        mask_BNK, _ = valid_candidates(batch["student_logprobs"], batch["position_mask"], min_prob_ratio)
        points = PackedPoints(batch["positions"], batch["candidate_ids"], mask_BNK)
        hidden_BMD, _ = packed_hidden(
            views,
            batch["input_ids"],
            batch["attention_mask"].bool(),
            points,
            config.adapter_scope,
        )
        scores_BNK = points.unpack(selector.read_scores(hidden_BMD))
        divergence_N = torch.tensor(
            [row["divergence"][p - row["prompt_length"]] for row in chunk for p in row["positions"]]
        )
        mask_BNK[..., 0] |= batch["position_mask"]  # a point without a choice still has its first candidate
        names = ("candidate_ids", "student_logprobs", "teacher_logprobs")
        tensors = [scores_BNK, *(batch[name] for name in names), mask_BNK, batch["teacher_top_id"]]
        parts.append((*(tensor[batch["position_mask"]].cpu() for tensor in tensors), divergence_N))
    width = max(part[0].shape[-1] for part in parts)
    fillers = (0.0, 0, -1e4, -1e4, False)
    padded = [
        torch.cat([torch.nn.functional.pad(part[i], (0, width - part[i].shape[-1]), value=filler) for part in parts])
        for i, filler in enumerate(fillers)
    ]
    router_N = None
    if router_values is None and selector.router is not None:
        router_values = read_router(selector, labels, batch_size)
    if router_values is not None:
        at = {i: torch.tensor(labels[i]["positions"]) - labels[i]["prompt_length"] for i in rows}
        router_N = torch.cat([router_values[i][at[i]] for i in rows])
    return ScoredPoints(*padded, *(torch.cat([part[i] for part in parts]) for i in (5, 6)), router_N)


def read_router(
    selector: LocalSelector, labels: Dataset, batch_size: int = 32, unseen: bool = True
) -> list[torch.Tensor]:
    """The logits (S,) of the selector's router at every generated position of each trajectory.

    Args:
        selector: a selector that has a router.
        labels: trajectories.
        batch_size: trajectories per forward.
        unseen: whether the router was trained without these problems. Otherwise five routers are trained like it, each
            without a fifth of the problems, and give the logits of that fifth: the router's own would look too good.
    """
    router, config = selector.router, selector.selector_config
    layer, excluded = router.config.layer, config.reserved_token_ids
    data = collect(
        selector.writer(selector.views()),
        labels,
        [layer],
        num_top=router.config.num_top,
        min_prob_ratio=config.min_prob_ratio,
        warmup_tokens=0,  # every position
        excluded_ids=excluded,
        batch_size=batch_size,
    )
    values_N = predict(router.head.cpu(), data, layer) if unseen else cross_fitted_logits(data, router.config)
    return list(values_N.split([len(row) for row in labels["divergence"]]))


def fit_fusion_to_points(points: ScoredPoints, max_iterations: int = 200) -> FusionWeights:
    """Weights of the fused score that best predict the teacher's choice, see [`fusion.fit_fusion`].

    The router gets a weight where the points have its logits.

    Raises:
        ValueError: for fewer than ten points with a choice.
    """
    return fit_fusion(
        points.scores_NK, points.logprobs_NK, points.mask_NK, points.target_N, points.router_N, max_iterations
    )
