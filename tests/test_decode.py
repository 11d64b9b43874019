"""Decoding as equivalences: both ways, every scope, and a naive decoder without caches give the same tokens.

Ways: "processor" is `logits_processor=S2T(...)`, "loop" is `custom_generate=s2t_generate`. Models are random, so most
tests offer all K candidates (min_prob_ratio=0) and assert that something flipped: otherwise they could not fail.
"""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    EOS,
    FAMILIES,
    NEVER_FINISHES,
    PAD,
    RESERVED,
    SCOPES,
    SETUPS,
    WAYS,
    NaiveModel,
    in_turn,
    lora_model,
    make_selector,
    offer_all,
    prompts,
    single,
    tiny_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from transformers_s2t import (
    S2T,
    FusionWeights,
    LocalSelector,
    S2TLogitsProcessor,
    S2TTrace,
    SelectorConfig,
    TeacherSelector,
    s2t_generate,
)
from transformers_s2t.fusion import decide
from transformers_s2t.models.views import adapter_is_on
from transformers_s2t.proposals import Proposals


NEW_TOKENS = 12
LOCAL_SETUPS = SCOPES


def name_of(setup):
    return setup if isinstance(setup, str) else "-".join(setup)


def set_up(setup, family="llama", attn="sdpa", **config):
    """A model and what selects in it: a teacher, or the model itself in one of the scopes."""
    model = tiny_model(family, attn=attn, **config)
    if setup == "teacher":
        return model, TeacherSelector(tiny_model(family, seed=9, attn=attn))
    return model, make_selector(model, *setup)


def generate(way, model, inputs, selector, config=None, trace=None, teacher=None, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    if way == "processor":
        processors = S2T(selector, teacher_model=teacher, config=config, trace=trace)
        return model.generate(**inputs, logits_processor=processors, **kwargs)
    return model.generate(
        **inputs,
        custom_generate=s2t_generate,
        selector=selector,
        teacher_model=teacher,
        decoding_config=config,
        trace=trace,
        **kwargs,
    )


def both_ways(model, inputs, selector, config=None, **kwargs):
    """The tokens that both ways agree on, and the cached loop's trace."""
    trace = S2TTrace()
    processor = generate("processor", model, inputs, selector, config, **kwargs)
    loop = generate("loop", model, inputs, selector, config, trace, **kwargs)
    assert processor.tolist() == loop.tolist()
    return loop, trace


def num_flipped(trace):
    return sum(step["flipped"] for row in trace.rows() for step in row)


def plain(model, inputs, **kwargs):
    return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs))


def middle_threshold(model, inputs, selector, trigger, teacher=None):
    """A threshold that about half of the steps reach, well away from every value that occurs without selection."""
    trace = S2TTrace()
    config = offer_all(trigger=trigger, threshold=-math.inf)
    generate("loop", model, inputs, selector, config, trace, teacher)
    values = torch.stack([step["value_B"] for step in trace.steps]).flatten().sort().values
    middle = len(values) // 2
    return float(values[middle - 1] + values[middle]) / 2


class CountForwards:
    """How often a model's decoder ran, and on how many tokens."""

    def __init__(self, model):
        self.calls, self.tokens = 0, 0
        self.handle = model.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.calls += 1
        self.tokens += kwargs["input_ids"].numel()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# The naive reference: one row, no cache, every prefix and every candidate a full forward


def naive_value(trigger, logits_V, teacher_logits_V):
    if trigger == "entropy":
        return float(torch.distributions.Categorical(logits=logits_V.topk(64).values).entropy())
    if trigger == "margin":
        best, second = logits_V.sort(descending=True).values[:2].tolist()
        return second - best
    return float((teacher_logits_V.softmax(-1) * (teacher_logits_V.log_softmax(-1) - logits_V.log_softmax(-1))).sum())


def naive_decode(setup, selector, family, attn, ids, config):
    """New tokens of one text, and at how many steps they are not the student's first."""
    local = setup != "teacher"
    student = NaiveModel(tiny_model(family, attn=attn), selector if local else None)
    teacher = None if local else NaiveModel(tiny_model(family, seed=9, attn=attn))
    writes_with = "all" if local and setup[1] == "adapted" else "none"
    scores_with = {"candidate": "last", "sequence": "all"}[setup[0]] if local else None
    ids, start, flipped, config = list(ids), len(ids), 0, selector.resolve_config(config)
    while len(ids) < start + NEW_TOKENS:
        logits_V = student(ids, writes_with)[1].clone()
        if local:
            logits_V[list(RESERVED)] = -math.inf
        teacher_V = None if local else teacher(ids)[1]
        logprobs = logits_V.log_softmax(-1).tolist()
        ranked = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[: config.num_candidates]
        least = logprobs[ranked[0]] + (math.log(config.min_prob_ratio) if config.min_prob_ratio else -math.inf)
        offered = [token for token in ranked if logprobs[token] >= least]
        token = ranked[0]
        fires = len(ids) - start >= config.warmup_tokens
        if config.trigger != "always":
            fires = fires and naive_value(config.trigger, logits_V, teacher_V) >= config.threshold
        if fires and len(offered) > 1:
            if local:
                bins = torch.linspace(0, 1, len(RESERVED))
                hidden = [student([*ids, candidate], scores_with)[0] for candidate in offered]
                scores = [float((student.rows_RD @ hidden_D).softmax(-1) @ bins) for hidden_D in hidden]
            else:
                scores = teacher_V[offered].tolist()
            token = offered[scores.index(max(scores))]
            flipped += token != ranked[0]
        ids.append(token)
        if token == EOS:
            break
    return ids[start:], flipped


