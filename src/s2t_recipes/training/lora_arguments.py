"""Options of a LoRA training: the adapter, and how the model under it is loaded. `train` and `imitate` share them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.hf_argparser import HfArg
from trl import ModelConfig, get_quantization_config

from s2t_recipes.models import check_bitsandbytes, check_quantization
from s2t_recipes.options import check_least
from transformers_s2t.config import check_choice


@dataclass
class LoraArguments(ModelConfig):
    """TRL's options of a model and its adapter, with defaults of ours; `trl.get_peft_config` reads them.

    An adapter is always trained (`use_peft`), and the model has its own option, `model`.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    dtype: str | None = HfArg(
        default="auto",
        help="Type of the weights: auto (the checkpoint's own), float32, bfloat16 or float16.",
        metadata={"choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = HfArg(
        default="sdpa", help="Attention, as from_pretrained knows it: 'sdpa', 'eager' ..."
    )
    lora_r: int = HfArg(default=16, help="Rank of the adapter (the paper's 74.3 M of 1.5 B fit 64).")
    lora_alpha: int = HfArg(default=32, help="Scale of the adapter is lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout in the adapter.")
    lora_target_modules: list[str] | None = HfArg(
        default_factory=lambda: ["all-linear"],
        help="'all-linear', or names of modules, with spaces or commas between.",
    )
    model_name_or_path: str | None = field(default=None, init=False)
    model_revision: str = field(default="main", init=False)
    use_peft: bool = field(default=True, init=False)
    lora_task_type: str = field(default="CAUSAL_LM", init=False)

    def __post_init__(self):
        check_quantization(self.load_in_4bit, self.load_in_8bit)
        for option in dataclasses.fields(self):
            legal, value = option.metadata.get("choices"), getattr(self, option.name)
            if legal is not None and value is not None:
                check_choice(option.name, value, legal)
        check_least(self, lora_r=1)
        super().__post_init__()
        targets = self.lora_target_modules
        if targets not in (None, "all-linear"):  # one name as text would be a pattern to PEFT
            text = targets if isinstance(targets, str) else ",".join(targets)
            self.lora_target_modules = [name.strip() for name in text.split(",")]


def without_pinned_memory(args: TrainingArguments) -> None:
    """Leaves out what speeds up copies to an accelerator where there is none: torch warns of it in every run."""
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False


def quantization_of(args: LoraArguments, training_args: TrainingArguments) -> BitsAndBytesConfig | None:
    """Quantization of the base model; `None` for none. Matrices are multiplied in `dtype`, for "auto" in the type of
    the training.

    Raises:
        ImportError: where bitsandbytes is needed and not installed.
    """
    check_bitsandbytes(args.load_in_4bit, args.load_in_8bit)
    mixed = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else None
    return get_quantization_config(dataclasses.replace(args, dtype=mixed if args.dtype == "auto" else args.dtype))
