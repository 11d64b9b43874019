"""Agreement with the teacher after training with other settings: one change at a time around a recipe.

    python benchmarks/objective.py --recipe benchmarks/objective-embedded.yaml --labels runs/objective \\
        --num_train 60 --num_held_out 300 --json runs/benchmarks/objective-embedded.json

Prints a Markdown table with a line for each variant: Agree@1 at held-out points of the selector alone and fused with
log p, mean over seeds and [lowest, highest], the gain over the recipe at equal seeds, and seconds of a training.

The labels are divided by problem: the texts of the first `--num_train` train, those of the next `--num_fusion` fit the
fusion, those of the next `--num_held_out` are measured. Every variant is measured at the same points, with 8
candidates above the same floor, whatever it was trained with. Finished trainings are kept in the JSON and are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import setting
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from transformers_s2t import FusionWeights, LocalSelector, S2TConfig, S2TTrainer
from transformers_s2t.calibration.scored_points import fit_fusion_to_points, score_labels
from transformers_s2t.decoding import local_selector
from transformers_s2t.labels.folder import read_labels
from transformers_s2t.scoring import reserved_rows
from transformers_s2t.training import s2t_trainer


#: Name -> what differs from the recipe. `lora_r` goes to the adapter, READ_OUT to [`read_out`], the rest to S2TConfig.
VARIANTS: dict[str, dict] = {
    "recipe": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 0.03": {"temperature": 0.03},
    "+ 0.1 KL to the teacher": {"distribution_kl_weight": 0.1},
    "KL to the teacher alone": {"cross_entropy_weight": 0.0, "distribution_kl_weight": 1.0},
    "+ hinge, margin 1": {"hinge_weight": 1.0},
    "+ hinge, margin 0.2": {"hinge_weight": 1.0, "hinge_margin": 0.2},
    "log p in the loss": {"logprob_weight": 1.0},
    "linear read-out": {"score_head": "linear"},
    "two heads of 8 tokens": {"num_heads": 2},
    "read-out one layer below": {"layers_below": 1},
    "read-out two layers below": {"layers_below": 2},
    "linear read-out, temperature 1": {"score_head": "linear", "temperature": 1.0},
    "K = 16": {"num_candidates": 16},
    "no floor": {"min_prob_ratio": 0.0},
    "r = 64": {"lora_r": 64},
    "learning rate / 4": {"learning_rate": 0.25},
    "learning rate x 2.5": {"learning_rate": 2.5},
    "sequence scope, beta 1": {"adapter_scope": "sequence"},
    "sequence scope, beta 0.1": {"adapter_scope": "sequence", "prefix_kl_weight": 0.1},
    "paper's objective": {
        "adapter_scope": "sequence",
        "num_candidates": 16,
        "min_prob_ratio": 0.0,
        "distribution_kl_weight": 0.1,
        "hinge_weight": 1.0,
    },
}
READ_OUT = ("num_heads", "layers_below")
QUIET = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
QUIET |= {"disable_tqdm": True}
#: Settings of a recipe that are arguments of recipes/train.py.
SCRIPT_KEYS = ("model", "dtype", "attn_implementation", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def scores_of_heads(num_heads: int) -> Callable[..., torch.Tensor]:
    """Mean over heads of the paper's score, each head with an equal share of the reserved tokens."""

    def candidate_scores(bin_logits_R: torch.Tensor, score_head: str = "bins") -> torch.Tensor:
        parts = bin_logits_R.chunk(num_heads, dim=-1)
        return sum(reserved_rows.candidate_scores(part, score_head) for part in parts) / num_heads

    return candidate_scores


@contextmanager
def read_out(num_heads: int = 1, layers_below: int = 0) -> Iterator[Callable[[PreTrainedModel], None]]:
    """Reads scores in a way that the library does not offer, for trainings with adapter_scope="candidate" alone.

    Args:
        num_heads: reserved tokens are divided into so many heads.
        layers_below: the last hidden state is that of so many layers below the last, behind the final norm.

    Yields:
        a function to be called with every model that trains or scores.

    Raises:
        ValueError: where that function gets a model that has no such layer.
    """
    handles = []

    def prepare(model: PreTrainedModel) -> None:
        if not layers_below:
            return
        decoder, kept = model.get_decoder(), {}
        if not 0 < layers_below < len(decoder.layers):
            raise ValueError(
                f"`layers_below` must be below the model's {len(decoder.layers)} layers, got {layers_below}."
            )
        layer = decoder.layers[len(decoder.layers) - 1 - layers_below]

        def keep(module, inputs, output):
            kept["hidden"] = output[0] if isinstance(output, tuple) else output

        def replace(module, inputs, output):
            output.last_hidden_state = decoder.norm(kept.pop("hidden"))
            return output

        handles.extend((layer.register_forward_hook(keep), decoder.register_forward_hook(replace)))

    with ExitStack() as stack:
        if num_heads > 1:
            for module in (s2t_trainer, local_selector):
                stack.enter_context(mock.patch.object(module, "candidate_scores", scores_of_heads(num_heads)))
        try:
            yield prepare
        finally:
            for handle in handles:
                handle.remove()


