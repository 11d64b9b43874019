"""The router in decoding: what it reads, on both roads, against a naive decoder without caches and hooks; its storage.

Roads: "processor" is `logits_processor=S2T(...)`, "fast" is `custom_generate=s2t_generate`. Heads are random, with
their thresholds in the middle of their own values: a router that read the wrong state would fire at other steps.

Legend: B rows, K candidates, D hidden size, F features, V vocabulary, X inputs of the head.
"""

import math
from functools import lru_cache

import pytest
import torch
from test_architectures import make_local
from tiny import RESERVED, SCOPES, make_selector, single, tiny_model
from tiny_architectures import FAMILIES, NaiveCausalLM, make_model

from transformers_s2t import S2T, FusionWeights, S2TDecodingConfig, S2TTrace, TeacherSelector, s2t_generate
from transformers_s2t.router import Router, RouterConfig, RouterHead, num_layers


ROADS = ("processor", "fast")
SETUPS = ("teacher", *SCOPES)
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
    """Entropy over the renormalised top 64, margin, and the best log-probabilities, not below -20; in float64."""
    ranked = sorted(logits_V.double().tolist(), reverse=True)
    total = sum(math.exp(x) for x in ranked)
    top = [math.exp(x) / sum(math.exp(y) for y in ranked[:64]) for x in ranked[:64]]
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
    attn = FAMILIES[family].impls[0]
    make = lambda seed=0: make_model(family, attn, seed)  # noqa: E731
    return Case(setup, layer, family, make, lambda model, *scope: make_local(model, family, *scope))


def plain(model, inputs, **kwargs):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(**inputs, **settings)


def generate(road, model, inputs, selector, config, trace=None, **kwargs):
    if road == "processor":
        return plain(model, inputs, logits_processor=S2T(selector, config=config, trace=trace), **kwargs)
    settings = {"selector": selector, "decoding_config": config, "trace": trace} | kwargs
    return plain(model, inputs, custom_generate=s2t_generate, **settings)


def middle_threshold(case, inputs, trigger="router", **config):
    """A threshold that about half of the values reach, in their widest gap near the middle."""
    trace = S2TTrace()
    generate("fast", case.model, inputs, case.selector, offer_all(trigger=trigger, threshold=-math.inf), trace)
    values = torch.cat([step["value_B"] for step in trace.steps]).sort().values
    middle = len(values) // 2
    near = values[middle - 3 : middle + 3]
    at = int(near.diff().argmax())
    return float(near[at] + near[at + 1]) / 2


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


def check_against_naive(case, inputs, config, roads=ROADS, guide=None, **kwargs):
    """Both roads give the naive decoder's tokens, trigger values and number of flips; returns the traces."""
    expected, values, flips, moved = zip(*(case.decode(ids, config, config.fusion, guide) for ids in rows_of(inputs)))
    traces = []
    for road in roads:
        traces.append(S2TTrace())
        got = generate(road, case.model, inputs, case.selector, config, traces[-1], **kwargs)
        assert got[:, inputs["input_ids"].shape[1] :].tolist() == list(expected), road
        found = torch.stack([step["value_B"] for step in traces[-1].steps], dim=1)
        torch.testing.assert_close(found, torch.tensor(values), atol=2e-3, rtol=1e-3)
        assert sum(step["flipped"] for row in traces[-1].rows() for step in row) == sum(flips) > 0
    assert bool(sum(moved)) == bool(config.fusion.router), "the router's term decides nothing"
    if config.trigger != "always":
        triggered = [step["triggered"] for row in traces[0].rows() for step in row[config.warmup_tokens :]]
        assert 0 < sum(triggered) < len(triggered)
    return traces


# ---------------------------------------------------------------------------------------------------------------------
# Both roads equal a naive decoder


@pytest.mark.parametrize("layer", [1, "last"])
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_both_roads_equal_a_naive_decoder_without_caches_and_hooks(setup, trigger, layer, batch):
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


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
def test_a_left_padded_batch_equals_its_rows_alone(setup, road, batch):
    case = make_case(setup, 1)
    config = config_of(case, "router", batch)
    together = generate(road, case.model, batch, case.selector, config)[:, PROMPT:].tolist()
    alone = [generate(road, case.model, single(batch, row), case.selector, config)[0] for row in range(3)]
    assert together == [row[-NEW_TOKENS:].tolist() for row in alone]


ARCHITECTURES = [(family, "last") for family in FAMILIES if family != "llama"] + [
    (family, 1) for family in ("gpt2", "mistral", "gemma2", "lfm2", "mamba2", "opt", "bloom")
]


@pytest.mark.parametrize(("family", "layer"), ARCHITECTURES)
def test_every_architecture_equals_its_naive_decoder(family, layer, batch):
    case = make_case(("sequence", "adapted") if layer == "last" else ("candidate", "base"), layer, family)
    traces = check_against_naive(case, batch, config_of(case, "router", batch))
    assert not any("router" in trace.forwards for trace in traces)
