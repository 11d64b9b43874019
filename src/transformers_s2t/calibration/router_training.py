"""How a router learns: from stored labels and one reading of their trajectories by the small model.

Knows labels, a model and the router's head; the teacher is not needed, for the labels hold what it said. Nothing here
runs at decoding time.

Legend: N positions (generated tokens under decision), S those of one trajectory, D hidden size, F proposal features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from transformers_s2t.config import DEFAULT_WARMUP_TOKENS
from transformers_s2t.losses import best_candidate
from transformers_s2t.models.forwards import logits_from
from transformers_s2t.models.views import make_view
from transformers_s2t.proposals import exclude, floor_mask
from transformers_s2t.router import (
    LastHidden,
    Router,
    RouterConfig,
    RouterHead,
    num_layers,
    proposal_features,
    read_module,
)


_LEAST_KL = 1e-2  # nats; below that, differences of KL are rounding
_MAX_LOGITS = 1 << 27  # most logits in memory at one time


class RouterData(NamedTuple):
    """Positions of labelled trajectories: what a router reads there, and what the teacher said.

    Attributes:
        hidden: layer -> (N, D), float32, on the CPU.
        features_NF: see [`proposal_features`].
        gain_N: the teacher's log-probability of its best candidate above the floor minus that of the first one, nats;
            0 where the first is the best or the floor leaves no other; nan where the labels do not say.
        divergence_N: KL(teacher || student), nats.
        has_choice_N: two or more candidates above the floor.
        problem_N: index of the problem, in the order of first sight.
    """

    hidden: dict[int, torch.Tensor]
    features_NF: torch.Tensor
    gain_N: torch.Tensor
    divergence_N: torch.Tensor
    has_choice_N: torch.Tensor
    problem_N: torch.Tensor

    def where(self, keep_N: torch.Tensor) -> RouterData:
        """The positions for which `keep_N` is True, or that it lists."""
        hidden = {layer: states_ND[keep_N] for layer, states_ND in self.hidden.items()}
        return RouterData(hidden, *(tensor[keep_N] for tensor in self[1:]))

    def target(self, config: RouterConfig) -> torch.Tensor:
        """What a router with this config is to predict, (N,): 0 or 1, or the logarithm of the KL; nan = unknown."""
        if config.target == "kl":
            return (self.divergence_N + _LEAST_KL).log()
        least = config.min_gain if config.target == "gain" else 0.0
        return (self.gain_N > least).float().masked_fill(self.gain_N.isnan(), float("nan"))


def default_layers(model: PreTrainedModel, most: int = 5) -> list[int]:
    """The layers on which a router is tried: at most `most`, evenly spaced, the last one included."""
    depth = num_layers(model)
    return sorted({max(1, round(depth * (i + 1) / most)) for i in range(most)})


def gains(row: Mapping[str, Any], min_prob_ratio: float) -> torch.Tensor:
    """`RouterData.gain_N` of the generated positions (S,) of one labelled trajectory."""
    margin_S = torch.tensor(row["margin"])
    gain_S = torch.zeros_like(margin_S)
    # two or more candidates are above the floor, but nobody asked the teacher (points="kl", `max_points`): unknown
    unknown_S = margin_S >= (math.log(min_prob_ratio) if min_prob_ratio else -math.inf)
    gain_S[unknown_S] = float("nan")
    if row["positions"]:
        teacher_NK, mask_NK = torch.tensor(row["teacher_logprobs"]), torch.tensor(row["student_logprobs"])
        mask_NK = floor_mask(mask_NK, min_prob_ratio)
        best_N1 = best_candidate(teacher_NK, mask_NK)[:, None]
        at_N = torch.tensor(row["positions"]) - row["prompt_length"]
        gain_S[at_N] = (teacher_NK.gather(-1, best_N1) - teacher_NK[:, :1])[:, 0]
    return gain_S


@torch.no_grad()
def read_trajectories(
    model: PreTrainedModel,
    labels: Dataset,
    layers: Sequence[int],
    num_top: int,
    excluded_ids: Sequence[int] = (),
    batch_size: int = 32,
) -> Iterator[tuple[int, dict[int, torch.Tensor], torch.Tensor]]:
    """What a router would read at every generated position, by one forward per batch of trajectories.

    Args:
        model: the small model, or the view of it that writes the text.
        labels: trajectories.
        layers: the layers whose outputs are read.
        num_top: number of log-probabilities among the features.
        excluded_ids: reserved tokens.
        batch_size: trajectories per forward; fewer where their logits would not fit.

    Yields:
        Row of the labels, {layer: hidden states (S, D)}, features (S, F); on the CPU, float32, shortest rows first.
    """
    lengths = list(zip(map(len, labels["input_ids"]), labels["prompt_length"]))
    order = sorted(range(len(labels)), key=lambda i: lengths[i])
    num_rows = model.get_output_embeddings().weight.shape[0]
    excluded = torch.tensor(list(excluded_ids), dtype=torch.long)
    hidden = {layer: LastHidden() for layer in layers}
    view = make_view(model, {}, watches={id(read_module(model, layer)): hidden[layer].see for layer in layers})
    with tqdm(total=len(order), desc="Reading labels", unit="row") as bar:
        while order:
            # the longest of the first `batch_size` rows says how many fit
            longest = lengths[order[min(batch_size, len(order)) - 1]][0]
            size = max(1, min(batch_size, _MAX_LOGITS // (longest * num_rows)))
            chunk, order = order[:size], order[size:]
            first = min(lengths[i][1] for i in chunk) - 1  # logits at index p - 1 decide the token at index p
            logits_BTV = logits_from(view, [labels[i]["input_ids"] for i in chunk], first)
            hidden_BTD = {layer: last.take() for layer, last in hidden.items()}
            shared = max(lengths[i][0] for i in chunk) - next(iter(hidden_BTD.values())).shape[1]  # read before
            for b, i in enumerate(chunk):
                length, prompt_length = lengths[i]
                logits_SV = exclude(logits_BTV[b, prompt_length - 1 - first : length - 1 - first].float(), excluded)
                states = {
                    layer: states_BTD[b, prompt_length - 1 - shared : length - 1 - shared].float().cpu()
                    for layer, states_BTD in hidden_BTD.items()
                }
                yield i, states, proposal_features(logits_SV, num_top).cpu()
            bar.update(len(chunk))


def collect(
    model: PreTrainedModel,
    labels: Dataset,
    layers: Sequence[int],
    num_top: int = 8,
    min_prob_ratio: float = 0.05,
    warmup_tokens: int = DEFAULT_WARMUP_TOKENS,
    excluded_ids: Sequence[int] = (),
    batch_size: int = 32,
    max_positions: int | None = None,
    seed: int = 0,
) -> RouterData:
    """Reads labelled trajectories for a router.

    Args:
        min_prob_ratio: the candidate floor of the deployed selector.
        warmup_tokens: number of first new tokens, which never trigger and are left out.
        max_positions: about this many positions are kept in all, a random share of each trajectory's (the hidden
            states of one take `4 * D * len(layers)` bytes).
        seed: seed of that choice.
        model, labels, layers, num_top, excluded_ids, batch_size: see [`read_trajectories`].

    Raises:
        ValueError: where no position is left.
    """
    total = sum(max(0, len(values) - warmup_tokens) for values in labels["divergence"])
    share = 1.0 if max_positions is None or total == 0 else min(1.0, max_positions / total)
    generator = torch.Generator().manual_seed(seed)
    problems: dict[str, int] = {}
    for id in labels["problem_id"]:
        problems.setdefault(id, len(problems))
    parts: dict[int, tuple] = {}
    for i, states, features_SF in read_trajectories(model, labels, layers, num_top, excluded_ids, batch_size):
        row = labels[i]
        keep_S = torch.arange(len(features_SF)) >= warmup_tokens
        if share < 1:
            keep_S &= torch.rand(len(keep_S), generator=generator) < share
        divergence_S, margin_S = torch.tensor(row["divergence"]), torch.tensor(row["margin"])
        has_choice_S = margin_S >= (math.log(min_prob_ratio) if min_prob_ratio else -math.inf)
        problem_S = torch.full((len(keep_S),), problems[row["problem_id"]])
        columns = (features_SF, gains(row, min_prob_ratio), divergence_S, has_choice_S, problem_S)
        states = {layer: states_SD[keep_S] for layer, states_SD in states.items()}
        parts[i] = (states, *(column[keep_S] for column in columns))
    if not any(len(part[1]) for part in parts.values()):
        raise ValueError(
            f"`labels` hold no generated position behind the first {warmup_tokens}: nothing to learn from."
        )
    ordered = [parts[i] for i in sorted(parts)]
    hidden = {layer: torch.cat([part[0][layer] for part in ordered]) for layer in layers}
    return RouterData(hidden, *(torch.cat([part[column] for part in ordered]) for column in range(1, 6)))


def fit_head(
    data: RouterData,
    held_out: RouterData,
    config: RouterConfig,
    seed: int = 0,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
    num_epochs: int = 30,
    max_steps: int | None = None,
    batch_size: int = 512,
) -> tuple[RouterHead, float]:
    """Trains a head and keeps its best epoch on held-out problems.

    Cross-entropy for the targets "gain" and "differs", so that the logit is one of a probability; squared error for
    "kl". AdamW, linear decay.

    Args:
        data: positions to learn from, with hidden states of `config.layer`.
        held_out: positions of other problems.
        config: what the head reads and predicts.
        seed: seed of the initial weights and of the order.
        num_epochs: most epochs.
        max_steps: most steps: fewer epochs are run if they would take more, but one at least.

    Returns:
        The head, and its loss on `held_out`.

    Raises:
        ValueError: where the positions hold one class only, or are fewer than two.
    """

    def tensors(part: RouterData) -> tuple[torch.Tensor, torch.Tensor]:
        inputs_NX = torch.cat([part.hidden[config.layer].float(), part.features_NF], dim=-1)
        target_N = part.target(config)
        return inputs_NX[~target_N.isnan()], target_N[~target_N.isnan()]

    (inputs_NX, target_N), (held_NX, held_N) = tensors(data), tensors(held_out)
    for name, values_N in (("labels", target_N), ("eval_labels", held_N)):
        if len(values_N) < 2 or (config.target != "kl" and len(values_N.unique()) < 2):
            raise ValueError(
                f"`{name}` hold {len(values_N)} positions for target={config.target!r}, "
                f"{int(values_N.sum()) if config.target != 'kl' else 0} of them positive: a router needs both kinds."
            )
    loss_of = nn.functional.mse_loss if config.target == "kl" else nn.functional.binary_cross_entropy_with_logits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = RouterHead(config)
    head.mean.copy_(inputs_NX.mean(0))
    scale_X = inputs_NX.std(0)
    head.scale.copy_(scale_X.clamp_min(1e-2 * float(scale_X.median())).clamp_min(1e-6))
    size = config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps_per_epoch = math.ceil(len(target_N) / batch_size)
    if max_steps is not None:
        num_epochs = max(1, min(num_epochs, max_steps // steps_per_epoch))
    steps = num_epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps))
    best, best_loss = {name: tensor.clone() for name, tensor in head.state_dict().items()}, math.inf
    for _ in range(num_epochs):
        for index in torch.randperm(len(target_N), generator=generator).split(batch_size):
            loss = loss_of(head(inputs_NX[index, :size], inputs_NX[index, size:]), target_N[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            held_loss = float(loss_of(head(held_NX[:, :size], held_NX[:, size:]), held_N))
        if held_loss < best_loss:
            best_loss = held_loss
            best = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(best)
    return head.eval().requires_grad_(False), best_loss


def fit_router(
    model: PreTrainedModel, data: RouterData, held_out: RouterData, config: RouterConfig, **training: Any
) -> tuple[Router, dict[int, float]]:
    """Trains a head on every layer that was read and keeps the one with the least held-out loss.

    Args:
        model: the small model.
        data, held_out: see [`fit_head`].
        config: its `layer` is replaced.
        training: for [`fit_head`].

    Returns:
        The router, with held-out figures in its config, and the held-out loss of every layer.
    """
    heads, losses = {}, {}
    for layer in tqdm(sorted(data.hidden), desc="Training routers", unit="layer"):
        heads[layer], losses[layer] = fit_head(data, held_out, replace(config, layer=layer), **training)
    layer = min(losses, key=lambda layer: (losses[layer], -layer))
    values_N = predict(heads[layer], held_out, layer)
    return Router(
        model, heads[layer], replace(config, layer=layer, metrics=trigger_metrics(values_N, held_out, config))
    ), losses


@torch.no_grad()
def predict(head: RouterHead, data: RouterData, layer: int) -> torch.Tensor:
    """The head's logits (N,)."""
    return head(data.hidden[layer], data.features_NF)


