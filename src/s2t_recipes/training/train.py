"""Trains an S2T-Local selector on labelled trajectories.

    s2t train --config recipes/embedded/train.yaml --labels labels/train --output_dir selector
    s2t train --num_processes 4 --model Qwen/Qwen2.5-1.5B-Instruct --labels labels/math \
        --output_dir qwen2.5-1.5b-s2t-local

Every field of S2TConfig (and so of transformers.TrainingArguments) is a command-line option and a YAML key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config

from s2t_recipes.commands import kept, one_line_errors, work
from s2t_recipes.options import Parser
from s2t_recipes.training.lora_arguments import LoraArguments, quantization_of, without_pinned_memory
from transformers_s2t import S2TConfig, S2TTrainer
from transformers_s2t.labels.folder import label_splits


@dataclass(kw_only=True)
class ScriptArguments(LoraArguments):
    """What is trained, and on what."""

    model: str = HfArg(help="Small model: a Hub id or a local folder.")
    labels: str = HfArg(help="Folder written by `s2t label`, or a Hub data set.")
    eval_labels: str | None = HfArg(
        default=None,
        help="Held-out labels, for Agree@1 during training (default: the split 'validation' of `labels`, where there "
        "is one).",
    )
    overwrite: bool = HfArg(default=False, help="Train again although `output_dir` holds an adapter.")


def find_checkpoint(script_args: ScriptArguments, args: S2TConfig) -> str | None:
    """The checkpoint that this command resumes from: the one that it names, or the last one of a stopped run."""
    if args.resume_from_checkpoint not in (None, "true", "True"):
        return args.resume_from_checkpoint
    if script_args.overwrite and args.resume_from_checkpoint is None:
        return None
    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None


def prepare(argv: list[str] | None = None) -> tuple[ScriptArguments, S2TConfig, str | None, S2TTrainer] | None:
    """Everything before the first step, so that bad input is found here. `None` where there is nothing to do."""
    script_args, args = Parser(ScriptArguments, S2TConfig).parse_args_and_config(argv)
    done = Path(args.output_dir, "trainer_state.json")  # the last file that is written
    if done.is_file() and not script_args.overwrite and args.resume_from_checkpoint is None:
        print(f"{args.output_dir} already holds a trained adapter; pass --overwrite true to train it again.")
        return None
    without_pinned_memory(args)
    checkpoint = find_checkpoint(script_args, args)
    if script_args.eval_labels is None and "validation" in label_splits(script_args.labels):
        script_args.eval_labels = script_args.labels
    own = {name: getattr(script_args, name) for name in ("dtype", "attn_implementation")}
    args.model_init_kwargs = own | (args.model_init_kwargs or {})
    with kept(lambda: checkpoint is not None):
        trainer = S2TTrainer(
            model=script_args.model,
            args=args,
            train_dataset=script_args.labels,
            eval_dataset=script_args.eval_labels,
            peft_config=get_peft_config(script_args),
            quantization_config=quantization_of(script_args, args),
        )
    return script_args, args, checkpoint, trainer


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    prepared = prepare(argv)
    if prepared is None:
        return
    script_args, args, checkpoint, trainer = prepared
    with kept(lambda: find_checkpoint(script_args, args) is not None):
        with work():
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
    if trainer.is_world_process_zero():
        print(f"\nwritten to {args.output_dir}. Calibrate next, on labels of other problems (s2t calibrate).")
