"""The whole method in one command: data, labels, selectors, calibration, evaluation, picture.

    python recipes/demo.py --model recipes/embedded/student --teacher_model recipes/embedded/teacher \
        --dataset recipes/embedded --output_dir runs/demo

Plans one job for each command that a user would type (it is printed) and runs them stage by stage. A job that fails
stops everything with its own error. What is finished is kept: a job with a stamp in OUTPUT_DIR/done is not run again,
and in a folder without stamps, or where a command changed, every recipe skips what it finished. This file knows which
recipe comes when, and nothing of what they do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import AutoConfig, AutoTokenizer

from s2t_recipes.commands import RECIPES, recipe
from s2t_recipes.jobs import Job, JobFailed, Jobs, typed
from s2t_recipes.models import load_pretrained
from s2t_recipes.options import SmallParser
from s2t_recipes.problems import PROMPT_SETTINGS, encode_prompts, load_problems, read_template_kwargs
from s2t_recipes.splits import has_corpus_script, split_command
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME, S2T_CONFIG_NAME
from transformers_s2t.files import write_json
from transformers_s2t.reserved_tokens import check_same_vocabulary, find_reserved_token_ids


LABELLED_PARTS = ("label", "tuning", "calibration", "test")
#: Tuning and calibration problems for each label problem, as in recipes/embedded.
HELD_OUT_SHARE = 0.6


def part_sizes(num_train: int, num_test: int) -> dict[str, int]:
    held_out = max(1, round(HELD_OUT_SHARE * num_train))
    return {"label": num_train, "tuning": held_out, "calibration": held_out, "test": num_test}


def check_answers(file: Path) -> None:
    """Raises a ValueError where problems have no answer."""
    problems = load_problems(str(file))
    if unanswered := sum(problem.answer is None for problem in problems):
        counts = f"{unanswered} of the {len(problems)} problems of the part test"
        raise ValueError(f"`dataset`: {counts} have no answer to check generated texts against.")


def check_same_run(file: Path, settings: dict) -> None:
    """Notes what a folder is made with, or checks it: labels of one pair must not meet selectors of another.

    Raises:
        ValueError: naming what differs.
    """
    if not file.is_file():
        write_json(file, settings)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"`output_dir` {str(file.parent)!r} was made with {name}={before.get(name)!r}, now {name}={value!r}: "
                "choose another --output_dir, or remove that folder."
            )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = SmallParser("What is run, and on what")
    embedded = os.path.relpath(RECIPES / "embedded")
    add = parser.add_argument
    add("--model", default=f"{embedded}/student", help="Small model: a Hub id or a local folder.")
    add("--teacher_model", default=f"{embedded}/teacher", help="Large model, with the same tokenizer.")
    add("--dataset", default=embedded, help="Hub id, folder with train and test files or a corpus.py, or one file.")
    add("--output_dir", default="runs/demo", help="Folder for everything that is made.")
    add("--num_seeds", type=int, default=3, help="Number of selectors.")
    text = "Problems to label for training; 0.6 times as many for tuning and for calibration."
    add("--limit_train", type=int, default=500, help=text)
    add("--limit_test", type=int, default=500, help="Problems to evaluate on.")
    text = "Largest number of tokens of a solution (default: 72 for a folder with a corpus.py, else 256)."
    add("--max_new_tokens", type=int, help=text)
    text = "Sequences per generate call (default: 250 for a folder with a corpus.py, else 64)."
    add("--batch_size", type=int, help=text)
    text = "YAML for `s2t train` (default: train.yaml of the data set, where it has one)."
    add("--train_config", help=text)
    text = "YAML for `s2t label`, for what selectors learn from (default: label.yaml of the data set)."
    add("--label_config", help=text)
    add("--add_reserved_tokens", action="store_true", help="Resize a model that has no reserved tokens.")
    add("--policies", nargs="+", help="Policies to evaluate (default: those of `s2t eval`).")
    text = "Put prompts into the tokenizer's chat template (default: where it has one)."
    add("--chat_template", action=argparse.BooleanOptionalAction, help=text)
    add("--system_prompt", help="System message of the chat template.")
    text = "Variables of the chat template, a JSON object: '{\"enable_thinking\": false}'."
    add("--chat_template_kwargs", help=text)
    text = "Number of recipes side by side (default: 2 on two or more cores, 1 with a GPU)."
    add("--num_parallel", type=int, help=text)
    add("--seed", type=int, default=0, help="Seed of the data and of the first selector.")
    args = parser.parse_args(arguments)
    for name in ("num_seeds", "limit_train", "limit_test", "max_new_tokens", "batch_size", "num_parallel"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"`{name}` must be at least 1, got {value}")
    for name in ("model", "teacher_model", "dataset"):
        value = getattr(args, name)
        if (value.startswith((".", "/", "~")) or value.count("/") > 1) and not Path(value).expanduser().exists():
            parser.error(f"`{name}`: {value!r} does not exist")
    return args


def config_of(stage: str, args: argparse.Namespace) -> list[str]:
    """Arguments that name a recipe's YAML: the one given, or that of the data set; none where there is neither."""
    given, own = getattr(args, f"{stage}_config"), Path(args.dataset) / f"{stage}.yaml"
    if given is None and own.is_file():
        given = str(own)
    return [] if given is None else ["--config", given]


