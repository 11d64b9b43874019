"""The metrics for `evaluate`: loaded by their folders without a network, against figures by hand, and used."""

import doctest
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch

from s2t_recipes.evaluation import bench, fidelity
from s2t_recipes.evaluation.policies import Policy
from s2t_recipes.metrics import FOLDER, load_metric
from s2t_recipes.problems import Problem


NAMES = ("math_answer", "selection_agreement")
#: Loads the metrics in the folder `sys.argv[1]` and measures with each, where every connection fails.
OFFLINE = """
import json, socket, sys

def refuse(*args):
    raise AssertionError(f"no network here: {args}")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate

answers = evaluate.load(sys.argv[1] + "/math_answer").compute(predictions=["#### 7", "7"], references=["7", "8"])
choices = evaluate.load(sys.argv[1] + "/selection_agreement").compute(predictions=[0, 1], references=[1, 1])
print(json.dumps([answers["accuracy"], choices["agree_at_1"]]))
"""


def test_metrics_load_by_their_folders_without_a_network(tmp_path):
    """From an empty cache, in a process that has imported nothing of ours."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        settings.pop(name, None)
    command = [sys.executable, "-c", OFFLINE, str(FOLDER)]
    done = subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0.5, 0.5]


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_says_what_it_is_and_its_example_runs_as_printed(name):
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert set(metric.features) == {"predictions", "references"}
    assert metric.description.strip() and metric.citation.strip().startswith("@")
    for part in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert part in metric.inputs_description and part in type(metric).__doc__
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, 0)
    assert example.examples and not doctest.DocTestRunner().run(example).failed


def test_every_folder_of_metrics_is_one():
    assert sorted(file.parent.name for file in FOLDER.glob("*/*.py")) == sorted(NAMES)
    assert all((FOLDER / name / f"{name}.py").is_file() for name in NAMES)


@pytest.mark.parametrize(
    ("style", "correct", "answers"),
    [
        ("auto", [True, True, False, False, True], ["8000", "1/2", "7", None, "12"]),
        ("math", [True, True, False, False, True], ["8000", "1/2", "7", None, "12"]),
        ("hash", [True, False, False, False, False], ["8000", None, None, None, None]),
    ],
)
def test_right_answers_by_hand(style, correct, answers):
    texts = ["So 8,000 nuts.\n#### 8,000", r"It is \boxed{\frac{1}{2}}.", r"\boxed{7}", "I do not know.", "$12.0$"]
    golds = ["8000", "0.5", "8", "1", "12"]
    found = load_metric("math_answer").compute(predictions=texts, references=golds, style=style)
    assert found["correct"] == correct and found["accuracy"] == sum(correct) / 5
    assert found["answers"] == answers


def test_agreement_by_hand():
    metric = load_metric("selection_agreement")
    assert metric.compute(predictions=[2, 0, 1], references=[2, 1, 1]) == {
        "agree_at_1": 2 / 3,
        "agrees": [True, False, True],
    }
    ids = torch.tensor([128_000, 7])  # token ids, as tensors and arrays
    assert metric.compute(predictions=ids, references=np.array([128_000, 8]))["agrees"] == [True, False]


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("math_answer", {"predictions": [], "references": []}, "`predictions` must be texts, at least one, got none"),
        ("math_answer", {"predictions": ["4", None], "references": ["4", "5"]}, "`predictions` must be .* got None"),
        ("math_answer", {"predictions": ["4", "5"], "references": ["4", None]}, "`references` must be .* got None"),
        ("math_answer", {"predictions": [4], "references": ["4"]}, "don't match the expected format"),
        ("math_answer", {"predictions": ["4"], "references": ["4", "5"]}, "Mismatch in the number of predictions"),
        (
            "math_answer",
            {"predictions": ["4"], "references": ["4"], "style": "boxed"},
            "`style` must be one of 'hash', 'math', 'auto', got 'boxed'",
        ),
        ("selection_agreement", {"predictions": [], "references": []}, "`predictions` must be integers .* got none"),
        (
            "selection_agreement",
            {"predictions": [0, 0.7], "references": [0, 1]},
            "`predictions` must be integers of at least 0, one a point, got 0.7",
        ),
        ("selection_agreement", {"predictions": [0, 1], "references": [0, -1]}, "`references` must be .* got -1"),
        ("selection_agreement", {"predictions": [0, None], "references": [0, 1]}, "`predictions` must be .* got nan"),
        ("selection_agreement", {"predictions": [1], "references": [1, 2]}, "Mismatch in the number of predictions"),
    ],
)
def test_bad_input_is_an_error_that_leaves_the_metric_as_it_was(name, inputs, message):
    metric = load_metric(name)
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)
    if name == "math_answer":
        assert metric.compute(predictions=["#### 4"], references=["4"])["correct"] == [True]
    else:
        assert metric.compute(predictions=[3], references=[3])["agrees"] == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Used


@pytest.fixture
def asked(monkeypatch):
    """Name and inputs of every metric that is computed; all answers are right, and no choice is the teacher's."""
    calls = []

    def load(name):
        def compute(predictions, references, **more):
            calls.append((name, list(predictions), list(references), more))
            size = len(predictions)
            return {"answers": ["any"] * size, "correct": [True] * size, "agrees": [False] * size}

        return SimpleNamespace(compute=compute)

    monkeypatch.setattr(bench, "load_metric", load)
    monkeypatch.setattr(fidelity, "load_metric", load)
    return calls


@pytest.mark.parametrize("policy", ["greedy", "maj@2"])
def test_the_evaluation_takes_the_metric_of_answers_at_its_word(asked, policy):
    policy = Policy.parse(policy)
    texts = [f"#### {n}" for n in range(2 * max(1, policy.num_votes))]
    own = bench.Bench.__new__(bench.Bench)
    own.problems, own.answer_style = [Problem("a", "How many?", "8"), Problem("b", "And?", "9")], "hash"
    own.tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: texts)
    records = own._grade(policy, [1, 0], torch.zeros(len(texts), 1), torch.ones(len(texts)))
    golds = [gold for gold in ("9", "8") for _ in range(max(1, policy.num_votes))]
    assert asked == [("math_answer", texts, golds, {"style": "hash"})]
    assert [(record["id"], record["answer"], record["correct"]) for record in records] == [
        ("b", "any", True),
        ("a", "any", True),
    ]


def test_fidelity_takes_the_metric_of_choices_at_its_word(asked):
    record = {"id": "p", "rollout": 0, "divergence": [1.0, 0.1], "num_above": [2, 1], "rank": [0, 1]}
    record |= {"target": [1, 0], "choice": [1, 0], "spearman": [0.0, 0.0]}
    figures = fidelity.summarize_points([[record]], threshold=0.5)
    assert {tuple(call[1]) for call in asked} == {(0, 0), (1, 0)}
    assert all(call[0] == "selection_agreement" and call[2] == [1, 0] for call in asked) and len(asked) == 3
    assert figures["agree_at_1"]["kl"]["selector"]["value"] == 0.0  # it is the teacher's, but the metric says no
