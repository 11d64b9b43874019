"""Regenerates the tables of docs/results: every claim of the documentation, by one command.

    python recipes/paper.py                                       # all tables, on the pairs that each of them names
    python recipes/paper.py --tables comparison --pairs embedded  # one of them
    python recipes/paper.py --pairs qwen2.5-0.5b                  # what a GPU can do: every table, on a pair of yours

A table is a YAML of recipes/paper (what is compared), a pair one of recipes/paper/pairs (models, data, shared
settings). Labels, selectors, baselines and evaluations that tables share are made once, each by the recipe that a user
would type; what is finished is kept in `--output_dir`, and the same command resumes a stopped run. Figures go to
`--results` as JSON and Markdown, with the commands behind them, seeds and versions. Times are told apart from what two
runs must agree on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from s2t_recipes.commands import RECIPES
from s2t_recipes.evaluation.rows import versions
from s2t_recipes.jobs import Jobs
from s2t_recipes.options import SmallParser
from s2t_recipes.paper import results
from s2t_recipes.paper.pair import Pair
from s2t_recipes.paper.pipeline import Pipeline
from s2t_recipes.paper.tables import KINDS
from transformers_s2t.files import write_json


PAPER = RECIPES / "paper"
#: Recipes side by side, unless told otherwise; on the pairs that run on a CPU each takes up to a gigabyte of memory.
MAX_PARALLEL = 8
#: Kinds of tables for which a pair needs no answers that can be checked.
WITHOUT_ANSWERS = ("sufficiency", "fidelity")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = SmallParser("Which tables are made, on which pairs, and where they go")
    tables = sorted(file.stem for file in PAPER.glob("*.yaml"))
    pairs = ", ".join(sorted(file.stem for file in (PAPER / "pairs").glob("*.yaml")))
    add = parser.add_argument
    add("--tables", nargs="+", default=tables, help="Tables of recipes/paper, or paths of YAMLs.")
    add("--pairs", nargs="+", help=f"{pairs}, or paths of YAMLs (default: those that a table names).")
    add("--output_dir", default="runs/paper", help="Folder for everything that is made.")
    add("--results", type=Path, default=results.RESULTS, help="Folder for the tables (default: docs/results).")
    for name in ("data", "models"):
        add(f"--{name}", help=f"Folder for {{{name}}} in a pair's YAML; without it such a pair is left out.")
    text = f"Number of recipes side by side (default: one per core, at most {MAX_PARALLEL}; 1 with a GPU)."
    add("--num_parallel", type=int, help=text)
    add("--dry_run", action="store_true", help="List the jobs that are missing, and run none.")
    args = parser.parse_args(arguments)
    if args.num_parallel is not None and args.num_parallel < 1:
        parser.error(f"`num_parallel` must be at least 1, got {args.num_parallel}")
    return args


def find(name: str, folder: Path, argument: str) -> Path:
    """The YAML of a name, or a path.

    Raises:
        ValueError: where there is none.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not file.is_file():
        legal = ", ".join(sorted(other.stem for other in folder.glob("*.yaml")))
        raise ValueError(f"`{argument}` must be among {legal}, or the path of a YAML, got {name!r}.")
    return file


def read_table(file: Path) -> dict[str, Any]:
    """Settings of a table.

    Raises:
        ValueError: for one without a title, text, pairs or a known kind.
    """
    with open(file, encoding="utf-8") as text:
        spec = yaml.safe_load(text)
    for name in ("title", "text", "kind", "pairs"):
        if name not in spec:
            raise ValueError(f"{file} has no `{name}`.")
    if spec["kind"] not in KINDS:
        raise ValueError(f"{file}: `kind` must be one of {', '.join(KINDS)}, got {spec['kind']!r}.")
    return {"name": file.stem} | spec


def placeless(command: str, places: Mapping[str, str]) -> str:
    """A command without the folders of this machine. `places`: folder -> what stands for it."""
    for folder, name in sorted(places.items(), key=lambda place: -len(place[0])):
        command = re.sub(rf"(?<![\w./-]){re.escape(folder.rstrip('/'))}(?=[/\s'\"]|$)", name, command)
    return command


