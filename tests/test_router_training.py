"""How a router learns: labels against loops by hand, states against the library's own, figures by their definitions.

Legend: N positions, S those of one trajectory, D hidden size, F proposal features, K candidates, V vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from test_router import num_hooks
from tiny import RESERVED, make_selector, prompts, single, tiny_model

from transformers_s2t import S2TDecodingConfig, S2TTrace, TeacherSelector, s2t_generate
from transformers_s2t.calibration import router_training as training
from transformers_s2t.calibration.router_training import (
    RouterData,
    auc,
    average_precision,
    collect,
    cross_fitted_logits,
    default_layers,
    fit_head,
    fit_router,
    gains,
    precision_recall,
    predict,
    read_trajectories,
    trigger_metrics,
)
from transformers_s2t.proposals import exclude
from transformers_s2t.router import Router, RouterConfig, RouterHead, proposal_features


CONFIG = RouterConfig(hidden_size=6, layer=1, num_top=2, width=16)
QUICK = {"batch_size": 32, "learning_rate": 1e-2}


def make_rows(num_rows=7, seed=0, asked=0.6, num_candidates=4):
    """Trajectories of random lengths whose margins belong to their candidates. Some points were not asked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for i in range(num_rows):
        prompt_length, num_generated = draw(2, 6), draw(4, 12)
        logprobs_SK = torch.randn(num_generated, num_candidates, generator=generator) * 2
        logprobs_SK = logprobs_SK.sort(descending=True).values.log_softmax(-1)
        teacher_SK = (torch.randn(num_generated, num_candidates, generator=generator) * 2).log_softmax(-1)
        chosen = (torch.rand(num_generated, generator=generator) < asked).nonzero()[:, 0].tolist()
        rows.append(
            {
                "problem_id": f"p{i // 2}",
                "input_ids": [draw(3, RESERVED[0]) for _ in range(prompt_length + num_generated)],
                "prompt_length": prompt_length,
                "divergence": torch.rand(num_generated, generator=generator).tolist(),
                "margin": (logprobs_SK[:, 1] - logprobs_SK[:, 0]).tolist(),
                "positions": [prompt_length + s for s in chosen],
                "student_logprobs": logprobs_SK[chosen].tolist(),
                "teacher_logprobs": teacher_SK[chosen].tolist(),
            }
        )
    return rows


def make_data(num_positions=400, num_problems=20, seed=0, hidden_size=6, rule=None, layers=(1,)):
    """Positions whose gain is 1 where `rule(hidden_ND, features_NF)` says so, and 0 elsewhere; at random without."""
    generator = torch.Generator().manual_seed(seed)
    hidden = {layer: torch.randn(num_positions, hidden_size, generator=generator) * 3 + 1 for layer in layers}
    features_NF = torch.randn(num_positions, 4, generator=generator)
    chance_N = torch.rand(num_positions, generator=generator) < 0.5
    gain_N = (chance_N if rule is None else rule(hidden[layers[-1]], features_NF)).float()
    return RouterData(
        hidden,
        features_NF,
        gain_N,
        torch.rand(num_positions, generator=generator),
        torch.rand(num_positions, generator=generator) < 0.7,
        torch.arange(num_positions) % num_problems,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def naive_gains(row, min_prob_ratio):
    points = {
        position - row["prompt_length"]: (student, teacher)
        for position, student, teacher in zip(row["positions"], row["student_logprobs"], row["teacher_logprobs"])
    }
    out = []
    for s, margin in enumerate(row["margin"]):
        if s in points:
            student, teacher = points[s]
            offered = [k for k, value in enumerate(student) if math.exp(value - student[0]) >= min_prob_ratio]
            out.append(max(teacher[k] for k in offered) - teacher[0])
        else:
            out.append(math.nan if math.exp(margin) >= min_prob_ratio else 0.0)
    return out


@pytest.mark.parametrize("asked", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("min_prob_ratio", [0.0, 0.05, 0.4, 1.0])
def test_gains_equal_a_loop_by_hand(min_prob_ratio, asked):
    """Labels with points="kl" or `max_points` leave points with a choice unasked: their gains are unknown."""
    found, expected = [], []
    for row in make_rows(20, asked=asked):
        found += gains(row, min_prob_ratio).tolist()
        expected += naive_gains(row, min_prob_ratio)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), equal_nan=True)
    unknown, positive = sum(map(math.isnan, found)), sum(gain > 0 for gain in found)
    assert bool(unknown) == (asked < 1 and min_prob_ratio < 1)
    assert bool(positive) == (asked > 0 and min_prob_ratio < 1)


