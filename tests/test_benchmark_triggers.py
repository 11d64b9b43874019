"""What benchmarks/triggers.py counts, writes and draws, on a few tokens worked out by hand. Trains nothing."""

import argparse
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import triggers
from corpus import build_split
from datasets import Dataset
from setting import random_model
from trigger_study import FIRED, PAIRS, TRIGGERS, prepare
from trigger_study.cost import time_readings
from trigger_study.intervals import NUM_RESAMPLES, draw_weights, interval_of, ratio_interval, resampled_auc
from trigger_study.measure import add_forced, empty_report
from trigger_study.picture import draw, spread_out
from trigger_study.prepare import policies_of, prepare_babyllama, write_fresh_problems
from trigger_study.rows import (
    MAX_CURVE_POINTS,
    check_row,
    decoded_row,
    fired_rows,
    flip_rows,
    forced_row,
    summarize_aucs,
    tell_apart,
    thin_curve,
)
from trigger_study.tables import format_report
from trigger_study.tokens import decide_everywhere, read_tokens, threshold_of
from triggers import main, parse_arguments

from transformers_s2t import FusionWeights, SelectorConfig
from transformers_s2t.calibration.router_training import auc
from transformers_s2t.calibration.scored_points import TARGET_RATES, ScoredPoints
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME, S2T_CONFIG_NAME


ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "triggers.py"
RESULTS = ROOT / "benchmarks" / "results" / "triggers.json"
PAGE = ROOT / "docs" / "triggers.md"

CONFIG = SelectorConfig(reserved_token_ids=(90, 91), warmup_tokens=1)
SETTINGS = ["--num_seeds", "2", "--rates", "0.1", "0.5"]


def make_row(id, margins, divergences, points):
    """A labelled text of two prompt tokens; `points`: place among the generated -> (student, teacher) log-probs."""
    num_tokens = len(margins)
    return {
        "problem_id": id,
        "rollout": 0,
        "input_ids": list(range(3, 5 + num_tokens)),
        "prompt_length": 2,
        "divergence": divergences,
        "entropy": [m + 1.0 for m in margins],
        "margin": margins,
        "positions": [2 + at for at in points],
        "candidate_ids": [[3, 4, 5] for _ in points],
        "student_logprobs": [[math.log(p) for p in student] for student, _ in points.values()],
        "teacher_logprobs": [[math.log(p) for p in teacher] for _, teacher in points.values()],
        "teacher_top_id": [3 for _ in points],
    }


STUDENT = (0.6, 0.3, 0.01)  # the third is below the floor
KEEP, SWITCH, UNSEEN = (0.7, 0.2, 0.1), (0.2, 0.7, 0.1), (0.2, 0.1, 0.7)
CLEAR, DOUBT = -9.0, math.log(0.5)
# Tokens 0 to 6. Warm-up: 0 and 4. A choice: 0, 1, 2, 4, 5. To be corrected: 0, 2, 5.
LABELS = Dataset.from_list(
    [
        make_row("a", [DOUBT, DOUBT, DOUBT, CLEAR], [0.9, 0.1, 0.8, 0.0], {0: (STUDENT, SWITCH), 1: (STUDENT, KEEP),
                                                                         2: (STUDENT, SWITCH)}),
        make_row("b", [DOUBT, DOUBT, CLEAR], [0.2, 0.7, 0.3], {0: (STUDENT, UNSEEN), 1: (STUDENT, SWITCH)}),
    ]
)  # fmt: skip


def make_points():
    """The points of `LABELS`: the selector would switch at tokens 0 and 1, fusion with a switch of 1 everywhere."""
    rows = [(row, n) for row in LABELS for n in range(len(row["positions"]))]
    scores = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.5, 0.0, 0.0]])
    student, teacher = (
        torch.tensor([row[name][n] for row, n in rows]) for name in ("student_logprobs", "teacher_logprobs")
    )
    return ScoredPoints(
        scores,
        torch.tensor([[3, 4, 5]] * 5),
        student,
        teacher,
        student >= student[:, :1] + math.log(0.05),
        torch.tensor([3] * 5),
        torch.tensor([row["divergence"][row["positions"][n] - 2] for row, n in rows]),
    )


