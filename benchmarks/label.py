"""Labels per second of `label_problems`, against the step-by-step procedure of the public code at batch 1.

    python benchmarks/label.py --json runs/benchmarks/label.json            # the embedded pair on its own problems
    python benchmarks/label.py --quick                                      # half a minute on two cores
    python benchmarks/label.py --model weak --teacher_model strong --dataset gsm8k/train.jsonl \\
        --prompt_column question --max_prompt_tokens 48 --new_tokens 128    # any other pair and problems
    python benchmarks/label.py --shape small                                # random models, random prompts

Prints a line for each way to label the same prompts with the same two models: positions per second, and how many times
as fast as `stepwise` that is in the same turn; medians over turns, [lowest, highest].

    pipeline   `label_problems` as recipes/label.py calls it: rollouts of the student in length-sorted batches, one
               forward of each model over whole texts, points chosen, rows checked and written to disk
    stepwise   arXiv 2604.26940, public code: one text at a time, and at every step the student and the teacher, the
               student's argmax appended. Favoured: scores are read with our functions, and no file is written. It is
               slow, so it labels the first few problems only

In float32 the rows of both ways are compared, and the run fails where they differ by more than `--tolerance`. Where
two tokens tie within it either may come first; texts that part there are compared up to there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import setting
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from s2t_recipes.commands import RECIPES
from s2t_recipes.problems import encode_prompts, load_problems
from transformers_s2t.config import MAX_CANDIDATES
from transformers_s2t.labeling.label_problems import label_problems
from transformers_s2t.labeling.points import TrajectoryScores, score_positions
from transformers_s2t.labels.folder import shard_files
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.proposals import exclude
from transformers_s2t.reserved_tokens import find_reserved_token_ids


#: The pair that ships here.
EMBEDDED = RECIPES / "embedded"

sys.path.append(str(EMBEDDED))
from corpus import build_split  # noqa: E402


#: The teacher of each shape: twice as wide.
TEACHERS = {"tiny": "tiny-wide", "small": "small-wide", "qwen2.5-0.5b": "qwen2.5-1.5b"}

#: What holds where no flag says otherwise, of named models and of random ones.
NAMED = {"new_tokens": 72, "num_problems": 500, "batch_sizes": [32, 128], "stepwise_problems": 16, "turns": 5}
RANDOM = {"new_tokens": 256, "batch_sizes": [32], "stepwise_problems": 2, "turns": 3}
QUICK = {"num_problems": 256, "stepwise_problems": 8, "turns": 3}
QUICK_RANDOM = {"stepwise_problems": 1, "new_tokens": 128, "turns": 1}


class Work(NamedTuple):
    """Two models and what they label; `prompts` is problem id -> token ids."""

    model: PreTrainedModel
    teacher_model: PreTrainedModel
    prompts: dict[str, list[int]]
    header: TrajectoryHeader


def make_work(args: argparse.Namespace) -> Work:
    """The named models and problems, or random ones of a shape."""
    common = {
        "vocab_hash": "",
        "num_candidates": args.num_candidates,
        "max_new_tokens": args.new_tokens,
        "dtype": args.dtype,
    }
    if args.shape is not None:
        of_shape = [argparse.Namespace(**vars(args) | {"shape": shape}) for shape in (args.shape, args.teacher_shape)]
        models = [setting.random_model(one, args.prompt_tokens + args.new_tokens, None) for one in of_shape]
        reserved = tuple(range(args.vocab_size - setting.NUM_RESERVED, args.vocab_size))
        header = TrajectoryHeader(args.shape, args.teacher_shape, excluded_ids=reserved, **common)
        ids_NP = setting.random_tokens(args.vocab_size, args.num_problems, args.prompt_tokens)
        return Work(*models, {str(i): ids for i, ids in enumerate(ids_NP.tolist())}, header)
    models = [setting.load_checkpoint(args, name) for name in (args.model, args.teacher_model)]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        reserved = find_reserved_token_ids(tokenizer, models[0].get_output_embeddings().weight.shape[0])
    except ValueError:
        reserved = []
    encoded = encode_prompts(tokenizer, read_prompts(args))
    prompts = {str(i): ids[: args.max_prompt_tokens] for i, ids in enumerate(encoded)}
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    names = (Path(name).name for name in (args.model, args.teacher_model))
    return Work(*models, prompts, TrajectoryHeader(*names, excluded_ids=reserved, eos_token_ids=ends, **common))


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The problems' texts, of the data set or as recipes/embedded writes them."""
    if args.dataset is None:
        return [row["prompt"] for row in build_split("label", args.num_problems, 0)]
    problems = load_problems(args.dataset, args.split, args.prompt_column, None, args.num_problems)
    if len(problems) < args.num_problems:
        raise ValueError(f"--num_problems must be at most {len(problems)}, which is all of --dataset.")
    return [problem.prompt for problem in problems]