def train_one(args: argparse.Namespace, recipe: dict, variant: str, seed: int) -> dict:
    """Figures of one training: Agree@1 bare and fused, the controls, seconds."""
    script = {key: value for key, value in recipe.items() if key in SCRIPT_KEYS}
    settings = {key: value for key, value in recipe.items() if key not in SCRIPT_KEYS} | QUIET
    changes = dict(VARIANTS[variant])
    if "learning_rate" in changes:  # a factor
        changes["learning_rate"] *= settings["learning_rate"]
    lora_r = changes.pop("lora_r", script.get("lora_r", 16))
    read = {key: changes.pop(key) for key in READ_OUT if key in changes}
    labels, header = read_labels(args.labels)
    train, fit, held_out = divide(labels, args)
    adapter = LoraConfig(
        r=lora_r,
        lora_alpha=2 * lora_r,
        lora_dropout=script.get("lora_dropout", 0.05),
        target_modules="all-linear",
    )
    measured = {"num_candidates": 8, "min_prob_ratio": args.min_prob_ratio}
    with tempfile.TemporaryDirectory() as folder, read_out(**read) as prepare:
        own = {"output_dir": folder, "seed": seed, "use_cpu": args.device == "cpu"}
        config = S2TConfig(**settings | changes | own)
        model = setting.load_checkpoint(args, args.model or script["model"])
        prepare(model)
        trainer = S2TTrainer(model, config, train, peft_config=adapter, label_header=header)
        with setting.Clock() as clock:
            trainer.train()
        trainer.save_model(folder)
        base = setting.load_checkpoint(args, args.model or script["model"])
        prepare(base)
        selector = LocalSelector.from_pretrained(folder, base)
        fusion = fit_fusion_to_points(score_labels(selector, fit, **measured))
        points = score_labels(selector, held_out, **measured).with_choice()
    return {
        "variant": variant,
        "seed": seed,
        "agree_at_1": points.agreement(FusionWeights()),
        "fused_agree_at_1": points.agreement(fusion),
        "student_first": float((points.target_N == 0).float().mean()),
        "second_candidate": float((points.target_N == 1).float().mean()),
        "points": len(points.target_N),
        "seconds": round(clock.wall, 1),
    }


def divide(labels: Dataset, args: argparse.Namespace) -> list[Dataset]:
    """Trajectories to train on, to fit the fusion on and to measure: no problem has texts in two of them.

    Raises:
        ValueError: where there are fewer problems than asked for.
    """
    sizes = (args.num_train, args.num_fusion, args.num_held_out)
    problems = list(dict.fromkeys(labels["problem_id"]))
    if sum(sizes) > len(problems):
        raise ValueError(
            f"--num_train + --num_fusion + --num_held_out must be at most {len(problems)}, the problems in "
            f"{args.labels!r}, got {sum(sizes)}."
        )
    part_of = dict(zip(problems, (part for part, size in enumerate(sizes) for _ in range(size))))
    parts = [part_of.get(problem) for problem in labels["problem_id"]]
    return [labels.select([row for row, part in enumerate(parts) if part == wanted]) for wanted in range(len(sizes))]


def summarise(rows: list[dict]) -> list[dict]:
    """One line per variant: means over its seeds, and of the difference from the recipe at equal seeds."""
    recipe = {row["seed"]: row for row in rows if row["variant"] == "recipe"}
    lines = []
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        if not own:
            continue
        line = {"variant": variant, "seeds": len(own)}
        for key in ("agree_at_1", "fused_agree_at_1"):
            values = [100 * row[key] for row in own]
            line[key], line[f"{key}_range"] = statistics.mean(values), [min(values), max(values)]
            gains = [100 * (row[key] - recipe[row["seed"]][key]) for row in own if row["seed"] in recipe]
            line[f"{key}_gain"] = statistics.mean(gains) if gains else None
        lines.append(line | {"seconds": statistics.median(row["seconds"] for row in own)})
    return lines


