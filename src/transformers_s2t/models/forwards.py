"""Hidden states and logits of causal language models, in one forward and in parts.

Legend: B rows, T tokens, N or M positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformers_s2t.models.facts import prompt_learning_of
from transformers_s2t.models.shared_prefix import (
    read_shared,
    without_wrapper,
)
from transformers_s2t.models.views import (
    copy_module,
    get_decoder,
    innermost_decoder,
    make_view,
)


def fork_cache(cache: Cache, row_index: torch.Tensor | None = None) -> Cache:
    """A cache that can be fed without touching `cache`, with rows picked by `row_index` (all rows if `None`).

    Plain layers are forked without a copy: they grow by concatenation, which leaves the original tensors alone.
    """
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
    else:
        fork = copy.deepcopy(cache)
    if row_index is not None:
        fork.reorder_cache(row_index)
    return fork


def is_recurrent(cache: Cache) -> bool:
    """Whether some layer keeps a state in place of keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which the model takes its cache.

    Raises:
        ValueError: where it takes none, or only one of its own class. A `**kwargs` would swallow the cache, and every
            token would be scored without a prefix.
    """
    name = _cache_argument(type(get_decoder(model)))
    if name is None or not model._supports_default_dynamic_cache():
        raise ValueError(f"S2T scores candidates on a cached prefix, but {type(model).__name__} takes no cache.")
    return name


@functools.cache
def _cache_argument(decoder_class: type[nn.Module]) -> str | None:
    names = inspect.signature(decoder_class.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


def hidden_and_logits(model: PreTrainedModel, num_logits: int, **inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Last hidden states (B, Q, D) of one forward and, where asked for, the logits of its last `num_logits` tokens.

    Logits are the model's own, soft-caps and scales included.
    """
    if not num_logits:
        return get_decoder(model)(**inputs).last_hidden_state, None
    seen: list[torch.Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda *call: seen.append(call[-1][0]))
    try:
        keep = {"logits_to_keep": num_logits} if model._supports_logits_to_keep() else {}
        logits_BQV = model(**inputs, **keep).logits
    finally:
        handle.remove()
    return seen[-1], logits_BQV[:, -num_logits:]


def text_logits(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """The model's own logits (N, V) from last hidden states, soft-caps and scales included.

    Runs a view of the model whose decoder returns these hidden states, because soft-caps and scales have too many
    names to be looked up in a config (see [`head_is_plain`]).

    Raises:
        ValueError: where the model's forward does not call its decoder.
    """
    decoder, seen = innermost_decoder(model), []

    def given(*args, **kwargs) -> _GivenHidden:
        seen.append(True)
        return _GivenHidden(last_hidden_state=hidden_ND[None])

    stub = copy_module(decoder, decoder._modules)
    hooks = {name: type(value)() for name, value in stub.__dict__.items() if "hooks" in name and value}
    stub.__dict__ |= hooks | {"forward": given}  # nothing runs here that a hook should see
    view = make_view(model, {id(decoder): stub})
    # as many ids as hidden states: ModernBERT takes its shapes from them
    ids_1N = torch.zeros(1, len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
    logits_NV = view(input_ids=ids_1N).logits[0]
    if not seen:
        raise ValueError(f"{type(model).__name__} does not compute its logits from its decoder's hidden states.")
    return logits_NV


class _GivenHidden(BaseModelOutputWithPast):
    """A decoder's output that has hidden states only; every other field is `None`."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # caches, router logits, attentions: by many names


def head_is_plain(model: PreTrainedModel, hidden_BMD: torch.Tensor, logits_BMV: torch.Tensor) -> bool:
    """Whether logits are the output embedding of the last hidden state and nothing more (no soft-cap, no scaling).

    Decided by what the model returned, never by names in its config: there are too many of them
    (`final_logit_softcapping`, `logit_scale`, `logits_scaling`, `lm_head_multiplier`, `output_multiplier` ...).
    """
    head = model.get_output_embeddings()
    if hidden_BMD.shape[-1] != head.weight.shape[-1] or hidden_BMD.device != logits_BMV.device:
        return False
    own_BMV = head(hidden_BMD).float()
    tolerance = 1e-2 if hidden_BMD.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool(((own_BMV - logits_BMV.float()).abs() <= tolerance * own_BMV.abs().amax()).all())


def check_state_is_cached(model: PreTrainedModel, cache: Cache) -> None:
    """Raises a ValueError for a model that keeps its state in its modules (RecurrentGemma), not in the cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    if model._is_stateful and not all(any(layer.has_previous_state.values()) for layer in layers):
        raise ValueError(
            f"S2T scores candidates on a copy of the cache, but {type(model).__name__} keeps its recurrent state "
            "outside of the cache."
        )


def logits_from(model: PreTrainedModel, sequences: Sequence[Sequence[int]], first: int) -> torch.Tensor:
    """Logits (B, T - first, V) of right-padded rows, in the model's own type.

    Without gradient, tokens that all rows begin with are read once (`shared_prefix`).
    """
    width = max(map(len, sequences))
    keep = {"logits_to_keep": width - first} if "logits_to_keep" in signature(model.forward).parameters else {}
    return model(**_right_padded(model, sequences, first), **keep).logits[:, -(width - first) :]


class TextLogits:
    """Logits along right-padded rows, computed when they are asked for.

    Until then hidden states are kept, which are far smaller for a large vocabulary. For a model with virtual tokens in
    front of every text, all logits are computed at once.

    Args:
        model: causal language model.
        sequences: token ids of the rows.
        first: the first position that will be asked for.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, sequences: Sequence[Sequence[int]], first: int):
        self.model, self.first = model, first
        self.has_logits = prompt_learning_of(model) is not None
        if self.has_logits:
            self.kept_BTX = logits_from(model, sequences, first)
        else:
            output = get_decoder(without_wrapper(model))(**_right_padded(model, sequences, first))
            self.kept_BTX = output.last_hidden_state[:, -(max(map(len, sequences)) - first) :]

    def at(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Logits (S, V) of a row at the positions from `start` up to `stop`."""
        kept_SX = self.kept_BTX[row, start - self.first : stop - self.first]
        return kept_SX if self.has_logits else text_logits(self.model, kept_SX)


def _right_padded(model: PreTrainedModel, sequences: Sequence[Sequence[int]], first: int) -> dict[str, Any]:
    """Inputs of a forward over right-padded rows. Without gradient, tokens up to `first` that all rows begin with are
    read already, into a cache."""
    width = max(len(ids) for ids in sequences)
    input_ids_BT = torch.zeros((len(sequences), width), dtype=torch.long)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, ids in enumerate(sequences):
        input_ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = 1
    cache = None
    if not torch.is_grad_enabled():
        ids_BF, mask_BF = input_ids_BT[:, : first + 1], mask_BT[:, : first + 1]
        cache = read_shared(model, ids_BF, mask_BF, gives_positions=False)
    inputs = {"attention_mask": mask_BT.to(model.device), "use_cache": cache is not None}
    if cache is not None:
        inputs["past_key_values"] = cache
        input_ids_BT = input_ids_BT[:, cache.get_seq_length() :]
    return {"input_ids": input_ids_BT.to(model.device), **inputs}


def head_rows(model: PreTrainedModel) -> int:
    """Number of rows of the output head."""
    return model.get_output_embeddings().weight.shape[0]
