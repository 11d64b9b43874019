"""Adapters that a recipe writes beside: what can be wrong with them before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from transformers_s2t import SelectorConfig
from transformers_s2t.trajectories import TrajectoryHeader


#: What recipes/train_baseline.py notes of a finished training, beside the adapter.
BASELINE_NAME = "baseline.json"


def open_adapter(adapter: str) -> SelectorConfig:
    """The config of an adapter that the recipe writes beside.

    Raises:
        ValueError: where it is no local folder.
        FileNotFoundError: where that holds no adapter.
    """
    if not Path(adapter).is_dir():
        raise ValueError(
            f"`adapter` must be a local folder, because the recipe writes into it, got {adapter!r}; download an "
            "adapter of the Hub first (hf download)."
        )
    return SelectorConfig.from_pretrained(adapter)


def check_same_tokenizer(
    labels: str, header: TrajectoryHeader | None, config: SelectorConfig, argument: str = "labels"
) -> None:
    """Raises a ValueError where labels were made with another tokenizer than the adapter's, naming the `argument`."""
    if header is not None and config.vocab_hash and header.vocab_hash != config.vocab_hash:
        raise ValueError(
            f"`{argument}` {labels!r} were made with another tokenizer ({header.vocab_hash}) than the adapter's "
            f"({config.vocab_hash}): label with {config.base_model!r}."
        )