@pytest.fixture(scope="module")
def tokens():
    return read_tokens(LABELS, CONFIG, [torch.arange(4.0), torch.arange(3.0)])


def test_every_generated_token_is_read(tokens):
    assert list(tokens.values) == list(TRIGGERS)
    assert tokens.late_N.tolist() == [False, True, True, True, False, True, True]
    assert tokens.choice_N.tolist() == [True, True, True, False, True, True, False]
    gain = math.log(0.7) - math.log(0.2)
    assert tokens.gain_N.tolist() == pytest.approx([gain, 0, gain, 0, 0, gain, 0])
    assert tokens.values["kl"].tolist() == pytest.approx([0.9, 0.1, 0.8, 0.0, 0.2, 0.7, 0.3])
    assert tokens.values["router"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert tokens.problem_N.tolist() == [0, 0, 0, 0, 1, 1, 1]
    again = read_tokens(LABELS, CONFIG, seed=0).values["random"]
    assert torch.equal(again, tokens.values["random"])
    assert not torch.equal(again, read_tokens(LABELS, CONFIG, seed=1).values["random"])


def test_aucs_are_those_of_hand(tokens):
    """Behind the warm-up: corrected are tokens 2 and 5, kept are 1, 3 and 6."""
    figures, resamples = tell_apart(tokens)
    assert figures["kl"]["auc"] == 1 and figures["kl"]["average_precision"] == 1
    assert figures["margin"]["auc"] == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-5)  # 1 is as much in doubt as 2 and 5
    assert figures["router"]["auc"] == pytest.approx((1.5 + 0.5) / 6, abs=1e-5)  # 2, 1 against 1, 3, 2
    assert (figures["margin"]["auc_choice"], figures["kl"]["auc_gain_choice"]) == (0.5, 1)
    assert (figures["kl"]["tokens"], figures["kl"]["positives"]) == (5, 2)
    assert resamples["kl"].shape == (NUM_RESAMPLES,) and figures["kl"]["auc_ci"] == [1, 1]


def test_resampled_aucs_are_the_aucs_of_resampled_problems():
    generator = torch.Generator().manual_seed(0)
    values_N = torch.randint(0, 9, (300,), generator=generator).float()
    positive_N = torch.rand(300, generator=generator) < 0.1 + 0.05 * values_N
    problem_N = torch.randint(0, 6, (300,), generator=generator)
    found_R = resampled_auc(values_N, positive_N, problem_N)
    for weights_P, found in list(zip(draw_weights(6), found_R))[:20]:
        drawn = torch.cat([torch.where(problem_N == p)[0].repeat(int(w)) for p, w in enumerate(weights_P)])
        assert found == pytest.approx(auc(values_N[drawn], positive_N[drawn]))
    low, high = interval_of(found_R)
    assert low < auc(values_N, positive_N) < high


def test_a_ratio_has_an_interval_over_problems():
    ones, zeros = np.ones(50), np.zeros(50)
    assert ratio_interval(ones, ones, 100) == [100, 100] and ratio_interval(zeros, ones) == [0, 0]
    low, high = ratio_interval(np.arange(50) < 25.0, ones)
    assert 0.33 < low < 0.42 and 0.58 < high < 0.67  # 0.5 -+ 1.96 x 0.0707


def test_curves_are_thinned(tokens):
    values_N, positive_N = torch.arange(5000.0), torch.arange(5000) % 3 == 0
    curve = thin_curve(values_N, positive_N)
    assert len(curve["recall"]) == len(curve["precision"]) <= MAX_CURVE_POINTS
    assert curve["recall"] == sorted(curve["recall"]) and curve["recall"][-1] == 1
    assert curve["precision"][-1] == pytest.approx(1 / 3, abs=1e-3)