def run_pipeline(work: Work, batch_size: int) -> tuple[setting.Clock, list[dict[str, Any]]]:
    """The time of labelling, and the rows that were written."""
    options = {"pad_token_id": 0, "batch_size": batch_size, "show_progress": False}
    with tempfile.TemporaryDirectory() as folder:
        with setting.Clock(work.model.device) as clock:
            label_problems(work.model, work.teacher_model, work.prompts, folder, work.header, **options)
        return clock, [row for file in shard_files(folder) for row in pq.read_table(file).to_pylist()]


class Stepper:
    """One model that is given a text token by token, with its KV cache or without."""

    def __init__(self, model: PreTrainedModel, cached: bool):
        self.model, self.cached, self.past, self.num_seen = model, cached, None, 0

    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        """Next-token logits (1, V) after the text `ids`, which goes on from that of the last call."""
        new = torch.tensor([ids[self.num_seen :]], device=self.model.device)
        output = self.model(input_ids=new, past_key_values=self.past, use_cache=self.cached, logits_to_keep=1)
        if self.cached:
            self.past, self.num_seen = output.past_key_values, len(ids)
        return output.logits[:, -1]


@torch.no_grad()
def run_stepwise(
    work: Work, cached: bool
) -> tuple[setting.Clock, list[tuple[list[int], TrajectoryScores, list[float]]]]:
    """The time of labelling, and of each problem its text, scores and how far the teacher's two best lie apart."""
    model, teacher_model, prompts, header = work
    excluded = torch.tensor(header.excluded_ids, dtype=torch.long, device=model.device)
    done = []
    with setting.Clock(model.device) as clock:
        for prompt in prompts.values():
            ids, parts, gaps = list(prompt), [], []
            student, teacher = Stepper(model, cached), Stepper(teacher_model, cached)
            for _ in range(header.max_new_tokens):
                logits_1V, teacher_logits_1V = student(ids), teacher(ids).to(model.device)
                scores = score_positions(logits_1V, teacher_logits_1V, header.num_candidates, excluded)
                parts.append(TrajectoryScores(*(column.cpu() for column in scores)))
                best_2 = teacher_logits_1V[0, : logits_1V.shape[-1]].topk(2).values
                gaps.append(float(best_2[0] - best_2[1]))
                ids.append(int(exclude(logits_1V, excluded).argmax(-1)))
                if ids[-1] in header.eos_token_ids:
                    break
            done.append((ids, TrajectoryScores(*(torch.cat(columns) for columns in zip(*parts))), gaps))
    return clock, done


class RowsDiffer(RuntimeError):
    """The two ways do not label alike, so their times must not be compared."""


