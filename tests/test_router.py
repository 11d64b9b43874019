"""The router in decoding: what it reads, in both ways, against a naive decoder without caches and hooks; its storage.

Ways: "processor" is `logits_processor=S2T(...)`, "loop" is `custom_generate=s2t_generate`. Heads are random, with
their thresholds in the middle of their own values: a router that read the wrong state would fire at other steps.

Legend: B rows, K candidates, D hidden size, F features, V vocabulary, X inputs of the head.
"""

import copy
import gc
import io
import json
import math
import re
from dataclasses import asdict, replace
from functools import lru_cache
from hashlib import sha256
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_architectures import make_local
from tiny import RESERVED, SCOPES, SETUPS, WAYS, in_turn, lora_model, make_selector, prompts, single, tiny_model
from tiny_architectures import FAMILIES, NaiveCausalLM, make_model
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessor

from transformers_s2t import (
    S2T,
    FusionWeights,
    LocalSelector,
    S2TDecodingConfig,
    S2TLogitsProcessor,
    S2TTrace,
    SelectorConfig,
    TeacherSelector,
    s2t_generate,
)
from transformers_s2t.fingerprints import model_hash, weights_name
from transformers_s2t.models.views import get_decoder, switch_adapter
from transformers_s2t.proposals import exclude
from transformers_s2t.router import (
    ROUTER_WEIGHTS_NAME,
    HiddenTap,
    LastHidden,
    Router,
    RouterConfig,
    RouterHead,
    num_layers,
    read_module,
)


NEW_TOKENS, K, PROMPT = 8, 4, 7  # the longest of `batch`
TRIGGERS = ("router", "always", "margin")


def name_of(value):
    return "-".join(value) if isinstance(value, tuple) else str(value)


def make_router(model, layer, seed=4, **config):
    """A random head with logits of about -3 to 3, on inputs that are shifted and scaled."""
    config = RouterConfig(**({"hidden_size": model.config.hidden_size, "layer": layer, "width": 16} | config))
    torch.manual_seed(seed)
    head = RouterHead(config)
    head.mean.normal_()
    head.scale.uniform_(0.5, 2.0)
    torch.nn.init.normal_(head.out.weight, std=2.0)
    return Router(model, head, config)


