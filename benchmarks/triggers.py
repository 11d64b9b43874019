"""When to ask the selector: five triggers on two pairs of models, apart from what the selector then chooses.

    python benchmarks/triggers.py --json runs/benchmarks/triggers.json --plot runs/benchmarks/triggers.png
    python benchmarks/triggers.py --quick                                  # under a minute, on a finished `make demo`
    python benchmarks/triggers.py --babyllama weak strong --babyllama_data gsm8k --json FILE     # the second pair too
    python benchmarks/triggers.py --from_json FILE --markdown              # the tables again

Embedded pair. Takes the selectors and routers of `make demo` (and runs it where it is not there), calibrates copies of
them on 1000 fresh problems, because 0.5 % of the demo's 300 is a handful of tokens, and decodes the demo's test
problems with every trigger at every rate. Accuracy is that of the final answers. `helped` and `hurt` are problems,
against greedy decoding.

Babyllama pair. Two pretrained story models that solve nothing, so no text is generated: at every token of stored texts
of the small model the trigger fires or does not, by thresholds from the calibration labels, and where it fires the
selector may replace the small model's first token. Accuracy is the share of all those tokens that are the larger
model's best candidate above the floor. `helped` and `hurt` are tokens.

Both: how well a trigger's value tells the tokens at which the larger model would choose another candidate (AUC and
average precision on held-out test labels, behind the warm-up), what fusion changes at the points with a choice, how
close achieved rates come to their targets, and what one reading of a router costs.

All models and labels are kept (RUN/triggers, BABYLLAMA_RUN): started again, this goes on where it stopped.

Legend: N generated tokens, P problems, R resamples, L points of a curve.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from setting import SHAPES, Parser, check_file, check_range, device_name, random_model
from transformers import PreTrainedModel

from transformers_s2t import FusionWeights, LocalSelector, SelectorConfig, __version__, triggers
from transformers_s2t.calibration.router_training import (
    RouterData,
    auc,
    average_precision,
    gains,
    precision_recall,
    trigger_metrics,
)
from transformers_s2t.calibration.scored_points import TARGET_RATES, ScoredPoints, read_router, score_labels
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME
from transformers_s2t.files import write_json
from transformers_s2t.labels.folder import read_header, read_labels
from transformers_s2t.router import HiddenTap, Router, RouterConfig, RouterHead
from transformers_s2t.triggers import calibrate_threshold


RECIPES = Path(__file__).resolve().parents[1] / "recipes"

sys.path.append(str(RECIPES / "embedded"))
from corpus import build_split, write_jsonl  # noqa: E402

from s2t_recipes.demo import PARTS, Stages, check_same_run, recipe  # noqa: E402
from s2t_recipes.models import load_model  # noqa: E402


PAIRS = ("embedded", "babyllama")
TRIGGERS = ("entropy", "margin", "router", "kl", "random")
CALIBRATED = TRIGGERS[:-1]
FIRED = ("to_correct", "first_is_best", "no_choice")
#: babyllama's labels: file, questions to skip, questions.
BABYLLAMA_PARTS = {
    "train": ("train.jsonl", 0, 1500),
    "tuning": ("train.jsonl", 1500, 300),
    "calibration": ("train.jsonl", 1800, 600),
    "test": ("test.jsonl", 0, 500),
}
BARE_RATE = 0.1
CHECK_SHARE = 0.0  # of the calibration problems: the test problems tell more
CLOSE = 0.2  # relative error of an achieved rate that counts as met
MIN_GAIN = RouterConfig(1, 1).min_gain
NUM_RESAMPLES = 2000
MAX_CURVE_POINTS = 200
QUICK = {"num_seeds": 1, "rates": [0.02, 0.1], "num_test": 100, "num_calibration": 200, "cost_layers": 2, "turns": 3}
DEFINITIONS = {
    "auc": "held-out test labels, tokens behind the warm-up: the chance that a token at which the teacher's best "
    "candidate above the floor is not the student's first has a bigger trigger value than one at which it is",
    "auc_gain": f"the same for tokens at which it gains more than {MIN_GAIN:g} nats",
    "auc_choice, auc_gain_choice": "among tokens with two or more candidates above the floor",
    "accuracy": "per cent; embedded: of problems solved; babyllama: of generated tokens that are the teacher's best "
    "candidate above the floor, teacher-forced on the student's text",
    "helped, hurt": "embedded: problems that greedy has wrong and this right, and the reverse; babyllama: tokens",
    "achieved_rate": "tokens at which the trigger fired / generated tokens, on the test problems",
    "asked_rate": "those with two or more candidates above the floor",
    "intervals": f"95 % percentile bootstrap over problems, {NUM_RESAMPLES} resamples",
}


# --- what is known of every token ------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Every generated token of labelled texts, row by row.

    Attributes:
        values: trigger -> (N,), bigger = more in doubt.
        gain_N: nats by which the teacher likes its best candidate above the floor better than the first.
        choice_N: two or more candidates above the floor.
        late_N: behind the warm-up, where a trigger can fire.
        problem_N: index of the text.
    """

    values: dict[str, torch.Tensor]
    gain_N: torch.Tensor
    choice_N: torch.Tensor
    late_N: torch.Tensor
    problem_N: torch.Tensor

    def where(self, keep_N: torch.Tensor) -> Tokens:
        return Tokens(
            {name: values_N[keep_N] for name, values_N in self.values.items()}, *(t[keep_N] for t in self[1:])
        )


def read_tokens(
    labels: Dataset,
    config: SelectorConfig,
    router_values: Sequence[torch.Tensor] | None = None,
    seed: int = 0,
) -> Tokens:
    """What labels say of every generated token, and the router's logits there; random values are uniform."""
    lengths = [len(row) for row in labels["divergence"]]
    values = {
        "entropy": torch.cat([torch.tensor(row) for row in labels["entropy"]]),
        "margin": torch.cat([torch.tensor(row) for row in labels["margin"]]),
        "kl": torch.cat([torch.tensor(row) for row in labels["divergence"]]),
        "random": torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)),
    }
    if router_values is not None:
        values["router"] = torch.cat(list(router_values))
    floor = np.log(config.min_prob_ratio) if config.min_prob_ratio else -np.inf
    return Tokens(
        {name: values[name] for name in TRIGGERS if name in values},
        torch.cat([gains(row, config.min_prob_ratio) for row in labels]),
        values["margin"] >= floor,
        torch.cat([torch.arange(length) >= config.warmup_tokens for length in lengths]),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
    )


# --- how well a value tells ------------------------------------------------------------------------------------------


def draw_weights(num_problems: int, seed: int = 0) -> np.ndarray:
    """How often each problem is in each resample, (R, P)."""
    shares = np.full(num_problems, 1 / num_problems)
    return np.random.default_rng(seed).multinomial(num_problems, shares, NUM_RESAMPLES).astype(np.float64)


def interval_of(values_R: np.ndarray) -> list[float]:
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return [round(float(low), 5), round(float(high), 5)]


def ratio_interval(numerator_P: np.ndarray, denominator_P: np.ndarray, scale: float = 1.0) -> list[float]:
    """95 % interval of sum / sum over problems."""
    weights_RP = draw_weights(len(numerator_P))
    return interval_of(scale * (weights_RP @ numerator_P) / np.maximum(weights_RP @ denominator_P, 1e-12))


