"""recipes/eval.py and report.py: policies, votes, intervals, and one run on tiny random models."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import lora_model, tiny_model
from transformers import AutoTokenizer

from s2t_recipes import demo, row_names, splits
from s2t_recipes import jobs as jobs_module
from s2t_recipes.commands import run
from s2t_recipes.estimates import bootstrap_interval
from s2t_recipes.evaluation.arguments import EvaluateArguments
from s2t_recipes.evaluation.bench import Bench, count_tokens, majority_vote
from s2t_recipes.evaluation.plan import make_plan
from s2t_recipes.evaluation.policies import DEFAULT_POLICIES, Policy, choose_policies
from s2t_recipes.evaluation.rows import format_table, make_example, mcnemar, summarize
from s2t_recipes.evaluation.run import evaluate
from s2t_recipes.jobs import Jobs, read_progress
from s2t_recipes.problems import Problem
from s2t_recipes.records import read_records
from s2t_recipes.report import report
from transformers_s2t import FusionWeights, SelectorConfig
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME
from transformers_s2t.fusion import fused_scores
from transformers_s2t.labels.folder import read_header, read_labels, write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.labels.seen_problems import write_seen_problems
from transformers_s2t.reserved_tokens import find_reserved_token_ids, vocab_hash


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


# ---------------------------------------------------------------------------------------------------------------------
# Policies and votes


def test_policies_are_read_and_written_alike():
    for text in (*DEFAULT_POLICIES, "s2t-local-bare:random:0.25", "maj@16"):
        assert Policy.parse(text).label == text
    assert Policy.parse("s2t:kl:0.1") == Policy("s2t", "kl", 0.1)
    assert Policy.parse("maj@8").num_votes == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "'best': the name must be one of greedy, maj@N, teacher, takeover, s2t, .* got 'best'"),
        ("greedy:kl:0.1", "'greedy' takes no trigger"),
        ("maj@1", r"n of maj@n must be an integer in \[2, 256\], got '1'"),
        ("maj@x", "got 'x'"),
        ("s2t", "the trigger must be one of always, entropy, margin, router, kl, random, got none"),
        ("s2t:sometimes", "got 'sometimes'"),
        ("s2t:always:0.1", "'always' takes no rate"),
        ("s2t:kl", r"'kl' needs a rate in \(0, 1\], e.g. s2t:kl:0.1, got none"),
        ("s2t:kl:often", "got often"),
        ("s2t:kl:1.5", "got 1.5"),
        ("s2t:kl:0.1:2", "got 0.1:2"),
    ],
)
def test_bad_policies_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.parse(text)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], 1),
        (["3", "2", "2", "3"], 0),  # a tie goes to the answer seen first
        ([None, "5", None, None], 1),  # what cannot be read does not vote
        ([None, None], None),
    ],
)
def test_majority_vote(answers, winner):
    assert majority_vote(answers) == winner


def test_equal_answers_vote_together():
    """Three spellings of one number lost against two samples of another: the baseline came out too low."""
    samples = [r"\boxed{3}", r"\boxed{3}", r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}", r"\boxed{2\sqrt2}"]
    bench = Bench.__new__(Bench)
    bench.problems = [Problem("a", "How many?", r"\sqrt{8}"), Problem("b", "And?", "3")]
    for bench.answer_style in ("math", "auto"):
        texts = [*samples, *(text.replace("3", "4") for text in samples)]
        bench.tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens, texts=texts: texts)
        first, second = bench._grade(Policy.parse("maj@5"), [0, 1], torch.zeros(10, 1), torch.ones(10))
        assert first["votes"] == ["3", "3", "sqrt(8)", "sqrt(8)", "sqrt(8)"]
        assert first["answer"] == "sqrt(8)" and first["correct"] and first["any_correct"]
        assert second["answer"] == "sqrt(8)" and not second["correct"]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_bootstrap_interval_is_the_binomial_one():
    values_N = np.array([1] * 120 + [0] * 280)
    low, high = bootstrap_interval(values_N, seed=0)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.006)
    assert high == pytest.approx(0.3 + half, abs=0.006)
    assert bootstrap_interval(values_N, seed=0) == [low, high]
    assert bootstrap_interval(np.ones(5)) == [1.0, 1.0]


def test_mcnemar_against_the_binomial_distribution():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 7) == pytest.approx(2 * 9 / 256)
    assert mcnemar(700, 20) < 1e-100


def test_summary_of_two_seeds():
    greedy_N = [True, True, False, False]
    correct_PN = [[True, False, True, True], [True, True, True, False]]
    summary = summarize(correct_PN, greedy_N)
    assert summary["accuracy"] == 75.0
    assert summary["accuracy_by_seed"] == [75.0, 75.0]
    assert (summary["helped"], summary["hurt"]) == (1.5, 0.5)
    assert summary["mcnemar_p"] == 1.0
    low, high = summary["accuracy_ci"]
    assert 50 <= low < 75 < high <= 100


def test_tokens_are_counted_up_to_the_first_end():
    new_ids_BS = torch.tensor([[5, 1, 1, 1], [5, 6, 7, 8], [5, 6, 3, 1], [1, 1, 1, 1]])
    assert count_tokens(new_ids_BS, 1).tolist() == [2, 4, 4, 1]
    assert count_tokens(new_ids_BS, [1, 3]).tolist() == [2, 4, 3, 1]


# ---------------------------------------------------------------------------------------------------------------------
# One evaluation of tiny random models


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """Folders of a student, a teacher, an adapter with thresholds, ten problems and labels of two others."""
    root = tmp_path_factory.mktemp("bed")
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "embedded" / "student")
    sizes = {"vocab_size": 120, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    reserved = find_reserved_token_ids(tokenizer, 120)
    for name, seed in (("student", 0), ("teacher", 1)):
        model = tiny_model(seed=seed, **sizes)
        model.generation_config.repetition_penalty = 5.0  # must not be inherited
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    lora_model(tiny_model(**sizes), name="default", reserved=reserved).save_pretrained(root / "adapter")
    thresholds = {"kl": {0.05: 1.0, 0.1: 0.5}, "entropy": {0.05: 0.6, 0.1: 0.5}, "margin": {0.05: -0.5, 0.1: -1.0}}
    SelectorConfig(
        reserved, thresholds=thresholds, vocab_hash=vocab_hash(tokenizer), metrics={"agree_at_1": 0.5}
    ).save_pretrained(root / "adapter")
    rows = [{"prompt": f"Tom has {20 + i} nuts.\n", "answer": str(i)} for i in range(10)]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    point = {"input_ids": list(range(30, 38)), "prompt_length": 4, "divergence": [0.0, 2.0, 3.0, 0.1]}
    point |= {"entropy": [0.1] * 4, "margin": [-0.1] * 4, "positions": [4, 5, 6]}
    point |= {"candidate_ids": [[40, 41, 42]] * 3, "student_logprobs": [[-0.5, -1.5, -2.5]] * 3}
    point |= {"teacher_logprobs": [[-0.1, -3.0, -4.0], [-2.0, -0.2, -3.0], [-4.0, -3.0, -2.0]]}
    point |= {"teacher_top_id": [40, 41, 50]}
    ids = ["a", sha256(b"Tom has 2 nuts.\n").hexdigest()[:16]]
    write_shard(root / "labels", 0, [point | {"problem_id": id, "rollout": 0} for id in ids])
    done = {"num_problems": 2, "complete": True, "num_candidates": 3, "divergence_threshold": 1.0}
    header = TrajectoryHeader("student", "teacher", vocab_hash(tokenizer), **done)
    write_header(root / "labels", header)
    return root


def arguments(bed, out, **changes):
    settings = {"model": str(bed / "student"), "teacher_model": str(bed / "teacher"), "dataset": "test.jsonl"}
    settings |= {"dataset": str(bed / "test.jsonl"), "adapters": [str(bed / "adapter")], "output_dir": str(out)}
    settings |= {"max_new_tokens": 10, "batch_size": 4, "answer_style": "hash"}
    return EvaluateArguments(**(settings | changes))


POLICIES = ["greedy", "maj@2", "teacher", "takeover:kl:0.1", "s2t:always", "second:always", "random:entropy:0.1"]
LOCAL = ["s2t-local:always", "s2t-local-bare:margin:0.1"]


def test_problems_of_like_greedy_texts_share_a_batch(bed, tmp_path, monkeypatch):
    """The order of problems changes no text; greedy itself, which tells the lengths, and votes stay as they are."""
    policies = ["greedy", "maj@2", "s2t:always", "teacher"]
    args = {"policies": policies, "batch_size": 2}
    usual = evaluate(arguments(bed, tmp_path / "usual", **args))
    batches, grade = [], Bench._grade

    def seen(self, policy, rows, *rest):
        batches.append((policy.name, rows))
        return grade(self, policy, rows, *rest)

    monkeypatch.setattr(Bench, "_grade", seen)
    result = evaluate(arguments(bed, tmp_path / "sorted", batch_by="greedy_length", **args))
    for row, other in zip(result["rows"], usual["rows"], strict=True):
        assert [row["accuracy"], row["helped"], row["hurt"]] == [other["accuracy"], other["helped"], other["hurt"]]
    lengths = [record["num_tokens"] for record in read_records(tmp_path / "sorted/records/greedy.jsonl")[1]]
    kept = {name: read_records(tmp_path / f"sorted/records/{name}.jsonl")[0] for name in ("greedy", "maj@2")}
    assert kept["maj@2"]["settings"]["batch_by"] == "greedy_length"  # rows that leave change what others sample
    assert "batch_by" not in kept["greedy"]["settings"]
    assert len(set(lengths)) > 1
    for name in ("s2t", "teacher"):
        order = [lengths[i] for policy, rows in batches if policy == name for i in rows]
        assert order == sorted(lengths, reverse=True)
    assert [rows for name, rows in batches if name == "greedy"] != [rows for name, rows in batches if name == "s2t"]
    batches.clear()
    evaluate(arguments(bed, tmp_path / "alone", policies=["teacher"], batch_by="greedy_length"))
    assert [i for _, rows in batches for i in rows] == list(range(len(lengths)))  # nothing tells the lengths


def test_end_to_end_and_resume(bed, tmp_path, monkeypatch):
    args = arguments(
        bed, tmp_path, policies=POLICIES + LOCAL, label_dirs=[str(bed / "labels")], eval_labels=str(bed / "labels")
    )
    result = evaluate(args)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["greedy", "maj@2", "best@2", *POLICIES[2:], *LOCAL]
    assert rows["best@2"]["is_oracle"] and rows["best@2"]["accuracy"] >= rows["maj@2"]["accuracy"]
    for label, row in rows.items():  # paired with greedy, problem by problem
        if label != "greedy":
            assert row["gain"] == pytest.approx(row["accuracy"] - rows["greedy"]["accuracy"])
            assert row["gain_ci"][0] <= row["gain"] <= row["gain_ci"][1]
    prompt_tokens = len(AutoTokenizer.from_pretrained(bed / "student")("Tom has 20 nuts.\n")["input_ids"])
    greedy = rows["greedy"]
    assert greedy["student_tokens"] == prompt_tokens + greedy["tokens_per_problem"] and greedy["teacher_tokens"] == 0
    assert rows["maj@2"]["student_tokens"] == 2 * (prompt_tokens + rows["maj@2"]["tokens_per_problem"])
    assert rows["teacher"]["student_tokens"] == 0 < rows["teacher"]["teacher_tokens"]
    assert rows["s2t:always"]["teacher_tokens"] > 0 and rows["s2t-local:always"]["teacher_tokens"] == 0
    assert rows["s2t-local:always"]["student_tokens"] > greedy["student_tokens"]
    assert all(len(row["accuracy_ci"]) == 2 for row in rows.values())
    assert rows["greedy"]["helped"] is None and rows["greedy"]["seconds_vs_greedy"] == 1.0
    assert 0 < rows["s2t:always"]["asked_rate"] <= rows["s2t:always"]["achieved_rate"] <= 0.7  # warm-up: 3 of 10
    assert rows["second:always"]["flip_rate"] == rows["second:always"]["asked_rate"] > 0
    assert [name for name, row in rows.items() if row["uses_teacher"]] == ["teacher", "takeover:kl:0.1", "s2t:always"]
    assert rows["s2t-local:always"]["adapter_scope"] == "candidate"
    # per labels row: points with a divergence of 2.0 (teacher takes the second) and 3.0 (not among the candidates)
    assert result["hit_at_k"] == {"1": 0.0, "2": 0.5}
    assert result["agree_at_1"] == {"student": 0.0, "second": 0.5, "num_points": 4, "held_out": {"agree_at_1": 0.5}}
    fidelity = result["fidelity"]
    assert (fidelity["num_points"], fidelity["num_seeds"], fidelity["num_candidates"]) == (6, 1, 8)
    assert fidelity["agree_at_1"]["kl"]["student_first"]["value"] == 0.0
    table = format_table(result).splitlines()
    assert len({len(line) for line in table[: 2 + len(rows)]}) == 1
    assert table[-2].startswith("Agree@1 in per cent at the points of top divergence (4 points): S2T-Local ")

    header, records = read_records(tmp_path / "records" / "s2t_always.jsonl")
    prompts = [f"Tom has {20 + i} nuts.\n".encode() for i in range(10)]
    assert [record["id"] for record in records] == [sha256(prompt).hexdigest()[:16] for prompt in prompts]
    for record in records:
        assert len(record["tokens"]) == len(record["kinds"]) == record["num_tokens"]
        assert set(map(int, record["student_tokens"])) == {i for i, kind in enumerate(record["kinds"]) if kind == "f"}
        assert set(map(int, record["asked"])) == {i for i, kind in enumerate(record["kinds"]) if kind in "kf"}
        for step, (_, candidates) in record["asked"].items():
            assert max(candidates, key=lambda candidate: candidate[1])[0] == record["tokens"][int(step)]
            assert [candidate[2] for candidate in candidates] == sorted((c[2] for c in candidates), reverse=True)
    flips = sum(record["kinds"].count("f") for record in records)
    assert flips == header["totals"]["flipped"]
    texts = json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))
    assert texts["problems"][0] == [records[0]["id"], prompts[0].decode(), "0"]
    spelled = "".join(texts["tokens"][str(id)] for id in records[0]["tokens"] if id not in texts["special"])
    assert spelled == records[0]["text"]

    # again: nothing is run, the same report; with one more policy only that one runs
    ran = []
    run = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, policy, *rest: ran.append(policy.label) or run(self, policy, *rest))
    monkeypatch.setattr("s2t_recipes.evaluation.fidelity.score_points", None)
    again = evaluate(args)
    assert (again["rows"], again["fidelity"]) == (result["rows"], fidelity)
    assert ran == []
    args.policies = [*POLICIES, "s2t:random:0.5"]
    evaluate(args)
    assert ran == ["s2t:random:0.5"]
    args.max_new_tokens = 9
    args.policies = ["greedy"]
    evaluate(args)
    assert ran == ["s2t:random:0.5", "greedy"]


def make_labels(bed, folder, ids, top_ids):
    """A folder of labels of problems `ids`: the teacher's choices at each of them are `top_ids`."""
    row = read_labels(bed / "labels")[0][0]
    width = len(top_ids)
    row |= {"input_ids": list(range(30, 34 + width)), "positions": list(range(4, 4 + width))}
    row |= {name: [row[name][0]] * width for name in ("divergence", "entropy", "margin")}
    row |= {name: [row[name][0]] * width for name in ("candidate_ids", "student_logprobs", "teacher_logprobs")}
    write_shard(folder, 0, [row | {"problem_id": id, "teacher_top_id": top_ids} for id in ids])
    header = read_header(bed / "labels")
    write_header(folder, replace(header, num_problems=len(ids)))
    return str(folder)


