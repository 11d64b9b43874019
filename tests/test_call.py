"""What `generate` knows of its text (mask, positions, embeddings, other inputs) is used as it is, or refused.

The right value is in each case that of the bare text, without padding: the same text scores the same however it is
handed over.
"""

import pytest
import torch
from tiny import (
    EOS,
    NEVER_FINISHES,
    PAD,
    RESERVED,
    SCOPES,
    WAYS,
    disagreeing_pair,
    make_selector,
    prompts,
    tiny_model,
)
from transformers import DynamicCache, LogitsProcessor

from transformers_s2t import S2T, S2TDecodingConfig, S2TTrace, TeacherSelector, s2t_generate


NEW_TOKENS = 8
SETUPS = ("teacher", *SCOPES)


def set_up(setup, **config):
    """A model and its selector."""
    model = tiny_model(**config)
    if setup == "teacher":
        return model, TeacherSelector(disagreeing_pair()[1])
    return model, make_selector(model, *setup)


def decode(way, model, selector, trace=None, config=None, **inputs):
    """Tokens of `generate` by the processor or by `s2t_generate`."""
    config = config or S2TDecodingConfig(num_candidates=4, min_prob_ratio=0.0, warmup_tokens=0)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD} | NEVER_FINISHES | inputs
    if way == "processor":
        return model.generate(**settings, logits_processor=S2T(selector, config=config, trace=trace))
    return model.generate(
        **settings, custom_generate=s2t_generate, selector=selector, decoding_config=config, trace=trace
    )


def scores_of(trace):
    return torch.stack([step["scores_AK"] for step in trace.steps])


