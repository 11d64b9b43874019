"""Loads models for inference in the recipes; knows nothing of selectors or problems."""

from __future__ import annotations

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
