"""Scores by hand, and K candidates on one shared prefix: tree == repeat == a naive re-forward of every text.

Legend: B rows, T cached tokens, M appended candidates, D hidden size.
"""

import pytest
import torch
from tiny import FAMILIES, RESERVED, NaiveModel, lora_model, make_selector, prompts, single, tiny_model

from transformers_s2t.models.forwards import fork_cache
from transformers_s2t.models.shared_prefix import positions_from_mask
from transformers_s2t.scoring.candidates import (
    PrefixCache,
    append_candidates,
    keep_candidate,
    supports_tree,
    tree_mask,
)
from transformers_s2t.scoring.reserved_rows import ReservedRows, bin_logits, candidate_scores


EXACT = {"atol": 2e-5, "rtol": 1e-4}


def cached_prefix(model, inputs):
    prefix = PrefixCache(model)
    with torch.no_grad():
        prefix.feed(inputs["input_ids"], inputs["attention_mask"].bool())
    return prefix.cache


def snapshot(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def same_cache(cache, states):
    return all(
        torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        for layer, (keys, values) in zip(cache.layers, states)
    )


def naive_hidden(model, inputs, candidate_ids_BM):
    """Hidden states (B, M, D): every candidate with its full prefix, one text a forward."""
    naive = NaiveModel(model)
    texts = [single(inputs, row)["input_ids"][0].tolist() for row in range(len(candidate_ids_BM))]
    return torch.stack(
        [torch.stack([naive([*text, c])[0] for c in ids]) for text, ids in zip(texts, candidate_ids_BM.tolist())]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Heads and masks


def test_bins_are_the_expected_value_of_equally_spaced_grades():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.allclose(candidate_scores(probabilities.log()), torch.tensor(0.2 / 3 + 0.3 * 2 / 3 + 0.4))
    assert torch.allclose(candidate_scores(torch.zeros(2, 3, 16)), torch.full((2, 3), 0.5))


def test_bins_reach_both_ends_of_the_unit_interval():
    extremes = torch.tensor([[90.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 90.0]])
    assert torch.allclose(candidate_scores(extremes), torch.tensor([0.0, 1.0]))


def test_the_linear_head_is_upper_mean_minus_lower_mean():
    assert float(candidate_scores(torch.tensor([1.0, 3.0, 10.0, 20.0]), "linear")) == 13.0


def test_bin_logits_read_the_reserved_rows_in_float32():
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.bfloat16)
    logits = bin_logits(hidden, rows)
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[1.0, 2.0, -1.0]]


def test_positions_are_numbered_as_generate_does():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions_from_mask(mask).tolist() == [[1, 1, 0, 1], [0, 1, 2, 3]]