def resampled_auc(values_N: torch.Tensor, positive_N: torch.Tensor, problem_N: torch.Tensor) -> np.ndarray:
    """The AUC in each resample of the problems, (R,): from the pairs won between each two problems."""
    num_problems = int(problem_N.max()) + 1
    values_N, positive_N, problem_N = values_N.double().numpy(), positive_N.numpy().astype(bool), problem_N.numpy()
    positive_values, owners = values_N[positive_N], problem_N[positive_N]
    wins_PP = np.zeros((num_problems, num_problems))
    order = np.argsort(problem_N[~positive_N], kind="stable")
    counts_P = np.bincount(problem_N[~positive_N], minlength=num_problems)
    for problem, values in enumerate(np.split(values_N[~positive_N][order], counts_P.cumsum()[:-1])):
        values = np.sort(values)
        won = np.searchsorted(values, positive_values, "left") + np.searchsorted(values, positive_values, "right")
        wins_PP[:, problem] = np.bincount(owners, weights=won / 2, minlength=num_problems)
    weights_RP = draw_weights(num_problems)
    num_pairs_R = (weights_RP @ np.bincount(owners, minlength=num_problems)) * (weights_RP @ counts_P)
    return ((weights_RP @ wins_PP) * weights_RP).sum(1) / np.where(num_pairs_R > 0, num_pairs_R, np.nan)


