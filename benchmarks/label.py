"""What labels cost: `label_problems` against the step-by-step procedure at batch 1, per position, in one run.

    python benchmarks/label.py --json runs/benchmarks/label.json            # the embedded pair on its own problems
    python benchmarks/label.py --quick                                      # half a minute on two cores
    python benchmarks/label.py --model weak --teacher_model strong --dataset gsm8k/train.jsonl \\
        --prompt_column question --max_prompt_tokens 48 --new_tokens 128    # any other pair and problems
    python benchmarks/label.py --shape small                                # random models, random prompts
    python benchmarks/label.py --shape qwen2.5-0.5b --device cuda --dtype bfloat16

Both ways label the same prompts with the same two models:

    pipeline   `label_problems` as recipes/label.py calls it: rollouts of the student in length-sorted batches, one
               forward of each model over whole texts, points chosen, rows checked and written to disk
    stepwise   what the public code (arXiv 2604.26940) does while it collects: one text at a time, and at every step
               the student and the teacher, the student's argmax appended; nothing is written

`stepwise` is favoured here: the KV caches of both models are kept, as in the public code (`--stepwise_cache none`:
both run on the whole text so far at every step); its scores are read by our own functions; it writes no file. It is
slow, so it runs on the first few of the problems. Real problems end where the student ends them, and a batch lasts as
long as its longest text; random models never end one.

What the ratio depends on: small models at batch 1 are bound by launching their operations, and a batch costs hardly
more than one text. Larger models on a CPU are bound by reading the weights at batch 1 and by arithmetic in a batch, so
there the ratio has a ceiling that no batch size moves: the seconds of one pass over the weights, over those of one
text token's arithmetic.

In float32 the rows of both ways are compared, the trigger values at every position and all columns at the stored
points, and the run fails where they differ by more than `--tolerance`. Where two tokens tie within it either may come
first; texts that part there are compared up to there.

Each way is timed in turn, A B C A B C ...; ratios are taken inside one turn, medians over turns are reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from setting import (
    FIRST_TOKEN,
    NUM_RESERVED,
    SHAPES,
    Parser,
    check_device,
    check_file,
    check_range,
    fill_in_shape,
    machine_meta,
    random_model,
)
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from transformers_s2t.config import MAX_CANDIDATES
from transformers_s2t.files import write_json
from transformers_s2t.labeling.label_problems import label_problems
from transformers_s2t.labeling.points import TrajectoryScores, score_positions
from transformers_s2t.labels.folder import shard_files
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.proposals import exclude
from transformers_s2t.reserved_tokens import find_reserved_token_ids


#: The pair that ships here.
EMBEDDED = Path(__file__).resolve().parents[1] / "recipes" / "embedded"

sys.path.append(str(EMBEDDED))
from corpus import build_split  # noqa: E402

from s2t_recipes.problems import encode_prompts, load_problems  # noqa: E402


#: The teacher of each shape: twice as wide.
TEACHERS = {"tiny": "tiny-wide", "small": "small-wide", "qwen2.5-0.5b": "qwen2.5-1.5b"}

#: Of the models and problems that are labelled: what holds where no flag says otherwise.
NAMED = {"new_tokens": 72, "num_problems": 500, "batch_sizes": [32, 128], "stepwise_problems": 16, "turns": 5}
RANDOM = {"new_tokens": 256, "batch_sizes": [32], "stepwise_problems": 2, "turns": 3}

#: Fewer of the same problems; of random models half the rollouts' length.
QUICK = {"num_problems": 256, "stepwise_problems": 8, "turns": 3}
QUICK_RANDOM = {"stepwise_problems": 1, "new_tokens": 128, "turns": 1}


# --- what is labelled ------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Two models and what they label."""

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
        models = [
            random_model(
                argparse.Namespace(**vars(args) | {"shape": shape}), args.prompt_tokens + args.new_tokens, None
            )
            for shape in (args.shape, args.teacher_shape)
        ]
        reserved = range(args.vocab_size - NUM_RESERVED, args.vocab_size)
        header = TrajectoryHeader(args.shape, args.teacher_shape, excluded_ids=tuple(reserved), **common)
        return Work(*models, random_prompts(args), header)
    models = [
        AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype)).eval().to(args.device)
        for name in (args.model, args.teacher_model)
    ]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        reserved = find_reserved_token_ids(tokenizer, models[0].get_output_embeddings().weight.shape[0])
    except ValueError:
        reserved = []
    texts = read_prompts(args)
    prompts = {str(i): ids[: args.max_prompt_tokens] for i, ids in enumerate(encode_prompts(tokenizer, texts))}
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    names = (Path(name).name for name in (args.model, args.teacher_model))
    return Work(*models, prompts, TrajectoryHeader(*names, excluded_ids=reserved, eos_token_ids=ends, **common))