def prompt_arguments(args: argparse.Namespace) -> list[str]:
    """How `s2t label` and `s2t eval` are to put prompts.

    Raises:
        ValueError: where the YAML for `s2t label` says otherwise: selectors would learn from other prompts than they
            are calibrated and evaluated on.
    """
    if config := config_of("label", args)[1:]:
        with open(config[0], encoding="utf-8") as text:
            given = yaml.safe_load(text) or {}
        given = {name: given[name] for name in PROMPT_SETTINGS if name in given}
        if "chat_template_kwargs" in given:
            given["chat_template_kwargs"] = read_template_kwargs(given["chat_template_kwargs"])
        for name, value in given.items():
            if value != getattr(args, name):
                raise ValueError(
                    f"`{name}` of the demo must be that of `label_config` {config[0]!r}, {value!r}: all stages put "
                    f"prompts alike; got {getattr(args, name)!r}."
                )
    arguments = ["--chat_template", "true"] if args.chat_template else []
    arguments += [] if args.system_prompt is None else ["--system_prompt", args.system_prompt]
    kwargs = args.chat_template_kwargs
    return arguments + ([] if kwargs is None else ["--chat_template_kwargs", json.dumps(kwargs)])


class Stage(NamedTuple):
    """Jobs that may run side by side, and what is looked at when they are finished."""

    title: str
    jobs: list[Job]
    then: Callable[[], None] | None = None


def print_metrics(adapters: dict[int, Path]) -> None:
    for seed, adapter in adapters.items():
        metrics = json.loads((adapter / S2T_CONFIG_NAME).read_text(encoding="utf-8"))["metrics"]
        figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"seed {seed}, held-out decision points: {figures}")


