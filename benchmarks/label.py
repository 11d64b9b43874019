"""What labels cost: `label_problems` against the step-by-step procedure at batch 1, per position, in one run.

    python benchmarks/label.py --json runs/benchmarks/label.json
    python benchmarks/label.py --quick                   # two minutes on two cores
    python benchmarks/label.py --device cuda --dtype bfloat16 --model STUDENT --teacher_model TEACHER

Both ways label the same prompts of random tokens with the same two models, and rollouts have a fixed length:

    pipeline   `label_problems` as recipes/label.py calls it: rollouts of the student in batches, one forward of each
               model over whole texts, every position stored as a point, rows checked and written to disk
    stepwise   what the public code (arXiv 2604.26940) does while it collects: one text at a time, and at every step
               the student and the teacher, the student's argmax appended; nothing is written

`stepwise` is favoured here: the KV caches of both models are kept, as in the public code (`--stepwise_cache none`:
both run on the whole text so far at every step); its scores are read by our own functions; it writes no file. It is
slow, so it runs on the first few of the problems. The random models never end a text, so no batch runs half empty; on
real problems rollouts cost the pipeline what the longest text of a batch is longer than the mean one.

On a CPU batch 1 is bound by reading the weights and the pipeline by arithmetic, so the ratio has a ceiling there that
no batch size moves: the seconds of one pass over the weights, over those of one text token's arithmetic.

In float32 the rows of both ways are compared position by position, and the run fails where they differ by more than
`--tolerance`. Where two tokens tie within it either may come first; texts that part there are compared up to there.

Each way is timed in turn, A B C A B C ...; ratios are taken inside one turn, medians over turns are reported.
"""

from __future__ import annotations

import argparse
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
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformers_s2t.config import MAX_CANDIDATES, write_json
from transformers_s2t.labeling import TrajectoryScores, label_problems, score_positions
from transformers_s2t.proposals import exclude
from transformers_s2t.trajectories import TrajectoryHeader, shard_files


#: The teacher of each shape: twice as wide.
TEACHERS = {"tiny": "tiny-wide", "small": "small-wide", "qwen2.5-0.5b": "qwen2.5-1.5b"}

#: Same models, prompts and batches, half the rollouts' length, one turn.
QUICK = {"turns": 1, "stepwise_problems": 1, "new_tokens": 128}


# --- what is labelled ------------------------------------------------------------------------------------------------


def make_models(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student and the teacher: random ones, or those that were named."""
    num_positions = args.prompt_tokens + args.new_tokens
    models = []
    for name, shape in ((args.model, args.shape), (args.teacher_model, args.teacher_shape)):
        if name is None:
            own = argparse.Namespace(**vars(args) | {"shape": shape})
            models.append(random_model(own, num_positions, eos_token_id=None))
        else:
            one = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype))
            models.append(one.eval().to(args.device))
    return models[0], models[1]


def make_prompts(args: argparse.Namespace, vocab_size: int) -> dict[str, list[int]]:
    """Problem id -> random text tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.num_problems, args.prompt_tokens)
    ids_NP = torch.randint(FIRST_TOKEN, vocab_size - NUM_RESERVED, shape, generator=generator)
    return {str(i): ids for i, ids in enumerate(ids_NP.tolist())}


def make_header(args: argparse.Namespace, vocab_size: int) -> TrajectoryHeader:
    """Every position is stored, so that all of them can be compared."""
    return TrajectoryHeader(
        model=args.model or args.shape,
        teacher_model=args.teacher_model or args.teacher_shape,
        vocab_hash="",
        num_candidates=args.num_candidates,
        divergence_threshold=0.0,
        threshold_sample=0,
        points="all",
        max_new_tokens=args.new_tokens,
        excluded_ids=tuple(range(vocab_size - NUM_RESERVED, vocab_size)),
        dtype=args.dtype,
    )


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


