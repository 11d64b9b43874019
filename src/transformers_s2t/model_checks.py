"""Checks of a model before the first token: it must be a causal language model, give the same logits whether a text is
read in parts or at once, and have room for the text.

Knows models; knows nothing of selectors or sessions. Configs say little of this, so the checks look at modules and
weights, and at the model's logits for a few tokens.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from transformers_s2t.models.facts import prompt_learning_of, random_places, rotary_change
from transformers_s2t.scoring.candidates import PrefixCache
from transformers_s2t.triggers import kl_divergence


#: Nats by which two readings of one text may differ: rounding in float32, and in coarser types.
_TOLERANCE = 1e-3
_COARSE_TOLERANCE = 0.05
_NUM_TRIED = 5  # tokens of the text that both readings are tried on
_NUM_PADDING = 2
#: Errors of a forward that lacks an input, or of a model that takes no cache.
_CANNOT_READ = (TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError)

_FAULTS = {
    "left to right": "is no causal language model: what it says after a prefix depends on the tokens that come after "
    "it (by {:.2g} nats in a text of a few tokens).",
    "parts": "reads a text in parts, on a key/value cache, otherwise than the whole of it at once (by {:.2g} nats "
    "after a few tokens): its scores would be wrong.",
    "padded parts": "reads a text beside padding otherwise than alone (by {:.2g} nats after a few tokens): its scores "
    "would be wrong. Pass rows one by one, without padding.",
}

_found: WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = WeakKeyDictionary()
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_causal: WeakSet[nn.Module] = WeakSet()  # models that passed `check_causal_lm`: their modules are looked at once
_rows: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


# ---------------------------------------------------------------------------------------------------------------------
# What kind of model it is


def check_causal_lm(name: str, model: PreTrainedModel | PeftModel) -> None:
    """Raises a ValueError for a model whose next token S2T cannot read, with the reason.

    Looks at the model's modules and config, without a forward: encoder-decoders, encoders, models without a language
    head and models without weights are refused. [`check_reads_in_parts`] does the rest.

    Args:
        name: name of the argument, for the message.
        model: a loaded model.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base in _causal:
        return
    kind = type(base).__name__

    def refuse(reason: str) -> ValueError:
        return ValueError(f"`{name}` must be a decoder-only causal language model, got {kind}: {reason}.")

    if base.config.is_encoder_decoder:
        raise refuse("an encoder-decoder reads its prompt in another place than its answer")
    if not base.can_generate() or base.get_output_embeddings() is None:
        raise refuse("it has no language head to read the next token from (load it with AutoModelForCausalLM)")
    if _is_encoder(base):
        raise refuse(
            "it is an encoder, whose tokens see what comes after them (`config.is_decoder=True` makes it causal)"
        )
    if _lacks_weights(base):
        raise ValueError(f"`{name}` ({kind}) has no weights: its parameters are on the meta device.")
    _causal.add(base)


def check_models(writer: PreTrainedModel | None, scorers: Mapping[str, PreTrainedModel | PeftModel]) -> None:
    """Checks the models of one call, as far as that needs no forward.

    Args:
        writer: the small model that generates, `None` where it is not known.
        scorers: name of the argument -> a model that S2T runs on a cache of its own; "model" is the writer's.

    Raises:
        ValueError: see [`check_causal_lm`], [`check_evaluates`], [`check_without_virtual_tokens`].
    """
    models = {id(model): (name, model) for name, model in [*scorers.items(), ("model", writer)] if model is not None}
    for name, model in models.values():
        check_causal_lm(name, model)
        check_evaluates(name, model)
    for name, model in scorers.items():
        check_without_virtual_tokens(name, model)
        if name == "model" and writer is not None:  # it may know of a PeftModel around it
            check_without_virtual_tokens(name, writer)


def check_evaluates(name: str, model: PreTrainedModel | PeftModel) -> None:
    """Raises a ValueError for a model in training mode whose dropout would make every forward random."""
    place = next(random_places(model), None)
    if place is not None:
        raise ValueError(
            f"`{name}` is in training mode, and its dropout ({place}) makes what it says random: call `{name}.eval()`."
        )