def plan(args: argparse.Namespace, jobs: Jobs, dtype: list[str]) -> list[Stage]:
    """Adds the jobs of the demo, and returns them by stages, in the order in which these run.

    Args:
        args: with `max_new_tokens`, `batch_size`, `chat_template` and `chat_template_kwargs` as they are to be used.
        jobs: where they are added; its folder is that of the demo.
        dtype: arguments that name the data type, for the recipes that load a model and are not to choose it.

    Raises:
        ValueError: see [`prompt_arguments`].
    """
    out, generated, chat = jobs.folder, has_corpus_script(args.dataset), prompt_arguments(args)
    student, teacher = ["--model", args.model], ["--teacher_model", args.teacher_model]
    length, batch = ["--max_new_tokens", str(args.max_new_tokens)], ["--batch_size", str(args.batch_size)]
    problems = {part: out / "data" / f"{part}.jsonl" for part in LABELLED_PARTS}
    sizes = part_sizes(args.limit_train, args.limit_test)
    command = split_command(recipe("splits.py"), args.dataset, str(out / "data"), sizes, args.seed)
    data = jobs.add("data", problems["test"], command)

    labelled = {}
    for part in LABELLED_PARTS:
        folder = out / "labels" / part
        command = [recipe("label.py"), *(config_of("label", args) if part == "label" else []), *student, *teacher]
        command += ["--dataset", str(problems[part]), "--output_dir", str(folder), *length, *batch, *chat, *dtype]
        labelled[part] = jobs.add(f"labels-{part}", folder, command, (data,))
    labels = {part: str(job.path) for part, job in labelled.items()}

    adapters = {seed: out / f"adapter-seed{seed}" for seed in range(args.seed, args.seed + args.num_seeds)}
    fitted = ["--labels", labels["label"], "--eval_labels", labels["tuning"]]
    reserved = ["--add_reserved_tokens", "true"] if args.add_reserved_tokens else []
    trained, routed, calibrated = [], [], []
    for seed, adapter in adapters.items():
        command = [recipe("train.py"), *config_of("train", args), *student, *dtype, *fitted, *reserved]
        command += ["--output_dir", str(adapter), "--seed", str(seed)]
        output, needs = adapter / "trainer_state.json", (labelled["label"], labelled["tuning"])
        trained.append(jobs.add(f"selector-seed{seed}", output, command, needs, folder=adapter))
        command = [recipe("train_router.py"), "--adapter", str(adapter), *student, *fitted]
        command += ["--seed", str(seed), *dtype]
        needs = (trained[-1], *needs)
        routed.append(jobs.add(f"router-seed{seed}", adapter / ROUTER_WEIGHTS_NAME, command, needs))
        command = [recipe("calibrate.py"), "--adapter", str(adapter), *student, *teacher]
        command += ["--labels", labels["calibration"], *batch, *dtype]
        output, needs = adapter / CALIBRATION_NAME, (routed[-1], labelled["calibration"])
        wanted = partial(lambda file: not file.is_file(), output)  # this recipe would not skip what it finished
        calibrated.append(jobs.add(f"calibration-seed{seed}", output, command, needs, only_if=wanted))

    command = [recipe("eval.py"), *student, *teacher, "--adapters", *map(str, adapters.values())]
    command += ["--dataset", str(problems["test"]), "--answer_style", "hash" if generated else "auto", *length, *batch]
    # labels of the part test tell how good the premise is
    command += ["--label_dirs", *(labels[part] for part in LABELLED_PARTS if part != "test")]
    command += ["--eval_labels", labels["test"], "--prior_labels", labels["label"]]
    command += ["--zero_shot_text", "?"] if generated else []
    command += ["--policies", *args.policies] if args.policies else []
    command += [*chat, "--output_dir", str(out)]
    evaluated = jobs.add("evaluation", out / "report.json", command, (data, *labelled.values(), *calibrated))
    evaluated.again = True  # its records know more than a stamp: the weights, and thresholds calibrated by hand
    drawn = jobs.add("picture", out / "report.html", [recipe("report.py"), str(out / "report.json")], (evaluated,))

    count = f"{args.num_seeds} selector{'s' if args.num_seeds > 1 else ''}"
    return [
        Stage("Problems: label, tuning, calibration and test", [data], partial(check_answers, problems["test"])),
        Stage("Labels: the small model writes, the large one scores its candidates", [*labelled.values()]),
        Stage(f"Training: {count}, one for each seed", trained, partial(print_metrics, adapters)),
        Stage("Routers: a light head for each selector that says when to ask it, without the large model", routed),
        Stage("Calibration: fusion weights and thresholds, on problems that training has not seen", calibrated),
        Stage("Evaluation: the test problems, every policy with the same settings", [evaluated]),
        Stage("Picture", [drawn]),
    ]