def test_prior_and_zero_shot_are_controls_that_know_what_they_were_made_with(bed, tmp_path, monkeypatch):
    choices = [*range(3, 100), *range(60, 100, 3)]
    labels = make_labels(bed, tmp_path / "labels", ["a", "b"], choices)
    again = make_labels(bed, tmp_path / "again", ["c", "d"], choices)
    other = make_labels(bed, tmp_path / "other", ["a", "b"], [*choices, 60])
    args = arguments(
        bed, tmp_path / "out", policies=["greedy", "prior:always", "zero-shot:entropy:0.1"], prior_labels=labels
    )
    ran = []
    run = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, policy, *rest: ran.append(policy.name) or run(self, policy, *rest))

    def evaluate_with(**changes):
        ran.clear()
        return evaluate(replace(args, **changes))

    rows = evaluate_with()["rows"]
    assert ran == ["greedy", "prior", "zero-shot"]
    names = ["greedy", "token prior · every step", "zero-shot scorer · entropy 10 %"]
    assert [row_names.label_of(row) for row in rows] == names
    assert [row_names.group_of(row) for row in rows] == ["baseline", "control", "control"]
    assert not any(row["uses_teacher"] for row in rows)
    beside_text = [row["student_tokens"] - row["tokens_per_problem"] for row in rows]  # prompts, and candidates
    assert beside_text[1] == pytest.approx(beside_text[0]) and beside_text[2] > beside_text[0] + 1
    assert rows[1]["extra_forwards"] == {} and rows[2]["extra_forwards"]["scorer"] > 0
    asked = [
        (record["tokens"][int(step)], candidates)
        for record in read_records(tmp_path / "out" / "records" / "prior_always.jsonl")[1]
        for step, (_, candidates) in record["asked"].items()
    ]
    for token, candidates in asked:
        counts = [2 * choices.count(id) for id, *_ in candidates]  # two problems
        assert [candidate[1] for candidate in candidates] == counts
        assert token == candidates[counts.index(max(counts))][0]
    assert any(token != candidates[0][0] for token, candidates in asked)

    evaluate_with(prior_labels=again)  # of other problems, with the same prior
    assert ran == []
    evaluate_with(prior_labels=other)
    assert ran == ["prior"]
    scored = {None: read_records(tmp_path / "out" / "records" / rows[2]["records"][0])[1]}
    for text in ("?", "+"):
        evaluate_with(prior_labels=other, zero_shot_text=text)
        assert ran == ["zero-shot"]
        scored[text] = read_records(tmp_path / "out" / "records" / rows[2]["records"][0])[1]
        evaluate_with(prior_labels=other, zero_shot_text=text)
        assert ran == []
    assert scored[None] != scored["?"] != scored["+"]


