"""What the study reads, made where it is missing: labels, selectors, routers, calibration and decoded texts.

Knows which recipe comes when; measures nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from s2t_recipes.commands import RECIPES, CommandFailed, recipe
from s2t_recipes.demo import LABELLED_PARTS, check_same_run
from s2t_recipes.jobs import Job, Jobs, typed
from s2t_recipes.paper.pipeline import as_arguments
from s2t_recipes.records import read_records
from transformers_s2t import SelectorConfig
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME, S2T_CONFIG_NAME
from transformers_s2t.labels.folder import read_header, read_labels
from transformers_s2t.selector_files import ADAPTER_WEIGHTS_NAME, adapter_folder
from trigger_study import CALIBRATED, TRIGGERS, bare_rate


sys.path.append(str(RECIPES / "embedded"))
from corpus import build_split, write_jsonl  # noqa: E402


ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # every model and data set is a folder
NUM_PARALLEL = 2
CHECK_SHARE = 0.0  # share of the calibration problems that checks it: the test problems tell more
#: babyllama's labels: file, questions to skip, questions.
BABYLLAMA_PARTS = {
    "train": ("train.jsonl", 0, 1500),
    "tuning": ("train.jsonl", 1500, 300),
    "calibration": ("train.jsonl", 1800, 600),
    "test": ("test.jsonl", 0, 500),
}


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def is_unlabelled(folder: Path) -> bool:
    """Whether recipes/label.py has not finished there."""
    header = read_header(folder) if folder.is_dir() else None
    return header is None or not header.complete


def is_missing(file: Path) -> bool:
    return not file.is_file()


def has_no_router(adapter: Path) -> bool:
    return not SelectorConfig.from_pretrained(adapter).router


def command(script: str, **options: Any) -> list[str]:
    """Command line of a script of recipes/."""
    return [recipe(script), *as_arguments(options)]


def add_missing(jobs: Jobs, name: str, file: Path, command: list[str], *needs: Job) -> Job:
    """A job that is left out where its file is there, whoever made it."""
    return jobs.add(name, file, command, needs, only_if=partial(is_missing, file))


# The embedded pair


def is_complete(run: Path, num_seeds: int) -> bool:
    """Whether `make demo` has got as far as calibrated adapters with routers."""
    if is_missing(run / "demo.json"):
        return False
    first = read_json(run / "demo.json")["seed"]
    wanted = [run / f"adapter-seed{first + k}" for k in range(num_seeds)]
    files = [adapter / name for adapter in wanted for name in (CALIBRATION_NAME, ROUTER_WEIGHTS_NAME)]
    labels = [run / "labels" / part for part in LABELLED_PARTS]
    return not any(map(is_missing, files)) and not any(map(is_unlabelled, labels))


def run_demo(run: Path, num_seeds: int) -> None:
    """`make demo`, for its selectors and routers, with its output on the terminal."""
    arguments = command("demo.py", output_dir=run, num_seeds=num_seeds, policies="greedy")
    print(f"$ {typed(arguments)}", flush=True)
    if code := subprocess.run([sys.executable, *arguments], env=os.environ | ENV).returncode:
        raise CommandFailed(f"failed (exit status {code}): {typed(arguments)}")


def read_settings(run: Path) -> dict[str, Any]:
    """What a demo was made with.

    Raises:
        ValueError: where its models or data are not there, or are not those of recipes/embedded.
    """
    settings = read_json(run / "demo.json")
    for name in ("model", "teacher_model", "dataset"):
        if not Path(settings[name]).exists():
            raise ValueError(
                f"--run {run} was made with {name}={settings[name]!r}, which is not there: start this where the demo "
                "was started."
            )
    if is_missing(Path(settings["dataset"]) / "corpus.py"):
        raise ValueError(f"--run must be a demo of recipes/embedded, got one of {settings['dataset']!r}.")
    return settings


def write_fresh_problems(file: Path, run: Path, num_problems: int, data_seed: int) -> None:
    """Problems of the split "calibration" that the run has in none of its own."""
    if file.is_file():
        return
    known: set[str] = set()
    for part in LABELLED_PARTS:
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


def prepare_embedded(args: argparse.Namespace) -> tuple[str, list[Path], list[Path]]:
    """Calibrates and decodes what is not on disk yet; returns the small model and, for each seed, the adapter with the
    study's own calibration and what recipes/eval.py decoded with it."""
    run, work = args.run, args.run / ("triggers-quick" if args.quick else "triggers")
    if not is_complete(run, args.num_seeds):
        run_demo(run, args.num_seeds)
    settings = read_settings(run)
    sources = [run / f"adapter-seed{settings['seed'] + k}" for k in range(args.num_seeds)]
    trained = [(adapter_folder(source) / ADAPTER_WEIGHTS_NAME, source / ROUTER_WEIGHTS_NAME) for source in sources]
    weights = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for files in trained for file in files]
    made_with = {"num_calibration": args.num_calibration, "rates": args.rates, "weights": weights}
    check_same_run(work / "made-with.json", made_with)
    write_fresh_problems(work / "calibration.jsonl", run, args.num_calibration, settings["seed"] + 1000)
    adapters = [work / source.name for source in sources]
    outputs = [work / f"decoded-seed{k}" for k in range(args.num_seeds)]
    for source, adapter in zip(sources, adapters):
        copy_adapter(source, adapter)
    embedded_jobs(args, settings, work, adapters, outputs).run()
    return settings["model"], adapters, outputs