def run_stage(jobs: Jobs, stage: Stage) -> None:
    """Runs what is missing of a stage: with the terminal one after the other, with logs side by side.

    Raises:
        JobFailed: where a command failed.
    """
    todo = jobs.missing(stage.jobs)
    if not todo:
        print("Finished before.")
    if jobs.num_parallel == 1 or len(stage.jobs) == 1:
        jobs.run(todo, on_terminal=True, stop=True)
    else:
        for job in todo:
            print(f"$ {typed(job.arguments())}", flush=True)
        env = jobs.env | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        replace(jobs, env=env).run(todo, stop=True)
    if stage.then is not None:
        stage.then()


def run_stages(jobs: Jobs, stages: list[Stage], began: float) -> None:
    """Runs stages one after the other; ends the program where a job fails. `began`: what `time.monotonic()` was."""
    for number, stage in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages)}] {stage.title}  ({minutes_since(began)} so far)", flush=True)
        try:
            run_stage(jobs, stage)
        except JobFailed as error:
            print(
                f"\n{error}\n\nStage {number} of {len(stages)} failed; the command above runs that job alone. "
                "What is done is kept: the same command resumes from here.",
                file=sys.stderr,
            )
            sys.exit(error.status)


def minutes_since(began: float) -> str:
    elapsed = int(time.monotonic() - began)
    return f"{elapsed // 60}:{elapsed % 60:02d}"


def main() -> None:
    args = parse_arguments()
    import torch

    from s2t_recipes.adapters import check_model

    has_gpu = torch.cuda.is_available()
    generated, out = has_corpus_script(args.dataset), Path(args.output_dir)
    args.max_new_tokens = args.max_new_tokens or (72 if generated else 256)
    args.batch_size = args.batch_size or (250 if generated else 64)
    num_parallel = args.num_parallel or (1 if has_gpu else min(2, os.cpu_count() or 1))
    env = {}
    if all(Path(source).exists() for source in (args.model, args.teacher_model, args.dataset)):
        env["HF_HUB_OFFLINE"] = "1"  # nothing to ask the Hub for
    for name in ("model", "teacher_model"):
        check_model(name, getattr(args, name))
    tokenizers = [load_pretrained(name, getattr(args, name), AutoTokenizer) for name in ("model", "teacher_model")]
    check_same_vocabulary(*tokenizers)
    config = AutoConfig.from_pretrained(args.model).get_text_config()
    if not args.add_reserved_tokens:
        find_reserved_token_ids(tokenizers[0], config.vocab_size)
    for stage in ("train", "label"):
        given = getattr(args, f"{stage}_config")
        if given is not None and not Path(given).is_file():
            raise FileNotFoundError(f"`{stage}_config`: {given!r} does not exist.")
    if args.chat_template is None:
        args.chat_template = tokenizers[0].chat_template is not None
    if not has_gpu and "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = "1" if generated else str(os.cpu_count() or 1)  # tiny models gain nothing
    args.chat_template_kwargs = read_template_kwargs(args.chat_template_kwargs)
    jobs = Jobs(out, num_parallel, env, forks=False, keep=True)
    stages = plan(args, jobs, dtype=[] if has_gpu else ["--dtype", "float32"])
    encode_prompts(tokenizers[0], ["a prompt"], **{name: getattr(args, name) for name in PROMPT_SETTINGS})

    names = ["model", "teacher_model", "dataset", "limit_train", "train_config", "label_config"]
    names += [*PROMPT_SETTINGS, "seed", "max_new_tokens"]
    check_same_run(out / "demo.json", {name: getattr(args, name) for name in names})
    began = time.monotonic()
    run_stages(jobs, stages, began)

    print(f"\nDone in {minutes_since(began)}. Look at")
    print(f"    {out / 'report.html'}   every problem, token by token, in a browser")
    print(f"    {out / 'report.png'}    the picture")
    print(f"    {out / 'report.json'}   every figure, with its settings")
    print(f"    {out / 'records'}/      every generated text")