class Reader(NaiveCausalLM):
    """[`NaiveCausalLM`], and what the library itself returns as hidden states."""

    @torch.no_grad()
    def read(self, ids, tokens_adapted, layer):
        """Hidden states (D,) of the last token behind a layer, and logits (V,)."""
        self.texts, self.tokens_adapted = [ids], tokens_adapted
        output = self.base(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        # Mamba 2 returns no embeddings, and its last layer's output both before and behind the norm
        index = layer - (self.base.config.model_type == "mamba2" and layer < num_layers(self.base))
        return output.hidden_states[index][0, -1], output.logits[0, -1].clone()


def naive_features(logits_V, num_top=8):
    """Entropy, margin and the best log-probabilities over the renormalised top 64, not below -20; in float64."""
    ranked = sorted(logits_V.double().tolist(), reverse=True)
    total = sum(math.exp(x) for x in ranked[:64])
    top = [math.exp(x) / total for x in ranked[:64]]
    entropy = -sum(p * math.log(p) for p in top if p > 0)
    best = [x - math.log(total) for x in ranked[:num_top]]
    return torch.tensor([max(x, -20.0) for x in [entropy, ranked[1] - ranked[0], *best]])


def naive_head(head, hidden_D, features_F):
    """The head's logit from its weights."""
    weights = {name: tensor.double() for name, tensor in head.state_dict().items()}
    inputs_X = (torch.cat([hidden_D.double(), features_F.double()]) - weights["mean"]) / weights["scale"]
    hidden_W = weights["hidden.weight"] @ inputs_X + weights["hidden.bias"]
    hidden_W = hidden_W * (1 + torch.erf(hidden_W / math.sqrt(2))) / 2
    return float(weights["out.weight"][0] @ hidden_W + weights["out.bias"][0])


def offer_all(**settings):
    return S2TDecodingConfig(**({"num_candidates": K, "min_prob_ratio": 0.0, "warmup_tokens": 2} | settings))


class Case:
    """A model, what selects in it, its router, and the naive models that stand for them."""

    def __init__(self, setup, layer, family="llama", make=None, local=None):
        make = make or (lambda seed=0: tiny_model(family, seed=seed, eos_token_id=None))
        self.setup, self.model = setup, make()
        self.layer = num_layers(self.model) if layer == "last" else layer
        self.router = make_router(self.model, self.layer)
        self.teacher = None
        if setup == "teacher":
            self.selector = TeacherSelector(make(seed=9), router=self.router)
            self.student, self.teacher = Reader(make()), Reader(make(seed=9))
        else:
            self.selector = (local or make_selector)(self.model, *setup)
            self.selector.router = self.router
            self.student = Reader(make(), self.selector)

    def decode(self, ids, config, fusion, guide=None):
        """New tokens of one text, trigger values, how many tokens are not the student's first, and how many tokens the
        router's term decides."""
        local, start, ids, values, flips, moved = self.teacher is None, len(ids), list(ids), [], 0, 0
        writes_with = "all" if local and self.setup[1] == "adapted" else "none"
        for step in range(NEW_TOKENS):
            hidden_D, logits_V = self.student.read(ids, writes_with, self.layer)
            if guide is not None:
                logits_V = guide(self, ids, start, logits_V, writes_with)
            if local:
                logits_V[list(RESERVED)] = -math.inf
            logit = naive_head(self.router.head, hidden_D, naive_features(logits_V))
            logprobs_V = logits_V.log_softmax(-1)
            offered_K = logprobs_V.topk(config.num_candidates).indices
            if config.min_prob_ratio:
                offered_K = offered_K[logprobs_V[offered_K] >= logprobs_V.max() + math.log(config.min_prob_ratio)]
            best, second = logprobs_V.topk(2).values.tolist()
            values.append({"router": logit, "margin": second - best, "always": 0.0}[config.trigger])
            fires = step >= config.warmup_tokens and (config.threshold is None or values[-1] >= config.threshold)
            choice = 0
            if fires and len(offered_K) > 1:
                scores_K = self.score(ids, offered_K)
                fused_K = fusion.selector * scores_K + fusion.logprob * logprobs_V[offered_K]
                fused_K[1:] += fusion.switch
                without = int(fused_K.argmax())
                fused_K[1:] += fusion.router * logit
                choice = int(fused_K.argmax())
                moved += choice != without
            flips += choice != 0
            ids.append(int(offered_K[choice]))
        return ids[start:], values, flips, moved

    def score(self, ids, offered_K):
        if self.teacher is not None:
            return self.teacher.read(ids, "none", 1)[1].log_softmax(-1)[offered_K]
        texts = [[*ids, candidate] for candidate in offered_K.tolist()]
        hidden_KD = self.student(texts, {"candidate": "last", "sequence": "all"}[self.setup[0]])[0]
        return (hidden_KD @ self.student.rows_RD.T).softmax(-1) @ torch.linspace(0, 1, len(RESERVED))


@lru_cache
def make_case(setup, layer, family="llama"):
    if family == "llama":
        return Case(setup, layer)

    def make(seed=0):
        if family == "gpt2":
            return tiny_model(family, seed, eos_token_id=None, **FAMILIES[family].config, tie_word_embeddings=True)
        return make_model(family, FAMILIES[family].impls[0], seed)

    return Case(setup, layer, family, make, lambda model, *scope: make_local(model, family, *scope))


def plain(model, inputs, **kwargs):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(**inputs, **settings)


def generate(way, model, inputs, selector, config, trace=None, **kwargs):
    if way == "processor":
        return plain(model, inputs, logits_processor=S2T(selector, config=config, trace=trace), **kwargs)
    settings = {"selector": selector, "decoding_config": config, "trace": trace} | kwargs
    return plain(model, inputs, custom_generate=s2t_generate, **settings)


def middle_threshold(case, inputs, trigger="router", **config):
    """A threshold that about half of the values reach, in their widest gap near the middle."""
    trace = S2TTrace()
    generate("loop", case.model, inputs, case.selector, offer_all(trigger=trigger, threshold=-math.inf), trace)
    return middle_of(torch.cat([step["value_B"] for step in trace.steps]))


def middle_of(values):
    middle = values.numel() // 2
    near = values.flatten().sort().values[middle - 3 : middle + 3]
    at = int(near.diff().argmax())
    return float(near[at] + near[at + 1]) / 2


def naive_middle(case, inputs, guide):
    """The same where the user shapes the logits, of the naive decoder's values without selection."""
    never = offer_all(trigger="router", threshold=math.inf)
    return middle_of(torch.tensor([case.decode(ids, never, FusionWeights(), guide)[1] for ids in rows_of(inputs)]))


def rows_of(inputs):
    return [single(inputs, row)["input_ids"][0].tolist() for row in range(len(inputs["input_ids"]))]


def fused(case, trigger):
    """Weights under which the router's logit and the selector's score decide about as often."""
    if trigger == "router":
        return FusionWeights()
    return FusionWeights(1.0, 0.1, -0.1, 0.4) if case.teacher is None else FusionWeights(1.0, 0.3, -0.5, 1.5)


def config_of(case, trigger, inputs, **settings):
    threshold = None if trigger == "always" else middle_threshold(case, inputs, trigger)
    return offer_all(trigger=trigger, threshold=threshold, fusion=fused(case, trigger), **settings)


def check_against_naive(case, inputs, config, ways=WAYS, guide=None, **kwargs):
    """Both ways give the naive decoder's tokens, trigger values and number of flips; returns the traces."""
    expected, values, flips, moved = zip(*(case.decode(ids, config, config.fusion, guide) for ids in rows_of(inputs)))
    traces = []
    for way in ways:
        traces.append(S2TTrace())
        got = generate(way, case.model, inputs, case.selector, config, traces[-1], **kwargs)
        assert got[:, inputs["input_ids"].shape[1] :].tolist() == list(expected), way
        found = torch.stack([step["value_B"] for step in traces[-1].steps], dim=1)
        torch.testing.assert_close(found, torch.tensor(values), atol=2e-3, rtol=1e-3)
        assert sum(step["flipped"] for row in traces[-1].rows() for step in row) == sum(flips) > 0
    assert bool(sum(moved)) == bool(config.fusion.router), "the router's term decides nothing"
    if config.trigger != "always":
        triggered = [step["triggered"] for row in traces[0].rows() for step in row[config.warmup_tokens :]]
        assert 0 < sum(triggered) < len(triggered)
    return traces


# ---------------------------------------------------------------------------------------------------------------------
# Both ways equal a naive decoder


@pytest.mark.parametrize(("trigger", "layer"), in_turn(TRIGGERS, [1, "last"]))
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_both_ways_equal_a_naive_decoder_without_caches_and_hooks(setup, trigger, layer, batch):
    case = make_case(setup, layer)
    config = config_of(case, trigger, batch)
    traces = check_against_naive(case, batch, config)
    assert not any("router" in trace.forwards for trace in traces), "the step's own forward was at hand"


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_floor_and_a_router_in_trigger_and_score_at_once(setup, batch):
    case = make_case(setup, "last")
    config = offer_all(
        trigger="router", threshold=middle_threshold(case, batch), fusion=fused(case, "always"), min_prob_ratio=0.02
    )
    check_against_naive(case, batch, config)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_left_padded_batch_equals_its_rows_alone(setup, way, batch):
    case = make_case(setup, 1)
    config = config_of(case, "router", batch)
    together = generate(way, case.model, batch, case.selector, config)[:, PROMPT:].tolist()
    alone = [generate(way, case.model, single(batch, row), case.selector, config)[0] for row in range(3)]
    assert together == [row[-NEW_TOKENS:].tolist() for row in alone]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tap_sees_what_the_library_calls_hidden_states(name, batch):
    """Whether the model runs or, as where candidates are scored, its decoder alone."""
    model = make_model(name, FAMILIES[name].impls[0])
    reader, text = Reader(model), batch["input_ids"][0].tolist()
    for layer in range(1, num_layers(model) + 1):
        with HiddenTap(read_module(model, layer)) as tap:
            expected_D, _ = reader.read(text, "none", layer)
            assert torch.equal(tap.hidden.take()[0, -1], expected_D)
            with torch.no_grad():
                get_decoder(model)(input_ids=torch.tensor([text]), use_cache=False)
            assert tap.hidden.num_forwards == 1
            assert torch.equal(tap.hidden.take()[0, -1], expected_D)
            assert tap.hidden.take() is None


ARCHITECTURES = ("gpt2", "mistral", "gemma2", "lfm2", "mamba2", "jamba", "opt", "bloom", "llama4_text")


@pytest.mark.parametrize(("family", "tapped"), in_turn(ARCHITECTURES, [("last", SCOPES[2]), (1, SCOPES[0])]))
def test_other_architectures_equal_their_naive_decoders(family, tapped, batch):
    layer, setup = tapped
    case = make_case(setup, layer, family)
    traces = check_against_naive(case, batch, config_of(case, "router", batch))
    assert not any("router" in trace.forwards for trace in traces)


# ---------------------------------------------------------------------------------------------------------------------
# The processor path where the last forward is not surely the step's own, and where it is


def is_close(trace, other):
    """Whether two calls saw the same trigger values."""
    values, others = ([step["value_B"] for step in t.steps] for t in (trace, other))
    return len(values) == len(others) and torch.allclose(torch.stack(values), torch.stack(others), atol=1e-3)


def fast_tokens(case, inputs, config):
    """What both ways give where nothing stands in the way, by the tests above; and the trace."""
    trace = S2TTrace()
    return generate("loop", case.model, inputs, case.selector, config, trace).tolist(), trace


def run_on_the_last_token(model, input_ids):
    """A user's own code between the steps: the same model on something else, with as many rows."""
    model(input_ids=input_ids[:, -1:], use_cache=False)


def test_a_compiled_model_on_a_static_cache(batch):
    """What `generate` does by itself on a GPU; here without a compiler behind it."""
    case = make_case("teacher", 1)
    config = config_of(case, "router", batch)
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    trace = S2TTrace()
    settings = {"cache_implementation": "static", "compile_config": compiled}
    got = generate("processor", case.model, batch, case.selector, config, trace, **settings)
    assert got.tolist() == fast_tokens(case, batch, config)[0]
    assert "router" not in trace.forwards


class RunsTheModel(LogitsProcessor):
    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        run_on_the_last_token(self.model, input_ids)
        return scores


def criterion(model):
    def goes_on(input_ids, scores, **kwargs):
        run_on_the_last_token(model, input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return [goes_on]


UNSURE = {
    "a-prompt-read-in-parts": (lambda case: {"prefill_chunk_size": 3}, 1),
    "a-criterion-runs-the-model": (lambda case: {"stopping_criteria": criterion(case.model)}, NEW_TOKENS - 1),
    "a-dynamic-cache": (lambda case: {}, 0),
    "no-cache": (lambda case: {"use_cache": False}, 0),
    "a-static-cache": (lambda case: {"cache_implementation": "static"}, 0),
}


@pytest.mark.parametrize("how", UNSURE)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_the_processor_reads_the_text_again_where_the_forward_is_not_surely_its_own(setup, how, batch):
    case = make_case(setup, 1)
    config = config_of(case, "router", batch)
    expected, expected_trace = fast_tokens(case, batch, config)
    settings, num_forwards = UNSURE[how]
    trace = S2TTrace()
    got = generate("processor", case.model, batch, case.selector, config, trace, **settings(case))
    assert got.tolist() == expected
    assert is_close(trace, expected_trace)
    assert trace.forwards.get("router", 0) == num_forwards


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_processor_that_runs_the_model_before_the_step(setup, batch):
    case = make_case(setup, "last")
    config = config_of(case, "router", batch)
    expected, expected_trace = fast_tokens(case, batch, config)
    trace = S2TTrace()
    processors = [RunsTheModel(case.model), *S2T(case.selector, config=config, trace=trace)]
    assert plain(case.model, batch, logits_processor=processors).tolist() == expected
    assert is_close(trace, expected_trace)
    assert trace.forwards["router"] == NEW_TOKENS


@pytest.mark.parametrize(
    ("family", "setup"), [("llama", setup) for setup in SETUPS] + [("jamba", SCOPES[0])], ids=name_of
)
def test_the_text_is_read_again_only_where_the_score_needs_it(family, setup, batch):
    """With fusion alone the router is read at asked steps: the text is caught up over several tokens at once."""
    case = make_case(setup, 1, family)
    config = config_of(case, "margin", batch)
    expected, _ = fast_tokens(case, batch, config)
    trace = S2TTrace()
    settings = {"stopping_criteria": criterion(case.model)}
    got = generate("processor", case.model, batch, case.selector, config, trace, **settings)
    assert got.tolist() == expected
    asked = [bool(step["asked_B"].any()) for step in trace.steps]
    assert trace.forwards["router"] == sum(asked) < NEW_TOKENS
    assert trace.tokens["router"] == 3 * (PROMPT + max(i for i, a in enumerate(asked) if a))


def guided(case, ids, start, logits_V, writes_with):
    """Classifier-free guidance with a scale of 1.5: the guide reads from the prompt's last token on."""
    guide_V = case.student.read(ids[start - 1 :], writes_with, 1)[1].log_softmax(-1)
    return 1.5 * (logits_V.log_softmax(-1) - guide_V) + guide_V


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_guide_that_runs_the_model_at_every_step(setup, way):
    case, inputs = make_case(setup, 1), prompts((6, 6))
    config = offer_all(trigger="router", threshold=naive_middle(case, inputs, guided), fusion=FusionWeights())
    (trace,) = check_against_naive(case, inputs, config, ways=(way,), guide=guided, guidance_scale=1.5)
    assert trace.forwards.get("router", 0) == (NEW_TOKENS if way == "processor" else 0)


def by_hand(model, inputs, processor):
    """Greedy decoding without `generate`, with a forward of the whole text at every step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].long()
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits_BV = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[
                :, -1
            ]
        ids = torch.cat([ids, processor(ids, logits_BV).argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@pytest.mark.parametrize("kind", [S2T, S2TLogitsProcessor])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_processor_that_is_called_by_hand(setup, kind, batch):
    case = make_case(setup, 1)
    config = config_of(case, "router", batch)
    expected, expected_trace = fast_tokens(case, batch, config)
    trace = S2TTrace()
    assert by_hand(case.model, batch, kind(case.selector, config=config, trace=trace)).tolist() == expected
    assert is_close(trace, expected_trace)
    assert trace.forwards["router"] == NEW_TOKENS


@pytest.mark.parametrize("as_list", [False, True], ids=["S2T", "list"])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_one_object_serves_call_after_call_with_the_users_own_forwards_between(setup, as_list, batch):
    case = make_case(setup, 1)
    config = config_of(case, "router", batch)
    trace = S2TTrace()
    one = S2T(case.selector, config=config, trace=trace)
    processors = [one[0]] if as_list else one
    for inputs, num_user_forwards in (
        (batch, 0),
        (prompts((4, 6), seed=8), 1),
        (prompts((9,), seed=9), 2),
        (batch, 0),
    ):
        for _ in range(num_user_forwards):
            case.model(**{name: tensor[:1] for name, tensor in inputs.items()})
        got = plain(case.model, inputs, logits_processor=processors)
        found = trace.forwards.get("router", 0)
        assert got.tolist() == fast_tokens(case, inputs, config)[0]
        assert found == (1 if as_list and num_user_forwards else 0)


@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_another_object_of_the_same_model_generates(setup, batch):
    """The router then reads with its own; `s2t_generate` refuses that."""
    case, other = make_case(setup, 1), Case(setup, 1)
    config = config_of(case, "router", batch)
    expected, expected_trace = fast_tokens(case, batch, config)
    trace = S2TTrace()
    # the criterion runs the router's model once a step: on something else than the text
    for settings in ({}, {"stopping_criteria": criterion(case.model)}):
        got = generate("processor", other.model, batch, case.selector, config, trace, **settings)
        assert got.tolist() == expected
        assert is_close(trace, expected_trace)
        assert trace.forwards["router"] == NEW_TOKENS
    with Count(other.model) as count, pytest.raises(ValueError, match="another model object"):
        generate("loop", other.model, batch, case.selector, config)
    assert count.calls == 0


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_the_router_reads_in_the_state_that_writes_whatever_state_its_model_was_left_in(setup, batch):
    case, other = Case(setup, 1), make_case(setup, 1)
    config = config_of(case, "router", batch)
    expected, expected_trace = fast_tokens(case, batch, config)
    switch_adapter(case.model, case.selector.adapter_name, not case.selector.writes_adapted)
    trace = S2TTrace()
    assert generate("processor", other.model, batch, case.selector, config, trace).tolist() == expected
    assert is_close(trace, expected_trace)


def test_a_router_of_another_model_that_nobody_reads_is_no_error(batch):
    case, other = make_case("teacher", 1), tiny_model(eos_token_id=None)
    for way in WAYS:
        got = generate(way, other, batch, case.selector, offer_all())
        assert got.tolist() == generate(way, case.model, batch, case.selector, offer_all()).tolist()


def test_a_router_that_is_exchanged_after_s2t_was_made(batch):
    """What the tap of the old one saw is not for the new one."""
    case = Case("teacher", 1)
    config = config_of(case, "router", batch)
    one = S2T(case.selector, config=config)
    case.selector.router = make_router(case.model, 2)
    assert plain(case.model, batch, logits_processor=one).tolist() == fast_tokens(case, batch, config)[0]


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_peft_model_generates_like_its_base_model(setup, batch):
    case = make_case(setup, 1)
    config = config_of(case, "router", batch)
    expected, _ = fast_tokens(case, batch, config)
    peft_model = lora_model(tiny_model(eos_token_id=None))
    selector = LocalSelector(
        peft_model,
        case.selector.selector_config,
        "s2t",
        router=Router(peft_model, case.router.head, case.router.config),
    )
    for way in WAYS:
        trace = S2TTrace()
        assert generate(way, peft_model, batch, selector, config, trace).tolist() == expected
        assert "router" not in trace.forwards


@pytest.mark.parametrize("setup", ["teacher", *SCOPES[:2]], ids=name_of)
def test_a_users_own_adapter_writes_the_text_that_the_router_reads(setup, batch, tmp_path):
    """Against a model into which that adapter was merged; on a prompt in parts the text is read again with it."""

    def own():
        return lora_model(tiny_model(eos_token_id=None), seed=7, name="own", reserved=(80,))

    if setup != "teacher":
        lora_model(tiny_model(eos_token_id=None), name="default").save_pretrained(tmp_path)
        SelectorConfig(RESERVED, *setup, num_candidates=K, min_prob_ratio=0.0).save_pretrained(tmp_path)

    def set_up(model):
        if setup == "teacher":
            selector = TeacherSelector(tiny_model(seed=9, eos_token_id=None))
        else:
            selector = LocalSelector.from_pretrained(tmp_path, model)
        selector.router = make_router(model, 1)
        return SimpleNamespace(model=model, selector=selector, teacher=None)

    merged, peft = set_up(own().merge_and_unload()), set_up(own())
    config = offer_all(trigger="router", threshold=middle_threshold(merged, batch))
    expected, expected_trace = fast_tokens(merged, batch, config)
    assert expected != fast_tokens(set_up(tiny_model(eos_token_id=None)), batch, config)[0]
    for way, settings in (("loop", {}), ("processor", {}), ("processor", {"prefill_chunk_size": 3})):
        trace = S2TTrace()
        assert generate(way, peft.model, batch, peft.selector, config, trace, **settings).tolist() == expected
        assert is_close(trace, expected_trace)
        assert trace.forwards.get("router", 0) == len(settings)


class Count:
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_an_ordinary_step_costs_no_forward_beyond_its_own(setup, way, batch):
    case, trace = make_case(setup, 1), S2TTrace()
    with Count(case.model) as count:
        generate(way, case.model, batch, case.selector, offer_all(trigger="router", threshold=math.inf), trace)
    assert (count.calls, count.tokens) == (NEW_TOKENS, 3 * (PROMPT + NEW_TOKENS - 1))
    assert trace.forwards == {}
    assert all(bool(step["value_B"].isfinite().all()) for step in trace.steps)


@pytest.mark.parametrize("trigger", ["router", "margin"])
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_an_asked_step_costs_what_it_costs_without_a_router(setup, trigger):
    case, inputs, trace = make_case(setup, 1), prompts((6,)), S2TTrace()
    config = config_of(case, trigger, inputs)
    with Count(case.model) as count:
        generate("loop", case.model, inputs, case.selector, config, trace)
    asked = [bool(step["asked_B"].any()) for step in trace.steps]
    assert 0 < sum(asked) < NEW_TOKENS
    if setup == "teacher":
        assert (trace.forwards, count.calls) == ({"teacher": sum(asked)}, NEW_TOKENS)
    elif setup == ("sequence", "base"):
        assert (trace.forwards, count.calls) == ({"scorer": sum(asked)}, NEW_TOKENS + sum(asked))
    else:  # the tree is the next step, but for the last
        assert (trace.forwards, count.calls) == ({"tree": sum(asked)}, NEW_TOKENS + asked[-1])


@pytest.mark.parametrize("setup", ["teacher", SCOPES[0]], ids=name_of)
def test_tokens_that_a_user_forbids_are_not_below_the_least_feature(setup, batch):
    """Six tokens are left: the log-probabilities of the seventh and eighth read -20, as those of reserved ones."""
    case = make_case(setup, 1)
    allowed = generate("loop", case.model, batch, case.selector, offer_all())[:, -6:].unique().tolist()[:6]
    forbidden = [token for token in range(97) if token not in allowed]

    def forbid(case, ids, start, logits_V, writes_with):
        logits_V[forbidden] = -math.inf
        return logits_V

    config = offer_all(trigger="router", threshold=naive_middle(case, batch, forbid), fusion=FusionWeights())
    check_against_naive(case, batch, config, guide=forbid, suppress_tokens=forbidden)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


def num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_no_hook_is_left_when_a_call_is_over(way, fails, batch):
    case = Case(SCOPES[0], "last")
    before = num_hooks(case.model)

    def stop(input_ids, scores, **kwargs):
        if fails and input_ids.shape[1] == PROMPT + 4:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    try:
        config = offer_all(trigger="router", threshold=-math.inf)
        generate(way, case.model, batch, case.selector, config, stopping_criteria=[stop])
    except KeyboardInterrupt:
        assert fails
    gc.collect()
    assert num_hooks(case.model) == before
    kept = [kept for kept in gc.get_objects() if isinstance(kept, LastHidden) and kept.num_forwards]
    assert not kept, "hidden states are kept"


def test_hooks_are_there_as_long_as_an_s2t_object_that_reads_them(batch):
    case = make_case("teacher", 1)
    config = config_of(case, "router", batch)
    expected, _ = fast_tokens(case, batch, config)
    before = num_hooks(case.model)
    S2T(case.selector, config=offer_all())
    assert num_hooks(case.model) == before, "nothing reads the router"
    objects = [S2T(case.selector, config=config) for _ in range(3)]
    assert num_hooks(case.model) == before + 3
    while objects:
        for one in objects:
            assert plain(case.model, batch, logits_processor=one).tolist() == expected
            assert fast_tokens(case, batch, config)[0] == expected
        del one
        objects.pop()
        gc.collect()
        assert num_hooks(case.model) == before + len(objects)


def test_a_failed_s2t_leaves_no_hook():
    case = make_case("teacher", 1)
    before = num_hooks(case.model)
    for settings in ({"trigger": "router"}, {"trigger": "kl", "target_rate": 0.1}):
        with pytest.raises(ValueError, match=r"s2t calibrate"):
            S2T(case.selector, config=offer_all(**settings, fusion=FusionWeights(router=1.0)))
    assert num_hooks(case.model) == before


def test_two_objects_with_routers_of_different_layers(batch):
    """And steps of one between steps of the other."""
    case = make_case("teacher", 1)
    other = TeacherSelector(case.selector.teacher_model, router=make_router(case.model, 2, seed=8))
    selectors = case.selector, other
    cases = [SimpleNamespace(model=case.model, selector=selector) for selector in selectors]
    configs = [offer_all(trigger="router", threshold=middle_threshold(case, batch)) for case in cases]
    expected = [fast_tokens(*both, config)[0] for both, config in zip(((case, batch) for case in cases), configs)]
    objects = [S2T(selector, config=config) for selector, config in zip(selectors, configs)]
    for i in (0, 1, 0):
        assert plain(case.model, batch, logits_processor=objects[i]).tolist() == expected[i]

    def decode_the_other(input_ids, scores, **kwargs):
        assert plain(case.model, batch, logits_processor=objects[1]).tolist() == expected[1]
        return torch.zeros(len(input_ids), dtype=torch.bool)

    got = plain(case.model, batch, logits_processor=objects[0], stopping_criteria=[decode_the_other])
    assert got.tolist() == expected[0]


def test_generate_without_s2t_is_what_it_was(batch):
    case = make_case(SCOPES[0], 1)
    expected = plain(tiny_model(), batch).tolist()
    one = S2T(case.selector, config=offer_all(trigger="router", threshold=0.0))
    assert plain(case.model, batch).tolist() == expected
    generate("loop", case.model, batch, case.selector, offer_all(trigger="router", threshold=0.0))
    assert plain(case.model, batch).tolist() == expected
    del one
    assert plain(case.model, batch).tolist() == expected


def pickled(things):
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_the_model_is_nobodys_to_watch(copied, batch):
    """And one of the model with its router goes on reading."""
    case = Case("teacher", 1)
    config = config_of(case, "router", batch)
    expected, _ = fast_tokens(case, batch, config)
    one = S2T(case.selector, config=config)
    case.model(**batch)  # now there is something to keep
    model, router = copied((case.model, case.router))
    assert router.model is model
    before = [kept for kept in gc.get_objects() if isinstance(kept, LastHidden) and kept.num_forwards]
    assert len(before) == 1
    model(**batch)
    kept = [kept for kept in gc.get_objects() if isinstance(kept, LastHidden) and kept.num_forwards]
    assert kept == before and kept[0].num_forwards == 1, "a tap behind a hook of the copy keeps what it saw"
    assert plain(model, batch).tolist() == plain(tiny_model(), batch).tolist()
    selector = TeacherSelector(case.selector.teacher_model, router=router)
    for way in WAYS:
        trace = S2TTrace()
        assert generate(way, model, batch, selector, config, trace).tolist() == expected
        assert "router" not in trace.forwards
    assert plain(case.model, batch, logits_processor=one).tolist() == expected


def test_a_watched_model_saves_as_it_is(batch, tmp_path):
    case = make_case("teacher", 1)
    one = S2T(case.selector, config=offer_all(trigger="router", threshold=0.0))
    plain(case.model, batch, logits_processor=one)
    case.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(tiny_model().state_dict())
    assert plain(loaded, batch).tolist() == plain(tiny_model(), batch).tolist()


def test_texts_that_are_written_in_two_threads_at_once(batch):
    """A server gives every request a thread. Here the second starts its call and runs the model between the first
    one's forward and its step."""
    case = make_case("teacher", 1)
    config = config_of(case, "router", batch)
    inputs = batch, prompts((7, 5, 6), seed=11)
    expected = [fast_tokens(case, each, config) for each in inputs]
    got, traces, order = [None, None], [S2TTrace(), S2TTrace()], [Event(), Event(), Event()]

    class Between(LogitsProcessor):
        """Says that it has come as far as this and waits for the other."""

        def __init__(self, i):
            self.i = i

        def __call__(self, input_ids, scores):
            order[self.i].set()
            assert order[self.i + 1].wait(30)
            return scores

    def write(i):
        try:
            assert i == 0 or order[0].wait(30)
            processors = [Between(i), *S2T(case.selector, config=config, trace=traces[i])]
            got[i] = plain(case.model, inputs[i], logits_processor=processors).tolist()
        finally:
            order[2].set()

    threads = [Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert got[i] == expected[i][0]
        assert is_close(traces[i], expected[i][1])


@pytest.mark.parametrize("setup", ["teacher", SCOPES[0], SCOPES[2]], ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_bfloat16_is_read_as_it_is(way, setup, batch):
    """Its own hidden states go into the head, which is float32 whatever the model is."""
    case = Case(setup, 1)
    case.model.to(torch.bfloat16)
    trace = S2TTrace()
    generate(way, case.model, batch, case.selector, offer_all(trigger="router", threshold=0.0), trace)
    with torch.no_grad():
        output = plain(
            case.model,
            batch,
            max_new_tokens=1,
            output_hidden_states=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits_BV = exclude(output.logits[0], case.selector.excluded_ids)
    expected_B = case.router.logits(output.hidden_states[0][1][:, -1], logits_BV)
    assert expected_B.dtype == trace.steps[0]["value_B"].dtype == torch.float32
    torch.testing.assert_close(trace.steps[0]["value_B"], expected_B)
    assert {parameter.dtype for parameter in case.router.head.parameters()} == {torch.float32}
    assert len(trace.steps) == NEW_TOKENS and "router" not in trace.forwards


# ---------------------------------------------------------------------------------------------------------------------
# Refused before the first token


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"trigger": "router", "threshold": 0.0}, "trigger='router'"),
        ({"fusion": FusionWeights(router=0.5)}, "`fusion.router`=0.5"),
    ],
    ids=["trigger", "fusion"],
)
def test_a_router_that_is_not_there_is_refused(settings, what, setup, way, batch):
    case = make_case(setup, 1)
    selector = copy.copy(case.selector)
    selector.router = None
    with (
        Count(case.model) as count,
        pytest.raises(ValueError, match=re.escape(what) + r" needs a router.*s2t route"),
    ):
        generate(way, case.model, batch, selector, offer_all(**settings))
    assert count.calls == 0


@pytest.mark.parametrize("way", WAYS)
def test_stored_fusion_weights_need_their_router(way, batch):
    model = tiny_model()
    selector = make_selector(model, fusion=(1, 0, 0, 0.5))
    with Count(model) as count, pytest.raises(ValueError, match="`fusion.router`=0.5 needs a router"):
        generate(way, model, batch, selector, None)
    assert count.calls == 0
    generate(way, model, batch, selector, offer_all(fusion=(1, 0, 0)))


@pytest.mark.parametrize("way", WAYS)
def test_a_router_without_a_threshold_is_refused_and_a_calibrated_one_is_found(way, batch):
    case = make_case("teacher", 1)
    with Count(case.model) as count, pytest.raises(ValueError, match=r"s2t calibrate"):
        generate(way, case.model, batch, case.selector, offer_all(trigger="router", target_rate=0.1))
    assert count.calls == 0
    threshold = middle_threshold(case, batch)
    selector = TeacherSelector(case.selector.teacher_model, {"router": {0.1: threshold}}, router=case.router)
    got = generate(way, case.model, batch, selector, offer_all(trigger="router", target_rate=0.1))
    assert got.tolist() == fast_tokens(case, batch, offer_all(trigger="router", threshold=threshold))[0]


# ---------------------------------------------------------------------------------------------------------------------
# Storage


def save_adapter(folder, setup=SCOPES[0], **selector_config):
    """An adapter, its router and its config as the recipes leave them; returns the router."""
    model = tiny_model(eos_token_id=None)
    fingerprint = model_hash(model)
    router = make_router(model, 1, model_hash=fingerprint, metrics={"auc_gain": 0.75})
    lora_model(model, name="default").save_pretrained(folder)
    settings = {"num_candidates": K, "min_prob_ratio": 0.0, "router": router.save_pretrained(folder)}
    SelectorConfig(RESERVED, *setup, **(settings | {"model_hash": fingerprint} | selector_config)).save_pretrained(
        folder
    )
    return router


def test_a_router_comes_back_as_it_was(tmp_path):
    model = tiny_model()
    router = make_router(model, 2, num_top=5, target="differs", min_gain=0.25, metrics={"auc": 0.7, "nan": math.nan})
    fingerprint = router.save_pretrained(tmp_path / "a")
    loaded = Router.from_pretrained(tmp_path / "a", model, expected=fingerprint)
    assert repr(loaded.config) == repr(router.config)
    assert not loaded.head.training and not any(p.requires_grad for p in loaded.head.parameters())
    for name, tensor in router.head.state_dict().items():
        assert torch.equal(loaded.head.state_dict()[name], tensor), name
    hidden_BD, logits_BV = torch.randn(3, 32), torch.randn(3, 97)
    assert torch.equal(loaded.logits(hidden_BD, logits_BV), router.logits(hidden_BD, logits_BV))
    assert loaded.save_pretrained(tmp_path / "b") == router.save_pretrained(tmp_path / "a") == fingerprint
    assert [file.name for file in (tmp_path / "b").iterdir()] == [ROUTER_WEIGHTS_NAME]
    with torch.no_grad():
        loaded.head.out.bias += 1e-3
    assert loaded.save_pretrained(tmp_path / "b") != fingerprint


def write_file(folder, state=None, config=None, metadata=None):
    """A router's file with some things in it exchanged."""
    router = make_router(tiny_model(), 1)
    state = state or router.head.state_dict()
    data = asdict(router.config) | (config or {})
    save_file(
        state, folder / ROUTER_WEIGHTS_NAME, metadata={"router": json.dumps(data)} if metadata is None else metadata
    )


def change_byte(folder):
    file = folder / ROUTER_WEIGHTS_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_off(folder):
    file = folder / ROUTER_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-7])


