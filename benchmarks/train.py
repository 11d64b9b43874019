"""Time and memory of S2TTrainer's packed step, per decision point, against the published procedure's.

    python benchmarks/train.py --json runs/benchmarks/train.json
    python benchmarks/train.py --quick                   # a minute on two cores
    python benchmarks/train.py --device cuda --dtype bfloat16 --shape qwen2.5-0.5b --naive_kl all

Prints a line for each way to train a random model on random trajectories of T tokens, a quarter of them the prompt,
with N decision points of K candidates: seconds, tokens that run through a decoder, and peak memory above the model
with its adapter. Speed-up and memory are relative to `naive` in the same turn; medians over turns, [lowest, highest].

    packed   S2TTrainer's loss, gradient and optimizer step on all points of `--batch_size` trajectories, in scope
             "candidate", and in "sequence" with its prefix KL
    naive    arXiv 2604.26940, public code: at each point K rows of prefix and candidate through the adapted model with
             gradient, and the KL on the prefix from a second, frozen copy of the model; scope "sequence"

`naive` is favoured: its KL looks at one of the K rows, whose prefixes are equal (`--naive_kl all`: at all of them, as
in the public code), rows are not padded, the graph of one point is held at a time and not of four, and the head is not
copied. A few points are timed, whose prefixes have the mean length of all. Each figure has a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import setting
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transformers_s2t import S2TConfig, S2TTrainer
from transformers_s2t.config import MAX_CANDIDATES
from transformers_s2t.models.views import get_decoder


SCOPES = ("candidate", "sequence")

#: Same T, N and K, one turn, and a smaller head.
QUICK = {"shape": "small", "vocab_size": 8192, "turns": 1}


class Variant(NamedTuple):
    """One way to train."""

    name: str
    scope: str

    @property
    def label(self) -> str:
        return self.name if self.name == "naive" else f"{self.name} {self.scope}"


NAIVE = Variant("naive", "sequence")


def spread_points(num_tokens: int, num_points: int) -> list[int]:
    """Indices of the tokens under decision, which are the lengths of their prefixes: the prompt's to T - 1, evenly."""
    first, last = num_tokens // 4, num_tokens - 1
    return [first + round(i * (last - first) / (num_points - 1)) for i in range(num_points)]


