"""Who chooses between the candidates, and one decoding step on one screen ([`S2TSession.step`]).

Knows prefixes and caches; does not know whether a logits processor or `s2t_generate` drives it.

Legend: B rows, A asked rows, K candidates, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from . import triggers
from .config import (
    DEFAULT_MIN_PROB_RATIO,
    DEFAULT_NUM_CANDIDATES,
    DEFAULT_WARMUP_TOKENS,
    FusionWeights,
    S2TDecodingConfig,
    SelectorConfig,
)
from .fingerprints import model_hash, same_weights, weights_name
from .fusion import fused_scores
from .model_checks import (
    Reader,
    check_causal_lm,
    check_context,
    check_models,
    check_reads_in_parts,
    check_room,
    check_without_virtual_tokens,
)
from .proposals import Proposals, propose
from .reserved_tokens import check_same_ids, resize_for_reserved_tokens, vocab_hash
from .router import LastHidden, Router
from .scoring import (
    PrefixCache,
    ReservedRows,
    append_candidates,
    bin_logits,
    candidate_scores,
    head_is_plain,
    keep_candidate,
    pays_to_merge,
    supports_tree,
)
from .views import (
    ModelViews,
    TokensNotInRows,
    adapted_layers,
    adapter_is_on,
    adapter_state,
    merge_adapter,
    switch_adapter,
)


ADAPTER_NAME = "s2t"
_TRAINED_ROWS = "trainable_tokens_delta"  # PEFT's name for them, in files as in modules
MAX_CATCH_UP = 512  # tokens that ride along with candidates under one tree mask; longer texts are fed first
_IMPOSSIBLE = -1e4  # a score for candidates that a teacher with a smaller head cannot emit


class NextStep(NamedTuple):
    """What a forward leaves for the step after it.

    Attributes:
        logits_BV: the student's next-token logits, float32.
        hidden_BD: the last token's hidden states at the router's layer, `None` where no router is read.
    """

    logits_BV: torch.Tensor
    hidden_BD: torch.Tensor | None = None


class Scores(NamedTuple):
    """What a selector says of the candidates of one step.

    Attributes:
        scores_AK: bigger = better.
        advance: where scoring already was the next decoding step of the whole batch: from the chosen candidates (A,)
            to what the step's tokens lead to, which also leaves the driving call's cache there. To be called at most
            once; `None` where the next step is still to run.
    """

    scores_AK: torch.Tensor
    advance: Callable[[torch.Tensor], NextStep] | None = None


class Selector:
    """What scores candidates. Subclasses implement [`score`]; everything per-call lives in the session.

    Attributes:
        excluded_ids: token ids that are never generated, `None` for none.
        takeover: the teacher's own token replaces the student's, candidates or not (the Takeover baseline).
        thresholds: trigger -> {target rate: threshold}.
        fusion: weights of the fused score, `None` for the selector's score alone.
        router: what the trigger "router" and the fused score read, `None` for none.
        config: defaults of a decoding run with this selector.
    """

    excluded_ids: torch.Tensor | None = None
    takeover: bool = False
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

    def resolve_config(self, config: S2TDecodingConfig | None) -> S2TDecodingConfig:
        """The config given, with what it leaves open filled in from this selector's defaults.

        Raises:
            TypeError: where it is no [`S2TDecodingConfig`].
        """
        own = self.config
        if config is None:
            return own
        if not isinstance(config, S2TDecodingConfig):
            raise TypeError(f"The decoding config must be an S2TDecodingConfig, got {type(config)}.")
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
                f"{what} needs a router, and this selector has none. Train one with `python recipes/train_router.py "
                "--adapter DIR --labels LABELS`, which puts it beside the adapter; a TeacherSelector takes `router=`."
            )
        return self.router

    def check_tokenizer(self, processing_class: PreTrainedTokenizerBase) -> None:
        """Raises a ValueError where the small model's tokenizer is not the one that this selector was made for."""

    def check_model(self, model: PreTrainedModel | None) -> None:
        """For a logits processor, whose text the model itself writes, whatever adapters it has on by now.

        Args:
            model: the one that generates, `None` where it is not at hand.

        Raises:
            ValueError: where the S2T adapter itself is on or off against what the selector says of its proposals.
        """

    def views(
        self, model: PreTrainedModel | None, watches: Mapping[int, Callable[[torch.Tensor], None]]
    ) -> ModelViews | None:
        """How one call runs the small model; `None` where that is not at hand and need not be.

        Args:
            model: the one that generates, `None` where it is not at hand.
            watches: see [`ModelViews`].
        """
        model = getattr(self, "model", model)
        return None if model is None else ModelViews(model, watches=watches)

    def writer(self, views: ModelViews) -> PreTrainedModel:
        """What writes the text."""
        return views.base

    def reader(self, views: ModelViews) -> PreTrainedModel:
        """What reads the prefix of candidates."""
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
        processing_class: the small model's tokenizer, to be compared with the teacher's own (which is looked up in the
            teacher's local folder or the Hub's cache).
        router: of the small model, for trigger="router": `Router.from_pretrained(adapter, model)`.

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