def compare(
    row: dict[str, Any], text: list[int], scores: TrajectoryScores, teacher_gaps: list[float], tolerance: float
) -> int:
    """How many positions of one problem were found equal: all, or those before a tie that parted the texts.

    Raises:
        RowsDiffer: naming the first position and what differs there.
    """
    prompt_length = row["prompt_length"]

    def check(fine: bool, name: str, at: int, ours: Any, theirs: Any) -> None:
        if not fine:
            where = f"problem {row['problem_id']}, position {prompt_length + at}"
            raise RowsDiffer(f"`{name}` differs at {where}: pipeline {ours}, stepwise {theirs}.")

    check(row["input_ids"][:prompt_length] == text[:prompt_length], "prompt", 0, "...", "...")
    check(len(row["input_ids"]) == len(text), "length", 0, len(row["input_ids"]), len(text))
    point_of = {position - prompt_length: n for n, position in enumerate(row["positions"])}
    for s in range(len(text) - prompt_length):
        for name in ("divergence", "entropy", "margin"):
            ours, theirs = row[name][s], float(getattr(scores, f"{name}_S")[s])
            check(abs(ours - theirs) <= tolerance, name, s, ours, theirs)
        if s in point_of:
            n, theirs_K = point_of[s], scores.student_logprobs_SK[s].tolist()
            pairs = list(zip(row["student_logprobs"][n], theirs_K, strict=True))
            check(all(abs(a - b) <= tolerance for a, b in pairs), "student_logprobs", s, *zip(*pairs))
            ours_at = dict(zip(row["candidate_ids"][n], zip(row["student_logprobs"][n], row["teacher_logprobs"][n])))
            theirs_at = dict(
                zip(scores.candidate_ids_SK[s].tolist(), zip(theirs_K, scores.teacher_logprobs_SK[s].tolist()))
            )
            for id in ours_at.keys() | theirs_at.keys():
                if id in ours_at and id in theirs_at:
                    both = zip(ours_at[id], theirs_at[id])
                    check(all(abs(a - b) <= tolerance for a, b in both), "scores", s, ours_at[id], theirs_at[id])
                else:  # a tie for the last place
                    logprob = (ours_at.get(id) or theirs_at.get(id))[0]
                    check(logprob <= theirs_K[-1] + tolerance, "candidate_ids", s, list(ours_at), list(theirs_at))
            ours, theirs = row["teacher_top_id"][n], int(scores.teacher_top_id_S[s])
            check(ours == theirs or teacher_gaps[s] <= tolerance, "teacher_top_id", s, ours, theirs)
        ours, theirs = row["input_ids"][prompt_length + s], text[prompt_length + s]
        if ours != theirs:
            check(float(scores.margin_S[s]) >= -tolerance, "input_ids", s, ours, theirs)
            return s + 1
    return len(text) - prompt_length


class Rate(NamedTuple):
    """Positions per second of one way in one turn, by wall and, on a CPU, by processor time."""

    wall: float
    cpu: float | None


def make_rate(num_positions: int, clock: setting.Clock) -> Rate:
    return Rate(*(None if value is None else num_positions / max(value, 1e-9) for value in (clock.wall, clock.cpu)))


def measure(args: argparse.Namespace) -> tuple[dict[int | None, list[Rate]], dict[str, int]]:
    """Rates in each turn, of each batch size of the pipeline and of stepwise (`None`), and numbers of positions."""
    work = make_work(args)
    few = work._replace(prompts=dict(list(work.prompts.items())[: args.stepwise_problems]))
    cached = args.stepwise_cache == "both"
    # what is loaded on first use is no cost of a way
    short = few._replace(header=dataclasses.replace(work.header, max_new_tokens=2))
    run_stepwise(short, cached)
    run_pipeline(short, batch_size=2)
    rates: dict[int | None, list[Rate]] = {size: [] for size in (None, *args.batch_sizes)}
    counts = {"stepwise_positions": 0, "pipeline_positions": 0, "compared_positions": 0}
    with tqdm(total=args.turns * len(rates), unit="run") as bar:
        for _ in range(args.turns):
            bar.set_description("stepwise")
            clock, steps = run_stepwise(few, cached)
            counts["stepwise_positions"] = sum(len(scores.divergence_S) for _, scores, _ in steps)
            rates[None].append(make_rate(counts["stepwise_positions"], clock))
            bar.update()
            for size in args.batch_sizes:
                bar.set_description(f"pipeline, batch {size}")
                clock, rows = run_pipeline(work, size)
                counts["pipeline_positions"] = sum(len(row["divergence"]) for row in rows)
                rates[size].append(make_rate(counts["pipeline_positions"], clock))
                bar.update()
                if [row["problem_id"] for row in rows] != list(work.prompts):
                    raise RowsDiffer("the pipeline's rows are not those of the problems.")
                if args.dtype == "float32":
                    compared = [compare(row, *step, args.tolerance) for row, step in zip(rows, steps)]
                    counts["compared_positions"] += sum(compared)
    return rates, counts