def check_without_virtual_tokens(name: str, model: PreTrainedModel | PeftModel) -> None:
    """Raises a ValueError for a model that cannot be run on a cache of S2T's own.

    A `PeftModel` puts its virtual tokens in front of every forward, even if the cache holds them already, and the
    model inside has none. An activated LoRA looks for its invocation tokens in the input of a single forward.
    """
    method = prompt_learning_of(model)
    if method is not None:
        raise ValueError(
            f"`{name}` has virtual tokens before its text ({method}), which S2T cannot put before the texts that it "
            "scores on a cache: use an adapter without them, such as LoRA."
        )
    if isinstance(model, PeftModel):
        for adapter in model.active_adapters:
            if getattr(model.peft_config[adapter], "alora_invocation_tokens", None):
                raise ValueError(
                    f"`{name}` has an activated LoRA ({adapter!r}), which begins at its `alora_invocation_tokens`: "
                    "S2T feeds a text in parts, where they are not found. Use plain LoRA."
                )


def _is_encoder(base: PreTrainedModel) -> bool:
    """Whether config and layers both say so: some decoders keep the default `is_decoder=False` in their config."""
    if getattr(base.config.get_text_config(decoder=True), "is_decoder", None) is not False:
        return False
    return any(getattr(module, "is_decoder", None) is False for module in _text_decoder(base).modules())


def _lacks_weights(base: PreTrainedModel) -> bool:
    """Whether weights are on the meta device and no hook of accelerate loads them."""
    if not any(parameter.is_meta for parameter in base.parameters()):
        return False
    return not any(hasattr(module, "_hf_hook") for module in base.modules())


def _text_decoder(base: PreTrainedModel) -> nn.Module:
    decoder = base.get_decoder()
    return base if decoder is None else decoder


# ---------------------------------------------------------------------------------------------------------------------
# What it answers


def check_reads_in_parts(name: str, model: PreTrainedModel | PeftModel, is_padded: bool = False) -> None:
    """Raises a ValueError for a model whose logits differ between a text that is read in parts, on a cache, and the
    same text read at once.

    Each model is tried once, on a few tokens, because there are too many causes to know them by name: attention to
    later tokens (PaliGemma's prompt), virtual tokens, positions numbered differently from `generate` (RoBERTa, and
    RoFormer beside padding), state outside of the cache, required inputs other than the text.

    Args:
        name: name of the argument, for the message.
        model: a loaded model, with the adapters that will be active.
        is_padded: whether padded texts will be read too.
    """
    in_parts, beside_padding = _find_fault(model, "parts"), _find_fault(model, "padded parts")  # always try both
    _raise_fault(name, model, beside_padding if in_parts is None and is_padded else in_parts)


def check_reads_left_to_right(name: str, model: PreTrainedModel | PeftModel) -> None:
    """Raises a ValueError for a model whose logits after a prefix depend on later tokens, or that needs inputs other
    than a text. Tried as in [`check_reads_in_parts`], without a cache."""
    _raise_fault(name, model, _find_fault(model, "left to right"))


def _raise_fault(name: str, model: nn.Module, fault: str | None) -> None:
    if fault is not None:
        kind = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
        hint = f" It is in training mode: call `{name}.eval()`." if model.training else ""
        raise ValueError(f"`{name}` ({kind}) {fault}{hint}")


def _find_fault(model: nn.Module, what: str) -> str | None:
    """The error message for one way of reading a text, `None` where it is sound. Each is tried once for a model."""
    adapters = tuple(model.active_adapters) if isinstance(model, PeftModel) else ()
    key = (what, adapters, model.config._attn_implementation, model.training)  # the result may depend on these
    found = _found.setdefault(model, {})
    if key not in found:
        found[key] = _try(model, what)
    return found[key]