def without_hidden_size(folder):
    data = asdict(make_router(tiny_model(), 1).config)
    del data["hidden_size"]
    write_file(folder, metadata={"router": json.dumps(data)})


BROKEN = {
    "missing": (lambda folder: (folder / ROUTER_WEIGHTS_NAME).unlink(), FileNotFoundError, "s2t route"),
    "cut-off": (cut_off, ValueError, "is no router"),
    "empty": (lambda folder: (folder / ROUTER_WEIGHTS_NAME).write_bytes(b""), ValueError, "is no router"),
    "no-config": (lambda folder: write_file(folder, metadata={}), ValueError, "is no router"),
    "no-json": (lambda folder: write_file(folder, metadata={"router": "{"}), ValueError, "is no router"),
    "no-hidden-size": (without_hidden_size, ValueError, "is no router.*hidden_size"),
    "unknown-field": (lambda folder: write_file(folder, config={"depth": 3}), ValueError, "unknown fields.*depth"),
    "illegal-field": (
        lambda folder: write_file(folder, config={"target": "x"}),
        ValueError,
        "`target` must be one of",
    ),
    "other-width": (lambda folder: write_file(folder, config={"width": 8}), ValueError, "is no router"),
    "weights-missing": (
        lambda folder: write_file(folder, state={"mean": torch.zeros(42)}),
        ValueError,
        "is no router",
    ),
    "other-size": (lambda folder: write_other(folder, 64, 1), ValueError, "hidden_size=64"),
    "too-deep": (lambda folder: write_other(folder, 32, 3), ValueError, "3 or more layers"),
}