def embedded_jobs(
    args: argparse.Namespace, settings: dict[str, Any], work: Path, adapters: list[Path], outputs: list[Path]
) -> Jobs:
    """Labels of the fresh problems, and each selector's calibration on them and texts."""
    jobs, labels, problems = Jobs(work, NUM_PARALLEL, ENV), work / "labels", work / "calibration.jsonl"
    models = {"model": settings["model"], "teacher_model": settings["teacher_model"]}
    length, numbers = {"max_new_tokens": settings["max_new_tokens"]}, {"batch_size": 250, "dtype": "float32"}
    arguments = command("label.py", **models, dataset=problems, output_dir=labels, **length, **numbers)
    labelled = jobs.add("labels", labels, arguments, only_if=partial(is_unlabelled, labels))
    for k, (adapter, output) in enumerate(zip(adapters, outputs)):
        arguments = command("calibrate.py", adapter=adapter, **models, labels=labels, **numbers)
        arguments += as_arguments({"check_share": CHECK_SHARE, "triggers": CALIBRATED, "target_rates": args.rates})
        calibrated = add_missing(jobs, f"calibration-seed{k}", adapter / CALIBRATION_NAME, arguments, labelled)
        arguments = command("eval.py", **models, adapters=adapter, output_dir=output)
        test = {"dataset": args.run / "data" / "test.jsonl", "answer_style": "hash", **length, **numbers}
        test |= {"limit": args.num_test, "seed": k, "num_examples": 0, "policies": policies_of(args, k == 0)}
        arguments += as_arguments(test)
        jobs.add(f"decoding-seed{k}", output / "report.json", arguments, (calibrated,))
    return jobs


def is_local(policy: str) -> bool:
    return policy.startswith("s2t-local")


def records_of(output: Path, policy: str) -> list[dict]:
    """What recipes/eval.py kept of a policy, one record per problem."""
    name = policy.replace(":", "_") + ("_adapter0" if is_local(policy) else "")
    return read_records(output / "records" / f"{name}.jsonl")[1]


# The babyllama pair


def prepare_babyllama(args: argparse.Namespace) -> list[Path]:
    """Labels, selectors, routers and calibration that are not there yet; returns the adapters."""
    folder = args.babyllama_run
    missing = [part for part in BABYLLAMA_PARTS if is_unlabelled(folder / "labels" / part)]
    if missing and args.babyllama_data is None:
        raise ValueError(f"--babyllama_data must be given: {folder} has no finished labels of {', '.join(missing)}.")
    adapters = [folder / f"adapter-seed{seed}" for seed in range(args.num_seeds)]
    babyllama_jobs(args, adapters).run()
    return adapters


def babyllama_jobs(args: argparse.Namespace, adapters: list[Path]) -> Jobs:
    """Labels, and each seed's selector, router and calibration; nothing of it where it is there already."""
    jobs, (weak, strong) = Jobs(args.babyllama_run, NUM_PARALLEL, ENV), args.babyllama
    data = args.babyllama_data or Path()  # where no label is to be made there may be none
    labels = {part: args.babyllama_run / "labels" / part for part in BABYLLAMA_PARTS}
    configs = RECIPES / "babyllama"
    labelled = {}
    for part, (name, skip, limit) in BABYLLAMA_PARTS.items():
        arguments = command("label.py", config=configs / "label.yaml", model=weak, teacher_model=strong)
        rows = {"dataset": data / name, "skip": skip or None, "limit": limit, "output_dir": labels[part]}
        is_wanted = partial(is_unlabelled, labels[part])
        labelled[part] = jobs.add(f"labels-{part}", labels[part], arguments + as_arguments(rows), only_if=is_wanted)
    learned = {"model": weak, "labels": labels["train"], "eval_labels": labels["tuning"]}
    for seed, adapter in enumerate(adapters):
        arguments = command("train.py", config=configs / "train.yaml", **learned, seed=seed, output_dir=adapter)
        needs = (labelled["train"], labelled["tuning"])
        trained = add_missing(jobs, f"selector-seed{seed}", adapter / S2T_CONFIG_NAME, arguments, *needs)
        arguments = command("train_router.py", adapter=adapter, **learned, seed=seed, dtype="float32")
        file, is_wanted = adapter / ROUTER_WEIGHTS_NAME, partial(has_no_router, adapter)
        routed = jobs.add(f"router-seed{seed}", file, arguments, (trained,), only_if=is_wanted)
        arguments = command("calibrate.py", adapter=adapter, model=weak, deployed=False)
        arguments += as_arguments({"labels": labels["calibration"], "dtype": "float32"})
        needs = (routed, labelled["calibration"])
        add_missing(jobs, f"calibration-seed{seed}", adapter / CALIBRATION_NAME, arguments, *needs)
    return jobs
