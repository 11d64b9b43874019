"""Trains an S2T-Local selector on labelled trajectories.

    accelerate launch recipes/train.py --config recipes/embedded/train.yaml
    python recipes/train.py --model Qwen/Qwen2.5-1.5B-Instruct --labels labels/math \
        --output_dir qwen2.5-1.5b-s2t-local

Every field of S2TConfig (and so of transformers.TrainingArguments) is a command-line option and a YAML key.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from s2t_recipes.models import check_quantization, make_quantization_config
from transformers_s2t import S2TConfig, S2TTrainer
from transformers_s2t.labels.folder import label_splits


@dataclass
class ScriptArguments:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "Name or path of the small model."})
    labels: str = field(metadata={"help": "Folder written by recipes/label.py, or a Hub data set."})
    eval_labels: str | None = field(
        default=None,
        metadata={
            "help": "Held-out labels, for Agree@1 during training; the split 'validation' of `labels` by default, "
            "where there is one."
        },
    )
    dtype: str = field(default="auto", metadata={"help": "Weights' type: 'auto', 'float32', 'bfloat16'."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "'sdpa' or 'eager'."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter (the paper's 74.3 M of 1.5 B fit 64)."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in the adapter."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "'all-linear', or module names with commas between."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base model to 4 bits (QLoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base model to 8 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Quantization type of 4 bits: 'nf4' or 'fp4'."})
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantize the scales of the 4-bit weights too: 0.4 bits a weight less."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Train again although `output_dir` holds an adapter."})

    def __post_init__(self):
        check_quantization(self.load_in_4bit, self.load_in_8bit)
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"`bnb_4bit_quant_type` must be 'nf4' or 'fp4', got {self.bnb_4bit_quant_type!r}.")


def quantization_of(script_args: ScriptArguments, args: S2TConfig) -> BitsAndBytesConfig | None:
    """How the base model is quantized. Matrices are multiplied in the type of the weights."""
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return make_quantization_config(
        script_args.load_in_4bit,
        script_args.load_in_8bit,
        mixed if script_args.dtype == "auto" else script_args.dtype,
        script_args.bnb_4bit_quant_type,
        script_args.use_bnb_nested_quant,
    )


def prepare(argv: list[str] | None = None) -> tuple[ScriptArguments, S2TConfig, str | None, S2TTrainer] | None:
    """Everything before the first step, so that bad input is found here. `None` where there is nothing to do."""
    script_args, args = TrlParser((ScriptArguments, S2TConfig)).parse_args_and_config(argv)
    done = Path(args.output_dir, "trainer_state.json")  # the last file that is written
    if done.is_file() and not script_args.overwrite and args.resume_from_checkpoint is None:
        print(f"{args.output_dir} already holds a trained adapter; pass --overwrite true to train it again.")
        return None
    # a run that was stopped goes on from its last checkpoint
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    checkpoint = last if args.resume_from_checkpoint in (None, "true", "True") else args.resume_from_checkpoint
    if script_args.overwrite and args.resume_from_checkpoint is None:
        checkpoint = None
    targets = script_args.lora_target_modules
    peft_config = LoraConfig(
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        lora_dropout=script_args.lora_dropout,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
    )
    if script_args.eval_labels is None and "validation" in label_splits(script_args.labels):
        script_args.eval_labels = script_args.labels
    args.model_init_kwargs = {
        "dtype": script_args.dtype,
        "attn_implementation": script_args.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    trainer = S2TTrainer(
        model=script_args.model,
        args=args,
        train_dataset=script_args.labels,
        eval_dataset=script_args.eval_labels,
        peft_config=peft_config,
        quantization_config=quantization_of(script_args, args),
    )
    return script_args, args, checkpoint, trainer


def main(argv: list[str] | None = None) -> None:
    try:
        prepared = prepare(argv)
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    if prepared is None:
        return
    script_args, args, checkpoint, trainer = prepared
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    state = trainer.state
    evaluated = any("eval_agree_at_1" in log and log["step"] == state.global_step for log in state.log_history)
    if script_args.eval_labels is not None and not evaluated:
        trainer.log_metrics("eval", trainer.evaluate())
        trainer.save_model(args.output_dir)  # once more: the held-out figures are part of its card
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