def until_end(new_tokens):
    new_tokens = new_tokens.tolist()
    return new_tokens[: new_tokens.index(EOS) + 1] if EOS in new_tokens else new_tokens


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
# the others by day in test_architectures.py
@pytest.mark.parametrize("family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_both_ways_equal_a_naive_decoder_without_caches(setup, family, attn, batch):
    model, selector = set_up(setup, family, attn)
    config = offer_all()
    got, _ = both_ways(model, batch, selector, config)
    flips = 0
    for row in range(3):
        ids = single(batch, row)["input_ids"][0].tolist()
        expected, flipped = naive_decode(setup, selector, family, attn, ids, config)
        assert until_end(got[row, batch["input_ids"].shape[1] :]) == expected
        flips += flipped
    assert flips >= 5


TRIGGERED = [("teacher", "kl"), *((setup, trigger) for setup in SETUPS for trigger in ("entropy", "margin"))]


@pytest.mark.parametrize(("asker", "ratio"), in_turn(TRIGGERED, [0.0, 0.3]))
def test_triggered_steps_equal_those_of_the_naive_decoder(asker, ratio, batch):
    setup, trigger = asker
    model, selector = set_up(setup)
    threshold = middle_threshold(model, batch, selector, trigger)
    config = offer_all(trigger=trigger, threshold=threshold, min_prob_ratio=ratio)
    trace = S2TTrace()
    got = generate("loop", model, batch, selector, config, trace)
    flips = 0
    for row in range(3):
        ids = single(batch, row)["input_ids"][0].tolist()
        expected, flipped = naive_decode(setup, selector, "llama", "sdpa", ids, config)
        assert until_end(got[row, batch["input_ids"].shape[1] :]) == expected
        flips += flipped
    assert flips == num_flipped(trace) > 0
    triggered = [step["triggered"] for row in trace.rows() for step in row[3:]]
    assert 0 < sum(triggered) < len(triggered)


# ---------------------------------------------------------------------------------------------------------------------
# Processor == s2t_generate


def test_the_two_calls_of_the_design_work_as_they_are_written(batch):
    """`S2T(teacher_model=t)` and `S2T(selector)` literally, and the cached loop with `selector=` alone."""
    model, teacher = tiny_model(), tiny_model(seed=9)
    greedy = model.generate(**batch, max_new_tokens=NEW_TOKENS)
    by_teacher = model.generate(**batch, logits_processor=S2T(teacher_model=teacher), max_new_tokens=NEW_TOKENS)
    assert by_teacher.tolist() != greedy.tolist()
    loop = model.generate(**batch, custom_generate=s2t_generate, teacher_model=teacher, max_new_tokens=NEW_TOKENS)
    assert loop.tolist() == by_teacher.tolist()
    selector = make_selector(model)
    by_itself = model.generate(**batch, logits_processor=S2T(selector), max_new_tokens=NEW_TOKENS)
    assert by_itself.tolist() != greedy.tolist()
    loop = model.generate(**batch, custom_generate=s2t_generate, selector=selector, max_new_tokens=NEW_TOKENS)
    assert loop.tolist() == by_itself.tolist()


def test_a_list_of_one_processor_is_what_s2t_is(batch):
    model, selector = set_up("teacher")
    config = offer_all()
    alone = plain(model, batch, logits_processor=[S2TLogitsProcessor(selector, config=config)])
    assert alone.tolist() == generate("processor", model, batch, selector, config).tolist()


@pytest.mark.parametrize(
    ("setup", "trigger"),
    [(setup, trigger) for setup in SETUPS for trigger in ("entropy", "margin", "kl", "random")],
    ids=lambda value: name_of(value),
)
def test_both_ways_trigger_at_the_same_steps_with_the_same_values(setup, trigger, batch):
    model, selector = set_up(setup)
    teacher = getattr(selector, "teacher_model", tiny_model(seed=9)) if trigger == "kl" else None
    threshold = 0.5 if trigger == "random" else middle_threshold(model, batch, selector, trigger, teacher)
    config = offer_all(trigger=trigger, threshold=threshold)
    traces = S2TTrace(), S2TTrace()
    tokens = [
        generate(way, model, batch, selector, config, trace, teacher, eos_token_id=None)
        for way, trace in zip(WAYS, traces)
    ]
    assert tokens[0].tolist() == tokens[1].tolist()
    assert num_flipped(traces[0]) == num_flipped(traces[1]) > 0
    for processor, loop in zip(traces[0].steps, traces[1].steps):
        assert torch.allclose(processor["value_B"], loop["value_B"], atol=1e-4)
        assert torch.equal(processor["asked_B"], loop["asked_B"])


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_trigger_never_is_greedy_generate(way, setup, batch):
    model, selector = set_up(setup)
    banned = {} if setup == "teacher" else {"suppress_tokens": list(RESERVED)}
    expected = plain(model, batch, **banned)
    assert generate(way, model, batch, selector, offer_all(trigger="never")).tolist() == expected.tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{"num_candidates": 1}, {"min_prob_ratio": 1.0}], ids=["K=1", "floor=1"])
def test_one_candidate_is_greedy_generate(way, setup, settings, batch):
    model, selector = set_up(setup)
    banned = {} if setup == "teacher" else {"suppress_tokens": list(RESERVED)}
    trace = S2TTrace()
    got = generate(way, model, batch, selector, offer_all(**settings), trace)
    assert got.tolist() == plain(model, batch, **banned).tolist()
    assert any(step["triggered"] for row in trace.rows() for step in row)
    assert not any(step["asked"] for row in trace.rows() for step in row)


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_equal_to_the_student_changes_nothing(way, batch):
    model, trace = tiny_model(), S2TTrace()
    got = generate(way, model, batch, TeacherSelector(tiny_model()), offer_all(warmup_tokens=0), trace)
    assert got.tolist() == plain(model, batch).tolist()
    assert all(step["asked"] for step in trace.rows()[0])


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize("trigger", ["always", "entropy"])
@pytest.mark.parametrize("way", WAYS)
def test_a_left_padded_batch_equals_its_rows_alone(way, trigger, setup, batch):
    """With "entropy" rows trigger at different steps, and rows that are not asked go along in the same forward."""
    model, selector = set_up(setup)
    config = offer_all()
    if trigger == "entropy":
        config = offer_all(trigger=trigger, threshold=middle_threshold(model, batch, selector, trigger))
    trace = S2TTrace()
    together = generate(way, model, batch, selector, config, trace)[:, batch["input_ids"].shape[1] :]
    assert num_flipped(trace) > 0
    for row in range(3):
        alone = single(batch, row)
        new = generate(way, model, alone, selector, config)[0, alone["input_ids"].shape[1] :]
        assert together[row, : len(new)].tolist() == new.tolist()
        assert set(together[row, len(new) :].tolist()) <= {PAD}


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_padding_with_the_end_of_sequence_token_is_still_padding(setup):
    model, selector = set_up(setup)
    inputs = prompts((6, 3))
    model.generation_config.pad_token_id = model.config.pad_token_id = EOS
    if setup == "teacher":
        selector.teacher_model.generation_config.pad_token_id = selector.teacher_model.config.pad_token_id = EOS
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, EOS)
    _, trace = both_ways(model, inputs, selector, offer_all())
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.6, 1.0])
def test_both_ways_agree_at_every_floor(setup, ratio, batch):
    model, selector = set_up(setup)
    _, trace = both_ways(model, batch, selector, offer_all(min_prob_ratio=ratio), **NEVER_FINISHES)
    assert (num_flipped(trace) > 0) == (ratio < 1)
    offered = [len(step["candidate_ids"]) for row in trace.rows() for step in row if step["asked"]]
    assert set(offered) == {5} if ratio == 0 else all(2 <= n <= 5 for n in offered)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warmup", [0, 3, 6])