class LocalSelector(Selector):
    """S2T-Local: the small model selects by itself, with a LoRA adapter and the logits of reserved tokens.

    Args:
        model: the small model with the adapter in it (a [`PeftModel`], or its base model after PEFT injected it).
        selector_config: [`SelectorConfig`], stored beside the adapter.
        adapter_name: of the S2T adapter inside the model.
        router: trained beside the adapter, where there is one.

    Raises:
        ValueError: where the model holds no trained rows for the reserved tokens, or cannot be scored on a cache
            ([`check_reads_in_parts`]).

    The adapter is left off: `model.generate` without S2T is the base model, token for token. (With
    `proposals="adapted"`, the paper's form, it is left on, because the adapted model writes the text.) Calls with S2T
    run views of the model that share its weights, and change nothing on the model itself: threads may decode with it
    side by side, with and without S2T. Adapters of the user's own write and score as they are active when a call
    begins.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        selector_config: SelectorConfig,
        adapter_name: str,
        router: Router | None = None,
    ):
        check_causal_lm("model", model)
        check_without_virtual_tokens("model", model)
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        num_rows = self.model.get_output_embeddings().weight.shape[0]
        if max(selector_config.reserved_token_ids) >= num_rows:
            raise ValueError(
                f"`reserved_token_ids` must be below {num_rows}, the rows of the model's head, got "
                f"{max(selector_config.reserved_token_ids)}."
            )
        self.selector_config = selector_config
        self.adapter_name = adapter_name
        self.thresholds = selector_config.thresholds
        self.fusion = selector_config.fusion
        self.router = router
        self.rows = ReservedRows(self.model, selector_config.reserved_token_ids, adapter_name)
        self.excluded_ids = torch.tensor(selector_config.reserved_token_ids)
        switch_adapter(self.model, adapter_name, self.writes_adapted)
        self.can_split = ModelViews(self.model, adapter_name).can_split
        check_reads_in_parts("model", self.model)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | PeftModel,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        adapter_name: str = ADAPTER_NAME,
        allow_other_model: bool = False,
        **hub_kwargs,
    ) -> LocalSelector:
        """Loads an adapter and its `s2t_config.json` into `model`, and the router beside it where there is one.

        Args:
            path: local folder or Hub repository.
            model: the base model that the adapter was trained on; PEFT injects the adapter in place. A model that
                holds this very adapter already, as `AutoModelForCausalLM.from_pretrained(path)` returns it, is taken
                as it is, and the adapter is switched off for its own text.
            processing_class: the model's tokenizer, to be compared with the one that the labels were made with.
            adapter_name: name inside the model. Loading another adapter under the same name is an error.
            allow_other_model: skip the comparison of the model's weights with those that the adapter was trained on.
            hub_kwargs: `revision`, `token`, `cache_dir` ... as in `from_pretrained` of transformers.

        Raises:
            FileNotFoundError: where the folder or repository holds no `s2t_config.json`.
            ValueError: where the name is taken, or the adapter was trained for another model or tokenizer.
        """
        config = SelectorConfig.from_pretrained(path, **hub_kwargs)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"`model` must be a loaded causal language model, got {type(model)}.")
        check_causal_lm("model", model)
        check_without_virtual_tokens("model", model)
        weights = _find_weights(path, hub_kwargs)
        _check_fits(base, path, weights, config)
        _check_trained_on(base, path, config, allow_other_model)
        if processing_class is not None:
            _check_vocabulary(config, processing_class)
        router = None
        if config.router:  # of the same base model, which was compared above
            router = Router.from_pretrained(path, base, expected=config.router, allow_other_model=True, **hub_kwargs)
        if held := _held_as(base, weights):
            return cls(base, config, held, router)
        if adapter_name in _adapter_names(model, base):
            raise ValueError(
                f"`model` already holds an adapter named {adapter_name!r}; pass another `adapter_name` or a new model."
            )
        state, training = adapter_state(base), base.training
        resize_for_reserved_tokens(base, max(config.reserved_token_ids) + 1)
        try:
            try:
                if isinstance(model, PeftModel):
                    model.load_adapter(str(path), adapter_name=adapter_name, **hub_kwargs)
                else:
                    model = PeftModel.from_pretrained(model, str(path), adapter_name=adapter_name, **hub_kwargs)
                model.train(training)
            finally:
                switch_adapter(base, adapter_name, False, state)
        except BaseException:  # half loaded, it is off too, and an interrupt may have come to the line above
            switch_adapter(base, adapter_name, False, state)
            raise
        return cls(model, config, adapter_name, router)

    def merge(self) -> LocalSelector:
        """Merges the adapter into the model, so that a step costs what it costs without one. Returns the selector.

        For `proposals="adapted"` alone, where every token sees the adapter anyway; the reserved rows stay apart. The
        base model is gone for good. In 16-bit weights the sum is rounded: scores then differ by that.

        Raises:
            ValueError: where the base model is needed, or merging would not be exact (quantized weights, DoRA, another
                adapter in the same layers).
        """
        if not self.writes_adapted:
            raise ValueError(
                f"Merging takes `proposals='adapted'`, got {self.selector_config.proposals!r}: the base model writes "
                "the text."
            )
        merge_adapter(self.model, self.adapter_name)
        return self

    @property
    def config(self) -> S2TDecodingConfig:
        names = ("num_candidates", "min_prob_ratio", "warmup_tokens")
        return S2TDecodingConfig(**{name: getattr(self.selector_config, name) for name in names})

    def check_tokenizer(self, processing_class: PreTrainedTokenizerBase) -> None:
        _check_vocabulary(self.selector_config, processing_class)

    @property
    def shares_the_cache(self) -> bool:
        """Whether `s2t_generate` scores on the cache that it decodes with: the text is written as it is scored."""
        return (self.selector_config.adapter_scope == "sequence") == self.writes_adapted

    @property
    def writes_adapted(self) -> bool:
        """Whether the adapted model writes the text (`proposals="adapted"`, the paper's form)."""
        return self.selector_config.proposals == "adapted"

    def check_model(self, model: PreTrainedModel | None) -> None:
        if model is not None and model is not self.model:
            return  # another one writes: nothing is known of it
        is_on = adapter_is_on(self.model, self.adapter_name)
        if is_on and not self.writes_adapted:
            raise ValueError(
                f"The S2T adapter {self.adapter_name!r} is switched on for the text itself, which the base model is "
                "to write (proposals='base'): call `set_adapter` with your own adapter's name, load the selector "
                "again, or use s2t_generate, which leaves it out."
            )
        if self.writes_adapted and not is_on and adapted_layers(self.model, self.adapter_name):
            raise ValueError(
                f"The S2T adapter {self.adapter_name!r} is switched off, but is to write the text "
                f"(proposals='adapted'): call `set_adapter({self.adapter_name!r})`, or use s2t_generate, which adds "
                "it."
            )

    def views(
        self,
        model: PreTrainedModel | None = None,
        watches: Mapping[int, Callable[[torch.Tensor], None]] | None = None,
    ) -> ModelViews:
        return ModelViews(self.model, self.adapter_name, watches)

    def writer(self, views: ModelViews) -> PreTrainedModel:
        return views.adapted if self.writes_adapted else views.base

    def reader(self, views: ModelViews) -> PreTrainedModel:
        return views.adapted if self.selector_config.adapter_scope == "sequence" else views.base

    def read_scores(self, hidden_AKD: torch.Tensor) -> torch.Tensor:
        """Scores (A, K) from the candidates' last hidden states."""
        return candidate_scores(bin_logits(hidden_AKD, self.rows()), self.selector_config.score_head)

    def score(self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals) -> Scores:
        """One forward where a tree mask is exact and it is the cheaper way, otherwise two; the scores are the same.

        - the driving call's own cache is the prefix: candidates are scored and decoded in one forward ("tree");
        - the prefix lies in a cache of its own: it catches up and scores in one forward ("scorer").
        """
        in_sequence = self.selector_config.adapter_scope == "sequence"
        prefix, num_new = session.student_prefix(self)
        batch_size, (num_asked, width) = session.mask_BT.shape[0], proposals.ids_BK.shape
        if (in_sequence or self.can_split) and supports_tree(self.model, prefix.cache):
            try:
                if num_new == 0 and session.student_cache is not None:
                    copies = width if in_sequence else 2 * width
                    if pays_to_merge(batch_size * (copies - 1) - num_asked * width, self.model.device):
                        return self._score_and_decode(session, rows_A, proposals, prefix)
                elif 0 < num_new <= MAX_CATCH_UP and (prefix.num_cached or session.is_bare_text):
                    # (padding would be new tokens that see nothing: NaN)
                    if pays_to_merge((batch_size - num_asked) * width, self.model.device):
                        return Scores(self._catch_up_and_score(session, rows_A, proposals, prefix, num_new))
            except TokensNotInRows:
                self.can_split = False
        if num_new:
            session.count_forward("scorer", num_new * batch_size)
            prefix.feed(session.input_ids_BT, session.mask_BT)
        return Scores(self._score_alone(session, rows_A, proposals, prefix))

    def _score_alone(
        self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals, prefix: PrefixCache
    ) -> torch.Tensor:
        """Scores (A, K) by a forward over the candidates of the asked rows, on a fork of the cached prefix."""
        device = self.model.device
        mask_AT, ids_AK = session.mask_BT[rows_A].to(device), proposals.ids_BK.to(device)
        whole_batch = len(rows_A) == session.mask_BT.shape[0]
        session.count_forward("scorer", ids_AK.numel())
        appended = append_candidates(
            session.views.adapted,
            prefix.cache,
            mask_AT,
            ids_AK,
            row_index=None if whole_batch else rows_A.to(device),
        )
        return self.read_scores(appended.hidden_BMD).to(proposals.logprobs_BK.device)

    def _catch_up_and_score(
        self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals, prefix: PrefixCache, num_new: int
    ) -> torch.Tensor:
        """Scores (A, K) by one forward that also feeds the last `num_new` tokens of the text to the prefix's cache."""
        width = proposals.ids_BK.shape[1]
        ids_BK = session.input_ids_BT[:, -1:].repeat(1, width)  # rows that were not asked: any token will do
        ids_BK[rows_A] = proposals.ids_BK
        in_sequence = self.selector_config.adapter_scope == "sequence"
        model = session.views.adapted if in_sequence else session.views.on_tokens(slice(-width, None))
        hidden_BKD = prefix.feed_and_append(model, session.input_ids_BT, session.mask_BT, ids_BK)
        session.count_forward("scorer", len(ids_BK) * (num_new + width))
        return self.read_scores(hidden_BKD[rows_A.to(hidden_BKD.device)]).to(proposals.logprobs_BK.device)

    def _score_and_decode(
        self, session: S2TSession, rows_A: torch.Tensor, proposals: Proposals, prefix: PrefixCache
    ) -> Scores:
        """The tree step: one forward scores the candidates and is the next decoding step of the whole batch.

        With "candidate" it runs every candidate twice, as the adapter scores it and as the base model that goes on
        writing sees it. Rows that were not asked run their own token in every column.
        """
        width = proposals.ids_BK.shape[1]
        ids_BK = session.default_B[:, None].repeat(1, width)
        ids_BK[rows_A] = proposals.ids_BK
        twice = self.selector_config.adapter_scope == "candidate"
        ids_BM = torch.cat([ids_BK, ids_BK], dim=1) if twice else ids_BK
        appended = append_candidates(
            session.views.on_tokens(slice(0, width)) if twice else session.views.adapted,
            prefix.cache,
            session.mask_BT,
            ids_BM,
            tree=True,
            num_logits=0 if session.head_is_plain else width,
        )
        session.count_forward("tree", ids_BM.numel())
        states_BKD = None if session.router is None else session.hidden.take()[:, -width:]
        written_BKD = appended.hidden_BMD[:, -width:]
        if session.head_is_plain is None:  # then the head need only be applied to what is chosen
            session.head_is_plain = head_is_plain(self.model, written_BKD, appended.logits_BLV)

        def advance(choice_A: torch.Tensor) -> NextStep:
            chosen_B = torch.zeros(len(ids_BM), dtype=torch.long, device=ids_BM.device)
            chosen_B[rows_A] = choice_A
            kept = keep_candidate(appended.fed, chosen_B + (width if twice else 0), ids_BM.shape[1], tree=True)
            for layer, new in zip(prefix.cache.layers, kept.layers):
                layer.__dict__.update(new.__dict__)
            rows_B = torch.arange(len(ids_BM), device=ids_BM.device)

            def of_chosen(values_BKX: torch.Tensor) -> torch.Tensor:
                device = values_BKX.device
                return values_BKX[rows_B.to(device), chosen_B.to(device)]

            states_BD = None if states_BKD is None else of_chosen(states_BKD)
            if appended.logits_BLV is not None:
                return NextStep(of_chosen(appended.logits_BLV).to(ids_BM.device).float(), states_BD)
            logits_BV = self.model.get_output_embeddings()(of_chosen(written_BKD))
            return NextStep(logits_BV.to(ids_BM.device).float(), states_BD)

        hidden_AKD = appended.hidden_BMD[rows_A.to(appended.hidden_BMD.device), :width]
        return Scores(self.read_scores(hidden_AKD).to(ids_BM.device), advance)


def _find_weights(path: str | os.PathLike, hub_kwargs: dict) -> str:
    """The adapter's file of weights.

    Raises:
        FileNotFoundError: where the folder or repository holds none.
    """
    file = cached_file(str(path), SAFETENSORS_WEIGHTS_NAME, **hub_kwargs, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise FileNotFoundError(f"{str(path)!r} holds no {SAFETENSORS_WEIGHTS_NAME}: the adapter itself is missing.")
    return file


def _check_fits(base: PreTrainedModel, path: str | os.PathLike, weights: str, config: SelectorConfig) -> None:
    """Compares the stored shapes with the model's, before anything is injected.

    Raises:
        ValueError: where the adapter was trained on a model of another hidden size, depth or vocabulary.
    """
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
        sizes = [file.get_slice(n).get_shape()[1] for n in names if n.endswith(_TRAINED_ROWS)]
    depths = [int(match.group(1)) for name in names if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))]
    num_rows, hidden_size = base.get_output_embeddings().weight.shape
    depth = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    beyond = sorted(id for id in config.reserved_token_ids if id >= num_rows)  # all of them: rows that training added
    wrong = None
    if sizes and sizes[0] != hidden_size:
        wrong = f"hidden_size={sizes[0]}, but `model` has {hidden_size}"
    elif depths and depth is not None and max(depths) >= depth:
        wrong = f"{max(depths) + 1} or more layers, but `model` has {depth}"
    elif beyond and (len(beyond) < len(config.reserved_token_ids) or (not config.model_hash and beyond[0] > num_rows)):
        wrong = f"reserved token ids up to {beyond[-1]}, but the head of `model` has {num_rows} rows"
    if wrong:
        raise ValueError(
            f"The adapter {str(path)!r} was trained on a model with {wrong}: load the one it was trained on."
        )


