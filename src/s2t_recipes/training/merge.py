"""Merges a LoRA adapter into its model, so that a selector can be trained on top of the tuned model.

python recipes/merge.py --model M --adapter runs/sft --output_dir runs/sft-merged

The tokenizer, with its chat template, is the adapter's where its folder has one, else the model's.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from s2t_recipes.adapters import check_model, check_tuned, find_file, merge_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into its model.")
    parser.add_argument("--model", required=True, help="Hub id or folder of the model that the adapter was trained on")
    parser.add_argument("--adapter", required=True, help="Hub id or folder of the adapter")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the merged model")
    parser.add_argument("--dtype", default="auto", help="weights' type (default: the checkpoint's own)")
    args = parser.parse_args()
    if (args.output_dir / "config.json").is_file():
        raise ValueError(f"`output_dir`: {str(args.output_dir)!r} holds a model already.")
    if args.output_dir.exists() and (args.output_dir.is_file() or any(args.output_dir.iterdir())):
        raise ValueError(f"`output_dir` must be a new or empty folder, got {str(args.output_dir)!r}.")
    check_model("model", args.model)
    check_tuned(
        "adapter", args.adapter, "LocalSelector.from_pretrained(adapter, model).merge() merges one that may be merged"
    )
    has_tokenizer = find_file(args.adapter, "tokenizer_config.json") is not None
    tokenizer = AutoTokenizer.from_pretrained(args.adapter if has_tokenizer else args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    merged = merge_adapter(model, args.adapter)
    temporary = args.output_dir.with_name(f".{args.output_dir.name}.{os.getpid()}.tmp")
    merged.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.replace(args.output_dir)
    print(f"{args.output_dir}: {args.model} with {args.adapter} merged")
