"""What `generate` offers, in both ways: pipelines, streamers, criteria, caches, data types, and what is refused.

Ways: "processor" is `logits_processor=S2T(...)`, "loop" is `custom_generate=s2t_generate`. Models are random, so most
tests offer all K candidates (min_prob_ratio=0) and assert that something flipped: otherwise they could not fail.
"""

import itertools
import math
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    EOS,
    NEVER_FINISHES,
    PAD,
    RESERVED,
    SCOPES,
    SETUPS,
    WAYS,
    lora_model,
    make_selector,
    offer_all,
    prompts,
    tiny_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation import BaseStreamer

from transformers_s2t import (
    S2T,
    LocalSelector,
    S2TLogitsProcessor,
    S2TTrace,
    SelectorConfig,
    TeacherSelector,
    s2t_generate,
)


NEW_TOKENS, PROMPT = 12, 7  # the longest of `batch`
PATIENCE = 30  # seconds after which a reader that waits for ever fails its test


def name_of(value):
    if isinstance(value, dict):
        return "+".join(value)
    return str(value).removeprefix("torch.") if not isinstance(value, tuple) else "-".join(value)


def set_up(setup, attn="sdpa", dtype=torch.float32):
    """A model and what selects in it: a teacher, or the model itself in one of the scopes."""
    model = tiny_model(attn=attn)
    if setup == "teacher":
        return model.to(dtype), TeacherSelector(tiny_model(seed=9, attn=attn).to(dtype))
    selector = make_selector(model, *setup)
    return model.to(dtype), selector


def how(way, selector, config=None, trace=None, processors=()):
    """The arguments of `generate` that make it select."""
    if way == "processor":
        select = S2T(selector, config=config, trace=trace)
        return {"logits_processor": LogitsProcessorList([*processors, *select]) if processors else select}
    arguments = {"logits_processor": LogitsProcessorList(processors)} if processors else {}
    return arguments | {
        "custom_generate": s2t_generate,
        "selector": selector,
        "decoding_config": config,
        "trace": trace,
    }


