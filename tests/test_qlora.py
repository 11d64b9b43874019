"""S2TTrainer on quantized base models. What needs bitsandbytes is left out where that is not installed.

Legend: N decision points, K candidates.
"""

import sys
from pathlib import Path

import pytest
import torch
from test_s2t_trainer import naive_scores, trained
from tiny import lora_model, prompts, tiny_model
from tiny_labels import NUM_CANDIDATES as K
from tiny_labels import make_labels, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from s2t_recipes import models
from transformers_s2t import S2T, LocalSelector, S2TConfig, S2TTrainer, SelectorConfig, s2t_generate
from transformers_s2t.calibration.scored_points import score_labels
from transformers_s2t.fingerprints import model_hash, same_weights
from transformers_s2t.labels.folder import read_labels
from transformers_s2t.training import s2t_trainer


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SCOPES = ("candidate", "sequence")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # a block of 4-bit weights is 64 long
TOLERANCE = 2e-3  # of scores in [0, 1]: what is multiplied is rounded to bfloat16 or 8 bits, whatever the weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a checkpoint: only `from_pretrained` quantizes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(monkeypatch):
    from s2t_recipes.training import train

    return train


def quantization(bits):
    pytest.importorskip("bitsandbytes")
    if bits == 8:  # a threshold takes columns out by the largest token of a forward: packed tokens are then not alone
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True)


def load(folder, config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def make_trainer(tmp_path, model, config=None, **settings):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 2e-3,
        "warmup_steps": 0,
        "min_prob_ratio": 0.0,
        "num_candidates": K,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if isinstance(model, str):
        defaults["model_init_kwargs"] = {"dtype": "float32"}
    return S2TTrainer(
        model=model,
        args=S2TConfig(**(defaults | settings)),
        train_dataset=make_labels(60),
        eval_dataset=make_labels(seed=1),
        processing_class=tiny_tokenizer(),
        quantization_config=config,
    )


def test_the_quantization_config_reaches_from_pretrained(tmp_path, folder, monkeypatch):
    calls, config = [], object()

    def from_pretrained(*args, **kwargs):
        calls.append((args, kwargs))
        return tiny_model()

    monkeypatch.setattr(s2t_trainer.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    make_trainer(tmp_path, folder, config)
    assert calls == [((folder,), {"dtype": "float32", "quantization_config": config})]


def test_a_config_that_would_be_ignored_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="`quantization_config` must not be in `args.model_init_kwargs` too"):
        make_trainer(tmp_path, folder, object(), model_init_kwargs={"quantization_config": {}})
    with pytest.raises(ValueError, match="need `model` as a name or path"):
        make_trainer(tmp_path, tiny_model(), object())


def test_a_quantized_head_is_refused(tmp_path):
    model = tiny_model()
    packed = model.lm_head.weight.data.to(torch.int8)
    model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="`llm_int8_skip_modules`"):
        make_trainer(tmp_path, model)


def test_the_recipe_says_what_is_missing_before_labels_are_read(recipe, monkeypatch, capsys):
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for flag in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(SystemExit):
            recipe.main(["--model", "m", "--labels", "nowhere", "--use_cpu", "true", f"--{flag}", "true"])
        message = f"train.py: `{flag}` needs bitsandbytes, which is not installed: pip install -U bitsandbytes\n"
        assert capsys.readouterr().err.endswith(message)


def test_flags_that_contradict_each_other_are_refused(recipe):
    with pytest.raises(ValueError, match="`load_in_4bit` and `load_in_8bit`"):
        recipe.ScriptArguments(model="m", labels="l", load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="`bnb_4bit_quant_type`"):
        recipe.ScriptArguments(model="m", labels="l", bnb_4bit_quant_type="nf8")


