"""Every architecture, tiny and random: S2T equals a naive decoder without caches, or is refused with the reason.

The naive decoder runs the full text again for every step and every candidate, on a fresh model without PEFT, caches or
masks. Steps trigger by margin, about half of them, so caches are also caught up over several tokens at once.

Legend: B rows, T columns, K candidates, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import BOS, PAD, RESERVED, SCOPES, VOCAB_SIZE, NaiveModel, prompts, single
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_s2t import S2T, LocalSelector, S2TDecodingConfig, S2TTrace, SelectorConfig, TeacherSelector
from transformers_s2t import s2t_generate


NEW_TOKENS, K = 10, 4
WINDOW = 6  # of every model that has one: prompt and new tokens are 17, so it slides
SETUPS = ("teacher", *SCOPES)
ROADS = ("processor", "fast")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}


@dataclass(frozen=True)
class Family:
    """How a tiny model of one architecture is made, where LoRA goes, and what its plain `generate` can do."""

    config: dict = field(default_factory=dict)
    targets: str | list[str] = "all-linear"
    head: str = "lm_head"
    impls: tuple[str, ...] = ("sdpa", "eager")
    pads: bool = True


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen2_moe": Family(MOE, ATTENTION),
    "qwen3_moe": Family(MOE, ATTENTION),
    "mistral": Family({"sliding_window": WINDOW}),
    "gemma2": Family(SLIDING | {"final_logit_softcapping": 5.0}, impls=("eager",)),
    "gemma3_text": Family(SLIDING),
    "phi3": Family(),
    "gpt2": Family({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": Family(),
    "opt": Family({"ffn_dim": 48, "init_std": 0.3}),
    "gpt_oss": Family(SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION, impls=("eager",)),
    "lfm2": Family({"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": Family(
        MOE
        | {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"],
    ),
    "mamba2": Family(
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}, ["in_proj"], impls=("eager",)
    ),
    "falcon_h1": Family(
        MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}, [*ATTENTION, "in_proj", "gate_proj", "down_proj"]
    ),
    "bamba": Family(MAMBA | {"attn_layer_indices": [1]}, [*ATTENTION, "in_proj", "gate_proj", "down_proj"]),
}


def name_of(setup):
    return setup if isinstance(setup, str) else "-".join(setup)


def make_model(name, attn, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(COMMON | FAMILIES[name].config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    model.generation_config.eos_token_id = None
    return model


def make_local(model, name, scope, proposals):
    torch.manual_seed(1)
    peft_config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=FAMILIES[name].targets,
        trainable_token_indices={FAMILIES[name].head: list(RESERVED)},
        init_lora_weights=False,
    )
    peft_model = get_peft_model(model, peft_config, adapter_name="s2t").eval()
    for parameter_name, parameter in peft_model.named_parameters():
        if "trainable_tokens_delta" in parameter_name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    config = SelectorConfig(RESERVED, scope, proposals, num_candidates=K, min_prob_ratio=0.0)
    return LocalSelector(peft_model, config, "s2t")


def set_up(name, attn, setup):
    """A model and what selects in it: a teacher of the same family, or the model itself in one of the scopes."""
    model = make_model(name, attn)
    if setup == "teacher":
        return model, TeacherSelector(make_model(name, attn, seed=9))
    return model, make_local(model, name, *setup)


def inputs_of(name):
    """Left-padded prompts, or equally long ones for models whose plain `generate` is not exact with padding."""
    return prompts((7, 4, 5) if FAMILIES[name].pads else (6, 6, 6))


def decoding(name, attn, setup):
    return S2TDecodingConfig(
        trigger="margin", threshold=threshold_of(name, attn), num_candidates=K, min_prob_ratio=0.0, warmup_tokens=1
    )


def plain(model, inputs, **kwargs):
    return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs))


def generate(road, model, inputs, selector, config, trace=None):
    if road == "processor":
        return plain(model, inputs, logits_processor=S2T(selector, config=config, trace=trace))
    settings = {"selector": selector, "decoding_config": config, "trace": trace}
    return plain(model, inputs, custom_generate=s2t_generate, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# The naive reference


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

    @torch.no_grad()
    def __call__(self, texts, tokens_adapted="none"):
        self.texts, self.tokens_adapted = texts, tokens_adapted
        logits_BV = self.base(input_ids=torch.tensor(texts), use_cache=False).logits[:, -1]
        return self.hidden_BD, logits_BV


@lru_cache
def naive_row(name, attn, setup, row):
    """New tokens of one text, at how many steps it triggered, and at how many they are not the student's first."""
    local = setup != "teacher"
    _, selector = set_up(name, attn, setup)
    student = NaiveCausalLM(make_model(name, attn), selector if local else None)
    teacher = None if local else NaiveCausalLM(make_model(name, attn, seed=9))
    writes_with = "all" if local and setup[1] == "adapted" else "none"
    threshold = threshold_of(name, attn)
    ids = single(inputs_of(name), row)["input_ids"][0].tolist()
    start, fired, flipped = len(ids), 0, 0
    while len(ids) < start + NEW_TOKENS:
        logits_V = student([ids], writes_with)[1][0].clone()
        if local:
            logits_V[list(RESERVED)] = -torch.inf
        best = logits_V.log_softmax(-1).topk(K)
        token = int(best.indices[0])
        if len(ids) > start and float(best.values[1] - best.values[0]) >= threshold:
            if local:
                texts = [[*ids, candidate] for candidate in best.indices.tolist()]
                hidden_KD = student(texts, {"candidate": "last", "sequence": "all"}[setup[0]])[0]
                scores_K = (hidden_KD @ student.rows_RD.T).softmax(-1) @ torch.linspace(0, 1, len(RESERVED))
            else:
                scores_K = teacher([ids])[1][0, best.indices]
            fired += 1
            flipped += int(scores_K.argmax()) != 0
            token = int(best.indices[scores_K.argmax()])
        ids.append(token)
    return ids[start:], fired, flipped


