"""Tiny random models, prompts and selectors made in memory, shared by the tests. Knows nothing of what is tested.

Legend: B rows, T columns, R reserved tokens.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_s2t import LocalSelector, S2TDecodingConfig, SelectorConfig
from transformers_s2t.scoring.reserved_rows import ReservedRows


VOCAB_SIZE, PAD, BOS, EOS = 97, 0, 1, 2
RESERVED = tuple(range(81, 97))
FAMILIES = ("llama", "qwen2", "qwen3")
#: (adapter_scope, proposals): every form of S2T-Local there is
SCOPES = (("candidate", "base"), ("sequence", "base"), ("sequence", "adapted"))
#: Who selects: a teacher, or the model itself.
SETUPS = ("teacher", *SCOPES)
#: The two ways into `generate`: the logits processor, and `s2t_generate`.
WAYS = ("processor", "loop")
NEVER_FINISHES = {"eos_token_id": None}


def in_turn(firsts, seconds):
    """Two parameters of a test: by day each of `firsts` with one of `seconds`, in turn, and at night with all."""

    def words(value):
        return [word for one in value for word in words(one)] if isinstance(value, tuple) else [str(value)]

    for i, first in enumerate(firsts):
        for j, second in enumerate(seconds):
            marks = () if i % len(seconds) == j else pytest.mark.slow
            yield pytest.param(first, second, id="-".join(words((first, second))), marks=marks)


#: Of every tiny model, where a test says nothing else.
SETTINGS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tiny_model(family="llama", seed=0, attn="sdpa", **config):
    """A causal language model of random weights, wide enough spread that it is decisive and says different things."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SETTINGS | config)), attn_implementation=attn
    )
    return model.eval()


def disagreeing_pair():
    """A student and a teacher that says something else, but not everywhere."""
    student, teacher = tiny_model(), tiny_model()
    generator = torch.Generator().manual_seed(3)
    for parameter in teacher.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    return student, teacher


def lora_model(model, seed=1, name="s2t", reserved=RESERVED):
    """A PeftModel around `model` whose adapter and reserved rows are random, so that it changes every score."""
    torch.manual_seed(seed)
    peft_config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        trainable_token_indices={"lm_head": list(reserved)},
        init_lora_weights=False,
    )
    peft_model = get_peft_model(model, peft_config, adapter_name=name)
    for parameter_name, parameter in peft_model.named_parameters():
        if "trainable_tokens_delta" in parameter_name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    return peft_model.eval()


def make_selector(model, scope="candidate", proposals="base", seed=1, **selector_config):
    """A LocalSelector in `model`, untrained but random; offers all K candidates unless told otherwise."""
    settings = {"reserved_token_ids": RESERVED, "min_prob_ratio": 0.0, "num_candidates": 5} | selector_config
    settings |= {"adapter_scope": scope, "proposals": proposals}
    return LocalSelector(lora_model(model, seed), SelectorConfig(**settings), "s2t")


def offer_all(**settings):
    """A decoding config that offers five candidates, without a floor."""
    return S2TDecodingConfig(**({"num_candidates": 5, "min_prob_ratio": 0.0} | settings))


def prompts(lengths=(7, 4, 5), seed=5):
    """Left-padded `input_ids` and `attention_mask` of random prompts without special or reserved tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        input_ids[row, -length:] = torch.randint(3, RESERVED[0], (length,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def single(inputs, row):
    """One row of a batch without its padding."""
    keep = inputs["attention_mask"][row].bool()
    return {"input_ids": inputs["input_ids"][row][keep][None], "attention_mask": torch.ones(1, int(keep.sum()))}


class NaiveModel:
    """A base model and the LoRA matrices of a selector, run without PEFT, caches or masks: the reference.

    Every call is one full forward of one text; the adapter is added by hooks on none of its tokens, the last one, or
    all of them.
    """

    def __init__(self, base, selector=None):
        self.base, self.tokens_adapted = base, "none"
        if selector is None:
            return
        name = selector.adapter_name
        self.rows_RD = ReservedRows(selector.model, selector.selector_config.reserved_token_ids, name)()
        plain = dict(base.named_modules())
        for place, module in selector.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
                plain[place].register_forward_hook(self._hook(a, b, scale))

    def _hook(self, a, b, scale):
        def add(module, args, output):
            delta = (args[0] @ a.T @ b.T) * scale
            if self.tokens_adapted == "none":
                return output
            if self.tokens_adapted == "last":
                delta[:, :-1] = 0
            return output + delta

        return add

    @torch.no_grad()
    def __call__(self, ids, tokens_adapted="none"):
        """Last hidden state (D,) and logits (V,) after the text `ids`."""
        self.tokens_adapted = tokens_adapted
        hidden_D = self.base.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        return hidden_D, self.base.lm_head(hidden_D)
