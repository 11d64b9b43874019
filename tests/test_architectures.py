"""Every architecture, tiny and random: S2T equals a naive decoder without caches, or is refused with the reason.

The naive decoder runs the full text again for every step and every candidate, on a fresh model without PEFT, caches or
masks. Steps trigger by margin, about half of them, so caches are also caught up over several tokens at once.

Legend: B rows, T columns, K candidates, D hidden size, V vocabulary.
"""

import copy
from functools import lru_cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import PAD, RESERVED, SCOPES, VOCAB_SIZE, NaiveModel, prompts, single, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_s2t import S2T, LocalSelector, S2TDecodingConfig, S2TTrace, SelectorConfig, TeacherSelector, s2t_generate


NEW_TOKENS, K = 10, 3
#: longer than the window of every model that has one, once NEW_TOKENS are added: 7 + 10 > 6
WINDOW = 6
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}


class Family:
    """How a tiny model of one architecture is made, and where LoRA goes in it."""

    def __init__(self, name, targets="all-linear", head="lm_head", impls=("sdpa", "eager"), spread=0.3, **config):
        self.name, self.targets, self.head, self.impls, self.spread = name, targets, head, impls, spread
        self.config = config

    def model(self, attn="sdpa", seed=0):
        settings = {
            "attn_implementation": attn,
            "eos_token_id": None,
            "initializer_range": self.spread,
        }
        model = tiny_model(self.name, seed, **(settings_of(self.name) | self.config | settings))
        return model
