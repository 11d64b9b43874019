"""What would select wrongly is an error that names the cause, before the first token, in both ways.

Ways: "processor" is `logits_processor=S2T(...)`, "loop" is `custom_generate=s2t_generate`. That no token came first
is told by a streamer and by the number of forwards: the prompt may have been read, but nothing was decoded.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from tiny import (
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
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

from transformers_s2t import S2T, LocalSelector, S2TTrace, SelectorConfig, TeacherSelector, s2t_generate
from transformers_s2t.fingerprints import model_hash, weights_name
from transformers_s2t.reserved_tokens import vocab_hash


NEW_TOKENS = 8


def name_of(value):
    if isinstance(value, dict):
        return "+".join(map(str, value.values()))
    return str(value).removeprefix("torch.") if not isinstance(value, tuple) else "-".join(map(str, value))


def set_up(setup, **config):
    """A model and what selects in it: a teacher, or the model itself in one of the scopes."""
    model = tiny_model(**config)
    if setup == "teacher":
        return model, TeacherSelector(tiny_model(seed=9, **config))
    return model, make_selector(model, *setup)


def generate(way, model, inputs, selector, config=None, trace=None, teacher=None, processors=(), **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | NEVER_FINISHES | kwargs
    if way == "processor":
        select = S2T(selector, teacher_model=teacher, config=config, trace=trace)
        return model.generate(**inputs, logits_processor=LogitsProcessorList([*processors, *select]), **kwargs)
    return model.generate(
        **inputs,
        logits_processor=LogitsProcessorList(processors),
        custom_generate=s2t_generate,
        selector=selector,
        teacher_model=teacher,
        decoding_config=config,
        trace=trace,
        **kwargs,
    )


def accepted(way, *args, **kwargs):
    """Generates, and asserts that something was selected."""
    trace = S2TTrace()
    output = generate(way, *args, trace=trace, **kwargs)
    assert sum(step["flipped"] for row in trace.rows() for step in row) > 0
    return output


class CountTokens(BaseStreamer):
    """How many columns came after the prompt."""

    def __init__(self):
        self.columns = -1

    def put(self, value):
        self.columns += 1

    def end(self):
        pass


@contextmanager
def refused(model, message, after=0, error=ValueError):
    """Yields the streamer to use; nothing but the prompt may be read before an error with this message.

    Args:
        message: a regular expression.
        after: how many tokens may come first.
    """
    streamer, calls = CountTokens(), []
    handle = model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        with pytest.raises(error, match=message):
            yield streamer
    finally:
        handle.remove()
    assert max(streamer.columns, 0) == after, "a token came before the error"
    assert after or len(calls) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Selectors of another model


def save_adapter(folder, model=None, scope=("candidate", "base"), **config):
    """An adapter in the folder as S2TTrainer leaves it, trained on `model`."""
    model = tiny_model() if model is None else model
    fingerprint = model_hash(model)
    lora_model(model, name="default").save_pretrained(folder)
    settings = {"num_candidates": 5, "min_prob_ratio": 0.0, "base_model": "us/first", "model_hash": fingerprint}
    SelectorConfig(RESERVED, *scope, **(settings | config)).save_pretrained(folder)
    return fingerprint


def names_of(model):
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_selector_of_another_model_of_the_same_shapes_is_refused(setup, tmp_path):
    fingerprint, other = save_adapter(tmp_path, scope=setup), tiny_model(seed=3)
    names = names_of(other)
    ours, theirs = weights_name(fingerprint), weights_name(model_hash(other))
    with pytest.raises(ValueError, match=f"'us/first'.*{ours}.*{theirs}.*allow_other_model=True"):
        LocalSelector.from_pretrained(tmp_path, other)
    assert names_of(other) == names
    LocalSelector.from_pretrained(tmp_path, tiny_model())


@pytest.mark.parametrize("stored", ["today", "older"])
def test_a_selector_of_the_base_model_is_refused_by_a_model_that_it_was_merged_into(stored, tmp_path):
    """Its embeddings are the same. What an older version stored tells nothing else."""
    fingerprint = model_hash(tiny_model())
    save_adapter(tmp_path, model_hash=fingerprint if stored == "today" else fingerprint[:16])
    merged = lora_model(tiny_model()).merge_and_unload()
    if stored == "today":
        with pytest.raises(ValueError, match="was trained on 'us/first'"):
            LocalSelector.from_pretrained(tmp_path, merged)
    else:
        with pytest.raises(ValueError, match=f"weights {fingerprint[:16]}\\), but .* has weights [0-9a-f]{{16}}-"):
            LocalSelector.from_pretrained(tmp_path, tiny_model(seed=3))
    LocalSelector.from_pretrained(tmp_path, tiny_model())


@pytest.mark.parametrize("way", WAYS)
def test_a_selector_of_another_model_is_taken_where_the_user_says_so(way, tmp_path, batch):
    save_adapter(tmp_path)
    model = tiny_model(seed=3)
    accepted(way, model, batch, LocalSelector.from_pretrained(tmp_path, model, allow_other_model=True))


def test_a_selector_without_a_fingerprint_is_taken(tmp_path):
    save_adapter(tmp_path, model_hash="")
    LocalSelector.from_pretrained(tmp_path, tiny_model(seed=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_a_selector_is_taken_by_its_model_in_another_data_type(dtype, tmp_path):
    save_adapter(tmp_path / "adapter")
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    assert model.dtype == dtype
    LocalSelector.from_pretrained(tmp_path / "adapter", model)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and tokenizers


def make_tokenizer(num_words=97, swap=None):
    """A tokenizer whose id `i` is the word "w<i>", but for a pair that changed places."""
    words = {"<pad>": PAD} | {f"w{id}": id for id in range(1, num_words)}
    if swap:
        first, second = (f"w{id}" for id in swap)
        words[first], words[second] = words[second], words[first]
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


SWAPPED = r"id 11 is 'w11' for `model` and 'w12' for `teacher_model`"


def test_a_selector_of_another_tokenizer_is_refused(tmp_path):
    ours, theirs = make_tokenizer(), make_tokenizer(swap=(11, 12))
    save_adapter(tmp_path, vocab_hash=vocab_hash(ours))
    model = tiny_model()
    names = names_of(model)
    with pytest.raises(ValueError, match=f"'us/first'.*{vocab_hash(ours)}.*`processing_class`.*{vocab_hash(theirs)}"):
        LocalSelector.from_pretrained(tmp_path, model, processing_class=theirs)
    assert names_of(model) == names
    LocalSelector.from_pretrained(tmp_path, model, processing_class=ours)


def test_reserved_ids_above_the_head_are_refused():
    with pytest.raises(ValueError, match="`reserved_token_ids` must be below 97.*got 105"):
        LocalSelector(lora_model(tiny_model()), SelectorConfig(tuple(range(90, 106))), "s2t")


@pytest.mark.parametrize("num_rows", [60, 80, 90])
def test_a_selector_is_refused_by_a_head_that_lacks_its_tokens_and_more(num_rows, tmp_path):
    """It was trained with 97 rows, of which the last 16 are reserved: the model has at least 81 of its own."""
    save_adapter(tmp_path, model_hash="")
    model = tiny_model(vocab_size=num_rows)
    with pytest.raises(ValueError, match=f"96.*{num_rows} rows"):
        LocalSelector.from_pretrained(tmp_path, model)
    assert model.lm_head.weight.shape[0] == num_rows


@pytest.mark.parametrize("way", WAYS)
def test_a_selector_whose_training_added_its_rows_is_taken(way, tmp_path, batch):
    save_adapter(tmp_path, model_hash="")
    model = tiny_model(vocab_size=RESERVED[0])
    accepted(way, model, batch, LocalSelector.from_pretrained(tmp_path, model))


SMALL = {"vocab_size": 60}
SMALL_RESERVED = tuple(range(44, 60))


def small_set_up(setup, **config):
    if setup == "teacher":
        return set_up(setup, **SMALL)
    model = tiny_model(**SMALL)
    settings = {"num_candidates": 5, "min_prob_ratio": 0.0} | config
    config = SelectorConfig(SMALL_RESERVED, *setup, **settings)
    return model, LocalSelector(lora_model(model, reserved=SMALL_RESERVED), config, "s2t")


def small_prompts():
    inputs = prompts()
    return inputs | {"input_ids": inputs["input_ids"].clamp_max(43)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("setup", "most", "given"),
    [("teacher", 60, 61), ("teacher", 60, 64)] + [(setup, 44, given) for setup in SCOPES for given in (45, 64)],
    ids=name_of,
)
def test_more_candidates_than_tokens_are_refused(setup, most, given, way):
    model, selector = small_set_up(setup)
    with refused(model, rf"`num_candidates` must be in \[1, {most}\].*got {given}") as streamer:
        inputs = {name: tensor[:1] for name, tensor in small_prompts().items()}
        generate(way, model, inputs, selector, offer_all(num_candidates=given), streamer=streamer)
    accepted(way, model, small_prompts(), selector, offer_all(num_candidates=most))


@pytest.mark.parametrize("way", WAYS)
def test_more_stored_candidates_than_tokens_are_refused(way):
    model, selector = small_set_up(("candidate", "base"), num_candidates=64)
    with refused(model, r"`num_candidates` must be in \[1, 44\].*got 64") as streamer:
        generate(way, model, small_prompts(), selector, streamer=streamer)


def with_tokenizer(folder, model, tokenizer):
    """The model as if it had been loaded from a folder that holds this tokenizer."""
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_teacher_whose_ids_mean_other_tokens_is_found_by_its_name(setup, tmp_path, batch):
    """The processor path knows the model of a local selector alone; a teacher's text may be any model's."""
    model, selector = set_up(setup)
    teacher = getattr(selector, "teacher_model", None) or tiny_model(seed=9)
    with_tokenizer(tmp_path / "model", model, make_tokenizer())
    with_tokenizer(tmp_path / "teacher", teacher, make_tokenizer(swap=(11, 12)))
    config = offer_all() if setup == "teacher" else offer_all(trigger="kl", threshold=0.1)
    for way in WAYS if setup != "teacher" else ["loop"]:
        with refused(model, SWAPPED) as streamer:
            generate(way, model, batch, selector, config, teacher=teacher, streamer=streamer)


@pytest.mark.parametrize("how", ["TeacherSelector", "S2T", "S2T-selector", "S2T-local"])
def test_a_teacher_whose_ids_mean_other_tokens_is_found_by_the_tokenizer_given(how, tmp_path):
    model, selector = set_up(("candidate", "base"))
    ours = make_tokenizer()
    teacher = with_tokenizer(tmp_path, tiny_model(seed=9), make_tokenizer(swap=(11, 12)))
    with pytest.raises(ValueError, match=SWAPPED):
        if how == "TeacherSelector":
            TeacherSelector(teacher, processing_class=ours)
        elif how == "S2T":
            S2T(teacher_model=teacher, processing_class=ours)
        elif how == "S2T-selector":
            S2T(TeacherSelector(teacher), processing_class=ours)
        else:
            config = offer_all(trigger="kl", threshold=0.1)
            S2T(selector, teacher_model=teacher, config=config, processing_class=ours)


@pytest.mark.parametrize("num_words", [60, 97, 120])
@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_that_knows_more_or_fewer_words_is_taken(way, num_words, tmp_path, batch):
    ours, theirs = make_tokenizer(), make_tokenizer(num_words)
    model = with_tokenizer(tmp_path / "model", tiny_model(), ours)
    teacher = with_tokenizer(tmp_path / "teacher", tiny_model(seed=9, vocab_size=120), theirs)
    accepted(way, model, batch, TeacherSelector(teacher, processing_class=ours), offer_all())


@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_with_a_token_that_the_teacher_lacks_is_refused(way, setup):
    model, selector = set_up(setup)
    teacher = tiny_model(seed=9, vocab_size=60)
    if setup == "teacher":
        selector = TeacherSelector(teacher)
    config = offer_all() if setup == "teacher" else offer_all(trigger="kl", threshold=0.1)
    inputs = prompts()
    inputs["input_ids"] = inputs["input_ids"].clamp_max(59)
    inputs["input_ids"][1, -2] = 60
    with refused(model, "token id 60, but `teacher_model` knows 60 tokens") as streamer:
        generate(way, model, inputs, selector, config, teacher=teacher, streamer=streamer)
    inputs["input_ids"][1, -2] = 59
    accepted(way, model, inputs, selector, config, teacher=teacher, suppress_tokens=list(range(60, 97)))


@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_the_teacher_lacks_are_not_written(way):
    """It could not read on behind them. The end of a text is written all the same: nobody reads on there."""
    model, selector = tiny_model(), TeacherSelector(tiny_model(seed=9, vocab_size=60))
    inputs = prompts()
    inputs["input_ids"] = inputs["input_ids"].clamp_max(59)
    first_tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, 7:]
    assert int(first_tokens.max()) >= 60
    trace = S2TTrace()
    got = generate(way, model, inputs, selector, offer_all(warmup_tokens=4), trace, eos_token_id=None)[:, 7:]
    assert int(got.max()) < 60 and any(bool(step["asked_B"].any()) for step in trace.steps)
    config = offer_all(warmup_tokens=2, trigger="random", threshold=0.5)
    ends = int(first_tokens[first_tokens >= 60][0])
    got = generate(way, model, inputs, selector, config, eos_token_id=ends, pad_token_id=70)[:, 7:]
    assert set(got[got >= 60].tolist()) == {ends, 70}


# ---------------------------------------------------------------------------------------------------------------------
# NaN


class Nan(LogitsProcessor):
    """Scores that are NaN in some rows."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[self.rows] = math.nan
        return scores


