"""Thresholds by running what is deployed: what a run reports is what a trace of `generate` says, and what is
calibrated is met on the text that the selector writes."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from tiny import EOS, PAD, RESERVED, SCOPES, disagreeing_pair, in_turn, make_selector, tiny_model
from tqdm import tqdm

from s2t_recipes.training import calibrate
from transformers_s2t import FusionWeights, S2TDecodingConfig, S2TTrace, TeacherSelector, s2t_generate
from transformers_s2t.calibration import thresholds as thresholds_module
from transformers_s2t.calibration.thresholds import Deployment, TriggerRun, calibrate_by_decoding


NEW_TOKENS = 24


def make_prompts(number=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (number,), generator=generator).tolist()
    return [torch.randint(3, RESERVED[0], (length,), generator=generator).tolist() for length in lengths]


def deploy(scope=("candidate", "base"), **settings):
    model = tiny_model()
    selector = make_selector(model, *scope)
    selector.fusion = FusionWeights(1.0, 0.1, -0.05)
    settings = {"pad_token_id": PAD, "eos_token_ids": [EOS], "max_new_tokens": NEW_TOKENS, "batch_size": 5} | settings
    return Deployment(model, selector, **settings)


@pytest.mark.parametrize(("scope", "trigger"), in_turn(SCOPES, ["margin", "entropy"]))
def test_a_run_reports_the_values_of_every_new_token_of_each_text(scope, trigger):
    deployment, prompts = deploy(scope), make_prompts()
    threshold = {"entropy": 2.0, "margin": -0.6}[trigger]
    run = deployment.run(prompts, trigger, threshold)
    fired = 0
    for ids, values_S in zip(prompts, run.values):
        trace = S2TTrace()
        output = deployment.model.generate(
            torch.tensor([ids]),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            do_sample=False,
            custom_generate=s2t_generate,
            selector=deployment.selector,
            decoding_config=S2TDecodingConfig(trigger=trigger, threshold=threshold),
            trace=trace,
        )
        (steps,) = trace.rows()
        assert len(values_S) == len(steps) == output.shape[1] - len(ids)
        assert bool((values_S[:3] == -math.inf).all())
        expected = [step["value"] for step in steps[3:]]
        assert values_S[3:].tolist() == pytest.approx(expected, abs=1e-4)
        fired += sum(step["triggered"] for step in steps)
    assert fired == int(run.fired_P.sum()) > 0
    assert run.rate == fired / sum(map(len, run.values))


def test_without_a_threshold_that_can_be_reached_the_student_writes_alone():
    deployment, prompts = deploy(), make_prompts(3)
    run = deployment.run(prompts, "margin", math.inf)
    for ids, values_S in zip(prompts, run.values):
        plain = deployment.model.generate(
            torch.tensor([ids]),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            do_sample=False,
            suppress_tokens=list(RESERVED),
        )
        assert len(values_S) == plain.shape[1] - len(ids)
    assert run.rate == 0


def test_the_progress_bar_moves_with_every_batch_and_ends_full(monkeypatch):
    """It stood at 0 until the first trigger was done."""

    class Bar(tqdm):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, file=io.StringIO(), mininterval=0)
            bars.append(self)

        def update(self, n=1):
            moves.append((self.desc, n))
            return super().update(n)

    bars, moves = [], []
    monkeypatch.setattr(calibrate, "tqdm", Bar)
    args = calibrate.CalibrateArguments("a", "l", target_rates=[0.1, 0.3])
    prompts = make_prompts(8)
    deployment = dataclasses.replace(deploy(), batch_size=3)
    calibrate.run_deployed(args, deployment, ["entropy", "margin"], prompts[:6], prompts[6:])
    assert moves[0][1] == 3 and len([n for desc, n in moves if desc.startswith("Decoding: entropy")]) >= 8
    assert bars[0].n == bars[0].total == sum(n for _, n in moves)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ((20, 200, FusionWeights(1.0, 0.1)), []),
        ((20, None, None), []),
        ((5, 400, FusionWeights()), ["5 problems and 400 decision points are too few"]),
        ((5, None, None), ["5 problems are too few"]),
        ((30, 199, FusionWeights(1.0, -0.25)), ["199 decision points are too few", "negative (-0.250)"]),
    ],
)
def test_a_calibration_on_too_little_is_said_to_be_one(seen, words):
    found = calibrate.warnings_of(*seen)
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found))
    assert all("s2t label" in text for text in found)


@pytest.mark.parametrize("trigger", [pytest.param("entropy", marks=pytest.mark.slow), "margin"])
def test_calibrated_rates_are_met_on_the_text_that_the_selector_writes(trigger):
    deployment, prompts = deploy(), make_prompts(30)
    seen = []
    found = calibrate_by_decoding(
        deployment, prompts, trigger, [0.3, 0.05], lambda rate, run: seen.append((rate, run.rate))
    )
    assert sorted(found) == [0.05, 0.3]
    for rate, run in found.items():
        again = deployment.run(prompts, trigger, run.threshold)
        assert again.rate == run.rate  # nothing is returned that was not measured
        runs = [got for target, got in seen if target == rate]
        assert run.rate in runs and abs(run.rate - rate) == min(abs(got - rate) for got in runs)
        allowed = max(thresholds_module.TOLERANCE * rate, 1 / int(run.tokens_P.sum()))
        assert abs(run.rate - rate) <= allowed or len(runs) == thresholds_module.MAX_RUNS


def test_thresholds_of_the_students_own_text_miss_the_rate_that_the_deployed_selector_reaches():
    """What the loop is for: the text under a selector has other values than the student's own."""
    student, teacher = disagreeing_pair()
    deployment = Deployment(student, TeacherSelector(teacher), PAD, [EOS], NEW_TOKENS, batch_size=30)
    prompts = make_prompts(30)
    own = torch.cat(deployment.run(prompts, "margin", math.inf).values)
    naive = deployment.run(prompts, "margin", thresholds_module.calibrate_threshold(own, 0.3))
    found = calibrate_by_decoding(deployment, prompts, "margin", [0.3])[0.3]
    assert abs(found.rate - 0.3) < abs(naive.rate - 0.3)


