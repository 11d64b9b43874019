"""Fingerprints of weights: one for a checkpoint however it is held, another for whatever was changed."""

from collections import Counter

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import lora_model, tiny_model
from torch import nn

from transformers_s2t import fingerprints
from transformers_s2t.fingerprints import model_hash, same_weights, weights_name
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.reserved_tokens import resize_for_reserved_tokens


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Of `tiny_model()`, as the version before this one wrote it.
OLD = "526fadc181dfc184"


def noise(parameter, size=0.01, seed=1):
    """Adds noise of `size` times the spread of a parameter (or where it has none, of 1)."""
    generator = torch.Generator().manual_seed(seed)
    spread = parameter.data.std().nan_to_num() or 1
    parameter.data += size * spread * torch.randn(parameter.shape, generator=generator)


def packed(bits=4):
    """A parameter as bitsandbytes holds it."""

    class Packed(nn.Parameter):
        pass

    dtype = torch.int8 if bits == 8 else torch.bfloat16  # `bnb_4bit_quant_storage`: looks like weights
    return Packed(torch.ones(7, 1).to(dtype), requires_grad=False)


def quantize(model, bits=4):
    """Packs every matrix but the head and the embeddings, as bitsandbytes does."""
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.weight = packed(bits)
    return model


def known(fingerprint):
    """How many codes of either part are known."""
    return [int((fingerprints._decode(part) != 2).sum()) for part in fingerprint.split(".")[2:]]


# ---------------------------------------------------------------------------------------------------------------------
# One checkpoint


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen2_moe"])
def test_a_checkpoint_has_one_fingerprint_whatever_it_is_loaded_as(family, tied):
    """Of float32 weights of which a tenth are subnormal in float16."""

    def fresh(seed=0):
        model = tiny_model(family, seed, tie_word_embeddings=tied)
        for parameter in model.parameters():
            parameter.data.view(-1)[::10] *= 1e-5
        return model

    found = [model_hash(fresh().to(dtype)) for dtype in DTYPES]
    found.append(model_hash(fresh().to(torch.bfloat16).float()))
    assert all(same_weights(one, other) for one in found for other in found)
    assert min(known(found[0])) > 100
    others = [model_hash(fresh(seed).to(dtype)) for seed in (1, 2) for dtype in DTYPES[:2]]
    assert not any(same_weights(one, other) for one in found for other in others)