def cross_fitted_logits(data: RouterData, config: RouterConfig, num_folds: int = 5, **training: Any) -> torch.Tensor:
    """Logits (N,) by heads that have not seen the problem: for each fold, one trained on the others.

    For fitting fusion weights on the router's own problems, where labels are too few to be divided.

    Raises:
        ValueError: for fewer problems than folds.
    """
    problems, problem_N = data.problem_N.unique(return_inverse=True)  # numbers have holes where no position was kept
    num_problems = len(problems)
    if num_problems < num_folds or num_folds < 3:
        raise ValueError(f"`num_folds` must be in [3, {num_problems}], the number of problems, got {num_folds}.")
    fold_N = problem_N % num_folds
    values_N = torch.empty(len(fold_N))
    for fold in range(num_folds):
        stop_N, out_N = fold_N == (fold + 1) % num_folds, fold_N == fold
        head, _ = fit_head(data.where(~(stop_N | out_N)), data.where(stop_N), config, **training)
        values_N[out_N] = predict(head, data.where(out_N), config.layer)
    return values_N


# ---------------------------------------------------------------------------------------------------------------------
# How good a trigger is, whatever the selector


def auc(values_N: torch.Tensor, positive_N: torch.Tensor) -> float:
    """Area under the ROC curve: the chance that a positive has the bigger value, ties counting half; nan where one
    class is missing. (Mann-Whitney's U over the number of pairs.)"""
    positive_N = positive_N.bool()
    num_positive, num_negative = int(positive_N.sum()), int((~positive_N).sum())
    if num_positive == 0 or num_negative == 0:
        return math.nan
    _, level_N, count_L = torch.unique(values_N.double(), return_inverse=True, return_counts=True)
    end_L = count_L.cumsum(0).double()
    rank_N = (end_L - (count_L - 1) / 2)[level_N]  # the mean rank of equal values, from 1
    return float((rank_N[positive_N].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def precision_recall(values_N: torch.Tensor, positive_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Precision and recall (L,) at every threshold that tells values apart, the highest first."""
    order_N = values_N.argsort(descending=True)
    values_N, positive_N = values_N[order_N], positive_N[order_N].double()
    last_of_level_N = torch.cat([values_N[1:] != values_N[:-1], values_N.new_ones(1, dtype=torch.bool)])
    found_N, fired_N = positive_N.cumsum(0), torch.arange(1, len(values_N) + 1)
    return (found_N / fired_N)[last_of_level_N], (found_N / positive_N.sum())[last_of_level_N]


def average_precision(values_N: torch.Tensor, positive_N: torch.Tensor) -> float:
    """Area under the precision-recall curve by steps: the sum of precision x gain in recall."""
    if not bool(positive_N.any()):
        return math.nan
    precision_L, recall_L = precision_recall(values_N, positive_N)
    return float((precision_L * torch.diff(recall_L, prepend=recall_L.new_zeros(1))).sum())


def trigger_metrics(values_N: torch.Tensor, data: RouterData, config: RouterConfig) -> dict[str, float]:
    """AUC of a trigger's values, over all positions whose answer is known, and over those with a choice.

    `auc_differs`: against "the teacher's best candidate above the floor is not the first"; `auc_gain`: "and gains more
    than `min_gain`". The suffix `_choice` means positions with two or more candidates above the floor only.
    """
    metrics = {}
    for name, least in (("differs", 0.0), ("gain", config.min_gain)):
        for suffix, keep_N in (("", ~data.gain_N.isnan()), ("_choice", data.has_choice_N & ~data.gain_N.isnan())):
            value = auc(values_N[keep_N], data.gain_N[keep_N] > least)
            if not math.isnan(value):
                metrics[f"auc_{name}{suffix}"] = round(value, 5)
    return metrics