def write_other(folder, hidden_size, layer):
    config = RouterConfig(hidden_size, layer, width=16)
    write_file(folder, state=RouterHead(config).state_dict(), config={"hidden_size": hidden_size, "layer": layer})


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_router_is_an_error_that_touches_nothing(how, tmp_path):
    """Whether it is loaded by itself or beside an adapter that names this very file."""
    destroy, kind, message = BROKEN[how]
    save_adapter(tmp_path)
    destroy(tmp_path)
    model = tiny_model(eos_token_id=None)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(kind, match=message):
        Router.from_pretrained(tmp_path, model)
    file = tmp_path / ROUTER_WEIGHTS_NAME
    fingerprint = sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "0123456789abcdef"
    stored = SelectorConfig.from_pretrained(tmp_path)
    replace(stored, router=fingerprint).save_pretrained(tmp_path)
    with pytest.raises(kind, match=message):
        LocalSelector.from_pretrained(tmp_path, model)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert num_hooks(model) == 0 and not hasattr(model, "peft_config")


def test_a_file_that_was_changed_is_not_the_one_that_was_calibrated_with(tmp_path):
    save_adapter(tmp_path)
    change_byte(tmp_path)
    model = tiny_model(eos_token_id=None)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="not the router that the adapter was calibrated with"):
        LocalSelector.from_pretrained(tmp_path, model)
    assert [name for name, _ in model.named_modules()] == names
    Router.from_pretrained(tmp_path, model)  # by itself there is nothing to compare it with


