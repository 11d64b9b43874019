"""Every architecture, tiny and random: S2T equals a naive decoder without caches, or is refused with the reason.

The naive decoder runs the full text again for every step and every candidate, on a fresh model without PEFT, caches or
masks. Steps trigger at random, so that caches are also caught up over several tokens at once.

Legend: B rows, T columns, K candidates, D hidden size, V vocabulary.
"""

from functools import lru_cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import RESERVED, SCOPES, SETUPS, WAYS, prompts, single
from tiny_architectures import FAMILIES, REFUSED, REPEATED, NaiveCausalLM, make_model

from transformers_s2t import (
    S2T,
    LocalSelector,
    S2TDecodingConfig,
    S2TTrace,
    SelectorConfig,
    TeacherSelector,
    s2t_generate,
)


NEW_TOKENS, K = 8, 4
LENGTHS = (7, 4, 5)  # of the prompts of a batch
THRESHOLDS = {1: 0.5, 3: 0.6}  # of the "random" trigger, by rows: some steps ask rows, some ask none
FLATTENED = {"opt"}  # layers that see all tokens in one heap: candidates are scored and decoded in two forwards
SHARE_THE_CACHE = (("candidate", "base"), ("sequence", "adapted"))


def name_of(setup):
    return setup if isinstance(setup, str) else "-".join(setup)


def make_local(model, name, scope, proposals):
    torch.manual_seed(1)
    family = (FAMILIES | REFUSED)[name]
    peft_config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=family.targets,
        trainable_token_indices={family.head: list(RESERVED)},
        init_lora_weights=False,
    )
    peft_model = get_peft_model(model, peft_config, adapter_name="s2t").eval()
    for parameter_name, parameter in peft_model.named_parameters():
        if "trainable_tokens_delta" in parameter_name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    config = SelectorConfig(RESERVED, scope, proposals, num_candidates=K, min_prob_ratio=0.0)
    return LocalSelector(peft_model, config, "s2t")


@lru_cache
def set_up(name, attn, setup):
    """A model and what selects in it: a teacher of the same family, or the model itself in one of the scopes."""
    model = make_model(name, attn)
    if setup == "teacher":
        return model, TeacherSelector(make_model(name, attn, seed=9))
    return model, make_local(model, name, *setup)


def batch_of(num_rows):
    return prompts(LENGTHS) if num_rows > 1 else single(prompts(LENGTHS), 0)


def plain(model, inputs, **kwargs):
    return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs))


def num_flipped(trace):
    return sum(step["flipped"] for row in trace.rows() for step in row)


