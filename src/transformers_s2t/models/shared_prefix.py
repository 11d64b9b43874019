"""Tokens that all rows of a batch begin with (a system prompt, a chat template, few-shot examples) are read once.

Rows are laid out as `[shared][padding][own]`. One forward of a single row fills a cache with the shared tokens, and
all rows continue from it. Positions and masks are those of the padded rows, so logits are the same up to rounding.

Legend: B rows, T columns, P shared tokens, D hidden size.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from transformers_s2t.models.facts import prompt_learning_of, random_places, rotary_change
from transformers_s2t.models.views import get_decoder


#: Fewer shared tokens are not worth a forward of their own.
MIN_SHARED = 8
#: The only inputs of a forward in which [`share_in_forward`] shares tokens.
_PLAIN_INPUTS = {"input_ids", "attention_mask", "return_dict"}


def without_wrapper(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model inside a `PeftModel`, with its adapters as they are."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def can_share(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model can continue from a cache of shared tokens that padding follows.

    This takes full attention in all layers (windows count padding as columns, and recurrent layers read padding),
    rotary positions that do not change with the length of the whole text, and no virtual tokens in front of it.
    """
    if prompt_learning_of(model) is not None:
        return False
    model = without_wrapper(model)
    if not model._supports_attention_backend or model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    if rotary_change(model) is not None:
        return False
    if "past_key_values" not in inspect.signature(type(get_decoder(model)).forward).parameters:
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens P that all rows begin with: fewer than any row has, and 0 where sharing is not worth it."""
    if len(rows) < 2:
        return 0
    common = os.path.commonprefix([list(row) for row in rows])
    length = min(len(common), min(map(len, rows)) - 1)
    return length if length >= MIN_SHARED else 0


def shared_columns(input_ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> int:
    """[`shared_length`] of rows in a tensor: number of first columns that are the same text in all rows."""
    if len(input_ids_BT) < 2:
        return 0
    same_T = (input_ids_BT == input_ids_BT[:1]).all(0) & mask_BT.bool().all(0)
    length = min(int(same_T.long().cumprod(0).sum()), input_ids_BT.shape[1] - 1)
    return length if length >= MIN_SHARED else 0


def pad_prompts(
    prompt_ids: Sequence[Sequence[int]], pad_token_id: int, models: Iterable[PreTrainedModel] = ()
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) for `generate`: shared tokens, then padding, then each prompt's own.

    Args:
        prompt_ids: token ids, one prompt a row.
        pad_token_id: fills shorter prompts.
        models: all models that will read the text. Where one of them cannot share ([`can_share`]), all padding is on
            the left, as usual with `generate`.
    """
    models = list(models)
    shared = shared_length(prompt_ids) if models and all(map(can_share, models)) else 0
    width = max(map(len, prompt_ids))
    input_ids_BT = torch.full((len(prompt_ids), width), pad_token_id)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, ids in enumerate(prompt_ids):
        own = len(ids) - shared
        for part, tokens in ((slice(0, shared), ids[:shared]), (slice(width - own, width), ids[shared:])):
            input_ids_BT[b, part] = torch.tensor(tokens, dtype=torch.long)
            mask_BT[b, part] = 1
    return {"input_ids": input_ids_BT, "attention_mask": mask_BT}


class Shared(NamedTuple):
    """What [`share`] returns.

    Attributes:
        cache: cache of the P shared tokens, B rows.
        hidden_BPD: last hidden states of these tokens.
    """

    cache: Cache
    hidden_BPD: torch.Tensor


def share(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    gives_positions: bool = True,
) -> Shared | None:
    """Reads the tokens that all rows begin with as one row, with gradient if that is enabled; `None` where nothing is
    shared.

    Args:
        model: causal language model, or a view of one.
        input_ids, attention_mask: (B, T), from [`pad_prompts`], or padded on the right.
        gives_positions: whether the forward that follows passes the positions 0, 1, 2 ..., as `generate` does.
            Otherwise the model numbers the tokens itself, and RoBERTa does not begin at 0.
    """
    length = shared_columns(input_ids, attention_mask)
    if not length or not can_share(model) or _drops_caches(model):
        return None
    model = without_wrapper(model)
    cache = DynamicCache(config=model.config)
    positions = {"position_ids": torch.arange(length, device=model.device)[None]} if gives_positions else {}
    output = get_decoder(model)(
        input_ids=input_ids[:1, :length].to(model.device),
        attention_mask=torch.ones(1, length, dtype=torch.long, device=model.device),
        past_key_values=cache,
        use_cache=True,
        **positions,
    )
    if cache.get_seq_length() != length:
        return None
    repeat_rows(cache, len(input_ids))
    return Shared(cache, output.last_hidden_state.expand(len(input_ids), -1, -1))