def tell_apart(tokens: Tokens) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Trigger -> AUCs, average precision and interval; and trigger -> its AUC in each resample."""
    known = tokens.where(tokens.late_N & ~tokens.gain_N.isnan())
    positive_N = known.gain_N > 0
    data = RouterData({}, known.gain_N[:, None], known.gain_N, known.values["kl"], known.choice_N, known.problem_N)
    config = RouterConfig(1, 1)
    figures, resamples = {}, {}
    for trigger, values_N in known.values.items():
        metrics = trigger_metrics(values_N, data, config)
        resamples[trigger] = resampled_auc(values_N, positive_N, known.problem_N)
        figures[trigger] = {
            "auc": round(auc(values_N, positive_N), 5),
            "auc_ci": interval_of(resamples[trigger]),
            "auc_gain": metrics.get("auc_gain"),
            "auc_choice": metrics.get("auc_differs_choice"),
            "auc_gain_choice": metrics.get("auc_gain_choice"),
            "average_precision": round(average_precision(values_N, positive_N), 5),
            "tokens": len(values_N),
            "positives": int(positive_N.sum()),
        }
    return figures, resamples


def thin_curve(values_N: torch.Tensor, positive_N: torch.Tensor) -> dict[str, list[float]]:
    """Precision and recall at no more than `MAX_CURVE_POINTS` thresholds, evenly spread over the recall."""
    precision_L, recall_L = precision_recall(values_N, positive_N)
    wanted = torch.linspace(float(recall_L[0]), 1.0, MAX_CURVE_POINTS, dtype=recall_L.dtype)
    at = torch.searchsorted(recall_L, wanted).clamp_max(len(recall_L) - 1).unique()
    return {
        "recall": [round(value, 4) for value in recall_L[at].tolist()],
        "precision": [round(value, 4) for value in precision_L[at].tolist()],
    }


def summarize_aucs(pair: str, figures: list[dict], resamples: list[dict[str, np.ndarray]]) -> tuple[list, dict]:
    """Means over seeds with intervals, and the paired difference of the router and the better of entropy and margin.

    The better one is taken anew in each resample.
    """
    means = []
    for trigger in TRIGGERS:
        row = {"pair": pair, "trigger": trigger}
        for name in ("auc", "auc_gain", "auc_choice", "auc_gain_choice", "average_precision"):
            row[name] = round(statistics.fmean(seed[trigger][name] for seed in figures), 5)
        row["auc_ci"] = interval_of(np.mean([seed[trigger] for seed in resamples], axis=0))
        row["by_seed"] = [seed[trigger]["auc"] for seed in figures]
        means.append(row)
    auc_of = {row["trigger"]: row["auc"] for row in means}
    difference_R = np.mean(
        [seed["router"] - np.maximum(seed["entropy"], seed["margin"]) for seed in resamples], axis=0
    )
    gain = {
        "pair": pair,
        "difference": round(auc_of["router"] - max(auc_of["entropy"], auc_of["margin"]), 5),
        "ci": interval_of(difference_R),
        "better": max(("entropy", "margin"), key=auc_of.get),
    }
    return means, gain


# --- decoded texts ---------------------------------------------------------------------------------------------------


def decoded_row(records: list[dict], greedy: list[dict]) -> dict[str, Any]:
    """Accuracy, flips of problems and achieved rates from the records of recipes/eval.py."""
    right_P = np.array([record["correct"] for record in records])
    greedy_P = np.array([record["correct"] for record in greedy])
    row = {
        "accuracy": round(100 * float(right_P.mean()), 4),
        "accuracy_ci": ratio_interval(right_P.astype(float), np.ones(len(right_P)), 100),
        "helped": int((right_P & ~greedy_P).sum()),
        "hurt": int((~right_P & greedy_P).sum()),
    }
    if "kinds" in records[0]:
        tokens_P = np.array([len(record["kinds"]) for record in records])
        for name, kinds in (("achieved_rate", "tkf"), ("asked_rate", "kf"), ("flip_rate", "f")):
            count_P = np.array([sum(map(record["kinds"].count, kinds)) for record in records])
            row[name] = round(float(count_P.sum() / tokens_P.sum()), 6)
            if name == "achieved_rate":
                row["achieved_ci"] = ratio_interval(count_P.astype(float), tokens_P.astype(float))
        row["tokens"] = int(tokens_P.sum())
    return row


# --- stored texts ----------------------------------------------------------------------------------------------------


class Decisions(NamedTuple):
    """What would be written at every generated token, were the selector asked there, against the teacher's best
    candidate above the floor. Without a choice the first candidate is that one."""

    first_right_N: torch.Tensor
    chosen_right_N: torch.Tensor
    flipped_N: torch.Tensor


def decide_everywhere(labels: Dataset, points: ScoredPoints, fusion: FusionWeights) -> Decisions:
    """Decisions (N,) of points that lie in the order of the labels' rows.

    Raises:
        ValueError: where they do not.
    """
    at = []
    start = 0
    for positions, prompt_length, divergence in zip(
        labels["positions"], labels["prompt_length"], labels["divergence"]
    ):
        at += [start + position - prompt_length for position in positions]
        start += len(divergence)
    at_N = torch.tensor(at)
    divergence_N = torch.cat([torch.tensor(row) for row in labels["divergence"]])
    if len(at_N) != len(points.divergence_N) or not torch.equal(divergence_N[at_N], points.divergence_N):
        raise ValueError("the scored points are not in the order of the labels' rows.")
    first_right_N, chosen_right_N = torch.ones(start, dtype=torch.bool), torch.ones(start, dtype=torch.bool)
    flipped_N = torch.zeros(start, dtype=torch.bool)
    choice_N, target_N = points.choice(fusion), points.target_N
    first_right_N[at_N], chosen_right_N[at_N] = target_N == 0, choice_N == target_N
    flipped_N[at_N] = choice_N != 0
    return Decisions(first_right_N, chosen_right_N, flipped_N)


def forced_row(fires_N: torch.Tensor, tokens: Tokens, decisions: Decisions) -> dict[str, Any]:
    """Agreement, flips of tokens and rates, where the selector decides at the tokens that fire and have a choice."""
    fires_N = fires_N & tokens.late_N
    asked_N = fires_N & tokens.choice_N
    first_N, chosen_N, flipped_N = decisions
    right_N = torch.where(asked_N, chosen_N, first_N)
    sizes_P = torch.bincount(tokens.problem_N).double().numpy()

    def by_problem(flags_N: torch.Tensor) -> np.ndarray:
        return torch.bincount(tokens.problem_N, weights=flags_N.double(), minlength=len(sizes_P)).numpy()

    def share(flags_N: torch.Tensor, scale: float = 1.0) -> float:
        return round(scale * float(flags_N.double().mean()), 6)

    return {
        "accuracy": share(right_N, 100),
        "accuracy_ci": ratio_interval(by_problem(right_N), sizes_P, 100),
        "helped": int((asked_N & ~first_N & chosen_N).sum()),
        "hurt": int((asked_N & first_N & ~chosen_N).sum()),
        "other": int((asked_N & flipped_N & ~first_N & ~chosen_N).sum()),
        "achieved_rate": share(fires_N),
        "achieved_ci": ratio_interval(by_problem(fires_N), sizes_P),
        "asked_rate": share(asked_N),
        "flip_rate": share(asked_N & flipped_N),
        "tokens": len(fires_N),
        "ceiling": share(asked_N | first_N, 100),
    }


def threshold_of(trigger: str, calibration: Tokens, rate: float) -> float:
    """As decoding has it: uniform values need no calibration; the warm-up counts but never fires."""
    if trigger == "random":
        return 1.0 - rate
    values_N = calibration.values[trigger].double()
    return calibrate_threshold(values_N.masked_fill(~calibration.late_N, -torch.inf), rate)


def fired_rows(pair: str, seed: int, tokens: Tokens, rates: list[float]) -> list[dict[str, Any]]:
    """What the tokens are at which a trigger fires, at thresholds that give each rate on these very tokens."""
    rows = []
    for trigger, values_N in tokens.values.items():
        values_N = values_N.double().masked_fill(~tokens.late_N, -torch.inf)
        for rate in rates:
            fires_N = values_N >= calibrate_threshold(values_N, rate)
            corrected_N = tokens.gain_N > 0
            kinds = (corrected_N, tokens.choice_N & ~corrected_N, ~tokens.choice_N)
            counts = [int((kind_N & fires_N).sum()) for kind_N in kinds]
            row = {name: round(count / max(1, sum(counts)), 5) for name, count in zip(FIRED, counts)}
            rows.append({"pair": pair, "trigger": trigger, "seed": seed, "rate": rate, **row})
    return rows


def flip_rows(pair: str, seed: int, points: ScoredPoints, fusion: FusionWeights) -> list[dict[str, Any]]:
    """What a selector changes at the points with a choice, by its score alone and fused."""
    points = points.with_choice()
    common = {"pair": pair, "seed": seed, "points": len(points.target_N)}
    first = float((points.target_N == 0).float().mean())
    rows = [common | {"decision": "student", "agree_at_1": round(100 * first, 4), "helped": 0, "hurt": 0, "other": 0}]
    for name, weights in (("bare", FusionWeights()), ("fused", fusion)):
        agree = round(100 * points.agreement(weights), 4)
        rows.append(common | {"decision": name, "agree_at_1": agree, **points.flips(weights)._asdict()})
    return rows


def check_row(row: dict[str, Any]) -> dict[str, Any]:
    """Target and achieved rate of a row on problems that calibration has not seen."""
    error = row["achieved_rate"] / row["rate"] - 1
    return {name: row[name] for name in ("pair", "trigger", "seed", "rate", "achieved_rate", "achieved_ci")} | {
        "relative_error": round(error, 4),
        "is_close": abs(error) <= CLOSE,
    }


# --- the embedded pair -----------------------------------------------------------------------------------------------


def is_complete(run: Path, num_seeds: int) -> bool:
    """Whether `make demo` has got as far as calibrated adapters with routers."""
    if not (run / "demo.json").is_file():
        return False
    first = read_json(run / "demo.json")["seed"]
    wanted = [run / f"adapter-seed{first + k}" for k in range(num_seeds)]
    files = [adapter / name for adapter in wanted for name in (CALIBRATION_NAME, ROUTER_WEIGHTS_NAME)]
    return all(file.is_file() for file in files) and all(is_labelled(run / "labels" / part) for part in PARTS)


def is_labelled(folder: Path) -> bool:
    """Whether recipes/label.py has finished there."""
    header = read_header(folder) if folder.is_dir() else None
    return header is not None and header.complete


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def write_fresh_problems(file: Path, run: Path, num_problems: int, data_seed: int) -> None:
    """Problems of the split "calibration" that the run has in none of its own."""
    if file.is_file():
        return
    known: set[str] = set()
    for part in PARTS:
        known |= set(read_labels(run / "labels" / part, split="all")[0]["problem_id"])
    rows = [row for row in build_split("calibration", 2 * num_problems, data_seed) if row["id"] not in known]
    if len(rows) < num_problems:
        raise ValueError(f"--num_calibration must be at most {len(rows)}, got {num_problems}.")
    write_jsonl(rows[:num_problems], file)


def copy_adapter(source: Path, target: Path) -> None:
    """An adapter without its calibration, whole or not at all."""
    if target.is_dir():
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    ignored = shutil.ignore_patterns("checkpoint-*", "training_args.bin", CALIBRATION_NAME)
    shutil.copytree(source, temporary, ignore=ignored)
    temporary.replace(target)


def policies_of(args: argparse.Namespace, is_first: bool) -> list[str]:
    """What recipes/eval.py runs for one selector; the first one brings what needs no selector."""
    bare = bare_rate(args.rates)
    rated = [f"{trigger}:{rate:g}" for trigger in TRIGGERS for rate in args.rates]
    policies = ["greedy", *(f"s2t-local:{name}" for name in rated), "s2t-local:always", "s2t-local-bare:always"]
    policies += [f"s2t-local-bare:{trigger}:{bare:g}" for trigger in ("router", "kl")]
    return policies + (["teacher", "s2t:always", *(f"s2t:{name}" for name in rated)] if is_first else [])


def bare_rate(rates: list[float]) -> float:
    return BARE_RATE if BARE_RATE in rates else max(rates)


def prepare_embedded(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrates and decodes what is not on disk yet; returns where everything is."""
    run = args.run
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    is_new = not is_complete(run, args.num_seeds)
    work = run / ("triggers-quick" if args.quick else "triggers")
    stages = Stages(total=3 + is_new, env=env, logs=work / "logs")
    if is_new:
        stages.start("`make demo`: selectors and routers")
        demo = [recipe("demo.py"), "--output_dir", str(run), "--num_seeds", str(args.num_seeds)]
        stages.run([*demo, "--policies", "greedy"])
    settings = read_json(run / "demo.json")
    for name in ("model", "teacher_model", "dataset"):
        if not Path(settings[name]).exists():
            raise ValueError(f"--run {run} was made with {name}={settings[name]!r}, which is not there: start this "
                             "where the demo was started.")  # fmt: skip
    if not (Path(settings["dataset"]) / "corpus.py").is_file():
        raise ValueError(f"--run must be a demo of recipes/embedded, got one of {settings['dataset']!r}.")
    seeds = range(settings["seed"], settings["seed"] + args.num_seeds)
    sources = [run / f"adapter-seed{seed}" for seed in seeds]
    weights = [digest_of(source / name) for source in sources for name in ("adapter_model.safetensors",
               ROUTER_WEIGHTS_NAME)]  # fmt: skip
    made_with = {"num_calibration": args.num_calibration, "rates": args.rates, "weights": weights}
    check_same_run(work / "made-with.json", made_with)
    models = ["--model", settings["model"], "--teacher_model", settings["teacher_model"]]
    length = str(settings["max_new_tokens"])

    stages.start(f"Labels of {args.num_calibration} fresh problems to calibrate on")
    problems, labels = work / "calibration.jsonl", work / "labels"
    write_fresh_problems(problems, run, args.num_calibration, settings["seed"] + 1000)
    if not is_labelled(labels):
        stages.run(
            [recipe("label.py"), *models, "--dataset", str(problems), "--output_dir", str(labels)]
            + ["--max_new_tokens", length, "--batch_size", "250", "--dtype", "float32"]
        )
    stages.start("Calibration of copies of the selectors")
    adapters = [work / source.name for source in sources]
    for source, adapter in zip(sources, adapters):
        copy_adapter(source, adapter)
    commands = {
        f"seed {k}": [recipe("calibrate.py"), "--adapter", str(adapter), *models, "--labels", str(labels)]
        + ["--batch_size", "250", "--dtype", "float32", "--check_share", str(CHECK_SHARE)]
        + ["--triggers", *CALIBRATED, "--target_rates", *map(str, args.rates)]
        for k, adapter in enumerate(adapters)
        if not (adapter / CALIBRATION_NAME).is_file()
    }
    if commands:
        stages.run_side_by_side(commands, 2)
    stages.start("Decoding the test problems with every trigger at every rate")
    outputs = [work / f"decoded-seed{k}" for k in range(args.num_seeds)]
    stages.run_side_by_side(
        {
            f"seed {k}": [recipe("eval.py"), *models, "--adapters", str(adapter), "--output_dir", str(outputs[k])]
            + ["--dataset", str(run / "data" / "test.jsonl"), "--answer_style", "hash", "--max_new_tokens", length]
            + ["--batch_size", "250", "--dtype", "float32", "--limit", str(args.num_test), "--seed", str(k)]
            + ["--num_examples", "0", "--policies", *policies_of(args, k == 0)]
            for k, adapter in enumerate(adapters)
        },
        2,
    )
    return {
        "model": settings["model"],
        "adapters": adapters,
        "outputs": outputs,
        "test": run / "labels" / "test",
        "problems": run / "data" / "test.jsonl",
    }