def test_a_bare_score_keeps_the_first_candidate_unless_another_is_higher_by_the_margin(bed, tmp_path):
    generator = torch.Generator().manual_seed(0)
    scores_NK = torch.randint(0, 9, (300, 4), generator=generator) / 8  # ties, and gaps of just the margin
    mask_NK = torch.rand(300, 4, generator=generator) < 0.7
    mask_NK[:, 0] = True
    logprobs_NK = torch.randn(300, 4, generator=generator)
    for margin in (0.0, 0.25, 0.5, 1.0):
        args = arguments(bed, tmp_path, bare_margin=margin)
        fusion = Policy.parse("s2t-local-bare:always").decoding_config(args).fusion
        choices = fused_scores(scores_NK, logprobs_NK, mask_NK, fusion).argmax(-1).tolist()
        for choice, scores, mask in zip(choices, scores_NK.tolist(), mask_NK.tolist()):
            offered = [k for k in range(4) if mask[k]]
            best = max(offered[1:], key=lambda k: scores[k], default=0)  # the first of equals
            assert choice == (best if scores[best] > scores[0] + margin else 0)
        for text in ("s2t:always", "second:always", "random:always", "zero-shot:always"):
            assert Policy.parse(text).fusion(args) == FusionWeights()
        assert Policy.parse("s2t-local:always").fusion(args) is None  # the adapter's own
    assert choices == [0] * 300  # nothing in [0, 1] is higher by 1


