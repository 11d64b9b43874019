"""What the benchmarks share: shapes of random models, what the machine is, and how bad flags are answered."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import NoReturn

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config


# vocabulary: that of `tiny` and `qwen2.5-0.5b` is cut, because a head of 151936 rows would hide the layers
SHAPES = {
    "tiny": (64, 192, 4, 2, 1, 1000),
    "tiny-wide": (128, 384, 4, 4, 2, 1000),  # teachers: twice as wide
    "small": (512, 1408, 8, 8, 2, 32000),
    "small-wide": (1024, 2816, 8, 16, 4, 32000),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 32768),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
}
SHAPE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE_FIELDS += ("num_key_value_heads", "vocab_size")

NUM_RESERVED = 16
FIRST_TOKEN = 3  # of texts: 0 is padding, 1 begins one, 2 ends one


def random_model(args: argparse.Namespace, num_positions: int, eos_token_id: int | None) -> PreTrainedModel:
    """A Qwen2 of `args.shape` with random weights, the same at every call."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **dict(zip(SHAPE_FIELDS, SHAPES[args.shape]))
        | {"vocab_size": args.vocab_size, "num_hidden_layers": args.num_layers},
        max_position_embeddings=num_positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=eos_token_id,
    )
    attention = getattr(args, "attn_implementation", "sdpa")
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype), attn_implementation=attention)
    return model.eval().to(args.device)


def fill_in_shape(args: argparse.Namespace) -> None:
    """Layers and vocabulary where no flag says otherwise."""
    if getattr(args, "model", None) is not None:
        config = AutoConfig.from_pretrained(args.model).get_text_config()
        args.num_layers, args.vocab_size = config.num_hidden_layers, config.vocab_size
        args.shape = Path(args.model).name
        return
    own = dict(zip(SHAPE_FIELDS, SHAPES[args.shape]))
    args.vocab_size = own["vocab_size"] if args.vocab_size is None else args.vocab_size
    args.num_layers = own["num_hidden_layers"] if args.num_layers is None else args.num_layers


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_meta(args: argparse.Namespace) -> dict:
    """What a figure depends on beside its own settings."""
    return {
        "shape": args.shape,
        "layers": args.num_layers,
        "vocab": args.vocab_size,
        "threads": torch.get_num_threads(),
        "device": device_name(args.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def check_file(flag: str, file: Path | None) -> None:
    """Raises a ValueError for a file that cannot be written."""
    if file is not None and (file.is_dir() or any(up.exists() and not up.is_dir() for up in file.parents)):
        raise ValueError(f"{flag} must name a file that can be written, got {str(file)!r}.")


def check_range(args: argparse.Namespace, least: dict[str, int], most: dict[str, int]) -> None:
    """Raises a ValueError for a flag, or one of a flag's values, outside of its bounds."""
    for name, low in least.items():
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < low:
                raise ValueError(f"--{name} must be at least {low}, got {one}.")
    for name, high in most.items():
        if getattr(args, name) > high:
            raise ValueError(f"--{name} must be at most {high}, got {getattr(args, name)}.")


def check_device(args: argparse.Namespace) -> None:
    """Raises a ValueError for a device that is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here.")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")