def run_pipeline(
    model: PreTrainedModel,
    teacher_model: PreTrainedModel,
    prompts: dict[str, list[int]],
    header: TrajectoryHeader,
    batch_size: int,
) -> tuple[tuple[float, float], list[dict[str, Any]]]:
    """Wall and CPU seconds, and the rows that were written."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        label_problems(
            model, teacher_model, prompts, folder, header, pad_token_id=0, batch_size=batch_size, show_progress=False
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
    model: PreTrainedModel,
    teacher_model: PreTrainedModel,
    prompts: dict[str, list[int]],
    header: TrajectoryHeader,
    cached: bool,
) -> tuple[tuple[float, float], list[tuple[list[int], TrajectoryScores, list[float]]]]:
    """Wall and CPU seconds, and of each problem its text, its scores and how far the teacher's two best lie apart."""
    excluded = torch.tensor(header.excluded_ids, device=model.device)
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
    check(row["positions"] == list(range(prompt_length, len(text))), "positions", 0, "...", "all")
    for s in range(len(text) - prompt_length):
        for name in ("divergence", "entropy", "margin"):
            ours, theirs = row[name][s], float(getattr(scores, f"{name}_S")[s])
            check(abs(ours - theirs) <= tolerance, name, s, ours, theirs)
        theirs_K = scores.student_logprobs_SK[s].tolist()
        pairs = list(zip(row["student_logprobs"][s], theirs_K, strict=True))
        check(all(abs(a - b) <= tolerance for a, b in pairs), "student_logprobs", s, *zip(*pairs))
        ours_at = dict(zip(row["candidate_ids"][s], zip(row["student_logprobs"][s], row["teacher_logprobs"][s])))
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
        ours, theirs = row["teacher_top_id"][s], int(scores.teacher_top_id_S[s])
        check(ours == theirs or teacher_gaps[s] <= tolerance, "teacher_top_id", s, ours, theirs)
        ours, theirs = row["input_ids"][prompt_length + s], text[prompt_length + s]
        if ours != theirs:
            check(float(scores.margin_S[s]) >= -tolerance, "input_ids", s, ours, theirs)
            return s + 1
    return len(text) - prompt_length


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> tuple[dict[str, list[Rate]], dict[str, int]]:
    """The rates of each way in each turn, and how many positions were generated and compared."""
    pair = make_models(args)
    vocab_size = min(one.get_output_embeddings().weight.shape[0] for one in pair)
    prompts, header = make_prompts(args, vocab_size), make_header(args, vocab_size)
    few = dict(list(prompts.items())[: args.stepwise_problems])
    cached = args.stepwise_cache == "both"
    short = TrajectoryHeader(**header.to_dict() | {"max_new_tokens": 2})
    run_stepwise(*pair, dict(list(few.items())[:1]), short, cached)  # what is loaded on first use is no cost of a way
    run_pipeline(*pair, dict(list(prompts.items())[:2]), short, batch_size=2)
    rates: dict[str, list[Rate]] = {"stepwise": []} | {f"pipeline {size}": [] for size in args.batch_sizes}
    counts = {"stepwise_positions": 0, "pipeline_positions": 0, "compared_positions": 0}
    with tqdm(total=args.turns * len(rates), unit="run") as bar:
        for _ in range(args.turns):
            bar.set_description("stepwise")
            seconds, steps = run_stepwise(*pair, few, header, cached)
            counts["stepwise_positions"] = sum(len(scores.divergence_S) for _, scores, _ in steps)
            rates["stepwise"].append(make_rate(counts["stepwise_positions"], seconds))
            bar.update()
            for size in args.batch_sizes:
                bar.set_description(f"pipeline, batch {size}")
                seconds, rows = run_pipeline(*pair, prompts, header, size)
                counts["pipeline_positions"] = sum(len(row["divergence"]) for row in rows)
                rates[f"pipeline {size}"].append(make_rate(counts["pipeline_positions"], seconds))
                bar.update()
                if [row["problem_id"] for row in rows] != list(prompts):
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
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    for name in ("model", "teacher_model"):
        if settings[name] is not None:
            settings[name] = Path(settings[name]).name  # where it lies is nobody's business
    meta = machine_meta(args) | {"teacher_shape": args.teacher_shape, "stepwise_cache": args.stepwise_cache}
    return meta | counts | {"rows_agree": args.dtype == "float32", "settings": settings}


def format_table(rows: list[dict[str, Any]], meta: dict[str, Any]) -> str:
    """One line per way."""
    settings = meta["settings"]
    student, teacher = settings["model"] or meta["shape"], settings["teacher_model"] or meta["teacher_shape"]
    lines = [f"Labels per generated position: {student} and {teacher}, {settings['dtype']}, prompts of "
             f"{settings['prompt_tokens']} tokens, rollouts of {settings['new_tokens']},",
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
    add("--quick", action="store_true", help="a preset of two minutes; flags given beside it win")
    add("--model", help="student: folder or Hub id; a random one of --shape if not given")
    add("--teacher_model", help="teacher: folder or Hub id; a random one of --teacher_shape if not given")
    add("--shape", choices=sorted(TEACHERS), default="small", help="of the random student [%(default)s]")
    add("--teacher_shape", choices=sorted(SHAPES), help="of the random teacher [twice as wide as the student]")
    add("--num_layers", type=int, help="of both random models; by default the shape's own")
    add("--vocab_size", type=int, help="rows of both random heads; by default the student shape's own")
    add("--prompt_tokens", type=int, default=128, help="of each prompt [%(default)s]")
    add("--new_tokens", type=int, default=256, help="of each rollout [%(default)s]")
    add("--num_candidates", type=int, default=16, help="K [%(default)s]")
    add("--num_problems", type=int, help="for the pipeline [the largest batch]")
    add("--batch_sizes", type=int, nargs="+", default=[32], help="of the pipeline [32]")
    add("--stepwise_problems", type=int, default=2, help="how many of them stepwise labels [%(default)s]")
    add("--stepwise_cache", choices=["both", "none"], default="both", help="KV caches of stepwise [%(default)s]")
    add("--tolerance", type=float, default=1e-3, help="between the two ways' scores, nats [%(default)s]")
    add("--turns", type=int, default=3, help="how often everything is timed [%(default)s]")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="[%(default)s]")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 rows are not compared")
    add("--threads", type=int, help="of the CPU [torch's default]")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError for what could not be measured."""
    least = {"prompt_tokens": 1, "new_tokens": 2, "num_candidates": 1, "num_problems": 1, "stepwise_problems": 1}
    least |= {"turns": 1, "num_layers": 1, "threads": 1, "tolerance": 0, "batch_sizes": 1}
    least["vocab_size"] = FIRST_TOKEN + max(args.num_candidates, 2) + NUM_RESERVED
    check_range(args, least, {"num_candidates": MAX_CANDIDATES, "stepwise_problems": args.num_problems})
    check_device(args)
    check_file("--json", args.json)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The settings; leaves with status 2 and one line where one is wrong."""
    parser = make_parser()
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    fill_in_shape(args)
    args.teacher_shape = args.teacher_shape or TEACHERS[args.shape]
    args.batch_sizes = list(dict.fromkeys(args.batch_sizes))  # each once
    args.num_problems = max(args.batch_sizes) if args.num_problems is None else args.num_problems
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        rates, counts = measure(args)
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
