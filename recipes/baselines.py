"""Tunes and trains what imitates the large model, on the problems of a finished demo, and measures it by S2T-Local.

    python recipes/baselines.py --run runs/demo

For each method (recipes/train_baseline.py): one training per learning rate, all of them measured on the tuning
problems; the best rate is trained once per selector seed; then all seeds and the run's own selectors are measured on
the test problems in one table. Equal problems for everybody: those of the run's label split. What is done is kept, so
the same command goes on where it stopped. This file knows which recipe comes when, and nothing of what they do.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from adapters import BASELINE_NAME
from commands import run
from demo import Stages, recipe
from evaluate import bootstrap_interval, read_records
from row_names import label_of


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA SFT and logit distillation, tuned, beside S2T-Local.")

    def add(name: str, help: str, **options) -> None:
        parser.add_argument(name, help=help + " (default: %(default)s)", **options)

    add("--run", "folder of a finished `make demo`", default="runs/demo")
    add("--methods", "sft, kd", nargs="+", default=["sft", "kd"])
    add(
        "--learning_rates",
        "tried on the tuning problems",
        nargs="+",
        type=float,
        default=[1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    )
    add("--num_train_epochs", "of every training", type=int, default=8)
    add("--per_device_train_batch_size", "texts per step", type=int, default=8)
    add(
        "--policies",
        "of S2T-Local, measured beside them",
        nargs="+",
        default=["s2t-local:router:0.1", "s2t-local:always"],
    )
    add("--answer_style", "how answers are read", default="hash")
    add("--batch_size", "sequences per generate call", type=int, default=250)
    add("--num_parallel", "recipes side by side", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(arguments)
    for method in args.methods:
        if method not in ("sft", "kd"):
            parser.error(f"`methods` must be among 'sft', 'kd', got {method!r}")
    if not all(rate > 0 for rate in args.learning_rates):
        parser.error(f"`learning_rates` must be above 0, got {args.learning_rates}")
    return args


def read_run(folder: Path) -> dict:
    """Settings of the demo, and its adapters.

    Raises:
        ValueError: where it is not finished.
    """
    if not (folder / "demo.json").is_file() or not (folder / "report.json").is_file():
        raise ValueError(f"`run` {str(folder)!r} is no folder of a finished `make demo`: run that first.")
    settings = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    adapters = json.loads((folder / "report.json").read_text(encoding="utf-8"))["meta"]["adapters"]
    return settings | {"adapters": adapters}


def accuracy_of(report: Path, policy: str) -> float:
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    return next(row["accuracy"] for row in rows if row["policy"] == policy)


def print_table(report: Path, notes: dict[str, dict]) -> None:
    """The test table in Markdown: accuracy, the paired gain, what a problem costs, how it was trained."""
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    print("\n| policy | seeds | accuracy | gain over greedy | helped / hurt | time | student tokens | trained with |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["accuracy_ci"]
        cells = [label_of(row), str(row["num_seeds"]), f"{row['accuracy']:.1f} [{low:.1f}, {high:.1f}]"]
        if row["gain"] is None:
            cells += ["", ""]
        else:
            low, high = row["gain_ci"]
            cells.append(f"{row['gain']:+.1f} [{low:+.1f}, {high:+.1f}]")
            cells.append(f"{row['helped']:g} / {row['hurt']:g}")
        cells.append("" if row["seconds_vs_greedy"] is None else f"{row['seconds_vs_greedy']:.1f}x")
        cells.append(f"{row['student_tokens']:.0f}")
        note = notes.get(row["policy"])
        cells.append("" if note is None else f"lr {note['learning_rate']:g}, {note['num_train_epochs']:g} epochs")
        print("| " + " | ".join(cells) + " |")


def print_differences(folder: Path, methods: list[str], policies: list[str]) -> None:
    """S2T-Local minus each imitation on the same problems, means over seeds, paired bootstrap over problems."""

    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    files = {row["label"]: [folder / "records" / name for name in row["records"]] for row in rows}

    def share_right(label: str) -> np.ndarray:
        return np.mean([[record["correct"] for record in read_records(file)[1]] for file in files[label]], axis=0)

    print()
    for policy in policies:
        for method in methods:
            difference_N = 100 * (share_right(policy) - share_right(method))
            low, high = bootstrap_interval(difference_N)
            print(f"{policy} minus {method}: {difference_N.mean():+.1f} [{low:+.1f}, {high:+.1f}] points")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    folder = Path(args.run)
    settings = read_run(folder)
    out = folder / "baselines"
    env = dict(os.environ) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    stages = Stages(total=4, env=env, logs=out / "logs")
    seeds = range(settings["seed"], settings["seed"] + len(settings["adapters"]))

    def train(method: str, rate: float, seed: int, output: Path) -> list[str]:
        return [
            *(recipe("train_baseline.py"), "--method", method, "--model", settings["model"]),
            *("--teacher_model", settings["teacher_model"], "--labels", str(folder / "labels" / "label")),
            *("--output_dir", str(output), "--learning_rate", f"{rate:g}", "--seed", str(seed), "--dtype", "float32"),
            *("--num_train_epochs", str(args.num_train_epochs), "--lora_dropout", "0", "--save_strategy", "no"),
            *("--per_device_train_batch_size", str(args.per_device_train_batch_size), "--bf16", "false"),
            *("--lr_scheduler_type", "linear", "--warmup_steps", "10", "--report_to", "none", "--logging_steps", "50"),
        ]

    def evaluate(part: str, output: Path, tuned: list[str], policies: list[str], adapters: list[str]) -> list[str]:
        return [
            *(recipe("evaluate.py"), "--model", settings["model"], "--output_dir", str(output)),
            *("--dataset", str(folder / "data" / f"{part}.jsonl"), "--answer_style", args.answer_style),
            *("--max_new_tokens", str(settings["max_new_tokens"]), "--batch_size", str(args.batch_size)),
            *("--tuned", *tuned, "--policies", "greedy", *policies),
            *(["--adapters", *adapters] if adapters else []),
        ]

    names = {(method, rate): f"{method}-{rate:g}" for method in args.methods for rate in args.learning_rates}
    stages.start("Learning rates: one training each")
    stages.run_side_by_side(
        {name: train(*key, settings["seed"], out / name) for key, name in names.items()}, args.num_parallel
    )
    stages.start("The rates on the tuning problems")
    tuned = [f"{name}={out / name}" for name in names.values()]
    stages.run(evaluate("tuning", out / "tuning", tuned, list(names.values()), []))
    best = {}
    for method in args.methods:
        accuracy = {
            rate: accuracy_of(out / "tuning" / "report.json", names[method, rate]) for rate in args.learning_rates
        }
        best[method] = max(accuracy, key=accuracy.get)
        shown = ", ".join(f"{rate:g}: {value:.1f}" for rate, value in accuracy.items())
        print(f"{method}: {shown}; {best[method]:g} is taken")
        if best[method] in (min(args.learning_rates), max(args.learning_rates)):
            print(f"  (the end of what was tried: add rates beyond {best[method]:g})")

    stages.start("One training for each seed at the best rate")
    final = {f"{method}-seed{seed}": (method, best[method], seed) for method in args.methods for seed in seeds}
    stages.run_side_by_side(
        {name: train(*key, out / f"{name}-{key[1]:g}") for name, key in final.items()}, args.num_parallel
    )
    stages.start("All of them on the test problems")
    tuned = [f"{method}={out / f'{name}-{rate:g}'}" for name, (method, rate, _) in final.items()]
    stages.run(evaluate("test", out / "test", tuned, [*args.methods, *args.policies], settings["adapters"]))
    notes = {}
    for name, (method, rate, _) in final.items():
        notes[method] = json.loads((out / f"{name}-{rate:g}" / BASELINE_NAME).read_text(encoding="utf-8"))
    print_table(out / "test" / "report.json", notes)
    print_differences(out / "test", args.methods, args.policies)


if __name__ == "__main__":
    run(main)
