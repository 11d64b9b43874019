"""recipes/merge.py: a model with its adapter merged is that model, and no other is overwritten."""

import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import RESERVED, lora_model, prompts, tiny_model
from tiny_labels import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2t_recipes.training import merge
from transformers_s2t import SelectorConfig
from transformers_s2t.fingerprints import model_hash, same_weights
from transformers_s2t.reserved_tokens import vocab_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, with a head of its own and tied, and an adapter of each that changes what it says."""
    folder = tmp_path_factory.mktemp("merge")
    for name, tied in (("model", False), ("tied", True)):
        tiny_model(tie_word_embeddings=tied).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(tiny_model(tie_word_embeddings=tied), config).save_pretrained(folder / f"{name}-adapter")
    return folder


def run(folder, output, monkeypatch, name="model", **options):
    options = {"model": folder / name, "adapter": folder / f"{name}-adapter", "output_dir": output} | options
    monkeypatch.setattr(
        sys, "argv", ["merge.py", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]
    )
    merge.main()


def logits_of(model):
    with torch.no_grad():
        return model(**prompts()).logits


@pytest.mark.parametrize("name", ["model", "tied"])
def test_the_merged_model_is_the_model_with_its_adapter(folder, tmp_path, monkeypatch, capsys, name):
    output = tmp_path / "deep" / "merged"
    run(folder, output, monkeypatch, name, dtype="float32")
    assert f"{output}: {folder / name} with {folder / name}-adapter merged" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    before = logits_of(base)
    expected = logits_of(PeftModel.from_pretrained(base, folder / f"{name}-adapter"))
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.float32 and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits_of(merged), expected, atol=2e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 0.1
    assert vocab_hash(AutoTokenizer.from_pretrained(output)) == vocab_hash(tiny_tokenizer())
    assert [file.name for file in output.parent.iterdir()] == ["merged"]  # nothing half written
    assert not any("adapter" in file.name for file in output.iterdir())


def test_a_folder_that_holds_something_is_not_overwritten(folder, tmp_path, monkeypatch):
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    monkeypatch.setattr(merge, "AutoModelForCausalLM", None)  # it is found out before anything is merged
    with pytest.raises(ValueError, match="`output_dir`: '.*other' holds a model already"):
        run(folder, tmp_path / "other", monkeypatch)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == weights
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    for output in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(ValueError, match="`output_dir` must be a new or empty folder, got '.*notes"):
            run(folder, output, monkeypatch)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes", "other"]


def test_an_empty_folder_is_filled(folder, tmp_path, monkeypatch):
    run(folder, tmp_path, monkeypatch)
    assert (tmp_path / "config.json").is_file()


def test_a_selector_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    """Its adapter is for the candidates that it scores: merged, it writes the text."""
    lora_model(tiny_model(), name="default").save_pretrained(tmp_path / "selector")
    SelectorConfig(RESERVED).save_pretrained(tmp_path / "selector")
    monkeypatch.setattr(merge, "AutoModelForCausalLM", None)
    with pytest.raises(ValueError, match="`adapter` must be an adapter that writes text, got '.*selector'.*merge()"):
        run(folder, tmp_path / "out", monkeypatch, adapter=tmp_path / "selector")
    with pytest.raises(ValueError, match="`model` must be a model, got '.*selector', an S2T-Local selector"):
        run(folder, tmp_path / "out", monkeypatch, model=tmp_path / "selector")
    with pytest.raises(ValueError, match="`model` must be a model, got the adapter '.*tied-adapter': merge it"):
        run(folder, tmp_path / "out", monkeypatch, model=folder / "tied-adapter")
    with pytest.raises(ValueError, match="`adapter`: '.*model' holds no adapter"):
        run(folder, tmp_path / "out", monkeypatch, adapter=folder / "model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["here", "none"])
def test_a_selector_of_the_hub_is_refused_where_it_can_be_looked_up(folder, tmp_path, monkeypatch, where):
    lora_model(tiny_model(), name="default").save_pretrained(tmp_path / "selector")
    SelectorConfig(RESERVED).save_pretrained(tmp_path / "selector")
    adapters = sys.modules[merge.check_tuned.__module__]
    asked = []

    def cached_file(source, name, **kwargs):
        asked.append((source, name))
        assert not any(kwargs.values()) and kwargs
        if where == "none":
            raise OSError("nobody to ask")
        return str(tmp_path / "selector" / name)

    monkeypatch.setattr(adapters, "cached_file", cached_file)
    monkeypatch.setattr(merge, "AutoModelForCausalLM", None)
    message = "got 'you/selector', an S2T-Local" if where == "here" else "'you/selector' holds no adapter"
    with pytest.raises(ValueError, match=f"`adapter`.*{message}"):
        merge.check_tuned("adapter", "you/selector", "something")
    assert asked[0] == ("you/selector", "s2t_config.json")


def test_the_adapters_own_tokenizer_and_chat_template_are_kept(folder, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'of the adapter' }}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    adapter = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    run(folder, tmp_path / "merged", monkeypatch, adapter=tmp_path / "adapter")
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found.chat_template == tokenizer.chat_template and vocab_hash(found) == vocab_hash(tokenizer)
    assert vocab_hash(found) != vocab_hash(tiny_tokenizer())


RESIZED = {
    "saved embeddings": {"target_modules": ["q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on embeddings": {"target_modules": ["embed_tokens"]},
    "lora on the head": {"target_modules": ["lm_head", "v_proj"]},
}


@pytest.mark.parametrize("num_rows", [113, 90])
@pytest.mark.parametrize(("what", "tied"), [*((what, False) for what in RESIZED), ("saved embeddings", True)])
def test_an_adapter_of_a_model_with_other_rows_is_merged_into_as_many(
    folder, tmp_path, monkeypatch, what, num_rows, tied
):
    torch.manual_seed(1)
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    adapter = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **RESIZED[what]))
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=what == "saved embeddings")
    run(folder, tmp_path / "merged", monkeypatch, "tied" if tied else "model", adapter=tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == num_rows == merged.get_output_embeddings().weight.shape[0]
    known = slice(None) if what in ("saved embeddings", "modules_to_save") else slice(90)  # rows that were stored
    found, expected = logits_of(merged)[..., known], logits_of(adapter)[..., known]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_an_adapter_of_another_model_is_named(folder, tmp_path, monkeypatch):
    config = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(tiny_model(hidden_size=40), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="`adapter`: '.*adapter' was trained on a model of other shapes .*q_proj"):
        run(folder, tmp_path / "merged", monkeypatch, adapter=tmp_path / "adapter")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_is_not_taken_for_its_base(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "merged", monkeypatch)
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "model", tmp_path / "merged"))
    assert not same_weights(model_hash(base), model_hash(merged))