@pytest.mark.parametrize("setup", ["teacher", ("sequence", "adapted")], ids=name_of)
def test_the_first_new_tokens_never_trigger(setup, warmup, way, batch):
    model, selector = set_up(setup)
    trace = S2TTrace()
    got = generate(way, model, batch, selector, offer_all(warmup_tokens=warmup), trace, **NEVER_FINISHES)
    asked = [bool(step["asked_B"].all()) for step in trace.steps]
    assert asked == [False] * warmup + [True] * (NEW_TOKENS - warmup)
    never = generate(way, model, batch, selector, offer_all(trigger="never"), **NEVER_FINISHES)
    assert got[:, : 7 + warmup].tolist() == never[:, : 7 + warmup].tolist()
    assert got.tolist() != never.tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_model_that_repeats_cache_rows_decodes_the_same(setup, monkeypatch, batch):
    """The fallback of models without a tree mask, forced upon one that has it."""
    model, selector = set_up(setup)
    expected = generate("loop", model, batch, selector, offer_all())
    for module in ("scoring.candidates", "decoding.local_selector"):
        monkeypatch.setattr(f"transformers_s2t.{module}.supports_tree", lambda model, cache: False)
    tokens, trace = both_ways(model, batch, selector, offer_all())
    assert tokens.tolist() == expected.tolist()
    assert num_flipped(trace) > 0
    assert "tree" not in trace.forwards


@pytest.mark.parametrize("setup", [("candidate", "base"), ("sequence", "adapted")], ids=name_of)
def test_flex_attention_repeats_cache_rows_and_selects_the_same(setup):
    """It takes block masks, which a tree would have to be compiled into. (Here it runs uncompiled.)"""
    model, selector = set_up(setup, hidden_size=64, head_dim=16)
    inputs, settings = prompts((6,)), {"max_new_tokens": 3, **NEVER_FINISHES}
    config = offer_all(warmup_tokens=0, num_candidates=2)
    expected = generate("loop", model, inputs, selector, config, **settings)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        tokens, trace = both_ways(model, inputs, selector, config, **settings)
    assert tokens.tolist() == expected.tolist()
    assert set(trace.forwards) == {"scorer"}


def test_a_cache_that_keeps_more_than_the_window_is_masked_by_the_window():
    """A user's own DynamicCache holds plain layers, whatever the model's attention looks back at."""
    model, selector = set_up(("candidate", "base"), "mistral", sliding_window=4)
    inputs, config = prompts((9,)), offer_all(warmup_tokens=0)
    expected = generate("loop", model, inputs, selector, config)
    trace = S2TTrace()
    got = generate("loop", model, inputs, selector, config, trace, past_key_values=DynamicCache())
    assert got.tolist() == expected.tolist()
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("num_free", [0, 10_000], ids=["two-forwards", "one-forward"])
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_one_forward_and_two_select_the_same(setup, num_free, monkeypatch, batch):
    """Which is cheaper depends on the device and on how many rows ask; the tokens must not."""
    model, selector = set_up(setup)
    config = offer_all(trigger="random", threshold=0.6, warmup_tokens=0)
    expected = generate("loop", model, batch, selector, config)
    monkeypatch.setattr("transformers_s2t.scoring.candidates.FREE_TOKENS", {"cpu": num_free})
    tokens, trace = both_ways(model, batch, selector, config)
    assert tokens.tolist() == expected.tolist()
    assert num_flipped(trace) > 0
    shares_the_cache = num_free > 0 and setup != ("sequence", "base")
    assert ("tree" in trace.forwards) is shares_the_cache


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_is_not_plain_lora_takes_two_forwards(dora, batch):
    """DoRA rescales the base weights: there is no sum that could be added to the last tokens alone."""
    model = tiny_model()
    torch.manual_seed(1)
    peft_config = LoraConfig(
        target_modules="all-linear",
        trainable_token_indices={"lm_head": list(RESERVED)},
        init_lora_weights=False,
        use_dora=dora,
    )
    peft_model = get_peft_model(model, peft_config, adapter_name="s2t").eval()
    selector = LocalSelector(peft_model, SelectorConfig(RESERVED, num_candidates=5, min_prob_ratio=0.0), "s2t")
    assert selector.can_split is not dora
    _, trace = both_ways(model, batch, selector, offer_all())
    assert ("tree" in trace.forwards) is not dora


@pytest.mark.parametrize("fails", [False, True])
def test_ordinary_steps_run_the_base_layers_alone_and_the_model_is_left_as_it_was(fails, batch):
    """PEFT's detour through layers that are switched off costs a tenth of a step where Python is the bottleneck."""
    model, selector = set_up(("candidate", "base"))
    before = [(name, id(module)) for name, module in model.named_modules()]
    calls = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda *call: calls.append(1))

    def stop(input_ids, scores, **kwargs):
        if fails and input_ids.shape[1] == 10:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    try:
        generate("loop", model, batch, selector, offer_all(trigger="never"), stopping_criteria=[stop])
    except KeyboardInterrupt:
        assert fails
    assert not calls
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    generate("loop", model, batch, selector, offer_all(warmup_tokens=NEW_TOKENS - 1))
    assert not calls, "adapted and base tokens share a forward: the base layers' own"
    model.generate(**batch, max_new_tokens=2)
    assert calls


def test_a_merged_selector_selects_the_same_without_an_adapter_in_the_way(batch):
    model, selector = set_up(("sequence", "adapted"))
    expected, _ = both_ways(model, batch, selector, offer_all())
    assert selector.merge() is selector
    assert not any(hasattr(module, "lora_A") for module in model.modules() if module is not model.lm_head)
    tokens, trace = both_ways(model, batch, selector, offer_all())
    assert tokens.tolist() == expected.tolist()
    assert num_flipped(trace) > 0 and set(trace.forwards) == {"tree"}


def test_merging_is_exact_or_refused(tmp_path):
    for setup in SCOPES[:2]:
        with pytest.raises(ValueError, match="Merging takes `proposals='adapted'`"):
            set_up(setup)[1].merge()
    model = tiny_model()
    model = lora_model(model, seed=5, name="own", reserved=(3, 4))
    save_adapter(tmp_path, ("sequence", "adapted"))
    selector = LocalSelector.from_pretrained(tmp_path, model)
    with pytest.raises(ValueError, match="cannot be merged exactly"):
        selector.merge()


def test_a_layer_that_flattens_its_tokens_takes_two_forwards(batch):
    """Experts see the tokens of all rows in one heap: which of them are the last ones cannot be told."""
    model, selector = set_up(("candidate", "base"))
    expected = generate("loop", model, batch, selector, offer_all())
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden.flatten(0, 1)).reshape(hidden.shape)
    tokens, trace = both_ways(model, batch, selector, offer_all())
    assert tokens.tolist() == expected.tolist()
    assert not selector.can_split and set(trace.forwards) == {"scorer"}


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_both_ways_agree_on_a_sliding_window_beyond_its_window(setup, batch):
    model, selector = set_up(setup, "mistral", sliding_window=5)
    _, trace = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_both_ways_agree_for_tied_and_untied_heads(tied, batch):
    model = tiny_model(tie_word_embeddings=tied)
    selector = make_selector(model, "sequence", "adapted")
    _, trace = both_ways(model, batch, selector, offer_all())
    assert num_flipped(trace) > 0


