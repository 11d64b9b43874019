"""Settings of a decoding run and of a trained selector: frozen and validated; the only file is `s2t_config.json`.

This file knows nothing of torch or of models; every other file may import it.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers_s2t.files import write_json


S2T_CONFIG_NAME = "s2t_config.json"
ROUTER_WEIGHTS_NAME = "s2t_router.safetensors"
CALIBRATION_NAME = "calibration.json"
SEEN_PROBLEMS_NAME = "seen_problems.json"
#: Triggers, what makes each fire, and whether it needs the teacher at every step.
TRIGGERS = ("always", "never", "entropy", "margin", "router", "kl", "random")
#: Triggers that compare a value with a threshold.
THRESHOLD_TRIGGERS = ("entropy", "margin", "router", "kl", "random")
ADAPTER_SCOPES = ("candidate", "sequence")
PROPOSALS = ("base", "adapted")
SCORE_HEADS = ("bins", "linear")
MAX_CANDIDATES = 64
DEFAULT_NUM_CANDIDATES = 8
DEFAULT_MIN_PROB_RATIO = 0.05
DEFAULT_WARMUP_TOKENS = 3


def check_choice(name: str, value: Any, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, legal))}, got {value!r}.")


def check_range(name: str, value: Any, low: float, high: float, *, integer: bool = False) -> None:
    kind = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not (low <= value <= high):
        what = "an integer in" if integer else "in"
        raise ValueError(f"`{name}` must be {what} [{low}, {high}], got {value!r}.")


@dataclass(frozen=True)
class FusionWeights:
    """Weights of the fused score that decides between candidates.

    `selector * score + logprob * student_log_probability + [not the first candidate] * (switch + router * logit)`

    The default, (1, 0, 0, 0), is the paper's rule: the selector's score alone decides (arXiv 2604.26940, section 3).

    Args:
        selector (`float`): weight of the selector's score (S2T-Local: in [0, 1]; S2T: the teacher's log-probability).
        logprob (`float`): weight of the student's own log-probability of the candidate, in nats.
        switch (`float`): added to every candidate but the student's first. Negative values make the selector abstain
            unless another candidate clearly beats the first one.
        router (`float`): weight of the router's logit, which says how likely the student's first candidate is wrong;
            it is added to every other candidate. 0 needs no router.
    """

    selector: float = 1.0
    logprob: float = 0.0
    switch: float = 0.0
    router: float = 0.0

    def __post_init__(self):
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"`fusion.{name}` must be a finite number, got {value!r}.")

    @classmethod
    def from_any(cls, value: FusionWeights | Mapping[str, float] | tuple | list) -> FusionWeights:
        """Accepts an instance, a mapping of field names, or up to four numbers in the order of the fields."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            unknown = set(value) - {f.name for f in fields(cls)}
            if unknown:
                raise ValueError(
                    f"`fusion` has unknown keys {sorted(unknown)}; legal: selector, logprob, switch, router."
                )
            return cls(**value)
        if isinstance(value, (tuple, list)) and 1 <= len(value) <= 4:
            return cls(*value)
        raise ValueError(
            "`fusion` must be FusionWeights, a mapping or 1 to 4 numbers (selector, logprob, switch, router), got "
            f"{value!r}."
        )