def test_a_tree_mask_literal():
    """Row 0 has one column of padding; its second candidate stands one token earlier than the first."""
    prefix_mask = torch.tensor([[False, True, True], [True, True, True]])
    limits = torch.tensor([[3, 2], [3, 3]])
    yes, no = True, False
    expected = [
        [[[no, yes, yes, yes, no], [no, yes, no, no, yes]]],
        [[[yes, yes, yes, yes, no], [yes, yes, yes, no, yes]]],
    ]
    assert tree_mask(prefix_mask, limits, "sdpa", torch.float32).tolist() == expected
    additive = tree_mask(prefix_mask, limits, "eager", torch.float32)
    assert additive.dtype == torch.float32
    assert (additive == 0).tolist() == expected
    assert additive.unique().tolist() == [torch.finfo(torch.float32).min, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Candidates on a shared prefix


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [True, False], ids=["tree", "repeat"])
def test_appended_candidates_equal_a_naive_forward_of_every_text(family, attn, tree, batch):
    model = tiny_model(family, attn=attn)
    cache = cached_prefix(model, batch)
    before = snapshot(cache)
    candidates = torch.tensor([[5, 6, 7, 5], [10, 11, 12, 13], [20, 3, 40, 60]])
    positions = batch["attention_mask"].sum(-1, keepdim=True).expand_as(candidates)
    with torch.no_grad():
        hidden, fed, was_tree, _ = append_candidates(
            model, cache, batch["attention_mask"].bool(), candidates, positions, tree=tree
        )
    assert was_tree is tree
    assert torch.allclose(hidden, naive_hidden(model, batch, candidates), **EXACT)
    assert same_cache(cache, before), "scoring changed the cache that decoding goes on with"
    assert fed is not cache


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_at_different_places_of_one_prefix_equal_their_own_texts(family, attn, batch):
    model = tiny_model(family, attn=attn)
    cache = cached_prefix(model, batch)
    width = batch["input_ids"].shape[1]
    limits = torch.tensor([[2, 5, 7], [4, 6, 7], [3, 7, 5]])  # in columns; row 1 begins at column 3, row 2 at 2
    candidates = torch.tensor([[5, 6, 7], [10, 11, 12], [20, 3, 40]])
    starts = width - batch["attention_mask"].sum(-1, keepdim=True)
    with torch.no_grad():
        hidden, *_ = append_candidates(
            model, cache, batch["attention_mask"].bool(), candidates, limits - starts, limits_BM=limits
        )
    naive = NaiveModel(model)
    for row in range(3):
        for m in range(3):
            text = batch["input_ids"][row, starts[row, 0] : limits[row, m]].tolist()
            assert torch.allclose(hidden[row, m], naive([*text, int(candidates[row, m])])[0], **EXACT)


@pytest.mark.parametrize("tree", [True, False], ids=["tree", "repeat"])
def test_some_rows_of_a_cache_can_be_scored_in_any_order(tree, batch):
    model = tiny_model()
    cache = cached_prefix(model, batch)
    rows = torch.tensor([2, 0])
    candidates = torch.tensor([[5, 6], [7, 8]])
    picked = {name: tensor[rows] for name, tensor in batch.items()}
    with torch.no_grad():
        hidden, *_ = append_candidates(
            model,
            cache,
            picked["attention_mask"].bool(),
            candidates,
            picked["attention_mask"].sum(-1, keepdim=True).expand_as(candidates),
            row_index=rows,
            tree=tree,
        )
    assert torch.allclose(hidden, naive_hidden(model, picked, candidates), **EXACT)


def test_different_places_of_a_prefix_are_refused_where_only_repeating_is_exact(batch):
    model = tiny_model()
    cache = cached_prefix(model, batch)
    ids = torch.tensor([[5, 6]] * 3)
    with pytest.raises(ValueError, match="tree mask"):
        append_candidates(
            model, cache, batch["attention_mask"].bool(), ids, ids, limits_BM=torch.tensor([[7, 6]] * 3), tree=False
        )


@pytest.mark.parametrize("length", [3, 9])
def test_a_sliding_window_model_is_exact_in_a_tree(length):
    """Within the window (4 tokens) and beyond it."""
    model = tiny_model("mistral", sliding_window=4)
    inputs = prompts((length, length), seed=3)
    cache = cached_prefix(model, inputs)
    assert supports_tree(model, cache)
    candidates = torch.tensor([[5, 6, 7], [10, 11, 12]])
    positions = torch.full_like(candidates, length)
    for _ in range(2):  # the second time tells whether the first one moved the cache
        with torch.no_grad():
            hidden, _, tree, _ = append_candidates(
                model, cache, inputs["attention_mask"].bool(), candidates, positions
            )
        assert tree
        assert torch.allclose(hidden, naive_hidden(model, inputs, candidates), **EXACT)
    assert cache.get_seq_length() == length


def test_the_tree_is_used_for_plain_layers_under_sdpa_and_eager_only(batch):
    model = tiny_model()
    cache = cached_prefix(model, batch)
    assert supports_tree(model, cache)
    for attn in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation_internal = attn
        assert model.config._attn_implementation == attn
        assert not supports_tree(model, cache)


def test_a_subclass_of_the_plain_cache_layer_does_not_pass_for_one(batch):
    model = tiny_model()
    cache = cached_prefix(model, batch)

    class Other(type(cache.layers[0])):
        pass

    cache.layers[1].__class__ = Other
    assert not supports_tree(model, cache)


