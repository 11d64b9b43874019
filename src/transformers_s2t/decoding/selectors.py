"""Selectors choose between the candidates: their base class, and the teacher as a selector (S2T).

Legend: B rows, A asked rows, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_s2t.config import (
    DEFAULT_MIN_PROB_RATIO,
    DEFAULT_NUM_CANDIDATES,
    DEFAULT_WARMUP_TOKENS,
    FusionWeights,
    S2TDecodingConfig,
)
from transformers_s2t.model_checks import (
    check_causal_lm,
    check_without_virtual_tokens,
)
from transformers_s2t.models.views import (
    ModelViews,
)
from transformers_s2t.proposals import Proposals
from transformers_s2t.reserved_tokens import check_same_ids
from transformers_s2t.router import Router


if TYPE_CHECKING:
    from transformers_s2t.decoding.session import S2TSession

_IMPOSSIBLE = -1e4  # a score for candidates that a teacher with a smaller head cannot emit


class NextStep(NamedTuple):
    """What the next step needs of the last forward.

    Attributes:
        logits_BV: the student's next-token logits, float32.
        hidden_BD: the last token's hidden states at the router's layer, `None` where no router is read.
    """

    logits_BV: torch.Tensor
    hidden_BD: torch.Tensor | None = None


class Scores(NamedTuple):
    """A selector's scores of the candidates of one step.

    Attributes:
        scores_AK: bigger = better.
        advance: where scoring has already run the next forward of the whole batch: a function from the chosen
            candidates (A,) to the [`NextStep`] after them, which also moves the driving call's cache there. To be
            called at most once. `None` where the next forward is still to run.
    """

    scores_AK: torch.Tensor
    advance: Callable[[torch.Tensor], NextStep] | None = None


class Selector:
    """Base class of what scores candidates. Subclasses implement [`score`]; the state of a call is in its session.

    Attributes:
        excluded_ids: token ids that are never generated, `None` for none.
        takeover: whether the teacher's own token replaces the student's, whatever the candidates are (the Takeover
            baseline).
        appends_candidates: whether the small model reads each candidate after the text, which takes one more position.
        thresholds: trigger -> {target rate: threshold}.
        fusion: weights of the fused score, `None` for the selector's score alone.
        router: the router that the trigger "router" and the fused score read, `None` for none.
        config: defaults of a decoding run with this selector.
    """

    excluded_ids: torch.Tensor | None = None
    takeover: bool = False
    appends_candidates: bool = False
    thresholds: Mapping[str, Mapping[float, float]] = {}
    fusion: FusionWeights | None = None
    router: Router | None = None

    @property
    def config(self) -> S2TDecodingConfig:
        return S2TDecodingConfig(
            num_candidates=DEFAULT_NUM_CANDIDATES,
            min_prob_ratio=DEFAULT_MIN_PROB_RATIO,
            warmup_tokens=DEFAULT_WARMUP_TOKENS,
        )

    def resolve_config(self, config: S2TDecodingConfig | Mapping[str, Any] | str | None) -> S2TDecodingConfig:
        """The config given, with what it leaves open filled in from this selector's defaults.

        Raises:
            TypeError, ValueError: see [`S2TDecodingConfig.from_any`].
        """
        own = self.config
        if config is None:
            return own
        config = S2TDecodingConfig.from_any(config)
        names = ("num_candidates", "min_prob_ratio", "warmup_tokens")
        return replace(config, **{name: getattr(own, name) for name in names if getattr(config, name) is None})

    def needed_router(self, config: S2TDecodingConfig) -> Router | None:
        """The router that a run with this (resolved) config reads, `None` for none.

        Raises:
            ValueError: where it needs one and there is none.
        """
        fusion = config.fusion or self.fusion
        if config.trigger != "router" and not (fusion is not None and fusion.router):
            return None
        if self.router is None:
            what = "trigger='router'" if config.trigger == "router" else f"`fusion.router`={fusion.router:g}"
            raise ValueError(
                f"{what} needs a router, and this selector has none. Train one with `s2t route "
                "--adapter DIR --labels LABELS`, which puts it beside the adapter; a TeacherSelector takes `router=`."
            )
        return self.router

    def check_tokenizer(self, processing_class: PreTrainedTokenizerBase) -> None:
        """Raises a ValueError where the small model's tokenizer is not the one that this selector was made for."""

    def check_model(self, model: PreTrainedModel | None) -> None:
        """For the processor path, where the model itself writes the text, with the adapters that are active in it.

        Args:
            model: the model that generates, `None` where it is not known.

        Raises:
            ValueError: where the S2T adapter is on although the base model is to write the text, or off although the
                adapted model is.
        """

    def views(
        self, model: PreTrainedModel | None, watches: Mapping[int, Callable[[torch.Tensor], None]]
    ) -> ModelViews | None:
        """Views through which one call runs the small model; `None` where that is neither known nor needed.

        Args:
            model: the model that generates, `None` where it is not known.
            watches: see [`ModelViews`].
        """
        model = getattr(self, "model", model)
        return None if model is None else ModelViews(model, watches=watches)

    def writer(self, views: ModelViews) -> PreTrainedModel:
        """The view that writes the text."""
        return views.base

    def reader(self, views: ModelViews) -> PreTrainedModel:
        """The view that reads the prefix of candidates."""
        return views.base

    def score(self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals) -> torch.Tensor | Scores:
        """Scores (A, K) of the proposals of the rows `rows_A`, bigger = better."""
        raise NotImplementedError