@pytest.mark.parametrize("folder", ["nothing", "no/such-repository"])
def test_a_folder_that_is_not_there_holds_no_router(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, OSError), match=folder):
        Router.from_pretrained(folder, tiny_model())


def test_a_router_of_other_weights_is_refused_unless_it_is_wanted(tmp_path):
    router = save_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"was trained on weights {weights_name(router.config.model_hash)}"):
        Router.from_pretrained(tmp_path, tiny_model(seed=3))
    Router.from_pretrained(tmp_path, tiny_model(seed=3), allow_other_model=True)
    Router.from_pretrained(tmp_path, lora_model(tiny_model()))  # adapters are not what it was trained on
    for model, message in (
        (tiny_model(hidden_size=48, head_dim=12), "hidden_size=32.*`model` has hidden_size=48 and 2"),
        (tiny_model(num_hidden_layers=1), None),
    ):
        if message is None:
            Router.from_pretrained(tmp_path, model, allow_other_model=True)
            continue
        with pytest.raises(ValueError, match=message):
            Router.from_pretrained(tmp_path, model, allow_other_model=True)


@pytest.mark.parametrize("layer", [0, 3, 1.5, True])
def test_a_layer_that_the_model_does_not_have_cannot_be_tapped(layer):
    with pytest.raises(ValueError, match=r"`layer` must be an integer in \[1, 2\]"):
        read_module(tiny_model(), layer)


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_a_selector_brings_its_router_where_its_config_names_it(setup, batch, tmp_path):
    case = make_case(setup, 1)
    config = config_of(case, "router", batch)
    expected, _ = fast_tokens(case, batch, config)
    save_adapter(tmp_path, setup)
    selector = LocalSelector.from_pretrained(tmp_path, tiny_model(eos_token_id=None))
    assert selector.router.model is selector.model
    for way in WAYS:
        trace = S2TTrace()
        assert generate(way, selector.model, batch, selector, config, trace).tolist() == expected
        assert "router" not in trace.forwards


