"""Texts of the small model, greedy or sampled, a batch at a time.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transformers_s2t.models.shared_prefix import can_share, pad_prompts, read_shared, without_wrapper


class _GumbelNoise(LogitsProcessor):
    """Makes argmax a sample from softmax(logits / temperature), with a generator for each row.

    So a row's sample depends on the seed, its prompt and the number of its rollout, not on other rows of the batch.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        rollouts: Sequence[int],
        temperature: float,
        seed: int,
        device: torch.device,
    ):
        self.temperature = temperature
        self.generators = []
        for ids, number in zip(prompt_ids, rollouts, strict=True):
            digest = hashlib.sha256(f"{seed} {number} {list(ids)}".encode()).digest()
            row_seed = int.from_bytes(digest[:8], "big") >> 1
            self.generators.append(torch.Generator(device=device).manual_seed(row_seed))

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the batch only."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for b, generator in enumerate(self.generators):
            noise_BV[b].exponential_(generator=generator)
        return scores.float() / self.temperature - noise_BV.clamp_min(torch.finfo(torch.float32).tiny).log()


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_token_id: int,
    eos_token_ids: Sequence[int] = (),
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    rollouts: Sequence[int] | None = None,
    suppressed_ids: Sequence[int] = (),
    decode_with: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, in one batch.

    The checkpoint's `generation_config` does not apply: no repetition penalty, no top-k, top-p or other setting of it
    is inherited. Greedy is the argmax, sampling is from the whole softmax at `temperature`.

    Args:
        model: in eval mode.
        prompt_ids: token ids, one prompt a row, without padding.
        max_new_tokens: most new tokens of each row.
        pad_token_id: fills shorter prompts.
        eos_token_ids: ids that end a row. The model's own defaults do not apply.
        do_sample, temperature, seed: see above; a row's samples depend on the seed, its prompt and its number only.
        rollouts: the number of each row, for prompts that are sampled several times; 0 if not given.
        suppressed_ids: ids that are never generated.
        decode_with: further arguments of `generate`. `custom_generate=s2t_generate` with a selector corrects the model
            as it writes.

    Returns:
        New tokens of each row, up to its first end-of-sequence token, which is included: it is a decision too.
    """
    decode_with = decode_with or {}
    selector, teacher = decode_with.get("selector"), decode_with.get("teacher_model")
    readers = [model, getattr(selector, "teacher_model", None), teacher]
    inputs = pad_prompts(prompt_ids, pad_token_id, [reader for reader in readers if reader is not None])
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        suppress_tokens=list(suppressed_ids) or None,
    )
    processors = LogitsProcessorList()
    if do_sample:
        numbers = [0] * len(prompt_ids) if rollouts is None else rollouts
        processors.append(_GumbelNoise(prompt_ids, numbers, temperature, seed, model.device))
    # `generate` fills everything that is None from the model's own config, so that one is replaced.
    owner = without_wrapper(model)  # a PeftModel's own would not be read
    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        if decode_with:
            config.max_new_tokens = max_new_tokens
            width = inputs["input_ids"].shape[1]
            output_BT = model.generate(**inputs, generation_config=config, logits_processor=processors, **decode_with)
            new = output_BT[:, width:].tolist()
        else:
            new = generate_rows(model, inputs, config, max_new_tokens, processors)
    finally:
        owner.generation_config = own
    ends = set(eos_token_ids)
    return [ids[: next((i + 1 for i, id in enumerate(ids) if id in ends), len(ids))] for ids in new]


#: A batch of this many rows or fewer is not made smaller: on a CPU a step of half as many takes about as long.
_FEW_ROWS = 8


class _HalfFinished(StoppingCriteria):
    """Stops a batch when half of its rows have ended."""

    def __init__(self, eos_token_id: int | Collection[int], width: int, device: torch.device):
        ids = [eos_token_id] if isinstance(eos_token_id, int) else sorted(eos_token_id)
        self.ends, self.width = torch.tensor(ids, device=device), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        ended_B = torch.isin(input_ids[:, self.width :], self.ends).any(-1)
        return torch.full_like(ended_B, bool(2 * ended_B.sum() >= len(ended_B)))


def _can_lose_rows(model: PreTrainedModel) -> bool:
    """Whether a model's cache holds all that it keeps for each row (Qwen2-VL keeps position offsets elsewhere)."""
    return can_share(model) and not any(hasattr(module, "rope_deltas") for module in model.modules())


def generate_rows(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    config: GenerationConfig,
    max_new_tokens: int,
    processors: Sequence[_GumbelNoise] = (),
    cache: Cache | None = None,
) -> list[list[int]]:
    """`model.generate` in which rows leave the batch: when half of them have ended, the others continue alone.

    So one long text does not hold up a batch. Tokens that all prompts begin with are read once.

    Args:
        model: in eval mode.
        inputs: `input_ids` and `attention_mask` (B, T) from `shared_prefix.pad_prompts`.
        config: settings of `generate`; changed here. Its end-of-sequence tokens end a row.
        max_new_tokens: most new tokens of each row.
        processors: logits processors; their `keep(rows)` is called with the rows that continue.
        cache: cache of the prompts, where some of their tokens have been read already.

    Returns:
        New tokens of each row, including what follows its end while others continue.
    """
    input_ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    rows, new = list(range(len(input_ids_BT))), [[] for _ in input_ids_BT]
    cache = read_shared(model, input_ids_BT, mask_BT) if cache is None else cache
    num_left, drops = max_new_tokens, config.eos_token_id not in (None, []) and _can_lose_rows(model)
    while rows:
        width, several = input_ids_BT.shape[1], drops and len(rows) > _FEW_ROWS
        stop = [_HalfFinished(config.eos_token_id, width, input_ids_BT.device)] if several else []
        config.max_new_tokens, config.return_dict_in_generate = num_left, several
        given = {} if cache is None else {"past_key_values": cache}
        output = model.generate(
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(stop),
            **given,
        )
        all_ids_BT = output.sequences if several else output
        new_BS = all_ids_BT[:, width:]
        for row, ids in zip(rows, new_BS.tolist()):
            new[row] += ids
        num_left -= new_BS.shape[1]
        if not several or num_left <= 0:
            break
        left_A = (~torch.isin(new_BS, stop[0].ends).any(-1)).nonzero()[:, 0]
        rows = [rows[b] for b in left_A.tolist()]
        cache = output.past_key_values
        cache.reorder_cache(left_A)
        input_ids_BT = all_ids_BT[left_A]
        mask_BT = torch.cat([mask_BT[left_A], mask_BT.new_ones(len(left_A), new_BS.shape[1])], dim=1)
        for processor in processors:
            processor.keep(left_A.tolist())
    return new