def generate(way, model, inputs, selector, config=None, trace=None, processors=(), **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    return model.generate(**inputs, **how(way, selector, config, trace, processors), **kwargs)


def both_ways(model, inputs, selector, config=None, **kwargs):
    """The tokens that both ways agree on, and the processor path's trace."""
    trace = S2TTrace()
    processor = generate("processor", model, inputs, selector, config, trace, **kwargs)
    loop = generate("loop", model, inputs, selector, config, **kwargs)
    assert processor.tolist() == loop.tolist()
    return loop, trace


def plain(model, inputs, selector=None, **kwargs):
    """What the model says by itself, without the tokens that a local selector reserves."""
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    if isinstance(selector, LocalSelector):
        kwargs["suppress_tokens"] = list(RESERVED)
    return model.generate(**inputs, **kwargs)


def num_flipped(trace):
    return sum(step["flipped"] for row in trace.rows() for step in row)


def candidates_of(trace, steps=slice(None)):
    """Every token that was offered in these steps."""
    offered = [step["candidate_ids_AK"][step["mask_AK"]] for step in trace.steps[steps] if "mask_AK" in step]
    return set(torch.cat(offered).tolist())


class CountForwards:
    """How often a model's decoder ran, and on how many columns each time."""

    def __init__(self, model):
        self.widths = []
        self.handle = model.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.widths.append(kwargs["input_ids"].shape[1])

    @property
    def calls(self):
        return len(self.widths)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS} | {f"w{id}": id for id in range(3, 97)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


TEXTS = ["w7 w31 w12 w56 w9", "w40 w18 w77"]


@pytest.mark.parametrize("settings_at", ["init", "call"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_pipeline_writes_what_generate_writes(setup, way, settings_at, tokenizer):
    model, selector = set_up(setup)
    trace = S2TTrace()
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    expected = generate(way, model, inputs, selector, offer_all())[0, inputs["input_ids"].shape[1] :]
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_full_text": False}
    settings |= how(way, selector, offer_all(), trace)
    at_init, at_call = (settings, {}) if settings_at == "init" else ({}, settings)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **at_init)
    for _ in range(2):  # one processor serves call after call
        [record] = pipe(TEXTS[0], **at_call)
        assert record["generated_text"].strip() == tokenizer.decode(expected, skip_special_tokens=True)
        assert num_flipped(trace) > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_pipeline_over_a_padded_batch_writes_what_generate_writes(setup, way, tokenizer):
    model, selector = set_up(setup)
    inputs, trace = tokenizer(TEXTS, return_tensors="pt", padding=True), S2TTrace()
    expected = generate(way, model, inputs, selector, offer_all())[:, inputs["input_ids"].shape[1] :]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_full_text": False}
    got = pipe(TEXTS, **settings, **how(way, selector, offer_all(), trace))
    texts = [records[0]["generated_text"].strip() for records in got]
    assert texts == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert len(trace.rows()) == 2 and num_flipped(trace) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Streamers


class WaitFor(StoppingCriteria):
    """Stops nothing, but waits in front of the token at column `length` until an event was set."""

    def __init__(self, event, length):
        self.event, self.length, self.was_set = event, length, None

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.length:
            self.was_set = self.event.wait(PATIENCE)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_text_is_read_in_another_thread_while_it_is_written(setup, way, tokenizer):
    model, selector = set_up(setup)
    inputs, trace = prompts((6,)), S2TTrace()
    expected = generate(way, model, inputs, selector, offer_all(), **NEVER_FINISHES)
    streamer, has_read = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=PATIENCE), Event()
    wait = WaitFor(has_read, 6 + 6)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "streamer": streamer} | NEVER_FINISHES
    settings |= {"stopping_criteria": StoppingCriteriaList([wait])}
    arguments = inputs | how(way, selector, offer_all(), trace) | settings
    thread = Thread(target=model.generate, kwargs=arguments, daemon=True)
    thread.start()
    pieces = []
    for piece in streamer:
        pieces.append(piece)
        if piece:
            has_read.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert wait.was_set, "nothing could be read before the text was complete"
    assert "".join(pieces).strip() == tokenizer.decode(expected[0, 6:])
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("streamer_type", [TextStreamer, TextIteratorStreamer])
def test_a_text_streamer_refuses_a_batch_by_itself(streamer_type, way, tokenizer, batch):
    model, selector = set_up("teacher")
    streamer = streamer_type(tokenizer)
    with CountForwards(model) as count, pytest.raises(ValueError, match="only supports batch size 1"):
        generate(way, model, batch, selector, offer_all(), streamer=streamer)
    assert count.calls == 0


