"""Merges a LoRA adapter into its model, so that a selector can be trained on top of the tuned model.

    s2t merge --model M --adapter runs/sft --output_dir runs/sft-merged

The tokenizer, with its chat template, is the adapter's where its folder has one, else the model's.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from s2t_recipes.adapters import check_model, check_tuned, find_file, merge_adapter
from s2t_recipes.options import SmallParser
from transformers_s2t.files import give_plain_mode


def check_new(output_dir: Path) -> None:
    """Raises a ValueError where a folder holds something already."""
    if (output_dir / "config.json").is_file():
        raise ValueError(f"`output_dir`: {str(output_dir)!r} holds a model already.")
    if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` must be a new or empty folder, got {str(output_dir)!r}.")


def load_tokenizer(adapter: str, model: str) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer, or else the model's."""
    has_tokenizer = find_file(adapter, "tokenizer_config.json") is not None
    return AutoTokenizer.from_pretrained(adapter if has_tokenizer else model)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Writes both into a new folder, which is not there before it is whole."""
    temporary = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    give_plain_mode(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.replace(output_dir)


def main() -> None:
    parser = SmallParser("What is merged, and where it goes")
    parser.add_argument("--model", required=True, help="Model that the adapter was trained on: a Hub id or a folder.")
    parser.add_argument("--adapter", required=True, help="Adapter: a Hub id or a folder.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for the merged model, new or empty.")
    parser.add_argument("--dtype", default="auto", help="Type of the weights; auto: the checkpoint's own.")
    args = parser.parse_args()
    check_new(args.output_dir)
    check_model("model", args.model)
    check_tuned(
        "adapter", args.adapter, "LocalSelector.from_pretrained(adapter, model).merge() merges one that may be merged"
    )
    tokenizer = load_tokenizer(args.adapter, args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    save_checkpoint(merge_adapter(model, args.adapter), tokenizer, args.output_dir)
    print(f"{args.output_dir}: {args.model} with {args.adapter} merged")
