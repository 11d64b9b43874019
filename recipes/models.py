"""Loads models, tokenizers and configs in the recipes; knows nothing of selectors or problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def load_model(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal language model for inference, with a clean generation config: nothing of the checkpoint's is inherited
    (no repetition penalty, no sampling) but its end-of-sequence tokens."""
    dtype = "float32" if dtype == "auto" and device.type == "cpu" else dtype
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    own = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id)
    return model


def default_device() -> torch.device:
    """The accelerator where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pretrained(argument: str, name: str, auto_class: type) -> Any:
    """`auto_class.from_pretrained(name)` of a tokenizer or config, or one line that names the argument."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"`{argument}`: there is no folder {name!r}.")
    try:
        return auto_class.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`{argument}` must be a Hub id or a local folder of a model, got {name!r}: {reason}"
        ) from None