def test_the_summary_pairs_the_router_with_the_better_one(tokens):
    found = [tell_apart(tokens)] * 2
    means, gain = summarize_aucs("babyllama", [f for f, _ in found], [r for _, r in found])
    assert [row["trigger"] for row in means] == list(TRIGGERS)
    assert all(row["by_seed"] == [row["auc"]] * 2 for row in means)
    assert gain["difference"] == pytest.approx(1 / 3 - 2.5 / 3, abs=1e-4) and gain["better"] in ("entropy", "margin")
    assert gain["ci"][0] <= gain["difference"] <= gain["ci"][1]


def test_agreement_is_counted_token_by_token(tokens):
    decisions = decide_everywhere(LABELS, make_points(), FusionWeights())
    assert decisions.first_right_N.tolist() == [False, True, False, True, True, False, True]
    assert decisions.chosen_right_N.tolist() == [True, False, False, True, True, False, True]
    assert decisions.flipped_N.tolist() == [True, True, False, False, False, False, False]
    row = forced_row(torch.ones(7, dtype=torch.bool), tokens, decisions)  # the warm-up never fires
    assert (row["helped"], row["hurt"], row["other"]) == (0, 1, 0)
    assert row["accuracy"] == pytest.approx(100 * 3 / 7, abs=1e-4)
    assert row["ceiling"] == pytest.approx(100 * 6 / 7, abs=1e-4)  # token 0 stays wrong
    assert (row["achieved_rate"], row["asked_rate"]) == pytest.approx((5 / 7, 3 / 7), abs=1e-6)
    row = forced_row(tokens.values["kl"] >= 0.75, tokens, decisions)
    assert (row["helped"], row["hurt"], row["achieved_rate"]) == (0, 0, pytest.approx(1 / 7, abs=1e-6))
    assert row["accuracy"] == pytest.approx(100 * 4 / 7, abs=1e-4) and row["ceiling"] == pytest.approx(
        500 / 7, abs=1e-4
    )

    everywhere = decide_everywhere(LABELS, make_points(), FusionWeights(1, 0, 1))
    row = forced_row(torch.ones(7, dtype=torch.bool), tokens, everywhere)
    assert (row["helped"], row["hurt"]) == (2, 1) and row["accuracy"] == pytest.approx(500 / 7, abs=1e-4)


def test_what_fires_is_told_in_three_kinds(tokens):
    rows = fired_rows("embedded", 0, tokens, [2 / 7, 5 / 7])
    assert [row["trigger"] for row in rows] == [name for name in TRIGGERS for _ in range(2)]
    kinds = {(row["trigger"], round(row["rate"] * 7)): [row[name] for name in FIRED] for row in rows}
    assert kinds["kl", 2] == [1, 0, 0]  # tokens 2 and 5
    for trigger in TRIGGERS:
        assert kinds[trigger, 5] == pytest.approx([2 / 5, 1 / 5, 2 / 5], abs=1e-5)
    assert kinds["router", 2] == pytest.approx([1 / 3, 0, 2 / 3], abs=1e-5)  # 3, and 2 and 6, which tie


def test_points_in_another_order_are_refused():
    with pytest.raises(ValueError, match="not in the order"):
        decide_everywhere(LABELS, make_points().where(torch.tensor([1, 0, 2, 3, 4])), FusionWeights())


def test_flips_of_bare_and_fused(tokens):
    rows = flip_rows("embedded", 0, make_points(), FusionWeights(1, 0, 1))
    assert [row["decision"] for row in rows] == ["student", "bare", "fused"]
    assert [row["agree_at_1"] for row in rows] == [40, 40, 60] and rows[0]["points"] == 5
    assert [(row["helped"], row["hurt"], row["other"]) for row in rows] == [(0, 0, 0), (1, 1, 0), (3, 2, 0)]


def test_thresholds_count_the_warm_up_but_never_fire_there(tokens):
    assert threshold_of("random", tokens, 0.3) == 0.7
    threshold = threshold_of("kl", tokens, 2 / 7)  # not 0.9 of token 0, but 0.8 and 0.7
    assert 0.3 < threshold <= 0.7


