"""Facts about a model that are read from its modules and config, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def prompt_learning_of(model: PreTrainedModel | PeftModel) -> str | None:
    """The PEFT method that puts virtual tokens in front of every text of a model, `None` where there is none.

    Found for the inner model that `PeftModel.generate` runs, too.
    """
    owner = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    for peft_model in (model, owner):
        if isinstance(peft_model, PeftModel) and peft_model.active_peft_config.is_prompt_learning:
            return str(peft_model.active_peft_config.peft_type.value)
    return None


def random_places(model: nn.Module) -> Iterator[str]:
    """Names of what makes a forward random in training mode: dropout modules, and rates of dropout or jitter."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        if "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0:
            yield name
        for key, value in vars(module).items():
            if isinstance(value, float) and value > 0 and ("drop" in key or "jitter" in key):
                yield f"{name}.{key}"


class RotaryChange(NamedTuple):
    """The length at which a growing text's rotary positions change for all of its tokens.

    Attributes:
        rope_type: as in the config.
        length: the longest text with the first positions, in tokens.
        again: whether every further token changes them again.
    """

    rope_type: str
    length: int
    again: bool


def rotary_change(model: PreTrainedModel | PeftModel) -> RotaryChange | None:
    """Where the rotary positions of a whole text change as it grows, `None` for never. A cache then holds outdated
    ones (Phi-3 with its long context, dynamic scaling)."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    found = []
    for settings in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # one for a kind of layers
        rope_type = settings.get("rope_type") or ""
        if rope_type == "longrope":
            found.append(RotaryChange(rope_type, settings["original_max_position_embeddings"], False))
        elif "dynamic" in rope_type:
            found.append(RotaryChange(rope_type, config.max_position_embeddings, True))
    return min(found, key=lambda change: change.length, default=None)