def format_table(lines: list[dict], rows: list[dict]) -> str:
    """The table in Markdown."""
    cells = []
    for line in lines:
        own = [line["variant"]]
        for key in ("agree_at_1", "fused_agree_at_1"):
            low, high = line[f"{key}_range"]
            own.append(f"{line[key]:.1f} [{low:.1f}, {high:.1f}]")
        gain = line["fused_agree_at_1_gain"]
        own.append("" if gain is None or line["variant"] == "recipe" else f"{gain:+.1f}")
        cells.append([*own, f"{line['seconds']:.0f}"])
    table = setting.markdown(["variant", "Agree@1", "fused", "gain, fused", "seconds"], cells)
    first, num_seeds = rows[0], max(line["seeds"] for line in lines)
    note = (
        f"{first['points']} held-out points with a choice, {num_seeds} seeds, [lowest, highest]; the student's own "
        f"first {100 * first['student_first']:.1f}, the second candidate {100 * first['second_candidate']:.1f}."
    )
    return "\n".join([*table, "", note])


def draw(lines: list[dict], rows: list[dict], file: Path) -> None:
    """A dot for each seed, a tick for the mean, a line where the recipe stands."""
    from matplotlib.figure import Figure

    from s2t_recipes.report.canvas import save_png

    order = [line["variant"] for line in lines][::-1]
    figure = Figure(figsize=(7.5, 0.32 * len(order) + 1.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    for key, colour, label, shift in (
        ("agree_at_1", "#9a9a9a", "selector alone", -0.14),
        ("fused_agree_at_1", "#1f5fa8", "fused with log p", 0.14),
    ):
        recipe = next(line for line in lines if line["variant"] == "recipe")[key]
        axis.axvline(recipe, color=colour, linewidth=0.8, linestyle=":")
        for y, variant in enumerate(order):
            values = [100 * row[key] for row in rows if row["variant"] == variant]
            axis.plot(values, [y + shift] * len(values), "o", color=colour, markersize=3.5, alpha=0.6)
            axis.plot(statistics.mean(values), y + shift, "|", color=colour, markersize=10, markeredgewidth=2)
        axis.plot([], [], "o", color=colour, markersize=4, label=label)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("Agree@1 with the teacher at held-out points, %")
    axis.grid(axis="x", linewidth=0.4, alpha=0.5)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    save_png(figure, file)


def make_parser() -> setting.Parser:
    parser = setting.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="training recipe in YAML that variants depart from")
    add("--labels", required=True, help="folder written by recipes/label.py")
    add("--model", help="base model [the recipe's]")
    add("--num_train", type=int, default=200, help="problems to train on [%(default)s]")
    add("--num_fusion", type=int, default=100, help="problems to fit the fusion weights on [%(default)s]")
    add("--num_held_out", type=int, default=200, help="problems to measure [%(default)s]")
    add("--min_prob_ratio", type=float, default=0.05, help="candidate floor of the measure [%(default)s]")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="[all]")
    add("--seeds", type=int, default=3, help="trainings of each variant [%(default)s]")
    add("--device")
    add("--json", required=True, help="figures, written after every training")
    add("--picture", type=setting.new_picture, metavar="FILE", help="PNG to draw")
    parser.set_defaults(dtype="float32")
    return parser


def read_finished(file: Path, meta: dict) -> list[dict]:
    """Rows of trainings that are in the file already.

    Raises:
        ValueError: where they are of other settings.
    """
    if not file.is_file():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["meta"] != meta:
        raise ValueError(f"--json {file} holds figures of other settings: {stored['meta']}.")
    return stored["rows"]


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    divide(read_labels(args.labels)[0], args)  # too few are found before anything is trained
    settings = ("num_train", "num_fusion", "num_held_out", "min_prob_ratio", "device")
    meta = {name: getattr(args, name) for name in settings}
    # names, not places: figures travel
    meta |= {"recipe": "/".join(args.recipe.parts[-2:]), "model": Path(args.model or recipe["model"]).name}
    meta |= {"labels": Path(args.labels).name}
    rows = read_finished(args.json, meta)
    done = {(row["variant"], row["seed"]) for row in rows}
    plan = [(variant, seed) for seed in range(args.seeds) for variant in dict.fromkeys(["recipe", *args.variants])]
    with tqdm([each for each in plan if each not in done], unit="training") as bar:
        for variant, seed in bar:
            bar.set_description(f"{variant}, seed {seed}")
            rows.append(train_one(args, recipe, variant, seed))
            setting.write_figures(args, meta, rows)
    lines = summarise(rows)
    print(f"\n{format_table(lines, rows)}")
    if args.picture is not None:
        draw(lines, rows, args.picture)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"objective.py: {error}", file=sys.stderr)
        sys.exit(2)
