"""recipes/controls.py: what each control chooses; the zero-shot scorer against whole texts without a cache."""

import math
from collections import Counter

import pytest
import torch
from datasets import Dataset
from tiny import WAYS, prompts, single, tiny_model
from tiny_architectures import NaiveCausalLM, make_model

from s2t_recipes.evaluation import controls
from transformers_s2t import S2T, S2TDecodingConfig, S2TTrace, s2t_generate
from transformers_s2t.model_checks import check_reads_in_parts


NEW_TOKENS = 12


def generate(model, inputs, selector, way="loop", **config):
    """The new tokens (B, S) and the trace."""
    trace, config = S2TTrace(), S2TDecodingConfig(**config)
    if way == "processor":
        how = {"logits_processor": S2T(selector, config=config, trace=trace)}
    else:
        how = {"custom_generate": s2t_generate, "selector": selector, "decoding_config": config, "trace": trace}
    ids_BT = model.generate(**inputs, **how, max_new_tokens=NEW_TOKENS, do_sample=False)
    return ids_BT[:, inputs["input_ids"].shape[1] :], trace


def asked_steps(model, inputs, selector, **config):
    _, trace = generate(model, inputs, selector, **config)
    return [step for row in trace.rows() for step in row if step["asked"]]


def test_second_candidate_control_takes_the_second(batch):
    steps = asked_steps(tiny_model(), batch, controls.SecondCandidateSelector(), min_prob_ratio=0.01)
    assert steps
    assert all(step["token"] == step["candidate_ids"][1] for step in steps)


def test_random_candidate_control_stays_above_the_floor(batch):
    model = tiny_model()

    def run(seed):
        return asked_steps(model, batch, controls.RandomCandidateSelector(seed), min_prob_ratio=0.05)

    steps = run(0)
    places = [step["candidate_ids"].index(step["token"]) for step in steps]  # only candidates above the floor
    assert len(set(places)) > 1
    assert [step["token"] for step in steps] == [step["token"] for step in run(0)]
    assert [step["token"] for step in steps] != [step["token"] for step in run(1)]


def test_token_prior_takes_what_the_teacher_chose_most_often(batch):
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(0, 97, (15, 20), generator=generator)
    prior = controls.token_prior(Dataset.from_dict({"teacher_top_id": choices.tolist()}))
    assert prior == Counter(choices.flatten().tolist())
    model, ties = tiny_model(), 0
    steps = asked_steps(model, batch, controls.PriorSelector(prior), min_prob_ratio=0.01)
    for step in steps:
        counts = [prior[id] for id in step["candidate_ids"]]
        assert step["scores"] == counts
        assert step["token"] == step["candidate_ids"][counts.index(max(counts))]  # the student's first among equals
        ties += counts.count(max(counts)) > 1
    assert ties and any(step["flipped"] for step in steps)
    tokens, _ = generate(model, batch, controls.PriorSelector(Counter()), min_prob_ratio=0.0)
    greedy = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert tokens.tolist() == greedy.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot


def naive_zero_shot(model, ids, token_id, config):
    """New tokens of one text and the scores wherever there was a choice: one run of every candidate's whole text."""
    run, ids, start, scored = NaiveCausalLM(model), list(ids), len(ids), []
    while len(ids) < start + NEW_TOKENS:
        best = run([ids])[1][0].log_softmax(-1).topk(config.num_candidates)
        least = best.values[0] + math.log(config.min_prob_ratio)
        offered = best.indices[best.values >= least].tolist()
        token = offered[0]
        if len(ids) - start >= config.warmup_tokens and len(offered) > 1:
            logprobs_KV = run([[*ids, candidate] for candidate in offered])[1].log_softmax(-1)
            if token_id is None:
                scores_K = (logprobs_KV.exp() * logprobs_KV).sum(-1)
            else:
                scores_K = -logprobs_KV[:, token_id]
            token = offered[int(scores_K.argmax())]
            scored.append(scores_K.tolist())
        ids.append(token)
    return ids[start:], scored


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("token_id", [None, 7], ids=["certain", "unlikely"])
@pytest.mark.parametrize(
    ("family", "attn", "floor"),
    # a tree; logits with a soft-cap, which leaves them close to each other; repeated rows
    [("llama", "sdpa", 0.2), ("gemma2", "eager", 0.8), ("gpt_neo", "eager", 0.2)],
)
def test_zero_shot_equals_whole_texts_without_a_cache(family, attn, floor, token_id, way, monkeypatch):
    monkeypatch.setattr(controls, "HEAD_BATCH", 2)
    model, inputs = make_model(family, attn), prompts()
    assert not inputs["attention_mask"].all()  # padded on the left
    selector = controls.ZeroShotSelector(model, token_id)
    config = {"num_candidates": 5, "min_prob_ratio": floor}
    tokens_BS, trace = generate(model, inputs, selector, way, **config)
    numbers_asked = {int(step["asked_B"].sum()) for step in trace.steps}
    assert len(numbers_asked - {0}) > 1  # of three rows: some steps leave rows out
    flips = 0
    for row, steps in enumerate(trace.rows()):
        ids = single(inputs, row)["input_ids"][0].tolist()
        expected, scored = naive_zero_shot(model, ids, token_id, selector.resolve_config(S2TDecodingConfig(**config)))
        assert tokens_BS[row].tolist() == expected
        got = [step["scores"] for step in steps if step["asked"]]
        assert [len(scores) for scores in got] == [len(scores) for scores in scored]
        assert sum(got, []) == pytest.approx(sum(scored, []), abs=1e-4)
        flips += sum(step["flipped"] for step in steps)
    assert flips >= 3


@pytest.mark.parametrize("way", WAYS)
def test_every_token_of_zero_shot_is_counted(way, batch):
    model, ran = tiny_model(eos_token_id=None), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    check_reads_in_parts("model", model)  # which runs it, once for a model
    ran.clear()
    _, trace = generate(model, batch, controls.ZeroShotSelector(model), way, min_prob_ratio=0.05)
    plain = batch["input_ids"].numel() + len(batch["input_ids"]) * (NEW_TOKENS - 1)
    assert trace.tokens.keys() == {"scorer"}
    assert sum(ran) == plain + trace.tokens["scorer"]
    asked = sum(bool(step["asked_B"].any()) for step in trace.steps)
    assert 0 < asked == trace.forwards["scorer"] if way == "loop" else asked < trace.forwards["scorer"]


def test_zero_shot_refuses_to_score_with_another_model(batch):
    with pytest.raises(ValueError, match="another model object"):
        generate(tiny_model(), batch, controls.ZeroShotSelector(tiny_model(seed=1)))
