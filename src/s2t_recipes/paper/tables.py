"""The kinds of tables: which jobs each needs, and what it reads from their reports.

A kind is a function of a [`Pipeline`] and the table's own settings. It adds jobs and returns a function that, once
they have run, gives a [`Result`]. The YAMLs of recipes/paper name a kind; recipes/paper.py runs everything. Nothing
here measures: every number comes from a report that a recipe wrote.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from s2t_recipes.commands import recipe
from s2t_recipes.estimates import bootstrap_interval
from s2t_recipes.evaluation.rows import mcnemar
from s2t_recipes.jobs import Job
from s2t_recipes.paper.pipeline import METHODS, SAMPLED, Best, Pipeline, Sweep, as_arguments, tag
from s2t_recipes.records import read_records
from s2t_recipes.row_names import label_of, name_of
from transformers_s2t.labels.folder import read_labels
from transformers_s2t.proposals import floor_mask


@dataclass
class Result:
    """What a table says of one pair.

    Args:
        columns: (title, key of the rows, form: see recipes/results.py).
        rows: values by key; a key may be missing.
        notes: sentences below the table, made of figures.
        commands: the jobs behind it, as a user would type them.
        cost: times of this run, kept apart from what must come out the same again.
        holds_times: whether the rows hold times themselves.
    """

    columns: list[tuple[str, str, str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    holds_times: bool = False


Collect = Callable[[], Result]
ACCURACY = [
    ("accuracy", "accuracy", "interval"),
    ("seed by seed", "by_seed", "text"),
    ("gain over greedy", "gain", "signed interval"),
    ("helped / hurt", "flips", "text"),
    ("p", "mcnemar_p", "p"),
]
COST = [
    ("student tokens", "student_tokens", "0f"),
    ("teacher tokens", "teacher_tokens", "0f"),
    ("forwards", "forwards", "2f"),
]


def read_report(job: Job) -> dict:
    return json.loads(job.output.read_text(encoding="utf-8"))


def row_of(row: dict, report: dict, **more) -> dict:
    """What tables show of a row of eval.py. Forwards: batch forwards in units of greedy's, of the same report."""
    kept = ("accuracy", "accuracy_ci", "accuracy_sd", "gain", "gain_ci", "mcnemar_p", "num_seeds")
    kept += ("helped", "hurt", "achieved_rate", "asked_rate", "flip_rate", "student_tokens", "teacher_tokens")
    values = {name: row[name] for name in kept}
    if row["helped"] is not None:
        values["flips"] = f"{row['helped']:g} / {row['hurt']:g}"
    values["by_seed"] = seed_by_seed(row["accuracy_by_seed"])
    for other in report["rows"]:
        if other["label"] == "greedy":
            own = row["decoding_steps"] + sum(row["extra_forwards"].values())
            values["forwards"] = own / other["decoding_steps"]
    return {"policy": label_of(row), **values, **more}


def seed_by_seed(accuracy_S: Sequence[float]) -> str:
    """Accuracies of several seeds; empty for one."""
    return ", ".join(f"{value:.1f}" for value in accuracy_S) if len(accuracy_S) > 1 else ""


def correct_by_seed(*rows: tuple[Job, str]) -> list[np.ndarray]:
    """Whether each problem was answered right (seeds, problems), of each of some rows (job, label) of reports.

    Raises:
        ValueError: where a report has no such row, the row no records, or one of them other problems.
    """
    runs = []
    for job, label in rows:
        found = {row["label"]: row["records"] for row in read_report(job)["rows"]}
        files = [job.output.parent / "records" / name for name in found.get(label, ())]
        runs.append([read_records(file)[1] for file in files if file.is_file()])
        if not files or len(runs[-1]) < len(files):
            raise ValueError(f"{job.output} has no records of {label!r}; its rows: {', '.join(found)}.")
    ids = [record["id"] for record in runs[0][0]]
    for (job, label), seeds in zip(rows, runs):
        if any([record["id"] for record in records] != ids for records in seeds):
            raise ValueError(
                f"{job.output}: {label!r} is of other problems than {rows[0][1]!r} of {rows[0][0].output}."
            )
    return [np.array([[record["correct"] for record in records] for records in seeds], dtype=float) for seeds in runs]


def difference(job: Job, label: str, other_job: Job, other: str) -> dict[str, Any]:
    """Accuracy of one row minus another's on the same problems, in points, means over seeds; paired bootstrap."""
    right_SN, other_SN = correct_by_seed((job, label), (other_job, other))
    difference_N = 100 * (right_SN.mean(0) - other_SN.mean(0))
    low, high = bootstrap_interval(difference_N)
    return {"difference": float(difference_N.mean()), "difference_ci": [low, high]}


def sentence(name: str, other: str, found: Mapping[str, Any]) -> str:
    low, high = found["difference_ci"]
    return f"{name} minus {other}: {found['difference']:+.1f} [{low:+.1f}, {high:+.1f}] points"