def test_candidates_below_the_floor_gain_nothing():
    row = {"prompt_length": 2, "margin": [-1.0, -5.0, -0.1], "positions": [2, 3]}
    row |= {"student_logprobs": [[-0.5, -1.5, -4.5], [-0.1, -5.1, -6.0]]}
    row |= {"teacher_logprobs": [[-3.0, -1.0, -0.1], [-9.0, -0.1, -0.2]]}
    assert gains(row, 0.05).tolist() == [2.0, 0.0, pytest.approx(math.nan, nan_ok=True)]
    torch.testing.assert_close(gains(row, 0.001)[:2], torch.tensor([2.9, 8.9]))


def test_a_candidate_right_at_the_floor_is_a_choice():
    row = {"prompt_length": 2, "margin": [0.0, -1e-3], "positions": []}
    assert gains(row, 1.0).isnan().tolist() == [True, False]


def test_the_three_targets_by_hand():
    data = make_data(5)._replace(
        gain_N=torch.tensor([0.0, 0.3, 0.5, 0.6, math.nan]), divergence_N=torch.tensor([0.0, 0.09, 0.99, 1.0, 2.0])
    )
    nan = pytest.approx(math.nan, nan_ok=True)
    assert data.target(replace(CONFIG, target="gain", min_gain=0.5)).tolist() == [0, 0, 0, 1, nan]
    assert data.target(replace(CONFIG, target="differs")).tolist() == [0, 1, 1, 1, nan]
    expected = torch.tensor([0.01, 0.1, 1.0, 1.01, 2.01]).log()
    torch.testing.assert_close(data.target(replace(CONFIG, target="kl")), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def naive_collect(model, rows, layers, warmup_tokens, excluded_ids, num_top=8):
    """Row by row without padding: states of every layer, features, and the place in the labels."""
    hidden, features, places = {layer: [] for layer in layers}, [], []
    for i, row in enumerate(rows):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True, use_cache=False)
        for position in range(row["prompt_length"] + warmup_tokens, len(row["input_ids"])):
            for layer in layers:
                hidden[layer].append(output.hidden_states[layer][0, position - 1])
            logits_V = exclude(output.logits[0, position - 1], torch.tensor(excluded_ids, dtype=torch.long))
            features.append(proposal_features(logits_V[None], num_top)[0])
            places.append((i, position - row["prompt_length"]))
    return {layer: torch.stack(states) for layer, states in hidden.items()}, torch.stack(features), places


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize(("family", "excluded_ids"), [("llama", RESERVED), ("gpt2", ()), ("opt", RESERVED)])
def test_collect_reads_what_the_library_calls_hidden_states(family, excluded_ids, batch_size):
    model, rows = tiny_model(family, dropout=0.0, ffn_dim=48) if family == "opt" else tiny_model(family), make_rows()
    layers, hooks = range(1, model.config.num_hidden_layers + 1), num_hooks(model)
    settings = {"warmup_tokens": 2, "excluded_ids": excluded_ids, "batch_size": batch_size, "num_top": 5}
    data = collect(model, Dataset.from_list(rows), layers, min_prob_ratio=0.2, **settings)
    assert num_hooks(model) == hooks
    hidden, features, places = naive_collect(model, rows, layers, 2, excluded_ids, num_top=5)
    assert set(data.hidden) == set(layers)
    for layer in layers:
        torch.testing.assert_close(data.hidden[layer], hidden[layer], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(data.features_NF, features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(data.divergence_N, torch.tensor([rows[i]["divergence"][s] for i, s in places]))
    expected = torch.tensor([naive_gains(rows[i], 0.2)[s] for i, s in places])
    torch.testing.assert_close(data.gain_N, expected, equal_nan=True)
    assert data.has_choice_N.tolist() == [math.exp(rows[i]["margin"][s]) >= 0.2 for i, s in places]
    assert data.problem_N.tolist() == [int(rows[i]["problem_id"][1:]) for i, _ in places]


def test_rows_whose_logits_do_not_fit_are_read_in_parts(monkeypatch):
    model, labels = tiny_model(), Dataset.from_list(make_rows())
    expected = collect(model, labels, [1], batch_size=7)
    sizes = []
    logits_from = training.logits_from
    monkeypatch.setattr(
        training, "logits_from", lambda m, ids, first: sizes.append(len(ids)) or logits_from(m, ids, first)
    )
    monkeypatch.setattr(training, "_MAX_LOGITS", 2 * 14 * 97)
    found = collect(model, labels, [1], batch_size=7)
    assert sum(sizes) == 7 and 1 < len(sizes)
    torch.testing.assert_close(found.hidden[1], expected.hidden[1], atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(training, "_MAX_LOGITS", 1)
    sizes.clear()
    collect(model, labels, [1], batch_size=7)
    assert sizes == [1] * 7


def test_no_hook_is_left_when_reading_ends_early():
    model, labels = tiny_model(), Dataset.from_list(make_rows())
    reading = read_trajectories(model, labels, [1, 2], 8, batch_size=2)
    next(reading)
    assert num_hooks(model) == 0
    reading.close()
    model.lm_head.forward = lambda hidden: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(read_trajectories(model, labels, [1, 2], 8))
    assert num_hooks(model) == 0


@pytest.mark.parametrize("warmup_tokens", [0, 3, 10])
def test_the_first_tokens_are_left_out(warmup_tokens):
    rows = make_rows()
    data = collect(tiny_model(), Dataset.from_list(rows), [1], warmup_tokens=warmup_tokens)
    assert len(data.gain_N) == sum(max(0, len(row["margin"]) - warmup_tokens) for row in rows)
    with pytest.raises(ValueError, match="no generated position behind the first 12"):
        collect(tiny_model(), Dataset.from_list(rows), [1], warmup_tokens=12)


def test_a_random_share_of_the_positions_is_kept():
    model, labels = tiny_model(), Dataset.from_list(make_rows(40))
    whole = collect(model, labels, [1], warmup_tokens=1)
    total = len(whole.gain_N)
    assert len(collect(model, labels, [1], warmup_tokens=1, max_positions=total).gain_N) == total
    parts = [
        collect(model, labels, [1], warmup_tokens=1, max_positions=80, seed=seed, batch_size=batch_size)
        for seed, batch_size in ((0, 32), (0, 5), (1, 32))
    ]
    for part in parts:
        assert 50 < len(part.gain_N) < 110
        # every column keeps the same positions, in the order of the labels
        at_N = torch.cdist(part.hidden[1], whole.hidden[1]).argmin(-1)
        assert at_N.tolist() == sorted(set(at_N.tolist()))
        for kept, all_of_them in zip(part[1:], whole[1:]):
            torch.testing.assert_close(kept, all_of_them[at_N], atol=1e-4, rtol=1e-4, equal_nan=True)
    assert torch.equal(parts[0].divergence_N, parts[1].divergence_N)
    assert not torch.equal(parts[0].divergence_N[:50], parts[2].divergence_N[:50])


@pytest.mark.parametrize("setup", ["teacher", ("candidate", "base"), ("sequence", "adapted")], ids=str)
def test_a_value_of_training_is_a_value_of_decoding(setup):
    """On texts that the model wrote, in the state in which it writes."""
    model = tiny_model(eos_token_id=None)
    if setup == "teacher":
        selector, excluded_ids = TeacherSelector(tiny_model(seed=9)), ()
    else:
        selector, excluded_ids = make_selector(model, *setup), RESERVED
    torch.manual_seed(0)
    config = RouterConfig(hidden_size=32, layer=1)
    selector.router = Router(model, RouterHead(config), config)
    rows, values, inputs = [], [], prompts((7, 4, 5))
    for row in range(3):
        trace, alone = S2TTrace(), single(inputs, row)
        settings = {"decoding_config": S2TDecodingConfig(trigger="router", threshold=math.inf), "trace": trace}
        ids = model.generate(**alone, custom_generate=s2t_generate, selector=selector, max_new_tokens=9, **settings)
        values += [float(step["value_B"][0]) for step in trace.steps[3:]]
        length = alone["input_ids"].shape[1]
        empty = {name: [0.0] * 9 for name in ("divergence", "margin")}
        empty |= {name: [] for name in ("positions", "student_logprobs", "teacher_logprobs")}
        rows.append({"problem_id": "p", "input_ids": ids[0].tolist(), "prompt_length": length} | empty)
    data = collect(model, Dataset.from_list(rows), [1], warmup_tokens=3, excluded_ids=excluded_ids)
    found = predict(selector.router.head, data, 1)
    torch.testing.assert_close(found, torch.tensor(values), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6, 28])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_layers_to_try_are_spread_evenly_and_end_with_the_last(depth, most):
    model = tiny_model(hidden_size=8, head_dim=2, intermediate_size=8, num_hidden_layers=depth)
    layers = default_layers(model, most)
    assert layers == sorted(set(layers)) and len(layers) == min(depth, most)
    assert layers[0] >= 1 and layers[-1] == depth
    steps = [b - a for a, b in zip([0, *layers], layers)]
    assert max(steps) - min(steps) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def tied(num_values, seed):
    """Values with many ties, and labels that have to do with them."""
    generator = torch.Generator().manual_seed(seed)
    values_N = torch.randint(-4, 5, (num_values,), generator=generator) / 4
    positive_N = torch.rand(num_values, generator=generator) < torch.sigmoid(values_N)
    return values_N, positive_N


CASES = [tied(num_values, seed) for num_values, seed in ((2, 0), (7, 1), (30, 2), (100, 3), (100, 4))] + [
    (torch.tensor([1.0, 2.0]), torch.tensor([False, True])),
    (torch.tensor([2.0, 1.0]), torch.tensor([False, True])),
    (torch.tensor([1.0, 1.0]), torch.tensor([False, True])),
    (torch.tensor([-math.inf, 0.0, math.inf]), torch.tensor([False, False, True])),
    (torch.randn(60, generator=torch.Generator().manual_seed(5)), torch.arange(60) % 3 == 0),
]


@pytest.mark.parametrize(("values_N", "positive_N"), CASES)
def test_auc_counts_pairs(values_N, positive_N):
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in values_N[positive_N].tolist()
        for b in values_N[~positive_N].tolist()
    ]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert auc(values_N, positive_N) == pytest.approx(expected, nan_ok=True)
    assert auc(values_N, positive_N.float()) == pytest.approx(expected, nan_ok=True)
    assert auc(-values_N, positive_N) == pytest.approx(1 - expected, nan_ok=True)


@pytest.mark.parametrize(("values_N", "positive_N"), CASES)
def test_precision_and_recall_at_every_threshold(values_N, positive_N):
    precision, recall = [], []
    for threshold in sorted(set(values_N.tolist()), reverse=True):
        fired = [bool(p) for value, p in zip(values_N.tolist(), positive_N) if value >= threshold]
        precision.append(sum(fired) / len(fired))
        recall.append(sum(fired) / int(positive_N.sum()) if bool(positive_N.any()) else math.nan)
    found = precision_recall(values_N, positive_N)
    torch.testing.assert_close(found[0], torch.tensor(precision, dtype=torch.double))
    torch.testing.assert_close(found[1], torch.tensor(recall, dtype=torch.double), equal_nan=True)
    area = sum(p * (r - before) for p, r, before in zip(precision, recall, [0.0, *recall]))
    assert average_precision(values_N, positive_N) == pytest.approx(area, nan_ok=True)
    shuffled_N = torch.randperm(len(values_N), generator=torch.Generator().manual_seed(0))
    assert average_precision(values_N[shuffled_N], positive_N[shuffled_N]) == pytest.approx(area, nan_ok=True)


@pytest.mark.parametrize("positive", [True, False])
def test_one_class_has_no_area(positive):
    positive_N = torch.full((4,), positive)
    assert math.isnan(auc(torch.randn(4), positive_N))
    assert average_precision(torch.randn(4), positive_N) == (1.0 if positive else pytest.approx(math.nan, nan_ok=True))


def test_no_position_has_no_area():
    assert math.isnan(auc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))
    assert math.isnan(average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))