def test_records_give_accuracy_flips_and_rates():
    greedy = [{"correct": correct} for correct in (True, True, False, False)]
    records = [
        {"correct": correct, "kinds": kinds}
        for correct, kinds in ((True, "...."), (False, ".tkf"), (True, "..ff"), (False, "...."))
    ]
    row = decoded_row(records, greedy)
    assert (row["accuracy"], row["helped"], row["hurt"], row["tokens"]) == (50, 1, 1, 16)
    assert (row["achieved_rate"], row["asked_rate"], row["flip_rate"]) == (5 / 16, 4 / 16, 3 / 16)
    assert row["achieved_ci"][0] < 5 / 16 < row["achieved_ci"][1]
    assert "achieved_rate" not in decoded_row(greedy, greedy)


def test_a_rate_within_a_fifth_of_its_target_is_close():
    common = {"pair": "embedded", "trigger": "kl", "seed": 0, "rate": 0.1, "achieved_ci": [0, 1]}
    found = [check_row(common | {"achieved_rate": rate}) for rate in (0.0801, 0.1199, 0.0799, 0.1201)]
    assert [row["is_close"] for row in found] == [True, True, False, False]
    assert found[0]["relative_error"] == pytest.approx(-0.199)


def test_one_selector_brings_what_needs_none():
    args = parse_arguments(SETTINGS)
    own, first = (policies_of(args, is_first) for is_first in (False, True))
    assert len(own) == len(set(own)) == 5 * 2 + 5 and first[: len(own)] == own
    assert len(first) == len(set(first)) == len(own) + 5 * 2 + 2
    assert {"s2t-local:random:0.5", "s2t-local-bare:router:0.1"} <= set(own) and "s2t:router:0.1" in first


def make_report(pairs=PAIRS):
    """A report as `measure` makes it, with the rows of both pairs taken from the labels above."""
    report = empty_report(parse_arguments(SETTINGS))
    for pair in pairs:
        found, everywhere = [], {}
        for seed in range(2):
            router = [torch.arange(4.0) * (1 - 2 * seed), torch.arange(3.0)]
            tokens = read_tokens(LABELS, CONFIG, router, seed)
            figures, resamples = tell_apart(tokens)
            found.append((figures, resamples))
            report["aucs"] += [{"pair": pair, "trigger": t, "seed": seed, **figures[t]} for t in TRIGGERS]
            report["rows"] += [
                {"pair": pair, "trigger": t, "seed": seed, "rate": rate, "auc": figures[t]["auc"]}
                for t in TRIGGERS
                for rate in (0.1, 0.5)
            ]
            report["fired"] += fired_rows(pair, seed, tokens, [0.1, 0.5])
            report["flips"] += flip_rows(pair, seed, make_points(), FusionWeights(1, 0, 1))
            decisions = decide_everywhere(LABELS, make_points(), FusionWeights())
            everywhere[seed] = tokens, tokens, {"fused": decisions, "bare": decisions}
        for trigger in TRIGGERS:
            curve = thin_curve(tokens.values[trigger], tokens.gain_N > 0)
            report["precision_recall"].append({"pair": pair, "trigger": trigger, "seed": 0, **curve})
        means, gain = summarize_aucs(pair, [f for f, _ in found], [r for _, r in found])
        report["auc_means"] += means
        report["router_gain"].append(gain)
        add_forced(pair, [0.1, 0.5], everywhere, report)
    report["calibration"] = [check_row(row) for row in report["rows"] if row["trigger"] != "random"]
    return report


@pytest.fixture(scope="module")
def report():
    return make_report()


def check_rows(report, pairs, num_seeds, rates):
    """Exactly one row per pair, trigger, seed and rate, with what readers of the file expect."""
    keys = [(row["pair"], row["trigger"], row["seed"], row["rate"]) for row in report["rows"]]
    assert sorted(keys) == sorted(product(pairs, TRIGGERS, range(num_seeds), rates))
    for row in report["rows"]:
        assert 0 <= row["auc"] <= 1 and 0 <= row["accuracy"] <= 100 and 0 <= row["achieved_rate"] <= 1
        low, high = row["accuracy_ci"]
        assert low <= row["accuracy"] + 1e-3 and row["accuracy"] <= high + 1e-3
        assert type(row["helped"]) is type(row["hurt"]) is int and min(row["helped"], row["hurt"]) >= 0


