"""recipes/merge.py: a model with its adapter merged is that model, and no other is overwritten."""

import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_evaluate import load_recipe
from tiny import prompts, tiny_model
from tiny_labels import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_s2t.reserved_tokens import vocab_hash


merge = load_recipe("merge")


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
    monkeypatch.setattr(merge, "PeftModel", None)  # it is found out before anything is merged
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