def teacher_tokens_of(labels: Job) -> int:
    """Tokens that went through the teacher to make labels: every trajectory, once, and what it corrected."""
    data, _ = read_labels(labels.path, split="all")
    return int(sum(map(len, data["input_ids"])))


def problems_note(report: Mapping[str, Any]) -> str:
    return f"{report['meta']['num_problems']} test problems."


def training_rate_note(method: str, sweep: Sweep) -> str:
    found = sweep.accuracies()
    tried = ", ".join(
        f"{rate:g}: {' and '.join(f'{value:.1f}' for value in values)}" for rate, values in found.items()
    )
    best = sweep.best_rate()
    edge = " (the end of what was tried)" if best in (min(found), max(found)) else ""
    return f"{method}: accuracy on the tuning problems by learning rate {tried}; {best:g} taken{edge}"


# ---------------------------------------------------------------------------------------------------------------------
# What all share: labels and selectors of a pair


@dataclass
class Base:
    """The labels and calibrated selectors that several tables read, trained at the pair's best learning rate.

    Attributes:
        pipeline: of the pair.
        labels: what imitations learn from.
        selector_labels: what selectors learn from, of the same problems.
        calibration: labels to calibrate on.
        sweep: of the selectors' learning rate; `None` where answers cannot be checked, or there is one rate.
        adapters: the selectors, one for each seed.
    """

    pipeline: Pipeline
    labels: Job
    selector_labels: Job
    calibration: Job
    sweep: Sweep | None
    adapters: list[Job | Best]

    @classmethod
    def of(cls, pipeline: Pipeline, thresholds: bool = True, route: bool = True) -> Base:
        """`thresholds`: calibrated for triggers too, which decodes; else for the fused score only. `route`: with a
        router."""
        labels, calibration = pipeline.selector_labels(), pipeline.labels("calibration")
        base = cls(pipeline, pipeline.labels("label"), labels, calibration, None, [])
        if pipeline.pair.has_answers and len(pipeline.pair.learning_rates.get("s2t-local", ())) > 1:
            more = {} if route else {"route": False}
            base.sweep = pipeline.sweep("s2t-local", labels, calibration=calibration, **more)
        if base.sweep is None:
            settings = {"calibration": calibration, "decode": thresholds, "route": route}
            base.adapters = [pipeline.selector(labels, seed, **settings) for seed in pipeline.seeds]
            return base
        base.adapters = base.sweep.best()
        if thresholds:
            base.adapters = [
                pipeline.with_thresholds(best, f"{labels.path.name}-best-seed{seed}", calibration)
                for seed, best in zip(pipeline.seeds, base.adapters)
            ]
        return base

    def imitation(self, method: str) -> Sweep:
        """The sweep of "sft", "kd" or one of SAMPLED, on the same problems and with as many steps."""
        labels, settings = self.labels, {"calibration": self.calibration}
        if method in SAMPLED:
            labels = self.selector_labels if method == "kd-sampled" else self.labels
            epochs = self.pipeline.pair.baseline["num_train_epochs"] / self.pipeline.num_rollouts
            settings["num_train_epochs"] = f"{epochs:g}"
        return self.pipeline.sweep(method, labels, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# The kinds


def sufficiency(pipeline: Pipeline, spec: dict) -> Collect:
    """Hit@K: how often the teacher's token is among the student's first K.

    `hits`: values of K. `part`: whose problems, those of the test by default; `problems`: its first ones. `buckets`:
    a row for each range of KL, by upper edges as shares of the tokens. `top`: instead, a row for each such share from
    the top, one for the stored points with a choice (all, where labels have `points: floor+kl`), and 95 % intervals
    over problems.
    """
    labels = pipeline.labels(spec.get("part", "test"), spec.get("problems"))

    def collect() -> Result:
        data, header = read_labels(labels.path, split="all")
        divergence_T = np.concatenate([np.asarray(row) for row in data["divergence"]])
        starts = np.cumsum([0, *map(len, data["divergence"])])
        found = []  # (divergence, rank of the teacher's token, candidates, of those above the floor, problem)
        numbers = {id: number for number, id in enumerate(dict.fromkeys(data["problem_id"]))}
        for start, row in zip(starts, data):
            columns = (row[name] for name in ("positions", "candidate_ids", "teacher_top_id", "student_logprobs"))
            for position, ids, top, logprobs in zip(*columns):
                rank = ids.index(top) if top in ids else np.inf
                divergence = divergence_T[start + position - row["prompt_length"]]
                offered = int(floor_mask(torch.tensor(logprobs), header.min_prob_ratio).sum())
                found.append((divergence, rank, len(ids), offered, numbers[row["problem_id"]]))
        divergence_N, rank_N, width_N, offered_N, problem_N = np.array(found).T
        hits = [k for k in spec["hits"] if k <= width_N.min()]  # beyond what was stored nobody knows
        form = "interval" if "top" in spec else "1f"
        rows, missing = [], []

        def add(name: str, inside_N: np.ndarray, lower: float | None = None) -> None:
            row = {"bucket": name, "points": int(inside_N.sum()), "divergence": lower}
            for k in hits if inside_N.any() else ():
                hit_N = rank_N[inside_N] < k
                row[f"hit{k}"] = 100 * float(hit_N.mean())
                if form == "interval":
                    points_P = np.bincount(problem_N[inside_N].astype(int), minlength=len(numbers))
                    hits_P = np.bincount(problem_N[inside_N].astype(int), hit_N, minlength=len(numbers))
                    some = points_P > 0
                    share_P = 100 * hits_P[some] / points_P[some]
                    row[f"hit{k}_ci"] = bootstrap_interval(share_P, weights_N=points_P[some])
            rows.append(row)

        low = 0.0
        for high in spec.get("buckets") or spec["top"]:
            upper = np.inf if low == 0 else np.quantile(divergence_T, 1 - low)
            lower = np.quantile(divergence_T, 1 - high)
            num_tokens = int(((divergence_T >= lower) & (divergence_T < upper)).sum())
            inside_N = (divergence_N >= lower) & (divergence_N < upper)
            if inside_N.sum() < num_tokens:  # beyond the threshold of the labels, which was estimated on some of them
                missing.append(
                    f"{int(inside_N.sum())} of the {num_tokens} tokens from {low:.0%} to {high:.0%} are labelled"
                )
            name = f"top {100 * low:g} to {100 * high:g} %" if "buckets" in spec else f"top {100 * high:g} %"
            add(name, inside_N, float(lower))
            low = high if "buckets" in spec else 0.0
        if "top" in spec:
            add("points with a choice", offered_N > 1)
        columns = [("tokens by KL(teacher ‖ student)", "bucket", "text"), ("KL from, nats", "divergence", "2f")]
        columns += [("points", "points", "count"), *((f"Hit@{k}", f"hit{k}", form) for k in hits)]
        notes = [f"{len(data)} greedy texts of the small model, {len(divergence_T)} tokens."]
        notes += [f"{', '.join(missing)}: those above the label run's threshold, or with a choice."] if missing else []
        return Result(columns, rows, notes, [job_text(labels)])

    return collect


#: Kinds of tokens, by the text that a token adds; the first one that fits.
TOKEN_KINDS = {
    "number": re.compile(r"\s*[\d.,$]*\d[\d.,]*\s*"),
    "operator": re.compile(r"\s*[-+*/=÷×−()]+\s*"),
    "end": re.compile(r""),
    "word or other": re.compile(r".*", re.DOTALL),
}


def kind_of_token(text: str) -> str:
    return next(kind for kind, pattern in TOKEN_KINDS.items() if pattern.fullmatch(text))


def flips_by_kind(job: Job, label: str, model: str) -> str:
    """What the first flip of each text was, and whether the text then helped or hurt; means over seeds.

    Args:
        job: an evaluation with the rows "greedy" and `label`.
        label: of a policy that selects.
        model: whose tokenizer reads the tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {row["label"]: row["records"] for row in read_report(job)["rows"]}
    records = job.output.parent / "records"
    greedy = read_records(records / found["greedy"][0])[1]
    counts = {kind: [0, 0, 0] for kind in TOKEN_KINDS}
    for file in found[label]:
        for before, after in zip(greedy, read_records(records / file)[1], strict=True):
            first = after["kinds"].find("f")
            if first < 0:
                continue
            ids = (after["student_tokens"][str(first)], after["tokens"][first])
            texts = ["" if id in tokenizer.all_special_ids else tokenizer.decode([id]) for id in ids]
            kind = min(map(kind_of_token, texts), key=list(TOKEN_KINDS).index)  # a number for a word: numbers
            gain = int(after["correct"]) - int(before["correct"])
            for place, counted in enumerate((True, gain > 0, gain < 0)):
                counts[kind][place] += counted
    num_seeds = len(found[label])
    told = [
        f"{kind} {one / num_seeds:g} ({good / num_seeds:g} helped, {bad / num_seeds:g} hurt)"
        for kind, (one, good, bad) in counts.items()
        if one
    ]
    return ", ".join(told) or "none"


def policies(pipeline: Pipeline, spec: dict) -> Collect:
    """Accuracy of policies on the same problems.

    `policies`: as of eval.py. `limit`: test problems, by default all. `num_candidates`: values of K to run them
    with; `at_other_sizes`: those to run at all but the first of these. `baselines`: also the tuned imitations ("sft",
    "kd", and where selectors learn from sampled texts "sft-sampled", "kd-sampled"), each with the best of the pair's
    learning rates and one training for each seed. `second_rates`: and each of these at a second rate that tuning can
    hardly tell from the best, where there is one ("sft-second"). `compare`: pairs of labels whose difference is told.
    `router: false`: selectors without one. `flips`: labels whose first flips are told by kind of token. `no_answer`:
    tell how many texts have no answer.
    """
    baselines = [m for m in spec.get("baselines", ()) if m not in SAMPLED or pipeline.num_rollouts > 1]
    thresholds = any(re.search(r":(?!always)", policy) for policy in spec["policies"])
    base = Base.of(pipeline, thresholds, route=spec.get("router", True))
    is_selected = any(policy.startswith("s2t-local") for policy in spec["policies"])
    sweeps = {"s2t-local": base.sweep} if is_selected and base.sweep is not None else {}
    tuned, rows_of = [], {}
    for method in baselines:
        sweeps[method] = base.imitation(method)
        rows_of[method] = [method, f"{method}-second"] if spec.get("second_rates") else [method]
        for place, name in enumerate(rows_of[method]):
            tuned += [(name, trained) for trained in sweeps[method].best(place)]
    left_out = set(spec.get("baselines", ())) - set(baselines)
    wanted = [policy for policy in dict.fromkeys([*spec["policies"], *baselines]) if policy not in left_out]
    wanted = [name for policy in wanted for name in rows_of.get(policy, [policy])]
    options = {"limit": spec.get("limit")}
    if any(policy.startswith("prior") for policy in wanted):
        options["prior_labels"] = str(base.selector_labels.path)
    sizes = spec.get("num_candidates", [8])
    evaluations = {
        size: pipeline.evaluation(
            spec["name"] + ("" if sizes == [8] else f"-{size}"),
            policies=wanted if size == sizes[0] else ["greedy", *spec.get("at_other_sizes", wanted[1:])],
            adapters=base.adapters,
            tuned=tuned,
            needs=[base.selector_labels],
            **options,
            **({} if size == 8 else {"num_candidates": size}),
        )
        for size in sizes
    }

    def collect() -> Result:
        rows, cost = [], {}
        for size, job in evaluations.items():
            report = read_report(job)
            more = {} if sizes == [8] else {"num_candidates": size}
            shown = [row for row in report["rows"] if size == sizes[0] or row["trigger"] is not None]
            rows += [row_of(row, report, llm="yes" if row["uses_teacher"] else "no", **more) for row in shown]
            cost |= {
                f"{row['label']}" + ("" if sizes == [8] else f" K={size}"): {
                    "seconds_vs_greedy": row["seconds_vs_greedy"],
                    "cpu_seconds_vs_greedy": row["cpu_seconds_vs_greedy"],
                }
                for row in shown
            }
        columns = [("policy", "policy", "text")]
        columns += [] if sizes == [8] else [("K", "num_candidates", "count")]
        columns += [("teacher at inference", "llm", "text"), *ACCURACY]
        columns += [("fired, %", "achieved_rate", "share"), ("flipped, %", "flip_rate", "share"), *COST]
        first = evaluations[sizes[0]]
        report = read_report(first)
        notes = [problems_note(report), *(training_rate_note(method, sweep) for method, sweep in sweeps.items())]
        labels = {row["label"]: label_of(row) for row in report["rows"]}
        for one, other in spec.get("compare", ()):
            if other in left_out or (other.endswith("-second") and other not in labels):
                continue
            notes.append(sentence(labels[one], labels[other], difference(first, one, first, other)))
        for label in spec.get("flips", ()):
            notes.append(f"First flip of each text, {labels[label]}: {flips_by_kind(first, label, pipeline.model)}")
        if spec.get("no_answer"):
            told = [f"{label_of(row)} {row['no_answer']:.1f}" for row in report["rows"] if row["no_answer"]]
            notes.append(f"Texts without an answer, which count as wrong, per cent: {', '.join(told) or 'none'}")
        return Result(columns, rows, notes, [job_text(job) for job in evaluations.values()], cost)

    return collect


def fidelity(pipeline: Pipeline, spec: dict) -> Collect:
    """Agree@1 and Spearman at held-out labelled points, beside the controls; needs no answers. `problems`: the first
    ones of the test."""
    base = Base.of(pipeline)
    labels = pipeline.labels("test", spec.get("problems"))
    name = "agreement" + ("" if "problems" not in spec else f"-{labels.path.name}")
    output = pipeline.folder / f"{name}.json"
    command = [recipe("agreement.py"), "--labels", str(labels.path)]
    command += ["--train_labels", str(base.selector_labels.path)]
    command += ["--model", pipeline.model, "--dtype", pipeline.pair.dtype, "--output", str(output)]
    command += ["--adapters", *(str(adapter.path) for adapter in base.adapters)]
    job = pipeline.add(name, output, command, [labels, base.selector_labels, *base.adapters])

    def collect() -> Result:
        found = read_report(job)
        by_kind = found["agree_at_1"]
        rows = []
        for name in by_kind["choice"]:
            row = {"name": name}
            for kind in ("kl", "choice"):
                figures = by_kind[kind][name]
                row |= {f"{kind}_agree": figures["agree_at_1"], f"{kind}_agree_ci": figures["ci"]}
                if "spearman" in figures:
                    low, high = figures["spearman_ci"]
                    row[f"{kind}_rank"] = f"{figures['spearman']:.2f} [{low:.2f}, {high:.2f}]"
            rows.append(row)
        columns = [("who chooses", "name", "text"), ("Agree@1, top-KL points", "kl_agree", "interval")]
        columns += [
            ("Spearman there", "kl_rank", "text"),
            ("Agree@1, points with a choice", "choice_agree", "interval"),
        ]
        columns += [("Spearman there", "choice_rank", "text")]
        counts = found["meta"]
        hits = ", ".join(f"@{size} {100 * share:.1f}" for size, share in found["hit_at_k"].items())
        notes = [
            f"{counts['points']} labelled points: {counts['kl_points']} of the top KL, {counts['choice_points']} with "
            f"two or more candidates above the floor. Hit at the top-KL points, per cent: {hits}."
        ]
        return Result(columns, rows, notes, [job_text(job)])

    return collect


def variants(pipeline: Pipeline, spec: dict) -> Collect:
    """S2T-Local with one thing changed at a time.

    `label_problems`: how many. `limit`: test problems, by default all. `variants`: list of `name` and what differs:
    `train`, `label` (arguments of the recipes), `router: false`, `rounds: 2` (the second one learns from one text of
    each problem, in as many steps), `decoding` (arguments of eval.py). `policy`: what is compared.
    """
    limit, calibration = spec.get("label_problems"), pipeline.labels("calibration")
    seeds = range(spec.get("seeds", pipeline.pair.num_seeds))
    evaluations = {}
    for variant in spec["variants"]:
        name = variant["name"]
        labels = pipeline.selector_labels(limit, **variant.get("label", {}))
        settings = {"calibration": calibration, "decode": False, "route": variant.get("router", True)}
        settings |= variant.get("train", {})
        if variant.get("rounds", 1) == 2:  # the first round's selector writes what the second one learns from
            epochs = {}
            if pipeline.num_rollouts > 1:
                epochs["num_train_epochs"] = f"{pipeline.pair.train['num_train_epochs'] * pipeline.num_rollouts:g}"
            adapters = []
            for seed in seeds:
                writer = pipeline.selector(labels, seed, **settings)
                texts = pipeline.labels("label", limit, adapter=writer, rollout_policy="s2t-local")
                adapters.append(pipeline.selector(texts, seed, **settings | epochs))
        else:
            adapters = [pipeline.selector(labels, seed, **settings) for seed in seeds]
        policy = variant.get("policy", spec["policy"])
        evaluations[name] = (
            policy,
            pipeline.evaluation(
                f"{spec['name']}{tag({'variant': name.replace(' ', '_')})}",
                policies=["greedy", policy],
                adapters=adapters,
                limit=spec.get("limit"),
                **variant.get("decoding", {}),
            ),
            adapters,
        )

    def collect() -> Result:
        rows, cost = [], {}
        base_name = spec["variants"][0]["name"]
        base_policy, base_job, _ = evaluations[base_name]
        for name, (policy, job, adapters) in evaluations.items():
            report = read_report(job)
            row = next(row for row in report["rows"] if row["label"] == policy)
            more = {} if name == base_name else difference(job, policy, base_job, base_policy)
            agree = [
                json.loads((adapter.path / "calibration.json").read_text(encoding="utf-8"))["in_sample_points"]
                for adapter in adapters
            ]
            if all(agree):
                more["agree"] = 100 * float(np.mean([points["fused"]["agree_at_1"] for points in agree]))
                more["bare_agree"] = 100 * float(np.mean([points["selector"]["agree_at_1"] for points in agree]))
            rows.append(row_of(row, report, variant=name, **more))
            cost[name] = {"seconds_vs_greedy": row["seconds_vs_greedy"]}
        columns = [("changed", "variant", "text"), *ACCURACY[:2]]
        columns += [(f"minus {base_name}", "difference", "signed interval"), ACCURACY[3]]
        columns += [
            ("Agree@1, score alone", "bare_agree", "1f"),
            ("Agree@1, fused", "agree", "1f"),
            *COST[:1],
            COST[2],
        ]
        number = limit or pipeline.pair.label_problems or pipeline.pair.sizes["label"]
        notes = [
            problems_note(read_report(base_job)),
            f"{number} label problems, {len(seeds)} seeds each; policy {base_policy} unless the row says otherwise. "
            "Agree@1 with the teacher at points with a choice, on the calibration problems, on which the weights of "
            "the fused score were fitted.",
        ]
        return Result(columns, rows, notes, [job_text(job) for _, job, _ in evaluations.values()], cost)

    return collect


def efficiency(pipeline: Pipeline, spec: dict) -> Collect:
    """Accuracy by number of label problems, for S2T-Local and both imitations; each with its best learning rate.

    `problems`: numbers. `epochs`: number -> passes over the problems of a method that has one text of each; with
    several texts there are as many fewer, so all take as many steps. `seeds`: trainings of each; `fewer_seeds`: number
    of problems -> where they are fewer.
    """
    runs: dict[tuple[int, str], tuple] = {}
    pair = pipeline.pair
    for number in spec["problems"]:
        seeds = range(spec.get("fewer_seeds", {}).get(number, spec.get("seeds", pair.num_seeds)))
        held_out = max(spec.get("min_calibration", 30), round(0.6 * number))
        held_out = None if held_out >= pipeline.pair.sizes["calibration"] else held_out
        calibration = pipeline.labels("calibration", held_out)
        for method in METHODS:
            is_local = method == "s2t-local"
            texts = pipeline.selector_labels(number) if is_local else pipeline.labels("label", number)
            epochs = spec["epochs"][number] / (pipeline.num_rollouts if is_local else 1)
            usual = (pair.train if is_local else pair.baseline).get("num_train_epochs")
            options = {} if epochs == usual else {"num_train_epochs": f"{epochs:g}"}  # not twice under two names
            rates = pair.learning_rates_by_problems.get(number, {}).get(method)
            tried = pipeline.seeds if number == pair.label_problems else seeds  # there it is that of other tables
            sweep = pipeline.sweep(method, texts, calibration=calibration, seeds=tried, rates=rates, **options)
            best = sweep.best()[: len(seeds)]
            label = spec["policy"] if is_local else method
            more = {"adapters": best} if is_local else {"tuned": [(method, job) for job in best]}
            name = f"{spec['name']}-{method}-{number}"
            job = pipeline.evaluation(name, policies=["greedy", label], **more)
            runs[number, method] = (label, job, sweep, texts, calibration)

    def collect() -> Result:
        rows, commands = [], []
        for number in spec["problems"]:
            row: dict[str, Any] = {"problems": number}
            for method in METHODS:
                label, job, sweep, texts, calibration = runs[number, method]
                found = next(found for found in read_report(job)["rows"] if found["label"] == label)
                row |= {method: found["accuracy"], f"{method}_ci": found["accuracy_ci"]}
                row[f"{method}_by_seed"] = seed_by_seed(found["accuracy_by_seed"])
                row[f"{method}_rate"] = sweep.best_rate()
                commands.append(job_text(job))
                if method == "s2t-local":
                    row["tokens"] = teacher_tokens_of(texts) + teacher_tokens_of(calibration)
                else:
                    row["imitation_tokens"] = teacher_tokens_of(texts)  # of "sft" about as many: it writes them
            ours, ours_job = runs[number, "s2t-local"][:2]
            for method in ("sft", "kd"):
                label, job = runs[number, method][:2]
                found = difference(ours_job, ours, job, label)
                row |= {f"over_{method}": found["difference"], f"over_{method}_ci": found["difference_ci"]}
            rows.append(row)
        columns = [("label problems", "problems", "count"), ("teacher tokens, S2T-Local", "tokens", "count")]
        columns += [("teacher tokens, imitation", "imitation_tokens", "count")]
        columns += [("S2T-Local", "s2t-local", "interval"), ("LoRA on the teacher's texts", "sft", "interval")]
        columns += [("LoRA distillation", "kd", "interval"), ("S2T-Local − texts", "over_sft", "signed interval")]
        columns += [("S2T-Local − distillation", "over_kd", "signed interval")]
        notes = [
            f"{number} problems, {training_rate_note(method, runs[number, method][2])}"
            for method in METHODS
            for number in spec["problems"]
        ]
        return Result(columns, rows, notes, commands)

    return collect


def stacking(pipeline: Pipeline, spec: dict) -> Collect:
    """A selector on top of a student that imitates already, trained on fresh problems, beside imitating them too.

    `methods`: "sft", "kd". The tuned student is merged into a model; labels of it, and for it a selector and a second
    round of the same imitation, each with the best learning rate for the first seed's student. `label`: arguments of
    recipes/label.py for these labels. `train`: arguments that both trainings share. `learning_rates`: as of a pair, by
    default that one's. `seeds`: students of each method.
    """
    base = Base.of(pipeline)
    seeds = spec.get("seeds", pipeline.pair.num_seeds)
    options = spec.get("train", {})
    runs, sweeps = {}, {}
    for method in spec["methods"]:
        for seed, imitation in enumerate(base.imitation(method).best()[:seeds]):
            on_top = pipeline.on_top_of(imitation, f"{method}{seed}")
            calibration = on_top.labels("calibration")
            labels = on_top.labels("fresh", **spec.get("label", {}))
            trained = {}
            for kind, more in (("s2t-local", {"route": False}), (method, {})):
                settings = {"calibration": calibration} | options | more
                if seed == 0:  # the other seeds are other students
                    rates = spec.get("learning_rates", {}).get(kind)
                    sweeps[method, kind] = on_top.sweep(kind, labels, seeds=[seed], rates=rates, **settings)
                    trained[kind] = Best(sweeps[method, kind])
                else:
                    trained[kind] = on_top.train(kind, labels, seed, sweeps[method, kind], **settings)
            runs[method, seed] = on_top.evaluation(
                f"{spec['name']}-{method}",
                policies=["greedy", "s2t-local:always", "s2t-local-bare:always", method, "s2t:always"],
                adapters=[trained["s2t-local"]],
                tuned=[(method, trained[method])],
            )
    name = f"{spec['name']}-alone"
    alone = pipeline.evaluation(name, policies=["greedy", "s2t-local:always"], adapters=base.adapters[:seeds])

    def collect() -> Result:
        report = read_report(alone)  # what the parts reach by themselves
        rows = [row_of(row, report, student="as it was") for row in report["rows"]]
        notes = [problems_note(report)]
        for method in spec["methods"]:
            jobs = [job for (found, _), job in runs.items() if found == method]
            reports = [read_report(job) for job in jobs]
            correct = {}
            for label in [row["label"] for row in reports[0]["rows"]]:
                right_SN = np.concatenate(correct_by_seed(*((job, label) for job in jobs)))
                correct[label] = right_SN
                greedy_SN = correct["greedy"]
                by_seed = 100 * right_SN.mean(1)
                row = {
                    "student": f"after {method}",
                    "policy": label_of(next(row for row in reports[0]["rows"] if row["label"] == label)),
                    "accuracy": float(by_seed.mean()),
                    "accuracy_ci": [100 * edge for edge in bootstrap_interval(right_SN.mean(0))],
                    "by_seed": seed_by_seed(by_seed),
                }
                if label != "greedy":
                    gain_N = 100 * (right_SN - greedy_SN).mean(0)
                    row |= {"gain": float(gain_N.mean()), "gain_ci": bootstrap_interval(gain_N)}
                    helped = ((right_SN > greedy_SN).sum(1), (right_SN < greedy_SN).sum(1))
                    row["flips"] = " / ".join(f"{round(values.mean(), 1):g}" for values in helped)
                    row["mcnemar_p"] = max(mcnemar(int(good), int(bad)) for good, bad in zip(*helped))
                rows.append(row)
            ours = "s2t-local:always"
            ours_SN, *on_top = correct_by_seed((alone, ours), *((job, ours) for job in jobs))
            gap_N = 100 * (np.concatenate(on_top).mean(0) - ours_SN.mean(0))
            found = {"difference": float(gap_N.mean()), "difference_ci": bootstrap_interval(gap_N)}
            notes.append(sentence(f"S2T-Local on top of {method}", "S2T-Local alone", found))
            gap_N = 100 * (correct[ours] - correct[method]).mean(0)
            found = {"difference": float(gap_N.mean()), "difference_ci": bootstrap_interval(gap_N)}
            notes.append(sentence(f"S2T-Local on top of {method}", f"{method} on top of {method}", found))
        notes += [f"after {method}, {training_rate_note(kind, sweep)}" for (method, kind), sweep in sweeps.items()]
        columns = [("student", "student", "text"), ("policy", "policy", "text"), *ACCURACY]
        return Result(columns, rows, notes, [job_text(job) for job in (alone, *runs.values())])

    return collect


def retention(pipeline: Pipeline, spec: dict) -> Collect:
    """How far each method moves the model on text that it was not trained for, by recipes/retention.py. `problems`:
    the first ones of the test."""
    base = Base.of(pipeline)
    labels = pipeline.labels("test", spec.get("problems"))
    tuned = [(method, job) for method in spec["methods"] for job in base.imitation(method).best()]
    needs = [labels, *base.adapters, *(job for _, job in tuned)]
    text = dict(pipeline.pair.other_text)
    if not text:
        words = pipeline.data("words")
        text["text"] = words.path
        needs.append(words)
    name = "retention" + ("" if "problems" not in spec else f"-{labels.path.name}")
    output = pipeline.folder / f"{name}.json"

    def command() -> list[str]:
        options = {
            "model": pipeline.model,
            "labels": labels.path,
            "tuned": [f"{method}={job.path}" for method, job in tuned],
            "adapters": [adapter.path for adapter in base.adapters],
            "dtype": pipeline.pair.dtype,
            "output": output,
        } | text
        return [recipe("retention.py"), *as_arguments(options)]

    job = pipeline.add(name, output, command, needs)

    def collect() -> Result:
        rows = []
        for row in read_report(job)["rows"]:
            values = {"who": name_of(row["name"])}
            for figure, kinds in (("kl", ("generated", "prompts", "text")), ("loss", ("generated", "text"))):
                for kind in kinds:
                    if row[kind] is None:  # no token of it
                        continue
                    found = row[kind][figure]
                    low, high = found["ci"]
                    values[f"{figure}_{kind}"] = f"{found['value']:.3f} [{low:.3f}, {high:.3f}]"
            rows.append(values)
        columns = [("model", "who", "text"), ("KL, its own text", "kl_generated", "text")]
        columns += [("KL, prompts", "kl_prompts", "text"), ("KL, other text", "kl_text", "text")]
        columns += [("loss, its own text", "loss_generated", "text"), ("loss, other text", "loss_text", "text")]
        return Result(columns, rows, [], [job_text(job)])

    return collect


def objective(pipeline: Pipeline, spec: dict) -> Collect:
    """Agree@1 of one training setting after another, by benchmarks/objective.py. `variants`: of its VARIANTS."""
    labels = pipeline.selector_labels()
    output = pipeline.folder / f"{spec['name']}.json"
    seeds = spec.get("seeds", pipeline.pair.num_seeds)
    command = ["benchmarks/objective.py", "--recipe", spec["recipe"], "--model", pipeline.model]
    command += ["--labels", str(labels.path), "--variants", *spec["variants"], "--seeds", str(seeds)]
    job = pipeline.add(spec["name"], output, [*command, "--json", str(output)], [labels, *pipeline.models])

    def collect() -> Result:
        found = read_report(job)
        first = found["rows"][0]
        rows = []
        for variant in spec["variants"]:
            own = [row for row in found["rows"] if row["variant"] == variant]
            row = {"variant": variant}
            for key in ("agree_at_1", "fused_agree_at_1"):
                values = [100 * figures[key] for figures in own]
                row |= {key: float(np.mean(values)), f"{key}_ci": [min(values), max(values)]}
            rows.append(row)
        columns = [
            ("changed", "variant", "text"),
            ("Agree@1, score alone [lowest, highest]", "agree_at_1", "interval"),
        ]
        columns += [("Agree@1, fused", "fused_agree_at_1", "interval")]
        settings = found["meta"]
        notes = [
            f"{settings['num_train']} problems to train on, {settings['num_fusion']} to fit the fused score on, "
            f"{settings['num_held_out']} others with {first['points']} points to measure; {seeds} seeds. The first of "
            f"the student: {100 * first['student_first']:.1f}, its second: {100 * first['second_candidate']:.1f}."
        ]
        return Result(columns, rows, notes, [job_text(job)])

    return collect


def latency(pipeline: Pipeline, spec: dict) -> Collect:
    """What selecting costs, by benchmarks/decode.py, which runs alone. `arguments`: its command line."""
    output = pipeline.folder / f"{spec['name']}.json"
    job = pipeline.add(spec["name"], output, ["benchmarks/decode.py", *spec["arguments"], "--json", str(output)])
    job.alone = True

    def collect() -> Result:
        found = json.loads(output.read_text(encoding="utf-8"))
        rows = [
            row
            | {
                "way": row["name"] + (f", {row['scope']} scope, {row['proposals']} proposals" if row["scope"] else ""),
                "ratio_text": "{:.2f}x [{:.2f}, {:.2f}]".format(row["ratio"], *row["ratio_range"]),
            }
            for row in found["rows"]
        ]
        columns = [("way", "way", "text"), ("asked, %", "asked_rate", "share"), ("batch", "batch", "count")]
        columns += [("prompt", "prefix", "count"), ("time [lowest, highest turn]", "ratio_text", "text")]
        columns += [("processor time", "cpu_ratio", "times"), ("forwards per token", "forwards_per_token", "2f")]
        meta = found["meta"]
        notes = [
            f"Random weights of the shape {meta['shape']}, {meta['layers']} layers, vocabulary {meta['vocab']}, "
            f"{meta['new_tokens']} new tokens, K = {meta['num_candidates']}, {meta['threads']} threads, "
            f"{meta['device']}. Times differ from run to run."
        ]
        return Result(columns, rows, notes, [job_text(job)], holds_times=True)

    return collect


KINDS: dict[str, Callable[[Pipeline, dict], Collect]] = {
    "sufficiency": sufficiency,
    "policies": policies,
    "fidelity": fidelity,
    "variants": variants,
    "efficiency": efficiency,
    "stacking": stacking,
    "retention": retention,
    "objective": objective,
    "latency": latency,
}


def job_text(job: Job) -> str:
    return shlex.join(["python", *job.arguments()])