def test_a_report_has_one_row_per_key(report):
    check_rows(report, PAIRS, 2, (0.1, 0.5))
    assert json.loads(json.dumps(report)) == report


def test_tables_say_what_the_rows_say(report):
    plain = format_report(report)
    titles = ("How well a trigger tells", "Accuracy by trigger", "Helped and hurt", "Fusion at", "Target and achieved")
    assert all(title in plain for title in titles)
    assert "greedy 57.1" in plain and "What one reading" not in plain
    lines = format_report(report, as_markdown=True).splitlines()
    bars = [line for line in lines if line.startswith("|")]
    assert len(bars) == 6 * 2 + 2 * (5 + 7 + 5 + 5 + 3 + 4)  # heads, then rows of both pairs
    (line,) = (line for line in bars if line.startswith("| babyllama | kl | 1.000"))
    assert line == "| babyllama | kl | 1.000 | [1.000, 1.000] | 1.000 | 1.000 | 1.000 | 1.000 |"
    bare = next(line for line in bars if line.startswith("| embedded | bare"))
    assert bare == "| embedded | bare | 40.0 [40.0, 40.0] | 1 [1, 1] | 1 [1, 1] | 0 [0, 0] |"
    assert "babyllama" not in format_report(make_report(("embedded",))).split("Accuracy by")[0]


