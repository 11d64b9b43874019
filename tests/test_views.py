"""Views: a model with an adapter off, on, or on for some tokens, all at once, over the same weights.

Legend: B rows, T tokens, V vocabulary.
"""

import copy
import functools
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, RESERVED, lora_model, tiny_model

from transformers_s2t.models.views import (
    ModelViews,
    adapted_layers,
    adapter_is_on,
    adapter_state,
    make_view,
    switch_adapter,
)


IDS = torch.tensor([[5, 9, 23, 60, 7], [8, 44, 3, 12, 71]])


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


def state_of(model):
    """All of a model that is not weights: modules, their attributes and hooks, by identity."""
    return {
        name: (
            id(module),
            {key: id(value) for key, value in vars(module).items()},
            {key: tuple(value) for key, value in vars(module).items() if "hooks" in key and value},
            {key: id(child) for key, child in module._modules.items()},
        )
        for name, module in model.named_modules()
    }


def adapted_model(family="llama", on=False, **settings):
    """A model that holds a random adapter "s2t"."""
    model = lora_model(tiny_model(family, **settings)).get_base_model()
    switch_adapter(model, "s2t", on)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "gemma3_text", "mixtral"])
def test_a_model_has_all_its_forms_at_once_and_stays_as_it_is(family):
    base = logits_of(tiny_model(family))
    model = adapted_model(family, on=True)
    adapted = logits_of(model)
    assert not torch.allclose(base, adapted, atol=0.1)
    switch_adapter(model, "s2t", False)
    before = state_of(model)
    views = ModelViews(model, "s2t")
    for _ in range(2):
        assert torch.equal(logits_of(views.adapted), adapted)
        assert torch.equal(logits_of(views.base), base)
        assert torch.equal(logits_of(model), base)
    assert state_of(model) == before
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    for view in (views.base, views.adapted):
        assert {parameter.data_ptr() for parameter in view.parameters()} <= ours, "no weight is copied"


def test_an_adapter_that_is_on_for_some_tokens():
    """On for the last token: the first ones are the base model's, the last one's own layers see the adapter."""
    model = adapted_model()
    views = ModelViews(model, "s2t")
    split = logits_of(views.on_tokens(slice(-1, None)))
    torch.testing.assert_close(split[:, :-1], logits_of(views.base)[:, :-1])
    with torch.no_grad():
        past = views.base(input_ids=IDS[:, :-1]).past_key_values
        expected = views.adapted(input_ids=IDS[:, -1:], past_key_values=past).logits
    torch.testing.assert_close(split[:, -1:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(views.on_tokens(slice(None))), logits_of(views.adapted))
    torch.testing.assert_close(logits_of(views.on_tokens(slice(0, 0))), logits_of(views.base))


def test_layers_take_over_hooks_and_hooks_of_a_view_are_its_own():
    model, seen = adapted_model(), []
    model.model.layers[0].register_forward_hook(lambda *call: seen.append("model"))
    views = ModelViews(model, "s2t")
    handle = views.adapted.model.layers[1].register_forward_hook(lambda *call: seen.append("view"))
    logits_of(views.adapted)
    assert seen == ["model", "view"]
    logits_of(model)
    assert seen == ["model", "view", "model"]
    handle.remove()
    logits_of(views.adapted)
    assert seen == ["model", "view", "model", "model"]


def test_what_a_view_is_watched_for_is_not_seen_of_the_model():
    model, seen = adapted_model(), []
    views = ModelViews(model, "s2t", {id(model.model.layers[1]): seen.append})
    logits_of(model)
    assert not seen
    for view in (views.base, views.adapted):
        logits_of(view)
    assert len(seen) == 2 and seen[0].shape == (*IDS.shape, 32) and not torch.allclose(seen[0], seen[1])


def by_method(module):
    module.forward = MethodType(type(module).forward, module)


def by_partial(module):
    module.forward = functools.update_wrapper(
        functools.partial(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), module),
        module.forward,
    )


def by_closure(module):
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs)

    module.forward = wrapped


def by_children(module):
    """A closure over the module itself, read when it runs."""
    module.forward = lambda hidden: module.down_proj(module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden))


def by_accelerate(module):
    add_hook_to_module(module, ModelHook())


def by_compile(module):
    module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("exchange", [by_method, by_partial, by_closure, by_children, by_accelerate, by_compile])
def test_a_module_with_a_forward_of_its_own_has_it_in_a_view_too(exchange):
    """Bound to the model's module, it would run the layers of the model: without the adapter, in silence."""
    expected = {on: logits_of(adapted_model(on=on)) for on in (False, True)}
    model = adapted_model()
    exchange(model.model.layers[1].mlp)
    if exchange is not by_children:
        exchange(model.model.layers[0])
        exchange(model)
    views = ModelViews(model, "s2t")
    torch.testing.assert_close(logits_of(views.adapted), expected[True])
    torch.testing.assert_close(logits_of(views.base), expected[False])
    torch.testing.assert_close(logits_of(model), expected[False])


