"""A tiny random model of every architecture that S2T is tested on, and the naive way to run any of them.

Legend: B rows, T columns, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from tiny import SETTINGS, NaiveModel
from transformers import AutoConfig, AutoModelForCausalLM


WINDOW = 6  # of every model that has one: texts in the tests are longer, so it slides
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

DROPOUTS = (
    "embd_pdrop",
    "resid_pdrop",
    "attn_pdrop",
    "dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)
COMMON = SETTINGS | {"max_position_embeddings": 64, "eos_token_id": None} | dict.fromkeys(DROPOUTS, 0.0)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
JAMBA = {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}


@dataclass(frozen=True)
class Family:
    """How a tiny model of one architecture is made, and where LoRA and the reserved rows go in it."""

    config: dict = field(default_factory=dict)
    targets: str | list[str] = "all-linear"
    head: str = "lm_head"
    impls: tuple[str, ...] = ("sdpa", "eager")


FAMILIES = {
    "llama": Family(),
    "qwen2": Family({"use_sliding_window": True, "max_window_layers": 1} | SLIDING),
    "qwen3": Family(),
    "qwen2_moe": Family(MOE, ATTENTION),  # experts are not Linear: LoRA on the attention only, here and below
    "mistral": Family({"sliding_window": WINDOW}),
    "gemma2": Family(SLIDING | {"final_logit_softcapping": 5.0}, impls=("eager",)),  # has no sdpa
    "gemma3_text": Family(SLIDING),
    "phi3": Family({"sliding_window": WINDOW}),
    "granite": Family({"logits_scaling": 4.0}),
    "gpt2": Family({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neo": Family(
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["local", "global"], 1]], "window_size": WINDOW},
        impls=("eager",),  # has no sdpa
    ),
    "gpt_neox": Family(),
    "opt": Family({"ffn_dim": 48, "init_std": 0.3}),
    "biogpt": Family(head="output_projection", impls=("sdpa",)),
    "gpt_oss": Family(
        SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ATTENTION,
        impls=("eager",),  # has no sdpa
    ),
    "bloom": Family({"n_layer": 2, "n_head": 4}, impls=("eager",)),  # has no sdpa
    "llama4_text": Family(
        {
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "moe_layers": [],
            "intermediate_size_mlp": 48,
        }
    ),
    "lfm2": Family({"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": Family(MOE | LINEAR, [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"]),
    "mamba2": Family(
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}, ["in_proj"], impls=("eager",)
    ),
    "falcon_h1": Family(
        MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}, [*ATTENTION, "in_proj", "gate_proj", "down_proj"]
    ),
    "bamba": Family(MAMBA | {"attn_layer_indices": [1]}, [*ATTENTION, "in_proj", "gate_proj", "down_proj"]),
    "jamba": Family(JAMBA, [*ATTENTION, "in_proj"], impls=("sdpa",)),
}
REPEATED = {
    "biogpt",
    "bloom",
    "gpt_neo",
    "lfm2",
    "llama4_text",
    "qwen3_next",
    "mamba2",
    "falcon_h1",
    "bamba",
    "jamba",
}  # cache rows, in place of a tree
REFUSED = {
    "recurrent_gemma": Family(
        {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 32}
    ),
}


def make_model(name, attn, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(COMMON | (FAMILIES | REFUSED)[name].config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    model.generation_config.eos_token_id = None
    return model


class NaiveCausalLM(NaiveModel):
    """[`NaiveModel`] of any architecture: what the head reads and what the model returns, texts of equal length."""

    def __init__(self, base, selector=None):
        super().__init__(base, selector)
        base.get_output_embeddings().register_forward_pre_hook(self._remember)

    def _hook(self, a, b, scale):
        add = super()._hook(a, b, scale)

        def add_to_texts(module, args, output):  # some layers see all tokens of all texts in one row (OPT)
            x_BTD, output_BTD = (tensor.unflatten(0, (len(self.texts), -1)) for tensor in (args[0], output))
            return add(module, (x_BTD,), output_BTD).flatten(0, 1)

        return lambda module, args, output: (add_to_texts if args[0].dim() == 2 else add)(module, args, output)

    def _remember(self, module, args):
        self.hidden_BD = args[0][:, -1]

    def run(self, texts, tokens_adapted="none"):
        """Last hidden states (B, D) of texts of equal length and logits (B, T, V), with gradient."""
        self.texts, self.tokens_adapted = texts, tokens_adapted
        logits_BTV = self.base(input_ids=torch.tensor(texts), use_cache=False).logits
        return self.hidden_BD, logits_BTV

    @torch.no_grad()
    def __call__(self, texts, tokens_adapted="none"):
        hidden_BD, logits_BTV = self.run(texts, tokens_adapted)
        return hidden_BD, logits_BTV[:, -1]