def test_the_picture_is_drawn_from_the_file(report, tmp_path, capsys):
    (tmp_path / "triggers.json").write_text(json.dumps(report))
    main(["--from_json", str(tmp_path / "triggers.json"), "--plot", str(tmp_path / "new" / "triggers.png")])
    assert (tmp_path / "new" / "triggers.png").read_bytes().startswith(b"\x89PNG")
    assert format_report(report) in capsys.readouterr().out
    draw(make_report(("embedded",)), tmp_path / "one.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "one.png", "triggers.json"]


def test_labels_that_stand_too_close_are_moved_apart():
    placed = spread_out([5.0, 5.0, 9.9, 1.0], 1.0, 0.0, 10.0)
    assert placed == [5, 6, 9.9, 1]
    assert spread_out([10.0, 9.8, 9.9], 1.0, 0.0, 10.0) == [10, 8, 9]


def test_a_reading_is_timed_beside_a_step():
    args = argparse.Namespace(shape="tiny", num_layers=2, vocab_size=200, dtype="float32", device="cpu")
    row = time_readings(random_model(args, 32, None), 3, 8, turns=2, repeats=2)
    assert (row["batch"], row["prefix"], row["layers"], row["vocab"], row["turns"]) == (3, 8, 2, 200, 2)
    for name in ("router", "entropy"):
        low, high = row[f"{name}_ratio_range"]
        assert 0 < low <= row[f"{name}_ratio"] <= high


def test_fresh_problems_are_fresh(tmp_path, monkeypatch):
    known = [row["id"] for row in build_split("calibration", 8, 1000)]
    monkeypatch.setattr(prepare, "read_labels", lambda *args, **kwargs: ({"problem_id": known[:3]}, None))
    write_fresh_problems(tmp_path / "calibration.jsonl", tmp_path, 5, 1000)
    rows = [json.loads(line) for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == known[3:]


def test_quick_is_a_preset_that_flags_win_over():
    args = parse_arguments(["--quick", "--num_test", "20"])
    assert (args.num_seeds, args.rates, args.num_test, args.num_calibration) == (1, [0.02, 0.1], 20, 200)
    args = parse_arguments(["--rates", "0.2", "0.1", "0.2"])
    assert (args.num_seeds, args.rates, args.num_test, args.num_calibration) == (3, [0.1, 0.2], 500, 1000)


BAD = {
    "--rates 0": "--rates must be in (0, 1]",
    "--rates 0.1 1.5": "--rates must be in (0, 1]",
    "--num_seeds 0": "--num_seeds must be at least 1",
    "--num_test 0": "--num_test must be at least 1",
    "--num_calibration 5": "--num_calibration must be at least 20",
    "--turns 0": "--turns must be at least 1",
    "--cost_layers 0": "--cost_layers must be at least 1",
    "--json .": "must name a file",
    "--plot x.pdf": "--plot must end in .png",
    "--run pyproject.toml": "--run must be a folder",
    "--babyllama weak-that-is-not-there tests": "--babyllama: there is no folder 'weak-that-is-not-there'",
    "--babyllama tests": "expected 2 arguments",
    "--babyllama_data tests": "--babyllama must be given",
    "--from_json not-there.json": "--from_json: there is no file",
    "--from_json pyproject.toml --json x.json": "--json must not be given",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_input_is_one_line_before_anything_is_done(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(triggers, "measure", lambda *args: pytest.fail("started"))
    with pytest.raises(SystemExit) as error:
        main(flags.split())
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert said.startswith("triggers.py: ") and message in said


def test_missing_labels_are_asked_for(tmp_path):
    args = parse_arguments(["--babyllama", "tests", "tests", "--babyllama_run", str(tmp_path)])
    with pytest.raises(ValueError, match="--babyllama_data must be given"):
        prepare_babyllama(args)
    assert not list(tmp_path.iterdir())


def test_only_what_is_missing_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "is_unlabelled", lambda folder: False)
    monkeypatch.setattr(prepare, "has_no_router", lambda adapter: not (adapter / ROUTER_WEIGHTS_NAME).is_file())
    folder = str(tmp_path)
    args = parse_arguments(["--babyllama", folder, folder, "--babyllama_run", folder, "--num_seeds", "2"])
    adapters = [tmp_path / f"adapter-seed{seed}" for seed in range(2)]
    adapters[0].mkdir()
    for name in (S2T_CONFIG_NAME, ROUTER_WEIGHTS_NAME, CALIBRATION_NAME):
        (adapters[0] / name).write_text("made by hand, before there were stamps")
    jobs = prepare.babyllama_jobs(args, adapters)
    assert [job.name for job in jobs.missing()] == ["selector-seed1", "router-seed1", "calibration-seed1"]
    assert all(str(adapters[1]) in job.arguments() for job in jobs.missing())


def test_the_first_selector_of_the_embedded_pair_brings_the_teacher(tmp_path):
    args = parse_arguments([*SETTINGS, "--run", str(tmp_path)])
    settings = {"model": "small", "teacher_model": "large", "max_new_tokens": 72}
    adapters, outputs = ([tmp_path / f"{name}{k}" for k in range(2)] for name in ("adapter", "decoded"))
    jobs = prepare.embedded_jobs(args, settings, tmp_path, adapters, outputs)
    steps = [f"{step}-seed{k}" for k in range(2) for step in ("calibration", "decoding")]
    assert [job.name for job in jobs.missing()] == ["labels", *steps]
    assert jobs.all["decoding-seed1"].needs == (jobs.all["calibration-seed1"],)
    assert jobs.all["calibration-seed1"].needs == (jobs.all["labels"],)
    assert ["teacher" in jobs.all[f"decoding-seed{k}"].arguments() for k in range(2)] == [True, False]
    (adapters[1]).mkdir()
    (adapters[1] / CALIBRATION_NAME).write_text("{}")
    jobs.all["labels"].only_if = lambda: False
    assert [job.name for job in jobs.missing()] == [steps[0], steps[1], steps[3]]


def test_what_was_measured_is_complete_and_what_the_page_shows():
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    check_rows(report, PAIRS, 3, TARGET_RATES)
    assert not report["meta"]["skipped"] and len(report["cost"]) == 4
    assert len(report["precision_recall"]) == 10 and len(report["calibration"]) == 2 * 4 * 3 * 6
    assert all(len(curve["recall"]) <= MAX_CURVE_POINTS for curve in report["precision_recall"])
    page = PAGE.read_text(encoding="utf-8")
    assert format_report(report, as_markdown=True) in page
    assert "(triggers.png)" in page and (PAGE.parent / "triggers.png").is_file()