def test_the_kl_trigger_runs_with_its_teacher():
    student, teacher = disagreeing_pair()
    deployment = Deployment(student, make_selector(student), PAD, [EOS], NEW_TOKENS, teacher_model=teacher)
    found = calibrate_by_decoding(deployment, make_prompts(10), "kl", [0.2])[0.2]
    assert found.threshold > 0 and abs(found.rate - 0.2) < 0.1


def test_the_interval_is_over_prompts_and_holds_the_rate():
    values = [torch.tensor([-math.inf, 1.0, 0.0, 2.0]), torch.tensor([-math.inf, 0.0]), torch.tensor([3.0])]
    run = TriggerRun(values, threshold=1.0)
    assert run.fired_P.tolist() == [2, 0, 1] and run.tokens_P.tolist() == [4, 2, 1] and run.rate == 3 / 7
    low, high = run.interval()
    assert 0 <= low < 3 / 7 < high <= 1
    alike = TriggerRun([torch.tensor([1.0, 0.0])] * 40, threshold=1.0)
    assert alike.interval() == (0.5, 0.5)  # every prompt has the same rate
    spread = TriggerRun([torch.tensor([float(i % 2)] * 2) for i in range(40)], threshold=1.0)
    low, high = spread.interval()
    assert np.isclose(high - low, 2 * 1.96 * 0.5 / 40**0.5, rtol=0.2)  # 40 prompts, not 80 tokens


@pytest.mark.parametrize(
    ("trigger", "target_rates", "prompts", "message"),
    [
        ("always", [0.1], [[3, 4]], "`trigger` must be one of 'entropy', 'margin', 'router', 'kl', got 'always'"),
        ("random", [0.1], [[3, 4]], "`trigger` must be one of"),
        ("margin", [1.5], [[3, 4]], r"`target_rates` must be in \[0.0, 1.0\], got 1.5"),
        ("margin", [0.1], [], "`prompts` must hold one prompt at least"),
    ],
)
def test_bad_input_is_named(trigger, target_rates, prompts, message):
    with pytest.raises(ValueError, match=message):
        calibrate_by_decoding(deploy(), prompts, trigger, target_rates)