def test_metrics_are_of_the_positions_whose_answer_is_known():
    data = make_data(200)
    gain_N = torch.rand(200, generator=torch.Generator().manual_seed(3)).masked_fill(
        torch.arange(200) % 5 == 0, math.nan
    )
    gain_N[1::7] = 0.0
    data = data._replace(gain_N=gain_N)
    values_N = torch.nan_to_num(gain_N, nan=9.0) + torch.randn(200, generator=torch.Generator().manual_seed(4))
    metrics = trigger_metrics(values_N, data, replace(CONFIG, min_gain=0.4))
    known_N = ~gain_N.isnan()
    expected = {
        "auc_differs": auc(values_N[known_N], gain_N[known_N] > 0),
        "auc_gain": auc(values_N[known_N], gain_N[known_N] > 0.4),
    }
    keep_N = known_N & data.has_choice_N
    expected["auc_differs_choice"] = auc(values_N[keep_N], gain_N[keep_N] > 0)
    expected["auc_gain_choice"] = auc(values_N[keep_N], gain_N[keep_N] > 0.4)
    assert metrics == pytest.approx(expected, abs=1e-5)
    assert trigger_metrics(values_N, data._replace(gain_N=torch.zeros(200)), CONFIG) == {}, "nan is no JSON"


# ---------------------------------------------------------------------------------------------------------------------
# Training


