"""S2T as a `LogitsProcessor`: works with everything `model.generate` does.

Thin: finds the `generate` call that a step belongs to and the mask of its text, and lets [`S2TSession.step`] decide.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationMode

from transformers_s2t.config import S2TDecodingConfig
from transformers_s2t.decoding.call import GenerateCall, eos_token_ids, prompt_mask, running_calls
from transformers_s2t.decoding.selectors import Selector, TeacherSelector, check_teacher, check_teacher_tokenizer
from transformers_s2t.decoding.session import S2TSession, S2TTrace
from transformers_s2t.model_checks import check_causal_lm
from transformers_s2t.proposals import exclude
from transformers_s2t.router import HiddenTap


_ONE_TOKEN_MODES = (None, GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class _Text:
    """The text of one call so far.

    Attributes:
        owner: the call's own generation config, which identifies it; `None` outside of `generate`.
        session: the call's session.
        prompt_mask_BT: bool, False at padding.
        seen_BT: token ids at the last step.
    """

    owner: GenerationConfig | None
    session: S2TSession
    prompt_mask_BT: torch.Tensor
    seen_BT: torch.Tensor


class _Local(threading.local):
    """The texts of each thread: one for each of its nested `generate` calls, or that of its last steps by hand."""

    def __init__(self):
        self.texts: list[_Text] = []

    def __reduce__(self) -> tuple:  # copies and pickles start empty
        return _Local, ()


class S2TLogitsProcessor(LogitsProcessor):
    """Replaces the scores of a triggered step by the selected token; other steps pass through.

    It keeps its own key/value cache of the scoring model, one per `generate` call, fed lazily with the tokens since
    the last trigger. Mask and positions are those of the call. One object serves call after call, any batch, and
    threads side by side. Beams and assisted decoding, which reorder rows or step back, are refused.

    Args:
        selector: who chooses: [`LocalSelector`] or [`TeacherSelector`].
        teacher_model: with `selector=None`, short for `TeacherSelector(teacher_model)`; with a local selector, the
            oracle of the "kl" trigger.
        config: how to select; `None` for the selector's defaults.
        pad_token_id: marks left padding where the processor is called by hand, outside of `generate`: a run of this
            token at the start of a row. `None` takes it from the scoring model's generation config.
        processing_class: with `teacher_model`, the small model's tokenizer, which is compared with the teacher's.
        trace: filled during each call.

    Raises:
        ValueError: for a threshold that was never calibrated, or where neither selector nor teacher is given. In the
            first step of a call: for a second S2T beside this one, and for all that `prompt_mask` and
            `S2TSession.check` refuse.
    """

    def __init__(
        self,
        selector: Selector | None = None,
        *,
        teacher_model: PreTrainedModel | None = None,
        config: S2TDecodingConfig | None = None,
        pad_token_id: int | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        trace: S2TTrace | None = None,
    ):
        self.selector = resolve_selector(selector, teacher_model, processing_class)
        self.teacher_model = teacher_model
        self.config = self.selector.resolve_config(config)
        self.config.resolve_threshold(self.selector.thresholds)  # an uncalibrated threshold fails here, not mid-run
        check_teacher(self.config, self.selector, teacher_model)
        self._router = self.selector.needed_router(self.config)
        if self._router is not None:
            self._tap = HiddenTap(self._router.read)
            weakref.finalize(self, self._tap.close)
            self._tap.open()
        self.trace = trace
        scorer = getattr(self.selector, "model", None) or getattr(self.selector, "teacher_model", None)
        self._padding = _padding_token(scorer, pad_token_id)
        self._local = _Local()

    def start(self) -> None:
        """Announces that a new text begins."""
        self._local.texts = [text for text in self._local.texts if text.owner is not None]
        if self._router is not None:
            self._tap.hidden.clear()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) with every triggered row fixed to its selected token."""
        calls = running_calls()
        call = calls[0] if calls else None
        owner = call.generation_config if call else None
        text = next((text for text in self._local.texts if text.owner is owner), None)
        is_new = text is None or not _goes_on(input_ids, text.seen_BT)
        if is_new:
            text = self._begin(input_ids, calls, text)
        text.seen_BT = input_ids
        num_written = input_ids.shape[1] - text.session.prompt_length
        written_BN = text.prompt_mask_BT.new_ones(len(input_ids), num_written)
        mask_BT = torch.cat([text.prompt_mask_BT, written_BN], dim=-1)
        hidden_BD = self._take_hidden(call, text.session, len(scores))  # before a check runs the model
        if is_new:
            self._check(input_ids, scores, call, text.session, text.prompt_mask_BT)
            # forget the calls that have ended; those around this one continue after it
            around = [outer.generation_config for outer in calls[1:]]
            self._local.texts = [other for other in self._local.texts if any(other.owner is one for one in around)]
            self._local.texts.append(text)
        scores = exclude(scores, text.session.excluded_ids)
        with torch.no_grad():
            result = text.session.step(input_ids, mask_BT, scores, hidden_BD=hidden_BD)
        return fix_tokens(scores, result.token_B, result.asked_B)

    def _begin(self, input_ids: torch.Tensor, calls: list[GenerateCall], before: _Text | None) -> _Text:
        """The text of a call at its first step."""
        is_reordered = before is not None and _is_reordered(input_ids, before.seen_BT)
        if any(call.mode not in _ONE_TOKEN_MODES for call in calls) or (is_reordered and not calls):
            raise ValueError(
                "S2T selects one token per row and step: beam search (`num_beams`) and assisted decoding, which "
                "reorder rows or step back, are not supported."
            )
        call = calls[0] if calls else None
        settings = {"teacher_model": self.teacher_model, "trace": self.trace}
        if call is not None:
            check_one_s2t([self, *call.own_processors])
            check_causal_lm("model", call.model)
            settings |= {"model": call.model, "prompt_embeds_BTD": call.model_kwargs.get("inputs_embeds")}
        session = S2TSession(self.selector, self.config, input_ids.shape[1], **settings)
        if call is not None:
            takes_embeds = not session.runs_teacher
            mask_BT = prompt_mask(input_ids, call.model_kwargs, call.generation_config, takes_embeds)
        elif input_ids.shape[1] == 0:
            raise ValueError("S2T called by hand reads the prompt's `input_ids`, which are empty here.")
        else:
            mask_BT = self._guess_mask(input_ids)
        owner = call.generation_config if call else None
        return _Text(owner, session, mask_BT.to(input_ids.device), input_ids)

    def _check(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        call: GenerateCall | None,
        session: S2TSession,
        mask_BT: torch.Tensor,
    ) -> None:
        """The remaining checks at the first step of a call."""
        model = call.model if call else None
        config = call.generation_config if call else None
        max_length = getattr(config, "max_length", None)
        self.selector.check_model(model)
        session.check(
            mask_BT,
            scores.shape[-1],
            model,
            input_ids,
            eos_token_ids(config),
            max_new_tokens=None if max_length is None else max_length - input_ids.shape[1],
        )
        if self._router is not None:
            self._tap.hidden.clear()

    def _take_hidden(self, call: GenerateCall | None, session: S2TSession, batch_size: int) -> torch.Tensor | None:
        """The hidden states (B, D) that the router reads, if exactly one forward has run since the last step: that is
        the one that gave the logits. `None` otherwise: a prompt read in parts, or a guide that runs the model too."""
        if self._router is None or self._router is not session.router:  # exchanged since S2T was made
            return None
        if call is None or call.model is not self._router.model:
            return None
        is_clear = self._tap.hidden.num_forwards == 1
        hidden_BTD = self._tap.hidden.take()
        return hidden_BTD[:, -1] if is_clear and len(hidden_BTD) == batch_size else None

    def _guess_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which columns are text, outside of a `generate` call."""
        pad_token_id, may_be_text = self._padding
        if pad_token_id is None:
            runs_B = (input_ids == input_ids[:, :1]).long().cumprod(-1).sum(-1)
            if len(input_ids) > 1 and bool((runs_B > 1).any()):
                raise ValueError(
                    "A row begins with a repeated token, which may be padding, and the scoring model's config names "
                    "no `pad_token_id`: pass `pad_token_id=` to S2T (any id that no text begins with if there is no "
                    "padding)."
                )
            return torch.ones_like(input_ids, dtype=torch.bool)
        is_pad_BT = input_ids == pad_token_id
        num_padding_B = is_pad_BT.long().cumprod(-1).sum(-1)
        if may_be_text:  # a text may begin with this token (pad = bos or eos): what all rows share is text
            num_padding_B = num_padding_B - num_padding_B.min()
        num_padding_B = num_padding_B.clamp_max(input_ids.shape[1] - 1)
        return torch.arange(input_ids.shape[1], device=input_ids.device) >= num_padding_B[:, None]


def _goes_on(input_ids: torch.Tensor, seen_BT: torch.Tensor) -> bool:
    """Whether these ids are those of the last step and one more column."""
    return (
        input_ids.shape == (seen_BT.shape[0], seen_BT.shape[1] + 1)
        and input_ids.device == seen_BT.device
        and torch.equal(input_ids[:, :-1], seen_BT)
    )


def _is_reordered(input_ids: torch.Tensor, seen_BT: torch.Tensor) -> bool:
    """Whether every row continues some row of the last step, as beams do."""
    if input_ids.shape != (seen_BT.shape[0], seen_BT.shape[1] + 1):
        return False
    return bool((input_ids[:, None, :-1] == seen_BT[None]).all(-1).any(-1).all())


def check_one_s2t(logits_processor: list[LogitsProcessor]) -> None:
    """Raises a ValueError for two S2T processors in one call: the first would leave the second one token only."""
    found = {id(processor) for processor in logits_processor if isinstance(processor, S2TLogitsProcessor)}
    if len(found) > 1:
        raise ValueError(f"One call takes one S2T, got {len(found)}: the first would leave nothing to select from.")


class S2T(LogitsProcessorList):
    """What a user passes to `generate`: `model.generate(**inputs, logits_processor=S2T(selector))`.

    A `LogitsProcessorList` that holds one [`S2TLogitsProcessor`], because `generate` takes lists only. It takes that
    one's arguments.

    Example:
        >>> model.generate(**inputs, logits_processor=S2T(teacher_model=teacher))  # the larger model selects
        >>> selector = LocalSelector.from_pretrained("you/qwen2.5-1.5b-s2t-local", model)
        >>> model.generate(**inputs, logits_processor=S2T(selector))  # the small model selects by itself
    """

    def __init__(
        self,
        selector: Selector | None = None,
        *,
        teacher_model: PreTrainedModel | None = None,
        config: S2TDecodingConfig | None = None,
        pad_token_id: int | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        trace: S2TTrace | None = None,
    ):
        settings = {"teacher_model": teacher_model, "config": config, "pad_token_id": pad_token_id}
        settings |= {"processing_class": processing_class, "trace": trace}
        super().__init__([S2TLogitsProcessor(selector, **settings)])

    def __iter__(self):
        # `generate` iterates over the list once, to merge it with its own processors: a new call starts
        for processor in super().__iter__():
            processor.start()
        return super().__iter__()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        for processor in super().__iter__():
            scores = processor(input_ids, scores, **kwargs)
        return scores


def resolve_selector(
    selector: Selector | None,
    teacher_model: PreTrainedModel | None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Selector:
    """The selector given, or a [`TeacherSelector`] of the teacher given; checked against the tokenizer given."""
    if selector is None and teacher_model is None:
        raise ValueError("Pass `selector` (S2T-Local) or `teacher_model` (S2T), got neither.")
    if selector is None:
        return TeacherSelector(teacher_model, processing_class=processing_class)
    if not isinstance(selector, Selector):
        raise TypeError(
            f"`selector` must be a LocalSelector or TeacherSelector, got {type(selector)}; a larger model goes into "
            "`teacher_model=`."
        )
    own_teacher = getattr(selector, "teacher_model", None)
    if teacher_model is not None and own_teacher is not None and own_teacher is not teacher_model:
        raise ValueError("`teacher_model` differs from the teacher of `selector`; pass one of them.")
    if processing_class is not None:
        selector.check_tokenizer(processing_class)
        if teacher_model is not None:
            check_teacher_tokenizer(processing_class, teacher_model)
    return selector


def fix_tokens(scores_BV: torch.Tensor, token_B: torch.Tensor, asked_B: torch.Tensor) -> torch.Tensor:
    """Scores in which every asked row has 0 at its token and -inf elsewhere, so that argmax and sampling take it."""
    fixed_BV = torch.full_like(scores_BV, float("-inf")).scatter(-1, token_B[:, None], 0.0)
    return torch.where(asked_B[:, None], fixed_BV, scores_BV)


def _padding_token(scorer: PreTrainedModel | None, pad_token_id: int | None) -> tuple[int | None, bool]:
    """The padding token, and whether a text may begin with it (then a run that all rows share is text)."""
    configs = (getattr(scorer, "generation_config", None), getattr(scorer, "config", None))

    def look_up(name: str) -> set[int]:
        found: set[int] = set()
        for config in configs:
            value = getattr(config, name, None)
            found |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
        return found

    starts = look_up("bos_token_id") | look_up("eos_token_id")
    if pad_token_id is None:
        pads = [p for c in configs if (p := getattr(c, "pad_token_id", None)) is not None]
        pad_token_id = pads[0] if pads else None
    return pad_token_id, pad_token_id in starts