def make_row(batch_size: int | None, rates: dict[int | None, list[Rate]], dtype: str) -> dict[str, Any]:
    """One row of the JSON from positions per second, each beside stepwise's of the same turn."""
    pairs = list(zip(rates[batch_size], rates[None]))
    speedups = [own.wall / stepwise.wall for own, stepwise in pairs]
    return {
        "name": "stepwise" if batch_size is None else "pipeline",
        "batch_size": batch_size or 1,
        "dtype": dtype,
        "positions_per_second": setting.median([own.wall for own, _ in pairs]),
        "speedup_over_stepwise": setting.median(speedups),
        "speedup_range": setting.edges(speedups),
        "cpu_speedup_over_stepwise": setting.median([own.cpu and own.cpu / stepwise.cpu for own, stepwise in pairs]),
        "turns": len(pairs),
    }


def make_meta(args: argparse.Namespace, counts: dict[str, int]) -> dict[str, Any]:
    settings = setting.settings_of(args, "json")
    for name in ("model", "teacher_model", "dataset"):
        if settings[name] is not None:
            settings[name] = Path(settings[name]).name  # where it lies is nobody's business
    meta = setting.machine_meta(args, "teacher_shape", "stepwise_cache")
    return meta | counts | {"rows_agree": args.dtype == "float32", "settings": settings}


def name_of(meta: dict[str, Any]) -> str:
    """What was labelled, in a few words."""
    settings = meta["settings"]
    if meta["shape"] is not None:
        return f"{meta['shape']} and {meta['teacher_shape']}, random prompts of {settings['prompt_tokens']} tokens"
    problems = settings["dataset"] or "problems of recipes/embedded"
    return f"{settings['model']} and {settings['teacher_model']}, {problems}"


def format_table(rows: list[dict[str, Any]], meta: dict[str, Any]) -> str:
    """One line per way."""
    settings = meta["settings"]
    lines = [f"Labels per generated position: {name_of(meta)}, {settings['dtype']}, rollouts of at most "
             f"{settings['new_tokens']},",
             f"K = {settings['num_candidates']}, {settings['num_problems']} problems, {meta['device']}, "
             f"{meta['threads']} thread(s): median of {rows[0]['turns']} turn(s)", ""]  # fmt: skip
    cells = [["", "batch", "positions/s", "speed-up", "[min, max]", "cpu"]]
    for row in rows:
        low, high = row["speedup_range"]
        cpu = row["cpu_speedup_over_stepwise"]
        cells.append([row["name"], str(row["batch_size"]), f"{row['positions_per_second']:.1f}",
                      f"{row['speedup_over_stepwise']:.1f}", f"[{low:.1f}, {high:.1f}]",
                      "-" if cpu is None else f"{cpu:.1f}"])  # fmt: skip
    caches = "with both KV caches" if meta["stepwise_cache"] == "both" else "on the whole text at every step"
    agree = f"the same rows at {meta['compared_positions']} positions" if meta["rows_agree"] else "rows not compared"
    note = f"stepwise: {settings['stepwise_problems']} of the problems, {caches}; {agree}"
    return "\n".join([*lines, *setting.align(cells), "", note])


