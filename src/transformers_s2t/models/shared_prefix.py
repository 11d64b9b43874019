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
from peft import PeftModel
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from transformers_s2t.models.facts import prompt_learning_of, random_places, rotary_change
from transformers_s2t.models.views import get_decoder


#: Fewer shared tokens are not worth a forward of their own.
MIN_SHARED = 8
#: What a forward may be given for [`share_in_forward`] to share.
_PLAIN_INPUTS = {"input_ids", "attention_mask", "return_dict"}


def without_wrapper(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that a `PeftModel` wraps, with whatever adapters are on in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def can_share(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model can go on from a cache of other rows, with padding behind it.

    Full attention in all layers, because windows count columns, padding among them, and recurrent layers read padding;
    rotary positions that do not change with the length of the whole text; no virtual tokens in front of it.
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
    """How many tokens P all rows begin with: fewer than any row has, and 0 where sharing is not worth it."""
    if len(rows) < 2:
        return 0
    common = os.path.commonprefix([list(row) for row in rows])
    length = min(len(common), min(map(len, rows)) - 1)
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


def share(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    gives_positions: bool = True,
) -> Shared | None:
    """Reads what the rows begin with as one row, with gradient where one is wanted; `None` where nothing is shared.

    Args:
        model: causal language model, or a view of one.
        input_ids, attention_mask: (B, T), of [`pad_prompts`], or rows that are padded on the right.
        gives_positions: whether the forward that goes on is given 0, 1, 2 ... as positions, as `generate` does it.
            Otherwise the model numbers the tokens itself, which RoBERTa begins elsewhere.
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
    """Whether layers are checkpointed: they then leave the cache alone."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def runs_alone() -> bool:
    """Whether there is one process: several that share out the weights must run as many forwards as each other."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def is_random(model: torch.nn.Module) -> bool:
    """Whether a forward draws something, dropout for example: for rows that share tokens once, not for each."""
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
    """The cache of prompts without their last tokens, each prompt `num_copies` times: several samples of a prompt go
    on from one reading of it. `None` where the model cannot share.

    Args:
        model: causal language model.
        input_ids, attention_mask: (B, T), of [`pad_prompts`].
        num_copies: of each row.
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
    """Makes a cache of one row one of `batch_size` rows, without copies: layers grow by concatenation."""
    for layer in (layer for layer in cache.layers if layer.is_initialized):
        layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
        layer.values = layer.values.expand(batch_size, -1, -1, -1)


def share_in_forward(model: PreTrainedModel) -> None:
    """From now on the model's own forward over several rows reads what they begin with once; gradients go through it.

    For training with long prompts in one process: the loss and all gradients stay what they are, but for rounding.
    Forwards that may make a cache (`use_cache` is not False), give all hidden states, or have positions or embeddings
    of their own are run as they are, and so is everything while something is random, which would be drawn once for all
    rows.

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
