"""Calibrates a trained selector on held-out training problems: trigger thresholds and fusion weights.

    python recipes/calibrate.py --adapter runs/demo/adapter-seed0 --labels runs/demo/labels/calibration

Writes both into the adapter's s2t_config.json, so that S2TDecodingConfig(trigger="margin", target_rate=0.1) just
works. Needs no teacher: the labels hold what is needed. Problems that the selector was trained on are refused. Never
calibrate on evaluation problems: the ids are noted in its seen_problems.json, and evaluate.py and agreement.py refuse
them.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from models import default_device, load_model
from trl import TrlParser

from transformers_s2t import FusionWeights, LocalSelector, SelectorConfig
from transformers_s2t.calibration import TARGET_RATES, calibrate_thresholds, fit_fusion, score_labels
from transformers_s2t.config import S2T_CONFIG_NAME
from transformers_s2t.seen_problems import check_unseen, write_seen_problems
from transformers_s2t.trajectories import read_held_out_labels


@dataclass
class CalibrateArguments:
    """What is calibrated, and on what."""

    adapter: str = field(metadata={"help": "Folder of the trained adapter; its s2t_config.json is rewritten."})
    labels: str = field(
        metadata={"help": "Labels of held-out training problems (recipes/label.py); their split 'validation', if any."}
    )
    model: str | None = field(default=None, metadata={"help": "Base model; taken from the adapter where not given."})
    target_rates: list[float] = field(
        default_factory=lambda: list(TARGET_RATES), metadata={"help": "Shares of generated tokens that trigger."}
    )
    warmup_tokens: int = field(default=3, metadata={"help": "First new tokens that never trigger."})
    batch_size: int = field(default=32, metadata={"help": "Trajectories per forward."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type, the one you deploy."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Hub repository (you/name) to which the calibrated adapter is pushed."}
    )


def main(argv: list[str] | None = None) -> None:
    (args,) = TrlParser(CalibrateArguments).parse_args_and_config(argv)
    if not Path(args.adapter).is_dir():
        raise ValueError(
            f"`adapter` must be a local folder, because its {S2T_CONFIG_NAME} is rewritten, got {args.adapter!r}; "
            "download an adapter of the Hub first (hf download)."
        )
    config = SelectorConfig.from_pretrained(args.adapter)
    if config.proposals == "adapted":
        raise ValueError(
            f"{args.adapter} writes text with the adapter on (proposals='adapted'), but labels hold the base model's "
            "trajectories and trigger values: its thresholds cannot be taken from them. Use trigger='always', or pass "
            "`threshold=` yourself."
        )
    labels, header = read_held_out_labels(args.labels)
    if header is not None and config.vocab_hash and header.vocab_hash != config.vocab_hash:
        raise ValueError(
            f"`labels` {args.labels!r} were made with another tokenizer ({header.vocab_hash}) than the adapter's "
            f"({config.vocab_hash}): label with {config.base_model!r}."
        )
    check_unseen(args.adapter, labels["problem_id"], ("training",), "labels")
    thresholds = calibrate_thresholds(labels, args.target_rates, args.warmup_tokens)
    model = load_model(args.model or config.base_model, args.dtype, default_device())
    selector = LocalSelector.from_pretrained(args.adapter, model)
    points = score_labels(selector, labels, args.batch_size).with_choice()
    fusion = fit_fusion(points)
    write_seen_problems(args.adapter, "calibration", labels["problem_id"])
    dataclasses.replace(config, thresholds=thresholds, fusion=fusion).save_pretrained(args.adapter)

    print(f"\n{len(points.target_N)} decision points of {len(labels)} trajectories")
    print(f"  fusion: selector {fusion.selector:.3f}, logprob {fusion.logprob:.3f}, switch {fusion.switch:.3f}")
    print(
        f"  Agree@1 at points with a choice: student first {float((points.target_N == 0).float().mean()):.3f}, ",
        end="",
    )
    print(f"selector {points.agreement(FusionWeights()):.3f}, fused {points.agreement(fusion):.3f}")
    print(f"\n{'target rate':>12} " + " ".join(f"{trigger:>10}" for trigger in thresholds))
    for rate in sorted(args.target_rates):
        print(f"{rate:>12.1%} " + " ".join(f"{by_rate[rate]:>10.4f}" for by_rate in thresholds.values()))
    print(f"\nwritten to {Path(args.adapter) / S2T_CONFIG_NAME}")
    if args.push_to_hub is not None:
        HfApi().create_repo(args.push_to_hub, exist_ok=True)
        HfApi().upload_folder(
            repo_id=args.push_to_hub, folder_path=args.adapter, ignore_patterns=["checkpoint-*", "training_args.bin"]
        )
        print(f"pushed to {args.push_to_hub}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"calibrate.py: {error}", file=sys.stderr)
        sys.exit(2)