def random_prompts(args: argparse.Namespace) -> dict[str, list[int]]:
    """Problem id -> random text tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.num_problems, args.prompt_tokens)
    ids_NP = torch.randint(FIRST_TOKEN, args.vocab_size - NUM_RESERVED, shape, generator=generator)
    return {str(i): ids for i, ids in enumerate(ids_NP.tolist())}


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The problems' texts, of the data set or as recipes/embedded writes them."""
    if args.dataset is None:
        return [row["prompt"] for row in build_split("label", args.num_problems, 0)]
    problems = load_problems(args.dataset, args.split, args.prompt_column, None, args.num_problems)
    if len(problems) < args.num_problems:
        raise ValueError(f"--num_problems must be at most {len(problems)}, which is all of --dataset.")
    return [problem.prompt for problem in problems]


class Clock:
    """Wall and CPU seconds since this was made; the latter do not depend on what else the machine does."""

    def __init__(self):
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


class Rate(NamedTuple):
    """Positions per second of one way in one turn."""

    wall: float
    cpu: float


def make_rate(num_positions: int, seconds: tuple[float, float]) -> Rate:
    return Rate(*(num_positions / max(value, 1e-9) for value in seconds))


# --- both ways -------------------------------------------------------------------------------------------------------


def run_pipeline(work: Work, batch_size: int) -> tuple[tuple[float, float], list[dict[str, Any]]]:
    """Wall and CPU seconds, and the rows that were written."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        label_problems(
            work.model,
            work.teacher_model,
            work.prompts,
            folder,
            work.header,
            pad_token_id=0,
            batch_size=batch_size,
            show_progress=False,
        )
        seconds = clock.read()
        rows = [row for file in shard_files(folder) for row in pq.read_table(file).to_pylist()]
    return seconds, rows


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
) -> tuple[tuple[float, float], list[tuple[list[int], TrajectoryScores, list[float]]]]:
    """Wall and CPU seconds, and of each problem its text, its scores and how far the teacher's two best lie apart."""
    model, teacher_model, prompts, header = work
    excluded = torch.tensor(header.excluded_ids, dtype=torch.long, device=model.device)
    clock, done = Clock(), []
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
    return clock.read(), done


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


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> tuple[dict[str, list[Rate]], dict[str, int]]:
    """The rates of each way in each turn, and how many positions were generated and compared."""
    work = make_work(args)
    few = work._replace(prompts=dict(list(work.prompts.items())[: args.stepwise_problems]))
    cached = args.stepwise_cache == "both"
    # what is loaded on first use is no cost of a way
    short = few._replace(header=dataclasses.replace(work.header, max_new_tokens=2))
    run_stepwise(short, cached)
    run_pipeline(short, batch_size=2)
    rates: dict[str, list[Rate]] = {"stepwise": []} | {f"pipeline {size}": [] for size in args.batch_sizes}
    counts = {"stepwise_positions": 0, "pipeline_positions": 0, "compared_positions": 0}
    with tqdm(total=args.turns * len(rates), unit="run") as bar:
        for _ in range(args.turns):
            bar.set_description("stepwise")
            seconds, steps = run_stepwise(few, cached)
            counts["stepwise_positions"] = sum(len(scores.divergence_S) for _, scores, _ in steps)
            rates["stepwise"].append(make_rate(counts["stepwise_positions"], seconds))
            bar.update()
            for size in args.batch_sizes:
                bar.set_description(f"pipeline, batch {size}")
                seconds, rows = run_pipeline(work, size)
                counts["pipeline_positions"] = sum(len(row["divergence"]) for row in rows)
                rates[f"pipeline {size}"].append(make_rate(counts["pipeline_positions"], seconds))
                bar.update()
                if [row["problem_id"] for row in rows] != list(work.prompts):
                    raise RowsDiffer("the pipeline's rows are not those of the problems.")
                if args.dtype == "float32":
                    compared = [compare(row, *step, args.tolerance) for row, step in zip(rows, steps)]
                    counts["compared_positions"] += sum(compared)
    return rates, counts