def test_a_margin_is_run_anew_and_flips_by_it_alone(bed, tmp_path):
    policies = ["s2t-local-bare:always", "s2t-local:always"]

    def measure(margin):
        rows = evaluate(arguments(bed, tmp_path, policies=policies, bare_margin=margin))["rows"]
        _, records = read_records(tmp_path / "records" / rows[0]["records"][0])
        flips = 0
        for record in records:
            for step, (_, candidates) in record["asked"].items():
                ids, scores = [candidate[0] for candidate in candidates], [candidate[1] for candidate in candidates]
                gap = max(scores[1:]) - scores[0]
                if abs(gap - margin) > 1e-3:  # four decimals are kept
                    expected = ids[1 + scores[1:].index(max(scores[1:]))] if gap > margin else ids[0]
                    assert record["tokens"][int(step)] == expected
                flips += record["kinds"][int(step)] == "f"
        return rows, flips

    fused, flips = [], {}
    for margin in (0.0, 0.1, 1.0, 0.0):
        rows, found = measure(margin)
        assert flips.setdefault(margin, found) == found  # and back
        fused.append(rows[1]["flip_rate"])
    assert len(set(fused)) == 1 and fused[0] > 0  # with the adapter's own fusion nothing changes
    assert flips[0.0] > flips[0.1] > flips[1.0] == 0  # scores are in [0, 1]: nothing can be higher by 1


def test_labels_of_another_tokenizer_are_no_prior(bed, tmp_path):
    labels = make_labels(bed, tmp_path / "labels", ["a"], [40])
    write_header(tmp_path / "labels", replace(read_header(labels), vocab_hash="0" * 16))
    with pytest.raises(ValueError, match="`prior_labels`: .* was made with another tokenizer"):
        evaluate(arguments(bed, tmp_path / "out", policies=["prior:always"], prior_labels=labels))


def test_greedy_inherits_nothing_from_the_checkpoint(bed, tmp_path):
    """The authors' greedy baseline took the checkpoint's repetition penalty and their own loop did not."""
    evaluate(arguments(bed, tmp_path, policies=["greedy", "s2t:random:0.001"]))
    _, greedy = read_records(tmp_path / "records" / "greedy.jsonl")
    _, selected = read_records(tmp_path / "records" / "s2t_random_0.001.jsonl")
    untouched = [i for i, record in enumerate(selected) if "f" not in record["kinds"]]
    assert untouched
    assert [greedy[i]["text"] for i in untouched] == [selected[i]["text"] for i in untouched]


def test_examples_say_what_the_student_would_have_written(bed):
    tokenizer = AutoTokenizer.from_pretrained(bed / "student")
    a, b, c = tokenizer("27+", add_special_tokens=False)["input_ids"]
    problem = Problem("x", "How many?\n", "so #### 27")
    record = {"tokens": [a, b, 1], "kinds": "k.f", "student_tokens": {"2": c}}
    example = make_example(tokenizer, problem, {"text": "26"}, record, Policy.parse("s2t-local:always"))
    assert example["gold"] == "27"
    assert example["tokens"] == [
        {"text": "2", "kind": "kept"},
        {"text": "7", "kind": "plain"},
        {"text": "", "kind": "flipped", "student": "+"},
    ]