class Collect(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.columns, self.ends = [], 0

    def put(self, value):
        self.columns.append(value)

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_streamer_gets_the_prompt_every_token_and_one_end(setup, batch):
    """A streamer that takes batches gets them, with rows that have finished padded."""
    model, selector = set_up(setup)
    free, trace = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    assert num_flipped(trace) > 0
    for way in WAYS:
        streamer = Collect()
        got = generate(
            way, model, batch, selector, offer_all(), streamer=streamer, eos_token_id=int(free[0, PROMPT + 4])
        )
        prompt, *columns = streamer.columns
        assert torch.equal(prompt, batch["input_ids"])
        assert torch.equal(torch.stack(columns, dim=1), got[:, PROMPT:])
        assert streamer.ends == 1
        assert PAD in columns[-1].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# When a text ends


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_max_time_ends_a_text_at_the_token_that_exceeds_it(setup, batch, monkeypatch):
    """The criterion looks at a clock that moves on by one second whenever it is read."""
    model, selector = set_up(setup)
    free, _ = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    for way in WAYS:
        trace, clock = S2TTrace(), itertools.count()
        monkeypatch.setattr(
            "transformers.generation.stopping_criteria.time", SimpleNamespace(time=lambda clock=clock: next(clock))
        )
        got = generate(way, model, batch, selector, offer_all(), trace, max_time=5.5, **NEVER_FINISHES)
        assert got.tolist() == free[:, : PROMPT + 6].tolist()
        assert num_flipped(trace) > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_tiny_max_time_leaves_one_token(way, batch):
    model, selector = set_up("teacher")
    trace, config = S2TTrace(), offer_all(warmup_tokens=0)
    free = generate(way, model, batch, selector, config)
    got = generate(way, model, batch, selector, config, trace, max_time=1e-9)
    assert got.tolist() == free[:, : PROMPT + 1].tolist()
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_no_text_ends_before_min_new_tokens(setup, batch):
    model, selector = set_up(setup)
    free, _ = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    end = int(free[0, PROMPT + 4])  # a selected token
    short, _ = both_ways(model, batch, selector, offer_all(), eos_token_id=end)
    assert short[0, PROMPT + 4] == end
    got, trace = both_ways(model, batch, selector, offer_all(), eos_token_id=end, min_new_tokens=9)
    assert end not in got[:, PROMPT : PROMPT + 9].flatten().tolist()
    assert end not in candidates_of(trace, slice(9))
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_max_length_counts_the_prompt(setup, batch):
    model, selector = set_up(setup)
    expected, trace = both_ways(model, batch, selector, offer_all(), max_new_tokens=9)
    assert num_flipped(trace) > 0
    got, _ = both_ways(model, batch, selector, offer_all(), max_new_tokens=None, max_length=PROMPT + 9)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_forced_end_of_sequence_token_is_the_last_one(setup, batch):
    model, selector = set_up(setup)
    got, trace = both_ways(model, batch, selector, offer_all(), forced_eos_token_id=33, **NEVER_FINISHES)
    assert got[:, -1].tolist() == [33, 33, 33]
    asked = [bool(step["asked_B"].any()) for step in trace.steps]
    assert asked[3:] == [True] * (NEW_TOKENS - 4) + [False]  # where one token is left there is no choice
    assert num_flipped(trace) > 0


class StopAt(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= length for length in self.lengths])


@pytest.mark.parametrize("eos", [EOS, None], ids=["eos", "no-eos"])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_users_stopping_criteria_end_each_row_where_they_say(setup, eos, batch):
    """Without an end-of-sequence token `generate` goes on with all rows until the last one has ended."""
    model, selector = set_up(setup)
    free, trace = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    assert num_flipped(trace) > 0
    lengths = [PROMPT + 5, PROMPT + 10, PROMPT + 7]
    stop = StoppingCriteriaList([StopAt(lengths)])
    outputs = [
        generate(way, model, batch, selector, offer_all(), stopping_criteria=stop, eos_token_id=eos) for way in WAYS
    ]
    for got in outputs:
        assert got.shape[1] == PROMPT + 10 or eos == EOS
        for row, length in enumerate(lengths):
            text = got[row, PROMPT:length].tolist()
            text = text[: text.index(EOS) + 1] if eos == EOS and EOS in text else text
            assert text == free[row, PROMPT : PROMPT + len(text)].tolist()
            if eos == EOS:
                assert set(got[row, length:].tolist()) <= {PAD}
    assert outputs[0].tolist() == outputs[1].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What shapes the scores


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_no_pair_of_tokens_is_selected_twice_where_the_user_forbids_it(setup, batch):
    """`no_repeat_ngram_size` and `bad_words_ids` of two words look at the text so far, selected tokens included."""
    model, selector = set_up(setup)
    config = offer_all(warmup_tokens=0)

    def pairs(row):
        text = [token for token in row.tolist() if token != PAD]
        return list(zip(text, text[1:]))

    free, _ = both_ways(model, batch, selector, config, max_new_tokens=25, **NEVER_FINISHES)
    assert any(len(set(pairs(row))) < len(pairs(row)) for row in free)
    got, trace = both_ways(model, batch, selector, config, max_new_tokens=25, no_repeat_ngram_size=2, **NEVER_FINISHES)
    assert all(len(set(pairs(row))) == len(pairs(row)) for row in got)
    assert num_flipped(trace) > 0
    words = [free[row, PROMPT + 5 : PROMPT + 7].tolist() for row in range(3)]
    got, trace = both_ways(model, batch, selector, config, bad_words_ids=words, **NEVER_FINISHES)
    assert not {pair for row in got for pair in pairs(row)} & set(map(tuple, words))
    assert num_flipped(trace) > 0