@dataclass(frozen=True)
class S2TDecodingConfig:
    """How one `generate` call selects.

    Args:
        trigger (`str`): which steps ask the selector. "always": every step with two or more candidates above the
            floor (needs no threshold); "entropy": student entropy over its renormalised top `trigger_top_k`, in nats;
            "margin": minus the difference of the two best log-probabilities, in nats; "router": the logit of the
            trained head that lies beside the adapter (`s2t route`); "kl": KL(teacher || student) over
            the shared vocabulary, in nats (the paper's oracle, it runs the teacher at every step); "random": a
            uniform number in [0, 1), the control; "never": plain decoding.
        num_candidates (`int`, *optional*): K, the number of the student's top tokens that are offered. `None` takes
            what is stored with the selector, or 8, where the paper's curves saturate (arXiv 2604.26940, ablation
            over K).
        min_prob_ratio (`float`, *optional*): the candidate floor: candidates with less than this share of the best
            candidate's probability are not offered; 0 offers all K. `None` takes what is stored with the selector,
            or 0.05.
        target_rate (`float`, *optional*): the share of generated tokens that should trigger, in (0, 1]. Looked up in
            the thresholds that `s2t calibrate` stored with the selector.
        threshold (`float`, *optional*): a step triggers where the trigger's value is at or above it. Takes precedence
            over `target_rate`.
        trigger_top_k (`int`): number of top tokens that the entropy is taken over. 64 in the paper.
        warmup_tokens (`int`, *optional*): number of first new tokens that never trigger. `None` takes what the
            thresholds were calibrated with, or 3 as in the paper.
        fusion ([`FusionWeights`], mapping or numbers, *optional*): `None` takes the weights stored with the selector,
            or (1, 0, 0) where there are none.
        seed (`int`): seed of the "random" trigger.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    trigger: str = "always"
    num_candidates: int | None = None
    min_prob_ratio: float | None = None
    target_rate: float | None = None
    threshold: float | None = None
    trigger_top_k: int = 64
    warmup_tokens: int | None = None
    fusion: FusionWeights | None = None
    seed: int = 0

    def __post_init__(self):
        check_choice("trigger", self.trigger, TRIGGERS)
        if self.num_candidates is not None:
            check_range("num_candidates", self.num_candidates, 1, MAX_CANDIDATES, integer=True)
        if self.min_prob_ratio is not None:
            check_range("min_prob_ratio", self.min_prob_ratio, 0.0, 1.0)
        check_range("trigger_top_k", self.trigger_top_k, 2, 1 << 20, integer=True)
        if self.warmup_tokens is not None:
            check_range("warmup_tokens", self.warmup_tokens, 0, 1 << 20, integer=True)
        if self.target_rate is not None:
            check_range("target_rate", self.target_rate, 0.0, 1.0)
            if self.target_rate == 0:
                raise ValueError("`target_rate` must be in (0, 1], got 0; use trigger='never' for plain decoding.")
        if self.threshold is not None:
            if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
                raise ValueError(f"`threshold` must be a number, got {self.threshold!r}.")
            if math.isnan(self.threshold):
                raise ValueError("`threshold` must be a number, got nan.")
        if self.trigger not in THRESHOLD_TRIGGERS and (self.threshold is not None or self.target_rate is not None):
            raise ValueError(
                f"`threshold` and `target_rate` belong to the triggers {', '.join(THRESHOLD_TRIGGERS)}; "
                f"trigger={self.trigger!r} takes neither."
            )
        if self.fusion is not None:
            object.__setattr__(self, "fusion", FusionWeights.from_any(self.fusion))

    @classmethod
    def from_any(cls, value: S2TDecodingConfig | Mapping[str, Any] | str) -> S2TDecodingConfig:
        """Accepts an instance, a mapping of field names, or such a mapping as JSON.

        Raises:
            TypeError: for anything else.
            ValueError: for JSON that is none, or an unknown field, with the nearest known one.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"The decoding config must be JSON of an S2TDecodingConfig: {error}.") from None
        if not isinstance(value, Mapping):
            raise TypeError(f"The decoding config must be an S2TDecodingConfig, a mapping or JSON, got {type(value)}.")
        legal = [f.name for f in fields(cls)]
        for name in value:
            if name not in legal:
                near = difflib.get_close_matches(str(name), legal, n=1)
                hint = f", did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"The decoding config has no field {name!r}{hint} Legal: {', '.join(legal)}.")
        return cls(**value)

    def resolve_threshold(self, thresholds: Mapping[str, Mapping[float, float]] | None) -> float | None:
        """The threshold to use: the one given, else the calibrated one for `target_rate`, else an error.

        Args:
            thresholds: trigger -> {target rate: threshold}, as stored in `s2t_config.json`.

        Returns:
            `float`, or `None` for triggers that have no threshold.

        Raises:
            ValueError: where the trigger was never calibrated (for this rate), naming the command that does it.
        """
        if self.trigger not in THRESHOLD_TRIGGERS:
            return None
        if self.threshold is not None:
            return float(self.threshold)
        if self.trigger == "random" and self.target_rate is not None:
            return 1.0 - self.target_rate  # uniform values need no calibration
        table = (thresholds or {}).get(self.trigger, {})
        how = (
            "Run `s2t calibrate --adapter DIR --labels LABELS` to calibrate it on held-out training "
            "problems, or pass `threshold=` yourself."
        )
        if self.trigger == "entropy" and self.trigger_top_k != 64:
            raise ValueError(
                f"`target_rate` was calibrated for entropies over the top 64 tokens, got trigger_top_k="
                f"{self.trigger_top_k}: pass `threshold`."
            )
        if self.target_rate is None:
            rates = ", ".join(f"{rate:g}" for rate in sorted(table)) or "none"
            raise ValueError(
                f"trigger={self.trigger!r} needs `target_rate` (calibrated here: {rates}) or `threshold`. {how}"
            )
        for rate, threshold in table.items():
            if math.isclose(rate, self.target_rate, rel_tol=1e-6):
                return float(threshold)
        rates = ", ".join(f"{rate:g}" for rate in sorted(table)) or "none"
        raise ValueError(
            f"trigger={self.trigger!r} has no calibrated threshold for target_rate={self.target_rate:g} "
            f"(calibrated: {rates}). {how}"
        )