def test_labelled_problems_are_refused(bed, tmp_path):
    row = {"prompt": "Tom has 2 nuts.\n", "answer": "2"}
    (tmp_path / "leak.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    args = arguments(bed, tmp_path, dataset=str(tmp_path / "leak.jsonl"), label_dirs=[str(bed / "labels")])
    with pytest.raises(ValueError, match="holds 1 of the 1 problems to evaluate .ids [0-9a-f]{16}.*another split"):
        evaluate(args)
    assert not (tmp_path / "records").exists()
    prior = arguments(bed, tmp_path, dataset=str(tmp_path / "leak.jsonl"), prior_labels=str(bed / "labels"))
    with pytest.raises(ValueError, match="`prior_labels`: .*labels' holds 1 of the 1 problems to evaluate"):
        evaluate(prior)
    args.allow_leaks, args.policies = True, ["greedy"]
    report = evaluate(args)
    assert len(report["meta"]["leaks"]) == 1 and "holds 1 of the 1 problems" in report["meta"]["leaks"][0]
    assert "LEAK, these figures are not held out" in format_table(report)


def test_prompts_are_put_as_in_the_labels(bed, tmp_path):
    """Thresholds and fusion were measured on prompts in a template, and nothing said that these were in none."""
    model = tmp_path / "student"
    shutil.copytree(bed / "student", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined %}Tom{% endif %}"
    )
    tokenizer.save_pretrained(model)
    folder = tmp_path / "labels"
    make_labels(bed, folder, ["a"], [40])
    thinking = {"chat_template": True, "system_prompt": None, "chat_template_kwargs": {"enable_thinking": True}}
    settings = {"model": str(model), "policies": ["greedy"], "adapters": [], "teacher_model": None, "limit": 2}

    def evaluate_with(**changes):
        return evaluate(arguments(bed, tmp_path / "out", **settings | changes))

    for source, given, name in (
        (thinking, {}, "chat_template"),
        (thinking, {"chat_template": True}, "chat_template_kwargs"),
        (
            thinking,
            {"chat_template": True, "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs",
        ),
        (thinking | {"system_prompt": "Tom"}, thinking, "system_prompt"),
        ({"chat_template": False, "system_prompt": None}, thinking, "chat_template"),  # as older labels say it
    ):
        write_header(folder, replace(read_header(folder), prompt_source=source))
        for argument, value in (("label_dirs", [str(folder)]), ("eval_labels", str(folder))):
            with pytest.raises(ValueError, match=f"`{name}` must be as in the labels of `{argument}`"):
                evaluate_with(**given | {argument: value})
    assert not (tmp_path / "out").exists()
    write_header(folder, replace(read_header(folder), prompt_source=thinking))
    report = evaluate_with(**thinking, label_dirs=[str(folder)])
    assert report["meta"]["settings"]["chat_template_kwargs"] == {"enable_thinking": True}
    before = (tmp_path / "out" / "records" / "greedy.jsonl").read_bytes()
    evaluate_with(**thinking | {"chat_template_kwargs": '{"enable_thinking": true}'})
    assert (tmp_path / "out" / "records" / "greedy.jsonl").read_bytes() == before  # nothing is run again
    evaluate_with(**thinking | {"chat_template_kwargs": None})
    assert (tmp_path / "out" / "records" / "greedy.jsonl").read_bytes() != before


def test_labels_that_an_adapter_has_seen_are_refused(bed, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(bed / "adapter", adapter)
    write_seen_problems(adapter, "tuning", ["a"])
    labels = str(bed / "labels")
    args = arguments(bed, tmp_path / "out", adapters=[str(adapter)], policies=["greedy"], eval_labels=labels)
    with pytest.raises(ValueError, match=r"`eval_labels` shares 1 of its 2 problems .*in tuning \(1\).*allow_leaks"):
        evaluate(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["s2t:kl:0.1"], "teacher_model": None}, "'s2t:kl:0.1' needs `teacher_model`, got none"),
        ({"policies": ["s2t-local:always"], "adapters": []}, "'s2t-local:always' needs `adapters`, got none"),
        ({"policies": ["second:margin:0.1"], "adapters": []}, "needs `thresholds_from`"),
        ({"policies": ["s2t:kl:0.3"]}, "no calibrated threshold for target_rate=0.3"),
        ({"policies": ["greedy", "greedy"]}, "greedy more than once"),
        ({"policies": ["prior:always"]}, "'prior:always' needs `prior_labels`, got none"),
        ({"zero_shot_text": ""}, "`zero_shot_text` must begin with a token that the model knows, got ''"),
        ({"zero_shot_text": "é"}, "`zero_shot_text` must begin with a token that the model knows, got 'é'"),
        ({"prior_labels": "./nowhere"}, "`prior_labels`: './nowhere' does not exist"),
        ({"max_new_tokens": 1000}, r"`max_new_tokens` must be at most \d+ \(context of 128 tokens"),
        ({"model": "./nowhere"}, "`model`: './nowhere' does not exist"),
        ({"adapters": ["./nowhere"]}, "`adapters`: './nowhere' does not exist"),
        ({"chat_template": True}, "`chat_template` needs a tokenizer that has one"),
        ({"chat_template_kwargs": '{"a": 1}'}, "`chat_template_kwargs` needs `chat_template`, got {'a': 1}"),
    ],
)
def test_bad_arguments_fail_before_anything_is_written(bed, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(arguments(bed, tmp_path, **changes))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"answer_style": "x"}, "`answer_style` must be one of 'hash', 'math', 'auto', got 'x'"),
        ({"chat_template_kwargs": "[1]"}, "`chat_template_kwargs` must be a JSON object"),
        ({"bare_margin": -0.1}, r"`bare_margin` must be in \[0, 1\], as scores are, got -0.1"),
        ({"bare_margin": 1.5}, r"`bare_margin` must be in \[0, 1\], as scores are, got 1.5"),
        ({"bare_margin": float("nan")}, r"`bare_margin` must be in \[0, 1\], as scores are, got nan"),
        ({"num_candidates": 80}, r"`num_candidates` must be an integer in \[1, 64\], got 80"),
    ],
)
def test_bad_values(bed, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(bed, tmp_path, **changes)


def test_default_policies_are_those_that_can_run(bed, tmp_path):
    def labels_of(has_thresholds=False, has_router=False, **changes):
        policies = choose_policies(arguments(bed, tmp_path, **changes), has_thresholds, has_router)
        return [policy.label for policy in policies]

    alone = ["greedy", "maj@8", "second:always", "zero-shot:always"]
    assert labels_of(teacher_model=None, adapters=[]) == alone
    every = list(DEFAULT_POLICIES)
    assert labels_of(True, True, prior_labels="labels") == every
    assert labels_of(True, True) == [label for label in every if label != "prior:always"]
    without = [label for label in every if "router" not in label]
    assert labels_of(True, prior_labels="labels") == without


def test_the_default_table_goes_without_what_was_not_calibrated(bed, tmp_path, capsys):
    """An adapter straight from training ended in an error that named a row nobody had asked for."""
    adapter = shutil.copytree(bed / "adapter", tmp_path / "adapter")
    config = SelectorConfig.from_pretrained(adapter)

    def labels_of(thresholds, **changes):
        replace(config, thresholds=thresholds).save_pretrained(adapter)
        plan = make_plan(arguments(bed, tmp_path / "out", adapters=[str(adapter)], **changes))
        return [policy.label for policy in plan.policies], capsys.readouterr().out

    always = [label for label in DEFAULT_POLICIES if label.count(":") < 2 and label != "prior:always"]
    labels, said = labels_of({})
    assert labels == always and "s2t-local:entropy:0.05" in said and "(s2t calibrate)" in said
    labels, said = labels_of({"margin": {0.05: -0.5}})
    assert labels == [label for label in DEFAULT_POLICIES if label in always or "margin:0.05" in label]
    assert "s2t:entropy:0.05" in said and "margin" not in said
    with pytest.raises(ValueError, match="'margin' has no calibrated threshold for target_rate=0.05"):
        labels_of({}, policies=["greedy", "s2t-local:margin:0.05"])


@pytest.mark.parametrize(("teacher", "note"), [(None, "model m; no teacher."), ("t", "model m, teacher t.")])
def test_the_table_says_which_rows_need_the_teacher(teacher, note):
    row = dict.fromkeys(("trigger", "target_rate", "achieved_rate", "flip_rate", "helped", "hurt", "mcnemar_p"))
    row |= {"policy": "s2t", "num_seeds": 1, "accuracy": 40.0, "accuracy_ci": [35.0, 45.0], "uses_teacher": True}
    meta = {"num_problems": 5, "dataset": "d", "model": "m", "teacher_model": teacher, "leaks": []}
    table = format_table({"rows": [row | {"seconds_vs_greedy": None}], "meta": meta, "hit_at_k": {}})
    assert note in table and "None" not in table and "LLM" not in table
    assert "teacher: the large model runs at inference" in table and "  teacher  " in table.splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# The picture, and the data of the demo


def test_report_is_drawn_1400_pixels_wide(tmp_path):
    row = {"trigger": None, "target_rate": None, "accuracy": 40.0, "accuracy_ci": [35.0, 45.0], "num_seeds": 1}
    tokens = [{"text": "So $2", "kind": "plain"}, {"text": "\n", "kind": "flipped", "student": ""}]
    tokens += [{"text": " long" * 30, "kind": "kept"}, {"text": "7", "kind": "flipped", "student": " "}]
    example = {"prompt": "How many $x$?\n", "gold": "7", "greedy_text": "a\nb", "tokens": tokens}
    small = {
        "meta": {"model": "m", "teacher_model": None, "dataset": "d", "num_problems": 5},
        "rows": [row | {"policy": "greedy"}, row | {"policy": "s2t-local", "trigger": "kl", "target_rate": 0.1}],
        "hit_at_k": {"1": 0.5, "8": 0.97},
        "examples": [example, example],
    }
    picture = report.draw(small, tmp_path / "report.png")
    width = int.from_bytes(picture.read_bytes()[16:20], "big")
    assert width == 1400
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    with pytest.raises(ValueError, match="has no rows"):
        report.draw(small | {"rows": []}, tmp_path / "none.png")


def test_text_is_laid_out_on_lines():
    tokens = [{"text": "ab", "kind": "plain"}, {"text": "cd\nef", "kind": "kept"}]
    tokens += [{"text": "\n", "kind": "flipped", "student": "x"}, {"text": "123456", "kind": "plain"}]
    pieces = [(p.line, p.column, p.text, p.student) for p in report.lay_out(tokens, 4)]
    assert pieces == [
        (0, 0, "ab", None),
        (0, 2, "cd", None),
        (1, 0, "ef", None),
        (1, 2, "¶", "x"),
        (2, 0, "1234", None),
        (3, 0, "56", None),
    ]


def test_a_data_set_is_divided_into_disjoint_parts(tmp_path):
    def write(name, start, number):
        rows = [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(start, start + number)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("train.jsonl", 0, 200)
    write("test.jsonl", 190, 30)  # ten of them are in the training file too
    parts = splits.divide(str(tmp_path), demo.part_sizes(50, 20), seed=0)
    assert {name: len(parts[name]) for name in ("label", "test")} == {"label": 50, "test": 20}
    assert 20 < len(parts["tuning"]) <= 30 and 20 < len(parts["calibration"]) <= 30
    ids = [problem.id for part in parts.values() for problem in part]
    assert len(ids) == len(set(ids))

    (tmp_path / "test.jsonl").unlink()
    alone = splits.divide(str(tmp_path), demo.part_sizes(1000, 1000), seed=0)
    assert sum(map(len, alone.values())) == 200
    with pytest.raises(ValueError, match="no prompt column named prompt or question or problem"):
        write_bad = tmp_path / "bad.jsonl"
        write_bad.write_text('{"text": "x"}\n', encoding="utf-8")
        splits.divide(str(write_bad), demo.part_sizes(10, 10), 0)


def test_demo_takes_the_configs_of_a_data_set_that_has_them(tmp_path):
    args = demo.parse_arguments(["--dataset", str(tmp_path)])
    assert demo.config_of("label", args) == demo.config_of("train", args) == []
    for stage in ("label", "train"):
        (tmp_path / f"{stage}.yaml").write_text("seed: 1\n")
        assert demo.config_of(stage, args) == ["--config", str(tmp_path / f"{stage}.yaml")]
    given = demo.parse_arguments(["--dataset", str(tmp_path), "--label_config", "mine.yaml"])
    assert demo.config_of("label", given) == ["--config", "mine.yaml"]


@pytest.mark.parametrize("stage", ["label", "train"])
def test_demo_refuses_a_config_that_there_is_not(monkeypatch, tmp_path, stage):
    folder = tmp_path / "run"
    monkeypatch.setattr(
        sys, "argv", ["demo.py", f"--{stage}_config", str(tmp_path / "none.yaml"), "--output_dir", str(folder)]
    )
    with pytest.raises(FileNotFoundError, match=f"`{stage}_config`: .*none.yaml' does not exist"):
        demo.main()
    assert not folder.exists()


def test_demo_puts_all_prompts_alike(tmp_path):
    """A system prompt in the YAML for labels was that of the training labels only."""
    (tmp_path / "mine.yaml").write_text(
        "chat_template: true\nsystem_prompt: Be brief.\nchat_template_kwargs: {think: false}\n"
    )

    def prompt_arguments(**changes):
        args = demo.parse_arguments(["--dataset", str(tmp_path), "--label_config", str(tmp_path / "mine.yaml")])
        settings = {"chat_template": True, "system_prompt": "Be brief.", "chat_template_kwargs": {"think": False}}
        vars(args).update(settings | changes)
        return demo.prompt_arguments(args)

    assert prompt_arguments() == (
        ["--chat_template", "true", "--system_prompt", "Be brief.", "--chat_template_kwargs", '{"think": false}']
    )
    for name, value in (("system_prompt", None), ("chat_template_kwargs", None), ("chat_template", False)):
        with pytest.raises(ValueError, match=f"`{name}` of the demo must be that of `label_config`"):
            prompt_arguments(**{name: value})


def test_demo_checks_answers_and_template_before_it_labels(monkeypatch, tmp_path, bed):
    def started(command, **streams):
        process = get_context("fork").Process(target=jobs_module.run_command, args=(command[1:], os.devnull))
        process.start()
        return process

    monkeypatch.setattr(jobs_module, "OwnProcess", started)  # spares an interpreter its imports

    def run(*flags):
        command = ["demo.py", "--model", str(bed / "student"), "--teacher_model", str(bed / "student")]
        command += ["--dataset", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "run"), *flags]
        monkeypatch.setattr(sys, "argv", command)
        demo.main()

    rows = [{"prompt": f"Tom has {i} nuts.\n", "answer": str(i) if i % 4 else None} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="`chat_template_kwargs` needs `chat_template`"):
        run("--chat_template_kwargs", '{"think": false}')
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be a JSON object"):
        run("--chat_template_kwargs", "[1]")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"`dataset`: \d+ of the \d+ problems of the part test have no answer"):
        run()
    assert not (tmp_path / "run" / "labels").exists()