class Forbid(LogitsProcessor):
    """The user's own processor."""

    def __init__(self, ids):
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, self.ids, -math.inf)


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_users_own_processor_shapes_the_proposals(setup, batch):
    model, selector = set_up(setup)
    free, _ = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    forbidden = sorted(set(free[:, PROMPT + 3 :].flatten().tolist()))
    got, trace = both_ways(model, batch, selector, offer_all(), processors=[Forbid(forbidden)], **NEVER_FINISHES)
    assert not set(got[:, PROMPT:].flatten().tolist()) & set(forbidden)
    assert not candidates_of(trace) & set(forbidden)
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
def test_a_users_processor_behind_a_users_warper_shapes_the_proposals_too(setup, batch):
    """What the user lists comes before S2T, whatever it is; only the warpers that `generate` adds come after it."""
    model, selector = set_up(setup)
    config = offer_all(warmup_tokens=0)
    free, _ = both_ways(model, batch, selector, config, **NEVER_FINISHES)
    forbidden = sorted(set(free[:, PROMPT:].flatten().tolist()))
    processors, trace = [TemperatureLogitsWarper(0.7), Forbid(forbidden)], S2TTrace()
    for way in WAYS:
        got = generate(way, model, batch, selector, config, trace, processors, **NEVER_FINISHES)
        assert not set(got[:, PROMPT:].flatten().tolist()) & set(forbidden)
        assert num_flipped(trace) > 0


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_one_list_of_the_users_and_s2ts_processors_serves_call_after_call(setup, batch):
    model, selector = set_up(setup)
    processors, trace = [Forbid(range(3, 20))], S2TTrace()
    one = LogitsProcessorList([*processors, *S2T(selector, config=offer_all(), trace=trace)])
    for inputs in (batch, prompts((4, 6), seed=8), batch):
        got = model.generate(**inputs, logits_processor=one, max_new_tokens=NEW_TOKENS)
        expected = generate("processor", model, inputs, selector, offer_all(), processors=processors)
        assert got.tolist() == expected.tolist()
        assert num_flipped(trace) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_bias": [[[40], 8.0], [[41, 42], 5.0]]},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": EOS},
        {"begin_suppress_tokens": list(range(3, 60))},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10, 40))},
        {"guidance_scale": 1.5},
        {"watermarking_config": WatermarkingConfig(bias=4.0)},
    ],
    ids=name_of,
)
@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
def test_both_ways_agree_on_whatever_else_changes_the_scores(setup, settings, batch):
    model, selector = set_up(setup)
    config = offer_all(trigger="random", threshold=0.5)  # steps that are not asked count as well
    without, _ = both_ways(model, batch, selector, config, **NEVER_FINISHES)
    got, trace = both_ways(model, batch, selector, config, **(NEVER_FINISHES | settings))
    assert got.tolist() != without.tolist()
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_normalised_scores_select_the_same_tokens(setup, batch):
    model, selector = set_up(setup)
    expected, trace = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    got, _ = both_ways(model, batch, selector, offer_all(), renormalize_logits=True, **NEVER_FINISHES)
    assert got.tolist() == expected.tolist()
    assert num_flipped(trace) > 0


