"""Loads models, tokenizers and configs in the recipes; knows nothing of selectors or problems."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available, logging


DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal language model for inference, with a clean generation config: nothing of the checkpoint's is inherited
    (no repetition penalty, no sampling) but its end-of-sequence tokens."""
    dtype = "float32" if dtype == "auto" and device.type == "cpu" else dtype
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    own = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id)
    return model


def load_quietly() -> None:
    """Models are loaded without progress bars and warnings of PEFT, which would cut through a recipe's own bar."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    logging.disable_progress_bar()


def default_device() -> torch.device:
    """The accelerator where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Gives back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_quantization(load_in_4bit: bool, load_in_8bit: bool, prefix: str = "") -> None:
    """Raises a ValueError for both at once, naming the flags."""
    if load_in_4bit and load_in_8bit:
        raise ValueError(f"`{prefix}load_in_4bit` and `{prefix}load_in_8bit` must not both be true.")


def check_bitsandbytes(load_in_4bit: bool, load_in_8bit: bool, prefix: str = "") -> None:
    """Raises an ImportError, naming the flag, where weights are to be quantized and bitsandbytes is not installed."""
    if (load_in_4bit or load_in_8bit) and not is_bitsandbytes_available():
        flag = f"{prefix}load_in_{4 if load_in_4bit else 8}bit"
        raise ImportError(f"`{flag}` needs bitsandbytes, which is not installed: pip install -U bitsandbytes")


def make_quantization_config(
    load_in_4bit: bool, load_in_8bit: bool, compute_dtype: str, prefix: str = ""
) -> BitsAndBytesConfig | None:
    """How weights are quantized as they are loaded, to 4 bits (nf4) or 8; `None` for not at all.

    Args:
        compute_dtype: type in which matrices of 4-bit weights are multiplied.
        prefix: beginning of the flags, for errors.

    Raises:
        ImportError: where bitsandbytes is not installed.
    """
    check_bitsandbytes(load_in_4bit, load_in_8bit, prefix)
    if load_in_4bit:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_type="nf4")
    return BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else None


def padding_token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """What fills up short rows: the padding token, or else the end of a sequence.

    Raises:
        ValueError: naming the model, where its tokenizer has neither.
    """
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_token_id is None:
        raise ValueError(f"`model`: the tokenizer of {name!r} has neither a padding nor an end-of-sequence token.")
    return pad_token_id


def load_pretrained(argument: str, name: str, auto_class: type) -> Any:
    """`auto_class.from_pretrained(name)` of a tokenizer or config, or one line that names the argument."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"`{argument}`: there is no folder {name!r}.")
    try:
        return auto_class.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        legal = "a Hub id or a local folder of a model"
        raise ValueError(f"`{argument}` must be {legal}, got {name!r}: {reason}") from None
