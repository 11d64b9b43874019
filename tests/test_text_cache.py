"""Texts that the frozen model has read are not read again in later epochs, and nothing that is trained changes."""

import pytest
import torch
from test_s2t_trainer import make_trainer
from test_shared_prefix import SYSTEM, CountTokens
from tiny import PAD, tiny_model
from tiny_labels import make_labels, make_uneven_labels
from transformers import DynamicCache

from transformers_s2t.models.shared_prefix import read_shared
from transformers_s2t.models.text_cache import TextCache


def read(model, ids_BT, mask_BT):
    """A cache of right-padded rows, and how many tokens of them were read as one row."""
    with torch.no_grad():
        cache = read_shared(model, ids_BT, mask_BT) or DynamicCache()
        start = cache.get_seq_length()
        model.model(input_ids=ids_BT[:, start:], attention_mask=mask_BT.long(), past_key_values=cache, use_cache=True)
    return cache, start


def padded(rows):
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids_BT, torch.arange(width) < torch.tensor(list(map(len, rows)))[:, None]


ROWS = [[*SYSTEM, 4, 8, 9], [*SYSTEM, 50, 3], [*SYSTEM, 33, 12, 9, 41, 7], [61, 62, 3]]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_mixture_of_kept_texts_is_what_the_model_reads(family):
    model, texts = tiny_model(family), TextCache(1 << 30)
    assert texts.read(*padded(ROWS)) is None
    for rows in (ROWS[:3], ROWS[3:]):  # with a shared beginning, and alone
        batch = padded(rows)
        texts.keep(*batch, *read(model, *batch))
    for order in ([0, 1, 2, 3], [3, 1], [2], [1, 1]):
        ids_BT, mask_BT = padded([ROWS[n] for n in order])
        found, (expected, _) = texts.read(ids_BT, mask_BT), read(model, ids_BT, mask_BT)
        for layer, other in zip(found.layers, expected.layers, strict=True):
            for states, wanted in ((layer.keys, other.keys), (layer.values, other.values)):
                keep = mask_BT[:, None, :, None]
                torch.testing.assert_close(states * keep, wanted * keep, rtol=1e-5, atol=1e-5)
    assert texts.read(*padded([ROWS[0], ROWS[0][:-1]])) is None


def test_a_shared_beginning_is_kept_once_and_the_limit_holds():
    model, batch = tiny_model(), padded(ROWS[:3])
    cache, start = read(model, *batch)
    assert start == len(SYSTEM)
    texts = TextCache(1 << 30)
    texts.keep(*batch, cache, start)
    per_token = sum(states[0, :, :1].nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    assert texts.num_bytes == per_token * (len(SYSTEM) + sum(len(row) - len(SYSTEM) for row in ROWS[:3]))
    texts.keep(*batch, cache, start)  # once more: nothing new
    assert texts.num_bytes == per_token * (len(SYSTEM) + 3 + 2 + 5)
    small = TextCache(per_token * (len(SYSTEM) + 6))
    small.keep(*batch, cache, start)
    assert small.num_bytes == per_token * (len(SYSTEM) + 3 + 2)
    assert small.read(*padded(ROWS[:2])) is not None and small.read(*batch) is None


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_later_epochs_read_no_text_and_train_the_same(tmp_path):
    found = {}
    for size in (2.0, 0.0):
        settings = {"num_train_epochs": 3, "per_device_train_batch_size": 3, "text_cache_gb": size}
        settings |= {"eval_strategy": "epoch", "logging_strategy": "epoch"}
        trainer = make_trainer(
            tmp_path / str(size), labels=make_uneven_labels(), eval_dataset=make_labels(3), **settings
        )
        with CountTokens(trainer.base_model) as count:  # the views' own decoder is a copy with this hook
            trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        agreement = [log["eval_agree_at_1"] for log in trainer.state.log_history if "eval_agree_at_1" in log]
        found[size] = (count.tokens, losses, agreement, weights_of(trainer))
    tokens, losses, agreement, weights = found[2.0]
    all_tokens, other_losses, other_agreement, other_weights = found[0.0]
    assert tokens < 0.8 * all_tokens
    assert losses == pytest.approx(other_losses, rel=1e-5) and agreement == other_agreement
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=1e-3, atol=1e-5)


def test_texts_are_kept_where_the_base_model_alone_reads_them(tmp_path):
    assert make_trainer(tmp_path)._text_cache.max_bytes == int(2e9)
    assert make_trainer(tmp_path, text_cache_gb=0)._text_cache is None
    assert make_trainer(tmp_path, adapter_scope="sequence")._text_cache is None
    for bad in (-1.0, float("nan"), "much"):
        with pytest.raises(ValueError, match="`text_cache_gb` must be 0 or more and finite, got"):
            make_trainer(tmp_path, text_cache_gb=bad)