def test_a_router_that_the_config_does_not_name_is_not_loaded(tmp_path):
    save_adapter(tmp_path, router="")
    assert (tmp_path / ROUTER_WEIGHTS_NAME).is_file()
    assert LocalSelector.from_pretrained(tmp_path, tiny_model()).router is None


def test_a_model_that_was_loaded_with_its_adapter_gets_the_router_too(batch, tmp_path):
    tiny_model(eos_token_id=None).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter")
    config_file = tmp_path / "adapter" / "adapter_config.json"
    adapter_config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(adapter_config | {"base_model_name_or_path": str(tmp_path / "base")}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    selector = LocalSelector.from_pretrained(tmp_path / "adapter", model)
    case = make_case(SCOPES[0], 1)
    config = config_of(case, "router", batch)
    for way in WAYS:
        got = generate(way, model, batch, selector, config)
        assert got.tolist() == fast_tokens(case, batch, config)[0]


def test_a_merged_selector_reads_the_router_as_before(batch):
    case = Case(SCOPES[2], 1)
    config = config_of(case, "router", batch)
    expected, _ = fast_tokens(case, batch, config)
    case.selector.merge()
    for way, settings in (("loop", {}), ("processor", {}), ("processor", {"prefill_chunk_size": 3})):
        assert generate(way, case.model, batch, case.selector, config, **settings).tolist() == expected
