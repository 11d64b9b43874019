"""The private parts of transformers and peft that decoding, models and scoring lean on.

A release that changes one fails here, with its name, before it fails in a decoding test without one.
"""

import inspect

import pytest
import torch
import transformers.generation
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from tiny import PAD, RESERVED, lora_model, prompts, tiny_model
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from transformers_s2t import S2T
from transformers_s2t.decoding.generation import _WARPERS
from transformers_s2t.training.attach import whole_weights


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_prefill_takes_ids_config_and_kwargs():
    assert parameters(GenerationMixin._prefill)[:4] == ["self", "input_ids", "generation_config", "model_kwargs"]


def test_update_model_kwargs_takes_outputs_and_kwargs():
    signature = parameters(GenerationMixin._update_model_kwargs_for_generation)
    assert signature[:3] == ["self", "outputs", "model_kwargs"]


def test_update_model_kwargs_takes_an_empty_output_and_still_counts_one_token():
    """The tree step has no output to hand over: the cache stays, mask and positions grow by one."""
    kwargs = {
        "attention_mask": torch.tensor([[0, 1, 1]]),
        "position_ids": torch.tensor([[1, 0, 1]]),
        "past_key_values": "mine",
    }
    kwargs = tiny_model()._update_model_kwargs_for_generation({}, kwargs)
    assert kwargs["attention_mask"].tolist() == [[0, 1, 1, 1]]
    assert kwargs["position_ids"].tolist() == [[1, 0, 1, 2]]
    assert kwargs["past_key_values"] == "mine"


def test_prepare_inputs_cuts_to_the_next_token():
    assert "next_sequence_length" in parameters(GenerationMixin.prepare_inputs_for_generation)


def what_a_strategy_gets(model, inputs, **kwargs):
    seen = {}

    def strategy(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen.update(locals())
        return input_ids

    model.generate(**inputs, custom_generate=strategy, **kwargs)
    return seen


def test_a_custom_strategy_gets_a_dynamic_cache_and_a_pad_token_tensor(batch):
    seen = what_a_strategy_gets(tiny_model(), batch)
    assert isinstance(seen["generation_config"]._pad_token_tensor, torch.Tensor)
    assert seen["generation_config"]._pad_token_tensor.tolist() == PAD
    assert type(seen["model_kwargs"]["past_key_values"]) is DynamicCache


def test_the_pad_token_falls_back_to_the_first_end_of_sequence_token():
    """The processor path guesses the padding by the same rule, from the configs alone."""
    model = tiny_model()
    model.generation_config.pad_token_id = None
    model.generation_config.eos_token_id = [7, 9]
    assert what_a_strategy_gets(model, prompts((4,)))["generation_config"]._pad_token_tensor.tolist() == 7


def test_a_tokenizer_never_reaches_stop_strings_of_a_custom_strategy(batch):
    """So `stop_strings=` works on the processor path alone; the cached loop takes `stopping_criteria=`."""
    with pytest.raises(ValueError, match="`tokenizer` argument of `generate`"):
        what_a_strategy_gets(tiny_model(), batch, stop_strings=["x"], tokenizer=object())


def test_users_processors_run_before_the_warpers_and_an_s2t_list_is_accepted(batch):
    processors = S2T(teacher_model=tiny_model(seed=9))
    seen = what_a_strategy_gets(
        tiny_model(), batch, logits_processor=processors, repetition_penalty=1.3, do_sample=True, temperature=0.7
    )
    kinds = [type(processor).__name__ for processor in seen["logits_processor"]]
    assert kinds.index("RepetitionPenaltyLogitsProcessor") < kinds.index("S2TLogitsProcessor")
    assert kinds.index("S2TLogitsProcessor") < kinds.index("TemperatureLogitsWarper")
    assert processors[0] in list(seen["logits_processor"])


def test_every_warper_of_the_library_is_known_to_the_cached_loop():
    """One that is not known runs before the proposals on that way, and after them on the processor path."""
    names = [name for name in dir(transformers.generation) if name.endswith(("LogitsWarper", "Processor"))]
    added_last = {name for name in names if name.endswith("LogitsWarper") or "Watermark" in name} | {
        "LogitNormalization"
    }
    assert added_last == {warper.__name__ for warper in _WARPERS}


def test_a_plain_cache_layer_grows_by_concatenation_and_never_in_place():
    layer = DynamicLayer()
    first = torch.randn(1, 2, 3, 4)
    layer.update(first, first)
    held, copied = layer.keys, layer.keys.clone()
    layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    assert layer.keys.shape == (1, 2, 4, 4)
    assert torch.equal(held, copied)


def test_a_sliding_layer_counts_its_tokens_in_a_plain_number():
    """A tensor that is added to in place would be shared by a fork of the layer."""
    layer = DynamicSlidingWindowLayer(sliding_window=3)
    states = torch.randn(1, 2, 5, 4)
    layer.update(states, states)
    assert layer.cumulative_length == 5
    assert type(layer.cumulative_length) is int


def test_reorder_cache_picks_and_repeats_rows():
    cache = DynamicCache()
    states = torch.randn(3, 2, 4, 5)
    cache.update(states, states + 1, 0)
    cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    assert torch.equal(cache.layers[0].keys, states[[2, 0, 0, 1]])
    assert torch.equal(cache.layers[0].values, states[[2, 0, 0, 1]] + 1)


def test_peft_layers_read_disable_adapters_from_one_private_flag():
    for kind in (BaseTunerLayer, AuxiliaryTrainingWrapper):
        assert isinstance(inspect.getattr_static(kind, "disable_adapters"), property)
    model = lora_model(tiny_model())
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    assert layers
    for layer in layers:
        assert layer._disable_adapters is False
        layer._disable_adapters = True
        assert layer.disable_adapters is True


def test_trainable_rows_lie_where_the_scores_read_them():
    model = lora_model(tiny_model())
    wrapper = next(m for m in model.modules() if isinstance(m, TrainableTokensWrapper))
    assert wrapper.token_adapter.trainable_tokens_delta["s2t"].shape == (16, 32)
    assert list(wrapper.token_adapter.token_indices["s2t"]) == list(RESERVED)
    merged = wrapper.token_adapter.get_merged_weights(["s2t"])
    assert torch.equal(merged[list(RESERVED)], wrapper.token_adapter.trainable_tokens_delta["s2t"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_decoder_ends_in_the_hidden_states_that_the_head_reads(family, batch):
    model = tiny_model(family)
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(**batch).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), model(**batch).logits)


def test_the_deepspeed_config_that_loading_hides_is_where_transformers_looks():
    """`whole_weights` puts back what it found; transformers asks this reference whether weights are shared out."""
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self):
            return True

    mine = Config()
    try:
        deepspeed.set_hf_deepspeed_config(mine)
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed._hf_deepspeed_config_weak_ref() is mine
        with whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed._hf_deepspeed_config_weak_ref() is mine
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_layers_that_can_be_checkpointed_and_compiled_share_a_class():
    """Dropout stays off in all modules but these, which ask for `training`; these are compiled."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for family in ("llama", "gemma2", "gpt2"):
        model = tiny_model(family, attn="eager")
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert len(layers) == model.config.num_hidden_layers, family
