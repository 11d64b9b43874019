"""recipes/paper_tables.py: what every kind of table makes of the reports that it reads, against loops over records."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_labels import make_labels
from transformers import AutoTokenizer

from s2t_recipes import jobs as jobs_module
from s2t_recipes import records
from s2t_recipes.evaluation import retention
from s2t_recipes.evaluation.policies import Policy
from s2t_recipes.evaluation.rows import make_rows
from s2t_recipes.paper import results, tables
from s2t_recipes.paper.pair import MAX_FURTHER_RATES, Pair
from s2t_recipes.paper.pipeline import Pipeline
from s2t_recipes.paper.sweep import JUDGED_BY
from s2t_recipes.paper.tables.accuracy import flips_by_kind, kind_of_token
from s2t_recipes.paper.tables.result import difference, sentence, training_rate_note
from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader


ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"

NUM_PROBLEMS, NUM_SEEDS = 30, 2
SIZES = {"label": 100, "tuning": 10, "calibration": 20, "test": 30, "fresh": 40, "words": 5}
RATES = {"s2t-local": [0.1, 0.2], "sft": [0.3, 0.4], "kd": [0.5, 0.6]}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def make_pipeline(tmp_path):
    """A pipeline of a pair that nobody has run."""

    def make(**more):
        settings = {"sizes": SIZES, "num_seeds": NUM_SEEDS, "learning_rates": RATES} | more
        pair = Pair("p", "P", "M", "T", "recipes/embedded", **settings)
        return Pipeline(pair, jobs_module.Jobs(tmp_path), tmp_path)

    return make


@pytest.fixture
def random():
    return np.random.default_rng(0)


def job_of(pipeline, name):
    return pipeline.jobs.all[f"p-{name}"]


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_report(job, correct, ids=None):
    """A report.json and its records, as eval.py writes them, of label -> right or wrong (seeds, problems)."""
    ids = [f"q{n}" for n in range(NUM_PROBLEMS)] if ids is None else ids
    rows, greedy = [], None
    for place, (label, right_SN) in enumerate(correct.items()):
        policy = Policy.parse(label, ("sft", "kd", "sft-second", "kd-second"))
        is_seeded = policy.is_local or policy.is_tuned
        runs = []
        for seed, right_N in enumerate(right_SN):
            totals = {"seconds": 2.0 + place, "cpu_seconds": 3.0 + place, "generated": 100}
            totals["steps"] = (40 + seed) * (policy.num_votes or 1)  # so many batches more
            totals |= {"triggered": 10 + seed, "asked": 8, "flipped": 5, "student_tokens": 300 + place}
            totals |= {
                "teacher_tokens": 30 * place,
                "forwards": {"scorer": 4 * place, "teacher": place} if place else {},
            }
            header = {"run_id": "1", "totals": totals}
            lines = [{"id": id, "answer": "1", "correct": bool(right)} for id, right in zip(ids, right_N)]
            if policy.num_votes:
                lines = [line | {"any_correct": True} for line in lines]
            file = job.output.parent / "records" / policy.record_name(seed if is_seeded else None)
            records.write_records(file, header, lines)
            runs.append((header, lines))
        greedy = runs[0] if label == "greedy" else greedy
        configs = [SimpleNamespace(adapter_scope="candidate")]
        rows += make_rows(policy, runs, greedy, configs)
    write_json(job.output, {"meta": {"num_problems": len(ids)}, "rows": rows})


def write_sweeps(pipeline, best):
    """Reports of all sweeps: the learning rates in `best` are the best ones, the others are not."""
    for name, job in pipeline.jobs.all.items():
        if not name.startswith("p-evaluate-") or "sweep-" not in name:
            continue
        accuracy = 60.0 if float(name.split("-")[-2]) in best else 50.0
        write_json(job.output, {"rows": [{"label": label, "accuracy": accuracy} for label in JUDGED_BY.values()]})


def write_labels(folder, rows):
    write_shard(folder, 0, rows)
    write_header(folder, TrajectoryHeader("m", "t", "v", num_problems=len(rows), complete=True))


def rendered(result):
    """Every cell in its form: a column that does not fit its values fails here."""
    return results.table(result.columns, json.loads(json.dumps(result.rows)))


def interval_of(values):
    """Percentiles of the means of resampled values, drawn as `bootstrap_interval` draws them."""
    drawn = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    means = [sum(values[n] for n in row) / len(values) for row in drawn.tolist()]
    return [np.percentile(means, 2.5), np.percentile(means, 97.5)]


def mean_of(right_SN, n):
    """Share of the seeds that have problem n right."""
    return sum(int(right_N[n]) for right_N in right_SN) / len(right_SN)


def points_between(right_SN, other_SN):
    """Difference of two rows at each problem, in points."""
    return [100 * (mean_of(right_SN, n) - mean_of(other_SN, n)) for n in range(NUM_PROBLEMS)]


def binomial_p(helped, hurt):
    total = helped + hurt
    tail = sum(math.comb(total, k) for k in range(min(helped, hurt) + 1)) / 2**total
    return min(1.0, 2 * tail)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of reports


def test_a_difference_is_paired_by_problem_and_a_mean_over_seeds(make_pipeline, random):
    pipeline = make_pipeline()
    one, other = (pipeline.evaluation(name, policies=["greedy"]) for name in ("one", "other"))
    ours_SN, theirs_SN = random.random((3, NUM_PROBLEMS)) < 0.6, random.random((2, NUM_PROBLEMS)) < 0.4
    write_report(one, {"s2t-local:always": ours_SN})
    write_report(other, {"sft": theirs_SN})
    found = difference(one, "s2t-local:always", other, "sft")
    expected = points_between(ours_SN, theirs_SN)
    assert found["difference"] == pytest.approx(sum(expected) / NUM_PROBLEMS)
    assert found["difference_ci"] == pytest.approx(interval_of(expected))
    low, high = found["difference_ci"]
    said = f"A minus B: {found['difference']:+.1f} [{low:+.1f}, {high:+.1f}] points"
    assert sentence("A", "B", found) == said
    nothing = difference(one, "s2t-local:always", one, "s2t-local:always")
    assert nothing == {"difference": 0.0, "difference_ci": [0.0, 0.0]}


def test_rows_that_do_not_belong_together_are_refused(make_pipeline, random):
    pipeline = make_pipeline()
    one, other = (pipeline.evaluation(name, policies=["greedy"]) for name in ("one", "other"))
    right_SN = random.random((2, NUM_PROBLEMS)) < 0.5
    write_report(one, {"greedy": right_SN[:1], "maj@8": right_SN[:1], "sft": right_SN})
    write_report(other, {"greedy": right_SN[:1]}, ids=[f"q{n}" for n in range(1, NUM_PROBLEMS + 1)])
    with pytest.raises(
        ValueError, match="one/report.json has no records of 'kd'; its rows: greedy, maj@8, best@8, sft"
    ):
        difference(one, "kd", one, "greedy")
    with pytest.raises(
        ValueError, match="has no records of 'best@8'"
    ):  # what is right of its samples is in the vote's
        difference(one, "greedy", one, "best@8")
    with pytest.raises(
        ValueError, match="other/report.json: 'greedy' is of other problems than 'sft' of .*one/report"
    ):
        difference(one, "sft", other, "greedy")
    (one.output.parent / "records" / "sft_adapter1.jsonl").unlink()
    with pytest.raises(ValueError, match="has no records of 'sft'"):  # one seed of two is not both
        difference(one, "sft", one, "greedy")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("7", "number"), (" 1,204", "number"), ("$3.50", "number"), (" +", "operator"), (" ×", "operator"), ("", "end")]
    + [("=", "operator"), (" so", "word or other"), (".", "word or other"), ("x2", "word or other")],
)
def test_tokens_have_kinds(text, kind):
    assert kind_of_token(text) == kind


def test_first_flips_are_told_by_kind_and_by_what_became_of_the_text(make_pipeline, tmp_path):
    """Of each text: what the student would have said, what was taken, right before, right after; two seeds alike."""
    tokenizer = AutoTokenizer.from_pretrained("recipes/embedded/student")
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("7", "8", "+", "-", "So")}
    ids["end"] = tokenizer.eos_token_id
    told = [("7", "8", 0, 1), ("So", "8", 1, 0), ("+", "-", 0, 1), ("So", "So", 1, 1), ("end", "-", 0, 0)]
    folder = tmp_path / "report"
    job = SimpleNamespace(output=folder / "report.json")
    rows = [{"label": "greedy", "records": ["greedy.jsonl"]}, {"label": "s2t-local:always", "records": ["a", "b"]}]
    write_json(job.output, {"rows": rows})
    greedy = [{"correct": bool(before)} for _, _, before, _ in told]
    selected = [
        {
            "correct": bool(after),
            "kinds": "k." if first == taken else ".ff",
            "tokens": [ids["So"], ids[taken], ids["7"]],
            "student_tokens": {} if first == taken else {"1": ids[first], "2": ids["+"]},
        }
        for first, taken, _, after in told
    ]
    for name, lines in (("greedy.jsonl", greedy), ("a", selected), ("b", selected)):
        records.write_records(folder / "records" / name, {"totals": {}}, lines)
    found = flips_by_kind(job, "s2t-local:always", "recipes/embedded/student")
    assert found == "number 2 (1 helped, 1 hurt), operator 2 (1 helped, 0 hurt)"


# ---------------------------------------------------------------------------------------------------------------------
# Local sufficiency


def labels_by_divergence(random, num_rows=20, size=10, width=4):
    """Rows of ten generated tokens each, with points at the 10 % of highest divergence and at some others.

    Also, of every token from the highest divergence: the rank of the teacher's token, `None` where it is no candidate,
    or "no point".
    """
    divergence_T = random.permutation(np.arange(1, num_rows * size + 1) / 100)
    top = set(np.argsort(-divergence_T)[: num_rows * size // 10].tolist())
    chosen = top | set(random.choice(num_rows * size, 40, replace=False).tolist())
    ranks, rows = {}, []
    for number in range(num_rows):
        points = [t for t in range(number * size, (number + 1) * size) if t in chosen]
        candidates, tops = [], []
        for t in points:
            ids = random.choice(50, width, replace=False).tolist()
            rank = int(random.integers(0, width + 1))
            candidates.append(ids)
            tops.append(60 if rank == width else ids[rank])
            ranks[t] = None if rank == width else rank
        row = make_labels(1)[0] | {"problem_id": f"q{number}", "input_ids": list(range(3, 3 + 4 + size))}
        row |= {"divergence": divergence_T[number * size : (number + 1) * size].tolist()}
        row |= {"entropy": [0.0] * size, "margin": [0.0] * size, "teacher_top_id": tops, "candidate_ids": candidates}
        row["positions"] = [4 + t - number * size for t in points]
        row |= {name: [[-1.0] * width] * len(points) for name in ("student_logprobs", "teacher_logprobs")}
        rows.append(row)
    order = np.argsort(-divergence_T).tolist()
    return rows, [ranks.get(t, "no point") for t in order], sorted(divergence_T.tolist(), reverse=True)


def test_hits_by_bucket_of_divergence(make_pipeline, random):
    pipeline = make_pipeline()
    spec = {"name": "x", "buckets": [0.01, 0.02, 0.05, 0.1, 1.0], "hits": [1, 2, 4]}
    collect = tables.sufficiency(pipeline, spec)
    rows, rank_by_place, divergences = labels_by_divergence(random)
    write_labels(job_of(pipeline, "labels-test").path, rows)
    result = collect()
    start = 0
    for row, share in zip(result.rows, spec["buckets"], strict=True):
        end = round(200 * share)
        ranks = [rank for rank in rank_by_place[start:end] if rank != "no point"]
        assert row["points"] == len(ranks) > 0
        for k in spec["hits"]:
            hits = [rank is not None and rank < k for rank in ranks]
            assert row[f"hit{k}"] == pytest.approx(100 * sum(hits) / len(hits)), (share, k)
        assert divergences[end - 1] >= row["divergence"] - 1e-6
        assert end == 200 or row["divergence"] > divergences[end]
        start = end
    assert [row["points"] for row in result.rows[:4]] == [2, 2, 6, 10]
    assert result.rows[1]["bucket"] == "top 1 to 2 %"
    assert result.notes[0] == "20 greedy texts of the small model, 200 tokens."
    assert result.notes[1].startswith("34 of the 180 tokens from 10% to 100% are labelled")
    assert "| top 5 to 10 % |" in rendered(result) and len(result.commands) == 1


def test_hits_of_shares_from_the_top_have_intervals_over_problems(make_pipeline, random):
    pipeline = make_pipeline()
    collect = tables.sufficiency(pipeline, {"name": "x", "part": "label", "top": [0.1, 1.0], "hits": [1, 4]})
    rows, rank_by_place, _ = labels_by_divergence(random)
    for row in rows[1:]:  # the second candidate is at e^-4 of the first, below the floor
        row["student_logprobs"] = [[0.0, -4.0, -4.0, -4.0] for _ in row["positions"]]
    write_labels(job_of(pipeline, "labels-label").path, rows)
    result = collect()
    assert [row["bucket"] for row in result.rows] == ["top 10 %", "top 100 %", "points with a choice"]
    assert [row["points"] for row in result.rows] == [
        20,
        len(rank_by_place) - rank_by_place.count("no point"),
        len(rows[0]["positions"]),
    ]
    ranks = rank_by_place[:20]
    for row in result.rows[:2]:
        low, high = row["hit1_ci"]
        assert low < row["hit1"] < high
    assert result.rows[0]["hit4"] == pytest.approx(100 - 5 * ranks.count(None))
    one = [top == ids[0] for top, ids in zip(rows[0]["teacher_top_id"], rows[0]["candidate_ids"])]
    assert result.rows[2]["hit1"] == pytest.approx(100 * sum(one) / len(one))
    assert "[" in rendered(result)


def test_no_hit_is_told_beyond_the_candidates_that_were_stored(make_pipeline, random):
    """What is not among four candidates may be the fifth or none: Hit@8 would be anything."""
    pipeline = make_pipeline()
    collect = tables.sufficiency(pipeline, {"name": "x", "buckets": [0.1], "hits": [1, 4, 8]})
    rows, rank_by_place, _ = labels_by_divergence(random)
    write_labels(job_of(pipeline, "labels-test").path, rows)
    result = collect()
    missed = rank_by_place[:20].count(None)
    assert missed and result.rows[0]["hit4"] == pytest.approx(100 - 5 * missed)
    assert "hit8" not in result.rows[0] and "Hit@8" not in rendered(result)


# ---------------------------------------------------------------------------------------------------------------------
# Policies


POLICIES = ["greedy", "maj@8", "prior:always", "s2t-local:margin:0.1", "s2t-local:always", "s2t:always", "teacher"]


def test_a_best_rate_at_the_end_of_what_was_tried_is_called_so(make_pipeline):
    pipeline = make_pipeline()
    sweep = pipeline.sweep("sft", pipeline.labels("label"), calibration=pipeline.labels("calibration"))
    for rate, accuracy in {0.3: 50.0, 0.4: 60.0, 0.8: 70.0, 1.6: 80.0, 3.2: 90.0}.items():
        write_json(sweep.reports[rate].output, {"rows": [{"label": "sft", "accuracy": accuracy}]})
    assert training_rate_note("sft", sweep).endswith("3.2: 90.0; 3.2 taken (the end of what was tried)")


def test_policies_with_several_numbers_of_candidates(make_pipeline, random):
    pipeline = make_pipeline()
    spec = {"name": "x", "policies": POLICIES, "baselines": ["sft"], "num_candidates": [8, 2]}
    spec["compare"] = [["s2t-local:always", "sft"], ["sft", "greedy"]]
    collect = tables.policies(pipeline, spec)
    write_sweeps(pipeline, {0.2, 0.4})
    right = {}
    for size in (8, 2):
        arguments = job_of(pipeline, f"evaluate-x-{size}").arguments()
        assert ("--num_candidates" in arguments) == (size == 2)
        assert arguments[arguments.index("--policies") + 1 :][: len(POLICIES) + 1] == [*POLICIES, "sft"]
        assert len([text for text in arguments if text.startswith("sft=")]) == NUM_SEEDS
        assert arguments[arguments.index("--prior_labels") + 1].endswith("labels/label")
        seeds = {label: NUM_SEEDS if "local" in label or label == "sft" else 1 for label in [*POLICIES, "sft"]}
        right[size] = {label: random.random((number, NUM_PROBLEMS)) < 0.5 for label, number in seeds.items()}
        write_report(job_of(pipeline, f"evaluate-x-{size}"), right[size])
    result = collect()

    selecting = [label for label in POLICIES if ":" in label]
    assert [row["num_candidates"] for row in result.rows] == [8] * 9 + [2] * len(selecting)
    named = {(row["policy"], row["num_candidates"]): row for row in result.rows}
    assert len(named) == len(result.rows)  # no two rows look alike
    for size, label, name in [
        (8, "greedy", "greedy"),
        (8, "sft", "LoRA on the teacher's texts"),
        (8, "s2t-local:always", "S2T-Local · every step"),
        (2, "s2t-local:always", "S2T-Local · every step"),
        (2, "s2t-local:margin:0.1", "S2T-Local · margin 10 %"),
        (2, "prior:always", "token prior · every step"),
    ]:
        row, right_SN = named[name, size], right[size][label]
        assert row["accuracy"] == pytest.approx(100 * right_SN.mean())
        assert row["num_seeds"] == len(right_SN)
        if label == "greedy":
            assert row["gain"] is None and "flips" not in row
            continue
        gain = points_between(right_SN, right[size]["greedy"])
        assert row["gain"] == pytest.approx(sum(gain) / NUM_PROBLEMS) and row["gain_ci"] == pytest.approx(
            interval_of(gain)
        )
        before = right[size]["greedy"][0]
        helped = [sum(r and not g for r, g in zip(right_N, before)) for right_N in right_SN]
        hurt = [sum(g and not r for r, g in zip(right_N, before)) for right_N in right_SN]
        assert row["flips"] == f"{np.mean(helped):g} / {np.mean(hurt):g}"
        assert row["mcnemar_p"] == pytest.approx(max(binomial_p(*pair) for pair in zip(helped, hurt)))
    asked, place = named["S2T-Local · every step", 8], POLICIES.index("s2t-local:always")
    assert asked["achieved_rate"] == pytest.approx(21 / 200) and asked["flip_rate"] == pytest.approx(0.05)
    assert asked["student_tokens"] == pytest.approx((300 + place) / NUM_PROBLEMS)
    by_seed = [100 * share for share in right[8]["s2t-local:always"].mean(1)]
    assert asked["by_seed"] == ", ".join(f"{value:.1f}" for value in by_seed)
    assert named["greedy", 8]["by_seed"] == ""
    assert named["greedy", 8]["forwards"] == 1.0 and named["majority of 8 samples", 8]["forwards"] == (8 * 40 + 5) / 40
    assert asked["forwards"] == pytest.approx((40.5 + 5 * place) / 40)  # two seeds, of 40 and 41 steps
    teachers = {row["policy"] for row in result.rows if row["llm"] == "yes"}
    assert teachers == {"S2T (teacher selects) · every step", "teacher, greedy"}

    rates = "accuracy on the tuning problems by learning rate"
    assert result.notes[:3] == [
        "30 test problems.",
        f"s2t-local: {rates} 0.1: 50.0, 0.2: 60.0 and 60.0, 0.4: 60.0 and 60.0; 0.2 taken",  # the first of equals
        f"sft: {rates} 0.3: 50.0, 0.4: 60.0, 0.8: 50.0; 0.4 taken",
    ]
    for note, (one, other), names in zip(
        result.notes[3:],
        spec["compare"],
        ["S2T-Local · every step minus LoRA on the teacher's texts", "LoRA on the teacher's texts minus greedy"],
        strict=True,
    ):
        gap = points_between(right[8][one], right[8][other])
        assert note.startswith(f"{names}: {sum(gap) / NUM_PROBLEMS:+.1f} [")
    assert set(result.cost) == {f"{label} K=8" for label in [*POLICIES, "sft", "best@8"]} | {
        f"{label} K=2" for label in selecting
    }
    assert result.cost["s2t-local:always K=8"]["seconds_vs_greedy"] == pytest.approx((2 + place) / 2)
    assert "| K |" in rendered(result).splitlines()[0] and len(result.commands) == 2
    assert all(command.startswith("python recipes/eval.py ") for command in result.commands)


def test_thresholds_are_calibrated_where_a_policy_needs_them(make_pipeline):
    def names(policies, **more):
        pipeline = make_pipeline(**more)
        tables.policies(pipeline, {"name": "x", "policies": policies})
        return [name for name in pipeline.jobs.all if name.startswith("p-calibrate-")]

    def decodes(name):
        return "-undecoded" not in name

    always = names(["greedy", "s2t-local:always", "s2t:always"])
    assert always and not any(map(decodes, always))
    assert sum(map(decodes, names(["greedy", "second:kl:0.1"]))) == NUM_SEEDS
    alone = names(["s2t-local:always"], learning_rates={})
    assert len(alone) == NUM_SEEDS and not any(map(decodes, alone))


# ---------------------------------------------------------------------------------------------------------------------
# One thing changed at a time


def test_variants_are_compared_with_the_first(make_pipeline, random):
    pipeline = make_pipeline()
    variants = [
        {"name": "default"},
        {"name": "no fusion, margin 0.1", "policy": "s2t-local-bare:always", "decoding": {"bare_margin": 0.1}},
        {"name": "no router", "router": False},
        {"name": "r = 4", "train": {"lora_r": 4}},
        {"name": "texts: of a first selector", "rounds": 2},
    ]
    spec = {"name": "x", "label_problems": 50, "policy": "s2t-local:always", "variants": variants}
    collect = tables.variants(pipeline, spec)
    evaluations = {name: job for name, job in pipeline.jobs.all.items() if name.startswith("p-evaluate-x-variant=")}
    assert len(evaluations) == len(variants)
    right, agreed = [], []
    for place, (variant, job) in enumerate(zip(variants, evaluations.values())):
        label = variant.get("policy", spec["policy"])
        right_SN = random.random((NUM_SEEDS, NUM_PROBLEMS)) < 0.5
        right.append(right_SN)
        write_report(job, {"greedy": random.random((1, NUM_PROBLEMS)) < 0.4, label: right_SN})
        arguments = job.arguments()
        adapters = arguments[arguments.index("--adapters") + 1 :][:NUM_SEEDS]
        agreed.append([])
        for seed, adapter in enumerate(adapters):
            agreed[-1].append((0.5 + 0.01 * place + 0.1 * seed, 0.4 + 0.01 * place))
            fused, alone = ({"agree_at_1": share} for share in agreed[-1][-1])
            measured = {"fused": fused, "selector": alone} if variant["name"] != "r = 4" else None
            file = Path(adapter) / "calibration.json"
            if place == 1:  # the same selectors as before, decoded in another way
                agreed[-1][-1] = agreed[0][seed]
            else:
                write_json(file, {"in_sample_points": measured})
    assert "--bare_margin 0.1" in " ".join(list(evaluations.values())[1].arguments())
    result = collect()
    assert [row["variant"] for row in result.rows] == [variant["name"] for variant in variants]
    for place, row in enumerate(result.rows):
        assert row["accuracy"] == pytest.approx(100 * right[place].mean())
        if place == 0:
            assert "difference" not in row
        else:
            gap = points_between(right[place], right[0])
            assert row["difference"] == pytest.approx(sum(gap) / NUM_PROBLEMS)
            assert row["difference_ci"] == pytest.approx(interval_of(gap))
        if row["variant"] == "r = 4":
            assert "agree" not in row
        else:
            assert row["agree"] == pytest.approx(100 * np.mean([fused for fused, _ in agreed[place]]))
            assert row["bare_agree"] == pytest.approx(100 * np.mean([alone for _, alone in agreed[place]]))
    assert result.notes[0] == "30 test problems."
    assert result.notes[1].startswith("50 label problems, 2 seeds each; policy s2t-local:always")
    assert "minus default" in rendered(result) and set(result.cost) == {variant["name"] for variant in variants}

    assert not any(name.startswith("p-router-") and "unrouted" in name for name in pipeline.jobs.all)
    second = [job for name, job in pipeline.jobs.all.items() if name.startswith("p-labels-label50-adapter=")]
    assert len(second) == NUM_SEEDS
    for seed, job in enumerate(second):  # the selector of the same seed writes
        adapter = job.arguments()[job.arguments().index("--adapter") + 1]
        assert adapter.endswith(f"label50-undecoded-seed{seed}") and "s2t-local" in job.arguments()
        assert job_of(pipeline, f"calibrate-label50-undecoded-seed{seed}") in job.needs


@pytest.mark.parametrize(("kind", "more"), [("policies", {}), ("variants", {"variants": [{"name": "default"}]})])
def test_a_table_can_measure_fewer_test_problems_than_the_pair_has(make_pipeline, kind, more):
    spec = {"name": "x", "policies": ["greedy", "s2t-local:always"], "policy": "s2t-local:always"} | more
    for limit, told in ((7, ["--limit", "7"]), (None, [])):
        pipeline = make_pipeline()
        tables.KINDS[kind](pipeline, spec | ({} if limit is None else {"limit": limit}))
        [job] = [job for name, job in pipeline.jobs.all.items() if name.startswith("p-evaluate-x")]
        write_sweeps(pipeline, {0.1})
        arguments = job.arguments()
        start = arguments.index("--limit") if "--limit" in arguments else len(arguments)
        assert arguments[start : start + 2] == told and pipeline.data("test") in job.needs


# ---------------------------------------------------------------------------------------------------------------------
# Label efficiency


def test_accuracy_by_number_of_labels(make_pipeline, random):
    pipeline = make_pipeline(sizes=SIZES | {"calibration": 25})
    spec = {"name": "x", "problems": [10, 50], "epochs": {10: 64, 50: 8}, "min_calibration": 4}
    collect = tables.efficiency(pipeline, spec | {"policy": "s2t-local:always"})
    write_sweeps(pipeline, {0.1, 0.4, 0.6})
    tokens = {}
    # 60 % as many problems to calibrate on as there are labels, but no more than the pair has
    for name, number in {"label10": 10, "label50": 50, "calibration6": 6, "calibration": 25}.items():
        rows = [row | {"problem_id": f"q{i}"} for i, row in enumerate(make_labels(number, seed=number))]
        write_labels(job_of(pipeline, f"labels-{name}").path, rows)
        tokens[name] = sum(len(row["input_ids"]) for row in rows)
    right = {}
    for number in (10, 50):
        for method in ("s2t-local", "sft", "kd"):
            label = "s2t-local:always" if method == "s2t-local" else method
            right_SN = random.random((NUM_SEEDS, NUM_PROBLEMS)) < 0.5
            right[method, number] = right_SN
            job = job_of(pipeline, f"evaluate-x-{method}-{number}")
            write_report(job, {"greedy": random.random((1, NUM_PROBLEMS)) < 0.4, label: right_SN})
            assert f"labels/label{number}" not in job.arguments()
            if method == "s2t-local":  # the sweep's own, seed by seed
                given = job.arguments()[job.arguments().index("--adapters") + 1 :][:NUM_SEEDS]
                held_out = "-calibration6" if number == 10 else ""
                name = f"label{number}{held_out}-learning_rate=0.1-num_train_epochs={spec['epochs'][number]}"
                assert [Path(folder).name for folder in given] == [
                    f"{name}-undecoded-seed{seed}" for seed in range(NUM_SEEDS)
                ]
    result = collect()
    for row, (number, calibration) in zip(result.rows, ((10, "calibration6"), (50, "calibration")), strict=True):
        assert row["problems"] == number
        assert row["tokens"] == tokens[f"label{number}"] + tokens[calibration]
        assert row["imitation_tokens"] == tokens[f"label{number}"]
        for method, rate in (("s2t-local", 0.1), ("sft", 0.4), ("kd", 0.6)):
            assert row[method] == pytest.approx(100 * right[method, number].mean())
            assert row[f"{method}_rate"] == rate
        for method in ("sft", "kd"):
            gap = points_between(right["s2t-local", number], right[method, number])
            assert row[f"over_{method}"] == pytest.approx(sum(gap) / NUM_PROBLEMS)
            assert row[f"over_{method}_ci"] == pytest.approx(interval_of(gap))
    assert rendered(result).count("\n") == 3 and len(result.commands) == 6
    assert len(result.notes) == 6 and "0.4 taken" in next(
        note for note in result.notes if note.startswith("50 problems, sft")
    )
    for name, job in pipeline.jobs.all.items():  # as many epochs for all, and each from its own labels
        if name.startswith("p-train-"):
            arguments = job.arguments()
            number = int(arguments[arguments.index("--labels") + 1].rpartition("/label")[2])
            assert arguments[arguments.index("--num_train_epochs") + 1] == str(spec["epochs"][number])


def test_the_curve_has_seeds_and_first_rates_of_its_own_but_for_the_number_that_other_tables_have(make_pipeline):
    pipeline = make_pipeline(label_problems=50, num_seeds=3, learning_rates_by_problems={10: {"sft": [3.0, 6.0]}})
    spec = {"name": "x", "problems": [10, 50, 90], "epochs": {10: 64, 50: 8, 90: 4}, "policy": "s2t-local:always"}
    tables.efficiency(pipeline, spec | {"seeds": 2, "fewer_seeds": {90: 1}})
    write_sweeps(pipeline, {RATES["sft"][0], 3.0})
    for number, first, seeds in ((10, 3.0, {0, 1}), (50, RATES["sft"][0], {0, 1, 2}), (90, RATES["sft"][0], {0})):
        names = " ".join(pipeline.jobs.all)
        tried = re.findall(rf"p-train-sft-label{number}-learning_rate=([^-]+)-\S*seed(\d)", names)
        assert min(float(rate) for rate, _ in tried) == first / 2**MAX_FURTHER_RATES
        assert {int(seed) for _, seed in tried} == seeds
        arguments = job_of(pipeline, f"evaluate-x-sft-{number}").arguments()
        assert len([argument for argument in arguments if argument.startswith("sft=")]) == min(2, len(seeds))


FOUR_TEXTS = {
    "sizes": SIZES | {"label": 50},
    "label_problems": 20,
    "selector_label": {"rollout_policy": "sample", "num_rollouts": 4},
    "train": {"num_train_epochs": 2},
    "baseline": {"num_train_epochs": 8},
}


def epochs_and_labels(pipeline, name):
    """Of the trainings whose name begins so: passes, and texts of each problem."""
    found = set()
    for job in (job for other, job in pipeline.jobs.all.items() if other.startswith(f"p-train-{name}")):
        arguments = job.arguments()
        labels = arguments[arguments.index("--labels") + 1]
        sampled = "--num_samples" in arguments and int(arguments[arguments.index("--num_samples") + 1])
        texts = sampled or (4 if labels.endswith("num_rollouts=4") else 1)
        found.add((float(arguments[arguments.index("--num_train_epochs") + 1]), texts))
    return found


def test_all_methods_take_as_many_steps_however_many_texts_a_problem_has(make_pipeline):
    pipeline = make_pipeline(**FOUR_TEXTS)
    tables.policies(pipeline, {"name": "x", "policies": ["greedy", "s2t-local:always"], "baselines": BASELINES})
    trainings = {name for name in pipeline.jobs.all if name.startswith("p-train-")}
    spec = {"name": "y", "problems": [10, 20], "epochs": {10: 16, 20: 8}, "policy": "s2t-local:always"}
    tables.efficiency(pipeline, spec)
    added = {name for name in pipeline.jobs.all if name.startswith("p-train-")} - trainings
    assert added and not any("label20" in name for name in added)  # those of 20 problems were planned already
    tables.variants(pipeline, {"name": "z", "policy": "s2t-local:always", "label_problems": 5, "variants": VARIANTS})
    for name, product, texts in (
        ("sft-label20", 8, 1),
        ("kd-label20-learning", 8, 1),
        ("sft-sampled-label20", 8, 4),
        ("kd-sampled-label20", 8, 4),
        ("label20", 8, 4),
        ("label10", 16, 4),
        ("sft-label10", 16, 1),
        ("label5-rollout_policy=sample-num_rollouts=4-undecoded", 8, 4),
        ("label5-rollout_policy=sample-num_rollouts=1", 8, 1),
        ("label5-adapter=", 8, 1),
    ):
        assert epochs_and_labels(pipeline, name) == {(product / texts, texts)}, name


BASELINES = ["sft", "kd", "sft-sampled", "kd-sampled"]
VARIANTS = [
    {"name": "default"},
    {"name": "one text", "label": {"num_rollouts": 1}, "train": {"num_train_epochs": 8}},
    {"name": "texts: of a first selector", "rounds": 2},
]


def test_sampled_texts_are_compared_where_selectors_learn_from_them(make_pipeline):
    spec = {"name": "x", "policies": ["greedy", "sft", "sft-sampled", "s2t-local:always"], "baselines": BASELINES}
    spec["compare"] = [["s2t-local:always", other] for other in BASELINES]
    for settings, told in ((FOUR_TEXTS, BASELINES), ({}, ["sft", "kd"])):
        pipeline = make_pipeline(**settings)
        tables.policies(pipeline, spec)
        arguments = job_of(pipeline, "evaluate-x").arguments
        write_sweeps(pipeline, {0.1, 0.4, 0.5})
        policies = arguments()[arguments().index("--policies") + 1 :]
        assert {name for name in policies if name.startswith(("sft", "kd")) and "=" not in name} == set(told)
        given = {text.partition("=")[0] for text in arguments() if re.match("(sft|kd)[a-z-]*=", text)}
        assert given == set(told)


def test_an_imitation_has_a_row_at_a_second_rate_where_tuning_can_hardly_tell_it_from_the_first(make_pipeline, random):
    pipeline = make_pipeline()
    ours, names = "s2t-local:always", ["greedy", "sft", "sft-second", "s2t-local:always", "kd"]
    spec = {"name": "x", "policies": ["greedy", "sft", ours], "baselines": ["sft", "kd"], "second_rates": True}
    spec["compare"] = [[ours, "sft"], [ours, "sft-second"], [ours, "kd-second"]]
    collect = tables.policies(pipeline, spec)
    write_sweeps(pipeline, {0.2, 0.3, 0.4, 0.5})  # two of them are close for sft, one is alone for kd
    job = job_of(pipeline, "evaluate-x")
    arguments = job.arguments()
    given = arguments[arguments.index("--policies") + 1 :]
    assert given[:6] == [*names, "--adapters"]
    for name, rate in (("sft", "0.3"), ("sft-second", "0.4"), ("kd", "0.5")):
        folders = [text.partition("=")[2] for text in arguments if text.startswith(f"{name}=")]
        assert len(folders) == NUM_SEEDS and all(f"learning_rate={rate}-" in folder for folder in folders)
    right = {name: random.random((1 if name == "greedy" else NUM_SEEDS, NUM_PROBLEMS)) < 0.5 for name in names}
    write_report(job, right)
    result = collect()
    rows = {row["policy"]: row["accuracy"] for row in result.rows}
    assert rows["LoRA on the teacher's texts, second rate"] == pytest.approx(100 * right["sft-second"].mean())
    assert [note.partition(":")[0] for note in result.notes if " minus " in note] == [
        f"S2T-Local · every step minus LoRA on the teacher's texts{more}" for more in ("", ", second rate")
    ]
    spec["compare"] = [[ours, "sft-secnod"]]  # no row that may be missing
    with pytest.raises(KeyError, match="sft-secnod"):
        collect()


# ---------------------------------------------------------------------------------------------------------------------
# A selector on top of an imitation


def test_stacking_pairs_every_selector_with_its_own_student(make_pipeline, random):
    pipeline = make_pipeline()
    spec = {"name": "x", "methods": ["sft", "kd"], "label": {"rollout_policy": "sample"}, "train": {"max_steps": 9}}
    collect = tables.stacking(pipeline, spec)
    write_sweeps(pipeline, {0.1, 0.4, 0.5})
    right = {}
    for method in ("sft", "kd"):
        labels = ["greedy", "s2t-local:always", "s2t-local-bare:always", method, "s2t:always"]
        for seed in range(NUM_SEEDS):
            right[method, seed] = {label: random.random(NUM_PROBLEMS) < 0.5 for label in labels}
            job = job_of(pipeline, f"evaluate-{method}{seed}-x-{method}")
            write_report(job, {label: right_N[None] for label, right_N in right[method, seed].items()})
            arguments = job.arguments()
            merged = arguments[arguments.index("--model") + 1]
            assert merged == str(job_of(pipeline, f"merge-{method}{seed}").path)
            assert arguments[arguments.index("--policies") + 1 :][: len(labels)] == labels
            fresh = job_of(pipeline, f"labels-{method}{seed}-fresh-rollout_policy=sample")
            folders = [arguments[arguments.index(option) + 1] for option in ("--adapters", "--tuned")]
            for folder, rate in zip(folders, ("0.1", "0.4" if method == "sft" else "0.5")):
                output = folder.removeprefix(f"{method}=")
                trainings = [job for name, job in pipeline.jobs.all.items() if name.startswith("p-train-")]
                [train] = [job for job in trainings if output in job.arguments()]
                told = train.arguments()  # on the labels of its own student, at the rate that was best for the first
                assert told[told.index("--labels") + 1] == str(fresh.path) and fresh in train.needs
                assert told[told.index("--model") + 1] == merged and told[told.index("--seed") + 1] == str(seed)
                assert told[told.index("--learning_rate") + 1] == rate
                assert told[told.index("--max_steps") + 1] == "9"
    alone_SN = random.random((NUM_SEEDS, NUM_PROBLEMS)) < 0.5
    alone = {"greedy": random.random((1, NUM_PROBLEMS)) < 0.4, "s2t-local:always": alone_SN}
    write_report(job_of(pipeline, "evaluate-x-alone"), alone)
    result = collect()
    named = {(row["student"], row["policy"]): row for row in result.rows}
    assert len(named) == len(result.rows) == 2 + 2 * len(labels)
    assert ("after sft", "LoRA on the teacher's texts") in named and ("after kd", "LoRA distillation") in named
    assert named["as it was", "S2T-Local · every step"]["accuracy"] == pytest.approx(100 * alone_SN.mean())
    for method in ("sft", "kd"):
        own = [right[method, seed] for seed in range(NUM_SEEDS)]
        for label, name in zip(labels[:2], ("greedy", "S2T-Local · every step")):
            row = named[f"after {method}", name]
            by_seed = [100 * found[label].mean() for found in own]
            assert row["accuracy"] == pytest.approx(np.mean(by_seed))
            assert row["by_seed"] == ", ".join(f"{value:.1f}" for value in by_seed)
            assert row["accuracy_ci"] == pytest.approx(
                interval_of(points_between([found[label] for found in own], [[0] * NUM_PROBLEMS]))
            )
            if label == "greedy":
                assert "gain" not in row
                continue
            gain = points_between([found[label] for found in own], [found["greedy"] for found in own])
            assert row["gain"] == pytest.approx(sum(gain) / NUM_PROBLEMS) and row["gain_ci"] == pytest.approx(
                interval_of(gain)
            )
            helped = [int((found[label] & ~found["greedy"]).sum()) for found in own]
            hurt = [int((~found[label] & found["greedy"]).sum()) for found in own]
            assert row["flips"] == f"{np.mean(helped):g} / {np.mean(hurt):g}"
            assert row["mcnemar_p"] == pytest.approx(max(binomial_p(*pair) for pair in zip(helped, hurt)))
    notes = ["30 test problems."]
    for method in ("sft", "kd"):
        ours = [right[method, seed]["s2t-local:always"] for seed in range(NUM_SEEDS)]
        again = [right[method, seed][method] for seed in range(NUM_SEEDS)]
        for other, gap in (
            ("S2T-Local alone", points_between(ours, alone_SN)),
            (f"{method} on top of {method}", points_between(ours, again)),
        ):
            told = f"{sum(gap) / NUM_PROBLEMS:+.1f} [{{:+.1f}}, {{:+.1f}}] points".format(*interval_of(gap))
            notes.append(f"S2T-Local on top of {method} minus {other}: {told}")
    assert result.notes[:5] == notes
    rates = "accuracy on the tuning problems by learning rate"
    assert result.notes[5:7] == [
        f"after sft, s2t-local: {rates} 0.05: 50.0, 0.1: 60.0, 0.2: 50.0; 0.1 taken",
        f"after sft, sft: {rates} 0.3: 50.0, 0.4: 60.0, 0.8: 50.0; 0.4 taken",
    ]
    assert [note.partition(":")[0] for note in result.notes[7:]] == ["after kd, s2t-local", "after kd, kd"]
    assert "| after kd | S2T (teacher selects) · every step |" in rendered(result)


# ---------------------------------------------------------------------------------------------------------------------
# Tables whose figures another script computes


def test_fidelity_reads_both_kinds_of_points(make_pipeline):
    pipeline = make_pipeline(has_answers=False)
    collect = tables.fidelity(pipeline, {"name": "x"})
    figures = {
        kind: {
            "student first": {
                "agree_at_1": 40.0 + add,
                "ci": [38.0, 42.0],
                "spearman": 0.1,
                "spearman_ci": [0.0, 0.2],
            },
            "second candidate": {"agree_at_1": 30.0 + add, "ci": [28.0, 32.0]},
        }
        for kind, add in (("kl", 0.0), ("choice", 5.0))
    }
    meta = {"points": 100, "kl_points": 30, "choice_points": 60}
    report = {"meta": meta, "hit_at_k": {"1": 0.25, "8": 0.9751}, "agree_at_1": figures}
    write_json(job_of(pipeline, "agreement").output, report)
    result = collect()
    first, second = result.rows
    assert (first["kl_agree"], first["choice_agree"]) == (40.0, 45.0) and first["kl_agree_ci"] == [38.0, 42.0]
    assert first["choice_rank"] == "0.10 [0.00, 0.20]" and "kl_rank" not in second
    assert result.notes[0].endswith("Hit at the top-KL points, per cent: @1 25.0, @8 97.5.")
    assert "100 labelled points: 30 of the top KL, 60 with" in result.notes[0]
    assert "| second candidate | 30.0 [28.0, 32.0] |  | 35.0 [28.0, 32.0] |  |" in rendered(result)
    arguments = job_of(pipeline, "agreement").arguments()
    assert len([text for text in arguments if "/selectors/" in text]) == NUM_SEEDS
    assert not any(name.startswith("p-evaluate") for name in pipeline.jobs.all)  # nothing is decoded and checked


def test_retention_reads_what_its_recipe_writes(make_pipeline):
    pipeline = make_pipeline()
    collect = tables.retention(pipeline, {"name": "x", "methods": ["sft", "kd"]})
    write_sweeps(pipeline, {0.2, 0.3, 0.6})
    arguments = job_of(pipeline, "retention").arguments()
    texts = [text.partition("=")[0] for text in arguments[arguments.index("--tuned") + 1 :][: 2 * NUM_SEEDS]]
    assert texts == ["sft", "sft", "kd", "kd"]
    assert arguments[arguments.index("--text") + 1] == str(job_of(pipeline, "data-words").path)
    assert {job_of(pipeline, "data-words"), job_of(pipeline, "labels-test")} <= set(
        job_of(pipeline, "retention").needs
    )

    # KL and loss, summed over the tokens of two documents, and their number
    sums = {"generated": {"a": (1.0, 4.0, 2), "b": (0.0, 8.0, 2)}, "prompts": {"a": (3.0, 9.0, 3)}, "text": {}}
    sums = {kind: {id: np.array(values) for id, values in found.items()} for kind, found in sums.items()}
    rows = [{"name": name, **retention.summarize([sums], None, 0)} for name in ("base", "sft")]
    write_json(job_of(pipeline, "retention").output, {"rows": rows})
    result = collect()
    assert [row["who"] for row in result.rows] == ["base", "LoRA on the teacher's texts"]
    assert result.rows[0]["kl_generated"] == "0.250 [0.000, 0.500]"
    assert result.rows[0]["kl_prompts"] == "1.000 [1.000, 1.000]"
    assert result.rows[1]["loss_generated"] == "3.000 [2.000, 4.000]"
    assert "| base | 0.250 [0.000, 0.500] | 1.000 [1.000, 1.000] | 3.000 [2.000, 4.000] |" in rendered(result)

    other = make_pipeline(other_text={"text": "wiki", "text_limit": 9}, sizes=SIZES | {"words": 0})
    tables.retention(other, {"name": "x", "methods": ["sft"]})
    write_sweeps(other, {0.2, 0.3})
    assert " --text wiki --text_limit 9" in " ".join(job_of(other, "retention").arguments())
    assert "p-data-words" not in other.jobs.all


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_objective_is_told_per_variant_with_its_extremes(make_pipeline):
    pipeline = make_pipeline()
    spec = {"name": "x", "recipe": "recipes/embedded/train.yaml", "variants": ["recipe", "linear read-out"]}
    collect = tables.objective(pipeline, spec)
    command = job_of(pipeline, "x").arguments()
    assert command[command.index("--seeds") + 1] == str(NUM_SEEDS)
    shared = {"points": 7, "student_first": 0.25, "second_candidate": 0.5}
    rows = [
        {"variant": variant, "seed": seed, "agree_at_1": base + 0.1 * seed, "fused_agree_at_1": base + 0.2} | shared
        for seed in range(NUM_SEEDS)
        for variant, base in (("recipe", 0.5), ("linear read-out", 0.3))
    ]
    meta = {"num_train": 200, "num_fusion": 100, "num_held_out": 150}
    write_json(job_of(pipeline, "x").output, {"meta": meta, "rows": rows})
    result = collect()
    assert [row["variant"] for row in result.rows] == spec["variants"]
    assert result.rows[1]["agree_at_1"] == pytest.approx(35.0)
    assert result.rows[1]["agree_at_1_ci"] == pytest.approx([30.0, 40.0])
    assert result.rows[0]["fused_agree_at_1"] == pytest.approx(70.0)
    assert "with 7 points to measure; 2 seeds. The first of the student: 25.0, its second: 50.0." in result.notes[0]
    assert "| linear read-out | 35.0 [30.0, 40.0] | 50.0 [50.0, 50.0] |" in rendered(result)
    write_json(job_of(pipeline, "x").output, {"meta": meta, "rows": rows[:1]})
    with pytest.raises(ValueError):  # a variant that was not measured is no row of zeros
        collect()


def test_latency_runs_alone_and_its_rows_are_times(make_pipeline):
    pipeline = make_pipeline()
    collect = tables.latency(pipeline, {"name": "x", "arguments": ["--turns", "3"]})
    job = job_of(pipeline, "x")
    assert job.alone and job.arguments()[:3] == ["benchmarks/decode.py", "--turns", "3"]
    row = {"name": "s2t_generate", "scope": "candidate", "proposals": "base", "asked_rate": 0.1, "batch": 1}
    row |= {"prefix": 256, "ratio": 1.25, "ratio_range": [1.2, 1.311], "cpu_ratio": 1.5, "forwards_per_token": 1.2}
    plain = row | {"name": "maj8", "scope": None, "proposals": None, "asked_rate": None}
    meta = dict.fromkeys(("shape", "layers", "vocab", "new_tokens", "num_candidates", "threads", "device"), "M")
    write_json(job.output, {"meta": meta, "rows": [row, plain]})
    result = collect()
    assert result.holds_times
    assert [found["way"] for found in result.rows] == ["s2t_generate, candidate scope, base proposals", "maj8"]
    assert "| 10.0 | 1 | 256 | 1.25x [1.20, 1.31] | 1.50x | 1.20 |" in rendered(result)