class TeacherSelector(Selector):
    """S2T: the larger model selects among the small model's proposals (arXiv 2604.26940, section 3).

    Args:
        teacher_model: causal language model with the same tokenizer (its head may be padded to another size).
        thresholds: calibrated thresholds, trigger -> {target rate: threshold}; without them `threshold=` of
            [`S2TDecodingConfig`] must be given for triggers that need one.
        takeover: emit the teacher's argmax over the whole vocabulary in place of selecting. The paper's baseline.
        processing_class: the small model's tokenizer. It is compared with the teacher's own, which is looked up in the
            teacher's local folder or the Hub's cache.
        router: the small model's router, for trigger="router": `Router.from_pretrained(adapter, model)`.

    Raises:
        TypeError: for a teacher that is not a loaded model.
        ValueError: where the two tokenizers give different meanings to one id.

    The score of a candidate is the teacher's log-probability of it given the same prefix, in nats.
    """

    def __init__(
        self,
        teacher_model: PreTrainedModel,
        thresholds: Mapping[str, Mapping[float, float]] | None = None,
        takeover: bool = False,
        processing_class: PreTrainedTokenizerBase | None = None,
        router: Router | None = None,
    ):
        if not isinstance(teacher_model, (PreTrainedModel, PeftModel)):
            raise TypeError(f"`teacher_model` must be a loaded causal language model, got {type(teacher_model)}.")
        check_causal_lm("teacher_model", teacher_model)
        check_without_virtual_tokens("teacher_model", teacher_model)
        self.teacher_model = teacher_model
        self.thresholds = dict(thresholds or {})
        self.takeover = takeover
        self.router = router
        if processing_class is not None:
            self.check_tokenizer(processing_class)

    def check_tokenizer(self, processing_class: PreTrainedTokenizerBase) -> None:
        check_teacher_tokenizer(processing_class, self.teacher_model)

    def score(self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals) -> torch.Tensor:
        logits_AV = session.teacher_logits()[rows_A]
        known_AK = proposals.ids_BK < logits_AV.shape[-1]
        logprobs_AV = torch.log_softmax(logits_AV, dim=-1)
        scores_AK = logprobs_AV.gather(-1, proposals.ids_BK.clamp_max(logits_AV.shape[-1] - 1))
        return scores_AK.clamp_min(_IMPOSSIBLE).masked_fill(~known_AK, _IMPOSSIBLE)


def name_of(model: PreTrainedModel | PeftModel) -> str:
    """The name or path that a model was loaded from, "" where it does not know."""
    return model.config._name_or_path or ""


def check_teacher_tokenizer(processing_class: PreTrainedTokenizerBase, teacher_model: PreTrainedModel) -> None:
    """Raises a ValueError where ids mean other tokens to the teacher, whose tokenizer is looked up on this machine."""
    check_same_ids(processing_class, name_of(teacher_model))


def check_teacher(
    config: S2TDecodingConfig, selector: Selector, teacher_model: PreTrainedModel | None
) -> PreTrainedModel | None:
    """The teacher that a call runs, `None` for none.

    Raises:
        ValueError: where the "kl" trigger has no teacher.
    """
    teacher_model = getattr(selector, "teacher_model", None) if teacher_model is None else teacher_model
    if config.trigger == "kl" and teacher_model is None:
        raise ValueError(
            "trigger='kl' is the oracle: it needs the teacher at every step. Pass `teacher_model=`, or choose a "
            "trigger that needs none: 'always', 'entropy', 'margin', 'router'."
        )
    return teacher_model
