"""How a model scores candidates: K appended tokens on one shared prefix, read at the reserved tokens.

The trainer and the decoder call the same functions, so a training score is a decoding score. Two exact ways lead from
a cached prefix to the hidden states of M appended candidates:

- *tree*: one forward of M tokens per row; a 4D mask lets each see its prefix and itself. Tokens of the prefix that the
  cache does not hold yet (N of them) ride in front of them in the same forward;
- *repeat*: every row of the cache repeated once per candidate, one ordinary token each. Slower, for attention
  kernels and cache layers that a tree mask does not describe (flash attention, linear attention).

Legend: B rows, T prefix tokens, the last N of them not cached yet, M appended candidates per row, R reserved tokens,
D hidden size.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import NamedTuple

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from .proposals import floor_mask
from .shared_prefix import (
    can_share,
    is_random,
    positions_from_mask,
    read_shared,
    repeat_rows,
    runs_alone,
    share,
    shared_columns,
)
from .text_cache import TextCache
from .views import ModelViews, TokensNotInRows, copy_module, get_decoder, innermost_decoder, make_view


def candidate_scores(bin_logits_R: torch.Tensor, score_head: str = "bins") -> torch.Tensor:
    """Score of each candidate from its R reserved logits; any leading shape.

    "bins" is the paper's expected value, softmax(z) . linspace(0, 1, R), in [0, 1] (arXiv 2604.26940, section 3);
    "linear" is mean(z[R/2:]) - mean(z[:R/2]), without bounds.
    """
    bin_logits_R = bin_logits_R.float()
    num_bins = bin_logits_R.shape[-1]
    if score_head == "linear":
        return bin_logits_R[..., num_bins // 2 :].mean(-1) - bin_logits_R[..., : num_bins // 2].mean(-1)
    bins_R = torch.linspace(0.0, 1.0, num_bins, device=bin_logits_R.device)
    return torch.softmax(bin_logits_R, dim=-1) @ bins_R


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
        dtype: of the additive mask.
        num_new: N.
        window: of sliding attention: a token sees so many columns, its own included; `None` for all.

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
    """What the model takes as `attention_mask` of a tree: one [`tree_mask`], or one for each kind of its layers.

    Each is cut to the columns that layers of its kind attend to: those that `cache` still holds, and the new ones.
    """
    masks = {}
    for kind, (layer_index, window) in _attention_kinds(model).items():
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


def _attention_kinds(model: PreTrainedModel) -> dict[str, tuple[int, int | None]]:
    """Kind of attention -> (first layer of that kind, its window). By the config: chunks and windows share a cache."""
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
    if not set(_attention_kinds(model)) <= {"full_attention", "sliding_attention"}:
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether whole trajectories can be packed with their candidates.

    As [`supports_tree`], and under flex attention: its block masks are too dear for a step of decoding, but not for a
    step of training.
    """
    return supports_tree(model, DynamicCache(), kernels=("sdpa", "eager", "flex_attention"))


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
        ValueError: where it takes none, or one of its own kind. A `**kwargs` swallows the cache: every token would
            be scored without a prefix.
    """
    name = _cache_argument(type(get_decoder(model)))
    if name is None or not model._supports_default_dynamic_cache():
        raise ValueError(f"S2T scores candidates on a cached prefix, but {type(model).__name__} takes no cache.")
    return name


@functools.cache
def _cache_argument(decoder_class: type[nn.Module]) -> str | None:
    names = inspect.signature(decoder_class.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


def _hidden_and_logits(model: PreTrainedModel, num_logits: int, **inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Last hidden states (B, Q, D) of one forward and, where asked for, the logits of its last `num_logits` tokens.

    Logits are the model's own, with whatever its head does beside the matrix: soft-caps, scales.
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
    """The model's own logits (N, V) of last hidden states, with what it does beside its head's matrix.

    A view of the model is run whose decoder only hands over these hidden states: soft-caps and scales have too many
    names to be looked up in a config (see [`head_is_plain`]).

    Raises:
        ValueError: where the model does not go through its decoder.
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
    """A decoder's output of which nothing but the hidden states is there."""

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
    """Raises a ValueError where a model keeps its state in its modules (RecurrentGemma): a cache cannot fork that."""
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    if model._is_stateful and not all(any(layer.has_previous_state.values()) for layer in layers):
        raise ValueError(
            f"S2T scores candidates on a copy of the cache, but {type(model).__name__} keeps its recurrent state "
            "outside of the cache."
        )