def generate(way, model, inputs, selector, config, trace=None):
    if way == "processor":
        return plain(model, inputs, logits_processor=S2T(selector, config=config, trace=trace))
    settings = {"selector": selector, "decoding_config": config, "trace": trace}
    return plain(model, inputs, custom_generate=s2t_generate, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# The naive reference


def fires(num_rows):
    """Which rows trigger at which step (steps, B): the "random" trigger with its seed of 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.rand(num_rows, generator=generator) >= THRESHOLDS[num_rows] for _ in range(NEW_TOKENS)])


@lru_cache
def naive_models(name, setup):
    if setup == "teacher":
        return NaiveCausalLM(make_model(name, "eager")), NaiveCausalLM(make_model(name, "eager", seed=9))
    return NaiveCausalLM(make_model(name, "eager"), set_up(name, "eager", setup)[1]), None


@lru_cache
def naive_row(name, setup, row, num_rows):
    """New tokens of one row of a batch, and at how many steps they are not the student's first."""
    local = setup != "teacher"
    student, teacher = naive_models(name, setup)
    writes_with = "all" if local and setup[1] == "adapted" else "none"
    ids = single(prompts(LENGTHS), row)["input_ids"][0].tolist()
    start, flipped = len(ids), 0
    for step in range(NEW_TOKENS):
        logits_V = student([ids], writes_with)[1][0].clone()
        if local:
            logits_V[list(RESERVED)] = -torch.inf
        offered_K = logits_V.topk(K).indices
        choice = 0
        if fires(num_rows)[step, row]:
            if local:
                texts = [[*ids, candidate] for candidate in offered_K.tolist()]
                hidden_KD = student(texts, {"candidate": "last", "sequence": "all"}[setup[0]])[0]
                scores_K = (hidden_KD @ student.rows_RD.T).softmax(-1) @ torch.linspace(0, 1, len(RESERVED))
            else:
                scores_K = teacher([ids])[1][0, offered_K]
            choice = int(scores_K.argmax())
            flipped += choice != 0
        ids.append(int(offered_K[choice]))
    return ids[start:], flipped


# ---------------------------------------------------------------------------------------------------------------------


def cases():
    """By day each family's cached loop with every setup; one of them, in turn, also as a processor and with the second
    attention implementation. At night all: both ways score with the same functions."""
    for turn, (name, family) in enumerate(FAMILIES.items()):
        for number, setup in enumerate(SETUPS):
            by_day = turn % len(SETUPS) == number
            runs = {"loop": (family.impls[0], "loop"), "processor": (family.impls[0], "processor")}
            runs |= {attn: (attn, "loop") for attn in family.impls[1:]}
            for what, run in runs.items():
                marks = () if by_day or what == "loop" else pytest.mark.slow
                yield pytest.param(name, setup, *run, id=f"{name}-{name_of(setup)}-{what}", marks=marks)


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_greedy_of_a_left_padded_batch_equals_its_rows(name):
    """What the next test leans on; it holds for the recurrent models too."""
    model, batch = make_model(name, FAMILIES[name].impls[0]), batch_of(3)
    together = plain(model, batch)[:, -NEW_TOKENS:].tolist()
    assert together == [plain(model, single(batch, row))[0, -NEW_TOKENS:].tolist() for row in range(3)]


def test_the_triggers_are_such_that_caches_are_caught_up_over_several_tokens():
    steps = fires(1)[:, 0].nonzero()[:, 0]
    assert int(steps.diff().max()) >= 3
    assert 0 < int((~fires(3).any(-1)).sum()) < NEW_TOKENS


@pytest.mark.parametrize(("name", "setup", "attn", "way"), cases())
def test_s2t_alone_and_in_a_left_padded_batch_equals_a_naive_decoder(name, setup, attn, way):
    model, selector = set_up(name, attn, setup)
    total = 0
    for num_rows, threshold in THRESHOLDS.items():
        config = S2TDecodingConfig(
            trigger="random", threshold=threshold, num_candidates=K, min_prob_ratio=0.0, warmup_tokens=0
        )
        expected, flipped = zip(*(naive_row(name, setup, row, num_rows) for row in range(num_rows)))
        trace = S2TTrace()
        got = generate(way, model, batch_of(num_rows), selector, config, trace)[:, -NEW_TOKENS:]
        assert got.tolist() == list(expected)
        assert num_flipped(trace) == sum(flipped)
        total += sum(flipped)
        if num_rows == 1 and way == "loop" and setup in SHARE_THE_CACHE:
            # one forward scores and decodes where a tree mask is exact; elsewhere cache rows are repeated
            in_one = name not in REPEATED and not (setup == SCOPES[0] and name in FLATTENED)
            assert set(trace.forwards) == {"tree" if in_one else "scorer"}
    assert total >= 3 and sum(flipped) > 0, "the student's own tokens would have passed"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cached_loop_continues_with_the_logits_of_the_model_where_it_scored(name):
    """Scaled or soft-capped logits: temperature, floor and triggers of the step after a tree step depend on them."""
    model, selector = set_up(name, FAMILIES[name].impls[0], SCOPES[2])
    config = S2TDecodingConfig(num_candidates=K, min_prob_ratio=0.0, warmup_tokens=0)
    settings = {"selector": selector, "decoding_config": config, "custom_generate": s2t_generate}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    out = plain(model, prompts(), **settings)
    student, _ = naive_models(name, SCOPES[2])
    text = out.sequences[0].tolist()  # the longest: no padding
    expected = [student([text[: 7 + step]], "all")[1][0] for step in range(NEW_TOKENS)]
    got = [logits_BV[0] for logits_BV in out.logits]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_keeps_its_state_outside_of_the_cache_is_refused(name, setup, way):
    with pytest.raises(ValueError, match="outside of the cache"):
        model, selector = set_up(name, "sdpa", setup)
        generate(way, model, single(prompts(), 0), selector, S2TDecodingConfig(num_candidates=K, warmup_tokens=0))