def assert_as_bare(way, model, selector, ids, mask, **inputs):
    """Every row of a batch is written, and its candidates are scored, as the row's own text is."""
    trace = S2TTrace()
    got = decode(way, model, selector, trace, input_ids=ids, attention_mask=mask, **inputs)
    for row in range(len(ids)):
        text, bare = ids[row][mask[row].bool()][None], S2TTrace()
        alone = decode("loop", model, selector, bare, input_ids=text)
        assert got[row, ids.shape[1] :].tolist() == alone[0, text.shape[1] :].tolist()
        torch.testing.assert_close(scores_of(trace)[:, row], scores_of(bare)[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("pad", [PAD, EOS, 5], ids=["own", "eos", "a token of the text"])
def test_padding_to_a_fixed_length_is_what_the_mask_says(setup, way, pad):
    """The processor took a run of the pad token for padding, or, with pad = eos, less what all rows share."""
    model, selector = set_up(setup, pad_token_id=pad)
    ids, mask = torch.full((2, 20), pad), torch.zeros(2, 20, dtype=torch.long)
    for row, text in enumerate(([5, 5, 31, 8, 44], [12, 5, 60])):
        ids[row, -len(text) :], mask[row, -len(text) :] = torch.tensor(text), 1
    assert_as_bare(way, model, selector, ids, mask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_model_that_names_no_padding_token_takes_padded_rows(setup, way, batch):
    model, selector = set_up(setup, pad_token_id=None)
    assert_as_bare(way, model, selector, batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_columns_that_are_masked_within_the_prompt_are_not_read(setup, way):
    model, selector = set_up(setup)
    inputs = prompts((8, 8))
    mask = torch.tensor([[1, 0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1, 1]])
    assert_as_bare(way, model, selector, inputs["input_ids"], mask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_text_that_begins_with_padding_tokens_is_read_whole(setup, way):
    model, selector = set_up(setup, pad_token_id=EOS)
    ids = torch.tensor([[EOS, EOS, 7, 8], [EOS, 9, 3, 4]])
    assert_as_bare(way, model, selector, ids, torch.ones_like(ids))


def refused(way, match, setup="teacher", config=None, **inputs):
    """An error before the first token, on either way."""
    model, selector = set_up(setup, **(config or {}))
    trace = S2TTrace()
    with pytest.raises(ValueError, match=match):
        decode(way, model, selector, trace, **inputs)
    assert not trace.steps


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_positions_that_do_not_follow_from_the_mask_are_refused(setup, way, batch):
    """Where nothing is masked, `generate` drops the mask before a strategy runs: the check was skipped with it."""
    ids = prompts((6,))["input_ids"]
    refused(way, "`position_ids`", setup, input_ids=ids, position_ids=torch.arange(6)[None] + 5)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    model, selector = set_up(setup)
    got = decode(way, model, selector, **batch, position_ids=positions)
    assert got.tolist() == decode(way, model, selector, **batch).tolist()
    refused(way, "`position_ids`", setup, **batch, position_ids=positions + 1)
    refused(way, "`position_ids`", setup, **batch, position_ids=positions.clamp_max(3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_padding_on_the_right_is_refused(setup, way):
    ids = prompts((6, 6))["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    refused(way, "last column of row 1.*padding_side = 'left'", setup, input_ids=ids, attention_mask=mask)
    mask[1] = 0
    refused(way, "last column of row 1", setup, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_scoring_would_leave_out_are_refused(way):
    ids = prompts((6,))["input_ids"]
    config = {"family": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}
    refused(way, "'token_type_ids'", config=config, input_ids=ids, token_type_ids=torch.ones_like(ids))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_embeddings_beside_ids_are_what_is_read(setup, way):
    """`generate` reads the embeddings and shows processors the ids: another text. A teacher has other embeddings."""
    model, selector = set_up(setup)
    ids, other = prompts((6,))["input_ids"], prompts((6,), seed=9)["input_ids"]
    embeds = model.get_input_embeddings()(other).detach()
    if setup == "teacher":
        return refused(way, "not `inputs_embeds`", setup, input_ids=ids, inputs_embeds=embeds)
    trace, expected_trace = S2TTrace(), S2TTrace()
    got = decode(way, model, selector, trace, input_ids=ids, inputs_embeds=embeds)
    expected = decode("loop", model, selector, expected_trace, input_ids=other)
    assert got[:, 6:].tolist() == expected[:, 6:].tolist()
    torch.testing.assert_close(scores_of(trace), scores_of(expected_trace), atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_are_refused_where_the_trigger_asks_a_teacher(way):
    """An AssertionError, in the first step."""
    model, selector = set_up(("candidate", "base"))
    embeds = model.get_input_embeddings()(prompts((6,))["input_ids"]).detach()
    config = S2TDecodingConfig(trigger="kl", threshold=0.1, warmup_tokens=0)
    trace, settings = S2TTrace(), {"inputs_embeds": embeds, "max_new_tokens": 4, "pad_token_id": PAD}
    with pytest.raises(ValueError, match="not `inputs_embeds`"):
        if way == "processor":
            s2t = S2T(selector, teacher_model=tiny_model(seed=9), config=config, trace=trace)
            model.generate(**settings, logits_processor=s2t)
        else:
            s2t = {"selector": selector, "teacher_model": tiny_model(seed=9), "decoding_config": config}
            model.generate(**settings, custom_generate=s2t_generate, trace=trace, **s2t)
    assert not trace.steps


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_the_new_part_of_a_text_alone_is_refused(setup, way):
    """With the rest in a cache; the whole text beside the cache is taken (test_decode.py)."""
    ids = prompts((8,))["input_ids"]
    model, selector = set_up(setup)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
    trace = S2TTrace()
    with pytest.raises(ValueError, match="pass the ids of all the text so far"):
        inputs = {"input_ids": ids[:, 5:], "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        decode(way, model, selector, trace, **inputs)
    assert not trace.steps


# ---------------------------------------------------------------------------------------------------------------------
# One selector, and something to select from


@pytest.mark.parametrize("other", ["teacher", ("candidate", "base")], ids=str)
def test_two_selectors_in_one_call_are_refused(other):
    """The first won, without a word: it leaves one token, which the second could only take."""
    model, selector = set_up(("candidate", "base"))
    second = S2T(set_up("teacher")[1] if other == "teacher" else selector)
    ids = prompts((6,))["input_ids"]
    with pytest.raises(ValueError, match="One call takes one S2T, got 2"):
        model.generate(ids, max_new_tokens=4, logits_processor=[*S2T(selector), *second])
    with pytest.raises(ValueError, match="select.* by itself.*Pass one of the two"):
        model.generate(ids, max_new_tokens=4, custom_generate=s2t_generate, selector=selector, logits_processor=second)


class Forbid(LogitsProcessor):
    """Everything but some ids, from a step on."""

    def __init__(self, allowed=(), length=8):
        self.allowed, self.length = list(allowed), length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] < self.length:
            return scores
        forbidden = torch.full_like(scores, float("-inf"))
        forbidden[:, self.allowed] = scores[:, self.allowed]
        return forbidden


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("trigger", ["always", "never", "entropy"])
@pytest.mark.parametrize("allowed", [(), RESERVED], ids=["none", "reserved"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_without_any_token_left_is_an_error(way, allowed, trigger, do_sample):
    """Token 0 was written."""
    model, selector = set_up(("candidate", "base"))
    threshold = {"threshold": 0.1} if trigger == "entropy" else {}
    config = S2TDecodingConfig(trigger=trigger, num_candidates=4, min_prob_ratio=0.0, warmup_tokens=0, **threshold)
    s2t = {"logits_processor": [Forbid(allowed), *S2T(selector, config=config)]}
    if way == "loop":
        s2t = {"logits_processor": [Forbid(allowed)], "custom_generate": s2t_generate, "selector": selector}
        s2t["decoding_config"] = config
    with pytest.raises(ValueError, match="Row 0 has no token left to choose"):
        model.generate(prompts((6,))["input_ids"], max_new_tokens=4, do_sample=do_sample, **NEVER_FINISHES, **s2t)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("paged", [False, True])
def test_continuous_batching_is_refused(way, paged):
    """It drops processors and strategies, and gave the base model's text."""
    model, selector = set_up(("candidate", "base"))
    s2t = {"logits_processor": S2T(selector)} if way == "processor" else {"custom_generate": s2t_generate}
    ids = prompts((6,))["input_ids"]
    with pytest.raises(ValueError, match="Continuous batching.*ignores logits processors"):
        if paged:
            model.generate(ids, max_new_tokens=4, cache_implementation="paged", **s2t)
        else:
            model.generate_batch(ids.tolist(), max_new_tokens=4, **s2t)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_processor_in_a_list_knows_one_call_from_the_next(setup):
    """A list does not say that a call begins. The next call's prompt is what the last one wrote: one token more than
    its processor has seen."""
    model, selector = set_up(setup)
    trace, config = S2TTrace(), S2TDecodingConfig(num_candidates=4, min_prob_ratio=0.0, warmup_tokens=3)
    processors = list(S2T(selector, config=config, trace=trace))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "logits_processor": processors} | NEVER_FINISHES
    text = model.generate(prompts((6,))["input_ids"], **settings)
    again = model.generate(text, **settings)
    assert trace.prompt_length == text.shape[1]
    assert again.tolist() == decode("loop", model, selector, config=config, input_ids=text).tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_call_within_a_call_of_the_same_object(setup):
    """The outer text goes on where it was, with its own warm-up."""
    model, selector = set_up(setup)
    config = S2TDecodingConfig(num_candidates=4, min_prob_ratio=0.0, warmup_tokens=3)
    one, ids, inner = S2T(selector, config=config), prompts((6,))["input_ids"], prompts((5,), seed=8)["input_ids"]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "logits_processor": one} | NEVER_FINISHES
    expected = decode("loop", model, selector, config=config, input_ids=inner).tolist()

    def decode_another(input_ids, scores, **kwargs):
        assert model.generate(inner, **settings).tolist() == expected
        return torch.zeros(len(input_ids), dtype=torch.bool)

    got = model.generate(ids, **settings, stopping_criteria=[decode_another])
    assert got.tolist() == decode("loop", model, selector, config=config, input_ids=ids).tolist()
