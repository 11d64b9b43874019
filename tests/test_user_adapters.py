"""A model with adapters of the user's own: what is active now writes the text, whenever it was loaded or switched.

Reference: the base model into whose weights those adapters were merged for good, with a selector loaded into that.
"A" to "D" are the user's; "s2t" is the selector's: on for scores, and for the text with proposals="adapted".

PEFT 0.21 itself loads no adapter without rows of the head into a model where another one has such rows, as a selector
has: a KeyError, also without this package; and it ignores such rows where a second PeftModel is put around the first
one's model. So what is loaded after a selector is C, and what is put around it D.
"""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_decode import generate, name_of, num_flipped, plain, save_adapter
from tiny import SCOPES, WAYS, offer_all, prompts, tiny_model
from tiny_moments import changes, logits_of, state_of

from transformers_s2t import LocalSelector, S2TTrace


INPUTS = prompts((6, 4), seed=5)
SETTINGS = {"max_new_tokens": 10, "eos_token_id": None}
SEEDS = {"A": 7, "B": 8, "C": 9, "D": 10}
WRITERS = ((), ("A",), ("B",), ("C",), ("D",), ("A", "B"))
HEAD_ROWS = [11, 48, 63, 70]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A, B, C, D, and a selector of each scope. C and D bring rows of the head: C's change the text, D's do not."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed in SEEDS.items():
        model = tiny_model()
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear" if name == "A" else ["q_proj", "v_proj", "down_proj"],
            trainable_token_indices={"lm_head": HEAD_ROWS} if name in "CD" else None,
            init_lora_weights=False,
        )
        model = get_peft_model(model, config, adapter_name=name)
        for parameter_name, parameter in model.named_parameters():
            if name == "C" and "trainable_tokens_delta" in parameter_name:
                torch.nn.init.normal_(parameter.data, std=0.5)
        model.save_pretrained(folder)
    for setup in SCOPES:
        save_adapter(folder / name_of(setup), setup)
    return folder