# ---------------------------------------------------------------------------------------------------------------------
# One object, many calls


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_one_processor_serves_call_after_call_and_any_batch(setup, batch):
    model, selector = set_up(setup)
    config = offer_all(trigger="random", threshold=0.4)  # a generator that goes on from call to call would show
    one = S2T(selector, config=config)
    for inputs in (batch, prompts((4, 6), seed=8), prompts((9,), seed=9), batch, batch):
        got = plain(model, inputs, logits_processor=one)
        assert got.tolist() == generate("processor", model, inputs, selector, config).tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_call_that_goes_on_with_the_last_calls_output_is_a_new_call(setup):
    """The commonest way to continue a text: `generate(output)`. Warm-up and trace must start again."""
    model, selector = set_up(setup)
    trace = S2TTrace()
    one, inputs = S2T(selector, config=offer_all(), trace=trace), prompts((5,))
    output = plain(model, inputs, logits_processor=one, **NEVER_FINISHES)
    longer = {"input_ids": output, "attention_mask": torch.ones_like(output)}
    got = plain(model, longer, logits_processor=one, **NEVER_FINISHES)
    assert trace.prompt_length == output.shape[1]
    assert got.tolist() == generate("processor", model, longer, selector, offer_all(), **NEVER_FINISHES).tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_the_cached_loop_continues_from_a_cache_of_the_prompt(setup):
    model, selector = set_up(setup)
    inputs = prompts((8,))
    expected = generate("loop", model, inputs, selector, offer_all())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :5], past_key_values=cache)
    got = generate("loop", model, inputs, selector, offer_all(), past_key_values=cache)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_local_selector_leaves_the_model_in_the_state_that_writes_the_text(setup, batch):
    model, selector = set_up(setup)
    before = plain(model, batch)
    adapted = setup[1] == "adapted"
    if not adapted:
        assert before.tolist() == plain(tiny_model(), batch).tolist()
    for way in WAYS:
        generate(way, model, batch, selector, offer_all())
        assert adapter_is_on(model, selector.adapter_name) is adapted
        assert plain(model, batch).tolist() == before.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What `generate` offers


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize(
    "warpers",
    [
        {"temperature": 0.7},
        {"top_k": 10, "top_p": 0.9},
        {"min_p": 0.05},
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
        pytest.param({"top_h": 0.3}),
    ],
    ids=lambda warpers: "+".join(warpers),
)
def test_both_ways_draw_the_same_samples_from_the_same_seed(setup, warpers, batch):
    model, selector = set_up(setup)
    config = offer_all(trigger="random", threshold=0.6)
    settings = {"do_sample": True, "top_k": 0} | warpers | NEVER_FINISHES
    outputs, traces = [], []
    for way in WAYS:
        torch.manual_seed(3)
        traces.append(S2TTrace())
        outputs.append(generate(way, model, batch, selector, config, traces[-1], **settings))
    assert outputs[0].tolist() == outputs[1].tolist()
    candidates = [
        [step["candidate_ids_AK"][step["mask_AK"]].tolist() for step in trace.steps if "mask_AK" in step]
        for trace in traces
    ]
    assert candidates[0] == candidates[1]
    assert num_flipped(traces[0]) > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_triggered_step_of_a_sampled_text_emits_the_selected_token(way, batch):
    model, selector = set_up("teacher")
    trace = S2TTrace()
    config = offer_all(trigger="random", threshold=0.5)
    torch.manual_seed(0)
    got = generate(way, model, batch, selector, config, trace, do_sample=True, temperature=1.5, **NEVER_FINISHES)
    emitted = got[:, 7:].T
    asked = torch.stack([step["asked_B"] for step in trace.steps])
    selected = torch.stack([step["token_B"] for step in trace.steps])
    assert torch.equal(emitted[asked], selected[asked])
    assert bool((emitted[~asked] != selected[~asked]).any()), "the other steps were not sampled"


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_each_of_several_return_sequences_decodes_on_its_own(setup):
    model, selector = set_up(setup)
    outputs = []
    for way in WAYS:
        torch.manual_seed(1)
        config = offer_all(trigger="random", threshold=0.7)
        settings = {"do_sample": True, "num_return_sequences": 3} | NEVER_FINISHES
        outputs.append(generate(way, model, prompts((5, 3)), selector, config, **settings))
    assert outputs[0].shape == (6, 5 + NEW_TOKENS)
    assert outputs[0].tolist() == outputs[1].tolist()
    assert len({tuple(row) for row in outputs[0].tolist()}) == 6


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 50))},
        {"bad_words_ids": [[token] for token in range(50, 81)]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_users_processors_shape_the_proposals(setup, settings, batch):
    model, selector = set_up(setup)
    without, _ = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    got, trace = both_ways(model, batch, selector, offer_all(), **settings, **NEVER_FINISHES)
    assert got.tolist() != without.tolist()
    assert num_flipped(trace) > 0
    if "suppress_tokens" in settings:
        assert not set(got[:, 7:].flatten().tolist()) & set(settings["suppress_tokens"])


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_any_end_of_sequence_token_ends_its_row_alone(setup, batch):
    model, selector = set_up(setup)
    free, _ = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    ends = [int(free[0, 7 + 4]), int(free[2, 7 + 6])]  # selected tokens, not only student's firsts
    got, _ = both_ways(model, batch, selector, offer_all(), eos_token_id=ends)
    for row in range(3):
        expected = free[row].tolist()
        end = next((i for i in range(7, len(expected)) if expected[i] in ends), len(expected) - 1)
        expected[end + 1 :] = [PAD] * (len(expected) - end - 1)
        assert got[row].tolist() == expected[: got.shape[1]]
    assert PAD in got[0, 7:].tolist() or got.shape[1] < free.shape[1]


@pytest.fixture(scope="module")
def tokenizer():
    # StopStringCriteria wants to be able to write "abcdef"
    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS, "abcdef": 3} | {f"w{i};": i for i in range(4, 97)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_stop_string_ends_the_text_on_both_ways(setup, tokenizer):
    model, selector = set_up(setup)
    inputs = prompts((6,))
    free, _ = both_ways(model, inputs, selector, offer_all(), **NEVER_FINISHES)
    stop = int(free[0, 6 + 5])
    stops = [f"w{stop};"]
    got = generate(
        "processor", model, inputs, selector, offer_all(), stop_strings=stops, tokenizer=tokenizer, **NEVER_FINISHES
    )
    # `generate` drops `tokenizer=` for every custom strategy (test_library_guards.py), so the criterion goes in itself
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stops)])
    loop = generate("loop", model, inputs, selector, offer_all(), stopping_criteria=criteria, **NEVER_FINISHES)
    assert loop.tolist() == got.tolist()
    first = free[0, 6:].tolist().index(stop)
    assert got[0].tolist() == free[0, : 6 + first + 1].tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits_are_returned_alike_on_both_ways(setup, do_sample, batch):
    model, selector = set_up(setup)
    outputs, trace = [], S2TTrace()
    config = offer_all(trigger="random", threshold=0.5)
    for way in WAYS:
        torch.manual_seed(4)
        outputs.append(
            generate(
                way,
                model,
                batch,
                selector,
                config,
                trace,
                do_sample=do_sample,
                output_scores=True,
                output_logits=True,
                return_dict_in_generate=True,
                **NEVER_FINISHES,
            )
        )
    processor, loop = outputs
    assert type(processor) is type(loop)
    assert processor.sequences.tolist() == loop.sequences.tolist()
    assert len(loop.scores) == len(loop.logits) == NEW_TOKENS
    assert isinstance(loop.past_key_values, DynamicCache)
    for ours, theirs in zip(loop.scores + loop.logits, processor.scores + processor.logits):
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
        assert torch.allclose(ours, theirs, atol=1e-4)
    for step, scores in zip(trace.steps, loop.scores):
        finite = torch.isfinite(scores).sum(-1)
        assert bool((finite[step["asked_B"]] == 1).all())
        assert bool((finite[~step["asked_B"]] > 1).all())
        assert torch.equal(scores[step["asked_B"]].argmax(-1), step["token_B"][step["asked_B"]])