def on_hidden(hidden_ND, features_NF):
    return hidden_ND[:, 0] - hidden_ND[:, 1] > 0


def on_features(hidden_ND, features_NF):
    return features_NF[:, 2] > 0.3


def held_out_auc(head, data):
    return auc(predict(head, data, 1), data.gain_N > 0.5)


@pytest.mark.parametrize("rule", [on_hidden, on_features])
@pytest.mark.parametrize("target", ["gain", "differs"])
def test_a_rule_is_learned(target, rule):
    data, held_out = (make_data(600, seed=seed, rule=rule) for seed in (0, 1))
    head, loss = fit_head(data, held_out, replace(CONFIG, target=target), **QUICK)
    assert held_out_auc(head, make_data(600, seed=2, rule=rule)) > 0.97
    assert loss < 0.25
    assert not head.training and not any(parameter.requires_grad for parameter in head.parameters())


def test_noise_is_not_learned_and_the_best_epoch_is_kept():
    """A later one knows the noise by heart, and is sure of it."""
    data, held_out = make_data(60, seed=0), make_data(300, seed=1)
    head, loss = fit_head(data, held_out, CONFIG, **QUICK, num_epochs=100)
    assert 0.35 < held_out_auc(head, make_data(300, seed=2)) < 0.65
    expected = torch.nn.functional.binary_cross_entropy_with_logits(predict(head, held_out, 1), held_out.gain_N)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert loss < 0.8
    assert fit_head(data, data, CONFIG, **QUICK, num_epochs=100)[1] < 0.3, "so late, it does"


