"""Means with intervals, and shares by divergence. Numbers in, numbers out.

Legend: N problems, documents or points, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


NUM_RESAMPLES = 2000
NUM_BUCKETS = 8


def bootstrap_interval(
    values_N: np.ndarray, seed: int = 0, num_resamples: int = NUM_RESAMPLES, weights_N: np.ndarray | None = None
) -> list[float]:
    """95 % percentile interval of the mean over problems, from resampled problems.

    Args:
        values_N: value of each problem.
        seed, num_resamples: seed and number of the resamplings.
        weights_N: weight of each problem in the mean, its number of tokens for example; by default all alike.
    """
    random = np.random.default_rng(seed)
    values_N = np.asarray(values_N, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    sums_N = values_N * weights_N
    means, chunk = [], max(1, 4_000_000 // len(values_N))
    for start in range(0, num_resamples, chunk):
        index = random.integers(0, len(values_N), (min(chunk, num_resamples - start), len(values_N)))
        means.append(sums_N[index].sum(-1) / weights_N[index].sum(-1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return [float(low), float(high)]


def mean_over_points(values_SN: np.ndarray, groups_N: np.ndarray, seed: int = 0) -> dict:
    """The mean over seeds and decision points, with its 95 % interval.

    Points of one problem are not independent, so whole problems with all their points are resampled.

    Args:
        values_SN: value of each seed at each point.
        groups_N: problem that each point belongs to.
        seed: seed of the resampling.

    Returns:
        `value`, `ci` and, for several seeds, `by_seed`.
    """
    values_SN = np.asarray(values_SN, dtype=np.float64)
    _, group_N = np.unique(groups_N, return_inverse=True)
    sizes = np.bincount(group_N)
    means = np.bincount(group_N, weights=values_SN.mean(0)) / sizes
    by_seed = [float(value) for value in values_SN.mean(1)]
    return {
        "value": float(values_SN.mean()),
        "ci": bootstrap_interval(means, seed, weights_N=sizes),
        **({"by_seed": by_seed} if len(by_seed) > 1 else {}),
    }


def divergence_buckets(
    divergence_N: Sequence[float], hits: Mapping[str, Sequence[float]], num_buckets: int = NUM_BUCKETS
) -> dict | None:
    """Shares of hits by divergence, in buckets with about as many points each.

    Args:
        divergence_N: each point's divergence, nats.
        hits: name -> whether it holds at each point (or how often, a mean over seeds).
        num_buckets: how many.

    Returns:
        `edges` (one more than there are buckets), `num_points` of each and `rates`, name -> share in each; `None` for
        fewer than two points a bucket.
    """
    if len(divergence_N) < 2 * num_buckets:
        return None
    order_N = np.argsort(divergence_N, kind="stable")
    cuts = [round(k * len(order_N) / num_buckets) for k in range(1, num_buckets)]
    parts = np.split(order_N, cuts)
    starts = [part[0] for part in parts]
    return {
        "edges": [float(divergence_N[n]) for n in (*starts, order_N[-1])],
        "num_points": [len(part) for part in parts],
        "rates": {
            name: [float(np.asarray(values_N, dtype=np.float64)[part].mean()) for part in parts]
            for name, values_N in hits.items()
        },
    }
