"""Intervals from resampled problems: tokens of one text are not independent. Numbers in, numbers out.

Legend: N tokens, P problems, R resamples.
"""

from __future__ import annotations

import numpy as np
import torch


NUM_RESAMPLES = 2000


def draw_weights(num_problems: int, seed: int = 0) -> np.ndarray:
    """How often each problem is in each resample, (R, P)."""
    shares = np.full(num_problems, 1 / num_problems)
    return np.random.default_rng(seed).multinomial(num_problems, shares, NUM_RESAMPLES).astype(np.float64)


def interval_of(values_R: np.ndarray) -> list[float]:
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return [round(float(low), 5), round(float(high), 5)]


def ratio_interval(numerator_P: np.ndarray, denominator_P: np.ndarray, scale: float = 1.0) -> list[float]:
    """95 % interval of sum / sum over problems."""
    weights_RP = draw_weights(len(numerator_P))
    return interval_of(scale * (weights_RP @ numerator_P) / np.maximum(weights_RP @ denominator_P, 1e-12))


def resampled_auc(values_N: torch.Tensor, positive_N: torch.Tensor, problem_N: torch.Tensor) -> np.ndarray:
    """The AUC in each resample of the problems, (R,): from the pairs won between each two problems."""
    num_problems = int(problem_N.max()) + 1
    values_N, positive_N, problem_N = values_N.double().numpy(), positive_N.numpy().astype(bool), problem_N.numpy()
    positive_values, owners = values_N[positive_N], problem_N[positive_N]
    wins_PP = np.zeros((num_problems, num_problems))
    order = np.argsort(problem_N[~positive_N], kind="stable")
    counts_P = np.bincount(problem_N[~positive_N], minlength=num_problems)
    for problem, values in enumerate(np.split(values_N[~positive_N][order], counts_P.cumsum()[:-1])):
        values = np.sort(values)
        won = np.searchsorted(values, positive_values, "left") + np.searchsorted(values, positive_values, "right")
        wins_PP[:, problem] = np.bincount(owners, weights=won / 2, minlength=num_problems)
    weights_RP = draw_weights(num_problems)
    num_pairs_R = (weights_RP @ np.bincount(owners, minlength=num_problems)) * (weights_RP @ counts_P)
    return ((weights_RP @ wins_PP) * weights_RP).sum(1) / np.where(num_pairs_R > 0, num_pairs_R, np.nan)