def test_without_a_dict_no_scores_are_kept(batch):
    model, selector = set_up("teacher")
    assert isinstance(generate("loop", model, batch, selector), torch.Tensor)
    output = generate("loop", model, batch, selector, return_dict_in_generate=True)
    assert (output.scores, output.logits) == (None, None)


@pytest.mark.parametrize("streamer_type", [TextStreamer, TextIteratorStreamer])
@pytest.mark.parametrize("setup", ["teacher", ("sequence", "adapted")], ids=name_of)
def test_text_streams_alike_on_both_ways(setup, streamer_type, tokenizer, capsys):
    model, selector = set_up(setup)
    inputs, texts = prompts((6,)), []
    for way in WAYS:
        streamer = streamer_type(tokenizer, skip_prompt=True)
        got = generate(way, model, inputs, selector, offer_all(), streamer=streamer)
        text = capsys.readouterr().out if streamer_type is TextStreamer else "".join(streamer)
        texts.append(text.strip())
    assert texts[0] == texts[1] == tokenizer.decode(got[0, 6:])


# ---------------------------------------------------------------------------------------------------------------------
# Teachers


@pytest.mark.parametrize("way", WAYS)
def test_takeover_at_every_step_is_the_teachers_own_text(way, batch):
    model, teacher = tiny_model(), tiny_model(seed=9)
    selector, config = TeacherSelector(teacher, takeover=True), offer_all(warmup_tokens=0)
    assert generate(way, model, batch, selector, config).tolist() == plain(teacher, batch).tolist()


def test_takeover_emits_the_teachers_token_at_triggered_steps_only(batch):
    model, teacher = tiny_model(), tiny_model(seed=9)
    config = offer_all(trigger="random", threshold=0.5)
    got, trace = both_ways(model, batch, TeacherSelector(teacher, takeover=True), config, **NEVER_FINISHES)
    student, naive_teacher, outside = NaiveModel(model), NaiveModel(teacher), 0
    for row in range(3):
        ids, width = single(batch, row)["input_ids"][0].tolist(), batch["input_ids"].shape[1]
        for step, token in zip(trace.rows()[row], got[row, width:].tolist()):
            logits_V = (naive_teacher if step["asked"] else student)(ids)[1]
            assert token == int(logits_V.argmax())
            outside += step["asked"] and token not in student(ids)[1].topk(5).indices.tolist()
            ids.append(token)
    assert outside > 0, "the teacher's token always was a candidate: takeover was not told from selection"


@pytest.mark.parametrize("way", WAYS)
def test_takeover_never_emits_what_the_user_forbids(way, batch):
    model, teacher = tiny_model(), tiny_model(seed=9)
    forbidden = sorted(set(plain(teacher, batch)[:, 7:].flatten().tolist()) - {PAD, EOS})
    got = generate(
        way,
        model,
        batch,
        TeacherSelector(teacher, takeover=True),
        offer_all(warmup_tokens=0),
        suppress_tokens=forbidden,
        **NEVER_FINISHES,
    )
    assert not set(got[:, 7:].flatten().tolist()) & set(forbidden)


@pytest.mark.parametrize("trigger", ["always", "kl"])
@pytest.mark.parametrize("vocab_size", [60, 120])
def test_a_teacher_with_another_number_of_head_rows_selects_what_it_knows(vocab_size, trigger, batch):
    model = tiny_model()
    with torch.no_grad():  # a text that such a teacher can read
        model.lm_head.weight[60:] = model.lm_head.weight[60:] * (0.1 if vocab_size == 60 else 1.0)
    inputs = {name: tensor.clamp_max(59) for name, tensor in batch.items()}
    teacher = TeacherSelector(tiny_model(seed=9, vocab_size=vocab_size))
    config = offer_all() if trigger == "always" else offer_all(trigger="kl", threshold=0.5)
    if vocab_size == 60:
        _, trace = both_ways(model, inputs, teacher, config, suppress_tokens=list(range(60, 97)), **NEVER_FINISHES)
    else:
        _, trace = both_ways(model, inputs, teacher, config, **NEVER_FINISHES)
    assert num_flipped(trace) > 0


def test_a_candidate_that_the_teachers_head_lacks_is_never_preferred():
    teacher = TeacherSelector(tiny_model(vocab_size=60))

    class Session:
        def teacher_logits(self):
            return torch.full((1, 60), -50.0).index_fill(1, torch.tensor([7]), 0.0)

    ids = torch.tensor([[70, 96, 5, 7]])
    proposals = Proposals(ids, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))
    scores = teacher.score(Session(), torch.tensor([0]), proposals)
    assert scores.argsort(descending=True)[0, :2].tolist() == [3, 2]


