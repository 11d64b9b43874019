"""`s2t_generate`: the cached loop, `model.generate(..., custom_generate=s2t_generate, selector=...)`.

Owns the decoding loop and the KV cache, so that candidates are scored on the cache that decoding keeps anyway.
Same tokens as the logits processor; does not know how a selector scores.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import BaseQuantizedLayer, DynamicLayer, StaticLayer
from transformers.generation import (
    BaseStreamer,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    GenerationMode,
    LogitNormalization,
    MinPLogitsWarper,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from transformers_s2t.config import S2TDecodingConfig
from transformers_s2t.decoding.call import eos_token_ids, prompt_mask, running_calls
from transformers_s2t.decoding.logits_process import S2TLogitsProcessor, fix_tokens, resolve_selector
from transformers_s2t.decoding.selectors import Selector
from transformers_s2t.decoding.session import S2TSession, S2TTrace, check_choosable
from transformers_s2t.model_checks import check_causal_lm
from transformers_s2t.models.forwards import cache_argument
from transformers_s2t.models.shared_prefix import read_shared
from transformers_s2t.proposals import exclude


# processors that `generate` puts after the user's own
_WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TopHLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    WatermarkLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    LogitNormalization,
)


def s2t_generate(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    selector: Selector | None = None,
    teacher_model: PreTrainedModel | None = None,
    decoding_config: S2TDecodingConfig | None = None,
    trace: S2TTrace | None = None,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """Decoding strategy for `model.generate(**inputs, custom_generate=s2t_generate, selector=selector)`.

    Greedy and sampled decoding as `generate` does them, except that a triggered step emits the selected token. Takes
    `generate`'s own `streamer=`. In place of `stop_strings=` pass `stopping_criteria=[StopStringCriteria(tokenizer,
    [...])]`: `generate` keeps `tokenizer` from custom strategies.

    Args:
        model: the small model (passed by `generate`, as are `input_ids` (B, T), `logits_processor`,
            `stopping_criteria`, `generation_config` and `model_kwargs`).
        selector: [`LocalSelector`] (S2T-Local) or [`TeacherSelector`] (S2T).
        teacher_model: without a selector, the teacher selects; with a local one, the oracle of the "kl" trigger.
        decoding_config: how to select; `None` for the selector's defaults.
        trace: filled with what happens in this call.

    Returns:
        Token ids (B, T + new), or `GenerateDecoderOnlyOutput` with `return_dict_in_generate=True`.

    Raises:
        ValueError: for generation modes that selection has no meaning for (beams, assisted decoding), caches that do
            not grow, `use_cache=False`, thresholds that were never calibrated, a teacher with other token ids, a
            model that is no causal language model, a text that does not fit into a model's context, more candidates
            than tokens, and logits that are NaN.
    """
    selector = resolve_selector(selector, teacher_model)
    call = next(iter(running_calls()), None)
    _refuse_unsupported(
        model, selector, generation_config, logits_processor, model_kwargs, call.assistant_model if call else None
    )
    session = S2TSession(
        selector,
        decoding_config,
        input_ids.shape[1],
        teacher_model=teacher_model,
        trace=trace,
        model=model,
        prompt_embeds_BTD=model_kwargs.get("inputs_embeds"),
    )
    mask_BT = prompt_mask(input_ids, model_kwargs, generation_config, takes_embeds=not session.runs_teacher)
    if session.router is not None and session.router.model is not model:
        raise ValueError(
            "The router of `selector` was loaded for another model object than the one that generates; pass the same "
            "`model` to Router.from_pretrained(path, model)."
        )
    session.check(
        mask_BT,
        model.get_output_embeddings().weight.shape[0],
        model,
        input_ids,
        eos_token_ids(generation_config),
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
    )
    with torch.no_grad():
        return _decode(
            selector.writer(session.views),
            input_ids,
            mask_BT,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            session,
            call.streamer if call else None,
            call.own_processors if call else [],
        )


def _guard_continuous_batching() -> None:
    """Makes `generate_batch` (and `cache_implementation="paged"`, which leads there) refuse S2T.

    It silently drops `logits_processor` and `custom_generate`, so it would return the base model's text, and no code
    of S2T runs that could raise an error.
    """
    owner = next(kind for kind in GenerationMixin.__mro__ if "generate_batch" in vars(kind))
    generate_batch = owner.generate_batch

    @functools.wraps(generate_batch)
    def guarded(self, *args, **kwargs):
        call = next(iter(running_calls()), None)  # a `generate(cache_implementation="paged")` around this call
        strategies = (kwargs.get("custom_generate"), call.custom_generate if call else None)
        given = kwargs.get("logits_processor") or []
        processors = [*(list.__iter__(given) if isinstance(given, list) else [given])]
        processors += call.own_processors if call else []
        if s2t_generate in strategies or any(isinstance(one, S2TLogitsProcessor) for one in processors):
            raise ValueError(
                "Continuous batching (`generate_batch`, cache_implementation='paged') ignores logits processors and "
                "custom strategies: S2T would not take part. Use `generate` with a batch of prompts."
            )
        return generate_batch(self, *args, **kwargs)

    owner.generate_batch = guarded


_guard_continuous_batching()


def _decode(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    mask_BT: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict,
    session: S2TSession,
    streamer: BaseStreamer | None,
    own_processors: list[LogitsProcessor],
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """The loop: the same order of operations as `GenerationMixin._sample`, with [`S2TSession.step`] in the middle.

    `model` is a view of the one that `generate` was called on.
    """
    pad_token_id = generation_config._pad_token_tensor
    if pad_token_id is not None:
        pad_token_id = pad_token_id.to(input_ids.device)
    has_eos = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    do_sample = generation_config.do_sample
    as_dict = generation_config.return_dict_in_generate
    all_scores = () if as_dict and generation_config.output_scores else None
    all_logits = () if as_dict and generation_config.output_logits else None

    processors, warpers = _split_processors(logits_processor, own_processors)
    unfinished_B = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    cache = model_kwargs.get("past_key_values")
    is_new = type(cache) is DynamicCache and not cache.get_seq_length()
    is_new = is_new and all(type(layer) is DynamicLayer for layer in cache.layers)  # none of a class of the user's
    if is_new and model_kwargs.get("inputs_embeds") is None:
        shared = read_shared(model, input_ids, mask_BT)
        cache.layers = cache.layers if shared is None else shared.layers
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    logits_BV = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    cache = model_kwargs.get(cache_argument(model))
    if not isinstance(cache, Cache):
        raise ValueError(
            f"s2t_generate needs a key/value cache to score candidates on, but {type(model).__name__} returned "
            f"{type(cache)}. Use logits_processor=S2T(...) with a teacher, or another model."
        )
    session.student_cache = cache
    hidden_BD = session.take_hidden()
    del outputs

    while True:
        scores_BV = exclude(processors(input_ids, logits_BV), session.excluded_ids)

        # the tokens of rows that are not asked
        warped_BV = warpers(input_ids, scores_BV)
        if do_sample:
            check_choosable(scores_BV)  # multinomial's own error does not say what is wrong
            default_B = torch.multinomial(nn.functional.softmax(warped_BV, dim=-1), num_samples=1).squeeze(1)
        else:
            default_B = warped_BV.argmax(-1)
        active_B = None  # without an end-of-sequence token, rows that stopped continue until all have
        if has_eos:
            active_B = unfinished_B.bool()
            default_B = default_B * unfinished_B + pad_token_id * (1 - unfinished_B)

        result = session.step(input_ids, mask_BT, scores_BV, active_B, default_B, hidden_BD)
        token_B = torch.where(result.asked_B, result.token_B, default_B)
        if as_dict and all_scores is not None:
            all_scores += (fix_tokens(warped_BV, result.token_B, result.asked_B),)
        if as_dict and all_logits is not None:
            all_logits += (logits_BV,)

        input_ids = torch.cat([input_ids, token_B[:, None]], dim=-1)
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=-1)
        if streamer is not None:
            streamer.put(token_B.cpu())
        unfinished_B = unfinished_B & ~stopping_criteria(input_ids, all_scores)
        if not bool(unfinished_B.any()):
            break

        if result.advance is not None:  # scoring was the next forward: only the bookkeeping is left to do
            logits_BV, hidden_BD = result.advance()
            model_kwargs = model._update_model_kwargs_for_generation({}, model_kwargs)
            continue
        model_inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        outputs = model(**model_inputs, return_dict=True)
        logits_BV = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        hidden_BD = session.take_hidden()
        del outputs

    if streamer is not None:
        streamer.end()
    if as_dict:
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=all_scores, logits=all_logits, past_key_values=cache
        )
    return input_ids


def _split_processors(
    logits_processor: LogitsProcessorList, own_processors: list[LogitsProcessor]
) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """The processors that shape the proposals, and those that only shape the steps that are not asked (warpers ...).

    As on the processor path, where S2T comes after the user's own processors and before those that `generate` adds.
    """
    own = {id(processor) for processor in own_processors}
    start = max((i + 1 for i, processor in enumerate(logits_processor) if id(processor) in own), default=0)
    tail = (i for i, processor in enumerate(logits_processor) if i >= start and isinstance(processor, _WARPERS))
    first = next(tail, len(logits_processor))
    return LogitsProcessorList(logits_processor[:first]), LogitsProcessorList(logits_processor[first:])


def _refuse_unsupported(
    model: PreTrainedModel,
    selector: Selector,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    model_kwargs: dict,
    assistant_model: PreTrainedModel | None,
) -> None:
    """Raises errors, before the prefill, for settings with which the cached loop would silently go wrong."""
    check_causal_lm("model", model)
    mode = generation_config.get_generation_mode(assistant_model)
    if generation_config.num_beams and generation_config.num_beams > 1:
        raise ValueError(f"s2t_generate selects one token per row: `num_beams` must be 1 (mode: {mode.value}).")
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "s2t_generate cannot be combined with assisted decoding (`assistant_model`, `prompt_lookup_num_tokens`, "
            "`assistant_early_exit`, `use_mtp`): a draft's tokens would go unselected."
        )
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"s2t_generate decodes greedily or by sampling, but these settings mean {mode.value}.")
    if not generation_config.use_cache:
        raise ValueError("s2t_generate scores candidates on the key/value cache: `use_cache` must be True.")
    if generation_config.dola_layers is not None:
        raise ValueError("s2t_generate cannot be combined with DoLa decoding (`dola_layers`).")
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(generation_config, name):
            raise ValueError(f"s2t_generate does not return what `{name}` asks for; use logits_processor=S2T(...).")
    if any(isinstance(processor, S2TLogitsProcessor) for processor in logits_processor):
        raise ValueError(
            "s2t_generate selects by itself: S2T in `logits_processor` would do it a second time. Pass one of the two."
        )
    cache = model_kwargs.get("past_key_values")
    if isinstance(cache, Cache):
        if any(isinstance(layer, (StaticLayer, BaseQuantizedLayer)) for layer in cache.layers):
            raise ValueError(
                "s2t_generate needs a cache that grows (cache_implementation='dynamic'); static and quantized caches "
                "are not supported. logits_processor=S2T(...) works with them."
            )
        if cache.offloading:
            raise ValueError(
                "s2t_generate forks the cache at every selection: offloaded caches are not supported. "
                "logits_processor=S2T(...) works with them."
            )
    scored = getattr(selector, "model", None)
    if scored is not None and scored is not model:
        raise ValueError(
            "`selector` was loaded into another model object than the one that generates; pass the same `model` to "
            "LocalSelector.from_pretrained(path, model) and call its `generate`."
        )
