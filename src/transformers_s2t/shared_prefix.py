"""What all rows of a batch begin with (a system prompt, a chat template, few-shot examples) is read once.

Rows are laid out as `[shared][padding][own]`. One forward of a single row fills the cache of the shared tokens, which
all rows then go on from. Positions and masks are those of the padded rows, so the logits are too, but for rounding.

Legend: B rows, T columns, P shared tokens, D hidden size.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .views import get_decoder


#: Fewer shared tokens are not worth a forward of their own.
MIN_SHARED = 8
#: What a forward may be given for [`share_in_forward`] to share.
_PLAIN_INPUTS = {"input_ids", "attention_mask", "use_cache", "return_dict"}


def can_share(model: PreTrainedModel) -> bool:
    """Whether the model can go on from a cache of other rows, with padding behind it.

    Full attention in all layers: windows count columns, padding among them, and recurrent layers read padding.
    """
    if not model._supports_attention_backend or model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    if "past_key_values" not in inspect.signature(type(get_decoder(model)).forward).parameters:
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens P all rows begin with: fewer than any row has, and 0 where sharing is not worth it."""
    if len(rows) < 2:
        return 0
    shortest, most = min(map(len, rows)), list(os.path.commonprefix([list(row) for row in rows]))
    length = min(len(most), shortest - 1)
    return length if length >= MIN_SHARED else 0


def shared_columns(input_ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> int:
    """[`shared_length`] of rows in a tensor: how many columns at its beginning are the same text in all rows."""
    if len(input_ids_BT) < 2:
        return 0
    same_T = (input_ids_BT == input_ids_BT[:1]).all(0) & mask_BT.bool().all(0)
    length = min(int(same_T.long().cumprod(0).sum()), input_ids_BT.shape[1] - 1)
    return length if length >= MIN_SHARED else 0


def pad_prompts(
    prompt_ids: Sequence[Sequence[int]], pad_token_id: int, models: Iterable[PreTrainedModel] = ()
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) for `generate`: what the prompts share first, then padding.

    Args:
        prompt_ids: token ids, one prompt a row.
        pad_token_id: for shorter prompts.
        models: all that will read the text. Where one of them cannot share ([`can_share`]), all padding is on the
            left, as `generate` has it.
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
        cache: of P tokens, B rows.
        hidden_BPD: last hidden states of these tokens.
    """

    cache: Cache
    hidden_BPD: torch.Tensor


def share(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Shared | None:
    """Reads what the rows begin with as one row, with gradient where one is wanted; `None` where nothing is shared.

    Args:
        model: causal language model, or a view of one.
        input_ids, attention_mask: (B, T), of [`pad_prompts`], or rows that are padded on the right.
    """
    length = shared_columns(input_ids, attention_mask)
    if not length or not can_share(model):
        return None
    cache = DynamicCache(config=model.config)
    output = get_decoder(model)(
        input_ids=input_ids[:1, :length].to(model.device),
        attention_mask=torch.ones(1, length, dtype=torch.long, device=model.device),
        position_ids=torch.arange(length, device=model.device)[None],
        past_key_values=cache,
        use_cache=True,
    )
    repeat_rows(cache, len(input_ids))
    return Shared(cache, output.last_hidden_state.expand(len(input_ids), -1, -1))


@torch.no_grad()
def read_shared(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Cache | None:
    """The cache of [`share`], without gradient."""
    shared = share(model, input_ids, attention_mask)
    return None if shared is None else shared.cache


def draws_dropout(model: torch.nn.Module) -> bool:
    """Whether a forward would draw a dropout: for rows that share tokens once, not for each."""
    return any(isinstance(module, torch.nn.Dropout) and module.p and module.training for module in model.modules())


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_copies: int
) -> Cache | None:
    """The cache of prompts without their last tokens, each prompt `num_copies` times: several samples of a prompt go
    on from one reading of it. `None` where the model cannot share.

    Args:
        model: causal language model.
        input_ids, attention_mask: (B, T), of [`pad_prompts`].
        num_copies: of each row.
    """
    if not can_share(model) or input_ids.shape[1] < 2:
        return None
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
    """Makes a cache of one row one of `batch_size` rows, without copies: layers grow by concatenation."""
    for layer in (layer for layer in cache.layers if layer.is_initialized):
        layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
        layer.values = layer.values.expand(batch_size, -1, -1, -1)


def share_in_forward(model: PreTrainedModel) -> None:
    """From now on the model's own forward over several rows reads what they begin with once; gradients go through it.

    For training with long prompts: the loss and all gradients stay what they are, but for rounding. Forwards that have
    a cache, positions or embeddings of their own are run as they are, and so is everything while a dropout is active,
    which would be drawn once for all rows.

    Args:
        model: causal language model; LoRA layers in it are trained as ever.

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
        if not args and given <= _PLAIN_INPUTS and given >= {"input_ids", "attention_mask"} and mask_BT.dim() == 2:
            decoder.forward = own
            try:
                shared = None if draws_dropout(decoder) else share(model, ids_BT, mask_BT)
            finally:
                decoder.forward = forward
        if shared is None:
            return own(*args, **kwargs)
        length = shared.hidden_BPD.shape[1]
        output = own(
            input_ids=ids_BT[:, length:],
            attention_mask=mask_BT,
            position_ids=positions_from_mask(mask_BT)[:, length:],
            past_key_values=shared.cache,
            use_cache=True,
        )
        output.last_hidden_state = torch.cat([shared.hidden_BPD, output.last_hidden_state], dim=1)
        output.past_key_values = None
        return output

    decoder.forward = forward