def test_demo_refuses_a_folder_of_other_settings(tmp_path):
    demo.check_same_run(tmp_path / "demo.json", {"model": "a", "seed": 0})
    demo.check_same_run(tmp_path / "demo.json", {"model": "a", "seed": 0})
    with pytest.raises(ValueError, match="`output_dir` .* was made with model='a', now model='b'"):
        demo.check_same_run(tmp_path / "demo.json", {"model": "b", "seed": 0})


def test_progress_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"load: 3/3 [00:00<00:00]\r 10/500 [00:01<\r 125/500 [00:02<\r 2/6 [00:00<")
    assert read_progress(log) == 0.25
    assert read_progress(tmp_path / "none") == 0


#: In place of each recipe: notes its output and threads, and writes what the demo reads. Fails where there is `fail`.
STAND_IN = """
import os, sys, time
from pathlib import Path
folder, output = Path(__file__).parent, Path(sys.argv[1])
with open(folder / "order", "a") as order:
    order.write(f"{output.relative_to(folder / 'run')} {os.environ['OMP_NUM_THREADS']}\\n")
name = (folder / "fail").read_text() if (folder / "fail").exists() else "nothing"
if name in str(output):
    print("out of luck")
    sys.exit(5)
time.sleep(60 * (name == "none, but wait"))
if output.suffix:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text('{"prompt": "p", "answer": "1"}')
    (output.parent / "s2t_config.json").write_text('{"metrics": {"agree_at_1": 0.5}}')
else:
    output.mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def plan_demo(tmp_path):
    """Plans the demo, with a stand-in for each recipe."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def plan(*flags, num_parallel=2, threads="3"):
        args = demo.parse_arguments(["--num_seeds", "1", "--max_new_tokens", "9", "--batch_size", "8", *flags])
        jobs = Jobs(tmp_path / "run", num_parallel, {"OMP_NUM_THREADS": threads}, forks=False, keep=True)
        stages = demo.plan(args, jobs, ["--dtype", "float32"])
        for job in jobs.all.values():
            job.command = [str(tmp_path / "stand_in.py"), str(job.output), *job.command[1:]]
        return jobs, stages

    return plan