@dataclass(frozen=True)
class SelectorConfig:
    """Settings that belong to a trained S2T-Local adapter, stored beside it as `s2t_config.json`.

    Args:
        reserved_token_ids (`tuple[int, ...]`): R token ids whose logits carry the score; never generated.
        adapter_scope (`str`): which tokens see the adapter. "candidate": only the appended candidate, on the base
            model's prefix; "sequence": prefix and candidate (the paper).
        proposals (`str`): who writes the text. "base": the model without the adapter; "adapted": with it (the
            paper's S2T-Local; only with adapter_scope="sequence").
        score_head (`str`): "bins": softmax(z[reserved]) . linspace(0, 1, R), in [0, 1] (the paper); "linear": the mean
            of z over the upper half of the reserved tokens minus the mean over the lower half.
        num_candidates (`int`): default K at inference.
        min_prob_ratio (`float`): default candidate floor at inference.
        thresholds: trigger -> {target rate: threshold}, written by `s2t calibrate`.
        warmup_tokens (`int`): number of first new tokens that never triggered during calibration.
        fusion ([`FusionWeights`], *optional*): weights that calibration fitted.
        decoding ([`S2TDecodingConfig`], mapping or JSON, *optional*): how a call selects that says nothing itself,
            written by `s2t calibrate --deploy`; `None` for every step with a choice.
        router (`str`): fingerprint of the router beside the adapter, "" for none.
        base_model (`str`): name or path of the model that the adapter was trained on.
        teacher_model (`str`): name or path of the teacher that scored the labels.
        vocab_hash (`str`): fingerprint of the tokenizer that the labels were made with.
        model_hash (`str`): fingerprint of the base model's weights.
        metrics (`dict`): held-out figures, for the model card.
    """

    reserved_token_ids: tuple[int, ...]
    adapter_scope: str = "candidate"
    proposals: str = "base"
    score_head: str = "bins"
    num_candidates: int = 8
    min_prob_ratio: float = 0.05
    thresholds: dict[str, dict[float, float]] = field(default_factory=dict)
    warmup_tokens: int = DEFAULT_WARMUP_TOKENS
    fusion: FusionWeights | None = None
    decoding: S2TDecodingConfig | None = None
    router: str = ""
    base_model: str = ""
    teacher_model: str = ""
    vocab_hash: str = ""
    model_hash: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        ids = tuple(int(i) for i in self.reserved_token_ids)
        object.__setattr__(self, "reserved_token_ids", ids)
        if len(ids) < 2 or len(set(ids)) != len(ids) or min(ids) < 0:
            raise ValueError(f"`reserved_token_ids` must hold two or more different token ids, got {ids}.")
        check_choice("adapter_scope", self.adapter_scope, ADAPTER_SCOPES)
        check_choice("proposals", self.proposals, PROPOSALS)
        check_choice("score_head", self.score_head, SCORE_HEADS)
        check_range("num_candidates", self.num_candidates, 1, MAX_CANDIDATES, integer=True)
        check_range("min_prob_ratio", self.min_prob_ratio, 0.0, 1.0)
        check_range("warmup_tokens", self.warmup_tokens, 0, 1 << 20, integer=True)
        if self.proposals == "adapted" and self.adapter_scope != "sequence":
            raise ValueError("`proposals='adapted'` needs `adapter_scope='sequence'`, got adapter_scope='candidate'.")
        if self.fusion is not None:
            object.__setattr__(self, "fusion", FusionWeights.from_any(self.fusion))
        if self.decoding is not None:
            object.__setattr__(self, "decoding", S2TDecodingConfig.from_any(self.decoding))
        table = {
            trigger: {float(rate): float(value) for rate, value in by_rate.items()}
            for trigger, by_rate in self.thresholds.items()
        }
        object.__setattr__(self, "thresholds", table)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes `s2t_config.json` into `folder` (atomically) and returns its path."""
        data = asdict(self)
        data["reserved_token_ids"] = list(self.reserved_token_ids)
        data["thresholds"] = {
            trigger: {repr(rate): value for rate, value in sorted(by_rate.items())}
            for trigger, by_rate in self.thresholds.items()
        }
        return write_json(Path(folder) / S2T_CONFIG_NAME, data)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **hub_kwargs) -> SelectorConfig:
        """Reads `s2t_config.json` from a local folder or a Hub repository.

        Raises:
            FileNotFoundError: where the folder or repository has none.
            ValueError: where it holds unknown or illegal fields.
        """
        folder = Path(path) / hub_kwargs.get("subfolder", "")
        file = folder / S2T_CONFIG_NAME
        if folder.is_dir() and not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {S2T_CONFIG_NAME}: it is not an S2T-Local adapter (s2t train makes one)."
            )
        if not folder.is_dir():
            from transformers.utils import cached_file

            try:
                file = Path(cached_file(str(path), S2T_CONFIG_NAME, **hub_kwargs))
            except OSError as error:
                raise FileNotFoundError(
                    f"{str(path)!r} is neither a local folder nor a Hub repository with a {S2T_CONFIG_NAME}: {error}"
                ) from error
        data = json.loads(file.read_text(encoding="utf-8"))
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{file} has unknown fields {sorted(unknown)}; it was written by a newer version.")
        if "reserved_token_ids" not in data:
            raise ValueError(f"{file} lacks `reserved_token_ids`: it was not written by S2TTrainer.")
        return cls(**data)
