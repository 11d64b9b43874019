"""recipes/fidelity.py and estimates.py: agreement with the teacher by divergence, against loops over points."""

import json

import numpy as np
import pytest
import torch
from tiny import RESERVED, lora_model, make_selector, tiny_model
from tiny_labels import make_uneven_labels, tiny_tokenizer

from s2t_recipes import estimates
from s2t_recipes import records as records_module
from s2t_recipes.evaluation import agreement, fidelity
from s2t_recipes.report import charts
from transformers_s2t import FusionWeights, SelectorConfig
from transformers_s2t.calibration.scored_points import score_labels
from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.reserved_tokens import vocab_hash


NUM_CANDIDATES, RATIO = 3, 0.3  # of four; some of them are below the floor


def write_labels(folder, rows, **changes):
    header = {"num_problems": len(rows), "complete": True, "num_candidates": 4, "divergence_threshold": 0.5}
    header = header | {"vocab_hash": vocab_hash(tiny_tokenizer())} | changes
    write_shard(folder, 0, rows)
    write_header(folder, TrajectoryHeader("student", "teacher", **header))
    return folder


def random_rows(num_rows=12):
    """Labels whose divergence and student differ from point to point."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for row in make_uneven_labels(num_rows):
        size, (num_points, width) = len(row["divergence"]), (len(row["positions"]), 4)
        row["divergence"] = torch.rand(size, generator=generator).tolist()
        student_NK = (2 * torch.randn(num_points, width, generator=generator)).log_softmax(-1)
        row["student_logprobs"] = student_NK.sort(-1, descending=True).values.tolist()
        row["teacher_logprobs"] = torch.randn(num_points, width, generator=generator).log_softmax(-1).tolist()
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_buckets_against_a_loop():
    generator = np.random.default_rng(0)
    divergence, right = generator.permutation(37) / 10, generator.random(37) < 0.5
    buckets = estimates.divergence_buckets(divergence.tolist(), {"right": right, "mean": right / 2}, 4)
    assert buckets["edges"][0] == 0.0 and buckets["edges"][-1] == 3.6 and sum(buckets["num_points"]) == 37
    for k in range(4):
        low, high = buckets["edges"][k : k + 2]
        inside = [n for n in range(37) if low <= divergence[n] and (divergence[n] < high or k == 3)]
        assert buckets["num_points"][k] == len(inside) and len(inside) in (9, 10)
        assert buckets["rates"]["right"][k] == pytest.approx(sum(right[n] for n in inside) / len(inside))
        assert buckets["rates"]["mean"][k] == pytest.approx(buckets["rates"]["right"][k] / 2)
    assert estimates.divergence_buckets([0.1] * 7, {"right": [1] * 7}, 4) is None


def test_weights_of_an_interval_are_those_of_the_mean():
    """A problem with many tokens counts as often as it has tokens."""
    values, weights = np.array([0.0, 1.0, 0.5]), np.array([1, 5, 2])
    low, high = estimates.bootstrap_interval(np.repeat(values, 40), weights_N=np.repeat(weights, 40))
    assert low < 6 / 8 < high and high - low < 0.2
    low, high = estimates.bootstrap_interval(np.repeat(values, 40))
    assert low < 0.5 < high and high < 6 / 8
    hits_SN, groups_N = np.array([[1.0, 0, 0, 0], [1.0, 1, 0, 0]]), np.array([0, 0, 1, 1])
    assert estimates.mean_over_points(hits_SN, groups_N)["ci"] == [0.0, 0.75]  # both groups, or one of them twice


def test_records_against_a_loop_over_points(tmp_path):
    selector = make_selector(tiny_model())
    selector.fusion = FusionWeights(2.0, 0.5, -0.1)
    labels = fidelity.open_labels(str(write_labels(tmp_path, random_rows()))).rows
    records = fidelity.score_points(selector, labels, NUM_CANDIDATES, RATIO, batch_size=5)
    assert sorted(record["id"] for record in records) == sorted(labels["problem_id"])
    seen = set()
    for record in records:
        (number,) = (n for n, id in enumerate(labels["problem_id"]) if id == record["id"])
        row = labels[number]
        alone = score_labels(selector, labels.select([number]), 1, NUM_CANDIDATES, RATIO)
        assert record["choice"] == alone.choice(selector.fusion).tolist()
        for n, position in enumerate(row["positions"]):
            student, teacher, ids = (
                row[name][n][:3] for name in ("student_logprobs", "teacher_logprobs", "candidate_ids")
            )
            above = [k for k in range(3) if student[k] >= student[0] + np.log(RATIO)]
            top = row["teacher_top_id"][n]
            assert record["divergence"][n] == pytest.approx(row["divergence"][position - row["prompt_length"]])
            assert record["num_above"][n] == len(above)
            assert record["target"][n] == max(above, key=lambda k: teacher[k])
            assert record["rank"][n] == (ids.index(top) if top in ids else -1)
            assert record["choice"][n] in above
            if len(above) == 3:
                order = [
                    sum(a > b for b in values) for values in (alone.scores_NK[n].tolist(), teacher) for a in values
                ]
                expected = np.corrcoef(order[:3], order[3:])[0, 1]
                assert record["spearman"][n] == pytest.approx(expected, abs=1e-5)
            seen |= {len(above), f"rank {record['rank'][n]}"}
    assert {1, 2, 3, "rank -1"} <= seen


def test_figures_against_a_loop_over_points():
    generator = np.random.default_rng(1)
    runs = [[], []]
    for problem in range(20):
        size = int(generator.integers(1, 5))
        above = generator.integers(1, 4, size)
        common = {"id": f"p{problem // 2}", "rollout": problem % 2, "num_above": above.tolist()}
        common |= {"divergence": generator.random(size).tolist(), "rank": generator.integers(-1, 3, size).tolist()}
        common["target"] = [int(generator.integers(0, most)) for most in above]
        for run in runs:
            choice = [int(generator.integers(0, most)) for most in above]
            run.append(common | {"choice": choice, "spearman": generator.uniform(-1, 1, size).tolist()})
    figures = fidelity.summarize_points(runs, threshold=0.4)

    names = ("divergence", "num_above", "rank", "target", "choice", "spearman")
    points = [[dict(zip(names, values)) for record in run for values in zip(*map(record.get, names))] for run in runs]
    assert (figures["num_points"], figures["num_seeds"]) == (len(points[0]), 2)

    def share(points, holds):
        return sum(map(holds, points)) / len(points)

    def seconds(point):
        return point["target"] == (1 if point["num_above"] > 1 else 0)

    for part, inside in (("choice", lambda p: p["num_above"] > 1), ("kl", lambda p: p["divergence"] >= 0.4)):
        kept = [[point for point in run if inside(point)] for run in points]
        found = figures["agree_at_1"][part]
        by_seed = [share(run, lambda p: p["choice"] == p["target"]) for run in kept]
        assert found["num_points"] == len(kept[0])
        assert found["selector"]["by_seed"] == pytest.approx(by_seed)
        assert found["selector"]["value"] == pytest.approx(sum(by_seed) / 2)
        assert found["student_first"]["value"] == pytest.approx(share(kept[0], lambda p: p["target"] == 0))
        assert found["second_candidate"]["value"] == pytest.approx(share(kept[0], seconds))
        for who in ("selector", "student_first", "second_candidate"):
            assert found[who]["ci"][0] < found[who]["value"] < found[who]["ci"][1]
    ranked = [point["spearman"] for run in points for point in run if point["num_above"] >= 3]
    assert figures["spearman"]["value"] == pytest.approx(np.mean(ranked))
    assert figures["spearman"]["num_points"] == len(ranked) // 2

    buckets = figures["buckets"]
    for k, (low, high) in enumerate(zip(buckets["edges"], buckets["edges"][1:])):
        inside = [[p for p in run if low <= p["divergence"] and (p["divergence"] < high or k == 7)] for run in points]
        assert buckets["num_points"][k] == len(inside[0])
        rates = {name: values[k] for name, values in buckets["rates"].items()}
        right = [share(run, lambda p: p["choice"] == p["target"]) for run in inside]
        assert rates["selector"] == pytest.approx(sum(right) / 2)
        assert rates["student_first"] == pytest.approx(share(inside[0], lambda p: p["target"] == 0))
        assert rates["second_candidate"] == pytest.approx(share(inside[0], seconds))
        assert rates["hit_at_k"] == pytest.approx(share(inside[0], lambda p: p["rank"] >= 0))


def test_figures_without_a_point_are_none():
    record = {"id": "p", "rollout": 0, "divergence": [0.1], "num_above": [1], "rank": [0], "target": [0]}
    figures = fidelity.summarize_points([[record | {"choice": [0], "spearman": [0.0]}]], threshold=0.4)
    assert figures["agree_at_1"] == {"choice": None, "kl": None}
    assert figures["spearman"] is figures["buckets"] is None
    assert fidelity.describe(figures) == [] and charts.buckets_chart([], 8, figures) is None


# ---------------------------------------------------------------------------------------------------------------------
# What is on disk


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """Labels and an adapter of the tiny model."""
    folder = tmp_path_factory.mktemp("fidelity")
    write_labels(folder / "labels", random_rows())
    lora_model(tiny_model(), name="default").save_pretrained(folder / "adapter")
    config = SelectorConfig(RESERVED, vocab_hash=vocab_hash(tiny_tokenizer()))
    config.save_pretrained(folder / "adapter")
    return folder, config


def test_what_was_scored_with_the_same_settings_is_not_scored_again(bed, tmp_path, monkeypatch):
    folder, config = bed
    labels = fidelity.open_labels(str(folder / "labels"), [config])
    scored = []
    score = fidelity.score_points
    monkeypatch.setattr(fidelity, "score_points", lambda *args: scored.append(args[2]) or score(*args))

    def measure(num_candidates=4, settings="m"):
        return fidelity.measure_fidelity(
            tmp_path, [str(folder / "adapter")] * 2, labels, tiny_model, num_candidates, RATIO, {"model": settings}
        )

    first = measure()
    assert scored == [4, 4] and first["num_seeds"] == 2 and json.loads(json.dumps(first)) == first
    assert sorted(file.name for file in (tmp_path / "fidelity").iterdir()) == ["adapter0.jsonl", "adapter1.jsonl"]
    assert measure() == first and len(scored) == 2
    (tmp_path / "fidelity" / "adapter1.jsonl").unlink()
    assert measure() == first and len(scored) == 3
    assert measure(num_candidates=2) != first and len(scored) == 5
    measure(num_candidates=2, settings="other")
    assert len(scored) == 7


def test_recipes_agreement_prints_these_figures_and_their_intervals(bed, tmp_path):
    """It resampled blocks of twenty points, so that one quantity had two intervals."""
    folder, config = bed
    rows = [row | {"problem_id": f"p{n // 3}", "rollout": n % 3} for n, row in enumerate(random_rows())]
    labels = fidelity.open_labels(str(write_labels(tmp_path / "labels", rows)), [config])
    adapters = [str(folder / "adapter")] * 2
    settings = (config.num_candidates, config.min_prob_ratio, {})
    expected = fidelity.measure_fidelity(tmp_path, adapters, labels, tiny_model, *settings)
    tiny_model().save_pretrained(tmp_path / "model")
    arguments = ["--labels", labels.name, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "a.json")]
    agreement.main([*arguments, "--adapters", *adapters])
    found = json.loads((tmp_path / "a.json").read_text())["agree_at_1"]
    names = {"student first": "student_first", "second candidate": "second_candidate", "s2t-local, fused": "selector"}
    for part in ("choice", "kl"):
        for name, own in names.items():
            figures = expected["agree_at_1"][part][own]
            assert found[part][name]["agree_at_1"] == round(100 * figures["value"], 1)
            assert found[part][name]["ci"] == [round(100 * edge, 1) for edge in figures["ci"]]
    correlation = found["choice"]["s2t-local"]  # points without a choice have no order
    assert correlation["spearman"] == round(expected["spearman"]["value"], 3)
    assert correlation["spearman_ci"] == [round(edge, 3) for edge in expected["spearman"]["ci"]]


def test_labels_that_are_made_again_have_another_fingerprint(tmp_path):
    rows = random_rows()
    before = records_module.fingerprint(str(write_labels(tmp_path / "labels", rows)))
    for file in (tmp_path / "labels").glob("*.parquet"):
        file.unlink()
    rows[0]["teacher_logprobs"][0][0] -= 0.5
    assert records_module.fingerprint(str(write_labels(tmp_path / "labels", rows))) != before


def test_labels_that_do_not_fit_are_refused(bed, tmp_path):
    _, config = bed
    write_labels(tmp_path / "other", random_rows(), vocab_hash="another")
    with pytest.raises(ValueError, match=r"`eval_labels` '\S+other' were made with another tokenizer \(another\)"):
        fidelity.open_labels(str(tmp_path / "other"), [config])
    write_labels(tmp_path / "bare", random_rows(), divergence_threshold=None)
    with pytest.raises(ValueError, match="`eval_labels`: .*bare' has no `divergence_threshold` in its header"):
        fidelity.open_labels(str(tmp_path / "bare"))


# ---------------------------------------------------------------------------------------------------------------------
# The chart


def test_the_chart_has_a_line_for_the_selectors_where_a_report_knows_them():
    points = [charts.Point(0.1 * n, rank=n % 3 or None, best=1 + n % 2, num_above=2) for n in range(32)]
    old = charts.buckets_chart(points, 2)
    assert old.head == ("divergence", "points", "Hit@2", "student's first", "second candidate")
    buckets = charts.buckets_of(points, 2)
    buckets["rates"]["selector"] = [0.9] * 8
    who = {"value": 0.912, "ci": [0.85, 0.95]}
    known = {"num_seeds": 3, "buckets": buckets, "agree_at_1": {"choice": {"num_points": 32, "selector": who}}}
    new = charts.buckets_chart([], 2, known | {"spearman": {"num_points": 9, "value": 0.75}})  # no labels at hand
    assert new.head == (*old.head, "S2T-Local")
    assert [row[:5] for row in new.rows] == old.rows and {row[5] for row in new.rows} == {"90.0 %"}
    assert "(mean of 3 adapters). Of the 32 points with two or more above it, it does so at 91.2 %" in new.caption
    assert "at the 9 points with three or more: 0.75." in new.caption and "S2T-Local" not in old.caption
