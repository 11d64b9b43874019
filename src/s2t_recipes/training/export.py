"""Turns a selector of the paper's form (proposals="adapted") into a plain checkpoint that any program can run.

    s2t export --adapter selector --output_dir checkpoint

The checkpoint writes what the adapted model writes, token for token, without selecting: whoever selects needs the
adapter and LocalSelector. The reserved rows are merged into the head, so that their logits are the scores of a
candidate that stands last; its generation config suppresses these tokens.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from s2t_recipes.adapters import base_model_of, check_model, check_trained_on, merge_adapter
from s2t_recipes.options import SmallParser
from s2t_recipes.training.merge import check_new, load_tokenizer, save_checkpoint
from transformers_s2t import SelectorConfig
from transformers_s2t.reserved_tokens import resize_for_reserved_tokens
from transformers_s2t.selector_files import find_adapter


def check_exportable(adapter: str, config: SelectorConfig) -> None:
    """Raises a ValueError where merged weights would write another text than the selector's model does."""
    if config.proposals != "adapted":
        raise ValueError(
            f"`adapter` must have proposals='adapted', got {config.proposals!r} in {adapter!r}: the base model writes "
            "its text, and the adapter only scores candidates, so with the adapter merged another text is written. "
            "Publish the folder as it is (s2t calibrate --push_to_hub you/name), and load it with "
            "LocalSelector.from_pretrained(adapter, model)."
        )


def main() -> None:
    parser = SmallParser("What is exported, and where it goes")
    parser.add_argument("--adapter", required=True, help="Selector: a Hub id or a folder.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for the checkpoint, new or empty.")
    parser.add_argument("--model", help="Base model: a Hub id or a folder (default: the one that the adapter names).")
    parser.add_argument("--dtype", default="auto", help="Type of the weights; auto: the base model's own.")
    args = parser.parse_args()
    check_new(args.output_dir)
    config = SelectorConfig.from_pretrained(args.adapter)
    check_exportable(args.adapter, config)
    name = base_model_of(args.adapter, config, args.model)
    check_model("model", name)
    tokenizer = load_tokenizer(args.adapter, name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype)
    check_trained_on(model, config)
    resize_for_reserved_tokens(model, max(config.reserved_token_ids) + 1)
    merged = merge_adapter(model, str(find_adapter(args.adapter).folder))
    suppressed = {*(merged.generation_config.suppress_tokens or ()), *config.reserved_token_ids}
    merged.generation_config.suppress_tokens = sorted(suppressed)
    save_checkpoint(merged, tokenizer, args.output_dir)
    print(f"{args.output_dir}: {name} with {args.adapter} merged: the adapted model, without selecting")