def test_a_model_whose_weights_are_offloaded():
    expected = {on: logits_of(adapted_model(on=on)) for on in (False, True)}
    model = adapted_model()
    cpu_offload(model, execution_device=torch.device("cpu"))
    views = ModelViews(model, "s2t")
    torch.testing.assert_close(logits_of(views.adapted), expected[True])
    torch.testing.assert_close(logits_of(views.base), expected[False])


def test_adapters_on_the_parameters_of_experts():
    """PEFT exchanges a parameter of the base layer for the time of a forward: on the view's own layer."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    base = logits_of(tiny_model("mixtral", **sizes))
    model = tiny_model("mixtral", **sizes)
    torch.manual_seed(1)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    names = {name.rpartition("layers.0.")[2] for name, _ in model.named_parameters() if "layers.0." in name}
    assert set(targets) <= names
    settings = {"target_modules": ["q_proj"], "target_parameters": targets, "init_lora_weights": False}
    settings["trainable_token_indices"] = {"lm_head": list(RESERVED)}
    model = get_peft_model(model, LoraConfig(r=2, **settings), adapter_name="s2t").eval().get_base_model()
    switch_adapter(model, "s2t", True)
    adapted = logits_of(model)
    switch_adapter(model, "s2t", False)
    views, caught = ModelViews(model, "s2t"), []

    class Stop(Exception):
        pass

    def stop(*call):
        caught.append(logits_of(model))  # while the view's forward runs
        raise Stop

    torch.testing.assert_close(logits_of(views.adapted), adapted)
    before = state_of(model)
    handle = views.adapted.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(Stop):
        logits_of(views.adapted)
    handle.remove()
    for logits in (*caught, logits_of(views.base), logits_of(model)):
        assert torch.equal(logits, base)
    assert state_of(model) == before


def test_a_copy_of_a_model_shares_nothing_with_its_views():
    model = adapted_model()
    views = ModelViews(model, "s2t")
    expected = logits_of(views.adapted)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(views.adapted), expected)


def test_switching_the_model_itself_leaves_requires_grad_and_other_adapters_alone():
    """PEFT's own `disable_adapter()` drops it, which would end the training of a selector at its first evaluation."""
    peft_model = lora_model(tiny_model())
    peft_model.add_adapter("mine", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft_model.set_adapter("mine")
    model = peft_model.get_base_model()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mine = logits_of(model)
    for enabled in (True, False):
        switch_adapter(model, "s2t", enabled)
        assert adapter_is_on(model, "s2t") is enabled
        assert torch.equal(logits_of(model), mine) is not enabled
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(tiny_model()))
        assert torch.equal(logits_of(ModelViews(model, "s2t").base), logits_of(model))
    assert torch.equal(logits_of(model), mine), "what PEFT switches on again is not the S2T adapter"


def test_states_that_have_no_base_model_are_refused():
    peft_model = lora_model(tiny_model())
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="'s2t' is merged into the model's weights.*unmerge_adapter"):
        ModelViews(peft_model.get_base_model(), "s2t")
    peft_model.unmerge_adapter()
    peft_model.add_adapter("mine", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft_model.set_adapter("mine")
    merged_and_off = copy.deepcopy(peft_model)
    merged_and_off.merge_adapter()
    for layer in adapter_state(merged_and_off):
        layer._disable_adapters = True
    with pytest.raises(ValueError, match="'mine'.*switched off at the same time"):
        ModelViews(merged_and_off.get_base_model(), "s2t")


def test_a_merged_adapter_of_the_users_own_is_part_of_the_base():
    peft_model = lora_model(tiny_model())
    peft_model.add_adapter("mine", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    switch_adapter(peft_model.get_base_model(), "s2t", False)
    peft_model.set_adapter("mine")
    views = ModelViews(peft_model.get_base_model(), "s2t")
    expected = [logits_of(views.base), logits_of(views.adapted)]
    for layer in adapted_layers(peft_model.get_base_model(), "s2t"):  # (merge_adapter fails at the rows of the head)
        layer.merge(adapter_names=["mine"])
    views = ModelViews(peft_model.get_base_model(), "s2t")
    for view, logits in zip((views.base, views.adapted), expected):
        torch.testing.assert_close(logits_of(view), logits, atol=1e-4, rtol=1e-4)


def test_a_view_of_any_model():
    """Without an adapter: one module exchanged, the others shared."""
    model = tiny_model()
    view = make_view(model, {id(model.model.layers[0].mlp): torch.nn.Identity()})
    assert view is not model and view.model.layers[1] is model.model.layers[1]
    assert not torch.allclose(logits_of(view), logits_of(model))
    assert make_view(model, {}) is model