def _drops_caches(model: torch.nn.Module) -> bool:
    """Whether layers are checkpointed: then they fill no cache."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def runs_alone() -> bool:
    """Whether there is one process only: processes that hold shards of the weights must run equally many forwards."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def is_random(model: torch.nn.Module) -> bool:
    """Whether a forward is random, by dropout for example. Rows that share tokens would then share what is drawn."""
    return next(random_places(model), None) is not None


@torch.no_grad()
def read_shared(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    gives_positions: bool = True,
) -> Cache | None:
    """The cache of [`share`], without gradient."""
    shared = share(model, input_ids, attention_mask, gives_positions)
    return None if shared is None else shared.cache


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_copies: int
) -> Cache | None:
    """A cache of prompts without their last tokens, each row repeated, so that several samples of a prompt start from
    one reading of it. `None` where the model cannot share.

    Args:
        model: causal language model.
        input_ids, attention_mask: (B, T), from [`pad_prompts`].
        num_copies: how often each row is repeated.
    """
    if not can_share(model) or input_ids.shape[1] < 2:
        return None
    model = without_wrapper(model)
    cache = read_shared(model, input_ids, attention_mask) or DynamicCache(config=model.config)
    own = slice(cache.get_seq_length(), -1)
    if input_ids[:, own].shape[1]:
        get_decoder(model)(
            input_ids=input_ids[:, own].to(model.device),
            attention_mask=attention_mask[:, :-1].to(model.device),
            position_ids=positions_from_mask(attention_mask)[:, own].to(model.device),
            past_key_values=cache,
            use_cache=True,
        )
    cache.batch_repeat_interleave(num_copies)
    return cache


def positions_from_mask(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own text, as `generate` numbers them: padding on the left counts as 1."""
    positions_BT = attention_mask_BT.long().cumsum(-1) - 1
    return positions_BT.masked_fill(attention_mask_BT == 0, 1)


def repeat_rows(cache: Cache, batch_size: int) -> None:
    """Turns a cache of one row into one of `batch_size` rows, without copying: layers grow by concatenation."""
    for layer in (layer for layer in cache.layers if layer.is_initialized):
        layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
        layer.values = layer.values.expand(batch_size, -1, -1, -1)


def share_in_forward(model: PreTrainedModel) -> None:
    """Makes the model's own forward read tokens that all rows begin with once; gradients flow through them.

    For training with long prompts in one process: the loss and all gradients stay the same up to rounding. Forwards
    that may return a cache (`use_cache` is not False) or all hidden states, or that are given positions or embeddings,
    run unchanged. So does every forward that is random (dropout), because all rows would share what is drawn.

    Args:
        model: causal language model; LoRA layers in it are trained as usual.

    Raises:
        ValueError: where it cannot share ([`can_share`]).
    """
    if not can_share(model):
        raise ValueError(f"{type(model).__name__} cannot go on from a cache of other rows.")
    decoder = get_decoder(model)
    own = decoder.forward

    @functools.wraps(own)
    def forward(*args, **kwargs):
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        ids_BT, mask_BT = kwargs.get("input_ids"), kwargs.get("attention_mask")
        shared = None
        is_plain = not args and given <= _PLAIN_INPUTS and given >= {"input_ids", "attention_mask"}
        is_plain = is_plain and mask_BT.dim() == 2 and kwargs.get("use_cache") is False
        if is_plain and not decoder.config.output_hidden_states:
            decoder.forward = own
            try:
                shared = None if is_random(decoder) else share(model, ids_BT, mask_BT, gives_positions=False)
            finally:
                decoder.forward = forward
        if shared is None:
            return own(*args, **kwargs)
        length = shared.hidden_BPD.shape[1]
        output = own(
            input_ids=ids_BT[:, length:],
            attention_mask=mask_BT,
            past_key_values=shared.cache,
            use_cache=True,
        )
        output.last_hidden_state = torch.cat([shared.hidden_BPD, output.last_hidden_state], dim=1)
        output.past_key_values = None
        return output

    decoder.forward = forward