@pytest.mark.parametrize("warpers", [{}, {"temperature": 1.3, "top_k": 20, "min_p": 0.01}], ids=["all", "warped"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_sampled_text_that_never_triggers_is_plain_sampling(setup, way, warpers, batch):
    model, selector = set_up(setup)
    settings = {"do_sample": True, "top_k": 0} | warpers | NEVER_FINISHES
    torch.manual_seed(7)
    expected = plain(model, batch, selector, **settings)
    torch.manual_seed(7)
    got = generate(way, model, batch, selector, offer_all(trigger="never"), **settings)
    assert got.tolist() == expected.tolist()
    assert got.tolist() != plain(model, batch, selector, **NEVER_FINISHES).tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_generation_config_of_the_users_is_used(setup, batch):
    model, selector = set_up(setup)
    settings = {"max_new_tokens": 9, "do_sample": False, "repetition_penalty": 2.0}
    expected, _ = both_ways(model, batch, selector, offer_all(), **settings, **NEVER_FINISHES)
    without, _ = both_ways(model, batch, selector, offer_all(), max_new_tokens=9, **NEVER_FINISHES)
    assert expected.tolist() != without.tolist()
    model.generation_config.eos_token_id = None
    own = GenerationConfig(pad_token_id=PAD, **settings)
    for way in WAYS:
        trace = S2TTrace()
        got = model.generate(**batch, generation_config=own, **how(way, selector, offer_all(), trace))
        assert got.tolist() == expected.tolist()
        assert num_flipped(trace) > 0


@pytest.mark.parametrize("way", WAYS)
def test_several_greedy_return_sequences_are_refused_by_generate(way, batch):
    model, selector = set_up("teacher")
    with CountForwards(model) as count, pytest.raises(ValueError, match="num_return_sequences"):
        generate(way, model, batch, selector, offer_all(), num_return_sequences=2)
    assert count.calls == 0


# ---------------------------------------------------------------------------------------------------------------------
# Data types

HALVES = (torch.bfloat16, torch.float16)
#: Largest and mean difference to float32 scores; with 8 and 11 bits, a model without caches or masks is as far off.
NEARLY = {torch.bfloat16: (0.04, 0.01), torch.float16: (0.005, 0.001)}


def first_scores(trace):
    """Scores of the first step by row and candidate: the prefix is the prompt, whatever is selected later."""
    return [dict(zip(row[0]["candidate_ids"], row[0]["scores"])) for row in trace.rows()]


def assert_nearly(scores, references, dtype, unit=1.0):
    """Rounding may put another candidate in the last place, but most are the same ones."""
    common = [(row[token], other[token]) for row, other in zip(scores, references) for token in set(row) & set(other)]
    assert len(common) >= 3 * len(scores)
    errors = [abs(score - reference) / unit for score, reference in common]
    largest, mean = NEARLY[dtype]
    assert max(errors) < largest and sum(errors) / len(errors) < mean


NAT = 3.0  # a teacher's scores are log-probabilities, so far apart, where those of a local selector are in [0, 1]


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_half_precision_selects_by_nearly_the_same_scores(setup, attn, dtype, batch):
    config, reference = offer_all(warmup_tokens=0), S2TTrace()
    model, selector = set_up(setup, attn)
    generate("loop", model, batch, selector, config, reference)
    unit = NAT if setup == "teacher" else 1.0
    spread = [max(row.values()) - min(row.values()) for row in first_scores(reference)]
    assert min(spread) > 0.1 * unit, "scores are so close to each other that any would be near"
    model, selector = set_up(setup, attn, dtype)
    for way in WAYS:
        trace = S2TTrace()
        got = generate(way, model, batch, selector, config, trace, **NEVER_FINISHES)
        assert got.shape == (3, PROMPT + NEW_TOKENS)
        assert num_flipped(trace) > 0
        assert_nearly(first_scores(trace), first_scores(reference), dtype, unit)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_half_precision_that_never_triggers_is_plain_greedy(setup, attn, dtype, batch):
    model, selector = set_up(setup, attn, dtype)
    expected = plain(model, batch, selector, **NEVER_FINISHES)
    for way in WAYS:
        got = generate(way, model, batch, selector, offer_all(trigger="never"), **NEVER_FINISHES)
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_float32_adapter_in_a_half_precision_model_scores_nearly_the_same(setup, dtype, batch, tmp_path):
    """PEFT loads adapters in float32 whatever the model is in."""
    reference, model = S2TTrace(), tiny_model()
    config = SelectorConfig(RESERVED, *setup, num_candidates=5, min_prob_ratio=0.0)
    peft_model = lora_model(model, name="default")
    peft_model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    generate("loop", model, batch, LocalSelector(peft_model, config, "default"), offer_all(warmup_tokens=0), reference)
    half = tiny_model().to(dtype)
    selector = LocalSelector.from_pretrained(tmp_path, half)
    dtypes = {parameter.dtype for name, parameter in half.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    for way in WAYS:
        trace = S2TTrace()
        generate(way, half, batch, selector, offer_all(warmup_tokens=0), trace, **NEVER_FINISHES)
        assert num_flipped(trace) > 0
        assert_nearly(first_scores(trace), first_scores(reference), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_a_teacher_may_have_another_data_type(dtype, batch):
    model, selector = set_up("teacher")
    reference, config = S2TTrace(), offer_all(warmup_tokens=0)
    generate("loop", model, batch, selector, config, reference)
    selector.teacher_model.to(dtype)
    for way in WAYS:
        trace = S2TTrace()
        generate(way, model, batch, selector, config, trace, **NEVER_FINISHES)
        assert num_flipped(trace) > 0
        assert_nearly(first_scores(trace), first_scores(reference), dtype, NAT)


# ---------------------------------------------------------------------------------------------------------------------
# Caches


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"use_cache": False}], ids=name_of)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_the_processor_path_takes_any_cache_or_none(setup, settings, batch):
    """It keeps one of its own."""
    model, selector = set_up(setup)
    expected, trace = both_ways(model, batch, selector, offer_all())
    assert num_flipped(trace) > 0
    assert generate("processor", model, batch, selector, offer_all(), **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_users_own_empty_cache_is_filled(setup, batch):
    model, selector = set_up(setup)
    expected, trace = both_ways(model, batch, selector, offer_all(), **NEVER_FINISHES)
    assert num_flipped(trace) > 0
    for way in WAYS:
        cache = DynamicCache(config=model.config)
        got = generate(way, model, batch, selector, offer_all(), past_key_values=cache, **NEVER_FINISHES)
        assert got.tolist() == expected.tolist()
        assert cache.get_seq_length() == PROMPT + NEW_TOKENS - 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("last_asked", [True, False], ids=["asked-last", "not-asked-last"])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_text_goes_on_from_the_cache_that_its_first_part_returned(setup, last_asked, way, batch):
    """After a tree step too, which leaves K candidates in a fork of the cache and one token in the cache itself."""
    model, selector = set_up(setup)
    config = offer_all() if last_asked else offer_all(trigger="random", threshold=0.5)
    for new_tokens in range(6, 20):  # until the last step is as wanted
        trace = S2TTrace()
        output = generate(
            "loop",
            model,
            batch,
            selector,
            config,
            trace,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            **NEVER_FINISHES,
        )
        if bool(trace.steps[-1]["asked_B"].any()) is last_asked:
            break
    else:
        raise AssertionError("no text whose last step is as wanted")
    assert num_flipped(trace) > 0
    cache = output.past_key_values
    assert cache.get_seq_length() == PROMPT + new_tokens - 1
    ids = torch.cat([output.sequences, torch.tensor([[20, 21, 22], [30, 31, 32], [40, 41, 42]])], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :PROMPT] = batch["attention_mask"]
    longer, trace = {"input_ids": ids, "attention_mask": mask}, S2TTrace()
    expected, trace = both_ways(model, longer, selector, config, **NEVER_FINISHES)
    assert num_flipped(trace) > 0
    with CountForwards(model) as count:
        got = generate(way, model, longer, selector, config, past_key_values=cache, **NEVER_FINISHES)
    assert got.tolist() == expected.tolist()
    assert count.widths[0] == 4  # the last token of the first part, and three new ones


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(7,), (7, 4, 5)], ids=["alone", "padded"])
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_prompt_of_embeddings_selects_like_its_tokens(setup, lengths, way):
    """`generate` returns the new tokens alone for such a prompt, and gives no attention mask where all is text."""
    model, selector = set_up(setup)
    inputs, trace = prompts(lengths), S2TTrace()
    expected = generate("loop", model, inputs, selector, offer_all(), trace, **NEVER_FINISHES)[:, PROMPT:]
    assert num_flipped(trace) > 0
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    got = generate(way, model, inputs | {"inputs_embeds": embeddings}, selector, offer_all(), **NEVER_FINISHES)
    assert got.tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The state that the model is in


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_inference_mode_changes_nothing_in_it_or_after_it(setup, batch):
    model, selector = set_up(setup)
    expected, trace = both_ways(model, batch, selector, offer_all())
    assert num_flipped(trace) > 0
    one = S2T(selector, config=offer_all())
    with torch.inference_mode():
        within, _ = both_ways(model, batch, selector, offer_all())
        by_one = plain(model, batch, logits_processor=one)
    assert within.tolist() == by_one.tolist() == expected.tolist()
    assert plain(model, batch, logits_processor=one).tolist() == expected.tolist()
    assert both_ways(model, batch, selector, offer_all())[0].tolist() == expected.tolist()


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_model_in_training_mode_without_dropout_selects_the_same(setup, batch):
    model, selector = set_up(setup)
    expected, trace = both_ways(model, batch, selector, offer_all())
    assert num_flipped(trace) > 0
    model.train()
    got, _ = both_ways(model, batch, selector, offer_all())
    assert got.tolist() == expected.tolist()
    assert model.training


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_the_cached_loop_refuses_an_assistant(setup):
    model, selector = set_up(setup)
    with CountForwards(model) as count, pytest.raises(ValueError, match="assisted decoding.*`assistant_model`"):
        generate("loop", model, prompts((7,)), selector, offer_all(), assistant_model=tiny_model(seed=5))
    assert count.calls == 0