def test_the_recipes_flags_become_a_quantization_config(recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    args = S2TConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True)

    def config(**flags):
        return recipe.quantization_of(recipe.ScriptArguments(model="m", labels="l", **flags), args)

    assert config() is None and config(load_in_8bit=True).load_in_8bit
    nested = config(load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    assert nested.load_in_4bit and nested.bnb_4bit_use_double_quant and nested.bnb_4bit_quant_type == "fp4"
    assert nested.bnb_4bit_compute_dtype == torch.bfloat16  # that of the training where the weights' is "auto"
    assert config(load_in_4bit=True, dtype="float32").bnb_4bit_compute_dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scope", SCOPES)
def test_it_learns_on_a_quantized_model_and_changes_nothing_else(tmp_path, folder, scope, bits):
    trainer = make_trainer(tmp_path, folder, quantization(bits), adapter_scope=scope, num_train_epochs=4)
    trainable = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trainable)
    assert not any("lm_head" in name and "lora_" in name for name in trainable)
    assert {value.dtype for value in trainable.values()} == {torch.float32}
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items() if ".weight." not in name}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.2
    now = trainer.model.state_dict()  # without the constants of 4 bits, which bitsandbytes packs anew to evaluate
    changed = {name for name, value in weights.items() if not torch.equal(value, now[name])}
    assert changed == set(trainable)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_quantized_model_scores_packed_loaded_and_one_by_one_alike(tmp_path, folder, scope, bits):
    trainer = make_trainer(tmp_path, folder, quantization(bits), adapter_scope=scope, max_steps=8)
    trainer.train()
    trainer.model.eval()
    labels = make_labels().select(range(4))
    rows = labels.to_list()
    with torch.no_grad():
        _, scores_BNK, _ = trainer._loss(trainer.data_collator(rows))
        for row, scores_NK in zip(rows, scores_BNK):
            expected_NK = naive_scores(trainer, row)
            assert torch.allclose(scores_NK[: len(expected_NK)], expected_NK, atol=TOLERANCE)
    trainer.save_model()
    model = load(folder, quantization(bits))
    selector = LocalSelector.from_pretrained(tmp_path / "out", model)
    points = score_labels(selector, labels, num_candidates=K, min_prob_ratio=0.0)
    flat = torch.cat([scores[: len(row["positions"])] for scores, row in zip(scores_BNK, rows)]).flatten()
    found, expected = (torch.sort(values).values for values in (points.scores_NK.flatten(), flat))
    assert torch.allclose(found, expected, atol=TOLERANCE)
    inputs = prompts() | {"max_new_tokens": 6, "do_sample": False}
    ways = ({"logits_processor": S2T(selector)}, {"custom_generate": s2t_generate, "selector": selector})
    processed, generated = (model.generate(**inputs, **way) for way in ways)
    assert processed.shape == generated.shape
    assert (processed == generated).float().mean() > 0.8  # ties may break otherwise in another forward


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_a_quantized_model_leave_the_gradient_what_it_was(tmp_path, folder, bits, use_reentrant):
    settings = {"adapter_scope": "sequence", "max_steps": 3}
    whole = trained(make_trainer(tmp_path / "a", folder, quantization(bits), **settings))
    settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpointed = trained(make_trainer(tmp_path / "b", folder, quantization(bits), **settings))
    for name, value in whole.items():
        assert torch.allclose(value, checkpointed[name], atol=1e-6), name


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_was_quantized_before_is_trained_the_same(tmp_path, folder, bits):
    by_name = trained(make_trainer(tmp_path / "a", folder, quantization(bits), max_steps=2))
    model = load(folder, quantization(bits))
    assert same_weights(model_hash(tiny_model(**SIZES)), model_hash(model)), "labels of the full model fit"
    assert not same_weights(model_hash(tiny_model(seed=3, **SIZES)), model_hash(model)), "not those of another"
    for name, value in trained(make_trainer(tmp_path / "b", model, max_steps=2)).items():
        assert torch.equal(value, by_name[name]), name


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_an_adapter_is_never_merged_into_quantized_weights(folder, storage):
    """Stored as bfloat16, four bits look like weights."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    settings = SelectorConfig(reserved_token_ids=range(81, 97), adapter_scope="sequence", proposals="adapted")
    selector = LocalSelector(lora_model(load(folder, config)), settings, "s2t")
    with pytest.raises(ValueError, match="cannot be merged exactly"):
        selector.merge()


@pytest.fixture
def label(monkeypatch):
    from s2t_recipes.labeling import label

    return label


@pytest.mark.parametrize(("bits", "name"), [(4, "nf4"), (8, "int8")])
def test_a_quantized_teacher_labels_as_the_same_model_quantized_does(tmp_path, folder, label, bits, name):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "problems.jsonl").write_text('{"prompt": "w5 w6 w7"}\n{"prompt": "w8 w9"}\n')
    label.main(
        ["--model", folder, "--teacher_model", folder, f"--teacher_load_in_{bits}bit", "true", "--max_new_tokens", "6"]
        + ["--dataset", str(tmp_path / "problems.jsonl"), "--output_dir", str(tmp_path / "labels"), "--points", "all"]
    )
    labels, header = read_labels(tmp_path / "labels")
    assert header.teacher_quantization == name
    teacher = load(folder, label.make_quantization_config(bits == 4, bits == 8, "float32")).eval()
    for row in labels:
        ids_1T = torch.tensor([row["input_ids"]])
        logits_TV, whole_TV = (model(ids_1T).logits[0].log_softmax(-1) for model in (teacher, load(folder, None)))
        for position, ids, logprobs in zip(row["positions"], row["candidate_ids"], row["teacher_logprobs"]):
            assert torch.allclose(
                logits_TV[position - 1, ids], torch.tensor(logprobs), atol=0.3
            )  # bfloat16 or int8 products
            assert not torch.allclose(whole_TV[position - 1, ids], torch.tensor(logprobs), atol=1e-3)


def test_a_quantized_teacher_needs_bitsandbytes_and_a_model_of_its_own(tmp_path, folder, label, monkeypatch, capsys):
    (tmp_path / "problems.jsonl").write_text('{"prompt": "w5 w6 w7"}\n')
    flags = [
        "--model",
        folder,
        "--dataset",
        str(tmp_path / "problems.jsonl"),
        "--output_dir",
        str(tmp_path / "labels"),
    ]
    flags += ["--teacher_load_in_4bit", "true", "--max_new_tokens", "6"]
    for more, message in (
        (["--teacher_url", "http://host"], "`teacher_load_in_4bit` and `teacher_load_in_8bit` must not be true with"),
        (["--teacher_model", "t", "--teacher_load_in_8bit", "true"], "must not both be true"),
        (["--teacher_model", folder], "`teacher_load_in_4bit` needs bitsandbytes, which is not installed"),
    ):
        monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
        with pytest.raises(SystemExit) as error:
            label.main([*flags, *more])
        assert error.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "labels").exists()