TRIGGERS = [
    {"trigger": "always", "warmup_tokens": 0},
    {"trigger": "always", "warmup_tokens": 3},
    {"trigger": "entropy", "threshold": 99.0},
    {"trigger": "margin", "threshold": 99.0},
]


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [1]], ids=["all-rows", "one-row"])
@pytest.mark.parametrize("trigger", TRIGGERS, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_nan_from_the_first_step_on_is_refused(way, trigger, rows, do_sample, batch):
    model, selector = set_up("teacher")
    with refused(model, "logits are NaN") as streamer:
        generate(
            way,
            model,
            batch,
            selector,
            offer_all(**trigger),
            processors=[Nan(rows)],
            do_sample=do_sample,
            streamer=streamer,
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_prompt_that_makes_the_model_yield_nan_is_refused(setup, way, batch):
    """One broken row of the embedding, as a resized model may have: the other rows of the batch are sound."""
    model, selector = set_up(setup)
    token = int(batch["input_ids"][1, -1])
    assert (batch["input_ids"] == token).sum() == 1
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    with refused(model, "logits are NaN") as streamer:
        generate(way, model, batch, selector, offer_all(trigger="entropy", threshold=1.0), streamer=streamer)


def break_later(model, inputs, **kwargs):
    """Makes the model yield NaN once it has said a token that is new at the fifth step or later; returns that step."""
    text = model.generate(**inputs, max_new_tokens=20, do_sample=False, **NEVER_FINISHES, **kwargs)[0].tolist()
    length = inputs["input_ids"].shape[1]
    at = next(i for i in range(length + 4, len(text)) if text[i] not in text[:i])
    with torch.no_grad():
        model.get_input_embeddings().weight[text[at]] = math.nan
    return at + 1 - length


@pytest.mark.parametrize("trigger", ["entropy", "margin", "kl", "random"])
@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_nan_at_a_later_step_that_does_not_trigger_is_not_decoded_over(way, setup, trigger):
    model, selector = set_up(setup)
    teacher = getattr(selector, "teacher_model", None) or tiny_model(seed=9) if trigger == "kl" else None
    inputs = prompts((6,))
    banned = {} if setup == "teacher" else {"suppress_tokens": list(RESERVED)}
    num_good = break_later(model, inputs, **banned)
    config, settings = offer_all(trigger=trigger, threshold=99.0), {"max_new_tokens": num_good}
    trace = S2TTrace()
    generate(way, model, inputs, selector, config, trace, teacher, **settings)  # up to there all is well
    assert not any(step["triggered"] for step in trace.rows()[0])
    with refused(model, "logits are NaN", after=num_good) as streamer:
        generate(way, model, inputs, selector, config, teacher=teacher, max_new_tokens=num_good + 4, streamer=streamer)


@pytest.mark.parametrize("takeover", [False, True], ids=["select", "takeover"])
@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_that_yields_nan_is_refused_where_it_would_select(way, takeover, batch):
    model, teacher = tiny_model(), tiny_model(seed=9)
    with torch.no_grad():
        teacher.lm_head.weight[:] = math.nan
    selector = TeacherSelector(teacher, takeover=takeover)
    with refused(model, "(?i)nan") as streamer:
        generate(way, model, batch, selector, offer_all(warmup_tokens=0), streamer=streamer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SCOPES[:2], ids=name_of)
def test_an_adapter_that_yields_nan_is_refused_where_it_would_select(setup, way, batch):
    model, selector = set_up(setup)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter[:] = math.nan
    with pytest.raises(ValueError, match="(?i)nan"):
        generate(way, model, batch, selector, offer_all(warmup_tokens=0))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that fill the context


def padded(lengths, width):
    """Prompts of these lengths with more padding than any of them needs."""
    inputs = prompts((*lengths, width))
    return {name: tensor[:-1] for name, tensor in inputs.items()}


@pytest.mark.parametrize("length", [16, 17])
@pytest.mark.parametrize(
    ("setup", "way"),
    [(setup, way) for setup in SETUPS for way in WAYS if (setup, way) != ("teacher", "processor")],
    ids=name_of,
)
def test_a_prompt_that_fills_the_models_context_is_refused(setup, way, length):
    """With a teacher the processor path knows nothing of the model that writes."""
    model, selector = set_up(setup, max_position_embeddings=16)
    if setup == "teacher":
        selector = TeacherSelector(tiny_model(seed=9))
    inputs = padded((5, length), length + 2)
    with refused(model, f"prompt has {length} tokens, but `model` reads at most 16") as streamer:
        generate(way, model, inputs, selector, offer_all(), streamer=streamer)


@pytest.mark.parametrize("length", [16, 17])
@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base")], ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_that_fills_the_teachers_context_is_refused(way, setup, length):
    model, selector = set_up(setup)
    teacher = tiny_model(seed=9, max_position_embeddings=16)
    selector = TeacherSelector(teacher) if setup == "teacher" else selector
    config = offer_all() if setup == "teacher" else offer_all(trigger="kl", threshold=0.1)
    with refused(model, f"prompt has {length} tokens, but `teacher_model` reads at most 16") as streamer:
        generate(way, model, padded((5, length), length), selector, config, teacher=teacher, streamer=streamer)


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_padding_does_not_count_as_context(way, setup):
    """20 columns, of which no row fills more than 15."""
    model, selector = set_up(setup, max_position_embeddings=16)
    inputs = padded((9, 15), 20)
    assert inputs["input_ids"].shape == (2, 20)
    accepted(way, model, inputs, selector, offer_all())