REPEATING = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}  # something to look up


@pytest.mark.parametrize("alone", [False, True], ids=["S2T", "S2TLogitsProcessor"])
@pytest.mark.parametrize("drafts", ["the same model", "another model", "the prompt"])
@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
def test_the_processor_path_refuses_assisted_decoding(setup, drafts, alone):
    """Drafts that are all accepted look like one step after another."""
    model, selector = set_up(setup)
    settings = {
        "the same model": {"assistant_model": tiny_model()},
        "another model": {"assistant_model": tiny_model(seed=5)},
        "the prompt": {"prompt_lookup_num_tokens": 3},
    }[drafts]
    processors = [S2TLogitsProcessor(selector, config=offer_all())] if alone else S2T(selector, config=offer_all())
    inputs = REPEATING | {"attention_mask": torch.ones_like(REPEATING["input_ids"])}
    with pytest.raises(ValueError, match="assisted decoding"):
        plain(model, inputs, logits_processor=processors, **settings, **NEVER_FINISHES)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
def test_the_processor_path_refuses_beams(setup, warmup, do_sample, batch):
    """Where the first step is asked already, all beams are one, and none is ever reordered."""
    model, selector = set_up(setup)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="num_beams"):
        generate(
            "processor", model, batch, selector, offer_all(warmup_tokens=warmup), num_beams=2, do_sample=do_sample
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"num_beams": 2, "do_sample": True}, "`num_beams` must be 1"),
        ({"past_key_values": "static"}, "static and quantized caches are not supported"),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
def test_the_cached_loop_refuses_other_ways_of_decoding(setup, settings, message, batch):
    model, selector = set_up(setup)
    if "past_key_values" in settings:
        settings = {"past_key_values": StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS)}
    with CountForwards(model) as count, pytest.raises(ValueError, match=message):
        generate("loop", model, batch, selector, offer_all(), **settings)
    assert count.calls == 0
