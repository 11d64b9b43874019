"""What a recipe is given as a model or an adapter is one: a selector's adapter never writes text by mistake."""

import shutil
import sys
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from tiny import RESERVED, lora_model, tiny_model
from tiny_labels import make_labels, make_uneven_labels, tiny_tokenizer
from transformers import AutoModelForCausalLM

from s2t_recipes import demo
from s2t_recipes.evaluation import agreement, retention
from s2t_recipes.evaluation import run as evaluation
from s2t_recipes.labeling import label
from s2t_recipes.training import calibrate, export, imitate, merge, router, train
from transformers_s2t import S2TConfig, S2TTrainer, SelectorConfig
from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.reserved_tokens import vocab_hash


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A model, an adapter that writes text, a selector (both know their base by its path), labels and problems."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tuned = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for name, model in (("tuned", tuned), ("selector", lora_model(tiny_model(), name="default"))):
        model.peft_config["default"].base_model_name_or_path = str(folder / "model")
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    hashes = {"vocab_hash": vocab_hash(tiny_tokenizer())}
    SelectorConfig(RESERVED, base_model=str(folder / "model"), **hashes).save_pretrained(folder / "selector")
    rows = list(make_uneven_labels(6))
    write_shard(folder / "labels", 0, rows[:4])
    write_shard(folder / "labels", 1, rows[4:], "validation")
    header = {"num_problems": 6, "complete": True, "num_candidates": 4, "divergence_threshold": 0.1} | hashes
    write_header(folder / "labels", TrajectoryHeader("student", "teacher", **header), ("train", "validation"))
    lines = [f'{{"prompt": "w{id} w{id + 1}", "answer": "w{id}"}}\n' for id in range(5, 9)]
    (folder / "problems.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("recipe", ["calibrate", "train_router", "export", "agreement"])
@pytest.mark.parametrize("base", ["some/where/model", "./model", "nobody/has-it", ""])
def test_a_base_model_that_is_gone_is_asked_for_before_anything_is_loaded(bed, tmp_path, monkeypatch, recipe, base):
    config = SelectorConfig.from_pretrained(bed / "selector")
    if recipe == "export":
        config = replace(config, adapter_scope="sequence", proposals="adapted")
    adapter = shutil.copytree(bed / "selector", tmp_path / "selector")
    replace(config, base_model=base).save_pretrained(adapter)
    values = {name: value.format(bed=bed) for name, value in RECIPES.get(recipe, OUT | SELECTOR).items()}
    values.pop("--model", None)
    values["--adapters" if recipe == "agreement" else "--adapter"] = str(adapter)
    monkeypatch.setattr(sys, "argv", [recipe, *(word for pair in values.items() for word in pair)])
    for name in ("load_model", "AutoModelForCausalLM", "load_tokenizer"):
        monkeypatch.setattr(MODULES[recipe], name, None, raising=False)
    with pytest.raises((FileNotFoundError, ValueError), match=r"'.*selector' (was trained on|does not say).*--model"):
        MODULES[recipe].main()


MODEL = {"--model": "{bed}/model"}
PAIR = MODEL | {"--teacher_model": "{bed}/model"}
LABELS = {"--labels": "{bed}/labels"}
OUT = {"--output_dir": "{bed}/out"}
DATASET = {"--dataset": "{bed}/problems.jsonl"}
SELECTOR = {"--adapter": "{bed}/selector"}
MODULES = {
    "agreement": agreement,
    "calibrate": calibrate,
    "demo": demo,
    "eval": evaluation,
    "export": export,
    "label": label,
    "merge": merge,
    "retention": retention,
    "train": train,
    "train_baseline": imitate,
    "train_router": router,
}
#: recipe -> arguments that would run
RECIPES = {
    "agreement": LABELS | {"--adapters": "{bed}/selector"},
    "calibrate": PAIR | LABELS | SELECTOR,
    "demo": PAIR | DATASET | OUT,
    "eval": PAIR | DATASET | OUT,
    "label": PAIR | DATASET | OUT,
    "merge": MODEL | OUT | {"--adapter": "{bed}/tuned"},
    "retention": MODEL | LABELS | {"--text": "{bed}/problems.jsonl", "--tuned": "sft={bed}/tuned"},
    "train": MODEL | LABELS | OUT | {"--use_cpu": "true"},
    "train_baseline": PAIR | LABELS | OUT | {"--use_cpu": "true", "--method": "sft"},
    "train_router": LABELS | SELECTOR,
}
GIVEN = [(recipe, "--model", folder) for recipe in RECIPES for folder in ("selector", "tuned")]
GIVEN += [(recipe, "--teacher_model", "selector") for recipe in RECIPES if "--teacher_model" in RECIPES[recipe]]
GIVEN += [(recipe, "--tuned", "selector") for recipe in ("eval", "retention")]
GIVEN += [("merge", "--adapter", "selector")]


@pytest.mark.parametrize(("recipe", "argument", "given"), GIVEN, ids=lambda value: value.strip("-"))
def test_a_recipe_refuses_adapters_that_would_write_text(bed, monkeypatch, capsys, recipe, argument, given):
    for name, loaded in list(sys.modules.items()):  # before a model is loaded
        if name.startswith("s2t_recipes.") and hasattr(loaded, "AutoModelForCausalLM"):
            monkeypatch.setattr(loaded, "AutoModelForCausalLM", None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    value = f"sft={bed}/{given}" if argument == "--tuned" else f"{bed}/{given}"
    arguments = {name: text.replace("{bed}", str(bed)) for name, text in RECIPES[recipe].items()} | {argument: value}
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *(part for pair in arguments.items() for part in pair)])
    with pytest.raises((ValueError, SystemExit)) as error:
        MODULES[recipe].main()
    message = str(error.value) + capsys.readouterr().err
    assert f"`{argument[2:]}` must be" in message and f"{bed}/{given}" in message
    assert not (bed / "out").exists()


@pytest.mark.parametrize("given", ["selector", "tuned"])
def test_the_trainer_refuses_a_model_that_holds_adapters(bed, tmp_path, given):
    """They would write the text on which the selector is trained, and belong to no file that is saved."""
    settings = {"args": S2TConfig(output_dir=str(tmp_path), use_cpu=True), "train_dataset": make_labels()}
    with pytest.raises(ValueError, match=f"`model` must be a base model, got the adapter '.*{given}'"):
        S2TTrainer(str(bed / given), **settings)
    model = AutoModelForCausalLM.from_pretrained(bed / given)
    with pytest.raises(ValueError, match="`model` must be a base model or a PeftModel, got one that holds adapters"):
        S2TTrainer(model, processing_class=tiny_tokenizer(), **settings)