@torch.no_grad()
def _try(model: nn.Module, what: str) -> str | None:
    ids_T = _text_for(model)
    half = (len(ids_T) + 1) // 2
    try:
        if what == "left to right":
            expected_V, found_V = _forward(model, ids_T[:half])[-1], _forward(model, ids_T)[half - len(ids_T) - 1]
        else:
            num_padding = _NUM_PADDING if what == "padded parts" else 0
            expected_V, found_V = _forward(model, ids_T)[-1], _read_in_parts(model, ids_T, num_padding)
    except torch.OutOfMemoryError:
        raise
    except _CANNOT_READ as error:
        return f"cannot be read by text alone, as S2T reads it ({type(error).__name__}: {error})."
    divergence = float(kl_divergence(expected_V[None], found_V[None]))
    wrong = divergence > _tolerance(model)  # False for NaN, which has an error of its own while decoding
    return _FAULTS[what].format(divergence) if wrong else None


def _forward(model: nn.Module, ids_T: list[int]) -> torch.Tensor:
    """Logits (T, V), after one more row for each virtual token."""
    ids_1T = torch.tensor([ids_T], device=model.device)
    return model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits[0]


def _read_in_parts(model: nn.Module, ids_T: list[int], num_padding: int) -> torch.Tensor:
    """Next-token logits (V,), as S2T reads them: some tokens, then one by one."""
    pad_token_id = getattr(model.config.get_text_config(), "pad_token_id", None)
    if pad_token_id is None or not 0 <= pad_token_id < model.get_input_embeddings().weight.shape[0]:
        pad_token_id = 0
    ids_1T = torch.tensor([[pad_token_id] * num_padding + ids_T], device=model.device)
    mask_1T = torch.ones_like(ids_1T, dtype=torch.bool)
    mask_1T[:, :num_padding] = False
    prefix = PrefixCache(model)
    logits_1V = None
    for end in range(max(1, len(ids_T) - 2) + num_padding, ids_1T.shape[1] + 1):
        logits_1V = prefix.feed(ids_1T[:, :end], mask_1T[:, :end], with_logits=True)
    return logits_1V[0]


def _text_for(model: nn.Module) -> list[int]:
    """A few ordinary tokens: no special ones, no padding, no placeholders of images."""
    configs = (model.config, model.config.get_text_config())
    special = set()
    for config in configs:
        for key, value in config.to_dict().items():
            if key.endswith(("token_id", "token_ids", "token_index")):
                special |= set(value) if isinstance(value, (list, tuple)) else {value}
    num_rows = model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()
    num_rows = num_rows if head is None else min(num_rows, head.weight.shape[0])
    ordinary = [id for id in range(min(num_rows, 1000)) if id not in special] or [0]
    length = min(_NUM_TRIED, position_rows(model) or _NUM_TRIED)
    return [ordinary[(7 + 31 * i * i) % len(ordinary)] for i in range(length)]


def _tolerance(model: nn.Module) -> float:
    coarse = (
        model.dtype.itemsize < 4
        or getattr(model, "is_quantized", False)
        or torch.is_autocast_enabled(model.device.type)
    )
    return _COARSE_TOLERANCE if coarse else _TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# How long a text it reads


class Reader(NamedTuple):
    """A model that will read a text.

    Attributes:
        name: name of the argument, for messages.
        model: the model.
        is_scorer: whether S2T runs it on a cache of its own; otherwise `generate` runs it.
        reads_candidates: whether it reads every new token as a candidate before it is chosen, the last one included.
            Otherwise the last one is never read.
    """

    name: str
    model: PreTrainedModel | PeftModel
    is_scorer: bool = True
    reads_candidates: bool = False

    def room(self, shortest: int) -> int | None:
        """How many tokens a text may have, `None` for any number.

        Args:
            shortest: tokens of the shortest prompt. Rotary positions that change once ([`rotary_change`]) do not limit
                prompts that are longer than that already.
        """
        rows, change = position_rows(self.model), rotary_change(self.model)
        if change is not None and self.is_scorer and (change.again or shortest <= change.length):
            return change.length if rows is None else min(rows, change.length)
        return rows