def test_the_logarithm_of_the_divergence_is_learned():
    def data(seed):
        made = make_data(600, seed=seed)
        return made._replace(divergence_N=(made.hidden[1][:, 0] / 3).exp(), gain_N=torch.full((600,), math.nan))

    head, loss = fit_head(data(0), data(1), replace(CONFIG, target="kl"), **QUICK)
    fresh = data(2)
    target_N = (fresh.divergence_N + 0.01).log()
    assert float((predict(head, fresh, 1) - target_N).square().mean()) < 0.1 * float(target_N.var())
    assert loss < 0.1 * float(target_N.var())


def test_a_seed_decides_and_the_global_generator_is_left_alone():
    data, held_out = make_data(120, seed=0, rule=on_hidden), make_data(60, seed=1, rule=on_hidden)
    heads = []
    for seed, disturb in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturb)
        before = torch.get_rng_state()
        heads.append(fit_head(data, held_out, CONFIG, seed=seed, num_epochs=3)[0].state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not torch.equal(heads[0]["hidden.weight"], heads[2]["hidden.weight"])
    assert torch.equal(heads[0]["mean"], torch.cat([data.hidden[1], data.features_NF], dim=-1).mean(0))


def test_many_steps_are_cut_to_whole_epochs_and_few_are_not():
    data, held_out = make_data(120, seed=0, rule=on_hidden), make_data(60, seed=1, rule=on_hidden)

    def weights(**training):
        return fit_head(data, held_out, CONFIG, batch_size=50, **training)[0].state_dict()  # three steps an epoch

    for max_steps, num_epochs in ((1, 1), (5, 1), (8, 2), (15, 5), (90, 5)):
        cut, expected = weights(num_epochs=5, max_steps=max_steps), weights(num_epochs=num_epochs)
        assert all(torch.equal(cut[name], expected[name]) for name in cut), max_steps


def test_positions_whose_gain_is_unknown_do_not_count():
    data, held_out = make_data(200, seed=0, rule=on_hidden), make_data(100, seed=1, rule=on_hidden)
    known_N = torch.arange(200) % 3 > 0
    with_unknown = data._replace(gain_N=data.gain_N.masked_fill(~known_N, math.nan))
    with_unknown.hidden[1][~known_N] = 1e6
    held_unknown = held_out._replace(gain_N=held_out.gain_N.masked_fill(torch.arange(100) < 40, math.nan))
    found = fit_head(with_unknown, held_unknown, CONFIG, num_epochs=3)
    expected = fit_head(data.where(known_N), held_out.where(torch.arange(100) >= 40), CONFIG, num_epochs=3)
    assert found[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0].state_dict().values(), expected[0].state_dict().values()))