def choose_groups(num_points: int, num_groups: int) -> list[int]:
    """Which points stand for all: evenly spread and symmetric, so that their mean prefix is that of all points.

    An odd number of an even number of points has no middle: the mean is then half a step off, divided by their number.
    """
    lower = [(2 * g + 1) * num_points // (2 * num_groups) for g in range(num_groups // 2)]
    middle = [num_points // 2] * (num_groups % 2)
    return [*lower, *middle, *(num_points - 1 - i for i in reversed(lower))]


def make_rows(vocab_size: int, num_rows: int, num_tokens: int, num_points: int, num_candidates: int) -> list[dict]:
    """Labelled trajectories of random tokens, candidates and log-probabilities."""
    generator = torch.Generator().manual_seed(1)
    num_texts = vocab_size - setting.NUM_RESERVED - setting.FIRST_TOKEN  # tokens that texts are made of
    rows = []
    for _ in range(num_rows):
        ids_T = torch.randint(num_texts, (num_tokens,), generator=generator) + setting.FIRST_TOKEN
        candidates_NK = torch.rand(num_points, num_texts, generator=generator).topk(num_candidates).indices
        candidates_NK = candidates_NK + setting.FIRST_TOKEN
        student_NK, teacher_NK = torch.randn(2, num_points, num_candidates, generator=generator).log_softmax(-1)
        best_N1 = teacher_NK.argmax(-1, keepdim=True)
        rows.append(
            {
                "input_ids": ids_T.tolist(),
                "prompt_length": num_tokens // 4,
                "positions": spread_points(num_tokens, num_points),
                "candidate_ids": candidates_NK.tolist(),
                "student_logprobs": student_NK.sort(descending=True).values.tolist(),
                "teacher_logprobs": teacher_NK.tolist(),
                "teacher_top_id": candidates_NK.gather(-1, best_N1)[:, 0].tolist(),
            }
        )
    return rows


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """A random model, the same at every call."""
    return setting.random_model(args, args.num_tokens + 1, eos_token_id=2)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens, all that a trainer asks for: texts are ids already, reserved rows are given by number."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_trainer(args: argparse.Namespace, scope: str, folder: str) -> S2TTrainer:
    """The trainer, ready to step, and in it the model, the adapter, the optimizer and the rows of either way."""
    num_packed = args.num_tokens + args.num_points * args.num_candidates
    config = S2TConfig(
        output_dir=folder,
        adapter_scope=scope,
        num_candidates=args.num_candidates,
        min_prob_ratio=0.0,
        max_packed_tokens=max(16, num_packed),
        reserved_token_ids=list(range(args.vocab_size - setting.NUM_RESERVED, args.vocab_size)),
        per_device_train_batch_size=args.batch_size,
        text_cache_gb=0,  # every step reads its texts, as in a first epoch
        report_to="none",
        save_strategy="no",
        use_cpu=args.device == "cpu",
        disable_tqdm=True,
    )
    rows = make_rows(args.vocab_size, args.batch_size, args.num_tokens, args.num_points, args.num_candidates)
    trainer = S2TTrainer(make_model(args), config, Dataset.from_list(rows), processing_class=make_tokenizer())
    if len(trainer.train_dataset) != len(rows):
        raise RuntimeError(f"{len(rows)} trajectories became {len(trainer.train_dataset)}: not comparable.")
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def collate(trainer: S2TTrainer, rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}


def update(trainer: S2TTrainer) -> None:
    """One step of the optimizer, as both ways take it."""
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


class Packed:
    """S2TTrainer's own steps. `run` trains on `num_groups` decision points."""

    def __init__(self, args: argparse.Namespace, trainer: S2TTrainer):
        self.trainer, self.num_steps = trainer, args.packed_steps
        self.batch = collate(trainer, list(trainer.train_dataset))
        self.num_groups = args.packed_steps * self.batch["positions"].numel()
        self.mean_prefix = self.batch["positions"].float().mean().item()
        self.models = [trainer.base_model]

    def run(self) -> None:
        for _ in range(self.num_steps):
            self.trainer.compute_loss(self.trainer.model, self.batch).backward()
            update(self.trainer)


class Naive:
    """The published steps on a few points of the first trajectory. `run` trains on `num_groups` of them."""

    def __init__(self, args: argparse.Namespace, trainer: S2TTrainer):
        self.trainer, self.kl, self.num_groups = trainer, args.naive_kl, args.naive_groups
        self.groups_per_step = args.naive_groups_per_step
        batch = collate(trainer, [trainer.train_dataset[0]])
        self.input_ids_T = batch["input_ids"][0]
        chosen = choose_groups(args.num_points, args.naive_groups)
        names = ("positions", "candidate_ids", "teacher_logprobs")
        self.positions_G, self.candidate_ids_GK, self.teacher_logprobs_GK = (batch[name][0, chosen] for name in names)
        self.mean_prefix = self.positions_G.float().mean().item()
        self.frozen = make_model(args).requires_grad_(False)
        self.models = [trainer.base_model, self.frozen]

    def loss(self, group: int) -> torch.Tensor:
        """Cross-entropy of the scores of K whole rows, plus the KL on their common prefix."""
        trainer, candidates_K1 = self.trainer, self.candidate_ids_GK[group][:, None]
        prefix_P = self.input_ids_T[: self.positions_G[group]]
        ids_KT = torch.cat([prefix_P.expand(len(candidates_K1), -1), candidates_K1], dim=-1)
        hidden_KTD = get_decoder(trainer.views().adapted)(input_ids=ids_KT, use_cache=False).last_hidden_state
        bins_KR = hidden_KTD[:, -1].float() @ trainer.rows().float().T
        scores_K = bins_KR.softmax(-1) @ torch.linspace(0.0, 1.0, bins_KR.shape[-1], device=bins_KR.device)
        target = self.teacher_logprobs_GK[group].argmax()
        cross_entropy = F.cross_entropy(scores_K / trainer.args.temperature, target)
        return cross_entropy + trainer.args.prefix_kl_weight * self.prefix_kl(ids_KT, hidden_KTD)

    def prefix_kl(self, ids_KT: torch.Tensor, hidden_KTD: torch.Tensor) -> torch.Tensor:
        """Mean KL(frozen || tuned) over the prefix: of the first row, or of all K as the public code has it."""
        num_prefix = ids_KT.shape[1] - 1
        with torch.no_grad():
            ids = ids_KT if self.kl == "all" else ids_KT[:1, :num_prefix]
            frozen_XTD = get_decoder(self.frozen)(input_ids=ids, use_cache=False).last_hidden_state
            frozen_XPV = self.frozen.get_output_embeddings()(frozen_XTD[:, :num_prefix])
        tuned_XPD = hidden_KTD[: len(frozen_XPV), :num_prefix]
        tuned_XPV = self.trainer.base_model.get_output_embeddings()(tuned_XPD)
        frozen_XPV, tuned_XPV = frozen_XPV.float().log_softmax(-1), tuned_XPV.float().log_softmax(-1)
        return (frozen_XPV.exp() * (frozen_XPV - tuned_XPV)).sum(-1).mean()

    def run(self) -> None:
        for group in range(self.num_groups):
            (self.loss(group) / self.groups_per_step).backward()
            if (group + 1) % self.groups_per_step == 0 or group + 1 == self.num_groups:
                update(self.trainer)


WAYS: dict[str, Callable[[argparse.Namespace, S2TTrainer], Packed | Naive]] = {"packed": Packed, "naive": Naive}


def resident_bytes(key: str) -> int:
    """Resident memory of this process: "VmRSS", or "VmHWM", the most since `PeakMemory` was made.

    Not `ru_maxrss`, which a process inherits from the one that started it; that stands in on systems without /proc.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


class PeakMemory:
    """How far memory rises above what is held when this is made."""

    def __init__(self, device: torch.device):
        gc.collect()
        self.on_cuda = device.type == "cuda"
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to VmRSS
        except OSError:
            pass
        self.before = resident_bytes("VmRSS")

    def read(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.on_cuda else resident_bytes("VmHWM")
        return max(peak - self.before, 0)


def warm_up(trainer: S2TTrainer, vocab_size: int) -> None:
    """A backward pass of a few tokens: what is loaded on first use is no cost of a step."""
    rows = make_rows(vocab_size, num_rows=1, num_tokens=8, num_points=2, num_candidates=2)
    trainer.compute_loss(trainer.model, collate(trainer, rows)).backward()
    trainer.optimizer.zero_grad(set_to_none=True)


def measure_one(args: argparse.Namespace, variant: Variant) -> dict:
    """The figures of one variant in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, variant.scope, folder)
        warm_up(trainer, args.vocab_size)
        model_bytes = sum(parameter.nbytes for parameter in trainer.model.parameters())
        memory = PeakMemory(trainer.args.device)
        way = WAYS[variant.name](args, trainer)
        num_tokens = [0]

        def count(module: torch.nn.Module, call: tuple, inputs: dict[str, Any]) -> None:
            num_tokens[0] += inputs["input_ids"].numel()

        if memory.on_cuda:  # kernels are loaded shape by shape
            way.run()
        for model in way.models:
            get_decoder(model).register_forward_pre_hook(count, with_kwargs=True)
        with setting.Clock(trainer.args.device) as clock:
            way.run()
        return {
            "seconds_per_group": clock.wall / way.num_groups,
            "cpu_seconds_per_group": None if clock.cpu is None else clock.cpu / way.num_groups,
            "tokens_per_group": num_tokens[0] / way.num_groups,
            "mean_prefix": way.mean_prefix,
            "peak_bytes": memory.read(),
            "model_bytes": model_bytes,
        }


def measure_alone(argv: list[str], variant: Variant) -> dict:
    """The figures of one variant in a process of its own, so that its peak is no other's.

    Raises:
        RuntimeError: where that process fails, with the last line that it wrote.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--one", ":".join(variant)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it wrote nothing; a negative status is a signal, -9: no memory"]
        raise RuntimeError(f"{variant.label} ended with status {done.returncode}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def make_row(variant: Variant, samples: list[dict], naive: list[dict], dtype: str) -> dict:
    """One row of the JSON from the variant's samples, each beside naive's of the same turn."""
    pairs, one = list(zip(samples, naive)), samples[0]  # model and counts are the same in every turn

    def speedups(name: str) -> list[float | None]:
        return [None if own[name] is None else theirs[name] / max(own[name], 1e-9) for own, theirs in pairs]

    memory = [own["peak_bytes"] / max(theirs["peak_bytes"], 1) for own, theirs in pairs]
    wall_speedups = speedups("seconds_per_group")
    return {
        "name": variant.name,
        "scope": variant.scope,
        "dtype": dtype,
        "seconds_per_group": setting.median([own["seconds_per_group"] for own in samples], 5),
        "cpu_seconds_per_group": setting.median([own["cpu_seconds_per_group"] for own in samples], 5),
        "peak_bytes": int(setting.median([own["peak_bytes"] for own in samples])),
        "model_bytes": one["model_bytes"],
        "tokens_per_group": round(one["tokens_per_group"], 4),
        "mean_prefix": round(one["mean_prefix"], 4),
        "speedup_over_naive": setting.median(wall_speedups),
        "speedup_range": setting.edges(wall_speedups),
        "cpu_speedup_over_naive": setting.median(speedups("cpu_seconds_per_group")),
        "memory_over_naive": setting.median(memory),
        "turns": len(samples),
    }


def format_table(rows: list[dict], meta: dict) -> str:
    """One line per way."""
    settings = meta["settings"]
    lines = [f"Training per decision point (T = {meta['num_tokens']} tokens, N = {meta['num_points']} points of K = "
             f"{meta['num_candidates']} candidates), {meta['shape']} with {meta['layers']} layers",
             f"and a vocabulary of {meta['vocab']} ({rows[0]['model_bytes'] / 2**20:.0f} MiB), {settings['dtype']}, "
             f"{meta['device']}, {meta['threads']} thread(s): median of {rows[0]['turns']} turn(s)", ""]  # fmt: skip
    cells = [["", "s", "cpu s", "tokens", "peak MiB", "speed-up", "[min, max]", "cpu", "memory / naive"]]
    for row in rows:
        cpu, cpu_speedup = row["cpu_seconds_per_group"], row["cpu_speedup_over_naive"]
        low, high = row["speedup_range"]
        label = Variant(row["name"], row["scope"]).label
        cells.append([label, f"{row['seconds_per_group']:.3g}", "-" if cpu is None else f"{cpu:.3g}",
                      f"{row['tokens_per_group']:.1f}", f"{row['peak_bytes'] / 2**20:.0f}",
                      f"{row['speedup_over_naive']:.1f}", f"[{low:.1f}, {high:.1f}]",
                      "-" if cpu_speedup is None else f"{cpu_speedup:.1f}",
                      f"{row['memory_over_naive']:.3f}"])  # fmt: skip
    kl = "all K rows" if settings["naive_kl"] == "all" else "one of the K rows"
    note = f"naive: the published procedure at {settings['naive_groups']} points, its KL on {kl}; the baseline of both"
    return "\n".join([*lines, *setting.align(cells), "", f"{note} scopes"])


def make_parser() -> setting.Parser:
    parser = setting.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--quick", help="a preset of a minute; flags given beside it win")
    add("--shape", default="small")
    add("--num_layers")
    add("--vocab_size")
    add("--num_tokens", least=8, default=512, help="T, tokens of a trajectory [%(default)s]")
    add("--num_points", least=2, default=20, help="N, decision points of a trajectory [%(default)s]")
    add("--num_candidates", least=2, most=MAX_CANDIDATES, default=16, help="K [%(default)s]")
    add("--batch_size", least=1, default=1, help="trajectories in a packed step [%(default)s]")
    add("--packed_steps", least=1, default=3, help="packed steps to time [%(default)s]")
    add("--naive_groups", least=1, default=4, help="points to time naive at, N at most [%(default)s]")
    add("--naive_groups_per_step", least=1, default=4, help="points in naive's step, 4 in the paper [%(default)s]")
    add("--naive_kl", choices=["one", "all"], default="one", help="rows of naive's KL; all: public code [%(default)s]")
    add("--turns", default=2)
    add("--scopes", choices=SCOPES, nargs="+", default=list(SCOPES), help="scopes of packed [all]")
    add("--device")
    add("--dtype", choices=["float32", "bfloat16"])
    add("--threads")
    add("--json", help="write the figures here, again after every turn")
    add("--one", help=argparse.SUPPRESS)  # name:scope, measured in this process and printed as one line of JSON
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The settings; leaves with status 2 and one line where one is wrong."""
    parser = make_parser()
    args = parser.read(argv, QUICK)
    setting.fill_in_shape(args)
    args.scopes = list(dict.fromkeys(args.scopes))  # each once
    parser.check_vocabulary(args, args.num_candidates)
    after_prompt = args.num_tokens - args.num_tokens // 4
    if args.num_points > after_prompt:
        parser.error(f"--num_points must be at most {after_prompt}, got {args.num_points}.")
    if args.device == "cuda" and torch.cuda.device_count() > 1:
        parser.error("--device cuda: one process trains on one GPU; set CUDA_VISIBLE_DEVICES=0.")
    args.naive_groups = min(args.naive_groups, args.num_points)
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.one is not None:
        print(json.dumps(measure_one(args, Variant(*args.one.split(":")))))
        return
    plan = [NAIVE, *(Variant("packed", scope) for scope in args.scopes)]
    meta = setting.machine_meta(args, "num_tokens", "num_points", "num_candidates")
    meta["settings"] = setting.settings_of(args, "json", "one")
    samples: dict[Variant, list[dict]] = {variant: [] for variant in plan}
    with tqdm(total=args.turns * len(plan), unit="run") as bar:
        for _ in range(args.turns):
            for variant in plan:
                bar.set_description(variant.label)
                try:
                    samples[variant].append(measure_alone(argv, variant))
                except RuntimeError as error:
                    sys.exit(f"train.py: {error}")
                bar.update()
            rows = [make_row(variant, samples[variant], samples[NAIVE], args.dtype) for variant in plan]
            setting.write_figures(args, meta, rows)
    setting.show(format_table(rows, meta), args)


if __name__ == "__main__":
    main()
