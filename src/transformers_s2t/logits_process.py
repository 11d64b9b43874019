"""S2T as a `LogitsProcessor`: works with everything `model.generate` does, from `input_ids` and scores alone.

Thin: finds out where a new call starts and which columns are padding, and lets [`S2TSession.step`] decide.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from types import FrameType

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMixin, GenerationMode

from .config import S2TDecodingConfig
from .proposals import exclude
from .selection import S2TSession, S2TTrace, Selector, TeacherSelector, check_teacher, check_teacher_tokenizer


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_ONE_TOKEN_MODES = (None, GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class S2TLogitsProcessor(LogitsProcessor):
    """Replaces the scores of a triggered step by the selected token; other steps pass through.

    It keeps its own key/value cache of the scoring model, one per `generate` call, fed lazily with the tokens since
    the last trigger. A call is recognised as going on where its `input_ids` are the last ones and one more column;
    anything else starts afresh, so one object serves call after call and any batch. Beams and assisted decoding, which
    reorder rows or step back, are refused.

    Args:
        selector: who chooses: [`LocalSelector`] or [`TeacherSelector`].
        teacher_model: with `selector=None`, short for `TeacherSelector(teacher_model)`; with a local selector, the
            oracle of the "kl" trigger.
        config: how; `None` for the selector's defaults.
        pad_token_id: marks left padding. `None` takes it from the scoring model's generation config. A processor
            never sees the attention mask: a run of this token at the start of a row counts as padding.
        processing_class: with `teacher_model`, the small model's tokenizer, to be compared with the teacher's.
        trace: filled during each call.

    Raises:
        ValueError: for a threshold that was never calibrated, or where neither selector nor teacher is given; in the
            first step of a call for what [`S2TSession.check`] finds.
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
            self._router.tap.start()
            weakref.finalize(self, self._router.tap.stop)
        self.trace = trace
        scorer = getattr(self.selector, "model", None) or getattr(self.selector, "teacher_model", None)
        self._padding = _padding_token(scorer, pad_token_id)
        self._session: S2TSession | None = None
        self._call: int | None = None
        self._seen_BT: torch.Tensor | None = None
        self._num_padding_B: torch.Tensor | None = None

    def start(self) -> None:
        """Says that a new `generate` call begins: what was seen before is forgotten."""
        self._session, self._seen_BT = None, None
        if self._router is not None:
            self._router.tap.clear()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) with every triggered row fixed to its selected token."""
        if input_ids.shape[1] == 0:
            raise ValueError("S2T as a logits processor reads the prompt's `input_ids`; `inputs_embeds` hide them.")
        calls = calls_of_generate()
        call = id(calls[0]) if calls else None
        is_new = self._session is None or call != self._call or not self._goes_on(input_ids)
        if is_new:
            if any(frame.f_locals.get("generation_mode") not in _ONE_TOKEN_MODES for frame in calls) or (
                self._is_reordered(input_ids) and not calls
            ):
                raise ValueError(
                    "S2T selects one token per row and step: beam search (`num_beams`) and assisted decoding, which "
                    "reorder rows or step back, are not supported."
                )
            self._call = call
            self._session = S2TSession(
                self.selector, self.config, input_ids.shape[1], teacher_model=self.teacher_model, trace=self.trace
            )
            self._num_padding_B = self._count_padding(input_ids)
        self._seen_BT = input_ids
        columns_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask_BT = columns_T >= self._num_padding_B[:, None]
        hidden_BD = self._take_hidden(calls, len(scores))  # before a check runs the model
        if is_new:
            call_locals = calls[0].f_locals if calls else {}
            max_length = getattr(call_locals.get("generation_config"), "max_length", None)
            self._session.check(
                mask_BT,
                scores.shape[-1],
                call_locals.get("self"),
                input_ids=input_ids,
                max_new_tokens=None if max_length is None else max_length - input_ids.shape[1],
            )
        scores = exclude(scores, self.selector.excluded_ids)
        with torch.no_grad():
            result = self._session.step(input_ids, mask_BT, scores, hidden_BD=hidden_BD)
        if self._router is not None:
            self._router.tap.clear()  # scoring ran through the model too
        return fix_tokens(scores, result.token_B, result.asked_B)

    def _take_hidden(self, calls: list[FrameType], batch_size: int) -> torch.Tensor | None:
        """What the router reads (B, D), where exactly one forward has run since the last step: the one that gave the
        logits. A prompt that was read in parts, or a guide that runs the model too, leaves that open."""
        if self._router is None or self._router is not self._session.router:  # exchanged since S2T was made
            return None
        if not calls or calls[0].f_locals.get("self") is not self._router.model:
            return None
        is_clear = self._router.tap.saw_one_forward
        hidden_BTD = self._router.tap.take()
        return hidden_BTD[:, -1] if is_clear and len(hidden_BTD) == batch_size else None

    def _goes_on(self, input_ids: torch.Tensor) -> bool:
        seen = self._seen_BT
        return (
            seen is not None
            and input_ids.shape == (seen.shape[0], seen.shape[1] + 1)
            and input_ids.device == seen.device
            and torch.equal(input_ids[:, :-1], seen)
        )

    def _is_reordered(self, input_ids: torch.Tensor) -> bool:
        """Whether every row goes on with some row of the last step: beams."""
        seen = self._seen_BT
        if seen is None or input_ids.shape != (seen.shape[0], seen.shape[1] + 1):
            return False
        return bool((input_ids[:, None, :-1] == seen[None]).all(-1).any(-1).all())

    def _count_padding(self, input_ids: torch.Tensor) -> torch.Tensor:
        pad_token_id, may_be_text = self._padding
        if pad_token_id is None:
            runs_B = (input_ids == input_ids[:, :1]).long().cumprod(-1).sum(-1)
            if len(input_ids) > 1 and bool((runs_B > 1).any()):
                raise ValueError(
                    "A row begins with a repeated token, which may be padding, and the scoring model's config names "
                    "no `pad_token_id`: pass `pad_token_id=` to S2T (any id that no text begins with if there is no "
                    "padding)."
                )
            return torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        is_pad_BT = input_ids == pad_token_id
        num_padding_B = is_pad_BT.long().cumprod(-1).sum(-1)
        if may_be_text:  # a text may begin with this token (pad = bos or eos): what all rows share is text
            num_padding_B = num_padding_B - num_padding_B.min()
        return num_padding_B.clamp_max(input_ids.shape[1] - 1)


class S2T(LogitsProcessorList):
    """What a user passes: `model.generate(**inputs, logits_processor=S2T(selector))`.

    A `LogitsProcessorList` that holds one [`S2TLogitsProcessor`] (`generate` takes lists only); arguments as there.

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
        # `generate` goes through the list once, when it merges it with its own processors: the start of a new call
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


def calls_of_generate() -> list[FrameType]:
    """Frames of the `generate` calls that this code runs in, innermost first; none where it was called by hand.

    `generate` keeps from processors and custom strategies what they need to know: which model and mode it runs, the
    user's own processors, `streamer`, `assistant_model`. Without a word: a streamer that only ever gets the prompt
    leaves its reader waiting for ever. So they are read where they are.
    """
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code is _GENERATE:
            frames.append(frame)
        frame = frame.f_back
    return frames


def fix_tokens(scores_BV: torch.Tensor, token_B: torch.Tensor, asked_B: torch.Tensor) -> torch.Tensor:
    """Scores in which every asked row has 0 at its token and -inf elsewhere, so that argmax and sampling take it."""
    fixed_BV = torch.full_like(scores_BV, float("-inf")).scatter(-1, token_B[:, None], 0.0)
    return torch.where(asked_B[:, None], fixed_BV, scores_BV)


def _padding_token(scorer: PreTrainedModel | None, pad_token_id: int | None) -> tuple[int | None, bool]:
    """The padding token, and whether a text may begin with it (then only what rows do not share is padding)."""
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
