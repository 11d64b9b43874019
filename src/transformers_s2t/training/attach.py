"""Adds the adapter, and the trained rows of the reserved tokens, to a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as hf_deepspeed

from transformers_s2t.models.peft_warnings import without_peft_warnings
from transformers_s2t.reserved_tokens import find_reserved_token_ids, resize_for_reserved_tokens
from transformers_s2t.training.s2t_config import S2TConfig


@contextmanager
def whole_weights() -> Iterator[None]:
    """A context in which models are loaded whole, also under ZeRO-3, which would shard every weight as it is read.

    Before training, rows of the head are counted and copied, and weights are compared with those of the labels' model.
    DeepSpeed shards the weights when training starts.
    """
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    args: S2TConfig,
    processing_class: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
) -> tuple[PeftModel, tuple[int, ...]]:
    """The model with LoRA and trainable reserved rows, and the reserved ids."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    if not head.weight.is_floating_point() or head.weight.shape[-1] == 1:  # 4-bit weights are one column of any type
        raise ValueError(
            "`model` has a quantized head, whose reserved rows cannot be trained: name it in `llm_int8_skip_modules` "
            "of the quantization config."
        )
    text = set(processing_class.get_vocab().values()) - set(processing_class.added_tokens_decoder)
    ordinary = sorted(text.intersection(args.reserved_token_ids or ()))
    if ordinary:
        raise ValueError(
            f"`reserved_token_ids` must be reserved tokens or rows above the tokenizer, got ordinary text: "
            f"{processing_class.convert_ids_to_tokens(ordinary)}."
        )
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("`peft_config` must be None where `model` is a PeftModel already.")
        indices = model.peft_config[model.active_adapter].trainable_token_indices
        ids = None
        if isinstance(indices, dict):  # under the head's own name, or that of an embedding tied to it
            ids = indices.get(_head_name(base), next(iter(indices.values()), None))
        if not ids:
            raise ValueError(
                "`model` is a PeftModel that trains no reserved rows; give its LoraConfig "
                "`trainable_token_indices={'lm_head': reserved_token_ids}` or pass the base model and `peft_config`."
            )
        if not set(args.reserved_token_ids or ids) <= set(ids):
            raise ValueError(f"`reserved_token_ids` must be among those that `model` trains, {list(ids)}.")
        _check_lora(model.peft_config[model.active_adapter], "model", _head_name(base))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "`model` is a PeftModel without a trainable weight: load it with `PeftModel.from_pretrained(..., "
                "is_trainable=True)`."
            )
        return model, tuple(args.reserved_token_ids or ids)
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            "`model` must be a base model or a PeftModel, got one that holds adapters already, as from_pretrained "
            "returns it for the folder of an adapter: they would write the text."
        )
    ids = args.reserved_token_ids
    if ids is None:
        try:
            ids = find_reserved_token_ids(processing_class, head.weight.shape[0])
        except ValueError:
            if not args.add_reserved_tokens:
                raise
            start = max(head.weight.shape[0], len(processing_class))
            ids = list(range(start, start + 16))
    if max(ids) >= head.weight.shape[0]:
        if not args.add_reserved_tokens:
            raise ValueError(
                f"`reserved_token_ids` must be below {head.weight.shape[0]}, the rows of the head, got {max(ids)}; "
                "pass `add_reserved_tokens=True` to resize the embeddings."
            )
        resize_for_reserved_tokens(base, max(ids) + 1)
        head = base.get_output_embeddings()
    head_name = _head_name(base)
    if peft_config is None:
        peft_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"`peft_config` must be a LoraConfig, got {type(peft_config)}.")
    _check_lora(peft_config, "peft_config", head_name)
    if peft_config.trainable_token_indices not in (None, {head_name: list(ids)}):
        raise ValueError(
            f"`trainable_token_indices` of `peft_config` must be None, or the reserved rows of the head alone, which "
            f"S2TTrainer sets, got {peft_config.trainable_token_indices!r}: choose them by `reserved_token_ids`."
        )
    peft_config = copy.deepcopy(peft_config)
    peft_config.inference_mode = False  # true in every config that was saved
    peft_config.task_type = "CAUSAL_LM"
    peft_config.trainable_token_indices = {head_name: list(ids)}
    with without_peft_warnings():
        return get_peft_model(base, peft_config), tuple(ids)


def _head_name(model: PreTrainedModel) -> str:
    """What PEFT calls the head: the last part of its name."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head).split(".")[-1]


def _check_lora(config: PeftConfig, name: str, head_name: str) -> None:
    """Raises a ValueError for settings that change the base model itself, adapter on or off, and so its text, and for
    a second copy of the head."""
    legal = (True, False, "gaussian", "eva", "orthogonal")  # others take away from the base what they put into LoRA
    for setting, ok, what in (
        ("bias", config.bias == "none", "'none'"),
        ("init_lora_weights", config.init_lora_weights in legal, f"one of {', '.join(map(repr, legal))}"),
        ("layer_replication", config.layer_replication is None, "None"),
    ):
        if not ok:
            raise ValueError(
                f"`{setting}` of `{name}` must be {what}, got {getattr(config, setting)!r}: it changes the base "
                "model, whose text a selector leaves alone."
            )
    if any(head_name == module.split(".")[-1] for module in config.modules_to_save or ()):
        raise ValueError(
            f"`modules_to_save` of `{name}` must not name the head ({head_name!r}): S2TTrainer trains and saves its "
            "reserved rows by itself."
        )