@pytest.mark.parametrize("name", ["labels", "eval_labels"])
@pytest.mark.parametrize(
    ("target", "gain", "divergence", "counts"),
    [
        ("gain", 0.0, 1.0, "50 positions.*0 of them positive"),
        ("gain", 1.0, 1.0, "50 positions.*50 of them positive"),
        ("differs", 0.0, 1.0, "50 positions.*0 of them positive"),
        ("differs", math.nan, 1.0, "0 positions"),
        ("kl", 1.0, math.nan, "0 positions"),
    ],
)
def test_labels_of_one_kind_are_an_error(target, gain, divergence, counts, name):
    good = make_data(50, seed=1)
    bad = good._replace(gain_N=torch.full((50,), gain), divergence_N=torch.full((50,), divergence))
    pair = (bad, good) if name == "labels" else (good, bad)
    with pytest.raises(ValueError, match=f"`{name}` hold {counts}"):
        fit_head(*pair, replace(CONFIG, target=target))


def test_a_single_position_teaches_nothing():
    """Its spread is unknown: the head would be made of nan."""
    data = make_data(50, seed=1)
    with pytest.raises(ValueError, match="`labels` hold 1 positions"):
        fit_head(data.where(torch.tensor([3])), data, replace(CONFIG, target="kl"))


def test_columns_that_never_change_do_not_blow_up():
    data, held_out = make_data(200, seed=0, rule=on_hidden), make_data(100, seed=1, rule=on_hidden)
    for part, value in ((data, 5.0), (held_out, 5.001)):
        part.hidden[1][:, 3:] = value
    head, loss = fit_head(data, held_out, CONFIG, **QUICK)
    assert math.isfinite(loss) and held_out_auc(head, held_out) > 0.95


def test_the_layer_with_the_least_held_out_loss_is_kept():
    model = tiny_model()
    data, held_out = (make_data(300, seed=seed, hidden_size=32, rule=on_hidden, layers=(1, 2)) for seed in (0, 1))
    for swapped in (False, True):
        if swapped:
            data, held_out = (
                part._replace(hidden={1: part.hidden[2], 2: part.hidden[1]}) for part in (data, held_out)
            )
        config = RouterConfig(hidden_size=32, layer=2, num_top=2, width=16)
        router, losses = fit_router(model, data, held_out, config, num_epochs=15, batch_size=64, learning_rate=1e-2)
        assert set(losses) == {1, 2}
        assert router.config.layer == (1 if swapped else 2) == min(losses, key=losses.get)
        values_N = predict(router.head, held_out, router.config.layer)
        assert router.config.metrics == trigger_metrics(values_N, held_out, router.config)
        assert router.config.metrics["auc_gain"] > 0.9
        assert router.model is model


