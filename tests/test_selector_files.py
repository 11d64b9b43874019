"""A selector's folder and repository: what loads it, what refuses it, what is published."""

import copy
import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny import EOS, PAD, RESERVED, lora_model, make_selector, prompts, tiny_model
from tiny_hub import TinyHub
from tiny_labels import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

from transformers_s2t import LocalSelector, S2TDecodingConfig, S2TTrace, SelectorConfig, s2t_generate
from transformers_s2t.labels.seen_problems import read_seen_problems, write_seen_problems
from transformers_s2t.selector_files import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER, ADAPTER_WEIGHTS_NAME, adapter_folder


FORMS = [("candidate", "base"), ("sequence", "base"), ("sequence", "adapted")]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}


def fresh(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def write(model, **arguments):
    return model.generate(**prompts(), **(GREEDY | arguments)).tolist()


def select(model, selector, **arguments):
    return write(model, custom_generate=s2t_generate, selector=selector, **arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, and the folder of a selector of it."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    selector = make_selector(fresh(folder), base_model=str(folder / "base"), metrics={"agree_at_1": 0.5})
    selector.save_pretrained(folder / "selector", processing_class=tiny_tokenizer())
    write_seen_problems(folder / "selector", "training", ["0" * 16])
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    """What the base model writes, and what it writes with the selector."""
    model = fresh(folder)
    base = write(model)
    selected = select(model, LocalSelector.from_pretrained(folder / "selector", model))
    assert base != selected, "a selector that changes nothing would show nothing"
    return base, selected


# ---- what loads it ----


TOOLS = {
    "PeftModel": lambda path, model: PeftModel.from_pretrained(model, path),
    "AutoPeftModel": lambda path, model: AutoPeftModelForCausalLM.from_pretrained(path),
    "load_adapter": lambda path, model: model.load_adapter(path),
    "AutoModel": lambda path, model: AutoModelForCausalLM.from_pretrained(path),
    "pipeline": lambda path, model: pipeline("text-generation", model=path),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_refuse_a_selector_and_name_what_loads_it(tool, folder):
    with pytest.raises(Exception, match="LocalSelector"):
        TOOLS[tool](str(folder / "selector"), fresh(folder))


def test_a_folder_of_an_earlier_version_loads_with_a_hint(folder, texts, tmp_path):
    """Its adapter lies where PEFT looks. Saved again it does not."""
    model = fresh(folder)
    old = tmp_path / "old"
    lora_model(model, name="default").save_pretrained(old)
    SelectorConfig(RESERVED, min_prob_ratio=0.0, num_candidates=5).save_pretrained(old)
    model = fresh(folder)
    with pytest.warns(UserWarning, match=r"save_pretrained\(folder\)"):
        selector = LocalSelector.from_pretrained(old, model)
    assert select(model, selector) == texts[1]
    selector.save_pretrained(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = LocalSelector.from_pretrained(tmp_path / "new", loaded := fresh(folder))
    assert select(loaded, again) == texts[1]
    with pytest.raises(Exception, match="LocalSelector"):
        PeftModel.from_pretrained(fresh(folder), tmp_path / "new")


def test_a_folder_without_its_adapter_says_so(folder, tmp_path):
    SelectorConfig.from_pretrained(folder / "selector").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter itself is missing"):
        LocalSelector.from_pretrained(tmp_path, fresh(folder))


def test_a_subfolder_can_be_named(folder, texts):
    model = fresh(folder)
    assert select(model, LocalSelector.from_pretrained(folder, model, subfolder="selector")) == texts[1]


# ---- saving ----


def reloads_as(model, folder, expected):
    """Whether the model is saved as a plain checkpoint that writes this text."""
    model.save_pretrained(folder)
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert write(again) == expected
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("form", FORMS[:2], ids="-".join)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_that_holds_a_selector_is_saved_as_it_was(form, tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    expected = write(model)
    selector = make_selector(model, *form)
    names = reloads_as(selector.model, tmp_path, expected)
    assert ADAPTER_WEIGHTS_NAME not in names and ADAPTER_CONFIG_NAME not in names
    assert write(selector.model) == expected, "and it still holds the selector"
    copied = copy.deepcopy(selector.model)
    assert reloads_as(copied, tmp_path / "copy", expected) == names


def test_an_adapter_that_writes_the_text_must_be_merged_before_saving(tmp_path):
    selector = make_selector(tiny_model(), "sequence", "adapted")
    expected = write(selector.model)
    with pytest.raises(ValueError, match="merge it first"):
        selector.model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    selector.merge()
    reloads_as(selector.model, tmp_path / "model", expected)
    with pytest.raises(ValueError, match="no longer in the model"):
        selector.save_pretrained(tmp_path / "selector")


def test_a_model_with_other_adapters_is_not_saved_under_their_names(tmp_path):
    peft_model = lora_model(tiny_model(), seed=2, name="mine")
    selector = LocalSelector.from_pretrained(saved(tmp_path), peft_model)
    with pytest.raises(ValueError, match="'mine'.*through their PeftModel"):
        selector.model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def saved(folder):
    make_selector(tiny_model()).save_pretrained(folder / "selector")
    return folder / "selector"


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_unload_gives_the_model_back(form, folder, tmp_path):
    model = fresh(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    make_selector(tiny_model(), *form).save_pretrained(tmp_path / "selector")
    selector = LocalSelector.from_pretrained(tmp_path / "selector", model)
    assert selector.unload() is model
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert [name for name, value in model.named_parameters() if value.requires_grad] == trained
    assert "save_pretrained" not in model.__dict__ and not hasattr(model, "peft_config")
    with pytest.raises(ValueError, match="unload"):
        select(model, selector)
    LocalSelector.from_pretrained(tmp_path / "selector", model)  # under the same name


def test_unload_leaves_the_users_adapter(tmp_path):
    peft_model = lora_model(tiny_model(), seed=2, name="mine")
    expected = write(peft_model)
    selector = LocalSelector.from_pretrained(saved(tmp_path), peft_model)
    selector.unload()
    assert set(peft_model.peft_config) == {"mine"} and write(peft_model) == expected


def test_what_is_saved_is_what_was_loaded(folder, tmp_path):
    """Byte for byte, through a model and back: adapter, settings, and what others must know of it."""
    selector = LocalSelector.from_pretrained(folder / "selector", fresh(folder))
    selector.save_pretrained(tmp_path)
    for name in (f"s2t/{ADAPTER_WEIGHTS_NAME}", "s2t_config.json", "seen_problems.json"):
        assert (tmp_path / name).read_bytes() == (folder / "selector" / name).read_bytes(), name
    assert adapter_folder(tmp_path) == tmp_path / ADAPTER_FOLDER


# ---- the Hub ----


def test_a_selector_goes_to_the_hub_and_back(folder, texts, tmp_path, monkeypatch):
    source = tmp_path / "source"
    selector = LocalSelector.from_pretrained(folder / "selector", fresh(folder))
    selector.save_pretrained(source)
    with TinyHub(monkeypatch) as hub:
        selector.push_to_hub("you/selector", private=True, token="hf_abc", license="apache-2.0", tags=["math"])
        model = fresh(folder)
        loaded = LocalSelector.from_pretrained("you/selector", model)
        assert select(model, loaded) == texts[1]
        assert read_seen_problems("you/selector") == {"training": {"0" * 16}}
        loaded.push_to_hub("you/again", commit_message="Once more", revision="main")
    first, second = hub.files("you/selector"), hub.files("you/again")
    assert hub.private == {"you/selector": True, "you/again": False} and "hf_abc" in hub.tokens
    assert hub.messages == ["Upload S2T selector", "Once more"]
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {"README.md"}, "which names the repository"
    for name in (f"s2t/{ADAPTER_WEIGHTS_NAME}", "s2t_config.json", "seen_problems.json"):
        assert first[name] == (source / name).read_bytes()
    card = first["README.md"].decode()
    assert "license: apache-2.0" in card and "- math" in card and "arxiv:2604.26940" in card
    assert 'LocalSelector.from_pretrained("you/selector", model)' in card and "model-index" in card


def test_other_tools_refuse_a_repository_too(folder, monkeypatch):
    selector = LocalSelector.from_pretrained(folder / "selector", fresh(folder))
    with TinyHub(monkeypatch):
        selector.push_to_hub("you/selector")
        for tool in TOOLS.values():
            with pytest.raises(Exception, match="LocalSelector"):
                tool("you/selector", fresh(folder))


# ---- custom_generate ----


def test_a_repository_decodes_by_itself(folder, texts, tmp_path):
    """Named in the call, or as the model's own; greedily and by sampling, in one piece and as a stream."""
    path = str(folder / "selector")
    model = fresh(folder)
    named = {"custom_generate": path, "trust_remote_code": True}
    assert write(model, **named) == texts[1]
    assert model.generate(prompts()["input_ids"][:1], **GREEDY, **named).shape[1] > prompts()["input_ids"].shape[1]
    sampling = {"do_sample": True, "top_k": 20, "temperature": 0.7}
    selector = LocalSelector.from_pretrained(path, loaded := fresh(folder))
    torch.manual_seed(3)
    expected = select(loaded, selector, **sampling)
    torch.manual_seed(3)
    assert write(model, **named, **sampling) == expected
    trace = S2TTrace()
    write(model, **named, decoding_config={"trigger": "never"}, trace=trace)
    assert not any(bool(step["asked_B"].any()) for step in trace.steps)


def test_a_whole_checkpoint_selects_where_its_code_is_trusted(folder, texts, tmp_path, capsys):
    selector = LocalSelector.from_pretrained(folder / "selector", fresh(folder), processing_class=tiny_tokenizer())
    whole = selector.save_pretrained(tmp_path / "whole", include_base=True)
    assert write(AutoModelForCausalLM.from_pretrained(whole)) == texts[0], "without trust it is the base model"
    model = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True)
    assert write(model) == texts[1]
    tokenizer = AutoTokenizer.from_pretrained(whole)
    row = prompts((6,))
    expected = select(plain := fresh(folder), LocalSelector.from_pretrained(folder / "selector", plain))
    assert write(model) == expected
    streamed = model.generate(**row, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert tokenizer.decode(streamed[0, 6:]).split() == capsys.readouterr().out.replace("w", " w").split()
    text = tokenizer.decode(row["input_ids"][0])
    write_text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    written = write_text(text, max_new_tokens=8, do_sample=False, return_full_text=True)[0]["generated_text"]
    assert written.replace(" ", "") == tokenizer.decode(streamed[0]).replace(" ", "")


# ---- the policy travels ----


def test_the_stored_policy_is_what_a_call_without_one_does(folder, tmp_path):
    deployed = {"trigger": "entropy", "target_rate": 0.05}
    model = fresh(folder)
    selector = make_selector(model, thresholds={"entropy": {0.05: 1.5}}, decoding=deployed)
    assert selector.config == S2TDecodingConfig(
        trigger="entropy", target_rate=0.05, num_candidates=5, min_prob_ratio=0.0, warmup_tokens=3
    )
    selector.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "s2t_config.json").read_text())["decoding"]
    assert (stored["trigger"], stored["target_rate"]) == ("entropy", 0.05)
    again = LocalSelector.from_pretrained(tmp_path, fresh(folder))
    assert again.config == selector.config
    assert select(again.model, again) == select(model, selector, decoding_config=json.dumps(deployed))
    assert select(again.model, again, decoding_config={"trigger": "never"}) == write(
        model, suppress_tokens=list(RESERVED)
    )


@pytest.mark.parametrize(
    "config, message",
    [({"triger": "kl"}, "'triger', did you mean 'trigger'"), ("{", "must be JSON"), (3, "a mapping or JSON")],
)
def test_a_wrong_config_is_refused_by_name(config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        S2TDecodingConfig.from_any(config)