FIRST = ["data/test.jsonl"]
LABELLED = [f"labels/{part}" for part in ("label", "tuning", "calibration", "test")]
SELECTOR = [f"adapter-seed0/{name}" for name in ("trainer_state.json", ROUTER_WEIGHTS_NAME, CALIBRATION_NAME)]
LAST = ["report.json", "report.html"]


def outputs_of(order) -> list[str]:
    return [line.split()[0] for line in order.read_text().splitlines()]


def test_the_demo_plans_each_recipe_behind_what_it_reads(tmp_path):
    args = demo.parse_arguments(["--max_new_tokens", "9", "--batch_size", "8", "--num_seeds", "2", "--seed", "4"])
    jobs = Jobs(tmp_path)
    stages = demo.plan(args, jobs, ["--dtype", "float32"])
    scripts = [{Path(job.arguments()[0]).name for job in stage.jobs} for stage in stages]
    assert scripts == [
        {name} for name in "corpus.py label.py train.py train_router.py calibrate.py eval.py report.py".split()
    ]
    assert [len(stage.jobs) for stage in stages] == [1, 4, 2, 2, 2, 1, 1]
    assert {job for stage in stages for job in stage.jobs} == {*jobs.all.values()}
    before = set()
    for job in (job for stage in stages for job in stage.jobs):
        assert before.issuperset(job.needs)
        command = job.arguments()
        read = {other for other in before if any(str(other.path) == word for word in command)}
        assert read <= behind(job), job.name  # nothing is read that may not be there
        before.add(job)
    train, calibrate = (jobs.all[name].arguments() for name in ("selector-seed5", "calibration-seed5"))
    assert train[train.index("--seed") + 1] == "5" and "--dtype" in train
    assert calibrate[calibrate.index("--labels") + 1] == str(tmp_path / "labels" / "calibration")
    assert "--dtype" not in jobs.all["evaluation"].arguments()