class Appended(NamedTuple):
    """What [`append_candidates`] returns.

    Attributes:
        hidden_BMD: the candidates' last hidden states.
        fed: the fed cache; tree: M columns more than the prefix, repeat: B * M rows.
        tree: whether it was the tree.
        logits_BLV: of the last candidates, where asked for.
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
    """Hidden states of candidates, each appended to its prefix on its own.

    Args:
        model: causal language model, or a view of one with an adapter on.
        cache: holds the prefix but for `new_ids_BN`; it is left as it was.
        prefix_mask_BT: bool, False at padding.
        candidate_ids_BM: the tokens to append.
        positions_BM: position of each candidate in its own text; `None` for the one after the prefix.
        limits_BM: how many prefix columns each candidate sees; `None` for all T.
        row_index: which rows of the cache the B rows are, `None` for all of them in order.
        tree: `None` chooses by [`supports_tree`].
        new_ids_BN: the last tokens of the prefix, where the cache lacks them (tree only).
        num_logits: of how many of the last candidates to return the logits too (tree only).

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
        hidden_BQD, logits_BLV = _hidden_and_logits(
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


#: Tokens that may ride along in a forward for less than a second forward costs. A forward reads every weight whatever
#: it is fed: on a CPU that is worth about 25 more tokens, on a GPU hundreds (benchmarks/decode.py).
FREE_TOKENS = {"cpu": 24}
FREE_TOKENS_ELSEWHERE = 384


def pays_to_merge(num_extra_tokens: int, device: torch.device) -> bool:
    """Whether one forward with so many more tokens in all is cheaper than two."""
    return num_extra_tokens <= FREE_TOKENS.get(device.type, FREE_TOKENS_ELSEWHERE)


def keep_candidate(fed: Cache, chosen_B: torch.Tensor, num_candidates: int, tree: bool) -> Cache:
    """Turns the fed cache of [`append_candidates`] into that of the chosen candidate: T + 1 tokens, B rows."""
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
        cache: a cache to go on with (a `generate` call's own), or `None` for a new one.
        prompt_embeds_BTD: of a prompt that was given as embeddings; ids are fed behind it.
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
            # several tokens at once would be a new text to Mamba-1 scans: they ignore the state they start from
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

        Where a tree mask is exact, see [`supports_tree`]. The candidates leave no trace in the cache.

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


class ReservedRows:
    """The trained rows (R, D) of the output head, in the order of `reserved_token_ids`: found once, read by a call.

    Raises:
        ValueError: where the adapter holds no such rows, so that untrained logits are never read as scores.
    """

    def __init__(self, model: PreTrainedModel, reserved_token_ids: tuple[int, ...], adapter_name: str):
        head = model.get_output_embeddings()  # of a tied pair it shares the other's rows
        layer = head.token_adapter if isinstance(head, TrainableTokensWrapper) else None
        if layer is not None and adapter_name in layer.trainable_tokens_delta:
            order = {id: row for row, id in enumerate(layer.token_indices[adapter_name])}
            if all(id in order for id in reserved_token_ids):
                self._rows, self._adapter_name = layer.trainable_tokens_delta, adapter_name
                self._order = torch.tensor([order[id] for id in reserved_token_ids])
                self._share: DTensor | None = None
                return
        raise ValueError(
            f"Adapter {adapter_name!r} holds no trained rows for the reserved tokens {list(reserved_token_ids)}: its "
            "LoraConfig needs `trainable_token_indices={'lm_head': reserved_token_ids}` (S2TTrainer sets it)."
        )

    def __call__(self) -> torch.Tensor:
        rows = self._rows[self._adapter_name] if self._share is None else self._share
        if isinstance(rows, DTensor):
            rows = rows.full_tensor(grad_placements=[Partial("avg")] * rows.device_mesh.ndim)
        return rows[self._order.to(rows.device)]

    def keep_share(self) -> None:
        """Where FSDP2 has sharded the model: reads this process's share from now on, whatever the head holds.

        FSDP2 gathers weights, and averages their gradients, around the forward of their module. Scores are no such
        forward, and those that the head runs on text would end before the scores' gradients are there. To be called
        before the first forward, when the head holds nothing but its share.
        """
        rows = self._rows[self._adapter_name]
        if self._share is None and isinstance(rows, DTensor):
            self._share = rows


def bin_logits(hidden_D: torch.Tensor, rows_RD: torch.Tensor) -> torch.Tensor:
    """Reserved logits z = h W[reserved]^T, float32; any leading shape. Reads R rows, never the whole head."""
    return hidden_D.float() @ rows_RD.to(hidden_D.device).float().T


def valid_candidates(
    student_logprobs_BNK: torch.Tensor, position_mask_BN: torch.Tensor, min_prob_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates of labelled points compete (B, N, K), and which points have a choice, two or more (B, N).

    The same floor as in decoding; a point without a choice is no decision.
    """
    valid_BNK = floor_mask(student_logprobs_BNK, min_prob_ratio) & (student_logprobs_BNK > -1e3)
    valid_BNK = valid_BNK & position_mask_BN[..., None]
    point_BN = valid_BNK.sum(-1) > 1
    return valid_BNK & point_BN[..., None], point_BN


class PackedPoints:
    """The decision points of a batch of trajectories, with every real candidate in one packed row per trajectory.

    Args:
        positions_BN: index of the token under decision; its prefix is `input_ids[:position]`.
        candidate_ids_BNK: candidates of each point.
        valid_BNK: bool, True at candidates that are to be scored. Only these are run.
    """

    def __init__(self, positions_BN: torch.Tensor, candidate_ids_BNK: torch.Tensor, valid_BNK: torch.Tensor):
        self.valid_BNK = valid_BNK
        batch_size, _, num_candidates = candidate_ids_BNK.shape
        flat_BF = valid_BNK.reshape(batch_size, -1)
        width = max(int(flat_BF.sum(-1).max()), 1)
        # a stable sort brings the real candidates to the front of each row, in order
        self._order_BM = torch.argsort(~flat_BF, dim=-1, stable=True)[:, :width]
        self.real_BM = flat_BF.gather(-1, self._order_BM)
        self.candidate_ids_BM = candidate_ids_BNK.reshape(batch_size, -1).gather(-1, self._order_BM)
        self.positions_BM = (
            positions_BN[..., None].expand_as(candidate_ids_BNK).reshape(batch_size, -1).gather(-1, self._order_BM)
        )

    def unpack(self, scores_BM: torch.Tensor) -> torch.Tensor:
        """Scores (B, N, K) from packed ones (B, M); 0 at candidates that were not run."""
        flat_BF = scores_BM.new_zeros(len(scores_BM), self.valid_BNK[0].numel())
        flat_BF = flat_BF.scatter(-1, self._order_BM, scores_BM.masked_fill(~self.real_BM, 0.0))
        return flat_BF.reshape(self.valid_BNK.shape)


def packed_hidden(
    views: ModelViews,
    input_ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    points: PackedPoints,
    adapter_scope: str,
    texts: TextCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Last hidden states of all candidates of whole trajectories: T + M tokens per row in place of M prefixes.

    Args:
        views: of the model and its adapter.
        input_ids_BT: trajectories, padded on the right.
        mask_BT: bool, False at padding.
        points: the candidates.
        adapter_scope: "candidate": the prefix runs on the base model without gradient, only candidate tokens see the
            adapter; "sequence": prefix and candidates run with it, with gradient.
        texts: what the base model has read of texts before, for "candidate"; filled with what it reads now.

    Returns:
        candidates' hidden states (B, M, D), and for "sequence" the prefix's (B, T, D).

    Where a tree mask is not exact ([`supports_packing`]), every point takes a forward of its own, see
    [`warn_without_tree`].
    """
    if not supports_packing(views.model):
        return _hidden_one_by_one(views, input_ids_BT, mask_BT, points, adapter_scope)
    positions_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
    if adapter_scope == "candidate":
        with torch.no_grad():
            cache = None if texts is None else texts.read(input_ids_BT, mask_BT)
            if cache is None:
                cache = read_shared(views.base, input_ids_BT, mask_BT) if runs_alone() else None
                if cache is None:
                    cache = DynamicCache()  # windowed layers keep everything too: candidates stand all along the text
                start = cache.get_seq_length()
                get_decoder(views.base)(
                    input_ids=input_ids_BT[:, start:],
                    attention_mask=mask_BT.long(),
                    position_ids=positions_BT[:, start:],
                    past_key_values=cache,
                    use_cache=True,
                )
                if texts is not None:
                    texts.keep(input_ids_BT, mask_BT, cache, start)
        appended = append_candidates(
            views.adapted,
            cache,
            mask_BT,
            points.candidate_ids_BM,
            points.positions_BM,
            limits_BM=points.positions_BM,
            tree=True,
        )
        return appended.hidden_BMD, None
    shared = None
    if runs_alone() and not is_random(views.adapted):
        shared = share(views.adapted, input_ids_BT, mask_BT)
    start = 0 if shared is None else shared.hidden_BPD.shape[1]
    num_new = input_ids_BT.shape[1] - start
    mask = tree_attention(views.model, mask_BT, points.positions_BM, num_new, shared and shared.cache)
    output = get_decoder(views.adapted)(
        input_ids=torch.cat([input_ids_BT[:, start:], points.candidate_ids_BM], dim=1),
        attention_mask=mask,
        position_ids=torch.cat([positions_BT[:, start:], points.positions_BM], dim=1),
        **({"use_cache": False} if shared is None else {"past_key_values": shared.cache, "use_cache": True}),
    )
    hidden = output.last_hidden_state
    prefix_BTD = hidden[:, :num_new]
    if shared is not None:
        prefix_BTD = torch.cat([shared.hidden_BPD, prefix_BTD], dim=1)
    return hidden[:, num_new:], prefix_BTD


def _hidden_one_by_one(
    views: ModelViews,
    input_ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    points: PackedPoints,
    adapter_scope: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What [`packed_hidden`] returns, by a forward per point: its candidates on a cached prefix, or their whole texts.

    Whole texts where gradient goes through the prefix, or through a recurrent layer: that writes its state in place,
    which the backward pass still needs, and its kernels for a single token have no backward pass at all.
    """
    in_sequence = adapter_scope == "sequence"
    if views.model._is_stateful:  # nothing is trained that could not decode
        first = PrefixCache(views.base)
        with torch.no_grad():
            first.feed(input_ids_BT[:1, :1], mask_BT[:1, :1])
        check_state_is_cached(views.model, first.cache)
    prefix_BTD = None
    if in_sequence:
        decoder = get_decoder(views.adapted)
        output = decoder(input_ids=input_ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        prefix_BTD = output.last_hidden_state
    points_of_row: list[dict[int, list[int]]] = [{} for _ in input_ids_BT]  # position -> its packed candidates
    for row, m in points.real_BM.nonzero().tolist() or [(0, 0)]:  # something at least: a loss needs its graph
        points_of_row[row].setdefault(int(points.positions_BM[row, m]), []).append(m)
    rows, columns, found = [], [], []
    for row, members_at in enumerate(points_of_row):
        prefix = PrefixCache(views.base)
        recurrent = is_recurrent(prefix.cache)
        for position, members in sorted(members_at.items()):
            ids_K = points.candidate_ids_BM[row, members]
            prefix_1P = input_ids_BT[row : row + 1, :position]
            if in_sequence or (recurrent and torch.is_grad_enabled()):
                texts_KP = torch.cat([prefix_1P.expand(len(members), -1), ids_K[:, None]], dim=1)
                if in_sequence:
                    hidden_KD = decoder(input_ids=texts_KP, use_cache=False).last_hidden_state[:, -1]
                else:
                    hidden_KD = _hidden_of_last(views, texts_KP)
            else:
                mask_1P = torch.ones_like(prefix_1P, dtype=torch.bool)
                with torch.no_grad():
                    prefix.feed(prefix_1P, mask_1P)  # only what the point before did not
                hidden_KD = append_candidates(views.adapted, prefix.cache, mask_1P, ids_K[None]).hidden_BMD[0]
                if recurrent:  # would catch up token by token
                    prefix = PrefixCache(views.base)
            rows += [row] * len(members)
            columns += members
            found.append(hidden_KD)
    found_XD = torch.cat(found)
    hidden_BMD = found_XD.new_zeros(*points.candidate_ids_BM.shape, found_XD.shape[-1])
    index = (torch.tensor(rows, device=found_XD.device), torch.tensor(columns, device=found_XD.device))
    return hidden_BMD.index_put(index, found_XD), prefix_BTD


def _hidden_of_last(views: ModelViews, texts_KP: torch.Tensor) -> torch.Tensor:
    """Hidden states (K, D) behind whole texts, with the adapter on for their last token.

    Raises:
        ValueError: where no forward can tell it from the others.
    """
    try:
        if not views.can_split:
            raise TokensNotInRows
        view = views.on_tokens(slice(-1, None), texts_KP.shape)
        return get_decoder(view)(input_ids=texts_KP, use_cache=False).last_hidden_state[:, -1]
    except TokensNotInRows:
        raise ValueError(
            f"{type(views.model).__name__} has recurrent layers, where adapter_scope='candidate' can train plain LoRA "
            "on linear layers that see all tokens alone (no DoRA, no experts): set `target_modules` so, or "
            "adapter_scope='sequence'."
        ) from None


def warn_without_tree(model: PreTrainedModel) -> None:
    """Warns where candidates cannot be packed, with what that costs.

    Raises:
        ValueError: where they cannot be scored at all, see [`cache_argument`].
    """
    cache_argument(model)
    if supports_packing(model):
        return
    scopes = "'candidate' and 'sequence'" if is_recurrent(PrefixCache(model).cache) else "'sequence'"
    takes_trees = model.config._attn_implementation in ("sdpa", "eager")
    advice = (
        "" if takes_trees else " attn_implementation='sdpa' or 'eager' avoids that for full and sliding attention."
    )
    warnings.warn(
        f"{type(model).__name__} (attention {model.config._attn_implementation!r}, layers "
        f"{sorted(_attention_kinds(model))}) cannot score packed candidates exactly: every decision point takes a "
        f"forward of its own, with adapter_scope={scopes} over the whole text of each candidate, which is about as "
        f"many times slower as a trajectory has candidates.{advice}",
        stacklevel=3,
    )