def position_rows(model: PreTrainedModel | PeftModel) -> int | None:
    """Number of rows in a model's table of position embeddings; `None` where positions are computed.

    A longer text would be an IndexError (on a GPU, a lost process). Tables are counted because configs name their
    lengths differently, and do not count the rows that OPT and BART skip.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base not in _rows:
        _rows[base] = min(_position_tables(base), default=None)
    return _rows[base]


def _position_tables(base: PreTrainedModel) -> list[int]:
    rows = []
    for name, module in _text_decoder(base).named_modules():
        part = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (part == "wpe" or "pos" in part):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            rows.append(module.weight.shape[0] - getattr(module, "offset", skipped))
        # sines and cosines that are looked up: GPT-J, CTRL
        for key, table in module.named_buffers(recurse=False):
            if "pos" in key and table.dim() == 2 and table.is_floating_point():
                rows.append(table.shape[0])
    return rows


def context_length(model: PreTrainedModel | PeftModel | PretrainedConfig) -> int | None:
    """Number of tokens that a model can read, or was made for; `None` where neither is known."""
    if isinstance(model, PretrainedConfig):
        length = getattr(model.get_text_config(), "max_position_embeddings", None)
        return None if length is None or length < 1 else length  # XLNet's is -1
    rows = position_rows(model)
    return context_length(model.config) if rows is None else rows


def check_context(
    readers: Iterable[Reader], length: int, max_new_tokens: int | None = None, shortest: int | None = None
) -> None:
    """Checks before the first token that prompt and new tokens fit.

    Args:
        readers: the models that will read the text.
        length: tokens of the longest prompt, without padding.
        max_new_tokens: most new tokens; `None` where that is not known, see [`check_room`].
        shortest: tokens of the shortest prompt; `None` for `length`.

    Raises:
        ValueError: a prompt that fills a context; more tokens than a model has room for, see [`Reader.room`].

    Warns:
        UserWarning: where prompt and new tokens exceed the context of a model that computes positions. Decoding
            continues, with text and scores that the model was not trained for. Once for each model, because the text
            may end earlier.
    """
    for reader in readers:
        name, model = reader.name, reader.model
        rows, context = position_rows(model), context_length(model)
        if context is not None and length >= context:
            source = "max_position_embeddings" if rows is None else "rows of its position embeddings"
            raise ValueError(
                f"The prompt has {length} tokens, but `{name}` reads at most {context} ({source}): shorten the prompt."
            )
        if max_new_tokens is None:
            continue
        not_read = 0 if reader.reads_candidates else 1
        num_read = length + max_new_tokens - not_read
        room = reader.room(length if shortest is None else shortest)
        if room is not None and num_read > room:
            if room == rows:
                reason = f"has position embeddings for {room}"
            else:
                reason = (
                    f"gives all tokens other rotary positions beyond {room} "
                    f"(rope_type={rotary_change(model).rope_type!r}), which a cache of shorter texts does not hold"
                )
            raise ValueError(
                f"`max_new_tokens` must be at most {max(room - length + not_read, 0)}: the prompt has {length} tokens "
                f"and `{name}` {reason}; got {max_new_tokens}."
            )
        warned = _warned.setdefault(model, set())
        if context is not None and num_read > context and name not in warned:
            warned.add(name)
            warnings.warn(
                f"The prompt has {length} tokens and `max_new_tokens` is {max_new_tokens}, but `{name}` was made for "
                f"{context} (max_position_embeddings): beyond that, what it says may be poor.",
                stacklevel=2,
            )


def check_room(name: str, room: int | None, mask_BT: torch.Tensor, num_more: int = 0) -> None:
    """Raises a ValueError where a model is about to read more tokens than it has room for.

    For calls that did not say how many tokens would follow.

    Args:
        name: name of the argument, for the message.
        room: most tokens, from [`Reader.room`].
        mask_BT: mask of the text that is about to be read; bool, False at padding.
        num_more: tokens that follow the text.
    """
    if room is None or mask_BT.shape[1] + num_more <= room:
        return
    length = int(mask_BT.sum(-1).max()) + num_more
    if length > room:
        raise ValueError(
            f"The text has grown to {length} tokens, but `{name}` has positions for {room}: generate fewer tokens."
        )