def _check_trained_on(
    base: PreTrainedModel,
    path: str | os.PathLike,
    config: SelectorConfig,
    allow_other_model: bool,
) -> None:
    """Raises a ValueError where the adapter was trained on other weights.

    An adapter of another model of the same shapes would load, and score by chance.
    """
    if allow_other_model or not config.model_hash:
        return
    found = model_hash(base)
    if not same_weights(config.model_hash, found):
        raise ValueError(
            f"The adapter {str(path)!r} was trained on {config.base_model!r} (weights "
            f"{weights_name(config.model_hash)}), but `model` ({name_of(base)!r}) has weights {weights_name(found)}: "
            "load the one it was trained on, or pass `allow_other_model=True`."
        )


def _check_vocabulary(config: SelectorConfig, processing_class: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError where the labels were made with another tokenizer."""
    if config.vocab_hash and vocab_hash(processing_class) != config.vocab_hash:
        raise ValueError(
            f"The adapter was trained with the tokenizer of {config.base_model!r} (vocabulary {config.vocab_hash}), "
            f"but `processing_class` has {vocab_hash(processing_class)}."
        )


def _held_as(base: PreTrainedModel, weights: str) -> str | None:
    """The name under which a model holds these very weights already, told by their trained rows; else `None`."""
    with safe_open(weights, framework="pt") as file:
        stored = [file.get_tensor(name) for name in file.keys() if name.endswith(_TRAINED_ROWS)]
    for module in base.modules():
        for name, rows_RD in getattr(module, _TRAINED_ROWS, {}).items():
            if stored and rows_RD.shape == stored[0].shape:
                if torch.equal(rows_RD.detach().cpu(), stored[0].to(rows_RD.dtype)):
                    return name
    return None


def _adapter_names(model: PreTrainedModel | PeftModel, base: PreTrainedModel) -> set[str]:
    names = set(model.peft_config) if isinstance(model, PeftModel) else set(getattr(base, "peft_config", {}))
    for module in base.modules():
        names |= set(getattr(module, "lora_A", {}))
    return names


class StepResult(NamedTuple):
    """What a step decided.

    Attributes:
        token_B: the selected token where `asked_B`, the student's first elsewhere.
        asked_B: rows whose selector was asked; the others decode as the user asked for.
        advance: where scoring already was the next decoding step: returns what the step's tokens lead to and leaves
            the driving call's cache there. Not to be called after the last token.
    """

    token_B: torch.Tensor
    asked_B: torch.Tensor
    advance: Callable[[], NextStep] | None = None


@dataclass
class S2TTrace:
    """What happened in one `generate` call. Pass an empty one to `S2T(..., trace=)` or `s2t_generate(trace=)`.

    A new call clears it. Tensors are on the CPU, one entry per generated token, in order.

    Attributes:
        prompt_length: columns of the prompt.
        steps: per step a dict with `value_B` (trigger value), `triggered_B`, `asked_B`, `first_B` (the student's first
            token), `token_B` (the selected one; for rows that were asked), `forwards` (how many, by kind), and, where
            any row was asked, `rows_A`, `candidate_ids_AK`, `scores_AK` (the selector's), `mask_AK` (above the floor),
            `logprobs_AK` (the student's, nats) and `fused_AK` (what decided; -inf below the floor). A takeover has no
            candidates.
        forwards: forwards of the whole call by kind. "teacher", "scorer" and "router" (where its hidden states were
            not at hand) come on top of plain decoding's own; "tree" takes the place of one of them: it scores and
            decodes (after the last token there is none to take the place of).
        tokens: tokens run in them, by kind, all rows together.
    """

    prompt_length: int = 0
    steps: list[dict] = field(default_factory=list)
    forwards: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def clear(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.steps, self.forwards, self.tokens = [], {}, {}

    def rows(self) -> list[list[dict]]:
        """The same by row: for each a list of steps with `value`, `triggered`, `asked`, `flipped`, `first`, `token`,
        `forwards` (of the step, which all rows share), and, where it was asked, `candidate_ids`, `scores` and
        `logprobs` (candidates above the floor)."""
        if not self.steps:
            return []
        out: list[list[dict]] = [[] for _ in range(len(self.steps[0]["asked_B"]))]
        for step in self.steps:
            where = {int(row): a for a, row in enumerate(step.get("rows_A", []))}
            for row, items in enumerate(out):
                asked = bool(step["asked_B"][row])
                item = {
                    "value": float(step["value_B"][row]),
                    "triggered": bool(step["triggered_B"][row]),
                    "asked": asked,
                    "first": int(step["first_B"][row]),
                    "token": int(step["token_B"][row]),
                    "flipped": asked and int(step["first_B"][row]) != int(step["token_B"][row]),
                    "forwards": step["forwards"],
                }
                if row in where and "scores_AK" in step:
                    mask_K = step["mask_AK"][where[row]]
                    item["candidate_ids"] = step["candidate_ids_AK"][where[row]][mask_K].tolist()
                    item["scores"] = step["scores_AK"][where[row]][mask_K].tolist()
                    item["logprobs"] = step["logprobs_AK"][where[row]][mask_K].tolist()
                items.append(item)
        return out


class S2TSession:
    """The state of one `generate` call: caches, trigger threshold, prompt length. Made anew for every call.

    Args:
        selector: who chooses.
        config: `None` for the selector's own defaults.
        prompt_length: columns of the prompt; warm-up counts from there.
        teacher_model: for the "kl" trigger where the selector is local.
        student_cache: the cache of the `generate` call that drives this session, where it is at hand (then nothing
            is computed twice); `None` makes the session keep caches of its own.
        trace: filled as the call goes on.
        model: the small model, where it is at hand.
        prompt_embeds_BTD: of a prompt that was given as embeddings.

    Attributes:
        excluded_ids: token ids that this call never writes, `None` for none.
    """

    def __init__(
        self,
        selector: Selector,
        config: S2TDecodingConfig | None,
        prompt_length: int,
        teacher_model: PreTrainedModel | None = None,
        student_cache: Cache | None = None,
        trace: S2TTrace | None = None,
        model: PreTrainedModel | None = None,
        prompt_embeds_BTD: torch.Tensor | None = None,
    ):
        self.selector = selector
        self.config = selector.resolve_config(config)
        self.threshold = self.config.resolve_threshold(selector.thresholds)
        self.fusion = self.config.fusion or selector.fusion or FusionWeights()
        self.router = selector.needed_router(self.config)
        self.prompt_length = prompt_length
        self.teacher_model = check_teacher(self.config, selector, teacher_model)
        self.student_cache = student_cache
        self.trace = trace
        self._random = torch.Generator().manual_seed(self.config.seed)
        self._teacher_prefix: PrefixCache | None = None
        self._teacher_rows: int | None = None
        self.excluded_ids = selector.excluded_ids
        self.prompt_embeds_BTD = prompt_embeds_BTD
        self._teacher_logits_BV: torch.Tensor | None = None
        self._scorer_prefix: PrefixCache | None = None
        self._writer_prefix: PrefixCache | None = None
        self.hidden = LastHidden()
        watches = {} if self.router is None else {id(self.router.read): self.hidden.see}
        if self.router is not None:
            model = self.router.model
        self.views = selector.views(model, watches)
        self._hidden_BD: torch.Tensor | None = None
        self._router_logits_B: torch.Tensor | None = None
        self.input_ids_BT: torch.Tensor | None = None
        self.mask_BT: torch.Tensor | None = None
        self.default_B: torch.Tensor | None = None
        self.head_is_plain: bool | None = None  # known after the first tree
        self._step_forwards: dict[str, int] = {}
        self._room: dict[str, int | None] = {}  # of the models that read the text, in tokens
        if trace is not None:
            trace.clear(prompt_length)

    def check(
        self,
        mask_BT: torch.Tensor | None,
        num_head_rows: int,
        model: PreTrainedModel | None = None,
        input_ids: torch.Tensor | None = None,
        eos_token_ids: Collection[int] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        """What can be known to go wrong before the first token.

        Args:
            mask_BT: of the prompt; `None` where nothing is padding.
            num_head_rows: V, of the small model.
            model: the small model, where it is at hand.
            input_ids: the prompt.
            eos_token_ids: which end a text.
            max_new_tokens: how many may follow it, where that is known.

        Raises:
            ValueError: more candidates than tokens; a model that is no causal language model, or cannot be read on a
                cache ([`check_reads_in_parts`]); a text that does not fit into a model's context ([`check_context`]);
                a teacher whose token ids mean something else.
        """
        num_tokens = num_head_rows - (0 if self.selector.excluded_ids is None else len(self.selector.excluded_ids))
        if self.config.num_candidates > num_tokens:
            raise ValueError(
                f"`num_candidates` must be in [1, {num_tokens}], the model's vocabulary without reserved tokens, got "
                f"{self.config.num_candidates}."
            )
        lengths_B = torch.tensor([self.prompt_length]) if mask_BT is None else mask_BT.sum(-1)
        shortest, length = lengths_B.min().item(), lengths_B.max().item()
        own = getattr(self.selector, "model", None)
        model = own if model is None else model
        scorers = {
            "model": getattr(self.router, "model", None) if own is None else own,
            "teacher_model": self.teacher_model if self.runs_teacher else None,
        }
        scorers = {name: scorer for name, scorer in scorers.items() if scorer is not None}
        check_models(model, scorers)
        readers = [Reader("model", model, is_scorer="model" in scorers, reads_candidates=own is not None)]
        readers.append(Reader("teacher_model", scorers.get("teacher_model")))
        readers = [reader for reader in readers if reader.model is not None]
        check_context(readers, length, max_new_tokens, shortest)
        self._room = {reader.name: reader.room(shortest) for reader in readers}
        if "teacher_model" in scorers:
            if model is not None:
                check_same_ids(name_of(model), name_of(self.teacher_model))
            num_known = self.teacher_model.get_input_embeddings().weight.shape[0]
            if num_known < num_head_rows:
                self._leave_out_what_the_teacher_lacks(num_known, num_head_rows, mask_BT, input_ids, eos_token_ids)
        is_padded = mask_BT is not None and not bool(mask_BT.all())
        for name, scorer in scorers.items():  # last: it runs them
            check_reads_in_parts(name, scorer, is_padded)

    def _leave_out_what_the_teacher_lacks(
        self,
        num_known: int,
        num_head_rows: int,
        mask_BT: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        eos_token_ids: Collection[int],
    ) -> None:
        """Token ids that the teacher's embedding lacks are not written: it could not read on. The end of a text may
        be one of them, because nobody reads on behind it.

        Raises:
            ValueError: where the prompt holds one.
        """
        self._teacher_rows = num_known
        if input_ids is not None and input_ids.numel():
            last = int((input_ids if mask_BT is None else input_ids.masked_fill(~mask_BT.bool(), 0)).max())
            if last >= num_known:
                raise ValueError(
                    f"The prompt holds token id {last}, but `teacher_model` knows {num_known} tokens: choose a "
                    "teacher with the tokenizer of `model`."
                )
        lacking = torch.tensor([id for id in range(num_known, num_head_rows) if id not in eos_token_ids])
        own = self.selector.excluded_ids
        self.excluded_ids = lacking if own is None else torch.cat([own, lacking.to(own)]).unique()

    def step(
        self,
        input_ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        logits_BV: torch.Tensor,
        active_B: torch.Tensor | None = None,
        default_B: torch.Tensor | None = None,
        hidden_BD: torch.Tensor | None = None,
    ) -> StepResult:
        """One decoding step: trigger, candidates, selection.

        Args:
            input_ids_BT: everything so far, prompt included.
            mask_BT: bool, False at padding.
            logits_BV: the student's next-token logits, after the user's processors, before any sampling warper, and
                with this session's `excluded_ids` at -inf: triggers and proposals must not see reserved tokens.
            active_B: rows that have not finished; `None` for all.
            default_B: the tokens of rows that are not asked, where they are known already (see `StepResult.advance`).
            hidden_BD: the last token's hidden states at the router's layer, of the forward that gave the logits;
                where they are needed and not at hand, the prefix is read again, on a cache of its own.
        """
        past_warmup = input_ids_BT.shape[1] - self.prompt_length >= self.config.warmup_tokens
        if mask_BT.shape[1] > input_ids_BT.shape[1]:  # a prompt of embeddings alone: its ids stand for nothing
            input_ids_BT = nn.functional.pad(input_ids_BT, (mask_BT.shape[1] - input_ids_BT.shape[1], 0))
        self.input_ids_BT, self.mask_BT, self._teacher_logits_BV = input_ids_BT, mask_BT, None
        self._hidden_BD, self._router_logits_B = hidden_BD, None
        self.default_B, self._step_forwards = default_B, {}
        config, device = self.config, logits_BV.device
        if active_B is None:
            active_B = torch.ones(len(logits_BV), dtype=torch.bool, device=device)

        # 1. trigger
        value_B = self._trigger_value(logits_BV)
        triggered_B = active_B & past_warmup
        if config.trigger == "never":
            triggered_B = torch.zeros_like(triggered_B)
        elif self.threshold is not None:
            triggered_B = triggered_B & (value_B >= self.threshold)
        unsound_B = active_B & (~(logits_BV.amax(-1) > float("-inf")) | value_B.isnan())
        any_triggered, any_unsound = torch.stack([triggered_B.any(), unsound_B.any()]).tolist()
        if any_unsound:
            check_choosable(logits_BV[active_B])
            check_not_nan(value_B, "trigger's values")
        if not any_triggered:  # an ordinary step costs no more than its trigger
            first_B = logits_BV.argmax(-1)
            self._record(value_B, triggered_B, triggered_B, first_B, first_B)
            return StepResult(first_B, triggered_B)

        # 2. candidates
        proposals = propose(logits_BV, config.num_candidates, config.min_prob_ratio)
        token_B = proposals.ids_BK[:, 0].clone()
        asked_B = triggered_B if self.selector.takeover else triggered_B & (proposals.mask_BK.sum(-1) > 1)

        # 3. selection
        scored, advance = {}, None
        if bool(asked_B.any()):
            rows_A = asked_B.nonzero()[:, 0]
            if self.selector.takeover:
                token_B[rows_A] = self._takeover(rows_A, logits_BV)
            else:
                # the floor keeps a prefix of the candidates, so the widest row tells how many are worth a forward
                width = int(proposals.mask_BK[rows_A].sum(-1).max())
                asked = Proposals(*(tensor[rows_A, :width] for tensor in proposals))
                if isinstance(self.selector, LocalSelector):
                    check_room("model", self._room.get("model"), mask_BT, num_more=1)
                scores = self.selector.score(self, rows_A, asked)
                scores_AK, advance_from = scores if isinstance(scores, Scores) else Scores(scores)
                check_not_nan(scores_AK, "selector's scores")
                router_A = self._router_logits(logits_BV)[rows_A] if self.fusion.router else None
                fused_AK = fused_scores(scores_AK, asked.logprobs_BK, asked.mask_BK, self.fusion, router_A)
                choice_A = fused_AK.argmax(-1)  # a tie goes to the candidate that the student ranks higher
                token_B[rows_A] = asked.ids_BK.gather(-1, choice_A[:, None])[:, 0]
                advance = None if advance_from is None else functools.partial(advance_from, choice_A)
                scored = {"rows_A": rows_A, "candidate_ids_AK": asked.ids_BK, "scores_AK": scores_AK}
                scored |= {"mask_AK": asked.mask_BK, "logprobs_AK": asked.logprobs_BK, "fused_AK": fused_AK}
        self._record(value_B, triggered_B, asked_B, proposals.ids_BK[:, 0], token_B, **scored)
        return StepResult(token_B, asked_B, advance)

    def _record(
        self,
        value_B: torch.Tensor,
        triggered_B: torch.Tensor,
        asked_B: torch.Tensor,
        first_B: torch.Tensor,
        token_B: torch.Tensor,
        **scored: torch.Tensor,
    ) -> None:
        """Adds a step to the trace, where one was asked for."""
        if self.trace is not None:
            entry = {"value_B": value_B, "triggered_B": triggered_B, "asked_B": asked_B, "first_B": first_B}
            entry |= {"token_B": token_B} | scored
            entry = {name: tensor.detach().cpu() for name, tensor in entry.items()}
            self.trace.steps.append(entry | {"forwards": self._step_forwards})

    def _takeover(self, rows_A: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """The teacher's favourite (A,) among the tokens that the student's head has and the user allows."""
        shared = min(self.teacher_logits().shape[-1], logits_BV.shape[-1])
        check_not_nan(self.teacher_logits()[rows_A], "teacher's logits")
        allowed_AV = torch.isfinite(logits_BV[rows_A, :shared])
        return self.teacher_logits()[rows_A, :shared].masked_fill(~allowed_AV, float("-inf")).argmax(-1)

    def _trigger_value(self, logits_BV: torch.Tensor) -> torch.Tensor:
        kind = self.config.trigger
        if kind == "entropy":
            return triggers.entropy(logits_BV, self.config.trigger_top_k)
        if kind == "margin":
            return triggers.margin(logits_BV)
        if kind == "router":
            return self._router_logits(logits_BV)
        if kind == "kl":
            return triggers.kl_divergence(self.teacher_logits(), logits_BV)
        if kind == "random":
            return torch.rand(len(logits_BV), generator=self._random).to(logits_BV.device)
        return torch.zeros(len(logits_BV), device=logits_BV.device)

    @property
    def runs_teacher(self) -> bool:
        """Whether a teacher reads the text of this call."""
        return getattr(self.selector, "teacher_model", None) is not None or self.config.trigger == "kl"

    @property
    def is_bare_text(self) -> bool:
        """Whether the text so far is token ids without padding."""
        return self.prompt_embeds_BTD is None and bool(self.mask_BT.all())

    def take_hidden(self) -> torch.Tensor | None:
        """The last token's hidden states (B, D) of the forward that has just run, `None` where no router is read."""
        return None if self.router is None else self.hidden.take()[:, -1]

    def _router_logits(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The router's logits (B,) of this step, read at most once."""
        if self._router_logits_B is None:
            hidden_BD = self._read_hidden() if self._hidden_BD is None else self._hidden_BD
            self._router_logits_B = self.router.logits(hidden_BD, logits_BV)
        return self._router_logits_B

    def _read_hidden(self) -> torch.Tensor:
        """Hidden states (B, D) at the router's layer, by reading the text since the last time."""
        if self._writer_prefix is None:
            self._writer_prefix = self._new_prefix(self.selector.writer(self.views))
        num_new = self.input_ids_BT.shape[1] - self._writer_prefix.num_cached
        self.count_forward("router", num_new * len(self.input_ids_BT))
        self._writer_prefix.feed(self.input_ids_BT, self.mask_BT)
        return self.hidden.take()[:, -1]

    def teacher_logits(self) -> torch.Tensor:
        """The teacher's next-token logits (B, V) for the current prefix, float32, run at most once a step.

        Only the tokens since the last time go through the teacher.
        """
        if self._teacher_logits_BV is None:
            if self._teacher_prefix is None:
                self._teacher_prefix = PrefixCache(self.teacher_model)
            check_room("teacher_model", self._room.get("teacher_model"), self.mask_BT)
            num_cached = self._teacher_prefix.num_cached
            ids_BT = self.input_ids_BT
            if self._teacher_rows is not None:  # in padding, or at and behind the end of a text
                ids_BT = ids_BT.masked_fill(ids_BT >= self._teacher_rows, 0)
            self.count_forward("teacher", (ids_BT.shape[1] - num_cached) * len(ids_BT))
            logits_BV = self._teacher_prefix.feed(ids_BT, self.mask_BT, with_logits=True)
            self._teacher_logits_BV = logits_BV.to(self.input_ids_BT.device)
        return self._teacher_logits_BV

    def _new_prefix(self, model: PreTrainedModel) -> PrefixCache:
        """A cache of the small model over this call's text."""
        return PrefixCache(model, prompt_embeds_BTD=self.prompt_embeds_BTD)

    def student_prefix(self, selector: Selector) -> tuple[PrefixCache, int]:
        """A cache of the small model over the prefix, as the selector reads it, and how many tokens it lacks.

        The driving call's own cache serves where it is computed the same way; otherwise one is kept and fed lazily.
        """
        if self.student_cache is not None and selector.shares_the_cache:
            return PrefixCache(selector.reader(self.views), self.student_cache), 0
        if self._scorer_prefix is None:
            self._scorer_prefix = self._new_prefix(selector.reader(self.views))
        return self._scorer_prefix, self.input_ids_BT.shape[1] - self._scorer_prefix.num_cached

    def count_forward(self, kind: str, num_tokens: int) -> None:
        """Adds a forward to the trace, where one was asked for."""
        if self.trace is not None:
            for counts in (self.trace.forwards, self._step_forwards):
                counts[kind] = counts.get(kind, 0) + 1
            self.trace.tokens[kind] = self.trace.tokens.get(kind, 0) + num_tokens


def check_not_nan(values: torch.Tensor, what: str = "model's logits") -> None:
    """Raises a ValueError where there is nothing to select from or by."""
    if bool(values.isnan().any()):
        raise ValueError(f"The {what} are NaN: there is nothing to select from (check its dtype and weights).")


def check_choosable(logits_BV: torch.Tensor) -> None:
    """Raises a ValueError where a row has no token to choose: NaN, or all of them forbidden."""
    check_not_nan(logits_BV)
    barred_B = logits_BV.amax(-1) == float("-inf")
    if bool(barred_B.any()):
        raise ValueError(
            f"Row {int(barred_B.nonzero()[0, 0])} has no token left to choose: its logits are all -inf after the "
            "logits processors (`suppress_tokens`, `bad_words_ids`, constraints ...) and without reserved tokens."
        )


def name_of(model: PreTrainedModel | PeftModel) -> str:
    return model.config._name_or_path or ""


def check_teacher_tokenizer(processing_class: PreTrainedTokenizerBase, teacher_model: PreTrainedModel) -> None:
    """Raises a ValueError where ids mean other tokens to the teacher, whose tokenizer is looked up on this machine."""
    check_same_ids(processing_class, name_of(teacher_model))


def check_teacher(
    config: S2TDecodingConfig, selector: Selector, teacher_model: PreTrainedModel | None
) -> PreTrainedModel | None:
    """The teacher that a run uses, if any.

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
