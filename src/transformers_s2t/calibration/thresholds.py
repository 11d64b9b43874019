"""Thresholds for target rates, measured by running a selector as it will be deployed.

Text that a selector corrects is less in doubt than text that the student writes alone, so thresholds taken from the
latter fire too rarely. Knows a selector, prompts and token ids; knows nothing of labels or text.

Legend: P prompts, S new tokens of one of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from transformers_s2t.config import THRESHOLD_TRIGGERS, S2TDecodingConfig, check_choice, check_range
from transformers_s2t.decoding.generation import s2t_generate
from transformers_s2t.decoding.selectors import Selector
from transformers_s2t.decoding.session import S2TTrace
from transformers_s2t.labeling.rollout import rollout
from transformers_s2t.triggers import calibrate_threshold


TOLERANCE = 0.05  # share of the target rate: a run that is this close to it is the last
MAX_RUNS = 4  # per target rate


class TriggerRun(NamedTuple):
    """A trigger's values while a selector decoded some prompts.

    Attributes:
        values: per prompt the trigger's values (S,) at its new tokens, -inf where the warm-up keeps it from firing.
        threshold: the threshold that the texts were written with.
    """

    values: list[torch.Tensor]
    threshold: float

    @property
    def fired_P(self) -> np.ndarray:
        """Tokens of each prompt at which the trigger fired."""
        return np.array([int((values_S >= self.threshold).sum()) for values_S in self.values])

    @property
    def tokens_P(self) -> np.ndarray:
        """New tokens of each prompt."""
        return np.array([len(values_S) for values_S in self.values])

    @property
    def rate(self) -> float:
        """Share of new tokens at which the trigger fired."""
        return float(self.fired_P.sum() / self.tokens_P.sum())

    def interval(self, seed: int = 0, num_resamples: int = 2000) -> tuple[float, float]:
        """95 % percentile interval of the rate, from resampled prompts: tokens of one text are not independent."""
        draws = np.random.default_rng(seed).integers(0, len(self.values), (num_resamples, len(self.values)))
        rates = self.fired_P[draws].sum(1) / self.tokens_P[draws].sum(1)
        low, high = np.percentile(rates, [2.5, 97.5])
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """How a selector decodes prompts: everything that the achieved rate depends on.

    Args:
        model: the small model.
        selector: the selector that was loaded into it, or a [`TeacherSelector`].
        pad_token_id: the tokenizer's id of padding.
        eos_token_ids: ids that end a text.
        max_new_tokens: most new tokens of each text.
        batch_size: prompts per `generate` call.
        warmup_tokens: number of first new tokens that never trigger, but count in the rate.
        teacher_model: the teacher of the "kl" trigger.
        on_texts: called after every batch with the number of its texts.
    """

    model: PreTrainedModel
    selector: Selector
    pad_token_id: int
    eos_token_ids: Sequence[int]
    max_new_tokens: int
    batch_size: int = 32
    warmup_tokens: int = 3
    teacher_model: PreTrainedModel | None = None
    on_texts: Callable[[int], Any] | None = None

    def run(self, prompts: Sequence[Sequence[int]], trigger: str, threshold: float) -> TriggerRun:
        """Decodes the prompts and returns the trigger's values.

        Args:
            prompts: token ids, one prompt each.
            trigger: a trigger that has a threshold.
            threshold: value at or above which it fires; `math.inf` for the student's own text.
        """
        trace = S2TTrace()
        config = S2TDecodingConfig(trigger=trigger, threshold=threshold, warmup_tokens=self.warmup_tokens)
        decode_with: dict[str, Any] = {"custom_generate": s2t_generate, "selector": self.selector, "trace": trace}
        decode_with["decoding_config"] = config
        if self.teacher_model is not None:
            decode_with["teacher_model"] = self.teacher_model
        values: dict[int, torch.Tensor] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: too long fails at once
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            texts = rollout(
                self.model,
                [prompts[i] for i in rows],
                self.max_new_tokens,
                self.pad_token_id,
                self.eos_token_ids,
                decode_with=decode_with,
            )
            values_BS = torch.stack([step["value_B"] for step in trace.steps], dim=1)
            values_BS[:, : self.warmup_tokens] = -math.inf
            for b, i in enumerate(rows):
                values[i] = values_BS[b, : len(texts[b])]
            if self.on_texts is not None:
                self.on_texts(len(rows))
        return TriggerRun([values[i] for i in range(len(prompts))], threshold)


def calibrate_by_decoding(
    deployment: Deployment,
    prompts: Sequence[Sequence[int]],
    trigger: str,
    target_rates: Sequence[float],
    on_run: Callable[[float, TriggerRun], None] | None = None,
) -> dict[float, TriggerRun]:
    """Target rate -> the run whose trigger fired closest to it, which has the threshold.

    A threshold decides which tokens are corrected, and so which values the later tokens have. So thresholds and texts
    are computed in turn: a threshold from the last texts, texts with that threshold, until the rate is within 5 % of
    the target or four runs were made. The first texts are the student's own. The rates are taken from low to high,
    each of them beginning with the last texts of the one before.

    Args:
        deployment: how prompts are decoded.
        prompts: token ids of held-out training problems.
        trigger: a trigger whose threshold is calibrated: "entropy", "margin", "router" or "kl".
        target_rates: shares of new tokens, in (0, 1].
        on_run: called after every run, with the target rate and the run.

    Raises:
        ValueError: for another trigger, a rate out of range, or no prompts.
    """
    check_choice("trigger", trigger, tuple(name for name in THRESHOLD_TRIGGERS if name != "random"))
    for rate in target_rates:
        check_range("target_rates", rate, 0.0, 1.0)
    if not prompts:
        raise ValueError("`prompts` must hold one prompt at least, got none.")
    found = {}
    run = deployment.run(prompts, trigger, math.inf)
    for rate in sorted(target_rates):
        runs: list[TriggerRun] = []
        while len(runs) < MAX_RUNS:
            run = deployment.run(prompts, trigger, calibrate_threshold(torch.cat(run.values), rate))
            runs.append(run)
            if on_run is not None:
                on_run(rate, run)
            allowed = max(TOLERANCE * rate, 1 / int(run.tokens_P.sum()))
            if abs(run.rate - rate) <= allowed:
                break
        found[float(rate)] = run = min(runs, key=lambda run: abs(run.rate - rate))
    return found