def with_own(folder, *names):
    """A PeftModel that holds some of the user's adapters; the first is active."""
    peft_model = PeftModel.from_pretrained(tiny_model(), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        peft_model.load_adapter(folder / name, adapter_name=name)
    return peft_model.eval()


def merged(folder, writers):
    model = tiny_model()
    for name in writers:
        model = PeftModel.from_pretrained(model, folder / name, adapter_name=name).merge_and_unload()
    return model.eval()


def outcome(model, selector, way):
    """Tokens of a call, and what it saw at each step."""
    trace = S2TTrace()
    tokens = generate(way, model, INPUTS, selector, offer_all(), trace, **SETTINGS).tolist()
    assert num_flipped(trace) > 0
    return tokens, trace


def plain_text(model):
    return plain(model, INPUTS, **SETTINGS).tolist()


@cache
def reference(folder, writers, setup):
    """Tokens and trace of S2T where these adapters are part of the weights, and the plain text of the weights."""
    model = merged(folder, writers)
    text = plain_text(model)
    selector = LocalSelector.from_pretrained(folder / name_of(setup), model)
    return *outcome(model, selector, "loop"), text


def check_scores(trace, expected_trace):
    """Merging rounds: scores are near, not equal."""
    for step, expected_step in zip(trace.steps, expected_trace.steps):
        assert ("scores_AK" in step) == ("scores_AK" in expected_step)
        for name in ("scores_AK", "logprobs_AK"):
            if name in step:
                torch.testing.assert_close(step[name], expected_step[name], atol=1e-3, rtol=1e-3)


def check_against_reference(folder, writers, setup, way, model, selector, may_refuse=False):
    """Tokens and scores of one call equal the reference's, and the call changes nothing.

    A processor gets the logits of what the user's model does: where that is not what S2T is to write with, because the
    selector's adapter is on or off in it, an error that says so will do.
    """
    expected, expected_trace, _ = reference(folder, writers, setup)
    before, logits = state_of(model), logits_of(model, INPUTS)
    try:
        tokens, trace = outcome(model, selector, way)
    except ValueError as error:
        assert may_refuse and "adapter" in str(error), error
        tokens, trace = expected, expected_trace
    assert tokens == expected, [
        f"the text of {others}" for others in WRITERS if tokens == reference(folder, others, setup)[0]
    ]
    check_scores(trace, expected_trace)
    assert not changes(before, state_of(model))
    assert torch.equal(logits_of(model, INPUTS), logits)


# ---------------------------------------------------------------------------------------------------------------------
# What a user does after a selector was loaded. Each is (adapters before loading, what is done, who writes then)


@contextmanager
def nothing(model, folder):
    yield model


@contextmanager
def set_to_b(model, folder):
    model.set_adapter("B")
    yield model


@contextmanager
def set_to_both(model, folder):
    model.base_model.set_adapter(["A", "B"])
    yield model


@contextmanager
def set_to_s2t(model, folder):
    model.set_adapter("s2t")
    yield model


@contextmanager
def disabled(model, folder):
    with model.disable_adapter():
        yield model


@contextmanager
def disabled_and_enabled_again(model, folder):
    with model.disable_adapter():
        pass
    yield model


@contextmanager
def set_while_disabled(model, folder):
    with model.disable_adapter():
        model.set_adapter("B")
    yield model


@contextmanager
def layers_disabled(model, folder):
    model.base_model.disable_adapter_layers()
    yield model


@contextmanager
def load_c(model, folder):
    model.load_adapter(folder / "C", adapter_name="C")
    model.set_adapter("C")
    yield model


@contextmanager
def load_c_and_leave_it_off(model, folder):
    model.load_adapter(folder / "C", adapter_name="C")
    yield model


@contextmanager
def wrap_with_d(model, folder):
    """Onto the bare model that a selector was loaded into."""
    yield PeftModel.from_pretrained(model, folder / "D", adapter_name="D").eval()


@contextmanager
def wrap_with_d_and_disable(model, folder):
    with wrap_with_d(model, folder) as wrapped, wrapped.disable_adapter():
        yield wrapped


@contextmanager
def delete_b(model, folder):
    model.delete_adapter("B")
    yield model


@contextmanager
def set_to_b_and_delete_a(model, folder):
    model.set_adapter("B")
    model.delete_adapter("A")
    yield model


@contextmanager
def set_to_b_and_delete_it(model, folder):
    """PEFT then takes the first one that is left."""
    model.set_adapter("B")
    model.delete_adapter("B")
    yield model


ACTIONS = {
    "nothing": (("A", "B"), nothing, ("A",)),
    "set_adapter": (("A", "B"), set_to_b, ("B",)),
    "set_adapter-of-several": (("A", "B"), set_to_both, ("A", "B")),
    "set_adapter-of-the-selector": (("A", "B"), set_to_s2t, ()),
    "disable_adapter": (("A", "B"), disabled, ()),
    "disable_adapter-and-out-again": (("A", "B"), disabled_and_enabled_again, ("A",)),
    "set_adapter-in-disable_adapter": (("A", "B"), set_while_disabled, ("B",)),
    "disable_adapter_layers": (("A", "B"), layers_disabled, ()),
    "load_adapter": (("A",), load_c, ("C",)),
    "load_adapter-without-setting-it": (("A",), load_c_and_leave_it_off, ("A",)),
    "a-PeftModel-around-a-bare-model": ((), wrap_with_d, ("D",)),
    "a-PeftModel-around-a-bare-model-disabled": ((), wrap_with_d_and_disable, ()),
    "delete_adapter-of-an-idle-one": (("A", "B"), delete_b, ("A",)),
    "delete_adapter-of-the-one-before": (("A", "B"), set_to_b_and_delete_a, ("B",)),
    "delete_adapter-of-the-active-one": (("A", "B"), set_to_b_and_delete_it, ("A",)),
}


def load(folder, names, setup):
    """A model with these adapters of the user's and a selector in it."""
    model = with_own(folder, *names) if names else tiny_model()
    return model, LocalSelector.from_pretrained(folder / name_of(setup), model)


def test_the_references_differ(folder):
    for setup in SCOPES:
        texts = [reference(folder, writers, setup)[0] for writers in WRITERS]
        assert all(one != other for i, one in enumerate(texts) for other in texts[:i])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
@pytest.mark.parametrize("action", ACTIONS)
def test_what_the_user_has_active_now_writes(action, setup, way, folder):
    names, act, writers = ACTIONS[action]
    if act is delete_b and setup[1] == "adapted":
        pytest.skip("PEFT deletes no adapter while two are active in a layer with trained rows")
    model, selector = load(folder, names, setup)
    may_refuse = way == "processor" and (act is set_to_s2t or setup[1] == "adapted")
    with act(model, folder) as model:
        check_against_reference(folder, writers, setup, way, model, selector, may_refuse)


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_an_adapter_without_rows_of_the_head_is_loaded_after_the_selector_or_changes_nothing(setup, folder):
    """PEFT's own error is no silent one; after it A goes on writing."""
    model, selector = load(folder, ("A",), setup)
    writers = ("B",)
    try:
        model.load_adapter(folder / "B", adapter_name="B")
        model.set_adapter("B")
    except KeyError:
        writers = ("A",)
    for way in WAYS:
        may_refuse = way == "processor" and setup[1] == "adapted"
        check_against_reference(folder, writers, setup, way, model, selector, may_refuse)


@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
@pytest.mark.parametrize("action", ["set_adapter", "disable_adapter", "load_adapter"])
def test_a_switch_between_two_calls_of_one_processor_or_selector(action, setup, folder):
    """What a call finds is what is active then, not what the selector or S2T has seen before."""
    names, act, writers = ACTIONS[action]
    model, selector = load(folder, names, setup)
    for way in WAYS:
        check_against_reference(folder, ("A",), setup, way, model, selector)
    with act(model, folder) as model:
        for way in WAYS:
            may_refuse = way == "processor" and setup[1] == "adapted"
            check_against_reference(folder, writers, setup, way, model, selector, may_refuse)


@pytest.mark.parametrize("action", [name for name in ACTIONS if "of-the-selector" not in name])
@pytest.mark.parametrize("setup", SCOPES[:2], ids=name_of)
def test_a_plain_text_is_that_of_the_active_adapter(action, setup, folder):
    """Before and after a call with S2T."""
    names, act, writers = ACTIONS[action]
    model, selector = load(folder, names, setup)
    expected = reference(folder, writers, setup)[2]
    with act(model, folder) as model:
        assert plain_text(model) == expected
        for way in WAYS:
            outcome(model, selector, way)
            assert plain_text(model) == expected


def of_the_user(model):
    """The user's own parameters, and whether they are trained."""
    return {name: p.requires_grad for name, p in model.named_parameters() if ".A." in name or ".B." in name}


@pytest.mark.parametrize("how", ["A-active", "B-active", "both-active", "disabled"])
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_loading_leaves_the_users_adapters_as_they_were(setup, how, folder):
    """Which of them are active, what PEFT says of it, and whether they are being trained."""
    model = with_own(folder, "A", "B")
    if how == "B-active":
        model.set_adapter("B")
    elif how == "both-active":
        model.base_model.set_adapter(["A", "B"])
    elif how == "disabled":
        model.base_model.disable_adapter_layers()
    before = (model.active_adapter, model.active_adapters, of_the_user(model))
    LocalSelector.from_pretrained(folder / name_of(setup), model)
    active = [name for name in model.active_adapters if name != "s2t" or setup[1] == "base"]
    assert (model.active_adapter, active, of_the_user(model)) == before
    assert list(model.peft_config) == ["A", "B", "s2t"]


# ---------------------------------------------------------------------------------------------------------------------
# Merging: right, or refused before anything is changed


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def check_or_refused(folder, writers, setup, way, model, selector):
    """The call gives the reference's tokens or a ValueError that names the adapter; the weights stay as they are."""
    before, logits = weights_of(model), logits_of(model, INPUTS)
    try:
        tokens, trace = outcome(model, selector, way)
    except ValueError as error:
        assert "adapter" in str(error)
        trace = None
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]), name
    assert torch.equal(logits_of(model, INPUTS), logits)
    if trace is not None:
        expected, expected_trace, _ = reference(folder, writers, setup)
        assert tokens == expected
        check_scores(trace, expected_trace)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
