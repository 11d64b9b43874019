"""Which ids carry scores: real tokenizers of the workshop, synthetic ones of the other families."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transformers_s2t.reserved_tokens import (
    NUM_RESERVED_TOKENS,
    check_same_vocabulary,
    find_reserved_token_ids,
    resize_for_reserved_tokens,
    vocab_hash,
)


TOKENIZERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
WORDS = {word: id for id, word in enumerate(["<unk>", "a", "b", " reserved", "preserved", "UNUSED", "placeholder1"])}


def real_tokenizer(name):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"{TOKENIZERS / name} is not on this machine")
    return AutoTokenizer.from_pretrained(TOKENIZERS / name)


def toy_tokenizer(added=(), words=WORDS, special=True):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(dict(words), unk_token="<unk>")))
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return tokenizer


@pytest.mark.parametrize(
    ("pattern", "others"),
    [
        ("<|reserved_special_token_{}|>", ["<|begin_of_text|>", "<|eot_id|>"]),  # Llama 3
        ("<unused{}>", ["<start_of_turn>", "<end_of_turn>"]),  # Gemma
        ("[unused{}]", ["[CLS]"]),  # BERT-like
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_named_reserved_tokens_are_taken_in_the_order_of_their_numbers(pattern, others, special):
    tokenizer = toy_tokenizer([*others, *(pattern.format(i) for i in reversed(range(40)))], special=special)
    ids = find_reserved_token_ids(tokenizer, num_head_rows=len(tokenizer) + 64)
    assert tokenizer.convert_ids_to_tokens(ids) == [pattern.format(i) for i in range(NUM_RESERVED_TOKENS)]


def test_six_placeholders_as_in_phi_are_too_few_and_free_rows_are_taken():
    tokenizer = toy_tokenizer([f"<|placeholder{i}|>" for i in range(1, 7)])
    rows = len(tokenizer) + 20
    assert find_reserved_token_ids(tokenizer, rows) == list(range(rows - 16, rows))
    assert len(find_reserved_token_ids(tokenizer, len(tokenizer), num_tokens=6)) == 6
    with pytest.raises(ValueError, match="names 6 and the output head has 3 rows"):
        find_reserved_token_ids(tokenizer, len(tokenizer) + 3)


def test_ordinary_words_are_never_matched():
    """A substring search hits " reserved", "preserved" and "UNUSED", which text is full of."""
    with pytest.raises(ValueError, match="names 0 and"):
        find_reserved_token_ids(toy_tokenizer(), len(WORDS), num_tokens=2)


def test_added_tokens_that_only_contain_the_word_are_never_matched():
    tokenizer = toy_tokenizer(["<reserved>", "<|reserved_words|>", " reserved_1", "<unused1>x", "unused2"])
    with pytest.raises(ValueError, match="names 0 and"):
        find_reserved_token_ids(tokenizer, len(tokenizer), num_tokens=2)


def test_named_tokens_above_the_output_head_are_not_taken():
    tokenizer = toy_tokenizer([f"<unused{i}>" for i in range(20)])
    with pytest.raises(ValueError, match="names 10"):
        find_reserved_token_ids(tokenizer, len(WORDS) + 10)


def test_free_rows_never_hold_a_token_where_the_ids_have_holes():
    """len(tokenizer) counts tokens; where ids have holes, the last rows may belong to tokens all the same."""
    words = {"<unk>": 0, "a": 1, "b": 2, "z": 50}
    tokenizer = toy_tokenizer(words=words)
    with pytest.raises(ValueError, match="rows above"):
        find_reserved_token_ids(tokenizer, num_head_rows=51)


def test_qwen_takes_the_last_rows_of_its_padded_head():
    tokenizer = real_tokenizer("qwen2.5")
    ids = find_reserved_token_ids(tokenizer, 151936)
    assert ids == list(range(151920, 151936))
    assert not set(ids) & set(tokenizer.get_vocab().values())


def test_gpt2_has_none_and_the_error_says_what_can_be_done():
    tokenizer = real_tokenizer("gpt2")
    with pytest.raises(ValueError, match=r"add_reserved_tokens=True.*reserved_token_ids"):
        find_reserved_token_ids(tokenizer, 50257)
    assert find_reserved_token_ids(tokenizer, 50273) == list(range(50257, 50273))


def test_resizing_grows_the_head_once_and_keeps_the_old_rows():
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    resize_for_reserved_tokens(model, 97)
    assert model.lm_head.weight.shape[0] == 97
    resize_for_reserved_tokens(model, 113)
    assert model.lm_head.weight.shape[0] == model.get_input_embeddings().weight.shape[0] == 113
    assert torch.equal(model.lm_head.weight[:97], before)


def test_equal_tokenizers_share_a_fingerprint():
    assert check_same_vocabulary(toy_tokenizer(["<x>"]), toy_tokenizer(["<x>"])) == vocab_hash(toy_tokenizer(["<x>"]))
    assert len(vocab_hash(toy_tokenizer())) == 16


def test_two_tokens_that_changed_places_change_the_fingerprint():
    swapped = WORDS | {"a": WORDS["b"], "b": WORDS["a"]}
    with pytest.raises(ValueError, match="token 'a' is 1 for `model` and 2 for `teacher_model`"):
        check_same_vocabulary(toy_tokenizer(), toy_tokenizer(words=swapped))


def test_a_token_that_one_tokenizer_lacks_is_named():
    with pytest.raises(ValueError, match="token '<x>' is 7 for `model` and missing for `teacher_model`"):
        check_same_vocabulary(toy_tokenizer(["<x>"]), toy_tokenizer())
    with pytest.raises(ValueError, match="`teacher_model` has 1 more tokens"):
        check_same_vocabulary(toy_tokenizer(), toy_tokenizer(["<x>"]))


def test_two_real_tokenizers_differ_by_a_named_token():
    with pytest.raises(ValueError, match="token '.+' is .*Choose two models of one family"):
        check_same_vocabulary(real_tokenizer("qwen2.5"), real_tokenizer("gpt2"))