def behind(job) -> set:
    """All that a job waits for."""
    return set(job.needs).union(*map(behind, job.needs))


def test_the_demo_runs_each_job_once_and_evaluates_again(tmp_path, plan_demo, capfd):
    demo.run_stages(*plan_demo(), began=time.monotonic())
    done = outputs_of(tmp_path / "order")
    assert done[:1] == FIRST and sorted(done[1:5]) == sorted(LABELLED) and done[5:] == [*SELECTOR, *LAST]
    threads = {line.split()[0]: line.split()[1] for line in (tmp_path / "order").read_text().splitlines()}
    assert {threads[name] for name in LABELLED} == {"1"}  # side by side
    assert {threads[name] for name in [*FIRST, *SELECTOR, *LAST]} == {"3"}
    text = capfd.readouterr().out
    for number in range(1, 8):
        assert f"\n[{number}/7] " in text
    assert text.count("$ python ") == 10 and "so far)" in text and "seed 0, held-out decision points: agree_a" in text

    (tmp_path / "order").unlink()
    demo.run_stages(*plan_demo("--policies", "greedy"), began=time.monotonic())
    assert outputs_of(tmp_path / "order") == LAST  # it alone tells which of its policies are to be run
    text = capfd.readouterr().out
    assert text.count("Finished before.") == 5 and text.count("$ python ") == 2 and "agree_at_1 0.500" in text


def test_the_demo_asks_every_recipe_in_a_folder_without_stamps(tmp_path, plan_demo):
    """One of an earlier version: each of them skips what it finished; calibrating, which would not, is left out."""
    demo.run_stages(*plan_demo(num_parallel=1), began=time.monotonic())
    shutil.rmtree(tmp_path / "run" / "done")
    (tmp_path / "run" / "labels" / "test" / "kept").touch()
    (tmp_path / "order").unlink()
    demo.run_stages(*plan_demo(num_parallel=1), began=time.monotonic())
    assert outputs_of(tmp_path / "order") == [*FIRST, *LABELLED, *SELECTOR[:2], *LAST]
    (tmp_path / "order").unlink()
    demo.run_stages(*plan_demo("--batch_size", "4", num_parallel=1), began=time.monotonic())
    assert outputs_of(tmp_path / "order") == [*LABELLED, *SELECTOR[:2], *LAST]  # their commands, or inputs, are new
    assert (tmp_path / "run" / "labels" / "test" / "kept").exists()  # another batch size costs no label


@pytest.mark.parametrize("num_parallel", [1, 2])
def test_a_job_of_the_demo_that_fails_tells_how_to_run_it_alone(tmp_path, plan_demo, capfd, num_parallel):
    (tmp_path / "fail").write_text("labels/label")
    with pytest.raises(SystemExit) as error:
        demo.run_stages(*plan_demo(num_parallel=num_parallel), began=time.monotonic())
    assert error.value.code == 5  # that of the recipe
    out, err = capfd.readouterr()
    command = f"python {tmp_path / 'stand_in.py'} {tmp_path / 'run' / 'labels' / 'label'} "
    assert f"Failed (exit status 5): {command}" in err and "Stage 2 of 7 failed; the command above" in err
    assert "out of luck" in (out if num_parallel == 1 else err)
    assert outputs_of(tmp_path / "order")[-1] in LABELLED  # no later stage has begun
    if num_parallel == 1:
        assert outputs_of(tmp_path / "order") == [*FIRST, "labels/label"]
    (tmp_path / "fail").unlink()
    before = outputs_of(tmp_path / "order")
    demo.run_stages(*plan_demo(num_parallel=num_parallel), began=time.monotonic())
    assert outputs_of(tmp_path / "order")[len(before) :][-5:] == [*SELECTOR, *LAST]
    assert "data/test.jsonl" not in outputs_of(tmp_path / "order")[len(before) :]


def test_a_demo_that_is_stopped_goes_on_where_it_was(tmp_path, plan_demo):
    """Ctrl-C reaches the demo and the recipes beside each other."""
    jobs, stages = plan_demo()
    demo.run_stage(jobs, stages[0])
    (tmp_path / "fail").write_text("none, but wait")

    def stage():
        os.setsid()
        run(lambda: demo.run_stages(jobs, stages[1:2], began=time.monotonic()))

    process = get_context("fork").Process(target=stage)
    process.start()
    try:
        for _ in range(3000):
            if len(outputs_of(tmp_path / "order")) == 3:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        process.join(180)
        assert process.exitcode == 130
    finally:
        process.kill()
    (tmp_path / "fail").unlink()
    assert not list((tmp_path / "run" / "done").glob("labels*"))
    demo.run_stages(jobs, stages, began=time.monotonic())
    assert sorted(outputs_of(tmp_path / "order")[3:7]) == sorted(LABELLED)