def make_parser() -> setting.Parser:
    parser = setting.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--quick", help="a preset of half a minute (two with --shape); flags beside it win")
    add("--model", help="student: folder or Hub id [the embedded pair]")
    add("--teacher_model", help="teacher: folder or Hub id, with --model")
    add("--dataset", help="problems: file, folder or Hub id, with --model [those of the embedded pair]")
    add("--split", help="file in that folder, or split on the Hub")
    add("--prompt_column", default="prompt", help="column of --dataset [%(default)s]")
    add("--max_prompt_tokens", least=1, help="cut prompts to their first so many tokens")
    add("--shape", choices=sorted(TEACHERS), help="label random prompts with random models of this shape instead")
    add("--teacher_shape", choices=sorted(setting.SHAPES), help="shape of the random teacher [twice as wide]")
    add("--num_layers", help="layers of both random models [the shape's own]")
    add("--vocab_size", help="rows of both random heads [the student shape's own]")
    add("--prompt_tokens", least=1, default=128, help="tokens of each random prompt [%(default)s]")
    add("--new_tokens", least=2, help="most tokens of each rollout [72; with --shape 256, none ends before]")
    add("--num_candidates", least=1, most=MAX_CANDIDATES, default=16, help="K [%(default)s]")
    add("--num_problems", least=1, help="problems for the pipeline [500; with --shape the largest batch]")
    add("--batch_sizes", least=1, nargs="+", help="texts in a batch of the pipeline [32 128; with --shape 32]")
    add("--stepwise_problems", least=1, help="how many of them stepwise labels [16; with --shape 2]")
    add("--stepwise_cache", choices=["both", "none"], default="both", help="KV caches of stepwise [%(default)s]")
    add("--tolerance", type=float, least=0, default=1e-3, help="between the two ways' scores, nats [%(default)s]")
    add("--turns", help="how often everything is timed [5; with --shape 3]")
    add("--device")
    add("--dtype", choices=["float32", "bfloat16"], help="bfloat16 rows are not compared [%(default)s]")
    add("--threads")
    add("--json")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The settings; leaves with status 2 and one line where one is wrong."""
    parser = make_parser()
    is_random = parser.parse_args(argv).shape is not None
    parser.set_defaults(**(RANDOM if is_random else NAMED))
    args = parser.read(argv, QUICK_RANDOM if is_random else QUICK)

    def given(*names: str) -> str:
        return ", ".join(f"--{name}" for name in names if getattr(args, name) is not None)

    named = given("model", "teacher_model", "dataset", "split", "max_prompt_tokens")
    if is_random and named:
        parser.error(f"--shape labels random prompts with random models: {named} must not be given.")
    if not is_random and (needless := given("teacher_shape", "num_layers", "vocab_size")):
        parser.error(f"--shape must be given with {needless}.")
    if (args.model is None) != (args.teacher_model is None):
        parser.error("--model and --teacher_model must be given together.")
    if (args.model is None) != (args.dataset is None):
        missing, beside = ("dataset", "model") if args.dataset is None else ("model", "dataset")
        parser.error(f"--{missing} must be given with --{beside}.")
    parser.check_vocabulary(args, max(args.num_candidates, 2))
    args.batch_sizes = list(dict.fromkeys(args.batch_sizes))  # each once
    args.num_problems = max(args.batch_sizes) if args.num_problems is None else args.num_problems
    if args.stepwise_problems > args.num_problems:
        parser.error(f"--stepwise_problems must be at most {args.num_problems}, got {args.stepwise_problems}.")
    if is_random:
        setting.fill_in_shape(args)
        args.teacher_shape = args.teacher_shape or TEACHERS[args.shape]
    elif args.model is None:
        args.model, args.teacher_model = str(EMBEDDED / "student"), str(EMBEDDED / "teacher")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        rates, counts = measure(args)
    except (ValueError, OSError) as error:
        sys.exit(f"label.py: {error}")
    except RowsDiffer as error:
        sys.exit(f"label.py: the two ways do not agree: {error}")
    meta = make_meta(args, counts)
    rows = [make_row(batch_size, rates, args.dtype) for batch_size in rates]
    setting.write_figures(args, meta, rows)
    setting.show(format_table(rows, meta), args)


if __name__ == "__main__":
    main()