def is_local(policy: str) -> bool:
    return policy.startswith("s2t-local")


def records_of(output: Path, policy: str) -> list[dict]:
    """What recipes/eval.py kept of a policy, one record per problem."""
    name = policy.replace(":", "_") + ("_adapter0" if is_local(policy) else "")
    lines = (output / "records" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def measure_embedded(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds everything about the embedded pair to the report."""
    made = prepare_embedded(args)
    tested = [json.loads(line)["id"] for line in made["problems"].read_text(encoding="utf-8").splitlines()]
    tested = set(tested[: args.num_test])
    labels, _ = read_labels(made["test"])
    labels = in_order(labels.select([i for i, id in enumerate(labels["problem_id"]) if id in tested]))
    first = made["outputs"][0]
    greedy = records_of(first, "greedy")

    def decoded(seed: int, policy: str) -> dict[str, Any]:
        return decoded_row(records_of(made["outputs"][seed], policy), greedy)

    read_pair("embedded", made["model"], made["adapters"], labels, report)
    for row in report["rows"]:
        if row["pair"] == "embedded":
            row |= decoded(row["seed"], f"s2t-local:{row['trigger']}:{row['rate']:g}")
    for trigger in TRIGGERS:
        for rate in args.rates:
            figures = decoded(0, f"s2t:{trigger}:{rate:g}")
            report["ceilings"].append({"pair": "embedded", "trigger": trigger, "seed": 0, "rate": rate, **figures})
    references = {"greedy": None, "teacher": None, "teacher selects everywhere": "s2t:always"}
    references |= {"always, fused": "s2t-local:always", "always, bare": "s2t-local-bare:always"}
    bare = f"{bare_rate(args.rates):g}"
    for trigger in ("router", "kl"):
        for name, policy in (("fused", "s2t-local"), ("bare", "s2t-local-bare")):
            references[f"{trigger} {float(bare):.0%}, {name}"] = f"{policy}:{trigger}:{bare}"
    for name, policy in references.items():
        policy = policy or name
        seeds = range(args.num_seeds if is_local(policy) else 1)
        report["references"].append(reference("embedded", name, [decoded(seed, policy) for seed in seeds]))


def reference(pair: str, name: str, by_seed: list[dict]) -> dict[str, Any]:
    """A row beside the triggers: mean over seeds."""
    shared = {"pair": pair, "name": name, "accuracy": round(statistics.fmean(row["accuracy"] for row in by_seed), 4)}
    return shared | {"by_seed": by_seed}


# --- both pairs, on labels -------------------------------------------------------------------------------------------


def in_order(labels: Dataset) -> Dataset:
    """Shortest rows first, the order in which points are scored."""
    lengths = [len(ids) for ids in labels["input_ids"]]
    return labels.select(sorted(range(len(labels)), key=lambda i: lengths[i]))


def read_pair(
    pair: str,
    model_name: str,
    adapters: list[Path],
    labels: Dataset,
    report: dict[str, Any],
    calibration: Dataset | None = None,
) -> None:
    """Adds what the labels say: AUCs, curves, flips, and rows with an AUC and, with calibration labels, accuracy."""
    figures, resamples = [], []
    rates = report["meta"]["settings"]["rates"]
    everywhere = {}
    for seed, adapter in enumerate(adapters):
        model = load_model(str(model_name), "float32", torch.device("cpu"))
        selector = LocalSelector.from_pretrained(adapter, model)
        config, fusion = selector.selector_config, selector.fusion or FusionWeights()
        router_values = read_router(selector, labels)
        tokens = read_tokens(labels, config, router_values, seed)
        points = score_labels(selector, labels, router_values=router_values)
        report["flips"] += flip_rows(pair, seed, points, fusion)
        report["fired"] += fired_rows(pair, seed, tokens, rates)
        found, drawn = tell_apart(tokens)
        figures.append(found)
        resamples.append(drawn)
        report["aucs"] += [{"pair": pair, "trigger": trigger, "seed": seed, **found[trigger]} for trigger in TRIGGERS]
        if seed == 0:
            known = tokens.where(tokens.late_N & ~tokens.gain_N.isnan())
            for trigger in TRIGGERS:
                curve = thin_curve(known.values[trigger], known.gain_N > 0)
                report["precision_recall"].append({"pair": pair, "trigger": trigger, "seed": seed, **curve})
        rows = [
            {"pair": pair, "trigger": trigger, "seed": seed, "rate": rate, "auc": found[trigger]["auc"]}
            for trigger in TRIGGERS
            for rate in rates
        ]
        report["rows"] += rows
        if calibration is not None:
            fit = read_tokens(calibration, config, read_router(selector, calibration), seed + 1000)
            everywhere[seed] = tokens, fit, {
                "fused": decide_everywhere(labels, points, fusion),
                "bare": decide_everywhere(labels, points, FusionWeights()),
            }  # fmt: skip
        report["meta"]["pairs"][pair] = {
            "texts": len(labels),
            "tokens": len(tokens.gain_N),
            "routers": [SelectorConfig.from_pretrained(adapter).router for adapter in adapters],
            "router_layer": [
                Router.from_pretrained(adapter, model, allow_other_model=True).config.layer for adapter in adapters
            ],
            "fusion": report["meta"]["pairs"].get(pair, {}).get("fusion", []) + [vars(fusion)],
        }
        del model, selector
        gc.collect()
    means, gain = summarize_aucs(pair, figures, resamples)
    report["auc_means"] += means
    report["router_gain"].append(gain)
    if calibration is not None:
        add_forced(pair, rates, everywhere, report)


def add_forced(pair: str, rates: list[float], everywhere: dict[int, tuple], report: dict[str, Any]) -> None:
    """Fills the rows of a pair that is measured on stored texts."""
    for row in report["rows"]:
        if row["pair"] != pair:
            continue
        tokens, fit, decisions = everywhere[row["seed"]]
        threshold = threshold_of(row["trigger"], fit, row["rate"])
        found = forced_row(tokens.values[row["trigger"]] >= threshold, tokens, decisions["fused"])
        report["ceilings"].append(
            {name: row[name] for name in ("pair", "trigger", "seed", "rate")}
            | {"accuracy": found.pop("ceiling"), "achieved_rate": found["achieved_rate"]}
        )
        row |= {"threshold": round(threshold, 6), **found}
    bare = bare_rate(rates)
    by_name: dict[str, list[dict]] = {}
    for tokens, fit, decisions in everywhere.values():
        nowhere, always = torch.zeros_like(tokens.choice_N), torch.ones_like(tokens.choice_N)
        by_name.setdefault("greedy", []).append(forced_row(nowhere, tokens, decisions["fused"]))
        for name in ("fused", "bare"):
            by_name.setdefault(f"always, {name}", []).append(forced_row(always, tokens, decisions[name]))
        for trigger in ("router", "kl"):
            fires_N = tokens.values[trigger] >= threshold_of(trigger, fit, bare)
            for name in ("fused", "bare"):
                row = forced_row(fires_N, tokens, decisions[name])
                by_name.setdefault(f"{trigger} {bare:.0%}, {name}", []).append(row)
    report["references"] += [
        reference(pair, name, found[:1] if name == "greedy" else found) for name, found in by_name.items()
    ]


# --- the babyllama pair ----------------------------------------------------------------------------------------------


def prepare_babyllama(args: argparse.Namespace) -> list[Path]:
    """Labels, selectors, routers and calibration that are not there yet; returns the adapters."""
    weak, strong = map(str, args.babyllama)
    folder, config = args.babyllama_run, RECIPES / "babyllama"
    labels = {part: folder / "labels" / part for part in BABYLLAMA_PARTS}
    adapters = [folder / f"adapter-seed{seed}" for seed in range(args.num_seeds)]
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    stages = Stages(total=4, env=env, logs=folder / "logs")

    def run(title: str, commands: dict[str, list[str]]) -> None:
        stages.start(f"{title}: {len(commands)} to do")
        if commands:
            stages.run_side_by_side(commands, 2)

    missing = [part for part in labels if not is_labelled(labels[part])]
    if missing and args.babyllama_data is None:
        raise ValueError(f"--babyllama_data must be given: {folder} has no finished labels of {', '.join(missing)}.")
    commands = {}
    for part in missing:
        name, skip, limit = BABYLLAMA_PARTS[part]
        command = [recipe("label.py"), "--config", str(config / "label.yaml"), "--model", weak]
        command += ["--teacher_model", strong, "--dataset", str(args.babyllama_data / name)]
        command += ["--skip", str(skip)] * bool(skip)
        commands[part] = [*command, "--limit", str(limit), "--output_dir", str(labels[part])]
    run("Babyllama, labels", commands)
    data = ["--labels", str(labels["train"]), "--eval_labels", str(labels["tuning"])]
    run(
        "Babyllama, selectors",
        {
            f"seed {seed}": [recipe("train.py"), "--config", str(config / "train.yaml"), "--model", weak, *data]
            + ["--seed", str(seed), "--output_dir", str(adapter)]
            for seed, adapter in enumerate(adapters)
            if not (adapter / "s2t_config.json").is_file()
        },
    )
    run(
        "Babyllama, routers",
        {
            f"seed {seed}": [recipe("train_router.py"), "--adapter", str(adapter), "--model", weak, *data]
            + ["--seed", str(seed), "--dtype", "float32"]
            for seed, adapter in enumerate(adapters)
            if not SelectorConfig.from_pretrained(adapter).router
        },
    )
    run(
        "Babyllama, calibration",
        {
            f"seed {seed}": [recipe("calibrate.py"), "--adapter", str(adapter), "--model", weak, "--deployed", "false"]
            + ["--labels", str(labels["calibration"]), "--dtype", "float32"]
            for seed, adapter in enumerate(adapters)
            if not (adapter / CALIBRATION_NAME).is_file()
        },
    )
    return adapters


def measure_babyllama(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds everything about the babyllama pair to the report."""
    adapters = prepare_babyllama(args)
    test, calibration = (read_labels(args.babyllama_run / "labels" / part)[0] for part in ("test", "calibration"))
    if args.quick:
        test, calibration = (
            labels.select(range(min(size, len(labels))))
            for labels, size in ((test, args.num_test), (calibration, args.num_calibration))
        )
    read_pair("babyllama", args.babyllama[0], adapters, in_order(test), report, calibration)


# --- what a reading costs --------------------------------------------------------------------------------------------


def time_readings(
    model: PreTrainedModel, batch_size: int, prefix_length: int, turns: int, repeats: int
) -> dict[str, Any]:
    """Seconds of one decoding step, one reading of a router and one entropy, in turn; ratios within a turn."""
    config = model.config.get_text_config()
    router_config = RouterConfig(config.hidden_size, config.num_hidden_layers)
    torch.manual_seed(0)
    router = Router(model, RouterHead(router_config), router_config)
    ids_BT = torch.randint(3, config.vocab_size, (batch_size, prefix_length + 1))

    def median_of(function, count: int) -> float:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    samples = []
    with torch.no_grad(), HiddenTap(router.read) as tap:
        past = model(ids_BT[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        last = {}

        def step() -> None:
            last["logits_BV"] = model(ids_BT[:, -1:], past_key_values=past, use_cache=True, logits_to_keep=1).logits[
                :, -1
            ]

        def timed_step() -> float:
            seconds = median_of(step, 1)
            past.crop(-1)
            return seconds

        timed_step()
        hidden_BD = tap.hidden.take()[:, -1]
        logits_BV = last["logits_BV"]
        for turn in range(turns + 1):  # the first one warms up
            found = (
                statistics.median(timed_step() for _ in range(repeats)),
                median_of(lambda: router.logits(hidden_BD, logits_BV), 5 * repeats),
                median_of(lambda: triggers.entropy(logits_BV), 5 * repeats),
            )
            if turn:
                samples.append(found)
    row: dict[str, Any] = {"batch": batch_size, "prefix": prefix_length, "turns": turns}
    row |= {"layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "vocab": config.vocab_size}
    row["step_milliseconds"] = round(1000 * statistics.median(sample[0] for sample in samples), 4)
    for place, name in ((1, "router"), (2, "entropy")):
        ratios = [sample[place] / sample[0] for sample in samples]
        row[f"{name}_milliseconds"] = round(1000 * statistics.median(sample[place] for sample in samples), 4)
        row[f"{name}_ratio"] = round(statistics.median(ratios), 5)
        row[f"{name}_ratio_range"] = [round(min(ratios), 5), round(max(ratios), 5)]
    return row


def measure_cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of a random model of the shape of Qwen2.5-0.5B with its whole vocabulary, and of the embedded student."""
    shape = "qwen2.5-0.5b"
    layers = SHAPES[shape][2] if args.cost_layers is None else args.cost_layers
    settings = argparse.Namespace(shape=shape, num_layers=layers, vocab_size=151936, dtype="float32", device="cpu")
    if args.quick:
        settings.vocab_size = SHAPES[shape][-1]
    rows = []
    model = random_model(settings, num_positions=512, eos_token_id=None)
    for batch_size in (1, 8):
        found = time_readings(model, batch_size, 256, args.turns, repeats=3 if layers > 4 else 10)
        rows.append({"model": f"{shape}, random weights", "dtype": "float32", **found})
    del model
    gc.collect()
    model = load_model(str(RECIPES / "embedded" / "student"), "float32", torch.device("cpu"))
    for batch_size in (1, 8):
        found = time_readings(model, batch_size, 48, args.turns, repeats=50)
        rows.append({"model": "embedded student", "dtype": "float32", **found})
    return rows


# --- all of it -------------------------------------------------------------------------------------------------------


def empty_report(args: argparse.Namespace) -> dict[str, Any]:
    import transformers

    names = ("quick", "num_seeds", "rates", "num_test", "num_calibration", "turns", "cost_layers")
    meta = {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_s2t": __version__,
        "settings": {name: getattr(args, name) for name in names},
        "definitions": DEFINITIONS,
        "pairs": {},
        "skipped": [],
    }
    lists = (
        "rows",
        "ceilings",
        "references",
        "auc_means",
        "router_gain",
        "aucs",
        "fired",
        "flips",
        "calibration",
        "cost",
    )
    return {"meta": meta} | {name: [] for name in (*lists, "precision_recall")}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    report = empty_report(args)
    measure_embedded(args, report)
    if args.babyllama is not None:
        measure_babyllama(args, report)
    else:
        report["meta"]["skipped"].append("babyllama (--babyllama WEAK STRONG)")
    report["calibration"] = [check_row(row) for row in report["rows"] if row["trigger"] != "random"]
    if args.cost:
        report["cost"] = measure_cost(args)
    else:
        report["meta"]["skipped"].append("cost (--no-cost)")
    return report


# --- what is said ----------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A title, the names of its columns, its cells, and sentences beneath."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the lowest and highest value where there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def pairs_of(report: dict[str, Any]) -> list[str]:
    return [pair for pair in PAIRS if any(row["pair"] == pair for row in report["rows"])]


def values_of(rows: list[dict], column: str, **where: Any) -> list[float]:
    return [row[column] for row in rows if all(row[key] == value for key, value in where.items())]


def auc_table(report: dict[str, Any]) -> Table:
    names = {"auc_gain": "gain", "auc_choice": "choices", "auc_gain_choice": "gain, choices"}
    head = ["pair", "trigger", "AUC", "95 % interval", *names.values(), "average precision"]
    rows, notes = [], []
    for pair in pairs_of(report):
        for row in (row for row in report["auc_means"] if row["pair"] == pair):
            low, high = row["auc_ci"]
            cells = [f"{row['auc']:.3f}", f"[{low:.3f}, {high:.3f}]", *(f"{row[name]:.3f}" for name in names)]
            rows.append([pair, row["trigger"], *cells, f"{row['average_precision']:.3f}"])
        gain = next(row for row in report["router_gain"] if row["pair"] == pair)
        one = next(row for row in report["aucs"] if row["pair"] == pair)
        low, high = gain["ci"]
        notes.append(
            f"{pair}: router minus the better of entropy and margin ({gain['better']}) {gain['difference']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}]; {one['positives']} of {one['tokens']} tokens are positive."
        )
    notes.append(
        "AUC of a trigger's value for “the teacher's best candidate above the floor is not the student's first”; "
        f"gain: “and gains more than {MIN_GAIN:g} nats”; choices: among tokens with two or more candidates above the "
        f"floor. Mean of the seeds ({report['meta']['settings']['num_seeds']}), intervals over problems."
    )
    return Table("How well a trigger tells where the student should be corrected", head, rows, notes)


def accuracy_table(report: dict[str, Any]) -> Table:
    rates = report["meta"]["settings"]["rates"]
    head = ["pair", "trigger", *(f"{100 * rate:g} %" for rate in rates)]
    rows, notes = [], []
    for pair in pairs_of(report):
        for trigger in TRIGGERS:
            cells = [spread(values_of(report["rows"], "accuracy", pair=pair, trigger=trigger, rate=rate), ".1f")
                     for rate in rates]  # fmt: skip
            rows.append([pair, trigger, *cells])
        for trigger in ("router", "kl"):
            cells = [spread(values_of(report["ceilings"], "accuracy", pair=pair, trigger=trigger, rate=rate), ".1f")
                     for rate in rates]  # fmt: skip
            rows.append([pair, f"{trigger}, teacher selects", *cells])
        others = [row for row in report["references"] if row["pair"] == pair]
        others = [f"{row['name']} {spread([one['accuracy'] for one in row['by_seed']], '.1f')}" for row in others]
        notes.append(f"{pair}: {'; '.join(others)}.")
    notes.append(
        "Per cent. embedded: problems solved. babyllama: tokens of the student's text that are the teacher's best "
        "candidate above the floor. Mean of the seeds, [lowest, highest]. Columns are target rates."
    )
    return Table("Accuracy by trigger and rate", head, rows, notes)


def by_trigger_and_rate(report: dict[str, Any], rows: list[dict], names: Sequence[str], form: Callable[..., str]):
    """Head and lines of a table: for each pair, trigger and rate, `form` of the means over seeds of some columns."""
    rates = report["meta"]["settings"]["rates"]
    lines = []
    for pair in pairs_of(report):
        for trigger in TRIGGERS:
            where = [{"pair": pair, "trigger": trigger, "rate": rate} for rate in rates]
            cells = [form(*(statistics.fmean(values_of(rows, name, **one)) for name in names)) for one in where]
            lines.append([pair, trigger, *cells])
    return ["pair", "trigger", *(f"{100 * rate:g} %" for rate in rates)], lines


def help_table(report: dict[str, Any]) -> Table:
    head, rows = by_trigger_and_rate(
        report, report["rows"], ("helped", "hurt"), lambda helped, hurt: f"+{helped:.0f} / −{hurt:.0f}"
    )
    notes = ["embedded: problems, against greedy; babyllama: tokens. Mean of the seeds."]
    return Table("Helped and hurt", head, rows, notes)


def fired_table(report: dict[str, Any]) -> Table:
    head, rows = by_trigger_and_rate(
        report, report["fired"], FIRED, lambda *shares: " / ".join(f"{100 * share:.0f}" for share in shares)
    )
    notes = [
        "Per cent of the tokens at which a trigger fires on the student's own test texts: to correct / a choice, but "
        "the student's first is the best / no choice: one candidate above the floor. Mean of the seeds."
    ]
    return Table("What fires", head, rows, notes)


def flip_table(report: dict[str, Any]) -> Table:
    head = ["pair", "decision", "agrees with the teacher, %", "helped", "hurt", "other"]
    rows, notes = [], []
    for pair in pairs_of(report):
        for decision in ("student", "bare", "fused"):
            where = {"pair": pair, "decision": decision}
            cells = [spread(values_of(report["flips"], "agree_at_1", **where), ".1f")]
            for name in ("helped", "hurt", "other"):
                cells.append("" if decision == "student" else spread(values_of(report["flips"], name, **where), ".0f"))
            rows.append([pair, decision, *cells])
        notes.append(f"{pair}: {values_of(report['flips'], 'points', pair=pair)[0]} points with a choice.")
    notes.append("bare: by the selector's score alone. helped: from wrong to right; other: from wrong to wrong.")
    return Table("Fusion at the points with a choice (test labels)", head, rows, notes)


def calibration_table(report: dict[str, Any]) -> Table:
    rates = report["meta"]["settings"]["rates"]
    head = ["pair", "trigger", *(f"{100 * rate:g} %" for rate in rates), "within 20 %"]
    rows = []
    for pair in pairs_of(report):
        for trigger in CALIBRATED:
            where = {"pair": pair, "trigger": trigger}
            cells = [spread([100 * value for value in values_of(report["calibration"], "achieved_rate", **where,
                     rate=rate)], ".2f") for rate in rates]  # fmt: skip
            close = values_of(report["calibration"], "is_close", **where)
            rows.append([pair, trigger, *cells, f"{sum(close)} of {len(close)}"])
    close = values_of(report["calibration"], "is_close")
    covered = [low <= row["rate"] <= high for row in report["calibration"] for low, high in [row["achieved_ci"]]]
    notes = [
        f"Achieved rate on the test problems, per cent of tokens. In all, {sum(close)} of {len(close)} are within "
        f"20 % of the target; {sum(covered)} of {len(covered)} intervals over test problems hold it.",
        "embedded: while decoding. babyllama: on stored text.",
    ]
    return Table("Target and achieved rate", head, rows, notes)


def cost_table(report: dict[str, Any]) -> Table:
    head = ["model", "batch", "decoding step, ms", "router, ms", "router / step", "entropy / step"]
    rows = []
    for row in report["cost"]:
        cells = [f"{row['step_milliseconds']:.2f}", f"{row['router_milliseconds']:.3f}"]
        for name in ("router", "entropy"):
            low, high = (100 * value for value in row[f"{name}_ratio_range"])
            cells.append(f"{100 * row[f'{name}_ratio']:.2f} % [{low:.2f}, {high:.2f}]")
        model = f"{row['model']}, {row['layers']} layers, V = {row['vocab']}, prefix {row['prefix']}"
        rows.append([model, str(row["batch"]), *cells])
    meta = report["meta"]
    notes = [
        f"float32, {meta['device']}, {meta['threads']} thread(s), median of {report['cost'][0]['turns']} turns, "
        "[lowest, highest]. entropy: of the trigger of that name, for comparison."
    ]
    return Table("What one reading of a router costs", head, rows, notes)


def make_tables(report: dict[str, Any]) -> list[Table]:
    tables = [auc_table(report), accuracy_table(report), help_table(report), fired_table(report)]
    tables += [flip_table(report), calibration_table(report)]
    return [*tables, *([cost_table(report)] if report["cost"] else [])]


def format_table(table: Table) -> str:
    """Plain text in columns."""
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (table.head, *table.rows)]
    return "\n".join([table.title, "", *lines, "", *table.notes])


def format_markdown(table: Table) -> str:
    lines = [f"### {table.title}", "", f"| {' | '.join(table.head)} |", "|---" * len(table.head) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in table.rows]
    return "\n".join([*lines, "", "\n\n".join(table.notes)])


def format_report(report: dict[str, Any], as_markdown: bool = False) -> str:
    parts = [(format_markdown if as_markdown else format_table)(table) for table in make_tables(report)]
    if report["meta"]["skipped"]:
        parts.append(f"Not measured: {', '.join(report['meta']['skipped'])}.")
    return ("\n\n" if as_markdown else "\n\n\n").join(parts)


# --- the picture -----------------------------------------------------------------------------------------------------


INK, FAINT, GRID = "#1f2430", "#7a8190", "#e4e7ec"
COLORS = {"entropy": "#4878a8", "margin": "#d9a441", "router": "#1b9e77", "kl": "#8e5ea2", "random": "#9aa1ad"}
TITLES = {
    "embedded": ("Embedded pair: problems solved, per cent", "greedy"),
    "babyllama": ("Babyllama pair: tokens as the larger model has them, per cent", "the small model alone"),
}


def spread_out(heights: list[float], least: float, low: float, high: float) -> list[float]:
    """The heights moved apart so that neighbours are `least` apart or more, within [low, high]."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [0.0] * len(heights)
    floor = low
    for i in order:
        placed[i] = floor = max(heights[i], floor)
        floor += least
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - least
    return placed


def draw_accuracy(axes: Any, report: dict[str, Any], pair: str) -> None:
    """Accuracy against the achieved rate: a line per trigger, a band over seeds, the oracle's ceiling, greedy."""
    rates = report["meta"]["settings"]["rates"]
    ends: list[tuple[float, float, str, str]] = []

    def line(rows: list[dict], trigger: str, name: str, **style: Any) -> None:
        own = [row for row in rows if (row["pair"], row["trigger"]) == (pair, trigger)]
        parts = [[row for row in own if row["rate"] == rate] for rate in rates]
        x = [100 * statistics.fmean(row["achieved_rate"] for row in part) for part in parts]
        y = [statistics.fmean(row["accuracy"] for row in part) for part in parts]
        axes.plot(x, y, color=COLORS[trigger], **style)
        if "marker" in style:
            band = [[edge(row["accuracy"] for row in part) for part in parts] for edge in (min, max)]
            axes.fill_between(x, *band, color=COLORS[trigger], alpha=0.18, linewidth=0)
        ends.append((x[-1], y[-1], name, COLORS[trigger]))

    for trigger in reversed(TRIGGERS):
        name = "kl (oracle)" if trigger == "kl" else trigger
        line(report["rows"], trigger, name, marker="o", markersize=4.5, linewidth=2.2, zorder=3)
    for trigger in ("router", "kl"):
        name = f"{trigger}, teacher selects"
        line(report["ceilings"], trigger, name, linestyle=(0, (4, 2)), linewidth=1.5, zorder=2)
    greedy = values_of(report["references"], "accuracy", pair=pair, name="greedy")[0]
    axes.axhline(greedy, color=INK, linewidth=1.2, linestyle=":", zorder=1)
    axes.set_xscale("log")
    left, right = 100 * min(rates) * 0.6, 100 * max(rates) * 1.25
    low, high = axes.get_ylim()
    low, high = low - 0.04 * (high - low), high + 0.01 * (high - low)
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.text(left * 1.05, greedy - 0.012 * (high - low), TITLES[pair][1], size=9.5, color=INK, va="top")
    heights = spread_out([end[1] for end in ends], 0.052 * (high - low), low, high - 0.03 * (high - low))
    for (x, y, name, color), height in zip(ends, heights):
        place = {"xytext": (right * 1.1, height), "va": "center", "annotation_clip": False}
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(name, (x, y), **place, size=10, color=color, weight="bold", arrowprops=arrow)
    axes.set_xticks([100 * rate for rate in rates], [f"{100 * rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("tokens at which the trigger fires, per cent (achieved)", size=10, color=INK)
    axes.set_title(TITLES[pair][0], loc="left", size=11, color=INK, weight="bold")


def draw_curves(axes: Any, report: dict[str, Any], pair: str) -> None:
    """Precision against recall, with the area beside each name."""
    area = {row["trigger"]: row["average_precision"] for row in report["auc_means"] if row["pair"] == pair}
    curves = {row["trigger"]: row for row in report["precision_recall"] if row["pair"] == pair}
    for trigger in reversed(TRIGGERS):
        recall, precision = ([100 * value for value in curves[trigger][name]] for name in ("recall", "precision"))
        axes.plot(recall, precision, color=COLORS[trigger], linewidth=1.8)
    style = {"transform": axes.transAxes, "va": "center"}
    axes.text(1.03, 0.96, "area (average precision)", size=9, color=FAINT, **style)
    for place, trigger in enumerate(sorted(TRIGGERS, key=area.get, reverse=True)):
        text = f"{area[trigger]:.3f}  {trigger}"
        axes.text(1.03, 0.82 - 0.125 * place, text, size=10, color=COLORS[trigger], weight="bold", **style)
    axes.set(xlim=(0, 100), ylim=(0, 103))
    axes.set_xlabel("recall: of the tokens to correct, per cent that fire", size=10, color=INK)
    axes.set_title("Precision: of the tokens that fire, per cent to correct", loc="left", size=10.5, color=INK)


def draw(report: dict[str, Any], file: Path) -> None:
    """Draws a report as one PNG, 1400 pixels wide: a column for each pair."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = pairs_of(report)
    figure = Figure(figsize=(14, 8.8), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    seeds = report["meta"]["settings"]["num_seeds"]
    title = "When to ask the selector: five triggers, the same selector"
    note = (
        f"lines: mean of {seeds} seed{'s' * (seeds > 1)}, bands: lowest to highest; dashed: the larger model selects"
    )
    figure.text(0.033, 0.968, title, size=14, weight="bold", color=INK, va="center")
    figure.text(0.967, 0.968, note, size=10, color=FAINT, va="center", ha="right")
    width = 1 / len(pairs)
    for column, pair in enumerate(pairs):
        left, wide = column * width + 0.033, width - 0.17
        upper = figure.add_axes((left, 0.385, wide, 0.51))
        draw_accuracy(upper, report, pair)
        lower = figure.add_axes((left, 0.065, wide, 0.215))
        draw_curves(lower, report, pair)
        for axes in (upper, lower):
            axes.grid(color=GRID, zorder=0)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelsize=9.5, labelcolor=FAINT)
            for spine in axes.spines.values():
                spine.set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp.png")
    figure.savefig(temporary)
    temporary.replace(file)


# --- command line ----------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(prog="triggers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, two rates, fewer problems; flags given beside it win")
    add("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`; made where missing [%(default)s]")
    add("--babyllama", type=Path, nargs=2, metavar=("WEAK", "STRONG"), help="the second pair's models [not measured]")
    add("--babyllama_data", type=Path, metavar="DIR", help="with GSM8K's train.jsonl and test.jsonl, to label")
    add("--babyllama_run", type=Path, default=Path("runs/babyllama"), metavar="DIR",
        help="labels and adapters; what is there is used, what is not is made [%(default)s]")  # fmt: skip
    add("--num_seeds", type=int, default=3, help="selectors of each pair [%(default)s]")
    add("--rates", type=float, nargs="+", default=list(TARGET_RATES), help="shares of tokens %(default)s")
    add("--num_test", type=int, default=500, help="test problems, embedded pair [%(default)s]")
    add("--num_calibration", type=int, default=1000, help="fresh calibration problems, embedded pair [%(default)s]")
    add("--cost", action=argparse.BooleanOptionalAction, default=True, help="time the router [yes]")
    add("--cost_layers", type=int, help="of the random model [all 24]")
    add("--turns", type=int, default=5, help="how often the router is timed [%(default)s]")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, metavar="FILE.png", help="draw them")
    add("--from_json", type=Path, metavar="FILE", help="measure nothing: tables and picture of these figures")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError for what could not be measured."""
    if not all(0 < rate <= 1 for rate in args.rates):
        raise ValueError(f"--rates must be in (0, 1], got {args.rates}.")
    least = {"num_seeds": 1, "num_test": 1, "num_calibration": 20, "cost_layers": 1, "turns": 1}
    check_range(args, least, {})
    for name in ("json", "plot"):
        check_file(f"--{name}", getattr(args, name))
    for name in ("run", "babyllama_run"):
        if getattr(args, name).is_file():
            raise ValueError(f"--{name} must be a folder, got {str(getattr(args, name))!r}.")
    for name in ("babyllama", "babyllama_data"):
        value = getattr(args, name)
        for folder in value if isinstance(value, list) else [value]:
            if folder is not None and not folder.is_dir():
                raise ValueError(f"--{name}: there is no folder {str(folder)!r}.")
    if args.babyllama_data is not None and args.babyllama is None:
        raise ValueError("--babyllama must be given with --babyllama_data.")
    if args.from_json is not None and not args.from_json.is_file():
        raise ValueError(f"--from_json: there is no file {str(args.from_json)!r}.")
    if args.from_json is not None and args.json is not None:
        raise ValueError("--from_json measures nothing: --json must not be given.")
    if args.plot is not None and args.plot.suffix != ".png":
        raise ValueError(f"--plot must end in .png, got {str(args.plot)!r}.")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The settings; leaves with status 2 and one line where one is wrong."""
    parser = make_parser()
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.rates = sorted(set(args.rates))
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's
    args = parse_arguments(argv)
    try:
        report = measure(args) if args.from_json is None else read_json(args.from_json)
    except (ValueError, OSError) as error:
        sys.exit(f"triggers.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntriggers.py: stopped. The same command goes on from here.")
    if args.from_json is None:
        print()
    print(format_report(report, args.markdown))
    if args.json is not None:
        write_json(args.json, report)
        print(f"\nwritten to {args.json}")
    if args.plot is not None:
        draw(report, args.plot)
        if not args.markdown:
            print(f"\ndrawn in {args.plot}")


if __name__ == "__main__":
    main()
