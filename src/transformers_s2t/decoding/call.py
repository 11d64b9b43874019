"""What a running `generate` call knows: its model and mode, the user's own arguments, the text that it was given.

`generate` passes little of that on to logits processors and custom strategies, so it is read from the call's stack
frame. What shapes its forward (mask, positions, embeddings) is used as it is, or refused before the first token.

Legend: B rows, T columns of the prompt.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation import BaseStreamer, GenerationMixin, GenerationMode

from transformers_s2t.models.shared_prefix import positions_from_mask


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
#: Model inputs that S2T gives to its own forwards too, or that change no logits.
_KNOWN_INPUTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_params",
    "inputs_embeds",
    "input_ids",
    "use_cache",
    "logits_to_keep",
}


class GenerateCall:
    """A `generate` call that this code runs in.

    Attributes:
        model: the model that generates.
        mode: its way of decoding, `None` where that is not decided yet.
        generation_config: the call's own copy, `None` where it is not made yet. No other call has this object.
    """

    def __init__(self, frame):
        self._locals = frame.f_locals
        self.model: PreTrainedModel = self._locals["self"]
        self.mode: GenerationMode | None = self._locals.get("generation_mode")
        self.generation_config: GenerationConfig | None = self._locals.get("generation_config")

    @property
    def streamer(self) -> BaseStreamer | None:
        return self._locals.get("streamer")

    @property
    def assistant_model(self) -> PreTrainedModel | None:
        return self._locals.get("assistant_model")

    @property
    def own_processors(self) -> list[LogitsProcessor]:
        """What the user passed as `logits_processor`."""
        return list(list.__iter__(self._locals.get("logits_processor") or []))

    @property
    def custom_generate(self) -> Any:
        """What the user passed as `custom_generate`."""
        return self._locals.get("custom_generate")

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Before the first token: the inputs of the first forward beside `input_ids`."""
        return self._locals.get("model_kwargs") or {}


def running_calls() -> list[GenerateCall]:
    """The `generate` calls that this code runs in, innermost first; none where a user called it directly."""
    calls, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code is _GENERATE:
            calls.append(GenerateCall(frame))
        frame = frame.f_back
    return calls


def eos_token_ids(generation_config: GenerationConfig | None) -> set[int]:
    """Token ids that end a text."""
    ids = getattr(generation_config, "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def prompt_mask(
    input_ids_BT: torch.Tensor,
    model_kwargs: Mapping[str, Any],
    generation_config: GenerationConfig | None,
    takes_embeds: bool = False,
) -> torch.Tensor:
    """Which columns of a prompt are text, bool (B, T), as `generate` itself masks them.

    Args:
        input_ids_BT: token ids of the prompt.
        model_kwargs: `model_kwargs` of [`GenerateCall`] before its first token.
        generation_config: the call's.
        takes_embeds: whether a prompt may be given as `inputs_embeds`. A teacher cannot read them: it has other
            embeddings.

    Raises:
        ValueError: naming an argument that cannot be passed on to S2T's own forwards: positions that do not follow
            from the mask, padding on the right, embeddings, part of a text, inputs of other kinds.
    """
    given = {name for name, value in model_kwargs.items() if value is not None and value != {}}
    others = sorted(given - _KNOWN_INPUTS)
    if others:
        raise ValueError(
            f"S2T reads a text by its token ids and mask alone: the model inputs {', '.join(map(repr, others))} would "
            "be left out where candidates are scored. Leave them out of the call."
        )
    embeds_BTD = model_kwargs.get("inputs_embeds")
    if embeds_BTD is not None and not takes_embeds:
        raise ValueError("A teacher reads token ids: pass `input_ids`, not `inputs_embeds`.")
    batch_size, length = (input_ids_BT if embeds_BTD is None else embeds_BTD).shape[:2]
    mask_BT = model_kwargs.get("attention_mask")
    if mask_BT is None:  # `generate` drops a mask of ones, and notes its length
        covered = getattr(generation_config, "_mask_length", None) or length
        mask_BT = torch.ones(batch_size, covered, dtype=torch.bool, device=input_ids_BT.device)
    if tuple(mask_BT.shape) != (batch_size, length):
        raise ValueError(
            f"S2T reads the whole text: `attention_mask` must have the shape of the prompt, ({batch_size}, {length}), "
            f"got {tuple(mask_BT.shape)}. To go on from `past_key_values`, pass the ids of all the text so far."
        )
    mask_BT = mask_BT.bool()
    if not bool(mask_BT[:, -1].all()):
        raise ValueError(
            "The prompt must end in a token of its own in every row: `attention_mask` is 0 in the last column of row "
            f"{int((~mask_BT[:, -1]).nonzero()[0, 0])}. Pad on the left (`processing_class.padding_side = 'left'`)."
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        expected_BT = positions_from_mask(mask_BT)
        if positions.dim() != 2 or positions.shape[-1] != length or len(positions) not in (1, batch_size):
            raise ValueError(
                f"`position_ids` must have the shape of the prompt, ({batch_size}, {length}), got "
                f"{tuple(positions.shape)}."
            )
        if bool(((positions.to(mask_BT.device) != expected_BT) & mask_BT).any()):
            raise ValueError(
                "S2T numbers tokens from the attention mask, as `generate` does by itself: `position_ids` must be 0, "
                "1, 2 ... over the tokens that are not masked. Leave them out."
            )
    return mask_BT