def test_types_agree_on_every_bit_that_they_know():
    """A million weights of all sizes: the bits are equal, and an eighth of float32 is where float16 sees a tie."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(-26, 20, (1_000_000,), generator=generator)
    weights = torch.randn(1_000_000, generator=generator) * 2.0**sizes
    limits = torch.tensor([2.0**-14, 2.0**15])[:, None] * (1 + torch.linspace(-0.01, 0.01, 4001))
    weights = torch.cat([weights, limits.flatten(), -limits.flatten(), torch.tensor([0.0, -0.0])])
    seen = [fingerprints._bits(weights.to(dtype).float().numpy()) for dtype in DTYPES]
    for bits, unknown in seen:
        for other, unknown_too in seen:
            both = ~(unknown | unknown_too)
            assert np.array_equal(bits[both], other[both])
    assert not seen[1][1].any()
    fine = (weights.abs() > 1e-4) & (weights.abs() < 1e4)
    assert 0.12 < seen[0][1][fine].mean() < 0.13
    assert 0.45 < seen[0][0][fine].mean() < 0.55


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_added_rows_and_switches_leave_a_fingerprint_alone(tied):
    def fresh(**config):
        return tiny_model(tie_word_embeddings=tied, **config)

    fingerprint = model_hash(fresh())
    injected = fresh()
    peft_model = lora_model(injected)
    assert model_hash(injected) == model_hash(peft_model) == fingerprint
    peft_model.base_model.disable_adapter_layers()
    assert model_hash(injected) == fingerprint
    assert model_hash(fresh().requires_grad_(False)) == model_hash(torch.compile(fresh())) == fingerprint
    for num_rows in (113, 140):  # 128 makes one more block of rows whole
        resized = fresh()
        resize_for_reserved_tokens(resized, num_rows)
        assert same_weights(fingerprint, model_hash(resized))
        noise(resized.model.layers[1].mlp.up_proj.weight)
        assert not same_weights(fingerprint, model_hash(resized))


def test_rows_that_are_added_to_a_head_with_a_bias_change_nothing():
    models = [tiny_model("phi", num_key_value_heads=4, partial_rotary_factor=0.5) for _ in range(2)]
    assert models[0].lm_head.bias is not None
    models[1].resize_token_embeddings(113, mean_resizing=False)
    assert same_weights(*map(model_hash, models))


def test_a_tied_head_is_the_same_as_a_copy_of_it():
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model(tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert same_weights(model_hash(tied), model_hash(untied))
    noise(untied.lm_head.weight)
    assert not same_weights(model_hash(tied), model_hash(untied))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
        LoraConfig(target_modules=["q_proj"], use_dora=True),  # its magnitudes are a vector, as norms are
        LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "up_proj", "lm_head"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["embeddings", "dora", "modules_to_save", "ia3"],
)
def test_adapters_of_every_kind_leave_it_alone(config):
    model = tiny_model()
    fingerprint = model_hash(model)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            noise(parameter, 1.0)
    assert model_hash(model).split(".")[1:] == model_hash(peft_model).split(".")[1:] == fingerprint.split(".")[1:]
    assert same_weights(fingerprint, model_hash(model))


# ---------------------------------------------------------------------------------------------------------------------
# Another one


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen2_moe", "lfm2"])
def test_every_parameter_counts(family):
    """Each by itself, by two hundredths of its spread, in float32, of which the fewest bits are known. LFM2 has
    convolutions, Qwen2-MoE tensors of experts."""
    config = {"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {}
    model, missed = tiny_model(family, **config), []
    fingerprint = model_hash(model)
    for name, parameter in model.named_parameters():
        own = parameter.data.clone()
        noise(parameter, 0.02)
        if same_weights(fingerprint, model_hash(model)):
            missed.append(name)
        parameter.data = own
    assert not missed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.01, 0.001])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_a_merged_adapter_that_changes_weights_by_a_thousandth_is_told_from_the_base(targets, size, dtype):
    base, model = tiny_model(num_hidden_layers=6).to(dtype), tiny_model(num_hidden_layers=6).to(dtype)
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, init_lora_weights=False))
    for module in peft_model.modules():
        if hasattr(module, "lora_A"):
            change = module.get_delta_weight("default").float()
            with torch.no_grad():
                module.lora_B["default"].weight *= size * module.get_base_layer().weight.float().std() / change.std()
    merged = peft_model.merge_and_unload()
    found = model_hash(merged)
    assert not same_weights(model_hash(base), found)
    assert found.split(".")[0] == model_hash(base).split(".")[0], "the embeddings are those of the base"
    assert weights_name(found) != weights_name(model_hash(base))


def test_a_large_model_costs_a_bounded_number_of_weights(monkeypatch):
    taken = Counter()
    take = fingerprints._Codes._take

    def count(self, parameter, index, codes_N):
        taken[self.num_codes] += len(codes_N)
        return take(self, parameter, index, codes_N)

    monkeypatch.setattr(fingerprints._Codes, "_take", count)
    model_hash(tiny_model("qwen2", num_hidden_layers=40))
    assert 0 < taken[fingerprints._MATRIX_CODES] < 12_000


# ---------------------------------------------------------------------------------------------------------------------
# What cannot tell everything


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_compared_by_what_is_not_quantized(bits):
    full, quantized = model_hash(tiny_model()), model_hash(quantize(tiny_model(), bits))
    assert known(full)[1] and quantized.endswith(".")
    assert same_weights(full, quantized) and same_weights(quantized, full)
    changed = tiny_model()
    noise(changed.model.layers[0].mlp.up_proj.weight, 1.0)
    assert same_weights(quantized, model_hash(changed)), "it cannot tell"
    for part in ("model.embed_tokens", "model.norm", "model.layers.1.input_layernorm", "lm_head"):
        other = tiny_model()
        noise(other.get_submodule(part).weight)
        assert not same_weights(quantized, model_hash(other)), part
        assert not same_weights(model_hash(quantize(other, bits)), full), part


def test_a_matrix_that_is_held_as_codes_of_other_names_makes_no_other_model():
    """As GPTQ, AWQ and compressed-tensors do: no `weight`, but codes, and scales that look like a matrix."""
    model = tiny_model("qwen2")
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            del module.weight
            if module.bias is not None:
                del module.bias
                module.register_buffer("bias", torch.zeros(3))
            module.register_buffer("qweight", torch.ones(3, 2, dtype=torch.int32))
            module.scales = nn.Parameter(torch.randn(3, 2))
    found = model_hash(model)
    assert found.endswith(".")
    parts = [f".{part}" for part in found.split(".", 1)]
    assert same_weights(parts[1], model_hash(tiny_model("qwen2")))
    assert not same_weights(parts[1], model_hash(tiny_model("qwen2", seed=3)))


def test_weights_that_are_not_in_memory_tell_nothing():
    fingerprint = model_hash(tiny_model())
    model = tiny_model()
    model.model.layers[1].to("meta")
    assert same_weights(fingerprint, model_hash(model))
    noise(model.model.layers[0].mlp.up_proj.weight)
    assert not same_weights(fingerprint, model_hash(model))


# ---------------------------------------------------------------------------------------------------------------------
# What is stored


def test_fingerprints_of_older_versions_are_compared_by_their_rule():
    found, merged = model_hash(tiny_model()), model_hash(lora_model(tiny_model()).merge_and_unload())
    for dtype in DTYPES:
        assert same_weights(OLD, model_hash(tiny_model().to(dtype)))
    assert same_weights(found, OLD) and same_weights(OLD, OLD)
    assert same_weights(OLD, merged) and not same_weights(found, merged)
    assert not same_weights(OLD, model_hash(tiny_model(seed=3)))
    assert not same_weights(OLD, "0" * 16) and not same_weights("beef", found)
    assert same_weights("", found) and same_weights(found, "")
    newer = f"{OLD}.3.something"
    assert same_weights(newer, found) and not same_weights(newer, model_hash(tiny_model(seed=3)))
    assert weights_name(OLD) == OLD and weights_name(found).startswith(f"{OLD}-") and len(weights_name(found)) == 25


def test_a_fingerprint_is_the_same_on_every_machine():
    weights = np.linspace(-3, 3, 97 * 32, dtype=np.float32).reshape(97, 32)
    model = tiny_model()
    for parameter in model.parameters():
        values = np.resize(weights, parameter.shape) / 4 + 0.001
        parameter.data = torch.from_numpy(values.astype(np.float32))
    assert weights_name(model_hash(model)) == "6ab86a4b232f27b2-a887952d"


def test_labels_go_on_where_their_model_is_known_by_an_older_fingerprint():
    def header(model_hash):
        return TrajectoryHeader("m", "t", "v", model_hash=model_hash)

    found, merged = model_hash(tiny_model()), model_hash(lora_model(tiny_model()).merge_and_unload())
    half = model_hash(tiny_model().to(torch.bfloat16))
    assert half != found
    for stored in ("", OLD, found, half):
        assert header(found).differences(header(stored)) == {}
    assert header(merged).differences(header(found)) == {"model_hash": (weights_name(found), weights_name(merged))}
    assert list(header(found).differences(header("0" * 16))) == ["model_hash"]
