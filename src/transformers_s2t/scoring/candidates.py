"""How a model scores candidates: K appended tokens on one shared prefix, read at the reserved tokens.

The trainer and the decoder call the same functions, so a training score is a decoding score. Two exact ways lead from
a cached prefix to the hidden states of M appended candidates:

- *tree*: one forward of M tokens per row; a 4D mask lets each see its prefix and itself. N tokens of the prefix that
  the cache does not hold yet come before them in the same forward;
- *repeat*: every row of the cache repeated once per candidate, one ordinary token each. Slower, for attention
  kernels and cache layers that a tree mask does not describe (flash attention, linear attention).

Legend: B rows, T prefix tokens, the last N of them not cached yet, M appended candidates per row, R reserved tokens,
D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from transformers_s2t.models.forwards import (
    cache_argument,
    check_state_is_cached,
    fork_cache,
    hidden_and_logits,
    is_recurrent,
)
from transformers_s2t.models.shared_prefix import (
    can_share,
    positions_from_mask,
    repeat_rows,
    shared_columns,
)
from transformers_s2t.models.views import (
    get_decoder,
)


def tree_mask(
    prefix_mask_BT: torch.Tensor,
    limits_BM: torch.Tensor,
    attn_implementation: str,
    dtype: torch.dtype,
    num_new: int = 0,
    window: int | None = None,
) -> torch.Tensor:
    """4D attention mask of N new prefix tokens and M candidates.

    Candidate m of a row sees the real tokens among the first `limits_BM[b, m]` of the prefix, and itself. New tokens
    are causal: each sees the real ones up to itself.

    Args:
        prefix_mask_BT: bool, False at padding; the last `num_new` columns are the new tokens.
        limits_BM: int, how many prefix columns each candidate may see.
        attn_implementation: "eager" gets an additive mask (a bool one is silently wrong there), others a bool one.
        dtype: type of the additive mask.
        num_new: N.
        window: number of columns that a token sees in sliding attention, its own included; `None` for all.

    Returns:
        (B, 1, N + M, T + M).
    """
    batch_size, num_prefix = prefix_mask_BT.shape
    num_candidates, device = limits_BM.shape[1], prefix_mask_BT.device
    columns_T = torch.arange(num_prefix, device=device)
    limits_BQ = torch.cat([(columns_T[num_prefix - num_new :] + 1).expand(batch_size, -1), limits_BM], dim=1)
    prefix_BQT = prefix_mask_BT[:, None, :].bool() & (columns_T < limits_BQ[..., None])
    if window is not None:
        # a new token stands in the last column that it may see, a candidate in the one after
        own_BQ = limits_BQ - (torch.arange(limits_BQ.shape[1], device=device) < num_new).long()
        prefix_BQT = prefix_BQT & (columns_T > (own_BQ - window)[..., None])
    itself_QM = torch.eye(num_new + num_candidates, dtype=torch.bool, device=device)[:, num_new:]
    allowed_B1QC = torch.cat([prefix_BQT, itself_QM.expand(batch_size, -1, -1)], dim=-1)[:, None]
    if attn_implementation == "eager":
        return torch.zeros_like(allowed_B1QC, dtype=dtype).masked_fill(~allowed_B1QC, torch.finfo(dtype).min)
    return allowed_B1QC


def tree_attention(
    model: PreTrainedModel,
    prefix_mask_BT: torch.Tensor,
    limits_BM: torch.Tensor,
    num_new: int = 0,
    cache: Cache | None = None,
) -> torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask]:
    """The model's `attention_mask` for a tree: one [`tree_mask`], or a dict of one for each kind of attention.

    Each is cut to the columns that layers of its kind attend to: those that `cache` still holds, and the new ones.
    """
    masks = {}
    for kind, (layer_index, window) in attention_kinds(model).items():
        mask = tree_mask(
            prefix_mask_BT, limits_BM, model.config._attn_implementation, model.dtype, num_new, window=window
        )
        if cache is not None:
            num_columns, _ = cache.layers[layer_index].get_mask_sizes(mask.shape[-2])
            mask = mask[..., mask.shape[-1] - num_columns :]
        masks[kind] = _block_mask(mask) if model.config._attn_implementation == "flex_attention" else mask
    return masks if len(masks) > 1 else masks.popitem()[1]


def _block_mask(mask_B1QC: torch.Tensor) -> BlockMask:
    """The same mask for flex attention, which then skips the blocks of candidates that see nothing of each other."""

    def may_see(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return mask_B1QC[row, 0, query, column]

    batch_size, _, num_queries, num_columns = mask_B1QC.shape
    return create_block_mask(may_see, batch_size, None, num_queries, num_columns, device=mask_B1QC.device)


def attention_kinds(model: PreTrainedModel) -> dict[str, tuple[int, int | None]]:
    """Kind of attention -> (first layer of that kind, its window). Read from the config, because layers with chunks
    and layers with windows have the same class of cache."""
    layer_types, settings = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    kinds: dict[str, tuple[int, int | None]] = {}
    for index, (kind, setting) in enumerate(zip(layer_types, settings)):
        kinds.setdefault(kind, (index, setting.get("sliding_window")))
    return kinds


def supports_tree(model: PreTrainedModel, cache: Cache, kernels: tuple[str, ...] = ("sdpa", "eager")) -> bool:
    """Whether a tree mask is exact: growing cache layers, full or windowed attention, a kernel that takes a 4D mask.

    Decided by what the cache is made of after the prefill, never by the model's name: hybrid models accept a tree
    mask and silently ignore it in their recurrent layers.
    """
    if model.config._attn_implementation not in kernels:
        return False
    if not model._supports_attention_backend:  # ALiBi or windows counted in columns: GPT-Neo, MPT, Bloom
        return False
    if not set(attention_kinds(model)) <= {"full_attention", "sliding_attention"}:
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


class Appended(NamedTuple):
    """What [`append_candidates`] returns.

    Attributes:
        hidden_BMD: the candidates' last hidden states.
        fed: the cache after the forward, with M columns more than the prefix (tree) or B * M rows (repeat).
        tree: whether the tree was used.
        logits_BLV: logits of the last L candidates, where asked for.
    """

    hidden_BMD: torch.Tensor
    fed: Cache
    tree: bool
    logits_BLV: torch.Tensor | None = None


def append_candidates(
    model: PreTrainedModel,
    cache: Cache,
    prefix_mask_BT: torch.Tensor,
    candidate_ids_BM: torch.Tensor,
    positions_BM: torch.Tensor | None = None,
    limits_BM: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    tree: bool | None = None,
    new_ids_BN: torch.Tensor | None = None,
    num_logits: int = 0,
) -> Appended:
    """Hidden states of candidates, each appended to its prefix separately.

    Args:
        model: causal language model, or a view of one with an adapter on.
        cache: holds the prefix without `new_ids_BN`; it is left as it was.
        prefix_mask_BT: bool, False at padding.
        candidate_ids_BM: the tokens to append.
        positions_BM: position of each candidate in its own text; `None` for the one after the prefix.
        limits_BM: how many prefix columns each candidate sees; `None` for all T.
        row_index: which rows of the cache the B rows are, `None` for all of them in order.
        tree: `None` chooses by [`supports_tree`].
        new_ids_BN: the last tokens of the prefix, where the cache lacks them (tree only).
        num_logits: number L of last candidates whose logits are returned too (tree only).

    Raises:
        ValueError: where limits differ and only repeated rows would be exact.
    """
    check_state_is_cached(model, cache)
    batch_size, num_candidates = candidate_ids_BM.shape
    num_prefix = prefix_mask_BT.shape[1]
    if positions_BM is None:
        positions_BM = prefix_mask_BT.long().sum(-1, keepdim=True).expand_as(candidate_ids_BM)
    if tree is None:
        tree = supports_tree(model, cache)
    if tree:
        fed = fork_cache(cache, row_index)
        if limits_BM is None:
            limits_BM = torch.full_like(candidate_ids_BM, num_prefix)
        num_new = 0 if new_ids_BN is None else new_ids_BN.shape[1]
        if num_new:
            candidate_ids_BM = torch.cat([new_ids_BN, candidate_ids_BM], dim=1)
            positions_BM = torch.cat([positions_from_mask(prefix_mask_BT)[:, -num_new:], positions_BM], dim=1)
        mask = tree_attention(model, prefix_mask_BT, limits_BM, num_new, fed)
        for layer in fed.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.activate_past_recording()  # what slides out of the window comes back when candidates are dropped
        hidden_BQD, logits_BLV = hidden_and_logits(
            model,
            num_logits,
            input_ids=candidate_ids_BM,
            attention_mask=mask,
            position_ids=positions_BM,
            use_cache=True,
            **{cache_argument(model): fed},
        )
        return Appended(hidden_BQD[:, num_new:], fed, True, logits_BLV)
    assert new_ids_BN is None and not num_logits, "repeated rows need a cache that holds the whole prefix"
    if limits_BM is not None and bool((limits_BM != num_prefix).any()):
        raise ValueError(
            "Candidates at different places of one cached prefix need a tree mask, which this model's attention "
            f"({model.config._attn_implementation!r}) or cache layers do not support exactly."
        )
    repeats = torch.arange(batch_size, device=candidate_ids_BM.device).repeat_interleave(num_candidates)
    fed = fork_cache(cache, repeats if row_index is None else row_index[repeats])
    mask_BT = torch.cat([prefix_mask_BT, prefix_mask_BT.new_ones(batch_size, 1)], dim=1)[repeats]
    name = cache_argument(model)
    output = get_decoder(model)(
        input_ids=candidate_ids_BM.reshape(-1, 1),
        attention_mask=None if name == "cache_params" else mask_BT.long(),  # see PrefixCache.feed
        position_ids=positions_BM.reshape(-1, 1),
        use_cache=True,
        **{name: fed},
    )
    return Appended(output.last_hidden_state.reshape(batch_size, num_candidates, -1), fed, False)


#: Extra tokens in one forward that cost less than a second forward. A forward reads every weight, however few tokens
#: it runs: on a CPU that costs as much as about 25 more tokens, on a GPU as hundreds (benchmarks/decode.py).
FREE_TOKENS = {"cpu": 24}
FREE_TOKENS_ELSEWHERE = 384


def pays_to_merge(num_extra_tokens: int, device: torch.device) -> bool:
    """Whether one forward with this many extra tokens, over all rows, is cheaper than two forwards."""
    return num_extra_tokens <= FREE_TOKENS.get(device.type, FREE_TOKENS_ELSEWHERE)


def keep_candidate(fed: Cache, chosen_B: torch.Tensor, num_candidates: int, tree: bool) -> Cache:
    """Turns the fed cache of [`append_candidates`] into one of prefix and chosen candidate: T + 1 tokens, B rows."""
    if not tree:
        rows = torch.arange(len(chosen_B), device=chosen_B.device) * num_candidates + chosen_B
        fed.reorder_cache(rows)
        return fed
    for layer in (layer for layer in fed.layers if layer.is_initialized):
        # (B, heads, T + M, head size), made by this forward: free to write to
        for states in (layer.keys, layer.values):
            new = states[..., states.shape[-2] - num_candidates :, :]
            index = chosen_B.to(states.device).view(-1, 1, 1, 1).expand(-1, states.shape[1], 1, states.shape[3])
            new[..., :1, :] = new.gather(2, index)
    return drop_candidates(fed, num_candidates - 1)


def drop_candidates(fed: Cache, num_candidates: int) -> Cache:
    """The fed cache of a tree without its last `num_candidates` columns."""
    for layer in fed.layers:
        layer.crop(-num_candidates)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False
    return fed


class PrefixCache:
    """The cache of one model over one batch of growing texts, fed lazily.

    Args:
        model: causal language model.
        cache: a cache to extend (a `generate` call's own), or `None` for a new one.
        prompt_embeds_BTD: embeddings of a prompt that was given as such; ids are fed after it.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache | None = None, prompt_embeds_BTD: torch.Tensor | None = None
    ):
        self.model = model
        self.prompt_embeds_BTD = prompt_embeds_BTD
        self.cache_argument = cache_argument(model)
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self._num_fed = 0 if cache is None else None

    @property
    def num_cached(self) -> int:
        # not the cache's own count: a cache of recurrent layers alone has none
        return self.cache.get_seq_length() if self._num_fed is None else self._num_fed

    def feed(
        self, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, with_logits: bool = False
    ) -> torch.Tensor | None:
        """Runs the tokens that the cache does not hold yet; returns the last position's logits (B, V) on request."""
        start = self.num_cached
        device = self.model.device
        embeds_BTD = None if start else self.prompt_embeds_BTD
        if embeds_BTD is not None and embeds_BTD.shape[1] < input_ids_BT.shape[1]:
            num_prompt = embeds_BTD.shape[1]
            self.feed(input_ids_BT[:, :num_prompt], mask_BT[:, :num_prompt])
            return self.feed(input_ids_BT, mask_BT, with_logits)
        if start == 0 and embeds_BTD is None and (shared := shared_columns(input_ids_BT, mask_BT)):
            if can_share(self.model):
                self.feed(input_ids_BT[:1, :shared], mask_BT[:1, :shared])
                repeat_rows(self.cache, len(input_ids_BT))
                return self.feed(input_ids_BT, mask_BT, with_logits)
        new_ids = input_ids_BT[:, start:].to(device)
        if new_ids.shape[1] == 0:
            if with_logits:
                raise AssertionError("the cache already holds this prefix; its logits were returned before")
            return None
        if start:
            check_state_is_cached(self.model, self.cache)
        if start and new_ids.shape[1] > 1 and is_recurrent(self.cache):
            # Mamba-1 would scan several tokens at once as a new text, without the state that the cache holds
            for end in range(start + 1, input_ids_BT.shape[1]):
                self.feed(input_ids_BT[:, :end], mask_BT[:, :end])
            return self.feed(input_ids_BT, mask_BT, with_logits)
        inputs = {
            **({"input_ids": new_ids} if embeds_BTD is None else {"inputs_embeds": embeds_BTD.to(device)}),
            "attention_mask": mask_BT.long().to(device),
            "position_ids": positions_from_mask(mask_BT)[:, start:].to(device),
            self.cache_argument: self.cache,
            "use_cache": True,
        }
        if start and self.cache_argument == "cache_params":
            del inputs["attention_mask"]  # as `generate` does: Mamba-1 multiplies its one token by the whole mask
        if self._num_fed is not None:
            self._num_fed = input_ids_BT.shape[1]
        if with_logits:
            return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        get_decoder(self.model)(**inputs)
        return None

    def feed_and_append(
        self,
        model: PreTrainedModel,
        input_ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        candidate_ids_BM: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states (B, M, D) of candidates, in one forward with the tokens that the cache does not hold yet.

        Only for models whose tree mask is exact ([`supports_tree`]). The candidates are not kept in the cache.

        Args:
            model: a view of this cache's model: candidates may see an adapter that their prefix does not.
        """
        device, start = self.model.device, self.num_cached
        mask_BT, candidate_ids_BM = mask_BT.to(device), candidate_ids_BM.to(device)
        appended = append_candidates(
            model,
            self.cache,
            mask_BT,
            candidate_ids_BM,
            tree=True,
            new_ids_BN=input_ids_BT[:, start:].to(device),
        )
        self.cache = drop_candidates(appended.fed, candidate_ids_BM.shape[1])
        if self._num_fed is not None:
            self._num_fed = input_ids_BT.shape[1]
        return appended.hidden_BMD