@pytest.mark.parametrize("name", ["B", "C"])
def test_an_adapter_that_is_merged_after_loading_writes_or_is_refused(name, setup, way, folder):
    model, selector = load(folder, ("A", name), setup)
    model.set_adapter(name)
    model.merge_adapter()
    check_or_refused(folder, (name,), setup, way, model, selector)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_an_adapter_that_was_merged_before_loading_writes_or_is_refused(setup, way, folder):
    model = with_own(folder, "A", "B")
    model.merge_adapter(["A"])
    try:
        selector = LocalSelector.from_pretrained(folder / name_of(setup), model)
    except ValueError as error:
        assert "merge" in str(error)
        assert plain_text(model) == reference(folder, ("A",), setup)[2]
        return
    check_or_refused(folder, ("A",), setup, way, model, selector)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_an_adapter_that_is_merged_and_unmerged_is_as_it_was(setup, way, folder):
    model, selector = load(folder, ("A", "B"), setup)
    model.set_adapter("B")
    model.merge_adapter()
    model.unmerge_adapter()
    may_refuse = way == "processor" and setup[1] == "adapted"
    check_against_reference(folder, ("B",), setup, way, model, selector, may_refuse)


# ---------------------------------------------------------------------------------------------------------------------
# The same through transformers' own methods, on a model that no PeftModel was put around


def load_into_bare(folder, setup):
    model = tiny_model()
    for name in ("A", "B"):
        model.load_adapter(str(folder / name), adapter_name=name)
    model.set_adapter("A")
    return model.eval(), LocalSelector.from_pretrained(folder / name_of(setup), model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
@pytest.mark.parametrize("action", ["nothing", "set_adapter", "disable_adapters"])
def test_adapters_that_transformers_itself_loaded(action, setup, way, folder):
    model, selector = load_into_bare(folder, setup)
    assert [name for name in model.active_adapters() if name != "s2t" or setup[1] == "base"] == ["A"]
    writers = {"nothing": ("A",), "set_adapter": ("B",), "disable_adapters": ()}[action]
    if action == "set_adapter":
        model.set_adapter("B")
    elif action == "disable_adapters":
        model.disable_adapters()
    may_refuse = way == "processor" and setup[1] == "adapted"
    check_against_reference(folder, writers, setup, way, model, selector, may_refuse)