@pytest.mark.parametrize("rows", [None, [0, 0, 2]])
def test_feeding_a_fork_leaves_the_original_untouched(rows, batch):
    model = tiny_model()
    cache = cached_prefix(model, batch)
    before = snapshot(cache)
    fork = fork_cache(cache, None if rows is None else torch.tensor(rows))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5], [6], [7]]), past_key_values=fork)
    assert fork.get_seq_length() == cache.get_seq_length() + 1 == 8
    assert same_cache(cache, before)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tree", [True, False], ids=["tree", "repeat"])
def test_the_kept_candidate_leaves_the_cache_that_its_text_would(tree, attn, batch):
    model = tiny_model(attn=attn)
    candidates = torch.tensor([[5, 6, 7], [10, 11, 12], [20, 3, 40]])
    chosen = torch.tensor([2, 0, 1])
    mask = batch["attention_mask"].bool()
    positions = batch["attention_mask"].sum(-1, keepdim=True).expand_as(candidates)
    with torch.no_grad():
        _, fed, *_ = append_candidates(model, cached_prefix(model, batch), mask, candidates, positions, tree=tree)
    kept = keep_candidate(fed, chosen, 3, tree)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], candidates.gather(1, chosen[:, None])], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1),
    }
    expected = cached_prefix(model, longer)
    assert kept.get_seq_length() == 8
    real = longer["attention_mask"].bool()
    for layer, wanted in zip(kept.layers, expected.layers):
        for name in ("keys", "values"):
            ours, theirs = getattr(layer, name).transpose(1, 2), getattr(wanted, name).transpose(1, 2)
            assert torch.allclose(ours[real], theirs[real], **EXACT)


def test_a_lazily_fed_prefix_equals_one_forward(batch):
    model = tiny_model()
    mask = batch["attention_mask"].bool()
    lazy = PrefixCache(model)
    with torch.no_grad():
        lazy.feed(batch["input_ids"][:, :4], mask[:, :4])
        lazy.feed(batch["input_ids"][:, :4], mask[:, :4])
        assert lazy.num_cached == 4, "tokens that are cached already went through the model again"
        logits = lazy.feed(batch["input_ids"], mask, with_logits=True)
    for row in range(3):
        text = single(batch, row)["input_ids"][0].tolist()
        assert torch.allclose(logits[row], NaiveModel(model)(text)[1], **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# The adapter


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_with_the_adapter_off_the_logits_are_the_base_models_to_the_bit(family, tied, batch):
    model = tiny_model(family, tie_word_embeddings=tied)
    base = logits_of(model, batch)
    selector = make_selector(model)
    assert torch.equal(logits_of(model, batch), base)
    assert not torch.allclose(logits_of(selector.views().adapted, batch), base, atol=0.1)
    assert torch.equal(logits_of(model, batch), base)


@pytest.mark.parametrize("tied", [False, True])
def test_reserved_rows_come_in_the_order_asked_for(tied):
    model = lora_model(tiny_model(tie_word_embeddings=tied)).get_base_model()
    rows = ReservedRows(model, RESERVED, "s2t")()
    assert rows.shape == (16, 32)
    assert torch.equal(ReservedRows(model, RESERVED[::-1], "s2t")(), rows.flip(0))
    assert torch.equal(ReservedRows(model, (85,), "s2t")()[0], rows[4])


@pytest.mark.parametrize(("ids", "name"), [((80, *RESERVED), "s2t"), (RESERVED, "other")])
def test_untrained_rows_are_never_read_as_scores(ids, name):
    with pytest.raises(ValueError, match=f"Adapter '{name}' holds no trained rows.*trainable_token_indices"):
        ReservedRows(lora_model(tiny_model()), ids, name)


def test_a_model_without_an_adapter_has_no_reserved_rows():
    with pytest.raises(ValueError, match="holds no trained rows"):
        ReservedRows(tiny_model(), RESERVED, "s2t")
