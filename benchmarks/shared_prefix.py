"""Time that it saves to read once what all prompts of a batch begin with: a system prompt, few-shot examples.

    python benchmarks/shared_prefix.py --json benchmarks/results/shared_prefix.json
    python benchmarks/shared_prefix.py --quick                 # half a minute on two cores
    python benchmarks/shared_prefix.py --model MODELS/qwen2.5-coder-0.5b --shared 20 245

Prints a line for each part and each number of shared tokens: how many times as fast sharing is, the median over turns
and [lowest, highest turn]. Texts must be equal with sharing and without it, and scores within 1e-2.

    rollout    `labeling.rollout`, `--new_tokens` of each row
    scoring    `labeling.score_trajectories` of these texts by the model and, in the teacher's place, itself
    training   the forward and backward of 8 of these texts in `scoring.packed_hidden`, 8 points of 4 candidates each
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import setting
import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm

from transformers_s2t.labeling.points import score_trajectories
from transformers_s2t.labeling.rollout import rollout
from transformers_s2t.models import shared_prefix
from transformers_s2t.models.views import ModelViews, switch_adapter
from transformers_s2t.scoring.packing import PackedPoints, packed_hidden


QUICK = {"num_layers": 4, "vocab_size": 4096, "batch_size": 8, "shared": [64], "own": 16, "new_tokens": 8, "turns": 1}
TRAINED_ROWS, POINTS, CANDIDATES = 8, 8, 4
PARTS = ("rollout", "scoring", "training")


@contextmanager
def sharing(is_on: bool) -> Iterator[None]:
    with mock.patch.object(shared_prefix, "MIN_SHARED", shared_prefix.MIN_SHARED if is_on else 1 << 60):
        yield


class Bench:
    """One model, with an adapter for the training step, and one batch of prompts."""

    def __init__(self, args: argparse.Namespace, shared: int):
        self.args = args
        num_positions = max(args.shared) + 2 * args.own + args.new_tokens + 2
        self.model = setting.make_model(args, num_positions)
        torch.manual_seed(0)
        get_peft_model(self.model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
        switch_adapter(self.model, "default", False)  # text is the base model's
        generator = torch.Generator().manual_seed(1)
        draw = partial(setting.random_tokens, self.model.config.vocab_size, generator=generator)
        begin = draw(shared).tolist()
        # lengths differ, as those of real problems do
        self.prompts = [begin + draw(args.own // 2 + n % args.own + 1).tolist() for n in range(args.batch_size)]
        self.candidates_BNK = draw(TRAINED_ROWS, POINTS, CANDIDATES)
        self.texts: list[list[int]] = []

    def warm_up(self) -> None:
        """A few tokens nobody times: the first call pays for what the process sets up once."""
        rollout(self.model, self.prompts[:2], 2, pad_token_id=0)

    def rollout(self) -> list[list[int]]:
        new = rollout(self.model, self.prompts, self.args.new_tokens, pad_token_id=0)
        self.texts = [prompt + ids for prompt, ids in zip(self.prompts, new)]
        return new

    def scoring(self) -> torch.Tensor:
        found = score_trajectories(self.model, self.model, self.texts, list(map(len, self.prompts)), 8)
        return torch.cat([scores.student_logprobs_SK.flatten() for scores in found])

    def training(self) -> torch.Tensor:
        rows = self.texts[:TRAINED_ROWS]
        width = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask_BT = torch.arange(width) < torch.tensor(list(map(len, rows)))[:, None]
        steps_N = torch.linspace(-self.args.new_tokens, -1, POINTS).long()
        positions_BN = torch.tensor(list(map(len, rows)))[:, None] + steps_N
        candidates_BNK = self.candidates_BNK[: len(rows)]
        points = PackedPoints(positions_BN, candidates_BNK, torch.ones_like(candidates_BNK, dtype=torch.bool))
        hidden_BMD, _ = packed_hidden(ModelViews(self.model, "default"), ids_BT, mask_BT, points, "candidate")
        hidden_BMD.square().mean().backward()
        return hidden_BMD.detach().flatten()


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds of a call, and what it returned."""
    with setting.Clock() as clock:
        result = function()
    return clock.wall, result


def compare(part: str, one: object, other: object) -> None:
    """Raises a RuntimeError where sharing changed what came out."""
    if part == "rollout":
        if one != other:
            raise RuntimeError("Texts differ with sharing and without: a tie, or a mistake.")
    elif (difference := float((one - other).abs().max())) > 1e-2:
        raise RuntimeError(f"{part}: numbers differ by {difference:g} with sharing and without.")


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    with tqdm(total=len(args.shared) * args.turns * len(PARTS), unit="comparison") as bar:
        for shared in args.shared:
            ratios, seconds = {part: [] for part in PARTS}, {}
            for _ in range(args.turns):
                bench = Bench(args, shared)
                bench.warm_up()
                for part in PARTS:
                    found = {}
                    for is_on in (True, False):
                        with sharing(is_on):
                            found[is_on] = timed(getattr(bench, part))
                    compare(part, found[True][1], found[False][1])
                    ratios[part].append(found[False][0] / found[True][0])
                    seconds[part] = found[True][0]
                    bar.update()
            rows += [
                {
                    "part": part,
                    "shared": shared,
                    "ratio": setting.median(ratios[part], 3),
                    "ratio_range": setting.edges(ratios[part], 3),
                    "seconds": round(seconds[part], 3),
                }
                for part in PARTS
            ]
    return rows


def format_table(rows: list[dict]) -> str:
    lines = ["| | shared tokens | times faster [lowest, highest turn] |", "|---|---:|---:|"]
    for row in rows:
        low, high = row["ratio_range"]
        lines.append(f"| {row['part']} | {row['shared']} | {row['ratio']:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines)


def make_parser() -> setting.Parser:
    parser = setting.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--quick", help="a preset of half a minute; flags given beside it win")
    add("--model")
    add("--shape", default="qwen2.5-0.5b")
    add("--num_layers")
    add("--vocab_size")
    add("--batch_size", least=TRAINED_ROWS, default=32, help="rows [%(default)s]")
    add("--shared", least=shared_prefix.MIN_SHARED, nargs="+", default=[32, 256], help="common tokens %(default)s")
    add("--own", least=1, default=40, help="further tokens of a prompt, on average [%(default)s]")
    add("--new_tokens", least=POINTS, default=24, help="tokens to write [%(default)s]")
    add("--turns", default=3)
    add("--threads")
    add("--json")
    parser.set_defaults(device="cpu", dtype="float32")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().read(argv, QUICK)
    setting.fill_in_shape(args)
    rows = measure(args)
    meta = setting.machine_meta(args, "batch_size", "own", "new_tokens", "turns")
    setting.write_figures(args, meta, rows)
    setting.show(format_table(rows), args)


if __name__ == "__main__":
    main()