def make_row(
    name: str, samples: list[Rate], stepwise: list[Rate], batch_size: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row of the JSON from positions per second, each beside stepwise's of the same turn."""
    speedups = [own.wall / theirs.wall for own, theirs in zip(samples, stepwise)]
    cpu_speedups = [own.cpu / theirs.cpu for own, theirs in zip(samples, stepwise)]
    return {
        "name": name,
        "batch_size": batch_size,
        "dtype": args.dtype,
        "positions_per_second": round(statistics.median(rate.wall for rate in samples), 4),
        "speedup_over_stepwise": round(statistics.median(speedups), 4),
        "speedup_range": [round(min(speedups), 4), round(max(speedups), 4)],
        "cpu_speedup_over_stepwise": None if args.device == "cuda" else round(statistics.median(cpu_speedups), 4),
        "turns": len(samples),
    }


# --- what is said ----------------------------------------------------------------------------------------------------


def make_meta(args: argparse.Namespace, counts: dict[str, int]) -> dict[str, Any]:
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot")}
    for name in ("model", "teacher_model", "dataset"):
        if settings[name] is not None:
            settings[name] = Path(settings[name]).name  # where it lies is nobody's business
    meta = machine_meta(args) | {"teacher_shape": args.teacher_shape, "stepwise_cache": args.stepwise_cache}
    return meta | counts | {"rows_agree": args.dtype == "float32", "settings": settings}


def name_of(meta: dict[str, Any]) -> str:
    """What was labelled, in a few words."""
    settings = meta["settings"]
    if meta["shape"] is not None:
        return f"{meta['shape']} and {meta['teacher_shape']}, random prompts of {settings['prompt_tokens']} tokens"
    return (
        f"{settings['model']} and {settings['teacher_model']}, {settings['dataset'] or 'problems of recipes/embedded'}"
    )


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
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    caches = "with both KV caches" if meta["stepwise_cache"] == "both" else "on the whole text at every step"
    agree = f"the same rows at {meta['compared_positions']} positions" if meta["rows_agree"] else "rows not compared"
    return "\n".join([*lines, "", f"stepwise: {settings['stepwise_problems']} of the problems, {caches}; {agree}"])


# --- command line ----------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(prog="label.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a preset of half a minute (two with --shape); flags beside it win")
    add("--model", help="student: folder or Hub id [the embedded pair]")
    add("--teacher_model", help="teacher: folder or Hub id, with --model")
    add("--dataset", help="problems: file, folder or Hub id, with --model [those of the embedded pair]")
    add("--split", help="file in that folder, or split on the Hub")
    add("--prompt_column", default="prompt", help="of --dataset [%(default)s]")
    add("--max_prompt_tokens", type=int, help="cut prompts to their first so many tokens")
    add("--shape", choices=sorted(TEACHERS), help="label random prompts with random models of this shape instead")
    add("--teacher_shape", choices=sorted(SHAPES), help="of the random teacher [twice as wide as the student]")
    add("--num_layers", type=int, help="of both random models; by default the shape's own")
    add("--vocab_size", type=int, help="rows of both random heads; by default the student shape's own")
    add("--prompt_tokens", type=int, default=128, help="of each random prompt [%(default)s]")
    add("--new_tokens", type=int, help="of each rollout, at most [72; with --shape 256, none ends before]")
    add("--num_candidates", type=int, default=16, help="K [%(default)s]")
    add("--num_problems", type=int, help="for the pipeline [500; with --shape the largest batch]")
    add("--batch_sizes", type=int, nargs="+", help="of the pipeline [32 128; with --shape 32]")
    add("--stepwise_problems", type=int, help="how many of them stepwise labels [16; with --shape 2]")
    add("--stepwise_cache", choices=["both", "none"], default="both", help="KV caches of stepwise [%(default)s]")
    add("--tolerance", type=float, default=1e-3, help="between the two ways' scores, nats [%(default)s]")
    add("--turns", type=int, help="how often everything is timed [5; with --shape 3]")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="[%(default)s]")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 rows are not compared")
    add("--threads", type=int, help="of the CPU [torch's default]")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError for what could not be measured."""
    named = ("model", "teacher_model", "dataset", "split", "max_prompt_tokens")
    if args.shape is not None:
        if given := [f"--{name}" for name in named if getattr(args, name) is not None]:
            raise ValueError(
                f"--shape labels random prompts with random models: {', '.join(given)} must not be given."
            )
    elif given := [
        f"--{name}" for name in ("teacher_shape", "num_layers", "vocab_size") if getattr(args, name) is not None
    ]:
        raise ValueError(f"--shape must be given with {', '.join(given)}.")
    if (args.model is None) != (args.teacher_model is None):
        raise ValueError("--model and --teacher_model must be given together.")
    if args.model is not None and args.dataset is None:
        raise ValueError("--dataset must be given with --model.")
    if args.model is None and args.dataset is not None:
        raise ValueError("--model must be given with --dataset.")
    least = {"prompt_tokens": 1, "new_tokens": 2, "num_candidates": 1, "num_problems": 1, "stepwise_problems": 1}
    least |= {"turns": 1, "num_layers": 1, "threads": 1, "tolerance": 0, "batch_sizes": 1, "max_prompt_tokens": 1}
    least["vocab_size"] = FIRST_TOKEN + max(args.num_candidates, 2) + NUM_RESERVED
    check_range(args, least, {"num_candidates": MAX_CANDIDATES, "stepwise_problems": args.num_problems})
    check_device(args)
    check_file("--json", args.json)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The settings; leaves with status 2 and one line where one is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    usual, quick = (NAMED, QUICK) if args.shape is None else (RANDOM, QUICK_RANDOM)
    parser.set_defaults(**usual | (quick if args.quick else {}))
    args = parser.parse_args(argv)
    args.batch_sizes = list(dict.fromkeys(args.batch_sizes))  # each once
    args.num_problems = max(args.batch_sizes) if args.num_problems is None else args.num_problems
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    if args.shape is not None:
        fill_in_shape(args)
        args.teacher_shape = args.teacher_shape or TEACHERS[args.shape]
    elif args.model is None:
        args.model, args.teacher_model = str(EMBEDDED / "student"), str(EMBEDDED / "teacher")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        rates, counts = measure(args)
    except (ValueError, OSError) as error:
        sys.exit(f"label.py: {error}")
    except RowsDiffer as error:
        sys.exit(f"label.py: the two ways do not agree: {error}")
    meta = make_meta(args, counts)
    rows = [make_row("stepwise", rates["stepwise"], rates["stepwise"], 1, args)]
    for size in args.batch_sizes:
        rows.append(make_row("pipeline", rates[f"pipeline {size}"], rates["stepwise"], size, args))
    print(f"\n{format_table(rows, meta)}")
    if args.json is not None:
        write_json(args.json, {"meta": meta, "rows": rows})
        print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    main()
