"""Candidates of many decision points of a text in one forward, for training, evaluation and calibration.

Legend: B texts, T tokens, P decision points, K candidates, M = P * K appended tokens, D hidden size.
"""

from __future__ import annotations

import warnings

import torch
from transformers import DynamicCache, PreTrainedModel

from transformers_s2t.models.forwards import cache_argument, check_state_is_cached, is_recurrent
from transformers_s2t.models.shared_prefix import (
    is_random,
    read_shared,
    runs_alone,
    share,
)
from transformers_s2t.models.text_cache import TextCache
from transformers_s2t.models.views import (
    ModelViews,
    TokensNotInRows,
    get_decoder,
)
from transformers_s2t.scoring.candidates import (
    PrefixCache,
    append_candidates,
    attention_kinds,
    supports_tree,
    tree_attention,
)


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether whole trajectories can be packed with their candidates.

    Like [`supports_tree`], but with flex attention too: its block masks cost too much for a step of decoding, though
    not for one of training.
    """
    return supports_tree(model, DynamicCache(), kernels=("sdpa", "eager", "flex_attention"))


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
        # a stable sort moves the real candidates to the front of each row, in order
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
        views: views of the model with and without its adapter.
        input_ids_BT: trajectories, padded on the right.
        mask_BT: bool, False at padding.
        points: the candidates.
        adapter_scope: "candidate": the prefix runs on the base model without gradient, only candidate tokens see the
            adapter; "sequence": prefix and candidates run with it, with gradient.
        texts: cache of the texts that the base model has read, for "candidate"; texts that are read now are added.

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
                    cache = DynamicCache()  # windowed layers keep everything too: there are candidates all along it
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

    Whole texts are run where gradient flows through the prefix, or through a recurrent layer: such a layer overwrites
    the state that its backward pass needs, and its kernels for a single token have no backward pass.
    """
    in_sequence = adapter_scope == "sequence"
    if views.model._is_stateful:  # refuse to train what could not decode
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
    for row, m in points.real_BM.nonzero().tolist() or [(0, 0)]:  # one at least: the loss needs a graph
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
                    prefix.feed(prefix_1P, mask_1P)  # only the tokens since the point before
                hidden_KD = append_candidates(views.adapted, prefix.cache, mask_1P, ids_K[None]).hidden_BMD[0]
                if recurrent:  # it would be extended token by token
                    prefix = PrefixCache(views.base)
            rows += [row] * len(members)
            columns += members
            found.append(hidden_KD)
    found_XD = torch.cat(found)
    hidden_BMD = found_XD.new_zeros(*points.candidate_ids_BM.shape, found_XD.shape[-1])
    index = (torch.tensor(rows, device=found_XD.device), torch.tensor(columns, device=found_XD.device))
    return hidden_BMD.index_put(index, found_XD), prefix_BTD


def _hidden_of_last(views: ModelViews, texts_KP: torch.Tensor) -> torch.Tensor:
    """Hidden states (K, D) after whole texts, with the adapter on for their last token alone.

    Raises:
        ValueError: where the adapter cannot be on for one token alone.
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
    """Warns where candidates cannot be packed, and says what that costs.

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
        f"{sorted(attention_kinds(model))}) cannot score packed candidates exactly: every decision point takes a "
        f"forward of its own, with adapter_scope={scopes} over the whole text of each candidate, which is about as "
        f"many times slower as a trajectory has candidates.{advice}",
        stacklevel=3,
    )
