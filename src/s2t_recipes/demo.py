"""The whole method in one command: data, labels, selectors, calibration, evaluation, picture.

    python recipes/demo.py --model recipes/embedded/student --teacher_model recipes/embedded/teacher \
        --dataset recipes/embedded --output_dir runs/demo

Runs the recipes one after the other, each as the command that a user would type (it is printed). A stage that fails
stops everything with its own error; every recipe skips what it finished, so the same command goes on where it stopped.
This file knows which recipe comes when; it does not know what any of them does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from s2t_recipes.commands import RECIPES, recipe
from s2t_recipes.jobs import typed
from s2t_recipes.models import load_pretrained
from s2t_recipes.problems import PROMPT_SETTINGS, encode_prompts, load_problems, read_template_kwargs
from s2t_recipes.splits import is_bed, split_command
from transformers_s2t.config import CALIBRATION_NAME
from transformers_s2t.files import write_json
from transformers_s2t.reserved_tokens import check_same_vocabulary, find_reserved_token_ids


LABELLED_PARTS = ("label", "tuning", "calibration", "test")
#: Tuning and calibration problems for each label problem, as in the embedded bed.
HELD_OUT_SHARE = 0.6
_PROGRESS = re.compile(rb"(\d+)/(\d+) \[")


# ---------------------------------------------------------------------------------------------------------------------
# Running stages


@dataclass
class Stages:
    """Counts the stages and runs their commands.

    Args:
        total: number of stages.
        env: of the commands.
        logs: folder for the output of commands that run side by side.
    """

    total: int
    env: dict[str, str]
    logs: Path
    number: int = 0
    began: float = field(default_factory=time.monotonic)

    def start(self, title: str) -> None:
        self.number += 1
        elapsed = int(time.monotonic() - self.began)
        print(f"\n[{self.number}/{self.total}] {title}  ({elapsed // 60}:{elapsed % 60:02d} so far)", flush=True)

    def run(self, command: list[str]) -> None:
        """Runs one command with its output on the terminal."""
        print(f"$ {typed(command)}", flush=True)
        code = subprocess.run(executable(command), env=self.env).returncode
        if code:
            self.fail(command, code)

    def run_side_by_side(self, commands: dict[str, list[str]], num_parallel: int) -> None:
        """Runs commands, at most `num_parallel` at a time, with one progress bar; their output goes into `logs`.

        Args:
            commands: name -> command. A single one gets the terminal.
            num_parallel: how many at a time.
        """
        if num_parallel == 1 or len(commands) == 1:
            for command in commands.values():
                self.run(command)
            return
        self.logs.mkdir(parents=True, exist_ok=True)
        for command in commands.values():
            print(f"$ {typed(command)}", flush=True)
        env = self.env | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        waiting, running = list(commands), {}
        done = dict.fromkeys(commands, 0.0)
        layout = "{percentage:3.0f}%|{bar:30}| {elapsed}  {desc}"
        wait = 0.5 if sys.stderr.isatty() else 5.0
        shown = 0.0
        with tqdm(total=len(commands), bar_format=layout) as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < num_parallel:
                        name = waiting.pop(0)
                        with open(self.log_of(name), "wb") as log:
                            running[name] = subprocess.Popen(
                                executable(commands[name]), env=env, stdout=log, stderr=subprocess.STDOUT
                            )
                    time.sleep(0.5)
                    for name, process in list(running.items()):
                        code = process.poll()
                        done[name] = 1.0 if code == 0 else max(done[name], 0.99 * read_progress(self.log_of(name)))
                        if code is not None:
                            del running[name]
                        if code:
                            bar.close()
                            print(self.log_of(name).read_bytes().decode(errors="replace")[-3000:], file=sys.stderr)
                            self.fail(commands[name], code)
                    shares = "  ".join(f"{name} {100 * share:.0f} %" for name, share in done.items())
                    bar.set_description_str(shares, refresh=False)
                    bar.n = sum(done.values())
                    if time.monotonic() - shown >= wait or not (waiting or running):
                        shown = time.monotonic()
                        bar.refresh()
            finally:
                for process in running.values():
                    process.terminate()
                    process.wait()

    def log_of(self, name: str) -> Path:
        return self.logs / f"stage{self.number}-{name}.log".replace(" ", "-")

    def fail(self, command: list[str], code: int) -> None:
        print(
            f"\nStage {self.number} of {self.total} failed (exit status {code}). To run it alone:\n\n"
            f"    {typed(command)}\n\nWhat is done is kept: started again, the same command goes on from here.",
            file=sys.stderr,
        )
        sys.exit(code if code > 0 else 1)


def executable(command: list[str]) -> list[str]:
    return [sys.executable, *command]


def read_progress(log: Path) -> float:
    """Share of the longest progress bar in a log, 0 where there is none."""
    longest, share = 0, 0.0
    for match in _PROGRESS.finditer(log.read_bytes()):
        current, total = int(match[1]), int(match[2])
        if total >= longest and total > 0:
            longest, share = total, current / total
    return min(share, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def part_sizes(num_train: int, num_test: int) -> dict[str, int]:
    held_out = max(1, round(HELD_OUT_SHARE * num_train))
    return {"label": num_train, "tuning": held_out, "calibration": held_out, "test": num_test}


def make_data(args: argparse.Namespace, data: Path, stages: Stages) -> None:
    """Writes label, tuning, calibration and test .jsonl into `data`; keeps them where they are there already."""
    stamp = data / "made-from.json"
    wanted = {"dataset": args.dataset, "sizes": part_sizes(args.limit_train, args.limit_test), "seed": args.seed}
    there = all((data / f"{name}.jsonl").is_file() for name in wanted["sizes"])
    if there and stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        print(f"{data} is there already.")
        return
    stages.run(split_command(recipe("splits.py"), args.dataset, str(data), wanted["sizes"], args.seed))
    stamp.write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def check_same_run(file: Path, settings: dict) -> None:
    """Notes what a folder is made with; refuses to go on in one that was made with something else.

    Raises:
        ValueError: naming what differs. Mixing labels of one pair with selectors of another would go unnoticed.
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


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Label, train, calibrate, evaluate and report, with one command.")
    embedded = os.path.relpath(RECIPES / "embedded")

    def add(name: str, help: str, **options) -> None:
        shown = "" if options.get("default") in (None, False) else " (default: %(default)s)"
        parser.add_argument(name, help=help + shown, **options)

    add("--model", "the small model: a Hub id or a local folder", default=f"{embedded}/student")
    add("--teacher_model", "the large model, with the same tokenizer", default=f"{embedded}/teacher")
    add("--dataset", "Hub id, folder with train and test files, one file, or recipes/embedded", default=embedded)
    add("--output_dir", "where everything goes", default="runs/demo")
    add("--num_seeds", "selectors to train", type=int, default=3)
    add(
        "--limit_train",
        "problems to label for training; 0.6 times as many for tuning and calibration each",
        type=int,
        default=500,
    )
    add("--limit_test", "problems to evaluate on", type=int, default=500)
    add("--max_new_tokens", "tokens of a solution at most (default: 72 for recipes/embedded, else 256)", type=int)
    add("--batch_size", "sequences per generate call (default: 250 for recipes/embedded, else 64)", type=int)
    add("--train_config", "YAML for recipes/train.py (default: train.yaml of a data set that has one)")
    add(
        "--label_config",
        "YAML for recipes/label.py, for what selectors learn from (default: label.yaml of a data set that has one)",
    )
    add("--add_reserved_tokens", "resize a model that has no reserved tokens", action="store_true")
    add("--policies", "policies to evaluate (default: those of recipes/eval.py)", nargs="+")
    add(
        "--chat_template",
        "format prompts with the tokenizer's chat template (default: where it has one)",
        action=argparse.BooleanOptionalAction,
    )
    add("--system_prompt", "system message of the chat template")
    add("--chat_template_kwargs", "variables of the chat template, a JSON object: '{\"enable_thinking\": false}'")
    add("--num_parallel", "recipes side by side (default: 2 on two or more cores, 1 with a GPU)", type=int)
    add("--seed", "of the data and of the first selector", type=int, default=0)
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
    """How label.py and eval.py are to put prompts.

    Raises:
        ValueError: where the YAML for label.py says otherwise: selectors would learn from other prompts than they are
            calibrated and evaluated on.
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


def main() -> None:
    args = parse_arguments()
    import torch

    from s2t_recipes.adapters import check_model

    has_gpu = torch.cuda.is_available()
    bed, out = is_bed(args.dataset), Path(args.output_dir)
    max_new_tokens = str(args.max_new_tokens or (72 if bed else 256))
    batch_size = str(args.batch_size or (250 if bed else 64))
    num_parallel = args.num_parallel or (1 if has_gpu else min(2, os.cpu_count() or 1))
    env = dict(os.environ)
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
    configs = {stage: config_of(stage, args) for stage in ("train", "label")}
    if args.chat_template is None:
        args.chat_template = tokenizers[0].chat_template is not None
    if not has_gpu:
        env.setdefault("OMP_NUM_THREADS", "1" if bed else str(os.cpu_count() or 1))  # tiny models gain nothing
    args.chat_template_kwargs = read_template_kwargs(args.chat_template_kwargs)
    chat = prompt_arguments(args)
    encode_prompts(tokenizers[0], ["a prompt"], **{name: getattr(args, name) for name in PROMPT_SETTINGS})
    dtype = [] if has_gpu else ["--dtype", "float32"]
    stages = Stages(total=7, env=env, logs=out / "logs")

    names = (
        "model",
        "teacher_model",
        "dataset",
        "limit_train",
        "train_config",
        "label_config",
        *PROMPT_SETTINGS,
        "seed",
    )
    settings = {name: getattr(args, name) for name in names} | {"max_new_tokens": int(max_new_tokens)}
    check_same_run(out / "demo.json", settings)

    stages.start("Problems: label, tuning, calibration and test, disjoint")
    make_data(args, out / "data", stages)
    problems = load_problems(str(out / "data" / "test.jsonl"))
    if unanswered := sum(problem.answer is None for problem in problems):
        raise ValueError(
            f"`dataset`: {unanswered} of the {len(problems)} problems of the part test have no answer to check "
            "generated texts against."
        )

    stages.start("Labels: the small model writes, the large one scores its candidates")
    labels = {part: str(out / "labels" / part) for part in LABELLED_PARTS}
    fitted = [labels[part] for part in LABELLED_PARTS if part != "test"]  # that of test: how good the premise is
    stages.run_side_by_side(
        {
            part: [recipe("label.py"), *(configs["label"] if part == "label" else [])]
            + ["--model", args.model, "--teacher_model", args.teacher_model]
            + ["--dataset", str(out / "data" / f"{part}.jsonl"), "--output_dir", folder]
            + ["--max_new_tokens", max_new_tokens, "--batch_size", batch_size, *chat, *dtype]
            for part, folder in labels.items()
        },
        num_parallel,
    )

    stages.start(f"Training: {args.num_seeds} selector{'s' if args.num_seeds > 1 else ''}, one for each seed")
    seeds = range(args.seed, args.seed + args.num_seeds)
    adapters = {seed: str(out / f"adapter-seed{seed}") for seed in seeds}
    stages.run_side_by_side(
        {
            f"seed {seed}": [recipe("train.py"), *configs["train"], "--model", args.model, *dtype]
            + ["--labels", labels["label"], "--eval_labels", labels["tuning"]]
            + (["--add_reserved_tokens", "true"] if args.add_reserved_tokens else [])
            + ["--output_dir", adapter, "--seed", str(seed)]
            for seed, adapter in adapters.items()
        },
        num_parallel,
    )
    for seed, adapter in adapters.items():
        metrics = json.loads((Path(adapter) / "s2t_config.json").read_text(encoding="utf-8"))["metrics"]
        figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"seed {seed}, held-out decision points: {figures}")

    stages.start("Routers: a light head for each selector that says when to ask it, without the large model")
    stages.run_side_by_side(
        {
            f"seed {seed}": [recipe("train_router.py"), "--adapter", adapter, "--model", args.model]
            + ["--labels", labels["label"], "--eval_labels", labels["tuning"], "--seed", str(seed), *dtype]
            for seed, adapter in adapters.items()
        },
        num_parallel,
    )

    calibrated = {seed: (Path(adapter) / CALIBRATION_NAME).is_file() for seed, adapter in adapters.items()}
    stages.start("Calibration: fusion weights and thresholds, on problems that training has not seen")
    stages.run_side_by_side(
        {
            f"seed {seed}": [recipe("calibrate.py"), "--adapter", adapter, "--model", args.model]
            + ["--teacher_model", args.teacher_model, "--labels", labels["calibration"]]
            + ["--batch_size", batch_size, *dtype]
            for seed, adapter in adapters.items()
            if not calibrated[seed]
        },
        num_parallel,
    )
    if all(calibrated.values()):
        print("The adapters are calibrated already.")

    stages.start("Evaluation: the test problems, every policy with the same settings")
    stages.run(
        [recipe("eval.py"), "--model", args.model, "--teacher_model", args.teacher_model]
        + ["--adapters", *adapters.values(), "--dataset", str(out / "data" / "test.jsonl")]
        + ["--answer_style", "hash" if bed else "auto", "--max_new_tokens", max_new_tokens]
        + ["--batch_size", batch_size, "--label_dirs", *fitted, "--eval_labels", labels["test"]]
        + ["--prior_labels", labels["label"], *(["--zero_shot_text", "?"] if bed else [])]
        + (["--policies", *args.policies] if args.policies else [])
        + [*chat, "--output_dir", str(out)]
    )

    stages.start("Picture")
    stages.run([recipe("report.py"), str(out / "report.json")])

    elapsed = int(time.monotonic() - stages.began)
    print(f"\nDone in {elapsed // 60}:{elapsed % 60:02d}. Look at")
    print(f"    {out / 'report.html'}   every problem, token by token, in a browser")
    print(f"    {out / 'report.png'}    the picture")
    print(f"    {out / 'report.json'}   every figure, with its settings")
    print(f"    {out / 'records'}/      every generated text")