@lru_cache
def threshold_of(name, attn):
    """The median margin of plain greedy decoding."""
    out = plain(make_model(name, attn), single(inputs_of(name), 0), output_logits=True, return_dict_in_generate=True)
    best = torch.cat(out.logits).log_softmax(-1).topk(2).values
    return float((best[:, 1] - best[:, 0]).median()) - 1e-3


# ---------------------------------------------------------------------------------------------------------------------


CASES = [(name, attn) for name, family in FAMILIES.items() for attn in family.impls]


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_greedy_of_a_padded_batch_equals_its_rows_where_we_say_so(name):
    model, inputs = make_model(name, FAMILIES[name].impls[0]), prompts((7, 4, 5))
    together = plain(model, inputs)[:, 7:].tolist()
    alone = [plain(model, single(inputs, row))[0, -NEW_TOKENS:].tolist() for row in range(3)]
    assert (together == alone) is FAMILIES[name].pads


@pytest.mark.parametrize("rows", ["one", "several"])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("setup", SETUPS, ids=name_of)
@pytest.mark.parametrize(("name", "attn"), CASES)
def test_s2t_equals_the_naive_decoder(name, attn, setup, road, rows):
    model, selector = set_up(name, attn, setup)
    inputs = inputs_of(name)
    rows = range(3) if rows == "several" else [0]
    if len(rows) == 1:
        inputs = single(inputs, 0)
    trace = S2TTrace()
    got = generate(road, model, inputs, selector, decoding(name, attn, setup), trace)[:, -NEW_TOKENS:]
    expected = [naive_row(name, attn, setup, row) for row in rows]
    assert got.tolist() == [tokens for tokens, _, _ in expected]
    assert sum(step["flipped"] for row in trace.rows() for step in row) == sum(flips for _, _, flips in expected) > 0