def test_of_layers_that_do_as_well_the_last_is_kept():
    data, held_out = make_data(60, seed=0, hidden_size=32), make_data(60, seed=1, hidden_size=32)
    for part in (data, held_out):
        part.hidden[2] = part.hidden[1]
    router, losses = fit_router(tiny_model(), data, held_out, RouterConfig(32, 1, num_top=2), num_epochs=1)
    assert losses[1] == losses[2] and router.config.layer == 2


# ---------------------------------------------------------------------------------------------------------------------
# Cross-fitting


def by_heart(num_problems=60, each=6):
    """A hidden state that names the problem, and a gain that a coin decided for each problem."""
    problem_N = torch.arange(num_problems).repeat_interleave(each)
    coin = torch.rand(num_problems, generator=torch.Generator().manual_seed(7)) < 0.5
    names = torch.randn(num_problems, 32, generator=torch.Generator().manual_seed(8))
    size = num_problems * each
    return RouterData(
        {1: names[problem_N]},
        torch.zeros(size, 4),
        coin[problem_N].float(),
        torch.ones(size),
        coin[problem_N],
        problem_N,
    )


def test_no_head_gives_values_for_a_problem_that_it_has_seen():
    config, data = RouterConfig(32, 1, num_top=2), by_heart()
    head, _ = fit_head(data, data, config, **QUICK)
    assert held_out_auc(head, data) > 0.99, "it can be known by heart"
    values_N = cross_fitted_logits(data, config, **QUICK)
    assert 0.3 < auc(values_N, data.gain_N > 0.5) < 0.7


@pytest.mark.parametrize("num_folds", [3, 5])
@pytest.mark.parametrize("numbers", [range(12), range(0, 60, 5), (3, 90, 6, 33, 9, 12, 30, 0, 60, 15, 18, 21)])
def test_every_problem_is_in_one_fold_and_never_teaches_its_own(numbers, num_folds, monkeypatch):
    """Whatever the problems' numbers are: those whose positions were left out leave holes."""
    data = make_data(240, 12)
    data = data._replace(problem_N=torch.tensor(list(numbers))[data.problem_N])
    seen, fit = [], training.fit_head

    def spy(taught, stopped, config, **settings):
        seen.append((set(taught.problem_N.tolist()), set(stopped.problem_N.tolist())))
        return fit(taught, stopped, config, **settings)

    monkeypatch.setattr(training, "fit_head", spy)
    values_N = cross_fitted_logits(data, CONFIG, num_folds=num_folds, num_epochs=1, seed=3)
    assert bool(values_N.isfinite().all()) and len(seen) == num_folds
    left_out = [set(numbers) - taught - stopped for taught, stopped in seen]
    assert sorted(number for part in left_out for number in part) == sorted(numbers)
    for (taught, stopped), part in zip(seen, left_out):
        assert not taught & stopped and part and stopped and taught
        own_N = torch.tensor([number in part for number in data.problem_N.tolist()])
        parts = (torch.tensor([number in kept for number in data.problem_N.tolist()]) for kept in (taught, stopped))
        head, _ = fit(*(data.where(part_N) for part_N in parts), CONFIG, num_epochs=1, seed=3)
        assert torch.equal(values_N[own_N], predict(head, data.where(own_N), 1))


def test_positions_of_unknown_gain_get_values_too():
    data = make_data(200, rule=on_hidden)
    data = data._replace(gain_N=data.gain_N.masked_fill(torch.arange(200) % 4 == 0, math.nan))
    assert bool(cross_fitted_logits(data, CONFIG, num_epochs=1).isfinite().all())


@pytest.mark.parametrize("num_folds", [1, 2, 6])
def test_too_few_problems_or_folds_are_an_error(num_folds):
    with pytest.raises(ValueError, match=r"`num_folds` must be in \[3, 5\].*got " + str(num_folds)):
        cross_fitted_logits(make_data(50, 5), CONFIG, num_folds=num_folds)