@pytest.mark.parametrize("way", WAYS)
def test_with_a_trigger_of_its_own_the_teacher_runs_at_triggers_only(way, batch):
    model, teacher = tiny_model(), tiny_model(seed=9)
    selector, trace = TeacherSelector(teacher), S2TTrace()
    config = offer_all(trigger="entropy", threshold=middle_threshold(model, batch, selector, "entropy"))
    with CountForwards(teacher) as count:
        generate(way, model, batch, selector, config, trace, **NEVER_FINISHES)
    asked = [i for i, step in enumerate(trace.steps) if bool(step["asked_B"].any())]
    assert 0 < len(asked) < NEW_TOKENS
    assert trace.forwards == {"teacher": len(asked)}
    assert count.calls == len(asked)
    # lazily caught up: no token goes through it twice, and none after the last question
    assert count.tokens == trace.tokens["teacher"] == 3 * (7 + asked[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Cost and trace


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_no_forward_is_run_beyond_those_that_a_scope_needs(setup):
    model, selector = set_up(setup)
    config, trace = offer_all(trigger="random", threshold=0.5), S2TTrace()
    with CountForwards(model) as count:
        generate("loop", model, prompts((6,)), selector, config, trace, **NEVER_FINISHES)
    asked = [bool(step["asked_B"][0]) for step in trace.steps]
    assert 0 < sum(asked) < NEW_TOKENS - 3
    greedy = NEW_TOKENS
    if setup == ("sequence", "base"):  # a second cache: one forward a question, with all the tokens that it lacks
        assert trace.forwards == {"scorer": sum(asked)}
        assert count.calls == greedy + sum(asked)
        last = max(i for i, a in enumerate(asked) if a)
        assert count.tokens == 6 + (greedy - 1) + 5 * sum(asked) + 6 + last
    else:  # the tree is the next step; only after the last token there is none
        assert trace.forwards == {"tree": sum(asked)}
        assert count.calls == greedy + asked[-1]
        width = (
            10 if setup == ("candidate", "base") else 5
        )  # once as the base writes it, once as the adapter scores it
        assert count.tokens == 6 + sum(width if a else 1 for a in asked[:-1]) + (width if asked[-1] else 0)
    assert [sum(step["forwards"].values()) > 0 for step in trace.rows()[0]] == asked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_the_trace_tells_what_happened(setup, way, batch):
    model, selector = set_up(setup)
    trace = S2TTrace()
    got = generate(way, model, batch, selector, offer_all(), trace, **NEVER_FINISHES)
    assert trace.prompt_length == 7
    assert len(trace.steps) == NEW_TOKENS
    rows = trace.rows()
    assert [len(row) for row in rows] == [NEW_TOKENS] * 3
    for row, steps in enumerate(rows):
        for i, step in enumerate(steps):
            assert step["token"] == int(got[row, 7 + i])
            assert step["asked"] is (i >= 3)
            assert ("scores" in step) is step["asked"]
            if step["asked"]:
                ids, scores = step["candidate_ids"], step["scores"]
                assert len(ids) == len(scores) == 5
                assert ids[0] == step["first"]
                assert ids[scores.index(max(scores))] == step["token"]
                if setup != "teacher":
                    assert all(0 <= score <= 1 for score in scores)
            assert step["flipped"] is (step["first"] != step["token"])
    assert num_flipped(trace) > 0
    kind = "teacher" if setup == "teacher" else "scorer"
    if way == "loop" and setup in (("candidate", "base"), ("sequence", "adapted")):
        kind = "tree"
    assert set(trace.forwards) == set(trace.tokens) == {kind}


def test_a_trace_that_saw_no_call_has_no_rows():
    assert S2TTrace().rows() == []


def test_a_new_call_clears_the_trace(batch):
    model, selector = set_up("teacher")
    trace = S2TTrace()
    generate("loop", model, batch, selector, offer_all(), trace, **NEVER_FINISHES)
    generate("loop", model, prompts((4,)), selector, offer_all(), trace, max_new_tokens=5, **NEVER_FINISHES)
    assert (trace.prompt_length, len(trace.steps), len(trace.rows())) == (4, 5, 1)
    assert trace.forwards == {"teacher": 2}


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_finished_row_is_asked_no_more(setup, batch):
    model, selector = set_up(setup)
    free = generate("loop", model, batch, selector, offer_all(), **NEVER_FINISHES)
    trace = S2TTrace()
    ends = int(free[0, 7 + 4])
    got = generate("loop", model, batch, selector, offer_all(), trace, eos_token_id=ends)
    finished = got[0, 7:].tolist().index(ends)
    assert finished + 1 < len(trace.steps), "all rows ended at once"
    assert not any(step["asked"] for step in trace.rows()[0][finished + 1 :])


# ---------------------------------------------------------------------------------------------------------------------
# Reserved tokens and fusion


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trigger", ["always", "never"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_reserved_tokens_are_never_generated(do_sample, trigger, way, setup, batch):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[list(RESERVED)] *= 4
    assert set(plain(model, batch)[:, 7:].flatten().tolist()) & set(RESERVED), "the model wants to say them"
    selector = make_selector(model, *setup)
    trace = S2TTrace()
    got = generate(way, model, batch, selector, offer_all(trigger=trigger), trace, do_sample=do_sample)
    assert not set(got.flatten().tolist()) & set(RESERVED)
    for step in trace.steps:
        if "candidate_ids_AK" in step:
            assert not set(step["candidate_ids_AK"].flatten().tolist()) & set(RESERVED)


def three_candidates(mask=(True, True, True)):
    return Proposals(torch.tensor([[4, 5, 6]]), torch.tensor([[-0.5, -1.0, -2.0]]), torch.tensor([mask]))


@pytest.mark.parametrize(
    ("weights", "choice"),
    [
        ((1, 0, 0), 2),  # .2 .5 .6
        ((1, 0.1, 0), 1),  # .15 .4 .4: the higher ranked of equals
        ((1, 1, 0), 0),  # -.3 -.5 -1.4
        ((1, 0, -0.35), 2),  # .2 .15 .25
        ((1, 0, -0.45), 0),  # .2 .05 .15
        ((-1, 0, 0), 0),
        ((0, -1, 0), 2),
        ((0, 0, 0), 0),
    ],
)
def test_fusion_weights_decide_as_computed_by_hand(weights, choice):
    scores = torch.tensor([[0.2, 0.5, 0.6]], dtype=torch.float64).float()
    if weights == (1, 0.1, 0):
        scores = torch.tensor([[0.25, 0.5, 0.5]])  # exact in binary, but for the log-probabilities
        assert int(decide(scores, three_candidates(), FusionWeights(1, 0, 0))) == 1
    assert int(decide(scores, three_candidates(), FusionWeights(*weights))) == choice


def test_a_candidate_below_the_floor_is_never_decided_for():
    scores = torch.tensor([[0.2, 0.5, 0.6]])
    assert int(decide(scores, three_candidates((True, True, False)), FusionWeights())) == 1
    assert int(decide(scores, three_candidates((True, False, False)), FusionWeights(0, -1, 5))) == 0


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize("weights", [(0, 1, 0), (1e-3, 0, -100)], ids=["logprob", "switch"])
def test_fusion_can_hold_on_to_the_students_first_token(setup, weights, batch):
    model, selector = set_up(setup)
    _, trace = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    assert num_flipped(trace) > 0
    _, trace = both_ways(model, batch, selector, offer_all(fusion=weights), **NEVER_FINISHES)
    assert num_flipped(trace) == 0
    assert all(step["asked"] for row in trace.rows() for step in row[3:])


def test_stored_fusion_weights_are_used_unless_others_are_given(batch):
    model = tiny_model()
    selector = make_selector(model, fusion=(0, 1, 0))
    _, trace = both_ways(model, batch, selector)
    assert num_flipped(trace) == 0
    _, trace = both_ways(model, batch, selector, offer_all(fusion=(1, 0, 0)))
    assert num_flipped(trace) > 0


def test_the_stored_number_of_candidates_and_floor_are_the_defaults(batch):
    model = tiny_model()
    selector = make_selector(model, num_candidates=3, min_prob_ratio=0.0)
    _, trace = both_ways(model, batch, selector, **NEVER_FINISHES)
    assert {len(step["candidate_ids"]) for row in trace.rows() for step in row[3:]} == {3}


def test_a_stored_threshold_is_found_for_its_rate(batch):
    model = tiny_model()
    selector = make_selector(model, thresholds={"entropy": {0.1: -1.0, 0.05: 99.0}})
    for rate, asked in ((0.1, True), (0.05, False)):
        trace = S2TTrace()
        generate("loop", model, batch, selector, offer_all(trigger="entropy", target_rate=rate), trace)
        assert trace.rows()[0][3]["asked"] is asked


@pytest.mark.parametrize("way", WAYS)
def test_the_linear_head_selects_too(way, batch):
    model = tiny_model()
    selector, trace = make_selector(model, score_head="linear"), S2TTrace()
    generate(way, model, batch, selector, offer_all(), trace)
    scores = [score for row in trace.rows() for step in row[3:] for score in step.get("scores", [])]
    assert min(scores) < 0 < 1 < max(scores)
    assert num_flipped(trace) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Refused before the first token


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "`num_beams` must be 1"),
        ({"use_cache": False}, "`use_cache` must be True"),
        ({"cache_implementation": "static"}, "static and quantized caches are not supported"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        pytest.param({"dola_layers": "low"}, "DoLa|dola"),
        pytest.param({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        pytest.param({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_the_cached_loop_refuses_what_it_would_do_wrong(settings, message, batch):
    model, selector = set_up("teacher", attn="eager")
    with CountForwards(model) as count, pytest.raises(ValueError, match=message):
        generate("loop", model, batch, selector, **settings)
    assert count.calls == 0


def test_the_processor_path_refuses_beams_or_knows_its_prompt(batch):
    """Reordered rows begin a new session, whose prompt is everything so far: nothing ever triggers after warm-up."""
    model, selector = set_up("teacher")
    trace = S2TTrace()
    try:
        generate("processor", model, batch, selector, offer_all(), trace, num_beams=3)
    except ValueError:
        return
    assert trace.prompt_length == 7


def test_a_selector_of_another_model_object_is_refused(batch):
    model, other = tiny_model(), tiny_model()
    selector = make_selector(other)
    with CountForwards(model) as count, pytest.raises(ValueError, match="another model object"):
        generate("loop", model, batch, selector)
    assert count.calls == 0


@pytest.mark.parametrize("way", WAYS)
def test_neither_selector_nor_teacher_is_refused(way, batch):
    model = tiny_model()
    with CountForwards(model) as count, pytest.raises(ValueError, match="`selector`.*or `teacher_model`"):
        generate(way, model, batch, None)
    assert count.calls == 0


@pytest.mark.parametrize("way", WAYS)
def test_the_kl_trigger_without_a_teacher_is_refused(way, batch):
    model, selector = set_up(("candidate", "base"))
    with CountForwards(model) as count, pytest.raises(ValueError, match="needs the teacher.*`teacher_model=`"):
        generate(way, model, batch, selector, offer_all(trigger="kl", threshold=0.1))
    assert count.calls == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
def test_an_uncalibrated_threshold_is_refused(setup, way, batch):
    model, selector = set_up(setup)
    with CountForwards(model) as count, pytest.raises(ValueError, match=r"s2t calibrate"):
        generate(way, model, batch, selector, offer_all(trigger="entropy", target_rate=0.1))
    assert count.calls == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_the_selectors_place_is_refused(way, batch):
    model = tiny_model()
    with CountForwards(model) as count, pytest.raises(TypeError, match="`selector` must be.*`teacher_model=`"):
        generate(way, model, batch, tiny_model(seed=9))
    assert count.calls == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_name_in_the_teachers_place_is_refused(way, batch):
    model = tiny_model()
    with CountForwards(model) as count, pytest.raises(TypeError, match="`teacher_model` must be a loaded"):
        generate(way, model, batch, None, teacher="Qwen/Qwen2.5-32B")
    assert count.calls == 0


def test_the_processor_path_refuses_assisted_decoding_or_is_exact():
    model, selector = set_up("teacher")
    inputs, trace = prompts((7,)), S2TTrace()
    try:
        got = generate("processor", model, inputs, selector, offer_all(), trace, assistant_model=tiny_model())
    except ValueError:
        return
    assert got.tolist() == generate("processor", model, inputs, selector, offer_all()).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_of_embeddings_is_refused_where_a_teacher_cannot_read_it(way, batch):
    model, selector = set_up("teacher")
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with pytest.raises(ValueError, match="inputs_embeds"):
        generate(way, model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}, selector)


def test_padding_is_never_read_as_text_where_the_teacher_names_no_padding_token(batch):
    """By hand there is no attention mask: the processor asks for `pad_token_id` rather than score wrongly."""
    model, selector = set_up("teacher")
    selector.teacher_model.config.pad_token_id = selector.teacher_model.generation_config.pad_token_id = None
    expected = generate("loop", model, batch, selector, offer_all()).tolist()
    assert generate("processor", model, batch, selector, offer_all()).tolist() == expected
    with torch.no_grad():
        logits_BV = model(**batch).logits[:, -1]
    with pytest.raises(ValueError, match="pad_token_id="):
        S2T(selector, config=offer_all(warmup_tokens=0))(batch["input_ids"], logits_BV)
    named = S2T(selector, config=offer_all(warmup_tokens=0), pad_token_id=PAD)(batch["input_ids"], logits_BV)
    first = generate("loop", model, batch, selector, offer_all(warmup_tokens=0), max_new_tokens=1)[:, -1]
    assert named.argmax(-1).tolist() == first.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_two_different_teachers_are_refused(way, batch):
    model, selector = set_up("teacher")
    with pytest.raises(ValueError, match="teacher"):
        generate(way, model, batch, selector, offer_all(), teacher=tiny_model(seed=10))


@pytest.mark.parametrize("way", WAYS)
def test_a_config_of_another_type_is_refused(way, batch):
    model, selector = set_up("teacher")
    with pytest.raises(TypeError, match="config"):
        generate(way, model, batch, selector, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_yields_nan_is_refused(way, batch):
    model, selector = set_up("teacher")
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(ValueError, match="(?i)nan"):
        generate(way, model, batch, selector, offer_all())


# ---------------------------------------------------------------------------------------------------------------------
# PeftModels, saving and loading


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_peft_model_generates_like_its_base_model(setup, batch):
    model = tiny_model()
    peft_model = lora_model(model)
    config = SelectorConfig(RESERVED, *setup, num_candidates=5, min_prob_ratio=0.0)
    selector = LocalSelector(peft_model, config, "s2t")
    expected, trace = both_ways(model, batch, selector)
    assert num_flipped(trace) > 0
    got, _ = both_ways(peft_model, batch, selector)
    assert got.tolist() == expected.tolist()
    if setup[1] == "base":
        assert plain(peft_model, batch).tolist() == plain(tiny_model(), batch).tolist()
    else:
        assert plain(peft_model, batch).tolist() != plain(tiny_model(), batch).tolist()


def save_adapter(folder, scope=("candidate", "base"), seed=1, **config):
    """An adapter and its config as S2TTrainer leaves them, and the scores that it gives on the way."""
    model = tiny_model(**config)
    peft_model = lora_model(model, seed=seed, name="default")
    peft_model.save_pretrained(folder)
    selector_config = SelectorConfig(RESERVED, *scope, num_candidates=5, min_prob_ratio=0.0)
    selector_config.save_pretrained(folder)
    return model, LocalSelector(peft_model, selector_config, "default")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
@pytest.mark.parametrize("into_peft", [False, True], ids=["base", "peft"])
def test_a_saved_selector_scores_the_same_in_a_fresh_base_model(into_peft, setup, tied, batch, tmp_path):
    model, selector = save_adapter(tmp_path, setup, tie_word_embeddings=tied)
    expected, trace = both_ways(model, batch, selector)
    assert num_flipped(trace) > 0
    fresh = tiny_model(tie_word_embeddings=tied)
    target = fresh
    if into_peft:
        target = lora_model(fresh, seed=7, name="other", reserved=(80,))
        target.base_model.disable_adapter_layers()  # an adapter of the user's own, not in use
    loaded = LocalSelector.from_pretrained(tmp_path, target)
    assert loaded.selector_config == selector.selector_config
    got, loaded_trace = both_ways(fresh, batch, loaded)
    assert got.tolist() == expected.tolist()
    assert loaded_trace.rows() == trace.rows()


def test_loading_leaves_the_text_of_the_base_model_alone(batch, tmp_path):
    save_adapter(tmp_path)
    model = tiny_model()
    LocalSelector.from_pretrained(tmp_path, model)
    assert plain(model, batch).tolist() == plain(tiny_model(), batch).tolist()


def test_loading_leaves_the_training_mode_alone(tmp_path):
    save_adapter(tmp_path)
    for training in (True, False):
        model = tiny_model().train(training)
        LocalSelector.from_pretrained(tmp_path, model)
        assert model.training is training


def test_an_adapter_without_its_config_is_an_error_that_touches_nothing(tmp_path):
    lora_model(tiny_model(), name="default").save_pretrained(tmp_path)
    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(FileNotFoundError, match=r"holds no s2t_config\.json"):
        LocalSelector.from_pretrained(tmp_path, model)
    assert [name for name, _ in model.named_modules()] == names


def test_a_name_in_the_models_place_is_refused(tmp_path):
    save_adapter(tmp_path)
    with pytest.raises(TypeError, match="`model` must be a loaded causal language model"):
        LocalSelector.from_pretrained(tmp_path, "Qwen/Qwen2.5-1.5B-Instruct")


def test_an_adapter_name_that_is_taken_is_refused(tmp_path):
    save_adapter(tmp_path / "a")
    save_adapter(tmp_path / "b", seed=2)
    model = tiny_model()
    LocalSelector.from_pretrained(tmp_path / "a", model)
    with pytest.raises(ValueError, match="already holds an adapter named 's2t'"):
        LocalSelector.from_pretrained(tmp_path / "b", model)


@pytest.mark.parametrize("into_peft", [False, True], ids=["auto", "peft"])
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_model_that_was_loaded_with_its_adapter_is_taken_as_it_is(setup, into_peft, batch, tmp_path):
    """`from_pretrained` of transformers and peft leave the adapter on: loaded twice, it would write the text too."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora_model(model, name="default").save_pretrained(tmp_path / "adapter")
    selector_config = SelectorConfig(RESERVED, *setup, num_candidates=5, min_prob_ratio=0.0)
    selector_config.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = generate("loop", fresh, batch, LocalSelector.from_pretrained(tmp_path / "adapter", fresh))
    if into_peft:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    selector = LocalSelector.from_pretrained(tmp_path / "adapter", model)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 14  # once each
    tokens, trace = both_ways(model, batch, selector)
    assert tokens.tolist() == expected.tolist()
    assert num_flipped(trace) > 0
    plain = tiny_model() if setup[1] == "base" else None
    if plain is not None:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        assert model.generate(**batch, **settings).tolist() == plain.generate(**batch, **settings).tolist()


def test_an_adapter_without_reserved_rows_is_refused_when_it_is_loaded(tmp_path):
    lora_model(tiny_model(), name="default", reserved=(3, 4)).save_pretrained(tmp_path)
    SelectorConfig(RESERVED).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no trained rows"):
        LocalSelector.from_pretrained(tmp_path, tiny_model())


def test_two_selectors_in_one_model_keep_their_own_scores(batch, tmp_path):
    """`from_pretrained` says to pass another `adapter_name`; the first selector then scores with the second's LoRA."""
    model = tiny_model()
    rows = []
    for seed, name in ((1, "one"), (2, "two")):
        save_adapter(tmp_path / name, seed=seed)
    one = LocalSelector.from_pretrained(tmp_path / "one", model, adapter_name="one")
    for step in range(2):
        trace = S2TTrace()
        generate("loop", model, batch, one, trace=trace)
        rows.append(trace.rows())
        if step == 0:
            LocalSelector.from_pretrained(tmp_path / "two", model, adapter_name="two")
    assert rows[0] == rows[1]


def test_a_users_own_adapter_goes_on_writing_the_text_or_is_refused(batch, tmp_path):
    save_adapter(tmp_path)
    peft_model = lora_model(tiny_model(), seed=7, name="task", reserved=(80,))
    before = plain(peft_model, batch)
    try:
        LocalSelector.from_pretrained(tmp_path, peft_model)
    except ValueError:
        pass
    assert plain(peft_model, batch).tolist() == before.tolist()


def test_an_adapter_of_another_model_size_is_an_error_that_leaves_the_model_usable(batch, tmp_path):
    save_adapter(tmp_path, hidden_size=48, head_dim=12)
    model = tiny_model()
    with pytest.raises((ValueError, RuntimeError)):
        LocalSelector.from_pretrained(tmp_path, model)
    assert plain(model, batch).tolist() == plain(tiny_model(), batch).tolist()