def write_table(file: Path, spec: dict[str, Any], command: str, pair: Pair, result, places: Mapping[str, str]) -> None:
    """Puts one pair's figures into a table's JSON; those of other pairs stay. `places`: see [`placeless`]."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"pairs": {}}
    last_seed = spec.get("seeds", pair.num_seeds) - 1
    entry = {
        "title": pair.title,
        "seeds": f"0 to {last_seed}" if last_seed else "0",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread per process",
        "versions": versions(),
        "columns": [list(column) for column in result.columns],
        "rows": result.rows,
        "notes": result.notes,
        "cost": result.cost,
        "holds_times": result.holds_times,
        "commands": [placeless(text, places) for text in result.commands],
    }
    order = list(dict.fromkeys([*spec["pairs"], *content["pairs"], pair.name]))
    found = content["pairs"] | {pair.name: entry}
    pairs = {name: found[name] for name in order if name in found}
    write_json(file, {"title": spec["title"], "text": spec["text"], "command": command, "pairs": pairs})


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    began = time.monotonic()
    specs = [read_table(find(name, PAPER, "tables")) for name in args.tables]
    wanted = {spec["name"]: args.pairs or spec["pairs"] for spec in specs}
    pairs, absent = {}, {}
    for name in dict.fromkeys(name for names in wanted.values() for name in names):
        try:
            pairs[name] = Pair.load(find(name, PAPER / "pairs", "pairs"), args.data, args.models)
        except FileNotFoundError as error:
            absent[name] = str(error)
    has_gpu = torch.cuda.is_available()
    out = Path(args.output_dir)
    env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not has_gpu:
        env["OMP_NUM_THREADS"] = "1"  # of many small jobs side by side, and the same sums in every run
    num_parallel = args.num_parallel or (1 if has_gpu else min(MAX_PARALLEL, os.cpu_count() or 1))
    jobs = Jobs(out, num_parallel, env)
    pipelines = {name: Pipeline(pair, jobs, out / pair.name) for name, pair in pairs.items()}
    planned = []
    for spec in specs:
        for name in wanted[spec["name"]]:
            pair, kind = pairs.get(name), spec["kind"]
            if pair is not None and (pair.has_answers or kind in WITHOUT_ANSWERS):
                planned.append((spec, pair, KINDS[kind](pipelines[name], spec)))
    for reason in absent.values():
        print(f"Left out, its tables stay as they are: {reason}")
    todo = jobs.missing()
    perhaps = sum(job.only_if is not None for job in todo)
    more = f", {perhaps} only where a sweep of learning rates asks for them" if perhaps else ""
    counts = f"{len(planned)} tables, {len(jobs.all)} jobs, {len(todo)} of them to run{more}"
    print(f"{counts}; {num_parallel} side by side")
    if args.dry_run:
        for job in todo:
            print(f"  {job.name}{' (perhaps)' if job.only_if else ''}")
        return
    for pair in pairs.values():
        write_json(out / pair.name / "pair.json", asdict(pair))
    jobs.run()
    places = {str(out): "runs/paper", args.data: "DATA", args.models: "MODELS"}
    places = {folder: name for folder, name in places.items() if folder}
    args.results.mkdir(parents=True, exist_ok=True)
    for spec, pair, collect in planned:
        command = ["python", "recipes/paper.py", "--tables", spec["name"]]
        for name in ("data", "models"):  # folders that some of its pairs want
            if any(f"{{{name}}}" in find(one, PAPER / "pairs", "pairs").read_text() for one in spec["pairs"]):
                command += [f"--{name}", name.upper()]
        write_table(args.results / f"{spec['name']}.json", spec, shlex.join(command), pair, collect(), places)
    published = args.results.resolve() == results.RESULTS
    for file, text in results.pages(args.results, results.TEXTS if published else ()).items():
        file.write_text(text, encoding="utf-8")
    spent = sum(jobs.seconds(job) for job in jobs.all.values())
    minutes = (time.monotonic() - began) / 60
    print(f"{args.results}: {len(planned)} tables in {minutes:.1f} minutes; all jobs together {spent / 60:.1f}")
